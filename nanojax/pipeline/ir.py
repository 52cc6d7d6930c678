"""What is a pipeline?  One decoder layer as data: nano-operations on token ranges, their dependencies, shares and streams.

A `Pipeline` is the layer in steady state; it has four readers: `execute`, `simulate`, `search` and `render`.  Its terms are
those of the NanoFlow paper (arXiv 2408.12757, sections 3 and 4.1).
"""

import dataclasses
import enum


class Resource(enum.Enum):
    """What bounds an operation."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class OpKind(enum.Enum):
    """An operation of a decoder layer (paper, Figure 1).

    The collectives come in two forms.  Gather: `ATTN_AG`, `O` with its weight split by columns, `O_AG`.  Reduce: `O` with
    its weight split by rows, `O_AR`.  `D` is always split by rows, hence `D_AR`.
    """

    KQV = "KQV"
    DEC_ATTN = "DecAttn"
    PF_ATTN = "PfAttn"
    ATTN_AG = "Attn.AG"
    O = "O"  # noqa: E741
    O_AG = "O.AG"
    O_AR = "O.AR"
    ROUTER = "Router"
    UG = "UG"
    D = "D"
    D_AR = "D.AR"

    @property
    def resource(self) -> Resource:
        """The resource that bounds the operation at the batch sizes of throughput-oriented serving."""
        if self is OpKind.DEC_ATTN:
            return Resource.MEMORY
        return Resource.NETWORK if self in COLLECTIVES else Resource.COMPUTE


COLLECTIVES = frozenset({OpKind.ATTN_AG, OpKind.O_AG, OpKind.O_AR, OpKind.D_AR})


@dataclasses.dataclass(frozen=True, order=True)
class NanoBatch:
    """Tokens `start` to `stop` (exclusive) of the ragged batch."""

    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        """Length of the range."""
        return self.stop - self.start

    def intersects(self, other: "NanoBatch") -> bool:
        """Whether the ranges share a token."""
        return self.start < other.stop and other.start < self.stop


@dataclasses.dataclass(frozen=True)
class Node:
    """A nano-operation: one operation on one nano-batch.

    nano_batch: index into the pipeline's `nano_batches`.
    deps: nodes, by index, that must be done first, of the same iteration of the loop over layers.
    carried_deps: the same, of the previous iteration.
    share: fraction of the device given to this node while others run beside it (the paper's R).
    stream: nodes of one stream run one after another, in the order of the pipeline's `nodes`.
    lag: in iteration i the node works on layer i - lag (software pipelining; 0 or 1).
    """

    op: OpKind
    nano_batch: int
    deps: tuple[int, ...] = ()
    share: float = 1.0
    stream: int = 0
    lag: int = 0
    carried_deps: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """One layer: `nodes` in launch order on ranges `nano_batches` of `num_tokens` tokens."""

    name: str
    num_tokens: int
    nano_batches: tuple[NanoBatch, ...]
    nodes: tuple[Node, ...]

    def tokens_of(self, node: Node) -> NanoBatch:
        """The token range of `node`."""
        return self.nano_batches[node.nano_batch]

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether the pipeline has collectives; one without them is for one device."""
        return any(node.op in COLLECTIVES for node in self.nodes)

    @property
    def num_streams(self) -> int:
        """Streams that the nodes name."""
        return len({node.stream for node in self.nodes})

    def label(self, index: int) -> str:
        """Short name of a node for pictures: `KQV2` is the second of several by tokens, `KQV` the only one."""
        same = [i for i, node in enumerate(self.nodes) if node.op is self.nodes[index].op]
        same.sort(key=lambda i: self.tokens_of(self.nodes[i]))
        return self.nodes[index].op.value + (str(same.index(index) + 1) if len(same) > 1 else "")

    def describe(self, index: int) -> str:
        """Name of a node for messages: `node 5 (O on tokens 640..1408)`."""
        node = self.nodes[index]
        return f"node {index} ({node.op.value} on tokens {self.tokens_of(node).start}..{self.tokens_of(node).stop})"

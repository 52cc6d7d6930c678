"""How is a pipeline written down?  JSON that a person can read and write: one line per node, in launch order.

    {
      "name": "mine",
      "num_tokens": 16,
      "nodes": [
        {"op": "KQV", "tokens": [0, 8]},
        {"op": "DecAttn", "tokens": [0, 8], "stream": 1, "share": 0.4},
        ...
      ]
    }

`op` is an operation's name as in `OpKind`.  Optional: `share` (1), `stream` (0), `lag` (0), `deps` and `carried_deps`
(positions in `nodes`, from 0).  A node with neither `deps` nor `carried_deps` gets those that the data flow asks for.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanojax.pipeline.dependencies import with_dependencies
from nanojax.pipeline.ir import NanoBatch, Node, OpKind, Pipeline

PIPELINE_FIELDS = ("name", "num_tokens", "nano_batches", "nodes")
NODE_FIELDS = ("op", "tokens", "share", "stream", "lag", "deps", "carried_deps")


def to_json(pipeline: Pipeline) -> str:
    """The pipeline as text; `from_json` gives an equal one.

    Fields that have their default are left out, but for `deps`.  Nano-batches are written in the nodes; a list of them is
    added only where it holds more than the nodes tell.
    """
    fields = [f'"name": {json.dumps(pipeline.name)}', f'"num_tokens": {pipeline.num_tokens}']
    if pipeline.nano_batches != tuple(dict.fromkeys(map(pipeline.tokens_of, pipeline.nodes))):
        fields.append(f'"nano_batches": {json.dumps([_range(tokens) for tokens in pipeline.nano_batches])}')
    rows = ",\n    ".join(json.dumps(_fields(pipeline, node)) for node in pipeline.nodes)
    fields.append('"nodes": [\n    ' + rows + "\n  ]")
    return "{\n  " + ",\n  ".join(fields) + "\n}\n"


def from_json(text: str) -> Pipeline:
    """Reads what `to_json` or a person wrote.  The result is not yet validated.

    Raises ValueError that names the node and the field: no JSON, a missing or unknown field, an unknown operation, a value
    of a wrong type, or a node that is launched before one whose result it reads.
    """
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"pipeline: this is no JSON: {error}") from error
    _check_fields("pipeline", entry, PIPELINE_FIELDS, required=("name", "num_tokens", "nodes"))
    name, num_tokens = entry["name"], entry["num_tokens"]
    if not isinstance(name, str):
        raise ValueError(f"pipeline: name={name!r} must be text")
    if not _is_int(num_tokens):
        raise ValueError(f"pipeline: num_tokens={num_tokens!r} must be an integer")
    for field in ("nano_batches", "nodes"):
        if not isinstance(entry.get(field, []), list):
            raise ValueError(f"pipeline: {field} must be a list, got {entry[field]!r}")
    ranges = [_nano_batch(f"nano_batches[{i}]", tokens) for i, tokens in enumerate(entry.get("nano_batches", []))]
    nodes, without = [], []
    for i, fields in enumerate(entry["nodes"]):
        _check_fields(f"node {i}", fields, NODE_FIELDS, required=("op", "tokens"))
        tokens = _nano_batch(f"node {i}: tokens", fields["tokens"])
        if tokens not in ranges:
            ranges.append(tokens)
        nodes.append(_node(f"node {i}", fields, ranges.index(tokens)))
        if "deps" not in fields and "carried_deps" not in fields:
            without.append(i)
    pipeline = Pipeline(name, num_tokens, tuple(ranges), tuple(nodes))
    return with_dependencies(pipeline, without) if without else pipeline


def _fields(pipeline: Pipeline, node: Node) -> dict[str, Any]:
    plain = Node(node.op, node.nano_batch)
    changed = {
        name: getattr(node, name) for name in ("share", "stream", "lag") if getattr(node, name) != getattr(plain, name)
    }
    fields = {"op": node.op.value, "tokens": _range(pipeline.tokens_of(node)), **changed, "deps": list(node.deps)}
    return fields | ({"carried_deps": list(node.carried_deps)} if node.carried_deps else {})


def _node(where: str, fields: Mapping[str, Any], nano_batch: int) -> Node:
    known = {op.value: op for op in OpKind}
    if fields["op"] not in known:
        raise ValueError(f"{where}: op={fields['op']!r} is none of {', '.join(known)}")
    share, stream, lag = fields.get("share", 1.0), fields.get("stream", 0), fields.get("lag", 0)
    if not (_is_int(share) or isinstance(share, float)):
        raise ValueError(f"{where}: share={share!r} must be a number")
    for field, value in (("stream", stream), ("lag", lag)):
        if not _is_int(value):
            raise ValueError(f"{where}: {field}={value!r} must be an integer")
    deps, carried = fields.get("deps", []), fields.get("carried_deps", [])
    for field, value in (("deps", deps), ("carried_deps", carried)):
        if not (isinstance(value, list) and all(map(_is_int, value))):
            raise ValueError(f"{where}: {field}={value!r} must be a list of node positions")
    return Node(known[fields["op"]], nano_batch, tuple(deps), float(share), stream, lag, tuple(carried))


def _nano_batch(where: str, tokens: Any) -> NanoBatch:
    if not (isinstance(tokens, list) and len(tokens) == 2 and all(map(_is_int, tokens))):
        raise ValueError(f"{where}={tokens!r} must be [start, stop]")
    return NanoBatch(*tokens)


def _check_fields(where: str, fields: Any, known: Sequence[str], *, required: Sequence[str]) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{where} must be a JSON object, got {fields!r}")
    for field in required:
        if field not in fields:
            raise ValueError(f"{where}: field {field!r} is missing")
    for field in fields:
        if field not in known:
            raise ValueError(f"{where}: field {field!r} is unknown: {', '.join(known)}")


def _range(tokens: NanoBatch) -> list[int]:
    return [tokens.start, tokens.stop]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

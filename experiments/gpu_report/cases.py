"""What is a part of the report made of?  Cases, each a few rows of a table, run in order in a process of their own.

A part is a module with `cases(setting) -> list[Case]`, the same list for the same setting, so that a process that died in
one case can be followed by another that goes on after it.  Making a case must cost nothing: arrays belong into `run`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
"""Column -> number, text or None.  A case's rows may have columns that others have not."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all parts are told.

    out: folder of the records.    is_smoke: tiny shapes, what a CPU can run.    num_repeats: timings of each program.
    """

    out: pathlib.Path
    is_smoke: bool
    seed: int = 0
    num_repeats: int = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """`run` measures and gives rows; it is not begun with less than `needs_s` seconds left.

    A GPU kernel can hang: after `limit_s` without an answer the process is ended, and the case is called hung.
    """

    name: str
    run: Callable[[], Sequence[Row]]
    needs_s: float = 4.0
    limit_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class Part:
    """A module of cases.

    limit_s: seconds that it gets at most of the report's.    needs_s: not begun with less left.
    origin: of its numbers.    needs_device: whether it touches the GPU.
    leaves_memory: JAX must not take the card's memory in advance.    package: where the module is.
    """

    name: str
    question: str
    limit_s: float
    needs_s: float = 15.0
    origin: str = "measured"
    needs_device: bool = True
    leaves_memory: bool = False
    package: str = "experiments.gpu_report"

    @property
    def module(self) -> str:
        """Where its `cases` are."""
        return f"{self.package}.{self.name}"


PARTS = (
    Part("peaks", "How fast are this card's matmul and memory?", 25),
    Part("kernels", "Is every kernel right at real shapes?", 80),
    Part("kernel_speed", "How fast is every kernel on the whole device?", 60),
    Part("cta_curves", "How fast are matmul and decode attention on a share of the multiprocessors?", 60),
    Part("pairs", "What do two operations side by side take?", 60),
    Part("op_profile", "How long does each operation of a layer take?", 50, needs_s=30),
    Part("search_card", "Which pipeline suits this card?", 30, needs_s=10, origin="simulated", needs_device=False),
    Part("layer_times", "What does a layer take with decode attention beside it?", 150, needs_s=40),
    Part("end_to_end", "How many tokens per second does LLaMA-3-8B serve?", 170, needs_s=60),
    Part("step_trace", "Where does the time of a step go?", 50, needs_s=40),
    Part("baselines", "How fast are XLA's and cuDNN's kernels?", 50),
    Part("baselines_torch", "How fast are PyTorch's kernels and its serving loop?", 60, leaves_memory=True),
    Part("mixtral", "How many tokens per second does Mixtral-8x7B serve?", 120, needs_s=90),
)
"""In the order in which they run: what later parts read, then what is wanted most."""

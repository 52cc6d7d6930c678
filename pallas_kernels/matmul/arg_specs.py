"""Which calls does the matrix product see in practice?  One list for the tests and the benchmark."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """`num_tokens` activations of `width` values, a kernel of `num_columns` columns."""

    name: str
    num_tokens: int
    width: int
    num_columns: int

    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.num_tokens * self.width * self.num_columns

    def kernel_bytes(self, itemsize: int = 2) -> int:
        """Bytes of weights that the call has to read."""
        return self.width * self.num_columns * itemsize


OPERATIONS = (("KQV", 576, 960), ("O", 576, 576), ("UG", 576, 3072), ("D", 1536, 576))
"""The operations of SmolLM2-135M: (name, width, columns)."""

ARG_SPECS = tuple(
    ArgSpec(f"{name}-{num_tokens}", num_tokens, width, num_columns)
    for name, width, num_columns in OPERATIONS
    for num_tokens in (16, 64, 256)
)

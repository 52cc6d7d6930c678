"""Which kernels are there?  One folder each: reference, contract, implementations, shapes.  Imports jax, never nanojax."""

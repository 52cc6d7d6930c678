"""Which kernels are there?  One folder each: reference, contract, implementations, shapes.  A leaf: never nanojax."""

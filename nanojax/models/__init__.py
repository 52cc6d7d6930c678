"""Which models are there?  Flax NNX definitions; everyone outside sees a params pytree and pure functions."""

"""nanojax: NanoFlow-style LLM serving in JAX, for research."""

__version__ = "0.1.0"

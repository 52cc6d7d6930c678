"""What do the kernels, their overlap and the engine reach on the GPU here?  `python -m experiments.gpu_report --out=DIR`."""

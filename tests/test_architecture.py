"""Law: a file imports only from lower ranks; side effects are only where the design puts them."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Lowest first.  A module may import modules of lower ranks, and of its own package's submodules.
RANKS = [
    [
        "nanojax",
        "nanojax.array_types",
        "pallas_kernels.device",
        "pallas_kernels.inlined",
        "pallas_kernels.numba_ffi",
        "pallas_kernels.numba_memory",
        "pallas_kernels.numba_vectors16",
    ],
    ["pallas_kernels.triton_call"],
    ["pallas_kernels.matmul", "pallas_kernels.rms_norm"],
    ["pallas_kernels"],
    ["pallas_kernels.overlap"],
    ["nanojax.config", "nanojax.control", "nanojax.hardware", "nanojax.huge_pages", "nanojax.models.layers"],
    [
        "nanojax.kv_cache",
        "nanojax.ordering",
        "nanojax.batch",
        "nanojax.models",
        "nanojax.sampling",
        "nanojax.workload",
        "nanojax.metrics",
        "nanojax.pipeline.ir",
    ],
    ["nanojax.scheduler", "nanojax.pipeline", "nanojax.weights"],
    ["nanojax.admission", "nanojax.text_stream"],
    ["nanojax.step_time", "nanojax.virtual_clock"],
    ["nanojax.virtual_requests"],
    [
        "nanojax.virtual_engine",
        "nanojax.engine",
        "nanojax.pipeline.simulate",
        "nanojax.pipeline.render",
    ],
    ["nanojax.invariants", "nanojax.intake", "nanojax.live_request", "nanojax.virtual_run", "nanojax.pipeline.search"],
    ["nanojax.serve", "nanojax.simulate"],
    ["nanojax.fleet"],
    ["experiments"],
    ["experiments.gpu_report"],
]
FORBIDDEN_NAMES = {"utils", "helpers", "base", "types", "common", "misc"}


def modules():
    for package in ("nanojax", "pallas_kernels", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def rank(module):
    fits = [
        (len(name), i) for i, row in enumerate(RANKS) for name in row if module == name or module.startswith(name + ".")
    ]
    assert fits, f"{module} has no rank"
    return max(fits)[1]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")
            )


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_down(module, path):
    ours = [name for name in imports(path) if is_module(name) and name != module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for name in ours:
        if name in ("nanojax", "nanojax.pipeline", "nanojax.models", "pallas_kernels", "experiments"):
            continue  # `from package import module`: the module itself is checked
        siblings = package != "nanojax" and name.startswith(package + ".")
        assert siblings or name == package or rank(name) < rank(module), (
            f"{module} imports {name}, which is not below it"
        )


def test_pallas_kernels_is_a_leaf():
    for module, path in modules():
        if module.startswith("pallas_kernels"):
            assert not [name for name in imports(path) if name.startswith(("nanojax", "experiments"))], module


def test_no_module_is_a_drawer():
    for module, _ in modules():
        assert module.rpartition(".")[2] not in FORBIDDEN_NAMES, module


# What a module may import or call is where its effects are (design: flags and printing in experiments only, ...).
EFFECTS = {
    "absl": ("experiments",),
    "tqdm": ("experiments",),
    "matplotlib": ("experiments",),
    "logging": ("experiments",),
    "time": ("experiments", "nanojax.serve", "nanojax.hardware"),
    "os": (
        "experiments",
        "nanojax.weights",
        "nanojax.workload",
        "nanojax.hardware",
        "pallas_kernels.numba_ffi",
    ),
}


def test_effects_are_where_the_design_puts_them():
    for module, path in modules():
        for name in imports(path):
            allowed = EFFECTS.get(name.split(".")[0])
            assert allowed is None or module.startswith(allowed), f"{module} imports {name}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert module.startswith("experiments"), f"{module} prints"


def test_every_file_says_which_question_it_answers():
    for module, path in modules():
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{module} has no docstring"

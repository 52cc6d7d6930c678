"""Does every implementation of the matrix product keep the contract of `api.py`?"""

import ast
import concurrent.futures
import fcntl
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import numba_ffi
from pallas_kernels.device import cpu_has, cpu_has_amx
from pallas_kernels.matmul import api, matmul, numba_cpu, numba_float32, pack, packed, panels, reference
from pallas_kernels.matmul.arg_specs import ARG_SPECS


def numba_on(dtype):
    """`dtype` on "numba", skipped where this CPU cannot."""
    reason = api._why_not_numba(jnp.zeros((2, api.PANEL), dtype))
    return pytest.param("numba", dtype, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


NUMBA = [numba_on(jnp.bfloat16), numba_on(jnp.float32)]
IMPLEMENTATIONS = [("xla", jnp.bfloat16), ("xla", jnp.float32), *NUMBA]


def operands(num_tokens, width, num_columns, dtype):
    x, kernel = jax.random.split(jax.random.key(num_tokens))
    return jax.random.normal(x, (num_tokens, width)), jax.random.normal(kernel, (width, num_columns)).astype(dtype)


@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTATIONS)
class TestMatmul:
    @pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 6, 7, 8, 12, 13, 14, 16, 25])
    def test_is_the_sum_of_products(self, implementation, dtype, num_tokens):
        x, kernel = operands(num_tokens, 6, 64, dtype)
        out = matmul(x, kernel, implementation=implementation)
        exact = reference.matmul(x.astype(dtype), kernel)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("spec", ARG_SPECS[::4], ids=lambda spec: spec.name)
    def test_real_shapes(self, implementation, dtype, spec):
        x, kernel = operands(spec.num_tokens, spec.width, spec.num_columns, dtype)
        out = jax.jit(lambda x, kernel: matmul(x, kernel, implementation=implementation))(x, kernel)
        exact = np.asarray(x.astype(dtype), np.float64) @ np.asarray(kernel, np.float64)
        assert np.abs(out - exact).max() <= 1e-5 * np.abs(exact).max()

    @pytest.mark.parametrize("num_tokens", [0, 1, 5, 12, 29])
    def test_padding_is_left_out(self, implementation, dtype, num_tokens):
        x, kernel = operands(29, 64, 96, dtype)
        product = jax.jit(lambda x, kernel, n: matmul(x, kernel, num_tokens=n, implementation=implementation))
        out = np.asarray(product(x, kernel, jnp.int32(num_tokens)))
        exact = np.asarray(matmul(x, kernel, implementation=implementation))
        np.testing.assert_allclose(out[:num_tokens], exact[:num_tokens], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(out[num_tokens:], 0 if implementation == "numba" else exact[num_tokens:])

    @pytest.mark.parametrize("num_tokens", [1, 5, 12, 29])
    def test_a_residual_is_added(self, implementation, dtype, num_tokens):
        x, kernel = operands(29, 64, 96, dtype)
        residual = jax.random.normal(jax.random.key(1), (29, 96)).at[num_tokens:].set(jnp.nan)
        product = jax.jit(lambda *args, n: matmul(*args, num_tokens=n, implementation=implementation))
        out = np.asarray(product(x, kernel, residual, n=jnp.int32(num_tokens)))
        exact = np.asarray(reference.matmul(x.astype(dtype), kernel) + residual)
        np.testing.assert_allclose(out[:num_tokens], exact[:num_tokens], rtol=1e-5, atol=1e-5)
        if implementation == "numba":
            np.testing.assert_array_equal(out[num_tokens:], 0)


@pytest.mark.parametrize(("implementation", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize(("num_tokens", "width", "num_columns"), [(1, 16, 32), (7, 48, 96), (64, 576, 320)])
def test_transposed_kernel(implementation, dtype, num_tokens, width, num_columns):
    x, kernel = operands(num_tokens, width, num_columns, dtype)
    out = matmul(x, kernel.T, is_transposed=True, implementation=implementation)
    exact = np.asarray(x.astype(dtype), np.float64) @ np.asarray(kernel, np.float64)
    assert np.abs(out - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize(("implementation", "dtype"), NUMBA)
def test_a_token_does_not_depend_on_its_neighbours(implementation, dtype):
    x, kernel = operands(29, 64, 96, dtype)
    together = matmul(x, kernel, implementation=implementation)
    for first, stop in ((0, 1), (3, 11), (12, 28)):
        alone = matmul(x[first:stop], kernel, implementation=implementation)
        np.testing.assert_array_equal(alone, together[first:stop])


UNITS = [
    pytest.param("amx", marks=pytest.mark.skipif(not cpu_has_amx(), reason="needs a CPU with AMX")),
    pytest.param("avx512bf16", marks=pytest.mark.skipif(not cpu_has("avx512bf16"), reason="needs AVX512-BF16")),
]


def unpack(kernel, num_axes):
    """What `pack` packed."""
    num_rows = math.prod(kernel.shape[:num_axes])
    columns = kernel.reshape(-1, num_rows // 2, packed.PANEL, 2).transpose(1, 3, 0, 2)
    if packed.is_gated(kernel):
        columns = columns.reshape(num_rows, -1, 2, packed.GATED_COLUMNS).swapaxes(1, 2)
    return jax.lax.bitcast_convert_type(columns.reshape(kernel.shape), jnp.bfloat16)


@pytest.mark.parametrize("unit", UNITS)
class TestUnitsForBfloat16:
    @pytest.mark.parametrize(
        ("num_rows", "width"), [(1, 64), (15, 64), (16, 64), (17, 64), (33, 672), (100, 64), (48, 672)]
    )
    @pytest.mark.parametrize("form", ["packed", "plain"])
    def test_any_number_of_tokens_in_any_number_of_rows(self, unit, form, num_rows, width, monkeypatch):
        monkeypatch.setattr(packed, "unit", lambda num_rows: unit)
        x, kernel = operands(num_rows, width, 96, jnp.bfloat16)
        x = x.astype(jnp.bfloat16)
        exact = reference.matmul(x, kernel)
        operand = {"packed": pack(kernel, 1), "plain": kernel}[form]
        product = jax.jit(numba_cpu.matmul)
        for rows in (x, jnp.concatenate([x, jnp.full((3, width), jnp.nan, x.dtype)])):
            for num_tokens in {0, 1, num_rows // 2, num_rows}:
                out = product(rows, operand, jnp.int32(num_tokens))
                np.testing.assert_allclose(out[:num_tokens], exact[:num_tokens], rtol=1e-5, atol=1e-5)
                np.testing.assert_array_equal(out[num_tokens:], 0)
                residual = jax.random.normal(jax.random.key(2), out.shape)
                added = product(rows, operand, jnp.int32(num_tokens), residual)
                wanted = (exact + residual[:num_rows])[:num_tokens]
                np.testing.assert_allclose(added[:num_tokens], wanted, rtol=1e-5, atol=2e-5)
                np.testing.assert_array_equal(added[num_tokens:], 0)

    @pytest.mark.parametrize("shape", [(64, 3, 64), (2, 4, 8, 64)])
    def test_a_packed_kernel_is_only_in_another_order(self, unit, shape, monkeypatch):
        monkeypatch.setattr(packed, "unit", lambda num_rows: unit)
        kernel = jax.random.normal(jax.random.key(1), shape).astype(jnp.bfloat16)
        num_axes = len(shape) - 1 if shape[0] == 2 else 1
        there = pack(kernel, num_axes)
        assert there.dtype == jnp.uint16
        assert there.shape == kernel.shape
        np.testing.assert_array_equal(unpack(there, num_axes), kernel)
        matrix = np.asarray(kernel).reshape(64, -1)
        panels = np.asarray(there).view(matrix.dtype).reshape(-1, 32, 32, 2)
        np.testing.assert_array_equal(panels[1, 5, 7], matrix[10:12, 32 + 7])
        assert pack(there, num_axes) is there

    @pytest.mark.parametrize(("num_rows", "width"), [(3, 64), (16, 64), (29, 64), (70, 64), (100, 576), (70, 672)])
    def test_gate_and_up(self, unit, num_rows, width, monkeypatch):
        monkeypatch.setattr(packed, "unit", lambda num_rows: unit)
        x, kernel = operands(num_rows, width, 192, jnp.bfloat16)
        x, kernel = x * jnp.geomspace(1e-3, 10, num_rows)[:, None], kernel.reshape(width, 2, 96)
        there = pack(kernel, 1)
        np.testing.assert_array_equal(unpack(there, 1), kernel)
        for num_tokens in {0, num_rows - 2, num_rows}:
            out = matmul(x, there, num_tokens=jnp.int32(num_tokens), out_dtype=jnp.bfloat16)
            exact = np.asarray(matmul(x, kernel, implementation="xla"))[:num_tokens]
            np.testing.assert_allclose(out[:num_tokens].astype(jnp.float32), exact, rtol=2**-8, atol=1e-30)
            np.testing.assert_array_equal(out[num_tokens:], 0)

    @pytest.mark.parametrize("num_bits", [4, 8])
    @pytest.mark.parametrize("shape", [(192, 3, 32), (160, 2, 48), (672, 2, 48), (2, 4, 8, 96)])
    def test_weights_of_few_bits_are_those_that_were_expanded_at_rest(self, unit, shape, num_bits, monkeypatch):
        monkeypatch.setattr(packed, "unit", lambda num_rows: unit)
        num_axes = len(shape) - 1 if shape[0] == 2 else 1
        num_rows = math.prod(shape[:num_axes])
        assert packed.takes_blocks(shape, num_axes) == (unit == "amx")
        if unit != "amx":
            return
        rng = np.random.default_rng(num_bits)
        codes = rng.integers(0, 2**num_bits, shape, np.uint8)
        blocks = num_rows // packed.BLOCK_ROWS, *shape[num_axes:]
        scale, least = (rng.uniform(-1, 1, blocks).astype(np.float16) for _ in range(2))
        each = [np.repeat(part.astype(np.float32), packed.BLOCK_ROWS, 0).reshape(shape) for part in (scale, least)]
        at_rest = pack(jnp.asarray(each[0] * codes + each[1]).astype(jnp.bfloat16), num_axes)
        kept = packed.pack_blocks(codes, scale, least, num_axes, num_bits)
        there = packed.blocks_shape(shape, num_axes, num_bits)
        assert (kept.shape, kept.dtype) == (there.shape, there.dtype)
        if num_axes > 1:
            at_rest, kept = (kernel.reshape(-1, shape[-1]) for kernel in (at_rest, kept))
        elif not packed.is_gated(at_rest):
            at_rest, kept = (kernel.reshape(kernel.shape[0], -1) for kernel in (at_rest, kept))
        assert packed.num_rows(kept) == num_rows
        for num_tokens in (1, 16, 17, 40, 80):
            x = jax.random.normal(jax.random.key(num_tokens), (num_tokens, num_rows))
            for count in {num_tokens, num_tokens - 1}:
                out, expected = (matmul(x, kernel, num_tokens=jnp.int32(count)) for kernel in (kept, at_rest))
                assert count == 0 or jnp.any(expected)
                np.testing.assert_array_equal(out, expected)


def test_only_what_suits_is_packed(monkeypatch):
    monkeypatch.setattr(packed, "unit", lambda num_rows: None if num_rows % 2 else "amx")
    for kernel in (jnp.zeros((4, 64)), jnp.zeros((3, 64), jnp.bfloat16), jnp.zeros((4, 40), jnp.bfloat16)):
        assert pack(kernel, 1) is kernel


def test_a_packed_kernel_is_for_its_unit_only(monkeypatch):
    x, kernel = jnp.zeros((2, 4)), jnp.zeros((4, 64), jnp.uint16)
    with pytest.raises(NotImplementedError, match="cannot read a packed kernel"):
        matmul(x, kernel, implementation="xla")
    monkeypatch.setattr(api, "unit", lambda num_rows: None)
    with pytest.raises(NotImplementedError, match="another CPU packed"):
        matmul(x, kernel)


@pytest.mark.parametrize(("implementation", "dtype"), NUMBA)
def test_many_calls_at_once_finish(implementation, dtype):
    """Calls that share the pool's threads, more of them than threads: none may wait for a task that never starts."""
    x, kernel = operands(40, 64, 256, dtype)
    many = jax.jit(lambda x, kernel: [matmul(x + i, kernel, implementation=implementation) for i in range(40)])
    plain = [matmul(x + i, kernel, implementation="xla") for i in range(40)]
    for _ in range(20):
        for out, expected in zip(many(x, kernel), plain, strict=True):
            np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kernels_that_do_not_suit_take_xla(dtype):
    x, kernel = operands(3, 6, 40, dtype)
    np.testing.assert_array_equal(matmul(x, kernel), matmul(x, kernel, implementation="xla"))


@pytest.mark.parametrize(
    ("kernel", "is_transposed", "message"),
    [
        (jnp.zeros((4, 64), jnp.float16), False, r"float16 \[4, 64\]"),
        (jnp.zeros((3, 64), jnp.bfloat16), False, r"\[3, 64\]"),
        (jnp.zeros((4, 40), jnp.bfloat16), False, r"\[4, 40\]"),
        (jnp.zeros((64, 4), jnp.bfloat16), True, r"\[64, 4\]"),
        (jnp.zeros((4, 40), jnp.float32), False, r"\[4, 40\]"),
        (jnp.zeros((64, 8), jnp.float32), True, r"\[64, 8\]"),
    ],
)
def test_what_numba_cannot_do_is_said(kernel, is_transposed, message):
    x = jnp.zeros((2, kernel.shape[1 if is_transposed else 0]))
    with pytest.raises(NotImplementedError, match=message):
        matmul(x, kernel, is_transposed=is_transposed, implementation="numba")


def test_unknown_implementation_is_said():
    with pytest.raises(NotImplementedError, match="'cuda' is none of"):
        matmul(jnp.zeros((2, 2)), jnp.zeros((2, 2)), implementation="cuda")


def addresses_that_outlive_their_array(source: str) -> list[str]:
    """Names `p` of assignments `p = ... a.ctypes.data ...`, outside of loops, that are used after the last use of `a`."""
    found = []
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        parameters = {argument.arg for argument in function.args.args}  # which are the caller's
        last: dict[str, int] = {}  # name -> line of its last use
        for node in ast.walk(function):
            if isinstance(node, ast.Name):
                last[node.id] = max(node.lineno, last.get(node.id, 0))
        for node in (node for node in function.body if isinstance(node, ast.Assign)):
            (address,) = (target.id if isinstance(target, ast.Name) else "" for target in node.targets)
            arrays = {*re.findall(r"(\w+)\.ctypes\.data", ast.unparse(node.value))} - parameters
            found += [address for array in arrays if last.get(address, 0) > last[array]]
    return found


def test_no_address_outlives_its_array():
    """numba frees an array after the last use of its name."""
    loop = "def f():\n    a = np.empty(3)\n    p = a.ctypes.data\n    for i in range(3):\n        g(p)\n"
    assert addresses_that_outlive_their_array(loop) == ["p"]
    assert addresses_that_outlive_their_array(loop + "    a[0] = 0\n") == []
    paths = list(pathlib.Path(api.__file__).parents[1].rglob("*.py"))
    assert [path.name for path in paths if addresses_that_outlive_their_array(path.read_text())] == []
    assert any(".ctypes.data" in path.read_text() for path in paths)


NO_NUMBA = api._why_not_numba(jnp.ones((32, 64)))


@pytest.mark.skipif(NO_NUMBA is not None, reason=str(NO_NUMBA))
def test_a_target_is_made_once_and_alone():
    """Each of several threads would make it, of which XLA takes only one; another process meanwhile would spoil what is on disk."""
    made = []

    def make(sources):
        made.append(sources)
        return panels.make_describe(sources, packed.PANEL, 0), numba_float32.make_work(sources, 4, 0)

    def register(_):
        return numba_ffi.register("a_product_of_the_tests", make, num_words=panels.NUM_WORDS)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        with numba_ffi.LOCK.open("w") as file:  # as another process does
            fcntl.flock(file, fcntl.LOCK_EX)
            names = [pool.submit(register, i) for i in range(4)]
            concurrent.futures.wait(names, timeout=0.2)
            assert not made
        assert [name.result() for name in names] == ["a_product_of_the_tests"] * 4
    assert len(made) == 1

"""Does the persistent matmul for Hopper compute what the reference does, without races, in the GPU interpreter on a CPU?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public only from jax 0.11 on

from pallas_kernels.matmul import matmul, mosaic_gpu
from pallas_kernels.matmul.mosaic_gpu import Config

INTERPRET = InterpretGPUParams(detect_races=True, out_of_bounds_reads="raise")


def operands(m, k, columns, out=None):
    keys = jax.random.split(jax.random.key(m + k), 3)
    x = jax.random.normal(keys[0], (m, k)).astype(jnp.bfloat16)
    kernel = (jax.random.normal(keys[1], (k, *columns)) / 8).astype(jnp.bfloat16)
    residual = None if out is None else jax.random.normal(keys[2], (m, columns[-1])).astype(out)
    return x, kernel, residual


def exact(x, kernel, residual):
    product = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).reshape(kernel.shape[0], -1)
    if kernel.ndim == 3:
        gate, up = np.split(product, 2, axis=1)
        product = gate / (1 + np.exp(-gate)) * up
    return product if residual is None else product + np.asarray(residual, np.float64)


CASES = {
    "uneven tiles, ring wraps": ((256, 192, (256,)), None, jnp.float32, 3, Config(tile_n=128, num_stages=2)),
    "swiglu": ((128, 128, (2, 128)), None, jnp.bfloat16, 2, Config(num_stages=2)),
    "residual": ((128, 64, (256,)), jnp.float32, jnp.float32, 1, Config(num_stages=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_is_the_product_and_its_epilogue_without_races(case, capfd):
    shape, residual_dtype, out_dtype, num_ctas, config = CASES[case]
    args = operands(*shape, residual_dtype)
    out = mosaic_gpu.matmul(*args, num_ctas=num_ctas, out_dtype=out_dtype, config=config, interpret=INTERPRET)
    expected = exact(*args)
    assert out.dtype == out_dtype
    rounding = 2.0**-8 if out_dtype == jnp.bfloat16 else 1e-5
    assert np.abs(np.asarray(out, np.float64) - expected).max() <= rounding * np.abs(expected).max()
    captured = capfd.readouterr()
    assert "RACE" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("m", "n", "num_ctas", "tile_n"),
    [
        (640, 28672, 88, 256),  # 7 rounds of the wide tile against 13 of the narrow one: 1792 < 1.15 * 1664
        (640, 4096, 79, 128),  # 80 wide tiles on 79 CTAs: a second round for one tile
        (384, 4096, 79, 256),
        (128, 384, 8, 128),  # no multiple of 256
    ],
)
def test_tiles_are_chosen_by_the_last_one_to_be_done(m, n, num_ctas, tile_n):
    assert mosaic_gpu.choose_config(m, n, num_ctas).tile_n == tile_n


@pytest.mark.parametrize("epilogue", ["plain", "swiglu"])
@pytest.mark.parametrize("config", [Config(), Config(tile_n=128, num_stages=6)])
def test_a_cta_owns_its_multiprocessor(config, epilogue):
    kernel = jax.ShapeDtypeStruct((4096, 2, 4096) if epilogue == "swiglu" else (4096, 4096), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((128, 4096), jnp.bfloat16)
    shape = mosaic_gpu.shape_of(x, kernel, None, num_ctas=8, out_dtype=jnp.bfloat16, config=config)
    assert 233_472 // 2 < shape.smem_bytes <= mosaic_gpu.SMEM_BYTES


@pytest.mark.parametrize(
    ("x", "kernel", "message"),
    [((100, 64), (64, 128), r"\[100, 64\]"), ((128, 64), (64, 100), r"\[64, 100\]"), ((128, 60), (60, 128), "60")],
)
def test_what_it_cannot_do_is_said(x, kernel, message):
    args = jnp.zeros(x, jnp.bfloat16), jnp.zeros(kernel, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.matmul(*args, num_ctas=1, interpret=INTERPRET)
    with pytest.raises(NotImplementedError, match="not on 'cpu'"):
        matmul(*args, implementation="mosaic_gpu")


def test_bad_numbers_are_said():
    x, kernel, _ = operands(128, 64, (128,))
    with pytest.raises(ValueError, match="num_ctas=0"):
        mosaic_gpu.matmul(x, kernel, num_ctas=0, interpret=INTERPRET)
    with pytest.raises(ValueError, match="num_stages=20"):
        mosaic_gpu.matmul(x, kernel, num_ctas=1, config=Config(tile_n=128, num_stages=20), interpret=INTERPRET)
    with pytest.raises(ValueError, match="tile_n=64"):
        Config(tile_n=64)

"""How does XLA run a kernel written in Triton?

Triton compiles the kernel while JAX traces the call; what XLA gets is PTX and a grid, for the handler that jaxlib brings along
for jax-triton.  jax-triton itself is not needed: its 0.3 calls that handler by a legacy interface that XLA leaves out of
CUDA graphs, its 0.4 needs Triton 3.7.  Here the handler is called as a typed FFI target, which XLA captures.
"""

import functools
import importlib.util
import types
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxlib import gpu_triton

from pallas_kernels.device import compute_capability

TARGET = "triton_kernel_call_ffi"
DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "int64": "i64", "uint16": "u16",
}  # fmt: skip


def why_not() -> str | None:
    """What keeps Triton's kernels from running, None if nothing does."""
    if compute_capability() is None:
        return f"needs a GPU, not {jax.devices()[0].device_kind!r}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if not hasattr(gpu_triton, "TritonKernel"):
        return "needs JAX's plugin for CUDA, which is not installed"
    return None


def triton_call(
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    scalars: Mapping[str, int],
    constants: Mapping[str, Any],
    *,
    num_programs: int,
    num_warps: int,
    num_stages: int,
    views: Mapping[int, DTypeLike] = types.MappingProxyType({}),
    aliases: Mapping[int, int] = types.MappingProxyType({}),
) -> list[jax.Array]:
    """Runs `num_programs` programs of a `triton.jit` function; returns its outputs.

    The kernel's parameters are pointers to the inputs and the outputs, then the scalars (int32), then the constants.

    Args:
      kernel: the function.
      inputs: arrays, dense and row-major.
      outputs: their shapes and dtypes; uninitialised but where `aliases` says what they start with.
      scalars: numbers for which the kernel is not compiled anew.
      constants: numbers that are part of the compiled code.
      num_programs: size of the grid.
      num_warps, num_stages: of a program, and of its software pipelines.
      views: input -> the dtype that the kernel shall see in place of its own.
      aliases: input -> output that shares its memory.

    Raises:
      NotImplementedError: Triton, JAX's plugin for CUDA or the GPU is missing.
    """
    reason = why_not()
    if reason is not None:
        raise NotImplementedError(f"Triton {reason}")
    dtypes = [views.get(i, x.dtype) for i, x in enumerate(inputs)] + [x.dtype for x in outputs]
    signature = [f"*{DTYPES[jax.numpy.dtype(dtype).name]}" for dtype in dtypes]
    capability = compute_capability()
    compiled = compile_kernel(
        kernel, tuple(signature), tuple(scalars), tuple(constants.items()), capability, num_warps, num_stages
    )
    name, shared_bytes = compiled.metadata.name, compiled.metadata.shared
    program = gpu_triton.TritonKernel(
        name, num_warps, 1, shared_bytes, compiled.asm["ptx"], compiled.asm["ttir"], capability
    )
    parameters = [gpu_triton.create_array_parameter(0, 16) for _ in signature]  # nothing to zero; aligned to 16 bytes
    parameters += [gpu_triton.create_scalar_parameter(int(value), "i32") for value in scalars.values()]
    call = gpu_triton.TritonKernelCall(program, num_programs, 1, 1, parameters)
    run = jax.ffi.ffi_call(TARGET, list(outputs), input_output_aliases=dict(aliases))
    return list(run(*inputs, name=name, opaque=zlib.compress(call.to_proto(name, b""))))


@functools.cache
def compile_kernel(
    kernel: Any,
    pointers: tuple[str, ...],
    scalars: tuple[str, ...],
    constants: tuple[tuple[str, Any], ...],
    capability: int,
    num_warps: int,
    num_stages: int,
) -> Any:
    """Triton's `CompiledKernel`: intermediate code, PTX and cubin in `asm`, resources in `metadata`.  Needs no GPU."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    parameters = kernel.arg_names
    signature = dict(zip(parameters, (*pointers, *("i32" for _ in scalars)), strict=False))
    expected = [*parameters[: len(pointers)], *scalars, *dict(constants)]
    if parameters != expected:
        raise ValueError(f"the kernel's parameters are {parameters}, the call's {expected}")
    source = ASTSource(
        kernel,
        signature=signature | dict.fromkeys(dict(constants), "constexpr"),
        constexprs=dict(constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

"""How does XLA run a Python function that numba compiled, on all cores?  Typed FFI handlers and XLA's own thread pool.

XLA calls the handler from inside its program with a frame of pointers; no Python runs then.  The structures are those of
xla/ffi/api/c_api.h, read here as arrays of 8-byte words; they only ever grow at their end.
"""

import typing
from collections.abc import Callable
from typing import Any

import jax
import llvmlite.ir
import numba
import numba.extending
import numpy as np

INT64 = llvmlite.ir.IntType(64)

FRAME_EXTENSION, FRAME_API, FRAME_CONTEXT, FRAME_STAGE, FRAME_ARGS, FRAME_RETS, FRAME_ATTRS, FRAME_SIZE = (
    1, 2, 3, 4, 9, 14, 20, 21,
)  # fmt: skip
EXTENSION_METADATA, METADATA_VERSION = 3, 3
BUFFER_DATA, BUFFER_DIMS, BUFFER_SIZE = 3, 5, 6
API_SCHEDULE, API_NUM_THREADS, API_SIZE = 17, 18, 19
STAGE_EXECUTE = 3
API_VERSION = 1 << 32  # minor version 1 in the high half, major version 0 in the low half

# Words of the record that the threads of one call share; the job's own arguments follow.
NEXT, DONE, HOLDERS, NUM_ITEMS, JOB = 0, 8, 16, 24, 25  # the counters lie on cache lines of their own


@numba.extending.intrinsic
@typing.no_type_check
def _pointer(typing_context, address, dtype):
    """The int64 `address` as a pointer to elements of `dtype`."""
    pointer = numba.types.CPointer(dtype.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(numba.types.int64, dtype), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def array(address, dtype, size):
    """The `size` elements of `dtype` at the int64 `address`."""
    return numba.carray(_pointer(np.int64(address), dtype), (size,))


@numba.njit(forceinline=True)
@typing.no_type_check
def buffer(frame, is_result, index):
    """The data's address and the dimensions' address of one operand or result."""
    slots = array(frame[FRAME_RETS if is_result else FRAME_ARGS], np.int64, index + 1)
    fields = array(slots[index], np.int64, BUFFER_SIZE)
    return fields[BUFFER_DATA], fields[BUFFER_DIMS]


@numba.njit(forceinline=True)
@typing.no_type_check
def attribute(frame, index):
    """The int64 attribute at place `index` of the attributes' names in alphabetical order."""
    scalar = array(array(frame[FRAME_ATTRS], np.int64, index + 1)[index], np.int64, 2)
    return array(scalar[1], np.int64, 1)[0]


@numba.extending.intrinsic
@typing.no_type_check
def _prefetch_line(typing_context, address):
    """Starts to bring the 64 bytes at the int64 `address` near."""

    def generate(context, builder, signature, arguments):
        byte, word = llvmlite.ir.IntType(8).as_pointer(), llvmlite.ir.IntType(32)
        function_type = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), (byte, word, word, word))
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), function_type)
        read, keep, data = word(0), word(3), word(1)
        builder.call(prefetch, (builder.inttoptr(arguments[0], byte), read, keep, data))
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def prefetch(address, num_bytes):
    """Starts to bring `num_bytes` near."""
    for offset in range(0, num_bytes, 64):
        _prefetch_line(address + offset)


@numba.extending.intrinsic
@typing.no_type_check
def _atomic_add(typing_context, address, amount):
    """Adds to the int64 at `address`, seen by all threads in one order; returns what was there before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], INT64.as_pointer()), arguments[1], "seq_cst")

    return numba.types.int64(numba.types.int64, numba.types.int64), generate


@typing.no_type_check
def _c_function(name, returns, *takes):
    """A function of the C library, on int64 arguments."""

    @numba.extending.intrinsic
    def call(typing_context, argument):
        def generate(context, builder, signature, arguments):
            function_type = llvmlite.ir.FunctionType(returns, takes)
            function = builder.module.globals.get(name) or llvmlite.ir.Function(builder.module, function_type, name)
            value = arguments[0]
            if isinstance(takes[0], llvmlite.ir.PointerType):
                value = builder.inttoptr(value, takes[0])
            out = builder.call(function, (value,))
            return INT64(0) if isinstance(returns, llvmlite.ir.VoidType) else builder.ptrtoint(out, INT64)

        return numba.types.int64(numba.types.int64), generate

    return call


_BYTES = llvmlite.ir.IntType(8).as_pointer()
_malloc = _c_function("malloc", _BYTES, INT64)
_free = _c_function("free", llvmlite.ir.VoidType(), _BYTES)


@numba.extending.intrinsic
@typing.no_type_check
def _call(typing_context, function, argument):
    """Calls the C function at an address with one pointer; returns its pointer, as XLA's functions do (0: no error)."""

    def generate(context, builder, signature, arguments):
        function_type = llvmlite.ir.FunctionType(INT64, (INT64,))
        return builder.call(builder.inttoptr(arguments[0], function_type.as_pointer()), (arguments[1],))

    return numba.types.int64(numba.types.int64, numba.types.int64), generate


@numba.njit
@typing.no_type_check
def _num_threads(frame):
    """Threads of XLA's pool; 1 if there is none."""
    api = array(frame[FRAME_API], np.int64, API_SIZE)
    found = np.ones(1, np.int64)
    request = np.array([32, 0, frame[FRAME_CONTEXT], found.ctypes.data], np.int64)
    error = _call(api[API_NUM_THREADS], request.ctypes.data)
    return found[0] if error == 0 else 1


@numba.njit
@typing.no_type_check
def _schedule(frame, task, data):
    """Asks XLA's pool to call `task(data)` at some time; False if it will not."""
    api = array(frame[FRAME_API], np.int64, API_SIZE)
    request = np.array([40, 0, frame[FRAME_CONTEXT], task, data], np.int64)
    return _call(api[API_SCHEDULE], request.ctypes.data) == 0


@typing.no_type_check
def make_handler(describe: Callable, work: Callable, num_words: int, items_per_turn: int) -> Any:
    """A handler whose work is shared by the threads of XLA's pool; pass it to `register`.

    `describe(frame, job) -> num_items` fills `job`, an array of `num_words` int64, and says how many independent items of
    work there are.  `work(job, first, stop)` does some of them.  Both are numba functions.

    The pool promises nothing: a task may start late, after the call is over, or never.  So threads take items in turns from
    a counter, the calling thread takes turns like the others, and waits only for turns that another thread has begun.
    """

    @numba.njit
    @typing.no_type_check
    def take_turns(record):
        shared = array(record, np.int64, JOB + num_words)
        num_items = shared[NUM_ITEMS]
        while True:
            first = _atomic_add(record + 8 * NEXT, items_per_turn)
            if first >= num_items:
                break
            stop = min(first + items_per_turn, num_items)
            work(shared[JOB:], first, stop)
            _atomic_add(record + 8 * DONE, stop - first)

    @numba.njit
    @typing.no_type_check
    def let_go(record):
        if _atomic_add(record + 8 * HOLDERS, -1) == 1:
            _free(record)

    @numba.cfunc(numba.types.void(numba.types.int64), error_model="numpy")
    @typing.no_type_check
    def task(record):
        take_turns(record)
        let_go(record)

    task_address = np.int64(task.address)

    @numba.cfunc(numba.types.int64(numba.types.CPointer(numba.types.int64)), error_model="numpy")
    @typing.no_type_check
    def handler(frame):
        words = numba.carray(frame, (FRAME_SIZE,))
        if words[FRAME_EXTENSION] != 0:  # XLA asks for the version, once
            metadata = array(words[FRAME_EXTENSION], np.int64, 4)[EXTENSION_METADATA]
            array(metadata, np.int64, 4)[METADATA_VERSION] = API_VERSION
            return 0
        if words[FRAME_STAGE] & 0xFFFFFFFF != STAGE_EXECUTE:
            return 0
        record = _malloc(8 * (JOB + num_words))
        shared = array(record, np.int64, JOB + num_words)
        shared[:JOB] = 0
        num_items = describe(words, shared[JOB:])
        shared[NUM_ITEMS] = num_items
        num_turns = -(-num_items // items_per_turn)
        num_tasks = min(_num_threads(words) - 1, num_turns - 1)
        shared[HOLDERS] = max(num_tasks, 0) + 1
        for _ in range(num_tasks):
            if not _schedule(words, task_address, record):
                let_go(record)
        take_turns(record)
        while _atomic_add(record + 8 * DONE, 0) < num_items:
            pass
        let_go(record)
        return 0

    _KEPT.extend((task, handler))
    return handler


_KEPT: list[Any] = []
"""Compiled functions that XLA knows by their addresses only."""


def register(name: str, handler: Any) -> None:
    """Makes `handler` the CPU's implementation of the FFI target `name`."""
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler.ctypes), platform="cpu")

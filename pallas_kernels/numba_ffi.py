"""How does XLA run a Python function that numba compiled, on all cores?  Typed FFI handlers and XLA's own thread pool.

XLA calls the handler from inside its program with a frame of pointers; no Python runs then.  The structures are those of
xla/ffi/api/c_api.h, read here as arrays of 8-byte words; they only ever grow at their end.
"""

import contextlib
import ctypes
import fcntl
import functools
import os
import pathlib
import tempfile
import threading
import typing
import zlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import llvmlite.binding
import llvmlite.ir
import numba
import numba.extending
import numpy as np
from numba.np.arrayobj import populate_array

INT64 = llvmlite.ir.IntType(64)
FRAME_EXTENSION, FRAME_API, FRAME_CONTEXT, FRAME_STAGE, FRAME_NUM_ARGS, FRAME_ARGS, FRAME_RETS, FRAME_ATTRS, FRAME_SIZE = (
    1, 2, 3, 4, 7, 9, 14, 20, 21,
)  # fmt: skip
EXTENSION_METADATA, METADATA_VERSION = 3, 3
BUFFER_DATA, BUFFER_DIMS = 3, 5
API_SCHEDULE, API_NUM_THREADS, API_SIZE = 17, 18, 19
STAGE_EXECUTE = 3
API_VERSION = 1 << 32  # minor version 1 in the high half, major version 0 in the low half

# Words of the record that the threads of one call share; the job's own words follow.
NEXT, DONE, HOLDERS, NUM_ITEMS, ITEMS_PER_TURN, WORK, JOB = (
    0,
    8,
    16,
    24,
    25,
    26,
    27,
)  # counters on cache lines of their own


@numba.extending.intrinsic
@typing.no_type_check
def array(typing_context, address, dtype, size):
    """The `size` elements of `dtype` at the int64 `address`.  As an intrinsic it costs nothing to compile, however it is called."""
    kind = numba.types.Array(dtype.dtype, 1, "C")

    def generate(context, builder, signature, arguments):
        element = context.get_data_type(dtype.dtype)
        pointer, num_bytes = (
            builder.inttoptr(arguments[0], element.as_pointer()),
            INT64(context.get_abi_sizeof(element)),
        )
        made = context.make_array(kind)(context, builder)
        populate_array(made, pointer, shape=[arguments[2]], strides=[num_bytes], itemsize=num_bytes, meminfo=None)
        return made._getvalue()

    return kind(numba.types.int64, dtype, numba.types.int64), generate


def _words(context, builder, kind, frame):
    """What gives the word at a place of the words at an address; and the address of a frame, an array of `kind`."""

    def word(address, place):
        at = builder.add(address, builder.mul(place, INT64(8)))
        return builder.load(builder.inttoptr(at, INT64.as_pointer()))

    return word, builder.ptrtoint(context.make_array(kind)(context, builder, frame).data, INT64)


@numba.extending.intrinsic
@typing.no_type_check
def buffer(typing_context, frame, is_result, index):
    """The data's address and the dimensions' address of one operand or result; `frame` is the words of the frame."""

    def generate(context, builder, signature, arguments):
        word, address = _words(context, builder, frame, arguments[0])
        slots = word(address, builder.select(arguments[1], INT64(FRAME_RETS), INT64(FRAME_ARGS)))
        fields = word(slots, arguments[2])
        return context.make_tuple(
            builder, signature.return_type, [word(fields, INT64(place)) for place in (BUFFER_DATA, BUFFER_DIMS)]
        )

    return numba.types.UniTuple(numba.types.int64, 2)(frame, numba.types.boolean, numba.types.int64), generate


@numba.njit(forceinline=True)
@typing.no_type_check
def set_items_per_turn(job_at, count):
    """What a `Describe` may say of its job: how many items a thread takes at a time, else one."""
    array(job_at - 8 * (JOB - ITEMS_PER_TURN), np.int64, 1)[0] = count


@numba.extending.intrinsic
@typing.no_type_check
def attribute(typing_context, frame, index):
    """The 8 bytes, as int64, of the attribute at place `index` of the attributes' names in alphabetical order."""

    def generate(context, builder, signature, arguments):
        word, address = _words(context, builder, frame, arguments[0])
        scalar = word(word(address, INT64(FRAME_ATTRS)), arguments[1])
        return word(word(scalar, INT64(1)), INT64(0))

    return numba.types.int64(frame, numba.types.int64), generate


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
def _call(typing_context, function, arguments):
    """Calls the function at an address: a tuple of int64 arguments, an int64 result (what a void function leaves is no number)."""
    arity = len(arguments)

    def generate(context, builder, signature, values):
        function_type = llvmlite.ir.FunctionType(INT64, (INT64,) * arity)
        function = builder.inttoptr(values[0], function_type.as_pointer())
        return builder.call(function, [builder.extract_value(values[1], i) for i in range(arity)])

    return numba.types.int64(numba.types.int64, numba.types.UniTuple(numba.types.int64, arity)), generate


@numba.njit(cache=True)
@typing.no_type_check
def _ask_pool(frame, api_word, request, third, fourth):
    """Calls one of XLA's functions with a request in the 5 words at `request`; False if it says that it cannot."""
    words = array(request, np.int64, 5)
    words[0], words[1], words[2], words[3], words[4] = 40, 0, frame[FRAME_CONTEXT], third, fourth
    return _call(array(frame[FRAME_API], np.int64, API_SIZE)[api_word], (request,)) == 0


@numba.njit(cache=True)
@typing.no_type_check
def _take_turns(record):
    """Does items of work, a turn at a time, until none is left."""
    shared = array(record, np.int64, JOB)
    num_items, items_per_turn = shared[NUM_ITEMS], shared[ITEMS_PER_TURN]
    while True:
        first = _atomic_add(record + 8 * NEXT, items_per_turn)
        if first >= num_items:
            break
        stop = min(first + items_per_turn, num_items)
        _call(shared[WORK], (record + 8 * JOB, first, stop))
        _atomic_add(record + 8 * DONE, stop - first)


@numba.njit(cache=True)
@typing.no_type_check
def _let_go(record):
    """The last holder of the record frees it."""
    if _atomic_add(record + 8 * HOLDERS, -1) == 1:
        _free(record)


@numba.cfunc(numba.types.void(numba.types.int64), error_model="numpy", cache=True)
@typing.no_type_check
def _task(record):
    _take_turns(record)
    _let_go(record)


@numba.cfunc(numba.types.void(*(numba.types.int64,) * 5), error_model="numpy", cache=True)
@typing.no_type_check
def _run(frame_at, describe, work, task, num_words):
    """What every handler does, in one stage of a call."""
    frame = array(frame_at, np.int64, FRAME_SIZE)
    if frame[FRAME_EXTENSION] != 0:  # XLA asks for the version, once
        metadata = array(frame[FRAME_EXTENSION], np.int64, 4)[EXTENSION_METADATA]
        array(metadata, np.int64, 4)[METADATA_VERSION] = API_VERSION
        return
    if frame[FRAME_STAGE] & 0xFFFFFFFF != STAGE_EXECUTE:
        return
    record = _malloc(8 * (JOB + num_words))
    shared = array(record, np.int64, JOB)
    request = record + 8 * 17  # words that nobody else uses
    shared[ITEMS_PER_TURN] = 1
    num_items = _call(describe, (frame_at, record + 8 * JOB))
    num_threads = np.int64(1)
    if _ask_pool(frame, API_NUM_THREADS, request, record + 8 * DONE, 0):
        num_threads = shared[DONE]
    num_turns = -(-num_items // shared[ITEMS_PER_TURN])
    num_tasks = max(min(num_threads, num_turns) - 1, 0)
    shared[NEXT], shared[DONE], shared[HOLDERS] = 0, 0, num_tasks + 1
    shared[NUM_ITEMS], shared[WORK] = num_items, work
    for _ in range(num_tasks):
        if not _ask_pool(frame, API_SCHEDULE, request, task, record):
            _let_go(record)
    _take_turns(record)
    while _atomic_add(record + 8 * DONE, 0) < num_items:
        pass
    _let_go(record)


Describe = numba.types.int64(numba.types.int64, numba.types.int64)
"""`describe(frame, job)`: fills the job's words, given the addresses of frame and job; returns the number of items of work."""
Work = numba.types.void(numba.types.int64, numba.types.int64, numba.types.int64)
"""`work(job, first, stop)`: does items `first` to `stop`, which no other item depends on."""


def register(name: str, make: Callable[[int], tuple[Any, Any]], *, num_words: int) -> str:
    """Makes the CPU's implementation of the FFI target `name`, unless it exists, its work shared by the threads of XLA's pool.

    make: given the `_fingerprint`, which what it makes must refer to, compiles `describe` and `work`, numba cfuncs of the
        signatures `Describe` and `Work`.
    num_words: of the job.

    The pool promises nothing: a task may start late, after the call is over, or never.  So threads take items in turns from
    a counter, the calling thread takes turns like the others, and waits only for turns that another thread has begun.

    Returns `name`.  Raises TypeError where `describe` or `work` closes over anything but integers: numba's key on disk holds
    that, and a compiled function is another one in each process, so that the machine code would never be found again.
    """
    if name in _KEPT:
        return name
    with _alone():
        if name not in _KEPT:  # still
            describe, work = make(_fingerprint())
            for function in (describe, work):
                for cell in function._pyfunc.__closure__ or ():
                    if not isinstance(cell.cell_contents, int):
                        raise TypeError(
                            f"{name}: {function.__name__} closes over {cell.cell_contents!r}, not an integer"
                        )
            engine, handler = _handler(describe.address, work.address, cast(Any, _task).address, num_words)
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
            _KEPT[name] = describe, work, engine
    return name


def _handler(*words: int) -> tuple[Any, Any]:
    """A function for XLA that calls `_run` on its frame and these words, and what keeps it in memory.

    It is assembled here: numba would take a tenth of a second to compile it, in each process anew, as it holds addresses.
    """
    run = INT64(cast(Any, _run).address)
    signature = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), (INT64,) * (1 + len(words)))
    module = llvmlite.ir.Module()
    function = llvmlite.ir.Function(module, llvmlite.ir.FunctionType(INT64, (INT64,)), "handler")
    b = llvmlite.ir.IRBuilder(function.append_basic_block())
    b.call(b.inttoptr(run, signature.as_pointer()), [*function.args, *map(INT64, words)])
    b.ret(INT64(0))  # no error
    machine = llvmlite.binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvmlite.binding.create_mcjit_compiler(llvmlite.binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine, ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(engine.get_function_address("handler"))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One thread of one process at a time.

    Two processes that compiled different closures of one function at once would give numba's index on disk one file for
    both, and each later process the wrong machine code.
    """
    with _REGISTERING, LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


LOCK = pathlib.Path(tempfile.gettempdir()) / f"pallas_kernels-{os.getuid()}.lock"
_REGISTERING = threading.Lock()
_KEPT: dict[str, Any] = {}
"""Target -> what XLA knows by its address only."""


@functools.cache
def _fingerprint() -> int:
    """A number that changes with any file of this package: functions that numba keeps on disk refer to it, as numba sees only
    their own file."""
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    return zlib.crc32(b"".join(path.read_bytes() for path in files))

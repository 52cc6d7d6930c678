"""How does a bfloat16 matrix product use a CPU's matrix unit (AMX)?  Tokens come past one panel of the kernel after another.

A panel of 32 columns, its rows in pairs, stays in the core's first cache while all tokens are multiplied with it, 32 at a time
(`numba_tiles`); a kernel of many rows is cut, and sums are kept from one part to the next.  What later panels need is brought near
meanwhile.  A kernel that is not packed is packed on its way into a buffer.
"""

import typing

import numba
import numpy as np

from pallas_kernels.matmul.numba_bfloat16 import pack_panel
from pallas_kernels.matmul.numba_blocks import expand
from pallas_kernels.matmul.numba_gated import gate_rows
from pallas_kernels.matmul.numba_tiles import DEPTH, ROWS, STEP_BYTES, configure, release_tiles, tiles
from pallas_kernels.matmul.packed import GATED_COLUMNS, PANEL, block_bytes
from pallas_kernels.matmul.panels import (
    KERNEL,
    NUM_COLUMNS,
    NUM_ROWS,
    NUM_TOKENS,
    NUM_WORDS,
    OUT,
    TO_ADDED,
    WIDTH,
    X,
)
from pallas_kernels.numba_ffi import Work, array
from pallas_kernels.numba_memory import clear_rows

CHUNK_STEPS = 18
"""Of a panel that are multiplied with all tokens before the next ones: 36 of the first cache's 48 kB."""
KEPT_STEPS = 4
AHEAD = 2  # turns: with two threads the next turn of this one is the one after the next


@numba.njit(forceinline=True)
@typing.no_type_check
def _coming(panel, num_steps, lines_of_step, index, num_passes):
    """From where on pass `index` of `num_passes` brings a panel near, and how many lines of each step: a part of all."""
    lines = -(-lines_of_step // num_passes)
    return panel + 64 * num_steps * lines * index, max(min(lines, lines_of_step - lines * index), 0)


@typing.no_type_check
def make_work(sources, form, num_bits):
    """The work on a kernel in a form ("plain", "packed", "gated"; see `packed.py`): takes all tokens through a panel.

    num_bits: of a weight, 0 for bfloat16.  The first tokens expand a panel's blocks as they go.
    """
    is_packed, is_gated, is_coded = form != "plain", form == "gated", num_bits != 0
    is_gating = int(is_gated)  # numba takes it for a constant
    step_bytes = block_bytes(num_bits) if is_coded else STEP_BYTES
    lines_of_step = step_bytes // 64 if is_packed else 0
    panel_out_bytes, column_bytes = (2 * GATED_COLUMNS, 2) if is_gated else (4 * PANEL, 4)

    @numba.cfunc(Work, error_model="numpy", cache=True)
    @typing.no_type_check
    def work(job_at, first, stop):
        job = array(job_at, np.int64, NUM_WORDS + 0 * sources)
        num_tokens, num_rows, width = job[NUM_TOKENS], job[NUM_ROWS], job[WIDTH]
        num_steps, rows = width // DEPTH, min(num_rows, ROWS)
        x_stride, out_stride, source_bytes = 2 * width, column_bytes * job[NUM_COLUMNS], step_bytes * num_steps
        has_one_block = num_tokens <= ROWS
        num_panels = 2 if has_one_block else 1  # at a time
        num_chunks = 1 if has_one_block else -(-num_steps // CHUNK_STEPS)
        chunk_steps, num_passes = -(-num_steps // num_chunks), -(-num_tokens // (2 * ROWS))
        panel_bytes = STEP_BYTES * max(num_steps, KEPT_STEPS if is_coded else 0)
        sums_bytes = 4 * PANEL * 2 * ROWS * (num_passes if num_chunks > 1 else 1)
        held_bytes = 0 if is_packed and not is_coded else num_panels * panel_bytes
        buffer_ = np.empty(sums_bytes + held_bytes + 64, np.uint8)
        sums = (buffer_.ctypes.data + 63) // 64 * 64
        held = sums + sums_bytes
        configure(sums, rows, PANEL // 2)
        gated, num_gated = (sums, sums, 0, 0), 0
        for panel in range(first, stop if num_tokens > 0 else first, num_panels):
            has_two = has_one_block and panel + 1 < stop
            # What only one pass reads is kept for a few steps.
            mask = np.int64(KEPT_STEPS * STEP_BYTES - 1 if is_coded and has_two else -1)
            out, source = job[OUT] + panel_out_bytes * panel, job[KERNEL] + source_bytes * panel
            if not is_packed:
                for p in range(2 if has_two else 1):
                    place = job[KERNEL] + 2 * PANEL * (panel + p)
                    pack_panel(place, 2 * job[NUM_COLUMNS], width // 2, held + panel_bytes * p)
            for chunk in range(0, num_steps, chunk_steps):
                count, is_last = min(chunk_steps, num_steps - chunk), chunk + chunk_steps >= num_steps
                codes = source + step_bytes * chunk, source_bytes
                if is_coded:
                    right = held, panel_bytes
                    for p in range(2 if has_two else 1):
                        num_first = 1 if has_two or not has_one_block else count
                        expand(codes[0] + source_bytes * p, num_first, held + panel_bytes * p, num_bits)
                else:
                    right = (source if is_packed else held) + STEP_BYTES * chunk, panel_bytes
                ahead = codes[0] + AHEAD * (2 if is_gated else num_panels) * source_bytes
                for token in range(0, num_tokens, 2 * ROWS):
                    # The last block begins where it ends with the array: tokens computed twice come out the same.
                    row, next_row = min(token, num_rows - rows), min(token + ROWS, num_rows - rows)
                    left = job[X] + x_stride * row + 2 * DEPTH * chunk, x_stride, x_stride * (next_row - row)
                    here, next_out = out + out_stride * row, out_stride * (next_row - row)
                    kept_stride = 4 * PANEL * num_panels
                    kept = sums + (kept_stride * token if num_chunks > 1 else 0), kept_stride, kept_stride * ROWS
                    target = (here, out_stride, next_out) if is_last and not is_gated else kept
                    added = here + job[TO_ADDED] if job[TO_ADDED] != 0 else 0, out_stride, next_out
                    if chunk > 0:
                        added = kept
                    is_far = np.int64(is_packed and not is_coded and token == 0)
                    has_pair = token + ROWS < num_tokens
                    later = _coming(ahead, count, lines_of_step * num_panels, token // (2 * ROWS), num_passes)
                    operands = left, right, count, target, added, is_far, later, 0, codes, mask, gated, num_gated
                    if has_two:
                        tiles(operands, 1, 2, 1, num_bits, 0)
                    elif not has_pair:
                        tiles(operands, 1, 1, 1, 0, is_gating)
                    elif is_coded and token == 0:
                        tiles(operands, 2, 1, 1, num_bits, is_gating)
                    else:
                        tiles(operands, 2, 1, 1, 0, is_gating)
                    num_gated = 0
                    if is_gated and is_last:
                        if has_pair:
                            gated, num_gated = (kept[0], here, out_stride, next_out), rows
                        else:
                            gate_rows(kept[0], kept_stride, rows, here, out_stride)
                        if has_two:
                            gate_rows(kept[0] + 4 * PANEL, kept_stride, rows, here + panel_out_bytes, out_stride)
        if num_gated:
            gate_rows(gated[0], 4 * PANEL, rows, gated[1], out_stride)
            gate_rows(gated[0] + 4 * PANEL * ROWS, 4 * PANEL, rows, gated[1] + gated[3], out_stride)
        release_tiles()
        clear_rows(
            job[OUT] + panel_out_bytes * first, out_stride, num_tokens, num_rows, panel_out_bytes * (stop - first)
        )
        buffer_[0] = 0  # numba frees an array after the last use of its name, whoever still uses its address

    return work

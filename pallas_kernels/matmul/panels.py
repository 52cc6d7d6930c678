"""What do the CPU's products of either dtype share?  The words of a job, whose items of work are panels of columns."""

import typing

import numba
import numpy as np

from pallas_kernels.numba_ffi import FRAME_NUM_ARGS, FRAME_SIZE, Describe, array, buffer, set_items_per_turn

X, KERNEL, OUT, TO_ADDED, NUM_TOKENS, NUM_ROWS, WIDTH, NUM_COLUMNS, NUM_WORDS = range(9)
"""TO_ADDED: bytes from the result to what is added to the product, which is laid out as the result; 0 for nothing."""


@typing.no_type_check
def make_describe(sources, num_columns, pairs_up_to):
    """Reads what a call is about off its frame; an item of work is a panel, which gives `num_columns` columns of the result.

    A call of at most `pairs_up_to` tokens takes two panels a turn.
    """

    @numba.cfunc(Describe, cache=True)
    @typing.no_type_check
    def describe(frame_at, job_at):
        frame, job = array(frame_at, np.int64, FRAME_SIZE), array(job_at, np.int64, NUM_WORDS + 0 * sources)
        job[X], x_dims = buffer(frame, False, 0)
        job[KERNEL] = buffer(frame, False, 1)[0]
        job[OUT], out_dims = buffer(frame, True, 0)
        job[TO_ADDED] = buffer(frame, False, 3)[0] - job[OUT] if frame[FRAME_NUM_ARGS] > 3 else 0
        job[WIDTH] = array(x_dims, np.int64, 2)[1]
        job[NUM_ROWS], job[NUM_COLUMNS] = array(out_dims, np.int64, 2)[0], array(out_dims, np.int64, 2)[1]
        job[NUM_TOKENS] = min(array(buffer(frame, False, 2)[0], np.int32, 1)[0], job[NUM_ROWS])
        set_items_per_turn(job_at, 2 if job[NUM_TOKENS] <= pairs_up_to else 1)
        return job[NUM_COLUMNS] // num_columns

    return describe

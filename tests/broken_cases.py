"""Cases of a GPU report's part that end in every way there is; run in processes of their own by `test_gpu_report`."""

import os
import time

from experiments.gpu_report.cases import Case


def cases(setting):
    def fail():
        raise ValueError("no such shape")

    def lose_device():
        raise RuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    return [
        Case("good", lambda: [{"x": 1, "not_finite": float("nan")}]),
        Case("fails", fail),
        Case("after a failure", lambda: [{"x": 2}]),
        Case("loses the device", lose_device),
        Case("hangs", lambda: time.sleep(60), limit_s=0.5),
        Case("dies", lambda: os._exit(9)),
        Case("needs long", lambda: [{"x": 0}], needs_s=1e6),
        Case("last", lambda: [{"y": setting.seed}]),
    ]

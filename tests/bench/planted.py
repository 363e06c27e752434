"""Runs a program of `make gpu` with faults planted in the kernels of some ops.

python -m tests.bench.planted swiglu:raises,rms_norm:wrong tests.gpu.smoke judge --op ...
"""

import runpy
import sys
import time

import torch

from glmkern import dispatch

MESSAGE = "CUDA error: an illegal memory access was encountered"


def raises(*_):
    raise RuntimeError(MESSAGE)


def hangs(*_):
    time.sleep(600)


def plant(faults: dict[str, str]) -> None:
    """Puts another implementation in the place of the Triton kernels of these ops."""
    load = dispatch._load_implementation

    def load_planted(op, name, device):
        found, fault = load(op, name, device), faults.get(op.module)
        if name != "triton" or fault is None:
            return found
        return {"raises": raises, "hangs": hangs, "wrong": slightly_wrong(found)}[fault]

    dispatch._load_implementation = load_planted


def slightly_wrong(function):
    """One element of the first result is off by five percent."""

    def changed(*args):
        results = function(*args)
        first = results if isinstance(results, torch.Tensor) else results[0]
        if first.numel():
            first.view(-1)[-1] *= 1.05
        return results

    return changed


if __name__ == "__main__":
    faults, module, *arguments = sys.argv[1:]
    plant(dict(fault.split(":") for fault in faults.split(",")))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

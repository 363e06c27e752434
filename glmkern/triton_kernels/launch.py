"""How every kernel is started."""

import contextlib

import torch
from torch import Tensor


def launch(kernel, programs: int, *args, num_warps: int, **constants) -> None:
    """Runs `programs` programs of a Triton kernel on the device of its first argument.

    `args` are the kernel's arguments in order, a tensor first; `constants` its constexpr ones by
    name. Zero programs are nothing to do, not an error.
    """
    if programs == 0:
        return
    # Contraction to fma is asked for by name: its default differs between Triton versions.
    with _on_device(args[0]):
        kernel[(programs,)](*args, **constants, num_warps=num_warps, enable_fp_fusion=True)


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton starts kernels on the current GPU, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

"""How every kernel is started, and the layout that most of them take."""

import contextlib

import torch
from torch import Tensor


def launch(
    kernel, programs: int | tuple[int, ...], *args, num_warps: int, num_stages: int = 3, **constants
) -> None:
    """Runs a Triton kernel on the device of its first argument.

    `programs` is how many there are, along up to three axes; `args` are the kernel's arguments in
    order, a tensor first; `constants` its constexpr ones by name. Zero programs are nothing to do,
    not an error.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if 0 in grid:
        return
    # Contraction to fma is asked for by name: its default differs between Triton versions.
    with _on_device(args[0]):
        kernel[grid](
            *args, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True
        )


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a kernel takes that is given no strides: a tensor itself or, otherwise, a copy."""
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton starts kernels on the current GPU, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

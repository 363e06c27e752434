"""Argument checks and dtype rules that the ops share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glmkern.dispatch import Predicate, capability

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(condition: bool, message: Callable[[], str]) -> None:
    """Raises ValueError with `message()`, a full sentence with the values, unless `condition`."""
    if not condition:
        raise ValueError(message())


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    check(
        tensor.dtype in (*KERNEL_DTYPES, torch.float64),
        lambda: (
            f"{op}: {name} must be float32, "
            f"float16, bfloat16 or float64, not {_plain(tensor.dtype)}"
        ),
    )


def check_same(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """The two tensors have one dtype and one device."""
    check_device(op, name, tensor, like_name, like)
    check(
        tensor.dtype == like.dtype,
        lambda: (
            f"{op}: {name} is {_plain(tensor.dtype)} but "
            f"{like_name} is {_plain(like.dtype)}; convert one with .to()"
        ),
    )


def check_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    check(
        tensor.device == like.device,
        lambda: (
            f"{op}: {name} is on {tensor.device} but "
            f"{like_name} is on {like.device}; move one with .to()"
        ),
    )


def check_weight(op: str, weight: Tensor, x_name: str, x: Tensor) -> None:
    """A dense frozen weight: x's dtype, or one that x's holds exactly."""
    check(
        not weight.requires_grad,
        lambda: f"{op}: the weight is frozen here and gets no gradient; pass weight.detach()",
    )
    check(
        weight.is_floating_point() and torch.promote_types(weight.dtype, x.dtype) == x.dtype,
        lambda: (
            f"{op}: a dense weight must have {x_name}'s dtype or a narrower one, but it is "
            f"{_plain(weight.dtype)} and {x_name} is {_plain(x.dtype)}"
        ),
    )


def supports_dtype(x: Tensor, *_: object) -> str | None:
    """The predicate of kernels that take every shape in the kernel dtypes."""
    return None if x.dtype in KERNEL_DTYPES else f"{_plain(x.dtype)} has no kernel"


def supports_of_kernels(predicate: Predicate = supports_dtype) -> dict[str, Predicate]:
    """`supports` of an op whose kernels take the same arguments on every backend. Those of CUDA C++
    need a GPU that has arithmetic in bfloat16 where that occurs."""

    def cuda(*args: Any) -> str | None:
        return predicate(*args) or _why_no_bfloat16(*args)

    return {"cpu": predicate, "triton": predicate, "cuda": cuda}


def _why_no_bfloat16(x: Tensor, *others: object) -> str | None:
    """None, or why x's GPU does not take those of the arguments that are in bfloat16."""
    dtypes = [a.dtype if isinstance(a, Tensor) else a for a in (x, *others)]
    if x.device.type == "cuda" and torch.bfloat16 in dtypes:
        major, minor = capability(x.device)
        if (major, minor) < (8, 0):
            return f"bfloat16 needs sm_80 or newer, this GPU is sm_{major}{minor}"
    return None


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float32 for all kernel dtypes, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

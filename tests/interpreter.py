"""Triton's interpreter, which runs the Triton kernels where there is no GPU that Triton serves.

Importing this module before Triton switches it on for this process. Its children compile kernels
as usual: TRITON_INTERPRET=1 is not left in the environment.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from unittest import mock

import torch

INTERPRETED = not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))

if INTERPRETED and importlib.util.find_spec("triton"):
    # Triton reads the variable where it decorates its own functions, and the knob, which sets the
    # variable too, afterwards.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        from triton import knobs

        knobs.runtime.interpret = True


@contextlib.contextmanager
def interpreter_corrected() -> Iterator[None]:
    """What differs from the hardware: the interpreter cuts float32 off to bfloat16, which rounds to
    nearest even, and takes the bits of a sum's bfloat16 operands for integers. Its products come
    from BLAS, which orders a sum by the matrices' shapes and the host's chip: a backward then gets
    other scores than its forward. On a GPU both add along K in order. Triton 3.6's interpreter has
    no bfloat16 constants, and makes a loop's bound of an array of one element, which numpy refuses
    since 2.4."""
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, source, type_):
        if source.dtype.scalar != tl.float32 or type_.scalar != tl.bfloat16:
            return cast(self, source, type_)
        bits = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    def dot_in_order(self, a, b, d, *_):
        """a [.., M, K] @ b [.., K, N] + d, in float32."""
        a, b = (cast(self, x, tl.float32).data for x in (a, b))
        result = d.data.astype(np.float32)
        for k in range(a.shape[-1]):
            result += a[..., :, k : k + 1] * b[..., k : k + 1, :]
        return TensorHandle(result.astype(d.data.dtype), d.dtype.scalar)

    binary = InterpreterBuilder.binary_op

    def widening_binary(self, a, b, operation):
        if a.dtype.scalar != tl.bfloat16 or operation not in (np.add, np.subtract, np.multiply):
            return binary(self, a, b, operation)
        a, b = (cast(self, x, tl.float32) for x in (a, b))
        return rounding_cast(self, binary(self, a, b, operation), tl.bfloat16)

    def bfloat16_constant(self, value):
        return rounding_cast(self, self.get_fp32(value), tl.bfloat16)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with (
        mock.patch.object(interpreter, "_patch_lang_tensor", patch_tensor_and_index),
        mock.patch.object(InterpreterBuilder, "get_bf16", bfloat16_constant, create=True),
        mock.patch.object(InterpreterBuilder, "cast_impl", rounding_cast),
        mock.patch.object(InterpreterBuilder, "binary_op", widening_binary),
        mock.patch.object(InterpreterBuilder, "create_dot", dot_in_order),
    ):
        yield

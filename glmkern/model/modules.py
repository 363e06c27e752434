"""Linears and norms with frozen weights, each with its forward and its backward pass."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmkern import ops
from glmkern.model.config import ChatGLMConfig
from glmkern.model.kernels import kernels
from glmkern.ops.quant_linear import as_stored


class FrozenLinear(nn.Module):
    """A linear layer whose weight [out, in] never gets a gradient.

    The weight is dense, `weight`, or quantised: `packed`, `scale` and `bits` of an
    ops.QuantizedWeight. The other kind is None, and bits are 0 for a dense weight.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    packed: Tensor
    scale: Tensor

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.inputs = inputs
        self.weight = _empty(outputs, inputs)
        self.bias = _empty(outputs) if bias else None
        self.register_buffer("packed", None)
        self.register_buffer("scale", None)
        self.bits = 0

    def load_(
        self,
        name: str,
        tensor: Tensor,
        dtype: torch.dtype,
        device: torch.device | str,
        copy: bool = True,
    ) -> None:
        """Takes one tensor of a checkpoint: "weight", dense or int8 codes, "weight_scale", which
        keeps its own dtype, or "bias"; itself where `copy` is False and nothing is to be
        converted."""
        if name == "weight_scale":
            self.scale = tensor.to(device, copy=copy)
        elif tensor.dtype == torch.int8:
            self.packed, self.weight = tensor.to(device, copy=copy), None
            self.bits = 8 * tensor.shape[1] // self.inputs
        else:
            dtype = kept_dtype(tensor, dtype, device) if name == "weight" else dtype
            setattr(self, name, frozen(tensor.to(device, dtype, copy=copy).contiguous()))

    def quantize_(self, bits: int) -> None:
        """Replaces the weight by codes of 4 or 8 bits; see ops.quantize, whose errors these are."""
        assert self.weight is not None
        self.packed, self.scale, self.bits = ops.quantize(self.weight, bits)
        self.weight = None

    @property
    def matrix(self) -> Tensor | ops.QuantizedWeight:
        """The weight, as ops.quant_linear and ops.linear_cross_entropy take it."""
        if self.weight is None:
            return ops.QuantizedWeight(self.packed, self.scale, self.bits)
        return self.weight

    def project(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """[T, in] -> [T, out]."""
        bias = self.bias if with_bias else None
        weight = self._weight_for_torch(x)
        if weight is not None:
            return F.linear(x, weight, bias)
        return kernels.quant_linear_fwd(x.contiguous(), *as_stored(self.matrix), bias)

    def project_to_swiglu(self, x: Tensor) -> Tensor:
        """swiglu of the projection, for inference: [T, in] -> [T, out / 2]."""
        weight = self._weight_for_torch(x)
        if weight is not None:
            return kernels.swiglu_fwd(F.linear(x, weight, self.bias))
        return kernels.quant_linear_swiglu_fwd(x.contiguous(), *as_stored(self.matrix), self.bias)

    def project_back(self, dy: Tensor) -> Tensor:
        """The gradient of the input: [T, out] -> [T, in]."""
        weight = self._weight_for_torch(dy)
        if weight is not None:
            return dy @ weight
        return kernels.quant_linear_bwd(dy.contiguous(), *as_stored(self.matrix))

    def _weight_for_torch(self, x: Tensor) -> Tensor | None:
        """The dense weight where torch computes its product with x, None where our kernel does.

        A float32 product on the CPU is ours too: its bits, unlike those of torch's, do not depend
        on the number of threads, and it is not slower (bench/NOTES.md). So is one with a weight
        that is kept in half precision.
        """
        if self.weight is None or self.weight.dtype != x.dtype:
            return None
        return None if x.device.type == "cpu" and x.dtype == torch.float32 else self.weight


class FrozenNorm(nn.Module):
    """RMSNorm, or LayerNorm with bias where config.rmsnorm is False."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = _empty(config.hidden_size)
        self.bias = None if config.rmsnorm else _empty(config.hidden_size)

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] -> normalised [T, H], and the row statistics that backward needs."""
        if self.bias is None:
            return kernels.rms_norm_fwd(x, self.weight, self.eps)
        y, mean, rstd = torch.native_layer_norm(
            x, self.weight.shape, self.weight, self.bias, self.eps
        )
        return y, torch.stack([mean, rstd])

    def add_and_normalize(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h = x + residual, normalised: (normalised, h, the statistics of h)."""
        if self.bias is None:
            return kernels.add_rms_norm_fwd(x, residual, self.weight, self.eps)
        h = x + residual
        y, stats = self.normalize(h)
        return y, h, stats

    def backward(self, dy: Tensor, x: Tensor, stats: Tensor, dresidual: Tensor | None) -> Tensor:
        """The gradient of x, plus `dresidual` where x also reached the result another way."""
        if self.bias is None:
            return kernels.rms_norm_bwd(dy, x, self.weight, stats, dresidual, False)[0]
        mean, rstd = stats
        dx: Tensor = torch.ops.aten.native_layer_norm_backward(
            dy, x, self.weight.shape, mean, rstd, self.weight, self.bias, [True, False, False]
        )[0]
        return dx if dresidual is None else dx + dresidual

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> normalised [T, H], differentiable in x."""
        return self.normalize(x)[0]


def kept_dtype(weight: Tensor, dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype in which a model of `dtype` keeps a large weight.

    On a CPU a float32 model keeps a weight in half precision where it is stored so. The kernels
    read it as it is, with the same results.
    """
    half = weight.dtype in (torch.float16, torch.bfloat16)
    keeps = half and dtype == torch.float32 and torch.device(device).type == "cpu"
    return weight.dtype if keeps else dtype


def frozen(weight: Tensor) -> nn.Parameter:
    """A parameter that never gets a gradient."""
    return nn.Parameter(weight, requires_grad=False)


def _empty(*shape: int) -> nn.Parameter:
    """A parameter on the meta device; a checkpoint brings its values."""
    return frozen(torch.empty(*shape, device="meta"))

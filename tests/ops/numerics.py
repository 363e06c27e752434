"""How the tests judge a kernel's numbers.

The rule: a kernel may be off from a float64 computation by at most `factor` times the error of
plain PyTorch in the kernel's own precision, plus one ulp of the largest exact value. The factor is
2 for results and 3 for gradients. Both errors are max|a - b| over the tensor, and PyTorch's is the
largest of all draws of inputs. In a few draws it is small by luck: where a kernel exceeds it, many
more decide, all of which the kernel must pass.

    matches_fp64(kernel, formula, inputs)     forward and backward, the usual test of an op
    assert_close_to_fp64(result, exact, same_precision, factor)      one tensor
    moderate(shape)                           random inputs without outliers
    with poisoned_memory(): ...               unwritten output elements turn into NaN
    same_bits(a, b)                           equal to the last bit, NaNs included
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

FORWARD = 2.0
GRADIENT = 3.0
# Elements of the smallest tensor that are drawn: at first, and where the rule seems broken.
SAMPLE, LARGE_SAMPLE = 100, 40_000
MORE_DRAWS = range(20, 3000)  # as many as LARGE_SAMPLE needs, within these bounds
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def moderate(shape: Sequence[int]) -> Tensor:
    """Random numbers of either sign with magnitudes from 0.5 to 2. Where errors are proportional
    to the inputs, the largest of a normal sample is one outlier's, and its luck decides a test."""
    return torch.randn(shape).sign() * (torch.rand(shape) * 1.5 + 0.5)


def assert_close_to_fp64(
    result: Tensor, exact: Tensor, same_precision: Tensor, factor: float, name: str = "result"
) -> None:
    """Asserts the rule for one tensor.

    Args:
        result: what the kernel returned; must be finite.
        exact: the same quantity computed in float64 from the same (rounded) inputs.
        same_precision: the same quantity by plain PyTorch with result's dtype in and out.
        factor: FORWARD or GRADIENT.
    """
    _check_all([{name: (result, exact, same_precision, factor)}])


def matches_fp64(
    kernel: Callable,
    formula: Callable,
    inputs: Sequence[Tensor | None] | Callable[[], Sequence[Tensor | None]],
    sample: int = SAMPLE,
) -> None:
    """Asserts the rule for every output of `kernel(*inputs)` and the gradient of every input.

    `formula` is an independent definition in differentiable PyTorch, written so that it computes
    in the precision of its inputs (float64 in, float64 throughout). Both return a tensor or a
    tuple of tensors. Each output meets a random gradient; the inputs that require a gradient in
    `inputs` are the ones whose gradients are compared. The kernel runs in poisoned memory.

    `inputs` may be a function that draws inputs. It is called until the smallest compared tensor
    that has elements has met `sample` elements, and many times more if the rule seems broken then.
    """
    if not callable(inputs):
        _check_all([_compare(kernel, formula, inputs)])
        return
    draws = [_compare(kernel, formula, inputs())]
    sizes = [exact.numel() for _, exact, _, _ in draws[0].values() if exact.numel() > 0]
    smallest = min(sizes, default=LARGE_SAMPLE)
    draws += [_compare(kernel, formula, inputs()) for _ in range(sample // smallest)]
    if _broken_rule(draws) is not None:
        count = min(max(LARGE_SAMPLE // smallest, MORE_DRAWS.start), MORE_DRAWS.stop)
        draws += [_compare(kernel, formula, inputs()) for _ in range(count)]
    _check_all(draws)


def max_error(result: Tensor, exact: Tensor) -> float:
    """max|result - exact|, 0 for an empty tensor."""
    return _largest(result.detach().double() - exact.detach())


def ulp_of_max(exact: Tensor, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` at max|exact|."""
    info = torch.finfo(dtype)
    largest = max(_largest(exact.detach()), info.tiny)
    _, exponent = torch.frexp(torch.tensor(largest, dtype=torch.float64))
    return info.eps * 2.0 ** (exponent.item() - 1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True where shape, dtype and every bit agree (a NaN equals itself, 0.0 is not -0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        a.detach().contiguous().view(-1).view(torch.uint8),
        b.detach().contiguous().view(-1).view(torch.uint8),
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every new tensor with NaN (integers with their largest value) before it is used.

    An output element that a kernel forgets to write is then NaN, instead of whatever the allocator
    happened to return. Reaches tensors that native code allocates as well.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


# What is compared: name -> (result, exact, same_precision, factor).
Comparison = dict[str, tuple[Tensor, Tensor, Tensor, float]]


def _compare(kernel, formula, inputs) -> Comparison:
    leaves = [_convert(x, None) for x in inputs]
    with poisoned_memory():
        results = _as_tuple(kernel(*leaves))
    upstream = [moderate(y.shape).to(y.device, y.dtype) for y in results]
    with poisoned_memory():
        gradients = _gradients(results, upstream, leaves)
    theirs, their_gradients = _forward_and_gradients(formula, inputs, upstream, None)
    exact, exact_gradients = _forward_and_gradients(formula, inputs, upstream, torch.float64)
    compared = {
        f"output {i}": (*tensors, FORWARD)
        for i, tensors in enumerate(zip(results, exact, theirs, strict=True))
    }
    compared |= {
        f"gradient of input {i}": (g, exact_gradients[i], their_gradients[i], GRADIENT)
        for i, g in gradients.items()
    }
    return compared


def _check_all(draws: Sequence[Comparison]) -> None:
    sentence = _broken_rule(draws)
    assert sentence is None, sentence


def _broken_rule(draws: Sequence[Comparison]) -> str | None:
    """What the kernel exceeds, or None. AssertionError for a result that no draw can excuse."""
    for name in draws[0]:
        compared = [draw[name] for draw in draws]
        theirs = max(_checked_error(name, p, e, p) for _, e, p, _ in compared)
        for result, exact, same_precision, factor in compared:
            error = _checked_error(name, result, exact, same_precision)
            allowed = factor * theirs + ulp_of_max(exact, result.dtype)
            if error > allowed:
                return (
                    f"{name}: error {error:.3g} against float64, allowed "
                    f"{allowed:.3g} ({factor:g} x {theirs:.3g} of PyTorch in {result.dtype}, + ulp)"
                )
    return None


def _checked_error(name: str, result: Tensor, exact: Tensor, same_precision: Tensor) -> float:
    assert exact.dtype == torch.float64, f"{name}: the exact value is {exact.dtype}, not float64"
    assert result.dtype == same_precision.dtype, (
        f"{name}: {result.dtype}, expected {same_precision.dtype}"
    )
    assert result.shape == exact.shape == same_precision.shape, (
        f"{name}: shapes "
        f"{tuple(result.shape)}, {tuple(exact.shape)} and {tuple(same_precision.shape)} differ"
    )
    bad = (~result.isfinite()).sum().item()
    assert bad == 0, f"{name}: {bad} of {result.numel()} elements are not finite"
    return max_error(result, exact)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _forward_and_gradients(formula, inputs, upstream, dtype):
    leaves = [_convert(x, dtype) for x in inputs]
    outputs = _as_tuple(formula(*leaves))
    upstream = [_convert(g, dtype) for g in upstream]
    return outputs, _gradients(outputs, upstream, leaves)


def _convert(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if x is None:
        return None
    dtype = dtype if dtype is not None and x.is_floating_point() else x.dtype
    return x.detach().to(dtype).clone().requires_grad_(x.requires_grad)


def _gradients(outputs, upstream, leaves) -> dict[int, Tensor]:
    wanted = [i for i, x in enumerate(leaves) if x is not None and x.requires_grad]
    if not wanted:
        return {}
    gradients = torch.autograd.grad(outputs, [leaves[i] for i in wanted], upstream)
    return dict(zip(wanted, gradients, strict=True))


def _as_tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)

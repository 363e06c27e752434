"""Every op's schema, fake and autograd, with the C++ kernels and with the reference."""

import pytest

import glmkern
from glmkern import ops
from tests.ops import registration

NOT_DIFFERENTIABLE = {"prefix_attention_decode", "quantize", "dequantize", "QuantizedWeight"}


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def _backend(request):
    with glmkern.backend(request.param):
        yield


@pytest.mark.parametrize("op", registration.ARGUMENTS)
def test_opcheck(op):
    for inputs in registration.ARGUMENTS[op]("cpu"):
        registration.check_registration(getattr(registration.kernels, op).default, inputs)


@pytest.mark.parametrize("op", registration.ARGUMENTS)
def test_layouts(op):
    for inputs in registration.ARGUMENTS[op]("cpu"):
        registration.check_layouts(
            getattr(registration.kernels, op).default, inputs, refused=(RuntimeError,)
        )


@pytest.mark.parametrize("name", registration.compiled_calls("cpu"))
def test_public_ops_take_any_layout(name):
    function, inputs_of = registration.compiled_calls("cpu")[name]
    registration.check_layouts(function, inputs_of(5))


@pytest.mark.parametrize("name", registration.compiled_calls("cpu"))
def test_compiles_at_two_numbers_of_tokens(name):
    function, inputs_of = registration.compiled_calls("cpu")[name]
    registration.check_compiles(function, [inputs_of(5), inputs_of(8)])


def test_no_op_is_left_out():
    assert {op for op, _ in glmkern.backends("cpu").rows} == set(registration.ARGUMENTS)
    assert set(ops.__all__) - NOT_DIFFERENTIABLE == set(registration.compiled_calls("cpu"))

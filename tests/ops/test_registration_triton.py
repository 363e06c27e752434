"""Every op's schema, fake and autograd, with the Triton kernels."""

import pytest

from tests.ops import registration


@pytest.mark.parametrize("op", registration.ARGUMENTS)
def test_opcheck(op, device):
    for inputs in registration.ARGUMENTS[op](device):
        registration.check_registration(getattr(registration.kernels, op).default, inputs)


@pytest.mark.parametrize("op", registration.ARGUMENTS)
def test_layouts(op, device):
    for inputs in registration.ARGUMENTS[op](device):
        registration.check_layouts(getattr(registration.kernels, op).default, inputs)


@pytest.mark.parametrize("name", registration.compiled_calls("cpu"))
def test_compiles_at_two_numbers_of_tokens(name, device):
    function, inputs_of = registration.compiled_calls(device)[name]
    registration.check_compiles(function, [inputs_of(5), inputs_of(8)])

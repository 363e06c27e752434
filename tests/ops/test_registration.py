"""Every op's schema, fake and autograd on every backend, and which backend serves which op."""

import pytest

import glmkern
from glmkern import dispatch, ops
from tests.backends import CUDA, EVERY_OP, SERVED, TRITON, backends_of, every_backend
from tests.ops import registration

NOT_DIFFERENTIABLE = {"prefix_attention_decode", "quantize", "dequantize", "QuantizedWeight"}
# What is registered is the same for all instruction sets.
BEST_ISA = [b for b in every_backend() if b.name == "cpu"][-1]


def on_every_backend(names):
    cases = [
        (name, backend)
        for name in names
        for backend in backends_of(name if name in registration.ARGUMENTS else f"{name}_fwd")
        if backend.name != "cpu" or backend == BEST_ISA
    ]
    ids = [f"{backend}-{name}" for name, backend in cases]
    return pytest.mark.parametrize(("name", "backend"), cases, ids=ids, indirect=["backend"])


every_op = on_every_backend(registration.ARGUMENTS)
every_public_op = on_every_backend(registration.compiled_calls("cpu"))


@every_op
def test_opcheck(name, backend):
    for inputs in registration.ARGUMENTS[name](backend.device):
        registration.check_registration(getattr(registration.kernels, name).default, inputs)


@every_op
def test_layouts(name, backend):
    refused = (RuntimeError,) if backend.name in ("cpu", "cuda") else ()
    for inputs in registration.ARGUMENTS[name](backend.device):
        registration.check_layouts(
            getattr(registration.kernels, name).default, inputs, refused=refused
        )


@every_public_op
def test_public_ops_take_any_layout(name, backend):
    function, inputs_of = registration.compiled_calls(backend.device)[name]
    registration.check_layouts(function, inputs_of(5))


@every_public_op
def test_compiles_at_two_numbers_of_tokens(name, backend):
    function, inputs_of = registration.compiled_calls(backend.device)[name]
    registration.check_compiles(function, [inputs_of(5), inputs_of(8)])


def test_no_op_is_left_out():
    assert {op for op, _ in glmkern.backends("cpu").rows} == set(registration.ARGUMENTS)
    assert set(ops.__all__) - NOT_DIFFERENTIABLE == set(registration.compiled_calls("cpu"))


@pytest.mark.parametrize(
    "backend", [BEST_ISA, TRITON, CUDA], ids=lambda backend: backend.name, indirect=True
)
def test_the_tests_know_what_a_backend_serves(backend):
    rows = glmkern.backends(backend.device).rows
    served = {
        op.module
        for op in dispatch.OPS.values()
        if rows[op.name, backend.name] in ("chosen", "available")
    }
    assert served == SERVED[backend.name] <= EVERY_OP

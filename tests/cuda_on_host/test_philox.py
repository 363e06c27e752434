"""The dropout contract in CUDA: keys, ids and elements that need all their bits."""

import pytest
import torch

from glmkern.ops.philox import philox4x32
from tests.cuda_on_host.host import HERE, compile_program, run
from tests.ops.test_philox_kernels import SEED

# Elements that only a tensor of many gigabytes has; beyond 2^34 their counters wrap.
FIRSTS = [0, 4, 2**31 - 32, 2**32, 2**33 - 8, 2**33 + 4, 2**34 - 8, 2**34, 2**36 + 12]
IDS = [0, 7, 2**31 + 5, 2**32 - 1]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(HERE / "philox.cpp", tmp_path_factory.mktemp("philox"))


@pytest.mark.parametrize("p", [1e-12, 2**-32, 0.1, 0.5, 0.7, 1 - 2**-32, 1 - 1e-12])
@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("seed", [(0, 0), (-1, -1), tuple(SEED), (2**31, -(2**31))], ids=str)
def test_factors(program, seed, width, p):
    seed = torch.tensor(seed)
    elements = torch.tensor(FIRSTS)
    if width == 1:
        elements = (elements.unsqueeze(1) + torch.arange(4)).flatten()
    ids, firsts = (x.flatten() for x in torch.meshgrid(torch.tensor(IDS), elements, indexing="ij"))
    shape = (len(firsts), width)
    arguments = [width, len(firsts), repr(p)]
    (factors,) = run(program, arguments, [seed, ids, firsts], [(shape, torch.float32)])

    i = firsts.unsqueeze(1) + torch.arange(width)  # [firsts, width]
    lanes = philox4x32(seed, i // 4, ids.unsqueeze(1))  # [firsts, width, 4]
    bits = lanes.gather(2, (i % 4).unsqueeze(2)).squeeze(2)
    keep = bits >= round(p * 2**32)
    scale = torch.ones(()) / (1 - p)  # as PyTorch divides in float32
    assert torch.equal(factors, torch.where(keep, scale, torch.zeros(())))

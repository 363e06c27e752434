"""The machine itself: it must run what a GPU runs, and refuse what a GPU hangs on or does wrong."""

import re
import subprocess

import pytest
import torch

from tests.cuda_on_host.host import HERE, compile_program, run


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(HERE / "emulation.cpp", tmp_path_factory.mktemp("host"))


def test_a_block_sums_over_its_threads(program):
    x = torch.randn(3, 256)
    (sums,) = run(program, ["block_sum", 3], [x], [((3,), torch.float32)])
    torch.testing.assert_close(sums, x.sum(1))


def test_shuffles(program):
    x = torch.arange(64, dtype=torch.float32)
    down, xor, broadcast, any_is_40 = run(program, ["shuffle"], [x], [((64,), torch.float32)] * 4)
    lanes = x.view(2, 32)
    assert down.view(2, 32)[:, :29].equal(lanes[:, 3:]) and down[29:32].equal(x[29:32])
    assert xor.equal(x.view(-1, 2).flip(1).flatten())
    assert broadcast.equal(lanes[:, 7:8].expand(2, 32).flatten())
    assert any_is_40.equal((x >= 32).float())  # of the warp that has it


def test_syncwarp_orders_the_lanes(program):
    run(program, ["neighbours"], [], [])


@pytest.mark.parametrize("dtype, name", [(torch.float16, "half"), (torch.bfloat16, "bfloat16")])
def test_conversions_round_to_nearest_even(program, dtype, name):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    neighbours = every.float()[:-1].add(every.float()[1:]).div(2)  # ties, and what is near them
    x = torch.cat([every.float(), neighbours, torch.randn(5000) * torch.randn(5000).mul(9).exp()])
    x = x[~x.isnan()]
    narrow, wide = run(program, [name, len(x)], [x], [(x.shape, dtype), (x.shape, torch.float32)])
    assert narrow.view(torch.int16).equal(x.to(dtype).view(torch.int16))
    assert wide.equal(x.to(dtype).float())


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("barrier_in_a_branch", "thread 0 waits at __syncthreads; thread 32 has ended"),
        ("shuffle_in_a_branch", "thread 0 waits for its warp; thread 16 has ended"),
        ("shuffle_outside_its_mask", "a lane shuffles outside its own mask"),
        ("two_places", "lanes of one warp wait at "),
        ("two_sums_in_one_buffer", r"writes at reduce.cuh:.* what thread \d+ has read"),
        ("neighbours_without_order", r"reads at emula.* (4 bytes|what thread \d+ has written)"),
        ("misaligned_access", "16 bytes at an address that is no multiple of that"),
        ("write_after_reads", r"thread 0 writes at .* what thread [1-9]\d* has read"),
        ("too_many_threads", "invalid configuration argument"),
    ],
)
def test_mistakes_are_named(program, mistake, message):
    done = subprocess.run([program, mistake], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr

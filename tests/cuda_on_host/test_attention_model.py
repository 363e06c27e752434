"""The predictions of attention: how they are made, and what they promise."""

import json

import pytest
import torch

from bench.sass import Loop
from tests.cuda_on_host import attention_model
from tests.cuda_on_host.attention_model import (
    GROUPS,
    HEADS,
    PREFIX,
    TABLE,
    Walk,
    as_markdown,
    launch,
)
from tests.cuda_on_host.model import GPUS
from tests.ops.attention import cumulative

ROWS = json.loads(TABLE.read_text())
# Of the tensor cores' rate, forward and backward.
PROMISED = dict.fromkeys(GPUS, (0.6, 0.45)) | {"T4": (0.5, 0.35)}


def test_committed_markdown_shows_the_table():
    assert TABLE.with_suffix(".md").read_text() == as_markdown(ROWS)


def test_what_they_promise():
    for row in ROWS:
        forward, backward = PROMISED[row["gpu"]]
        assert row["cuda"]["forward"] >= forward, row
        assert row["cuda"]["backward"] >= backward, row


def test_which_comes_first_is_as_fast():
    """glmkern/ops/prefix_attention.py prefers CUDA C++ on these chips."""
    for row in ROWS:
        if "triton" in row:
            ours, theirs = (
                row[backend]["forward_us"] + row[backend]["backward_us"]
                for backend in ("cuda", "triton")
            )
            assert ours < theirs, row


@pytest.mark.parametrize("tokens", [65, 130])
def test_blocks_are_those_that_start(kernels, machine, tokens):
    heads, channels = HEADS * GROUPS, 16
    q = torch.randn(tokens, heads, channels).half()
    k, prefix = q[:, :GROUPS].contiguous(), torch.randn(PREFIX, GROUPS, channels).half()
    batch = cumulative([tokens]), torch.arange(1), None, 0.25, 0.0
    with machine.counting() as counted:
        out, lse = kernels.prefix_attention_fwd(q, k, k, prefix, prefix, *batch)
        kernels.prefix_attention_bwd(out, q, k, k, prefix, prefix, out, lse, *batch, True, True)
    blocks = {name.split("_mma")[0]: kernel.blocks for name, kernel in counted.items()}
    walk, (pair_blocks, prefix_splits) = Walk(64, 16, Loop(0, 0, 4)), attention_model.plan(tokens)
    rows = len(attention_model.row_turns(walk, tokens))
    idle = GROUPS * (tokens * HEADS % 64 == 0)  # a slot more than there are tiles
    assert blocks["attend"] == rows + idle
    keys = GROUPS * pair_blocks * (tokens // 128 + 1)  # with those of idle slots
    keys += len(attention_model.prefix_turns(walk, tokens, prefix_splits))
    assert blocks["gradients"] == keys + rows + idle


def test_splits_of_keys():
    """The picture in key_task.cuh; one block a tile; a tile alone."""
    assert attention_model.splits_of_keys(5 * 64, 4) == [3, 3, 2, 1, 1]
    assert attention_model.splits_of_keys(3 * 64, 2) == [1, 1, 1]
    assert attention_model.splits_of_keys(10, 7) == [3]


def test_a_walk_by_hand():
    """Three blocks on an A100 of two multiprocessors: the shorter ones share one."""
    loop = Loop(0, 0, 4)
    loop.fmas, gpu = 1024, GPUS["A100 80GB"]
    two = type(gpu)(gpu.sheet, 2, gpu.boost_ghz, gpu.l2_mib, gpu.shared_kib)
    blocks = Walk(64, 16, loop).cycles([5, 3, 4], two)
    assert launch(blocks, two) == 7 * loop.mean_cycles(80)
    assert loop.mean_cycles(80) == 4.0

"""The predictions of quant_linear's products: how they are made, and what they promise."""

import json

import pytest

from bench.sass import Loop
from tests.cuda_on_host.library import build
from tests.cuda_on_host.machine import Machine
from tests.cuda_on_host.model import GPUS, TABLE, Plan, Product, as_markdown, seconds

ROWS = json.loads(TABLE.read_text())


def test_committed_markdown_shows_the_table():
    assert TABLE.with_suffix(".md").read_text() == as_markdown(ROWS)


def test_they_are_of_today_s_splits():
    machine = Machine(build())
    for row in ROWS:
        for part in row["products"]:
            shape = part["tokens"], part["rows"], part["columns"], part["backward"]
            again = "run python -m tests.cuda_on_host.model"
            assert machine.plan(*shape).splits == part["splits"], again


def test_what_they_promise():
    """Of the limit of memory at one token, and of the tensor cores' at many."""
    for row in ROWS:
        if row["tokens"] == 1:
            assert row["share"] >= 0.75, row
        if row["tokens"] >= 192:
            assert row["share"] >= (0.5 if row["gpu"] == "T4" else 0.6), row


@pytest.mark.parametrize("backward", [False, True])
def test_a_product_by_hand(backward):
    """An A100's product whose tiles fill all multiprocessors once, without overlap: a block's 4
    warps have a turn of one instruction for 1,024 multiply-adds a cycle, and ten others."""
    gpu = GPUS["A100 80GB"]
    rows, columns = (4096, 108 * 256) if backward else (108 * 128, 4096)
    product = Product(64, rows, columns, backward)
    plan = Plan(64, 4, 1, token_blocks=1, result_blocks=108, steps=32, splits=1)
    loop = Loop(0, 0, 4)
    loop.fmas = 2048
    loop.kinds.update(tensor=1, fma=10)
    tensor, issue, fma = 4 * 2048 / 1024, 4 * 11 / 4, 4 * 10 * 32 / 64
    cycles = (max(tensor, issue, fma) + tensor + max(issue, fma)) / 2
    turns = product.flops / 2 / 108 / (4 * 2048)
    took, bound = seconds(product, plan, loop, gpu)
    assert bound == "tensor"
    assert took == pytest.approx(turns * cycles / (gpu.boost_ghz * 1e9))

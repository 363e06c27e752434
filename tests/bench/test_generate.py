"""The benchmark of generation: all sides say the same, and work is counted right."""

import pytest
import torch

from bench import bench_generate
from bench.bench_generate import OURS, PEER
from tests.model.models import small_model


@pytest.fixture
def model():
    # 4 bits pack two columns in a byte, so no width is odd.
    return small_model(dict(kv_channels=16, ffn_hidden_size=38), pre_seq_len=7)


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    monkeypatch.setattr(bench_generate, "PREDICT", (6, 2, 9))
    monkeypatch.setattr(bench_generate, "NEW_TOKENS", {"predict": 8, "decode": 12})


def test_equal_work_and_its_amount(model):
    works = {(work.name, work.implementation): work for work in bench_generate.works(model)}
    assert set(works) == {
        ("predict", OURS),
        ("predict", PEER),
        ("decode", OURS),
        ("decode", PEER),
        ("decode", f"{OURS}, float16 weights"),
        ("decode", f"{OURS}, 4 bits"),
    }
    # The matrices of the layers and the output layer, and what else a pass reads: norms and biases.
    matrices = 3 * (50 * (64 + 2 * 32) + 64 * 50 + 3 * 50 * 38) + 151 * 50
    others = 3 * (2 * 50 + 128) + 50
    ours, peer = works["predict", OURS], works["predict", PEER]
    assert ours.flops == peer.flops == 2 * matrices * (6 + 2 + 9 + 3 * 7)
    assert ours.bytes == 8 * 4 * (matrices + others) and peer.bytes == 3 * ours.bytes
    half = works["decode", f"{OURS}, float16 weights"]
    assert half.bytes == 12 * (2 * matrices + 4 * others)
    assert {work.shape for work in (ours, peer)} == {(3, 9, 8)}
    for work in works.values():
        text = work.call()
        assert text.shape == (work.shape[0], work.shape[2])


def test_other_texts_are_refused(model):
    peer = bench_generate.make_peer(model)
    prompts = bench_generate.make_prompts((4, 5), 6, 151)
    bench_generate.check_equal_texts(model, peer, prompts)
    with torch.no_grad():
        model.prefix_encoder.embedding.weight.mul_(-2)
    with pytest.raises(RuntimeError, match="says another text than glmkern: prompt 0 got"):
        bench_generate.check_equal_texts(model, peer, prompts)

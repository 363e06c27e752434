"""What a training run is predicted to take, through the command line."""

import re

import pytest
import torch

from glmkern import ChatGLM, cli
from tests.official import command


def test_a_run_tells_what_it_expects_and_what_came(flags, monkeypatch, capsys):
    assert cli.main(command(flags)) == 0
    text = capsys.readouterr().out
    before, _, after = text.partition("***** Running training *****")
    assert (
        "precision: linears float32, embedding and output layer float32, activations float32"
        in before
    )
    expected = re.search(
        r"^predicted: ([\d.]+) GiB at the peak, ([\d.e-]+) s a step, .* for 4 "
        r"steps\npredicted for this CPU \(measured: ",
        before,
        re.MULTILINE,
    )
    came = re.search(
        r"^predicted ([\d.e-]+) s a step and ([\d.]+) GiB, in the first 3 steps "
        r"measured ([\d.e-]+) s \([\d.]+ times\) and ([\d.]+) GiB",
        after,
        re.MULTILINE,
    )
    assert (came[2], came[1]) == (expected[1], expected[2])
    assert float(came[3]) > 0 and float(came[4]) > 0.1
    # After the third step and before the log of the fourth.
    assert after.index("in the first 3 steps") < after.index("{'loss'", after.index("{'loss'") + 1)
    assert after.count("in the first 3 steps") == 1


@pytest.mark.parametrize("method", ["loss", "load_base"])
def test_out_of_memory_is_told_with_what_was_expected(flags, monkeypatch, capsys, method):
    """In a step, and while the base is loaded."""

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ChatGLM, method, full)
    assert cli.main(command(flags)) == 1
    where = {"loss": "lower --tokens_per_pack", "load_base": "while the base was loaded"}[method]
    expected = r"; [\d.]+ GiB were predicted of the [\d.]+ GiB that were free: pass --recompute mlp"
    text = capsys.readouterr().err
    assert re.search("ran out of GPU memory.*" + where + ".*" + expected, text), text

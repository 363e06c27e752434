"""Several ranks compute what one does, and none of them waits for one that is gone."""

import signal
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from glmkern.errors import InputError
from glmkern.training.data.packs import pack_step
from glmkern.training.flags.arguments import TrainingArguments
from glmkern.training.loop import distributed
from glmkern.training.loop.distributed import join_world
from glmkern.training.setup import choose_device
from tests.training import children
from tests.training.checkpoints import contents
from tests.training.children import random_rows, run_ranks

LAYOUTS = [(ranks, tokens) for ranks in (1, 2, 3) for tokens in ("0", "64", "auto")]


def test_gradient_and_losses_depend_on_no_layout(tmp_path):
    """One step's gradient within 1e-6 and ten losses within 1e-5 of micro-batch by micro-batch."""
    found = {}
    for ranks, tokens in LAYOUTS:
        folder = tmp_path / f"{ranks} {tokens}"
        folder.mkdir()
        statuses = run_ranks(ranks, children.ten_losses, folder, tokens, torch.initial_seed())
        assert statuses == [0] * ranks
        each = [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
        assert all(torch.equal(one["prefix"], each[0]["prefix"]) for one in each)
        found[ranks, tokens] = each[0]
    expected = found[LAYOUTS[0]]
    assert max(expected["losses"]) - min(expected["losses"]) > 0.01
    for layout in LAYOUTS[1:]:
        error = (found[layout]["gradient"] - expected["gradient"]).abs().max()
        assert error <= 1e-6 * expected["gradient"].abs().max(), layout
        assert found[layout]["losses"] == pytest.approx(expected["losses"], abs=1e-5), layout


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", [0, 25, 1000])
def test_shares_of_a_step(ranks, budget):
    """Together the ranks have every row once, under its place in the step and with its weight."""
    rows = random_rows(23, 15)
    window = [[3, 4], [5], [6, 7, 8], [20, 0], [1]]
    whole = pack_step(rows, window, budget)

    def named(packs):
        return {
            int(name): (row, float(pack.batch.token_weight[start]))
            for pack in packs
            for name, row, start in zip(
                pack.batch.sequence_ids, pack.rows, pack.batch.cu_seqlens, strict=False
            )
        }

    shares = [named(pack_step(rows, window, budget, rank, ranks)) for rank in range(ranks)]
    assert sum(map(len, shares)) == 9
    assert {place: row for share in shares for place, row in share.items()} == named(whole)
    assert [row for row, _ in shares[0].values()] == [
        row for number in range(0, 5, ranks) for row in window[number]
    ]


def test_fewer_micro_batches_than_ranks(tmp_path):
    for ranks in (1, 3):
        (tmp_path / str(ranks)).mkdir()
        assert run_ranks(ranks, children.few_micro_batches, tmp_path / str(ranks)) == [0] * ranks
    ends = [torch.load(tmp_path / name) for name in ("1/rank0.pt", "3/rank0.pt", "3/rank2.pt")]
    assert torch.equal(ends[1]["embedding.weight"], ends[2]["embedding.weight"])
    torch.testing.assert_close(
        ends[0]["embedding.weight"], ends[1]["embedding.weight"], rtol=0, atol=1e-5
    )
    assert (tmp_path / "3" / "checkpoint-3").is_dir()


def test_all_ranks_repeat_an_overflow(tmp_path):
    assert run_ranks(2, children.overflow, tmp_path) == [0, 0]
    ends = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert ends[0]["overflows"] == ends[1]["overflows"] > 0
    assert torch.equal(ends[0]["embedding.weight"], ends[1]["embedding.weight"])


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    """And the resumed run ends with the bits of two ranks that were never stopped."""
    flags = {"save_steps": 4}
    assert run_ranks(2, children.train, tmp_path / "whole", flags) == [0, 0]
    statuses = run_ranks(2, children.train, tmp_path / "parts", flags, 5)
    assert statuses == [1, 128 + signal.SIGTERM]  # the first has its exception to tell
    # What the second rank was told after the sum of step 5, the first hears with that of step 6.
    assert {path.name for path in (tmp_path / "parts").glob("checkpoint-*")} == {
        "checkpoint-4",
        "checkpoint-6",
    }
    assert run_ranks(2, children.train, tmp_path / "parts", flags) == [0, 0]
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert {name: parts[name] for name in whole} == whole


def errors_of(folder: Path, ranks: int) -> list[str]:
    files = [folder / f"rank{rank}.txt" for rank in range(ranks)]
    return [file.read_text() if file.exists() else "" for file in files]


@pytest.mark.parametrize("ranks, failing", [(2, 0), (3, 1)])
def test_a_rank_that_raises_ends_the_run_with_its_cause(tmp_path, ranks, failing):
    assert run_ranks(ranks, children.fail, tmp_path, failing, "error") == [1] * ranks
    errors = errors_of(tmp_path, ranks)
    told = min(set(range(ranks)) - {failing})
    assert errors[failing] == "OSError: the disk of this rank is gone"
    assert errors[told] == (
        f"PeerFailure: rank {failing} failed: OSError: the disk of this rank is gone; last good "
        f"checkpoint: {tmp_path}/checkpoint-2"
    )
    assert all(
        errors[rank] == "SystemExit: 1" for rank in range(ranks) if rank not in (failing, told)
    )


@pytest.mark.parametrize("ranks, failing", [(2, 1), (3, 2)])
def test_a_rank_that_is_killed_is_found_by_roll_call(tmp_path, ranks, failing):
    statuses = run_ranks(ranks, children.fail, tmp_path, failing, "kill")
    assert statuses == [-signal.SIGKILL if rank == failing else 1 for rank in range(ranks)]
    assert errors_of(tmp_path, ranks)[0] == (
        f"PeerFailure: rank {failing} died without a message (it was killed, or the machine ran "
        f"out of memory); last good checkpoint: {tmp_path}/checkpoint-2"
    )


def test_the_rank_with_the_store_is_killed(tmp_path):
    assert run_ranks(3, children.fail, tmp_path, 0, "kill") == [-signal.SIGKILL, 1, 1]
    assert errors_of(tmp_path, 3)[1].startswith("PeerFailure: rank 0 died without a message; last")


def test_a_nan_on_one_rank_names_its_layer(tmp_path):
    assert run_ranks(3, children.fail, tmp_path, 2, "nan") == [1, 1, 1]
    errors = errors_of(tmp_path, 3)
    assert errors[2].startswith("TrainingError: step 3: the loss is nan (rows ")
    assert "values that are not finite come from layer 2 of 3, after layer 1 of 3" in errors[2]
    assert f"last good checkpoint: {tmp_path}/checkpoint-2; lower --learning_rate" in errors[2]
    cause = errors[2].removeprefix("TrainingError: ")
    assert errors[0] == f"PeerFailure: rank 2 failed: {cause}"


def test_what_every_rank_finds_wrong_is_said_once(tmp_path):
    assert run_ranks(3, children.refuse, tmp_path) == [1, 2, 2]
    assert errors_of(tmp_path, 3) == [
        "InputError: --seed is wrong",
        "SystemExit: 2",
        "SystemExit: 2",
    ]


def test_ranks_that_start_differently_are_told(tmp_path):
    assert run_ranks(3, children.disagree, tmp_path) == [1, 2, 2]
    assert errors_of(tmp_path, 3)[0] == (
        "InputError: the start of the run is afresh on rank 0, but checkpoint-2 on rank 1; give "
        "all ranks the same files, and an --output_dir that they share"
    )


def test_a_rank_that_goes_on_computing_is_ended(tmp_path):
    statuses = run_ranks(2, children.fail, tmp_path, 1, "error while others compute")
    assert statuses == [1, 1]
    assert errors_of(tmp_path, 2)[0] == ""  # ended from outside its main thread


@pytest.fixture
def two_gpus(monkeypatch):
    """The ranks' environment, two GPUs and NCCL as far as a process is told of them; what it asks
    of torch, in its order."""
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    asked = []

    def init(backend, **options):
        asked.append((backend, options["device_id"]))
        raise RuntimeError("no NCCL here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(
        distributed.dist, "rendezvous", lambda url, timeout: iter([(HashStore(), 1, 2)])
    )
    monkeypatch.setattr(distributed.dist, "init_process_group", init)
    return asked


def test_a_rank_computes_on_its_own_gpu(two_gpus):
    """It is current before NCCL starts, and NCCL is told of it."""
    args = TrainingArguments()
    device = choose_device(args)
    assert device == torch.device("cuda", 1)
    with pytest.raises(InputError, match="the 2 processes did not find each other"):
        with join_world(args, device):
            pass
    assert two_gpus == [device, ("nccl", device)]
    with pytest.raises(InputError), join_world(TrainingArguments(ddp_backend="gloo"), device):
        pass
    assert two_gpus[2:] == [device, ("gloo", None)]


def test_a_gpu_that_is_not_visible_is_told(two_gpus, monkeypatch):
    """CUDA_VISIBLE_DEVICES decides what torch counts, from 0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    sentence = "rank 1 should use GPU 1, but 1 are visible; lower --nproc-per-node"
    with pytest.raises(InputError, match=sentence):
        with join_world(TrainingArguments(), torch.device("cuda", 1)):
            pass
    assert two_gpus == []

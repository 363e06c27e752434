"""Training in processes of their own, forked from a server that has torch loaded already."""

import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
import torch._dynamo  # noqa: F401 (a second that the first optimiser would take in every child)

from glmkern.errors import InputError
from glmkern.training.data.rows import Row
from glmkern.training.flags.arguments import TrainingArguments
from glmkern.training.loop import distributed
from glmkern.training.loop.distributed import join_world
from glmkern.training.loop.hooks import Hooks
from glmkern.training.loop.resume import find_checkpoint
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.run_folder import RunFolder
from tests.model.models import small_model
from tests.training.stand_in import IGNORED, arguments

CPU = torch.device("cpu")
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__])


def start(function: Callable, *args) -> multiprocessing.Process:
    """Runs `function(*args)`, defined in a module, in a process of its own."""
    child = context.Process(target=_quietly, args=(function, *args))
    child.start()
    return child


def run(function: Callable, *args) -> None:
    child = start(function, *args)
    child.join()
    assert child.exitcode == 0


def start_ranks(size: int, function: Callable, *args) -> list[multiprocessing.Process]:
    """Runs `function(*args)` in `size` processes with the environment torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(_with_environment, {**launched, "RANK": rank, "LOCAL_RANK": rank}, function, *args)
        for rank in range(size)
    ]


def run_ranks(size: int, function: Callable, *args) -> list[int]:
    """The exit statuses; a rank that hangs for a minute counts as -1."""
    children = start_ranks(size, function, *args)
    return [status(child) for child in children]


def status(child: multiprocessing.Process) -> int:
    child.join(60)
    if child.exitcode is None:
        child.kill()
        child.join()
        return -1
    return child.exitcode


def _with_environment(variables: dict[str, object], function: Callable, *args) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    function(*args)


def _quietly(function: Callable, *args) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        function(*args)


def random_rows(count: int, longest: int, vocabulary: int = 151, seed: int = 0) -> list[Row]:
    """Rows of 3 to `longest` tokens, the second half of each labelled."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = draw.randint(3, longest)
        ids = [draw.randrange(vocabulary) for _ in range(length)]
        rows.append(Row(ids, [IGNORED] * (length // 2) + ids[length // 2 :]))
    return rows


def model(dtype: torch.dtype = torch.float32, **overrides):
    """The same random model in every process."""
    torch.manual_seed(5)
    return small_model(overrides, dtype=dtype)


def draws() -> dict[str, float]:
    """An "evaluation" that shows the state of every random number generator."""
    return {
        "eval_loss": float(torch.rand(())),
        "eval_python": random.random(),
        "eval_numpy": float(numpy.random.rand()),
    }


def train(folder: Path, flags: dict[str, object], until: int | None = None) -> None:
    """Trains the small model, going on from the newest checkpoint if there is one; the last rank
    gets a SIGTERM at the end of step `until`."""
    args = run_arguments(folder, **flags)
    with join_world(args, CPU) as world:
        trainer = Trainer(
            model(),
            random_rows(13, 12),
            args,
            world=world,
            hooks=Hooks(evaluate=draws),
            folder=RunFolder(folder, args.save_total_limit),
        )
        if world.rank == world.size - 1:
            trainer.optimizer.register_step_post_hook(
                lambda *_: trainer.state.global_step + 1 == until and os.kill(os.getpid(), 15)
            )
        trainer.train(find_checkpoint("auto", folder))
        if world.is_first:
            trainer.folder.write_state(trainer.state)


def run_arguments(folder: Path, **flags) -> TrainingArguments:
    return arguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "max_steps": 12,
            "gradient_accumulation_steps": 3,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "logging_first_step": True,
            "evaluation_strategy": "steps",
            "eval_steps": 3,
            **flags,
        }
    )


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def ten_losses(folder: Path, tokens_per_pack: str, seed: int) -> None:
    """Ten steps in float32, with dropout; every rank saves the losses, the first gradient and the
    last prefix. The model is wide enough for rounding to stay well below 1e-6 of the gradient."""
    args = arguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=10,
        learning_rate=1e-3,
        tokens_per_pack=tokens_per_pack,
        max_grad_norm=0,
    )
    with join_world(args, CPU) as world:
        torch.manual_seed(seed)
        tuned = small_model(
            {"hidden_size": 96, "ffn_hidden_size": 128, "kv_channels": 16, "num_attention_heads": 6}
        )
        trainer = Trainer(tuned, random_rows(29, 40, seed=seed), args, world=world)
        compute, losses, gradients = trainer.gradient.compute, [], []
        (parameter,) = trainer.gradient.parameters

        def computed(*arguments):
            result = compute(*arguments)
            losses.append(result.loss)
            gradients.append(parameter.grad.clone())
            return result

        trainer.gradient.compute = computed
        trainer.train()
        torch.save(
            {"losses": losses, "gradient": gradients[0], "prefix": parameter.detach()},
            folder / f"rank{world.rank}.pt",
        )


def overflow(folder: Path) -> None:
    """Float16 with a row of the output layer that makes the gradient overflow."""
    args = run_arguments(folder, evaluation_strategy="no", save_strategy="no")
    with join_world(args, CPU) as world:
        tuned = model(torch.float16)
        with torch.no_grad():
            tuned.transformer.output_layer.weight[77] *= 100
        trainer = Trainer(tuned, random_rows(13, 12), args, world=world)
        trainer.train()
        torch.save(
            {"overflows": trainer.loss_scale.overflows, **tuned.prefix_encoder.state_dict()},
            folder / f"rank{world.rank}.pt",
        )


def fail(folder: Path, failing_rank: int, how: str) -> None:
    """A run in which one rank fails in its third step; each rank leaves its error in a file."""
    rank = int(os.environ["RANK"])
    args = run_arguments(folder, save_steps=2, evaluation_strategy="no")
    with _recorded(folder), join_world(args, CPU) as world:
        tuned = model()
        trainer = Trainer(tuned, random_rows(13, 12), args, world=world, folder=RunFolder(folder))
        compute = trainer.gradient.compute

        def computed(window, step, *others):
            if step == 2 and rank == failing_rank:
                _break(how, tuned)
            if step == 2 and how == "error while others compute" and rank != failing_rank:
                distributed.HANG_SECONDS = 0.5
                time.sleep(60)
            return compute(window, step, *others)

        trainer.gradient.compute = computed
        trainer.train()


def refuse(folder: Path) -> None:
    """A mistake in the flags, which every rank finds."""
    with _recorded(folder), join_world(run_arguments(folder), CPU):
        raise InputError("--seed is wrong")


def disagree(folder: Path) -> None:
    """The ranks look for one thing that all have, and for one that they do not."""
    with _recorded(folder), join_world(run_arguments(folder), CPU) as world:
        assert world.gather("number", str(world.rank)) == list(map(str, range(world.size)))
        world.require_same("the colour", "red")
        world.require_same("the start of the run", "afresh" if world.is_first else "checkpoint-2")


@contextmanager
def _recorded(folder: Path) -> Iterator[None]:
    """Writes what ends the block into a file of this rank."""
    try:
        yield
    except BaseException as error:
        (folder / f"rank{os.environ['RANK']}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def _break(how: str, tuned: torch.nn.Module) -> None:
    if how == "kill":
        os.kill(os.getpid(), 9)
    elif how == "nan":
        tuned.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight[3, 2] = float("nan")
    else:
        raise OSError("the disk of this rank is gone")


def few_micro_batches(folder: Path) -> None:
    """Steps with fewer micro-batches than ranks."""
    args = run_arguments(
        folder, gradient_accumulation_steps=2, max_steps=3, save_steps=3, evaluation_strategy="no"
    )
    with join_world(args, CPU) as world:
        tuned = model()
        Trainer(tuned, random_rows(13, 12), args, world=world, folder=RunFolder(folder)).train()
        torch.save(tuned.prefix_encoder.state_dict(), folder / f"rank{world.rank}.pt")

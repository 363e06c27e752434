"""Several processes, one run: each rank computes its share of every step's micro-batches.

torchrun starts the ranks and says in the environment who they are. A step needs one all-reduce,
of the prefix gradient with a few numbers behind it; nothing else is shared. gloo and NCCL add in
an order that depends on the number of ranks and the size alone, and leave the same bits on every
rank, so that the prefixes of the ranks stay equal and a run can be repeated.

A rank that fails says why in the store of the process group before it goes. One that is killed
cannot; the others notice when the all-reduce breaks, and a roll call finds out who is missing.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glmkern.errors import InputError, Interrupted, TrainingError
from glmkern.training.arguments import TrainingArguments

# Keys of the store.
FAILURE, ROLL_CALL, PRESENT = "failure", "roll_call", "present"
POLL_SECONDS = 0.1
ROLL_CALL_SECONDS = 3.0
HANG_SECONDS = 10.0  # how long a rank may go on computing once another has failed
CAUSE_SECONDS = 120.0  # in which a rank with a NaN loss finds the layer it comes from


class PeerFailure(TrainingError):
    """Another rank failed; the message names it and its cause."""


class World:
    """The ranks of a run; without arguments, the run of one process.

    Attributes:
        rank: of this process, from 0. Rank 0 alone prints and writes.
        size: how many ranks there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None):
        self.rank, self.size = rank, size
        self._store = store

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def first_prints(self) -> Iterator[None]:
        """Within the block only rank 0 writes to stdout."""
        with contextlib.ExitStack() as stack:
            if not self.is_first:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield

    def sum_gradients(self, parameters: Sequence[nn.Parameter],
                      report: Sequence[float]) -> list[list[float]]:
        """Add up the ranks' gradients, in place; returns what each rank reports, by rank.

        A parameter without a gradient counts as zero. Raises PeerFailure where a rank is gone.
        """
        if self.size == 1:
            return [list(report)]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        reports = gradients[0].new_zeros(self.size, len(report))
        reports[self.rank] = torch.tensor(report)
        flat = torch.cat([each.flatten() for each in (*gradients, reports)])
        self._communicate(dist.all_reduce, flat)
        *sums, reports = flat.split([each.numel() for each in (*gradients, reports)])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total.view_as(gradient))
        return reports.view(self.size, -1).tolist()

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            self._communicate(dist.all_reduce, torch.zeros(1, device=self._device()))

    def wait_for_cause(self) -> PeerFailure:
        """The failure of a rank that is known to fail and about to say why."""
        return self._peer_failure(CAUSE_SECONDS, "")

    def announce(self, cause: BaseException) -> None:
        """Tell the other ranks that this one fails; the first to say so is heard."""
        words = str(cause) or type(cause).__name__
        if not isinstance(cause, (InputError, TrainingError)):
            words = f"{type(cause).__name__}: {words}"
        with contextlib.suppress(RuntimeError):  # the rank with the store is gone
            self._record_failure([self.rank], f"rank {self.rank} failed: {words}")

    def _communicate(self, collective: Callable[[Tensor], object], tensor: Tensor) -> None:
        try:
            collective(tensor)
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)
        except RuntimeError as error:
            raise self._peer_failure(1.0, str(error)) from error

    def _device(self) -> torch.device:
        on_gpu = dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def _peer_failure(self, patience: float, symptom: str) -> PeerFailure:
        """What the store knows after `patience` seconds, or else what a roll call finds."""
        try:
            if not self._wait_for([FAILURE], patience):
                self._call_roll(symptom)
            failure = json.loads(self._store.get(FAILURE))
        except RuntimeError:  # DistError: the store went with the rank that held it
            failure = {"ranks": [0], "message": "rank 0 died without a message"}
        return self._told_once(failure)

    def _told_once(self, failure: dict) -> PeerFailure:
        """The error to raise, on the lowest rank that is still there; the others end in silence."""
        if self.rank != min(set(range(self.size)) - set(failure["ranks"]), default=0):
            raise SystemExit(1)
        return PeerFailure(failure["message"])

    def _call_roll(self, symptom: str) -> None:
        self._store.set(ROLL_CALL, "")
        answers = [f"{PRESENT}/{rank}" for rank in range(self.size)]
        self._wait_for(answers, ROLL_CALL_SECONDS)
        missing = [rank for rank in range(self.size) if not self._store.check([answers[rank]])]
        if missing:
            names = ", ".join(map(str, missing))
            message = (f"rank {names} died without a message (it was killed, or the machine ran "
                       "out of memory)")
        else:
            cause = symptom.strip().split("\n")[0] or "one reported a loss that is not finite"
            message = (f"the ranks lost each other ({cause}); raise --ddp_timeout if one of them "
                       "was only slow")
        self._record_failure(missing, message)

    def _record_failure(self, ranks: list[int], message: str) -> None:
        failure = json.dumps({"ranks": ranks, "message": message})
        self._store.compare_set(FAILURE, "", failure)

    def _wait_for(self, keys: list[str], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True


class _Watch(threading.Thread):
    """Answers roll calls while the main thread computes, and ends a process that goes on long
    after another has failed, as one that hangs in an NCCL collective would."""

    def __init__(self, world: World, store: dist.Store):
        super().__init__(daemon=True)
        self.world, self.store = world, store
        self.stopped = threading.Event()

    def run(self) -> None:
        answered = False
        while not self.stopped.wait(POLL_SECONDS):
            try:
                if not answered and self.store.check([ROLL_CALL]):
                    self.store.set(f"{PRESENT}/{self.world.rank}", "")
                    answered = True
                failed = self.store.check([FAILURE])
            except RuntimeError:
                return  # the store is gone; the next collective will say so
            if failed and not self.stopped.wait(HANG_SECONDS):
                failure = json.loads(self.store.get(FAILURE))
                with contextlib.suppress(SystemExit):
                    message = self.world._told_once(failure)
                    print(f"glmkern: {message}", file=sys.stderr, flush=True)
                os._exit(1)


@contextmanager
def join_world(args: TrainingArguments, device: torch.device) -> Iterator[World]:
    """The ranks that torchrun started, as its environment variables say; one without them.

    Raises InputError where the ranks do not find each other, or have too few GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise InputError(
                f"rank {os.environ['RANK']} should use GPU {device.index}, but "
                f"{torch.cuda.device_count()} are visible; lower --nproc-per-node")
        torch.cuda.set_device(device)
    backend = args.ddp_backend or ("nccl" if device.type == "cuda" else "gloo")
    timeout = timedelta(seconds=args.ddp_timeout)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore("glmkern", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"the {size} processes did not find each other ({reason}); start them "
                         "with torchrun --standalone --nproc-per-node N") from error
    world = World(rank, size, store)
    watch = _Watch(world, store.clone())
    watch.start()
    try:
        yield world
        dist.destroy_process_group()
    except BaseException as error:
        # An interruption is agreed on, a PeerFailure and a silent SystemExit are known already.
        if not isinstance(error, (PeerFailure, Interrupted, SystemExit)):
            world.announce(error)
        raise
    finally:
        watch.stopped.set()

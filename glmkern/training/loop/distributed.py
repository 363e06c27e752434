"""Several processes, one run: each rank computes its share of every step's micro-batches.

torchrun starts the ranks and names them in the environment. A step needs one all-reduce: of the
prefix gradient, with a few numbers appended. gloo and NCCL add in an order that depends only on the
number of ranks and the size. Every rank gets the same bits, so the prefixes of the ranks stay equal
and a run can be repeated.

A rank that fails writes its reason into the store of the process group and ends. A killed rank
writes nothing: the others notice when the all-reduce breaks, and a roll call finds who is missing.
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
from glmkern.training.flags.arguments import TrainingArguments

# Keys of the store.
FAILURE, HEARD, ROLL_CALL, PRESENT = "failure", "heard", "roll_call", "present"
STORE_LOST = {"ranks": [0], "message": "rank 0 died without a message"}
POLL_SECONDS = 0.1
SAME_CAUSE_SECONDS = 1.0
ROLL_CALL_SECONDS = 5.0
HANG_SECONDS = 10.0  # how long a rank may still compute after another has failed
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
        self._watch = _Watch(self, store.clone()) if store is not None else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def only_first_prints(self) -> Iterator[None]:
        """Within the block only rank 0 writes to stdout."""
        with contextlib.ExitStack() as stack:
            if not self.is_first:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block the ranks tell each other of their errors."""
        self._watch.start()
        try:
            yield
        except (PeerFailure, Interrupted, SystemExit):
            raise  # every rank knows already
        except BaseException as error:
            if self.announce(error):
                raise SystemExit(2 if isinstance(error, InputError) else 1) from error
            raise
        finally:
            self._watch.stopped.set()

    def sum_gradients(
        self, parameters: Sequence[nn.Parameter], report: Sequence[float]
    ) -> list[list[float]]:
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
        """Return when every rank has called this."""
        if self.size > 1:
            self._communicate(dist.all_reduce, torch.zeros(1, device=self._device()))

    def gather(self, name: str, value: str) -> list[str]:
        """What every rank calls `name`, by rank; to be asked by all of them, once a name."""
        if self.size == 1:
            return [value]
        self._store.set(f"{name}/{self.rank}", value)
        self.wait_for_all()
        return [self._store.get(f"{name}/{rank}").decode() for rank in range(self.size)]

    def require_same(self, what: str, value: str) -> None:
        """Raise InputError, on every rank, where `what` is not the same on all of them."""
        values = self.gather(what, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise InputError(
                    f"{what} is {values[0]} on rank 0, but {other} on rank {rank}; give all ranks "
                    "the same files, and an --output_dir that they share"
                )

    def wait_for_failure(self) -> PeerFailure:
        """The failure of another rank, which is about to write its reason."""
        return self._peer_failure(CAUSE_SECONDS, "")

    def announce(self, error: BaseException) -> bool:
        """Tell the other ranks that this one fails, and wait until they have read it. Only the
        first failure counts. True where another rank has told the same one before."""
        words = str(error) or type(error).__name__
        if not isinstance(error, (InputError, TrainingError)):
            words = f"{type(error).__name__}: {words}"
        # Rank 0 reports what all ranks find wrong, such as a flag.
        if not self.is_first:
            self._watch.failed.wait(SAME_CAUSE_SECONDS)
        with contextlib.suppress(RuntimeError):  # the rank with the store is gone
            self._record_failure([self.rank], f"rank {self.rank} failed: {words}")
            self._wait_for([f"{HEARD}/{rank}" for rank in range(self.size)], ROLL_CALL_SECONDS)
        heard = self._watch.failure or {"ranks": [self.rank], "message": ""}
        return heard["ranks"] != [self.rank] and heard["message"].endswith(f" failed: {words}")

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
        """What the store says within `patience` seconds, or else what a roll call finds. Returned
        on the lowest rank that did not fail; the others end without a message."""
        if not self._watch.failed.wait(patience):
            with contextlib.suppress(RuntimeError):
                self._find_missing_ranks(symptom)
            self._watch.failed.wait(ROLL_CALL_SECONDS)
        failure = self._watch.failure or STORE_LOST
        if not self.is_reporter_of(failure):
            raise SystemExit(1)
        return PeerFailure(failure["message"])

    def is_reporter_of(self, failure: dict) -> bool:
        """Whether this is the lowest rank that did not fail."""
        return self.rank == min(set(range(self.size)) - set(failure["ranks"]), default=0)

    def _find_missing_ranks(self, symptom: str) -> None:
        self._store.set(ROLL_CALL, "")
        answers = [f"{PRESENT}/{rank}" for rank in range(self.size)]
        self._wait_for(answers, ROLL_CALL_SECONDS)
        missing = [rank for rank in range(self.size) if not self._store.check([answers[rank]])]
        if missing:
            names = ", ".join(map(str, missing))
            message = (
                f"rank {names} died without a message (it was killed, or the machine ran "
                "out of memory)"
            )
        else:
            cause = symptom.strip().split("\n")[0] or "one reported a loss that is not finite"
            message = (
                f"the ranks lost each other ({cause}); raise --ddp_timeout if one of them "
                "was only slow"
            )
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
    """Reads the store while the main thread computes.

    It answers roll calls and keeps the failure that is announced. It ends a process that is still
    there long after that, such as one that hangs in an NCCL collective.

    Attributes:
        failure: what failed, {"ranks": [...], "message": ...}; there once `failed` is set.
    """

    def __init__(self, world: World, store: dist.Store):
        super().__init__(daemon=True)
        self.world, self.store = world, store
        self.failure: dict | None = None
        self.failed, self.stopped = threading.Event(), threading.Event()

    def run(self) -> None:
        try:
            self.failure = self._listen()
        except RuntimeError:  # DistError: the store went with the rank that held it
            self.failure = STORE_LOST
            self.failed.set()
            return
        self.failed.set()
        if self.failure is not None and not self.stopped.wait(HANG_SECONDS):
            if self.world.is_reporter_of(self.failure):
                print(f"glmkern: {self.failure['message']}", file=sys.stderr, flush=True)
            os._exit(1)

    def _listen(self) -> dict | None:
        answered = False
        while not self.stopped.wait(POLL_SECONDS):
            if not answered and self.store.check([ROLL_CALL]):
                self.store.set(f"{PRESENT}/{self.world.rank}", "")
                answered = True
            if self.store.check([FAILURE]):
                failure = json.loads(self.store.get(FAILURE))
                self.store.set(f"{HEARD}/{self.world.rank}", "")
                return failure
        return None


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
                f"{torch.cuda.device_count()} are visible; lower --nproc-per-node"
            )
        torch.cuda.set_device(device)
    backend = args.ddp_backend or ("nccl" if device.type == "cuda" else "gloo")
    # NCCL then connects the ranks here, where what goes wrong is told, not in the first all-reduce.
    own = device if backend == "nccl" else None
    timeout = timedelta(seconds=args.ddp_timeout)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore("glmkern", store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=own
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the {size} processes did not find each other ({reason}); start them "
            "with torchrun --standalone --nproc-per-node N"
        ) from error
    world = World(rank, size, store)
    with world.watched():
        yield world
        dist.destroy_process_group()

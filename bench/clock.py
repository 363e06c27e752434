"""The clock of the benchmarks: calls timed in interleaved rounds, and ratios within a round.

Whatever else the machine does then hits all calls alike.
"""

import ctypes
import itertools
import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

ROUNDS = 21
# On a CPU a sample lasts at least this long, so that the clock and a stray interrupt weigh little.
SAMPLE_SECONDS = 0.01
# Cleared before every sample on a GPU: more than any L2 cache holds.
FLUSH_BYTES = 2**29
# It is cleared so often that the GPU is busy until Python has queued the launches of a sample: what
# is timed is then the work of the GPU alone. A call that takes longer to queue is a whole step, and
# is timed with what the host adds.
QUEUE_SECONDS, MOST_QUEUE_SECONDS = 1e-3, 8e-3


def seconds_per_round(calls: Sequence[Callable], device: str, rounds: int) -> list[list[float]]:
    """Seconds a call of every function in every round; each round starts with another one."""
    sample = _gpu_sampler() if device == "cuda" else _cpu_sample
    repeats = [_repeats(call, sample) for call in calls]
    seconds = [[] for _ in calls]
    for r in range(rounds):
        for i in itertools.chain(range(r % len(calls), len(calls)), range(r % len(calls))):
            seconds[i].append(sample(calls[i], repeats[i]))
    return seconds


def _repeats(call: Callable, sample: Callable) -> int:
    """Calls that make one sample; warms the call up."""
    sample(call, 3)
    return max(1, round(SAMPLE_SECONDS / sample(call, 1))) if sample is _cpu_sample else 1


def _cpu_sample(call: Callable, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _gpu_sampler() -> Callable[[Callable, int], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(call: Callable, repeats: int, flushes: int) -> float:
        for _ in range(flushes):
            flush.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    flush_seconds = seconds(flush.zero_, 20, flushes=1)
    flushes: dict[Callable, int] = {}

    def sample(call: Callable, repeats: int) -> float:
        if call not in flushes:
            call()  # compiles
            flushes[call] = math.ceil(_queue_seconds(call) / flush_seconds)
        return seconds(call, repeats, flushes[call])

    return sample


def _queue_seconds(call: Callable) -> float:
    """How long the GPU is to be busy before a call of this function."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    return max(QUEUE_SECONDS, 1.5 * host) if host < MOST_QUEUE_SECONDS else QUEUE_SECONDS


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return median(n / d for n, d in zip(numerator, denominator, strict=True))


def keep_freed_memory() -> None:
    """Lets glibc keep what it frees, up to 1 GiB, in blocks of up to 32 MiB.

    Otherwise it returns a large result's pages to the system whenever they lie at the end of the
    heap. The next call, of any implementation, then pays some thousand page faults.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD

"""The memory and time of a training run on a machine, and the words they are told in."""

import datetime
import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glmkern.model.computation import RECOMPUTE
from glmkern.model.config import ChatGLMConfig
from glmkern.model.packing import Row
from glmkern.plan.machines import GIB, OPTIMISER, Machine
from glmkern.plan.memory import (
    DTYPE_BYTES,
    GPU_WORK,
    base_bytes,
    mapped_bytes,
    prefix_bytes,
    saved_bytes,
    work_bytes,
)
from glmkern.plan.precision import Precision
from glmkern.plan.work import RowLength, linear_weights, step_flops
from glmkern.training.data.packs import labelled_tokens, token_budget
from glmkern.training.loop.steps import StepPlan
from glmkern.training.setup import Setup

SAMPLED_STEPS = 64
# A layer's calls, forward and backward, for a pack of any size.
SECONDS_PER_LAYER = 0.4e-3
LARGEST_PACK = 1 << 20
# More steps than timedelta can hold the time of may be asked for.
LONGEST_SHOWN = datetime.timedelta(days=365 * 100)
# Predictions may be that much too low (docs/plan.md).
MARGIN = 1.15


@dataclass(frozen=True)
class Job:
    """What a run computes, as far as its memory and time follow from it.

    Attributes:
        config: with quantization_bit as the linears are computed, pre_seq_len and
            prefix_projection.
        rows: the length of every row, or of one that stands for all.
        micro_batch, accumulation: rows, and micro-batches of an optimiser step in this process.
        budget: tokens of a pack; 0: a micro-batch is a pack.
        steps: optimiser steps of the run; 0: as many as its data file will give.
        output_layer_bit, offload_embedding: the flags of these names.
    """

    config: ChatGLMConfig
    precision: Precision
    rows: Sequence[RowLength] = field(repr=False)
    micro_batch: int
    accumulation: int
    budget: int
    recompute: str
    steps: int
    output_layer_bit: int = 0
    offload_embedding: bool = False

    @classmethod
    def of(
        cls, setup: Setup, precision: Precision, rows: Sequence[Row] | None, processes: int
    ) -> "Job":
        """The run of these flags; without rows, all are as long as the flags let them be."""
        model, data, training, _ = setup.arguments
        batch = training.per_device_train_batch_size
        accumulation = -(-training.gradient_accumulation_steps // processes)
        if rows is None:
            longest = RowLength(data.padded_length, data.max_target_length + 1)
            lengths, steps = [longest] * (batch * accumulation), max(training.max_steps, 0)
        else:
            lengths = [RowLength(len(row.input_ids), labelled_tokens(row)) for row in rows]
            steps = StepPlan.of(len(lengths), training).max_steps
        return cls(
            setup.tuned_config,
            precision,
            lengths,
            batch,
            accumulation,
            token_budget(training.tokens_per_pack),
            model.recompute,
            steps,
            model.output_layer_bit or 0,
            model.offload_embedding,
        )

    @property
    def longest_row(self) -> int:
        return max(row.tokens for row in self.rows)

    def worst_pack(self) -> RowLength:
        """The longest row alone, which is a pack of some step even if of no sampled one. Where a
        micro-batch is a pack, an upper bound: the order of rows may put the longest into one."""
        return _sum(heapq.nlargest(1 if self.budget else self.micro_batch, self.rows))

    def sampled_steps(self) -> list[list[RowLength]]:
        """The rows of some steps of an epoch; an epoch shorter than a step is one."""
        rows = list(self.rows)
        random.Random(0).shuffle(rows)
        count = min(self.micro_batch * self.accumulation, len(rows))
        starts = range(0, len(rows) - count + 1, count)[:SAMPLED_STEPS]
        return [rows[start : start + count] for start in starts]

    def packs(self, step: Sequence[RowLength]) -> list[RowLength]:
        """A step's rows as they are computed at once (training/data/packs.py), added up."""
        packs = [RowLength(0, 0)]
        for place, row in enumerate(step):
            full = (
                packs[-1].tokens + row.tokens > self.budget
                if self.budget
                else place % self.micro_batch == 0
            )
            if full and packs[-1].tokens:
                packs.append(RowLength(0, 0))
            packs[-1] = _sum([packs[-1], row])
        return packs


@dataclass(frozen=True)
class Prediction:
    """Peak memory by part, in bytes, and time a step, in seconds; none of it is measured."""

    job: Job
    machine: Machine
    largest_pack: RowLength
    memory: dict[str, int]
    reading: int  # bytes while a CPU reads the base
    tokens: float  # a step
    flops: float  # a step
    seconds: float  # a step

    @property
    def total(self) -> int:
        """Bytes at the peak, the process or context included."""
        return max(sum(self.memory.values()), self.reading)

    @property
    def compared(self) -> int:
        """Bytes at the peak as they are measured (progress.peak_memory): a GPU's allocator counts
        neither context nor libraries."""
        return self.total - (self.machine.overhead if self.machine.device == "cuda" else 0)

    @property
    def fits(self) -> bool:
        return not self.machine.memory or self.total <= self.machine.memory

    def summary(self) -> list[str]:
        """Lines for the start of a run."""
        lines = [
            f"predicted: {self.total / GIB:.2f} GiB at the peak, {self._time()}",
            f"predicted for {self.machine.name}, assuming {self.machine.assumption}",
        ]
        if not self.fits:
            lines.append(
                f"predicted to need more than the {self.machine.memory / GIB:.1f} GiB "
                f"there are: {self.cure()}"
            )
        return lines

    def table(self) -> list[str]:
        """Lines of all that is predicted, for `glmkern plan`."""
        parts = dict(self.memory)
        if self.total == self.reading:
            parts["while the base is read"] = self.reading
        machine, width = self.machine, max(map(len, parts))
        verdict = "it fits" if self.fits else f"it does not fit: {self.cure()}"
        limit = f" of {machine.memory / GIB:.1f}; {verdict}" if machine.memory else ""
        lines = [
            f"on {machine.name}",
            "predicted memory at the peak, GiB:",
            *(f"  {name:<{width}}  {size / GIB:6.2f}" for name, size in parts.items()),
            f"  {'peak':<{width}}  {self.total / GIB:6.2f}{limit}",
            f"  while {self.largest_pack.tokens:,} tokens are computed at once, "
            f"{self.largest_pack.labelled:,} of them labelled",
            f"predicted time, assuming {machine.assumption}:",
            f"  {self._time()}",
            f"  a step has {self.tokens:,.0f} tokens and {self.flops / 1e12:.3g} TFLOP",
            "predicted for every --recompute:",
            *map(self._with_recompute, RECOMPUTE),
        ]
        return lines + [machine.note] if machine.note else lines

    def cure(self) -> str:
        """The least change of the flags that is predicted to fit."""
        job, row = self.job, self.job.longest_row
        later = RECOMPUTE[RECOMPUTE.index(job.recompute) + 1 :]
        changes: list[tuple[str, dict[str, Any]]] = [
            *((f"--recompute {each}", {"recompute": each}) for each in later),
            (f"--recompute layer --tokens_per_pack {row}", {"recompute": "layer", "budget": row}),
        ]
        if not job.config.quantization_bit:
            four = {"config": replace(job.config, quantization_bit=4)}
            changes += [
                (f"--quantization_bit 4 {flags}".strip(), {**change, **four})
                for flags, change in [("", {}), *changes]
            ]
        for flags, change in changes:
            if predict(replace(job, **change), self.machine).fits:
                return f"pass {flags}"
        return "lower --max_source_length and --max_target_length, or take a larger machine"

    def _time(self) -> str:
        if not self.job.steps:
            return f"{as_seconds(self.seconds)} a step"
        run = as_duration(self.seconds * self.job.steps)
        return f"{as_seconds(self.seconds)} a step, {run} for {self.job.steps:,} steps"

    def _with_recompute(self, recompute: str) -> str:
        """A line of what another --recompute would need, and the largest pack that fits then."""
        other, row = replace(self.job, recompute=recompute), self.job.longest_row
        predicted = predict(other, self.machine)
        line = (
            f"  {recompute:<5}  {predicted.total / GIB:6.2f} GiB, "
            f"{as_seconds(predicted.seconds)} a step"
        )
        if not self.machine.memory:
            return line
        tokens = tokens_that_fit(other, self.machine)
        if tokens < row:
            return f"{line}; not one row of {row:,} tokens fits"
        at_least = "at least " if tokens == LARGEST_PACK else ""
        return (
            f"{line}; {at_least}{tokens:,} tokens fit at once, {tokens // row:,} rows of the "
            f"longest, {row:,} tokens"
        )


def as_seconds(seconds: float) -> str:
    """Three digits, or all before the point."""
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def as_duration(seconds: float) -> str:
    """Days, hours, minutes and seconds."""
    if seconds > LONGEST_SHOWN.total_seconds():
        return f"more than {LONGEST_SHOWN.days // 365} years"
    return str(datetime.timedelta(seconds=round(seconds)))


def fitted(job: Job, machine: Machine) -> Job:
    """The job with the tokens a pack of `--tokens_per_pack auto`: halved until the run is predicted
    to fit with a margin, or a pack is as small as the longest row. Halved, so that a machine with a
    little more or less memory free gives the same packs."""
    while (
        job.budget > job.longest_row
        and machine.memory
        and MARGIN * predict(job, machine).total > machine.memory
    ):
        job = replace(job, budget=max(job.budget // 2, job.longest_row))
    return job


def predict(job: Job, machine: Machine) -> Prediction:
    """The run's peak memory and its time a step on this machine."""
    steps = job.sampled_steps()
    packs = [job.packs(step) for step in steps]
    largest = max(job.worst_pack(), *(pack for step in packs for pack in step))
    tokens, flops, seconds = 0.0, 0.0, 0.0
    for rows, computed in zip(steps, packs, strict=True):
        step = step_flops(job.config, rows, job.config.pre_seq_len, job.recompute, len(computed))
        read = 2 * len(computed) * linear_weights(job.config) * _bytes_a_weight(job)
        calls = len(computed) * job.config.num_layers * SECONDS_PER_LAYER
        tokens += sum(row.tokens for row in rows) / len(steps)
        flops += step / len(steps)
        seconds += max(step / machine.flops, read / machine.bandwidth, calls) / len(steps)
    memory = memory_parts(job, machine, largest)
    return Prediction(
        job, machine, largest, memory, reading_bytes(job, machine), tokens, flops, seconds
    )


def memory_parts(job: Job, machine: Machine, pack: RowLength) -> dict[str, int]:
    """Bytes by part while `pack` is computed."""
    config, dtype, on_gpu = job.config, job.precision.activations, machine.device == "cuda"
    work = work_bytes(config, pack, dtype, job.recompute) + (GPU_WORK if on_gpu else 0)
    return {
        "base weights": base_bytes(
            config, job.precision, job.output_layer_bit, on_gpu and job.offload_embedding
        ),
        "prefix, gradient, optimiser": prefix_bytes(config, config.pre_seq_len),
        "kept for the backward pass": saved_bytes(config, pack, dtype, job.recompute),
        "work space": work,
        "context and libraries" if on_gpu else "Python and torch": machine.overhead,
    }


def reading_bytes(job: Job, machine: Machine) -> int:
    """Bytes while a CPU reads the base, without optimiser yet; a GPU's allocator sees no file."""
    if machine.device != "cpu":
        return 0
    base = base_bytes(job.config, job.precision, job.output_layer_bit)
    return machine.overhead - OPTIMISER + base + mapped_bytes(job.config, job.precision)


def tokens_that_fit(job: Job, machine: Machine) -> int:
    """The most tokens that are predicted to fit, as they are in the rows; 0 where not one does."""
    share = sum(row.labelled for row in job.rows) / sum(row.tokens for row in job.rows)

    def fits(tokens: int) -> bool:
        pack = RowLength(tokens, round(tokens * share))
        training = sum(memory_parts(job, machine, pack).values())
        return max(training, reading_bytes(job, machine)) <= machine.memory

    low, high = 0, LARGEST_PACK
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _sum(rows: Iterable[RowLength]) -> RowLength:
    return RowLength(*map(sum, zip(*rows, strict=True)))


def _bytes_a_weight(job: Job) -> float:
    return (job.config.quantization_bit / 8) or DTYPE_BYTES[job.precision.weights]

"""Machines, jobs and rows to predict for."""

from dataclasses import replace

import torch

from glmkern.plan import machines
from glmkern.plan.machines import OPTIMISER, PROCESS, Machine
from glmkern.plan.precision import Precision
from glmkern.plan.prediction import Job
from glmkern.plan.work import RowLength
from glmkern.training.data.rows import Row


def machine(rate: float = 1e12, memory: float = 0, device: str = "cpu") -> Machine:
    """One that reaches `rate` on plain matrix products."""
    return Machine(
        "a machine",
        device,
        int(memory),
        PROCESS + OPTIMISER,
        rate * machines.CPU_SHARE_OF_PRODUCT,
        20e9,
        "nothing",
    )


SINGLE = Precision("float32", "float32")


def job(config, lengths, precision=SINGLE, **changes) -> Job:
    config = replace(config, pre_seq_len=config.pre_seq_len or 5)
    values = {
        "micro_batch": len(lengths),
        "accumulation": 1,
        "budget": 2048,
        "recompute": "none",
        "steps": 1,
        **changes,
    }
    return Job(config, precision, [RowLength(*each) for each in lengths], **values)


def random_rows(count: int, longest: int, vocabulary: int) -> list[Row]:
    made = []
    for _ in range(count):
        length = int(torch.randint(2, longest + 1, ()))
        ids = torch.randint(vocabulary, (length,)).tolist()
        learned = int(torch.randint(1, length, ()))
        made.append(Row(ids, [-100] * (len(ids) - learned) + ids[-learned:]))
    return made

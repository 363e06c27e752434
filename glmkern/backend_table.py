"""What `glmkern.backends()` shows: which backend serves each op on a device, or why not."""

from dataclasses import dataclass

import torch

import glmkern.ops  # noqa: F401 (registers the ops)
from glmkern import dispatch


@dataclass(frozen=True)
class BackendsTable:
    """What `glmkern.backends()` returns: `rows` maps (op, backend) to "chosen", "available" or
    the reason why not; printed as a table."""

    device: str
    rows: dict[tuple[str, str], str]

    def __str__(self) -> str:
        lines = [f"{'op':<28}{'backend':<11}on {self.device}"]
        lines += [f"{op:<28}{name:<11}{state}" for (op, name), state in self.rows.items()]
        return "\n".join(lines)


def backends(device: str | None = None) -> BackendsTable:
    """A table, op x backend: chosen, available, or why not, for calls on `device` ("cpu", "cuda";
    default: the GPU if torch sees one). Arguments can still rule a kernel out at a call."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda" and where.index is None and torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())
    rows: dict[tuple[str, str], str] = {}
    for op in dispatch.OPS.values():
        found = {name: dispatch.find_implementation(op, name, where) for name in dispatch.NAMES}
        reasons = {name: why for name, why in found.items() if isinstance(why, str)}
        chosen = next((name for name in dispatch.order(where) if name not in reasons), None)
        for name in dispatch.NAMES:
            rows[op.name, name] = "chosen" if name == chosen else reasons.get(name, "available")
    return BackendsTable(where.type, rows)

"""What a run has done so far, in the words and files of transformers 4.30.2."""

import datetime
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainerState:
    """trainer_state.json, key by key."""

    epoch: float = 0
    global_step: int = 0
    max_steps: int = 0
    num_train_epochs: int = 0
    total_flos: float = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None

    def log(self, logs: dict[str, float]) -> dict[str, float]:
        """Append to log_history, with the step; returns `logs` with the epoch, as it is printed."""
        logs = {**logs, "epoch": round(self.epoch, 2)}
        self.log_history.append({**logs, "step": self.global_step})
        return logs

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainerState":
        """From trainer_state.json; keys that other releases of transformers add are left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def metrics_table(metrics: dict[str, float], split: str = "train") -> list[str]:
    """The lines printed after a split is done: names to the left, values to the right."""
    shown = {name: _formatted(name, value) for name, value in sorted(metrics.items())}
    name_width = max(map(len, shown))
    value_width = max(map(len, shown.values()))
    lines = [f"  {name:<{name_width}} = {value:>{value_width}}" for name, value in shown.items()]
    return [f"***** {split} metrics *****", *lines]


def _formatted(name: str, value: float) -> str:
    if name.endswith("_runtime"):
        hundredths = int((value - int(value)) * 100)
        return f"{datetime.timedelta(seconds=int(value))}.{hundredths:02d}"
    return str(round(value, 4))

"""Keeping float16 gradients inside float16's range."""


class LossScale:
    """A power of two that multiplies the loss, and by which the prefix gradient is divided.

    Powers of two change no bit of a number that stays in range. The scale halves when a gradient
    overflows, and the same micro-batches are computed again; it doubles after `growth_interval`
    steps without overflow, as torch's GradScaler does.

    Attributes:
        value: the factor, at least 1.
        overflows: steps that were computed again, in all.
    """

    def __init__(self, value: float = 2.0**16, growth_interval: int = 2000):
        self.value = value
        self.growth_interval = growth_interval
        self.overflows = 0
        self._steps_since_change = 0

    def halve(self) -> bool:
        """After an overflow; False where the scale was 1, so that scaling cannot help."""
        if self.value == 1:
            return False
        self.value /= 2
        self.overflows += 1
        self._steps_since_change = 0
        return True

    def succeeded(self) -> None:
        """Count a step without overflow, and double the scale when it is time."""
        self._steps_since_change += 1
        if self._steps_since_change == self.growth_interval:
            self._steps_since_change = 0
            self.value *= 2

    def state_dict(self) -> dict[str, float]:
        """What scaler.pt holds, under the names of torch's GradScaler."""
        return {
            "scale": self.value,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._steps_since_change,
            "overflows": self.overflows,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` returned."""
        self.value, self.overflows = state["scale"], state["overflows"]
        self.growth_interval = state["growth_interval"]
        self._steps_since_change = state["_growth_tracker"]

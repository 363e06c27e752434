"""One seed for every random number generator of the process, and what the same bits need."""

import random
import sys

import torch


def set_seed(seed: int) -> None:
    """Seed Python, torch on every device and, where it is installed, NumPy."""
    random.seed(seed)
    torch.manual_seed(seed)
    if numpy := _numpy():
        numpy.random.seed(seed)


def rng_state() -> dict[str, object]:
    """The state of every generator, as rng_state.pth keeps it; readable without unpickling code."""
    state: dict[str, object] = {"python": random.getstate(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    if numpy := _numpy():
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


def set_rng_state(state: dict[str, object]) -> None:
    """Restore every generator that both `state` and this machine have."""
    random.setstate(state["python"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(state["cuda"])
    if "numpy" in state and (numpy := _numpy()):
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))


def use_deterministic_libraries() -> None:
    """Have the libraries below torch give the same bits on every run and thread count.

    `glmkern.environment.make_deterministic` does the part that must come before torch is loaded.
    """
    torch.use_deterministic_algorithms(True)
    # Every kernel writes all of its results: filling the memory before costs a second write.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _numpy():
    """NumPy if this process has it; torch imports it where it is installed."""
    return sys.modules.get("numpy")

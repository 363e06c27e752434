"""What the tests of generation share."""

from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM

from glmkern import ChatGLM
from glmkern.checkpoint import to_glm_state
from tests.model.models import SMALL, padded_batch


class Recorder:
    """A logits processor that keeps the scores it sees."""

    def __init__(self):
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores)
        return scores


def glm_twin(model: ChatGLM) -> GlmForCausalLM:
    """transformers' implementation with the weights of a model without a prefix."""
    values, state = to_glm_state(model.state_dict(), model.config)
    twin = GlmForCausalLM(GlmConfig(**values))
    twin.load_state_dict(state)
    return twin.eval()


def prompts(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask of random prompts, padded on the left."""
    batch = padded_batch(lengths, SMALL["padded_vocab_size"], "left")
    return batch["input_ids"], batch["attention_mask"]


def cut_after_end(sequences: Tensor, prompt: int, ends: list[int]) -> list[list[int]]:
    """Every row's ids after the prompt and before its first end token."""
    rows = []
    for row in sequences[:, prompt:].tolist():
        stops = [i for i, token in enumerate(row) if token in ends]
        rows.append(row[: stops[0]] if stops else row)
    return rows

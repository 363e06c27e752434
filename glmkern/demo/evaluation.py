"""How well a model answers held-out rows: the loss on their answers, and its own greedy answers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from glmkern.demo.rouge import rouge_l
from glmkern.model.chatglm import ChatGLM
from glmkern.model.packing import pack_rows
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.dataset import Example, build_evaluation_rows, build_training_rows


class Evaluation(NamedTuple):
    loss: float  # mean cross entropy of the answers' tokens, in nats
    rouge_l: float  # mean over rows, 0 to 1
    answers: list[str]

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, ROUGE-L of greedy answers {100 * self.rouge_l:.1f} "
            "(by character)"
        )


def evaluate(
    model: ChatGLM,
    tokenizer: ChatGLMTokenizer,
    examples: Sequence[Example],
    *,
    max_source_length: int,
    max_target_length: int,
) -> Evaluation:
    """Measures `model`, without dropout, on examples cut as in training."""
    model.eval()
    lengths = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    with torch.inference_mode():
        rows = build_training_rows(examples, tokenizer, **lengths).rows
        loss = model.loss(pack_rows(rows)).item()
        prompts = build_evaluation_rows(examples, tokenizer, **lengths)
        input_ids = torch.tensor(prompts.input_ids)
        output = model.generate(
            input_ids,
            torch.tensor(prompts.attention_mask),
            max_length=input_ids.shape[1] + max_target_length + 1,
            do_sample=False,
        )
    answers = [tokenizer.decode(row).strip() for row in output[:, input_ids.shape[1] :].tolist()]
    pairs = zip(answers, examples, strict=True)
    scores = [rouge_l(answer, example.response) for answer, example in pairs]
    return Evaluation(loss, sum(scores) / len(scores), answers)

"""How well a model answers held-out rows: the loss on their answers, and its own greedy answers."""

from collections.abc import Sequence
from typing import NamedTuple

from glmkern.chatglm import ChatGLM
from glmkern.demo.rouge import rouge_l
from glmkern.model.packing import pack_rows
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.examples import Example
from glmkern.training.data.rows import EvaluationData
from glmkern.training.evaluation.answers import Decoding, answer, decode
from glmkern.training.evaluation.evaluation import evaluation_mode


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
    lengths = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    data = EvaluationData.of(examples, tokenizer, **lengths)
    decoding = Decoding(max_length=sum(lengths.values()) + 1, batch_size=len(examples))
    with evaluation_mode(model):
        loss = model.loss(pack_rows(data.rows.rows)).item()
        answers = [
            decode(tokenizer, ids).strip()
            for batch in answer(model, data.prompts, decoding)
            for ids in batch
        ]
    scores = [
        rouge_l(text, example.response) for text, example in zip(answers, examples, strict=True)
    ]
    return Evaluation(loss, sum(scores) / len(scores), answers)

"""What is measured on the rows of a file: the loss, and the scores of generated answers."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from glmkern.chatglm import ChatGLM
from glmkern.errors import TrainingError
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.packs import Pack, pack_step, token_budget
from glmkern.training.data.rows import EvaluationData
from glmkern.training.evaluation.answers import Decoding, PredictionFile, answer, decode
from glmkern.training.evaluation.scores import Scores
from glmkern.training.flags.arguments import Arguments

# Bounds the rows that are tensors at one time, however many the file has.
BATCHES_PACKED_TOGETHER = 64


@dataclass(frozen=True)
class Evaluation:
    """Measures a model on the rows of a file, as often as it is called.

    Attributes:
        decoding: how prompts are answered; None: no answers, the loss alone.
        batch_size: rows over which the loss is a mean over tokens, before the mean over batches.
        token_budget: tokens that are computed at once; the loss does not depend on it.
    """

    model: ChatGLM
    tokenizer: ChatGLMTokenizer
    data: EvaluationData
    decoding: Decoding | None
    batch_size: int
    token_budget: int
    show_bar: bool = False

    @classmethod
    def of(
        cls, arguments: Arguments, model: ChatGLM, tokenizer: ChatGLMTokenizer, data: EvaluationData
    ) -> "Evaluation":
        """What --do_eval and --do_predict measure."""
        args = arguments.training
        return cls(
            model,
            tokenizer,
            data,
            decoding=Decoding.of(arguments, model.config) if arguments.generates else None,
            batch_size=args.per_device_eval_batch_size,
            token_budget=token_budget(args.tokens_per_pack),
            show_bar=not args.disable_tqdm,
        )

    def greedy(self) -> "Evaluation":
        """The same without draws: what --evaluation_strategy measures while training, as
        officially."""
        if self.decoding is None:
            return self
        return replace(self, decoding=replace(self.decoding, do_sample=False))

    def evaluate(self) -> dict[str, float]:
        """eval_loss, with answers also their scores, and the official eval_runtime etc.

        The scores come with the loss, which the official script leaves out beside them, so that
        checkpoints can be compared by either.
        """
        return self._with_speed("eval", lambda: {"loss": self.loss(), **self._scores("evaluate")})

    def predict(self, file: PredictionFile) -> dict[str, float]:
        """The official predict_ metrics: the scores of answers, which are streamed to `file`; with
        no answers the loss."""
        return self._with_speed(
            "predict",
            lambda: self._scores("predict", file) if self.decoding else {"loss": self.loss()},
        )

    def loss(self) -> float:
        """The mean over batches, weighted by their rows, of the mean over a batch's tokens.

        Raises TrainingError where it is not finite.
        """
        rows = self.data.rows.rows
        whole = len(rows) - len(rows) % self.batch_size
        batches = [range(i, i + self.batch_size) for i in range(0, whole, self.batch_size)]
        total = self.batch_size * self._loss_sum(batches)
        if whole < len(rows):
            total += (len(rows) - whole) * self._loss_sum([range(whole, len(rows))])
        return total / len(rows)

    def _loss_sum(self, batches: list[range]) -> float:
        """The sum over batches of each one's mean over its labelled tokens."""
        with evaluation_mode(self.model):
            return sum(
                self._loss(pack)
                for start in range(0, len(batches), BATCHES_PACKED_TOGETHER)
                for pack in pack_step(
                    self.data.rows.rows,
                    batches[start : start + BATCHES_PACKED_TOGETHER],
                    self.token_budget,
                )
            )

    def _loss(self, pack: Pack) -> float:
        names = [self.data.examples[index].index for index in pack.rows]
        where = f"rows {names[0]} to {names[-1]} of the evaluation"
        try:
            loss = self.model.loss(pack.batch).item()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"{where}: ran out of GPU memory; lower --tokens_per_pack (a pack "
                f"had {pack.tokens} tokens)"
            ) from error
        if not math.isfinite(loss):
            raise TrainingError(
                f"{where}: the loss is {loss}; check these rows and the weights of the base and of "
                "the prefix, or compute with --model_dtype bfloat16 or float32"
            )
        return loss

    def _scores(self, name: str, file: PredictionFile | None = None) -> dict[str, float]:
        """The mean scores of the answers; {} where none are asked for."""
        if self.decoding is None:
            return {}
        scores, references = Scores(), iter(self.data.prompts.labels)
        with (
            evaluation_mode(self.model),
            tqdm(
                total=len(self.data.prompts.labels),
                desc=name,
                unit="row",
                dynamic_ncols=True,
                disable=not self.show_bar,
                mininterval=0.1 if sys.stderr.isatty() else 10,
            ) as bar,
        ):
            for answers in answer(self.model, self.data.prompts, self.decoding):
                for ids in answers:
                    predict = decode(self.tokenizer, ids)
                    labels = decode(self.tokenizer, next(references))
                    scores.add(predict, labels)
                    if file is not None:
                        file.write(predict, labels)
                means = scores.means().items()
                bar.set_postfix_str(
                    ", ".join(f"{score} {mean:.2f}" for score, mean in means), refresh=False
                )
                bar.update(len(answers))
        if scores.empty:
            print(f"{scores.empty:,} of {scores.count:,} answers are empty and score 0")
        return scores.means()

    def _with_speed(self, split: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The metrics of `measure` and the official speed, their names behind the split's."""
        start = time.monotonic()
        metrics = measure()
        runtime = time.monotonic() - start
        count = len(self.data.examples)
        metrics["runtime"] = round(runtime, 4)
        metrics["samples_per_second"] = round(count / runtime, 3)
        metrics["steps_per_second"] = round(math.ceil(count / self.batch_size) / runtime, 3)
        return {f"{split}_{name}": value for name, value in metrics.items()}


@contextmanager
def evaluation_mode(model: ChatGLM) -> Iterator[None]:
    """No dropout and no gradients; the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)

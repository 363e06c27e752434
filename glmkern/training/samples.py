"""samples.md: the same few prompts, answered at every save."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from glmkern.checkpoint.atomic import write_text
from glmkern.model.chatglm import ChatGLM
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.arguments import Arguments
from glmkern.training.dataset import Example, build_evaluation_rows
from glmkern.training.evaluation import measuring
from glmkern.training.prediction import Decoding, answer, clean, decode

NAME = "samples.md"
_SECTION = re.compile(r"^## Step (\d+)$", re.MULTILINE)


class SampleWriter:
    """Answers fixed prompts greedily and appends them, under the step, to samples.md.

    Called after a save with the checkpoint's folder, beside which the file stands, and the step.
    The file of an earlier run is replaced at the first call; a run that was `resumed` keeps the
    sections of the steps before.
    """

    def __init__(self, model: ChatGLM, tokenizer: ChatGLMTokenizer, examples: Sequence[Example],
                 decoding: Decoding, *, max_source_length: int, source_prefix: str = "",
                 resumed: bool = False):
        self.model, self.tokenizer, self.examples = model, tokenizer, examples
        self.decoding = replace(decoding, batch_size=len(examples), num_beams=1, do_sample=False)
        # The references are shown as they are; how they would be cut does not matter.
        self.prompts = build_evaluation_rows(
            examples, tokenizer, max_source_length=max_source_length, max_target_length=3,
            source_prefix=source_prefix)
        self.resumed = resumed

    @classmethod
    def of(cls, arguments: Arguments, model: ChatGLM, tokenizer: ChatGLMTokenizer,
           examples: Sequence[Example], resumed: bool = False) -> "SampleWriter":
        """By the official flags, which limit the answers as those of a prediction."""
        return cls(model, tokenizer, examples, Decoding.of(arguments, model.config),
                   max_source_length=arguments.data.max_source_length,
                   source_prefix=arguments.data.source_prefix, resumed=resumed)

    def __call__(self, checkpoint: Path, step: int) -> None:
        path = checkpoint.parent / NAME
        write_text(path, self._earlier(path, step) + self._section(checkpoint.name, step))
        self.resumed = True

    def _earlier(self, path: Path, step: int) -> str:
        """What the file holds of this run's steps before `step`."""
        if not self.resumed or not path.is_file():
            return "# The same prompts at every save, answered greedily\n"
        text = path.read_text(encoding="utf-8", errors="replace")
        later = (found.start() for found in _SECTION.finditer(text) if int(found[1]) >= step)
        return text[: next(later, len(text))].rstrip("\n") + "\n"

    def _section(self, checkpoint: str, step: int) -> str:
        with measuring(self.model):
            answers = [ids for batch in answer(self.model, self.prompts, self.decoding)
                       for ids in batch]
        parts = [f"\n## Step {step}\n\n`{checkpoint}`\n"]
        for number, (example, ids) in enumerate(zip(self.examples, answers, strict=True), 1):
            parts.append(f"\n{number}. Prompt\n\n{_quoted(example.prompt)}"
                         f"\n   Reference\n\n{_quoted(example.response)}"
                         f"\n   Answer\n\n{_quoted(clean(decode(self.tokenizer, ids)))}")
        return "".join(parts)


def _quoted(text: str) -> str:
    """A block quotation inside a list item; line ends stay line ends."""
    return "".join(f"   > {line}  \n" for line in text.splitlines() or [""])

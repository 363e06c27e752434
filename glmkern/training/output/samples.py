"""samples.md: the same few prompts, answered at every save."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from glmkern.chatglm import ChatGLM
from glmkern.checkpoint import read_prefix
from glmkern.files.atomic import write_text
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.examples import Example
from glmkern.training.data.rows import build_evaluation_rows
from glmkern.training.evaluation.answers import Decoding, answer, clean, decode
from glmkern.training.evaluation.evaluation import evaluation_mode
from glmkern.training.flags.arguments import Arguments
from glmkern.training.output.run_folder import CHECKPOINT

NAME = "samples.md"
_SECTION = re.compile(r"^## Step (\d+)$", re.MULTILINE)


class SampleWriter:
    """Answers fixed prompts greedily and appends them, under the step, to samples.md.

    Called after a save with the checkpoint's folder and its step. The flags limit the answers as
    those of a prediction. The file of an earlier run is replaced at the first call, unless
    `resume_from` said that this run continues it.
    """

    def __init__(
        self,
        arguments: Arguments,
        model: ChatGLM,
        tokenizer: ChatGLMTokenizer,
        examples: Sequence[Example],
    ):
        self.path = Path(arguments.training.output_dir) / NAME
        self.model, self.tokenizer, self.examples = model, tokenizer, examples
        self.decoding = replace(
            Decoding.of(arguments, model.config),
            batch_size=len(examples),
            num_beams=1,
            do_sample=False,
        )
        # The references are shown as they are; how they would be cut does not matter.
        self.prompts = build_evaluation_rows(
            examples,
            tokenizer,
            max_source_length=arguments.data.max_source_length,
            max_target_length=3,
            source_prefix=arguments.data.source_prefix,
        )
        self._continues = False

    def resume_from(self, checkpoint: Path) -> None:
        """Keep the sections up to `checkpoint`, from which the run is resumed.

        A run that was killed between the save and the answers lacks the section of the checkpoint:
        it is added here. The model then holds the checkpoint's prefix, which training loads anyway.
        """
        self._continues = True
        step = checkpoint.name.removeprefix(CHECKPOINT)
        if step.isdecimal() and int(step) not in self._steps():
            self.model.prefix_encoder.load_state_dict(read_prefix(checkpoint))
            self(checkpoint, int(step))

    def __call__(self, checkpoint: Path, step: int) -> None:
        write_text(self.path, self._earlier(step) + self._section(checkpoint.name, step))
        self._continues = True

    def _text(self) -> str:
        if not self._continues or not self.path.is_file():
            return ""
        return self.path.read_text(encoding="utf-8", errors="replace")

    def _steps(self) -> list[int]:
        return [int(step) for step in _SECTION.findall(self._text())]

    def _earlier(self, step: int) -> str:
        """What the file holds of this run's steps before `step`."""
        text = self._text() or "# The same prompts at every save, answered greedily\n"
        later = (found.start() for found in _SECTION.finditer(text) if int(found[1]) >= step)
        return text[: next(later, len(text))].rstrip("\n") + "\n"

    def _section(self, checkpoint: str, step: int) -> str:
        with evaluation_mode(self.model):
            answers = [
                ids for batch in answer(self.model, self.prompts, self.decoding) for ids in batch
            ]
        parts = [f"\n## Step {step}\n\n`{checkpoint}`\n"]
        for number, (example, ids) in enumerate(zip(self.examples, answers, strict=True), 1):
            parts.append(
                f"\n{number}. Prompt\n\n{_quoted(example.prompt)}"
                f"\n   Reference\n\n{_quoted(example.response)}"
                f"\n   Answer\n\n{_quoted(clean(decode(self.tokenizer, ids)))}"
            )
        return "".join(parts)


def _quoted(text: str) -> str:
    """A block quotation inside a list item; line ends stay line ends."""
    return "".join(f"   > {line}  \n" for line in text.splitlines() or [""])

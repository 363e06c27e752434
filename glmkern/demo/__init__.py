"""`glmkern demo`: a prefix is tuned on a small ChatGLM2 that comes with the package.

The base was trained by `make_base.py` on the goods and voices of `grammar.py`; left to itself it
answers an attribute list in one plain voice. The sample's answers are advertisements in a mixture
of voices that the base never saw, signed by their shop: that is what the prefix learns.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = HERE / "base"
TRAIN_FILE = HERE / "sample" / "train.json"
HELD_OUT_FILE = HERE / "sample" / "dev.json"
PROMPT_COLUMN, RESPONSE_COLUMN = "content", "summary"

# The official flags of the tuning; those of the published train.sh for the real model follow.
DEMO = {
    "max_source_length": 96,
    "max_target_length": 128,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 300,
    "logging_steps": 20,
    "save_steps": 300,
    "learning_rate": "2e-2",
    "pre_seq_len": 16,
}
PUBLISHED = {
    "max_source_length": 64,
    "max_target_length": 128,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_steps": 3000,
    "logging_steps": 10,
    "save_steps": 1000,
    "learning_rate": "2e-2",
    "pre_seq_len": 128,
}
LEAST_LOSS_REDUCTION = 0.20


def run(argv: Sequence[str] | None = None) -> int:
    """Measures the base, tunes a prefix with the official flags, and measures again.

    Returns 0; the tuning's exit status where it failed; 1 where the held-out loss fell by less than
    20 % or the ROUGE-L of the answers did not rise.
    """
    started = time.perf_counter()
    output = _parse(argv).output_dir
    # Matrices this small gain nothing from a second thread, and lose much where cores are shared.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    # Imported after parsing, so that --help needs no torch.
    from glmkern.chatglm import ChatGLM
    from glmkern.demo.evaluation import evaluate
    from glmkern.tokenizer import ChatGLMTokenizer
    from glmkern.training.data.examples import read_examples

    tokenizer = ChatGLMTokenizer.from_pretrained(BASE)
    held_out = read_examples(HELD_OUT_FILE, PROMPT_COLUMN, RESPONSE_COLUMN)
    lengths = {name: DEMO[name] for name in ("max_source_length", "max_target_length")}

    _heading(f"The base alone, on {len(held_out)} rows it has never seen")
    before = evaluate(ChatGLM.from_pretrained(BASE), tokenizer, held_out, **lengths)
    print(before)

    _heading("A prefix is tuned with the official flags")
    arguments = tuning_arguments(BASE, TRAIN_FILE, output, DEMO)
    print(f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} {as_command(arguments)}", flush=True)
    tuning_started = time.perf_counter()
    status = subprocess.run([sys.executable, "-m", "glmkern", *arguments], check=False).returncode
    if status:
        return status
    tuning_seconds = time.perf_counter() - tuning_started

    _heading("The base with the prefix, on the same unseen rows")
    checkpoint = output / f"checkpoint-{DEMO['max_steps']}"
    tuned = ChatGLM.from_pretrained(BASE, prefix_checkpoint=checkpoint)
    after = evaluate(tuned, tokenizer, held_out, **lengths)
    print(after)
    print(f"\nprompt   {held_out[0].prompt}")
    print(f"before   {before.answers[0]}")
    print(f"after    {after.answers[0]}")
    print(f"wanted   {held_out[0].response}")

    reduction = 1 - after.loss / before.loss
    print(
        f"\nThe loss on the unseen rows went from {before.loss:.4f} to {after.loss:.4f} "
        f"({reduction:.0%} lower), ROUGE-L from {100 * before.rouge_l:.1f} to "
        f"{100 * after.rouge_l:.1f}; {tuning_seconds:.0f} s of tuning, "
        f"{time.perf_counter() - started:.0f} s in all. The prefix is in {checkpoint}."
    )
    if reduction < LEAST_LOSS_REDUCTION or after.rouge_l <= before.rouge_l:
        print(
            f"The demo failed: the loss has to fall by {LEAST_LOSS_REDUCTION:.0%} and ROUGE-L has "
            "to rise.",
            file=sys.stderr,
        )
        return 1

    _heading("The same on the real chatglm2-6b, with the settings of the published train.sh")
    arguments = tuning_arguments("THUDM/chatglm2-6b", "your_rows.json", "output/mine", PUBLISHED)
    print(as_command(arguments))
    print(
        "your_rows.json holds an object a line with the two columns; the model is a name in a local"
        "\ndownload cache, or a folder with its files."
    )
    return 0


def tuning_arguments(
    base: str | Path, train_file: str | Path, output: str | Path, settings: dict[str, int | str]
) -> list[str]:
    """The official arguments, behind `python -m glmkern`, that tune a prefix on `base`."""
    flags = {
        "train_file": train_file,
        "prompt_column": PROMPT_COLUMN,
        "response_column": RESPONSE_COLUMN,
        "model_name_or_path": base,
        "output_dir": output,
        **settings,
    }
    arguments = ["--do_train", "--overwrite_output_dir"]
    for name, value in flags.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def as_command(arguments: Sequence[str]) -> str:
    """A command line for a shell, a flag a line, with paths from here where that is shorter."""
    lines = ["python -m glmkern"]
    for word in arguments:
        if word.startswith("--"):
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {shlex.quote(_shorter(word))}"
    return " \\\n".join(lines)


def _shorter(word: str) -> str:
    return min(word, os.path.relpath(word), key=len) if os.path.isabs(word) else word


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="glmkern demo",
        description="Tune a prefix on the small base that comes with the package: about a minute.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("output", "demo"),
        help="folder of the checkpoint and the logs (default: %(default)s)",
    )
    return parser.parse_args(argv)


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)

"""`glmkern chat`: scripted lines, interrupts, prefixes, a pipe."""

import builtins
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glmkern import ChatGLM, ChatGLMConfig, ChatGLMTokenizer, cli
from glmkern.checkpoint import write_base, write_prefix
from glmkern.model.prefix import PrefixEncoder
from glmkern.verbs import chat as verb
from tests.generation.models import TALKATIVE, chat_model

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer(shared) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(shared / "data" / "tokenizer")


@pytest.fixture(scope="module")
def model() -> ChatGLM:
    return chat_model()


@pytest.fixture(scope="module")
def base(model, tokenizer, tmp_path_factory):
    """A base folder, and the folders of two prefixes in it."""
    folder = tmp_path_factory.mktemp("chat")
    weights = {k: v for k, v in model.state_dict().items() if "prefix" not in k}
    write_base(folder / "base", ChatGLMConfig.from_dict(TALKATIVE), weights)
    tokenizer.save(folder / "base")
    torch.manual_seed(5)
    for name, length in (("law", 3), ("ads", 6)):
        write_prefix(folder / name, PrefixEncoder(model.config, length).state_dict())
    return folder


class Spoken:
    """What a user types, line by line: a text, or an exception that is raised instead."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt):
        line = self.lines.pop(0)
        if isinstance(line, str):
            return line
        raise line


@pytest.fixture
def talk(model, tokenizer, monkeypatch, capsys):
    """Runs a conversation; returns it and what was printed after the banner."""

    def run(*lines, prefixes=(), tokenizer=tokenizer, **options):
        options = dict(max_length=250, do_sample=False) | options
        conversation = verb.Conversation(model, tokenizer, list(prefixes), options)
        monkeypatch.setattr(builtins, "input", Spoken(*lines))
        conversation.run()
        return conversation, capsys.readouterr().out.removeprefix(verb.BANNER + "\n")

    return run


def reply_to(model, tokenizer, query, history=()):
    return model.chat(tokenizer, query, history, max_length=250, do_sample=False)[0]


def test_rounds_clear_and_stop(talk, model, tokenizer):
    first = reply_to(model, tokenizer, "你好")
    conversation, printed = talk("你好", "  ", "clear", "你好", "stop", "never read")
    assert printed == f"\nChatGLM：{first}\n已清空 cleared\n\nChatGLM：{first}\n"
    assert conversation.history == [("你好", first)]
    conversation, printed = talk("你好", "再见", EOFError())
    assert [said for said, _ in conversation.history] == ["你好", "再见"]
    *_, (second, _, _) = model.stream_chat(
        tokenizer,
        "再见",
        conversation.history[:1],
        past_of(model, tokenizer, "你好"),
        return_past_key_values=True,
        max_length=250,
        do_sample=False,
    )
    assert conversation.history[1][1] == second and second in printed


def past_of(model, tokenizer, query):
    *_, (_, _, past) = model.stream_chat(
        tokenizer, query, max_length=250, do_sample=False, return_past_key_values=True
    )
    return past


def test_interrupts(talk, model, tokenizer):
    """Ctrl-C within a reply keeps what was printed and goes on; at the prompt it leaves."""

    class Interrupting(ChatGLMTokenizer):
        calls = 0

        def decode(self, ids):
            self.calls += 1
            if self.calls == 4:
                signal.raise_signal(signal.SIGINT)
            return super().decode(ids)

    breaking = Interrupting(tokenizer._model)
    conversation, printed = talk("你好", "再见", KeyboardInterrupt(), tokenizer=breaking)
    whole = reply_to(model, tokenizer, "你好")
    (query, part), (_, second) = conversation.history
    assert query == "你好" and part and whole.startswith(part) and len(part) < len(whole)
    assert second == reply_to(model, tokenizer, "再见", [("你好", part)])
    assert printed == f"\nChatGLM：{part} …\n\nChatGLM：{second}\n\n"


def test_what_is_no_text_and_what_has_no_room(talk):
    conversation, printed = talk("a\udcff", "1" * 400, "stop")
    assert printed.startswith(verb.NOT_TEXT + "\n")
    assert "leave no room for a reply within 250" in printed
    assert conversation.history == [] and conversation.past is None


def test_switching_prefixes(talk, model, tokenizer, base):
    model.load_prefix(base / "law", "law")
    try:
        conversation, printed = talk(
            "/prefix",
            "你好",
            "/prefix law",
            "再见",
            "/prefix none",
            "/prefix tax",
            "stop",
            prefixes=["default", "law"],
        )
        model.use_prefix("law")
        second = reply_to(model, tokenizer, "再见", conversation.history[:1])
    finally:
        model.use_prefix("default")
    first = reply_to(model, tokenizer, "你好")
    assert conversation.history == [("你好", first), ("再见", second)]
    assert printed == (
        f"{verb.PREFIXES}\n[default] law none\n\nChatGLM：{first}\ndefault [law] none\n"
        f"\nChatGLM：{second}\ndefault law [none]\n"
        "there is no prefix 'tax'; loaded: default, law\n"
    )


def test_the_command_reads_a_pipe(base, model, tokenizer):
    command = [
        sys.executable,
        "-m",
        "glmkern",
        "chat",
        "--model_name_or_path",
        str(base / "base"),
        "--prefix",
        f"law={base / 'law'}",
        "--prefix",
        f"ads={base / 'ads'}",
        "--greedy",
        "--max_length",
        "250",
        "--pre_seq_len",
        "3",
    ]
    spoken = "你好\n".encode() + b"\xff\xfe\n" + "/prefix ads\n你好\n".encode()
    done = subprocess.run(command, input=spoken, capture_output=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode()
    model.load_prefix(base / "law", "law")
    model.load_prefix(base / "ads", "ads")
    try:
        model.use_prefix("law")
        first = reply_to(model, tokenizer, "你好")
        model.use_prefix("ads")
        second = reply_to(model, tokenizer, "你好", [("你好", first)])
    finally:
        model.use_prefix("default")
    assert printed.startswith(verb.BANNER)
    for expected in (first, verb.NOT_TEXT, "law [ads] none", second):
        assert expected in printed
        printed = printed[printed.index(expected) + len(expected) :]


def test_the_command_begins_with_ptuning_checkpoint(base, monkeypatch, capsys):
    monkeypatch.setattr(builtins, "input", Spoken("/prefix", "stop"))
    common = ["chat", "--model_name_or_path", str(base / "base")]
    assert (
        cli.main(
            [
                *common,
                "--prefix",
                f"law={base / 'law'}",
                "--ptuning_checkpoint",
                str(base / "ads"),
                "--quantization_bit",
                "4",
            ]
        )
        == 0
    )
    assert "[default] law none" in capsys.readouterr().out
    monkeypatch.setattr(builtins, "input", Spoken("/prefix", EOFError()))
    assert cli.main(common) == 0
    assert capsys.readouterr().out == f"{verb.BANNER}\n[none]\n\n"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prefix", "law"], "--prefix takes NAME=DIR, not 'law'"),
        (["--prefix", "none=x"], "--prefix none=x: the name 'none' is taken"),
        (["--prefix", "a=x", "--prefix", "a=y"], "--prefix a=y: the name 'a' is taken"),
        (["--temperature", "0"], "temperature must be above 0"),
        (["--top_p", "1.5"], "top_p in (0, 1]"),
        (["--prefix", "a=/nowhere"], "there is no prefix checkpoint /nowhere"),
        (
            ["--prefix", "law={base}/law", "--pre_seq_len", "4"],
            "the prefix 'law' holds 3 virtual tokens, not 4",
        ),
    ],
)
def test_the_command_refuses(base, capsys, flags, sentence):
    flags = [flag.format(base=base) for flag in flags]
    assert cli.main(["chat", "--model_name_or_path", str(base / "base"), *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys; from glmkern.cli import main; main(['chat', '--help']); "
        "main(['chat', '--prefix']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=REPOSITORY)
    assert done.returncode == 0 and b"--top_p" in done.stdout

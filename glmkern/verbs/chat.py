"""`glmkern chat`: a conversation in the terminal."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glmkern.errors import InputError
from glmkern.training.flags.arguments import CUDA_GRAPHS
from glmkern.verbs import parse

if TYPE_CHECKING:
    from glmkern import ChatGLM, ChatGLMTokenizer

BANNER = """\
欢迎使用 ChatGLM 模型，输入内容即可进行对话，clear 清空对话历史，stop 终止程序
Type to talk; clear forgets the conversation, stop leaves, Ctrl-C stops a reply."""
PREFIXES = "/prefix lists the prefixes, /prefix NAME switches, /prefix none is the plain base."
NOT_TEXT = "输入不是 UTF-8 文本 This line is not UTF-8; set the terminal's encoding to UTF-8."
NONE = "none"


def run(argv: Sequence[str]) -> int:
    """Loads a base and its prefixes, and talks until stop, Ctrl-C or the end of the input."""
    parser = _parser()
    args = parse(parser, argv)
    if isinstance(args, int):
        return args
    prefixes = _prefixes(args)
    from glmkern import ChatGLM, ChatGLMTokenizer
    from glmkern.generation.sampling import Sampling

    try:
        Sampling(not args.greedy, args.top_p, temperature=args.temperature).check()
    except ValueError as error:
        raise InputError(str(error)) from None

    tokenizer = ChatGLMTokenizer.from_pretrained(args.model_name_or_path)
    model = ChatGLM.from_pretrained(
        args.model_name_or_path,
        quantization_bit=args.quantization_bit,
        output_layer_bit=args.output_layer_bit,
        offload_embedding=args.offload_embedding,
    ).eval()
    model.use_prefix(None)
    for name, path in prefixes.items():
        model.load_prefix(path, name)
    if prefixes:
        model.use_prefix(next(iter(prefixes)))
        _check_length(model, args.pre_seq_len)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        with contextlib.suppress(AttributeError):  # not every replacement of a stream has it
            stream.reconfigure(errors=errors)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() then edits and remembers lines)
    options = {
        "max_length": args.max_length,
        "do_sample": not args.greedy,
        "top_p": args.top_p,
        "temperature": args.temperature,
        "cuda_graphs": CUDA_GRAPHS[args.cuda_graphs],
    }
    Conversation(model, tokenizer, list(prefixes), options).run()
    return 0


class Conversation:
    """The rounds so far, and the cache that has read them, as long as it has."""

    def __init__(
        self,
        model: "ChatGLM",
        tokenizer: "ChatGLMTokenizer",
        prefixes: list[str],
        options: dict[str, Any],
    ):
        self.model, self.tokenizer, self.prefixes = model, tokenizer, prefixes
        self.options = options
        self.clear()

    def clear(self) -> None:
        """Forgets everything that was said."""
        self.history: list[tuple[str, str]] = []
        self.past = None

    def run(self) -> None:
        """Reads lines and answers them."""
        print(BANNER)
        if self.prefixes:
            print(PREFIXES)
        while True:
            try:
                query = input("\n用户：")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            word = query.strip()
            if word == "stop":
                return
            if word == "clear":
                self.clear()
                print("已清空 cleared")
            elif word.split(" ")[0] == "/prefix":
                self.switch(word.removeprefix("/prefix").strip())
            elif not _is_text(query):
                print(NOT_TEXT)
            elif word:
                self.reply(query)

    def switch(self, name: str) -> None:
        """Uses another prefix for what follows; the conversation goes on. Without a name, lists
        them."""
        if name:
            try:
                self.model.use_prefix(None if name == NONE else name)
            except InputError as error:
                print(error)
                return
            self.past = None
        print(
            " ".join(
                f"[{each}]" if each == (self.model.prefix_name or NONE) else each
                for each in (*self.prefixes, NONE)
            )
        )

    def reply(self, query: str) -> None:
        """Prints the reply as it grows. Ctrl-C stops it; the reply is then what was printed."""
        steps = self.model.stream_chat(
            self.tokenizer,
            query,
            self.history,
            past_key_values=self.past,
            return_past_key_values=True,
            **self.options,
        )
        self.past, printed = None, 0
        print("\nChatGLM：", end="", flush=True)
        try:
            for response, self.history, self.past in steps:
                print(response[printed:], end="", flush=True)
                printed = len(response)
        except KeyboardInterrupt:
            self.past = None  # it lacks the last token that was printed, and may be torn
            print(" …", end="")
        except ValueError as error:  # no room for a reply
            self.past = None
            print(error, end="")
        print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glmkern chat",
        description="Talk to a base, with one trained prefix or several to switch between.",
    )
    parser.add_argument(
        "--model_name_or_path", required=True, help="folder, or cached name, of the base"
    )
    parser.add_argument(
        "--ptuning_checkpoint", metavar="DIR", help="a trained prefix; its length is read from it"
    )
    parser.add_argument(
        "--prefix",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="a trained prefix under a name; as many as you like, the first one is in use",
    )
    parser.add_argument(
        "--pre_seq_len", type=int, help="only checked against the length of the prefix in use"
    )
    parser.add_argument(
        "--quantization_bit",
        type=int,
        choices=(4, 8),
        help="quantise the base's linears as it is read",
    )
    parser.add_argument(
        "--output_layer_bit", type=int, choices=(8,), help="quantise the output layer too"
    )
    parser.add_argument(
        "--offload_embedding", action="store_true", help="keep the embedding in host memory"
    )
    parser.add_argument(
        "--max_length",
        type=int,
        default=8192,
        help="most tokens of the whole conversation (default: %(default)s)",
    )
    parser.add_argument("--top_p", type=float, default=0.8, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="default: %(default)s")
    parser.add_argument(
        "--greedy", action="store_true", help="always the likeliest token, instead of drawing"
    )
    parser.add_argument(
        "--cuda_graphs",
        choices=CUDA_GRAPHS,
        default="auto",
        help="on a GPU replay a CUDA graph a token, or off, op by op (default: %(default)s)",
    )
    return parser


def _prefixes(args: argparse.Namespace) -> dict[str, str]:
    """Names and paths of the prefixes, the one to begin with first."""
    found = {"default": args.ptuning_checkpoint} if args.ptuning_checkpoint else {}
    for text in args.prefix:
        name, _, path = text.partition("=")
        if not name or not path:
            raise InputError(f"--prefix takes NAME=DIR, not {text!r}")
        if name in found or name == NONE:
            raise InputError(f"--prefix {text}: the name {name!r} is taken; choose another")
        found[name] = path
    return found


def _is_text(line: str) -> bool:
    """Whether a line has no bytes that were kept undecoded."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_length(model: "ChatGLM", pre_seq_len: int | None) -> None:
    length = model.config.pre_seq_len
    if pre_seq_len not in (None, length):
        raise InputError(
            f"the prefix {model.prefix_name!r} holds {length} virtual tokens, not "
            f"{pre_seq_len}; --pre_seq_len can be left out"
        )

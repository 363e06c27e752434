"""The tokenizer of ChatGLM2 and ChatGLM3, and their prompts.

Both families share one SentencePiece model. Special ids follow its pieces in a fixed order and are
never produced from text: "[gMASK]" typed by a user is ordinary text. The piece of unknown
characters (id 0) doubles as padding.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from glmkern.errors import InputError
from glmkern.files.atomic import replaced, write_text
from glmkern.files.folder import refuse_lfs_pointer, resolve_folder

SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
DEFAULT_CONFIG = {
    "name_or_path": "THUDM/chatglm2-6b",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}

History = Sequence[tuple[str, str]]
Messages = Sequence[Mapping[str, str]]


class ChatGLMTokenizer:
    """Text to ids and back.

    Attributes:
        vocab_size: ids in use; the model's matrices are padded to more rows.
        pad_token_id, eos_token_id: 0 and, in the published model, 2.
        special_tokens: name to id; five names for ChatGLM2, four role names more for ChatGLM3.
        prefix_tokens: the ids that start every prompt, [gMASK] and sop.
        stop_token_ids: the ids that end an answer: the end of text, and for ChatGLM3 also the roles
            that may speak next, <|user|> and <|observation|>.
    """

    def __init__(self, model: bytes, config: dict | None = None, name: str = "tokenizer.model"):
        """Takes the content of tokenizer.model and of tokenizer_config.json.

        Raises:
            InputError: `model` (`name` in the message) is not a SentencePiece model, or lacks a
                piece that is needed.
        """
        self.config = dict(DEFAULT_CONFIG if config is None else config)
        self._model = model
        self._pieces = _load_pieces(model, name)
        self._speaks_roles = _is_chatglm3(self.config)

        first = self._pieces.get_piece_size()
        names = SPECIAL_TOKENS + (ROLE_TOKENS if self._speaks_roles else ())
        self.special_tokens = {name: first + i for i, name in enumerate(names)}
        self.vocab_size = first + len(names)
        self.pad_token_id = self._pieces.unk_id()
        self.eos_token_id = self._pieces.eos_id()
        # One integer object an id for a whole corpus: 8 bytes a token in a list instead of 36.
        self._ids = list(range(self.vocab_size))
        self.prefix_tokens = [self.special_tokens["[gMASK]"], self.special_tokens["sop"]]
        next_speakers = (ROLE_TOKENS[1], ROLE_TOKENS[3]) if self._speaks_roles else ()
        self.stop_token_ids = [self.eos_token_id, *map(self.special_tokens.get, next_speakers)]

        # ChatGLM2 decodes its special ids to nothing, ChatGLM3 to their names.
        self._surface = dict.fromkeys(
            (self.pad_token_id, self._pieces.bos_id(), self.eos_token_id), ""
        )
        for special, token in self.special_tokens.items():
            self._surface[token] = special if self._speaks_roles else ""

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> "ChatGLMTokenizer":
        """Reads tokenizer.model and, where present, tokenizer_config.json.

        Args:
            path: a model folder, or a name such as THUDM/chatglm2-6b that is in a download cache.

        Raises:
            InputError: the folder or a file in it is missing or not what it should be.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            folder = resolve_folder(path)
        file = folder / "tokenizer.model"
        return cls(_read_model(file), _read_config(folder / "tokenizer_config.json"), str(file))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the three official tokenizer files into `folder`, which is made if missing."""
        folder = Path(folder)
        with replaced(folder / "tokenizer.model") as file:
            file.write_bytes(self._model)
        config = json.dumps(self.config, indent=2, ensure_ascii=False)
        write_text(folder / "tokenizer_config.json", config + "\n")
        write_text(folder / "special_tokens_map.json", "{}\n")

    def tokenize(self, text: str) -> list[str]:
        """The pieces of `text`, without special tokens."""
        return self._pieces.encode_as_pieces(_check_unicode(text))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, by default after [gMASK] and sop; an end of text is never added.

        Raises:
            ValueError: `text` has half a surrogate pair, which is no character.
        """
        ids = self._encode(text)
        return self.prefix_tokens + ids if add_special_tokens else ids

    def _encode(self, text: str) -> list[int]:
        return [self._ids[i] for i in self._pieces.encode_as_ids(_check_unicode(text))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; padding, beginning, end and negative ids are nothing.

        Raises:
            ValueError: an id is not below `vocab_size`.
        """
        # Joined as pieces, so that an id without text still separates the bytes around it.
        return self._pieces.decode_pieces([self._piece(int(token)) for token in ids])

    def _piece(self, token: int) -> str:
        if token < 0:
            return ""
        if token in self._surface:
            return self._surface[token]
        if token >= self.vocab_size:
            raise ValueError(
                f"token id {token} has no text, as ids end at {self.vocab_size - 1}; "
                f"use the tokenizer that belongs to the model"
            )
        return self._pieces.id_to_piece(token)

    def get_command(self, name: str) -> int:
        """The id of a special token, or of <bos>, <eos> or <pad>."""
        commands = {
            "<bos>": self._pieces.bos_id(),
            "<eos>": self.eos_token_id,
            "<pad>": self.pad_token_id,
            **self.special_tokens,
        }
        if name not in commands:
            raise ValueError(f"{name!r} is not a special token; there are {', '.join(commands)}")
        return commands[name]

    def build_prompt(self, query: str, history: History | None = None) -> str:
        """ChatGLM2's chat prompt: past rounds of (query, response), then the open round."""
        history = history or ()
        past = "".join(
            f"{_round(number, query)}{response}\n\n"
            for number, (query, response) in enumerate(history, 1)
        )
        return past + _round(len(history) + 1, query)

    def build_inputs(self, query: str, history: History | None = None) -> list[int]:
        """The ids of `build_prompt`."""
        return self.encode(self.build_prompt(query, history))

    def build_stream_inputs(self, query: str, history: History | None = None) -> list[int]:
        """The ids that continue a conversation whose past is in a KV cache already."""
        if not history:
            return self.build_inputs(query)
        ids = self.encode("\n\n" + _round(len(history) + 1, query), add_special_tokens=False)
        return ids[1:]  # without the space that SentencePiece puts before every text

    def build_chat_input(
        self, query: str, history: Messages | None = None, role: str = "user"
    ) -> list[int]:
        """The ids of ChatGLM3's chat prompt: past messages, then `query`, then <|assistant|>.

        Args:
            query: what `role` says now.
            history: past messages, each with "role", "content" and, for an assistant that calls a
                tool, "metadata", the tool's name.
            role: "user", or "observation" for the result of a tool.

        Raises:
            ValueError: a role is unknown, or the tokenizer is ChatGLM2's, which has none.
        """
        if not self._speaks_roles:
            raise ValueError(
                "ChatGLM2's tokenizer has no roles; use build_inputs, or a folder of chatglm3-6b"
            )
        messages = [*(history or ()), {"role": role, "content": query}]
        spoken = [token for message in messages for token in self._message(message)]
        return self.prefix_tokens + spoken + [self.special_tokens["<|assistant|>"]]

    def _message(self, message: Mapping[str, str]) -> list[int]:
        role, content = message.get("role"), message.get("content")
        name = f"<|{role}|>"
        if name not in ROLE_TOKENS:
            raise ValueError(
                f"there is no role {role!r}; there are system, user, assistant and observation"
            )
        if not isinstance(content, str):
            raise ValueError(f"the content of a message must be a text, not {content!r}")
        # Encoded apart, so that each of the two begins with SentencePiece's space.
        head = self._encode((message.get("metadata") or "") + "\n")
        return [self.special_tokens[name], *head, *self._encode(content)]

    def build_inputs_with_special_tokens(
        self, ids: list[int], pair: list[int] | None = None
    ) -> list[int]:
        """[gMASK], sop, `ids` and, where there is a pair, the pair and the end of text."""
        return self.prefix_tokens + ids + (pair + [self.eos_token_id] if pair is not None else [])

    def __call__(
        self,
        text: str | Iterable[str],
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
    ) -> dict[str, list]:
        """Tokenizes one text, or several to one length.

        Args:
            text: a text (the result holds flat lists) or texts (a list for each).
            padding: False, True for the longest text's length, "max_length" for `max_length`.
            truncation: cut each text's end to `max_length`, special tokens counted.
            pad_to_multiple_of: round the padded length up to a multiple of this.

        Returns:
            input_ids; attention_mask, 0 on padding; position_ids, counted from the first real
            token, 0 on padding. Padding is on the left.
        """
        if padding not in (False, True, "longest", "max_length"):
            raise ValueError(
                f"padding must be False, True, 'longest' or 'max_length', not {padding!r}"
            )
        if max_length is None and (truncation or padding == "max_length"):
            raise ValueError("max_length is needed to truncate, or to pad, to max_length")
        shortest = len(self.prefix_tokens) * add_special_tokens + 1
        if truncation and max_length < shortest:
            raise ValueError(
                f"max_length must be at least {shortest} to keep a token of the text, "
                f"not {max_length}"
            )

        single = isinstance(text, str)
        rows = [self.encode(each, add_special_tokens) for each in ([text] if single else text)]
        if truncation:
            rows = [row[:max_length] for row in rows]
        length = 0
        if padding:
            length = max_length if padding == "max_length" else max(map(len, rows), default=0)
            length += -length % (pad_to_multiple_of or 1)
        columns = self.pad(rows, length)
        return {name: column[0] for name, column in columns.items()} if single else columns

    def pad(self, rows: Sequence[list[int]], length: int | None = None) -> dict[str, list]:
        """Pads rows of ids on the left to `length` (default: the longest's).

        Returns the three columns of `__call__`; a row longer than `length` stays as it is.
        """
        if length is None:
            length = max(map(len, rows), default=0)
        columns = {"input_ids": [], "attention_mask": [], "position_ids": []}
        for row in rows:
            gap = max(length - len(row), 0)
            columns["input_ids"].append([self.pad_token_id] * gap + row)
            columns["attention_mask"].append([0] * gap + [1] * len(row))
            columns["position_ids"].append([0] * gap + list(range(len(row))))
        return columns


def _round(number: int, query: str) -> str:
    return f"[Round {number}]\n\n问：{query}\n\n答："


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start + 1} of the text is {text[error.start]!a}, half "
            f"of a surrogate pair; remove it or write the whole character"
        ) from None
    return text


def _load_pieces(model: bytes, name: str) -> SentencePieceProcessor:
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
    except RuntimeError:
        raise InputError(
            f"{name} is not a SentencePiece model, or is cut short; download it again"
        ) from None
    if pieces.piece_to_id("[gMASK]") != pieces.unk_id():
        raise InputError(
            f"{name} has [gMASK] among its pieces, as ChatGLM-6B (v1) has; use the "
            f"one of ChatGLM2 or ChatGLM3"
        )
    if pieces.eos_id() < 0:
        raise InputError(f"{name} has no end-of-sentence piece; train it with eos_id=2")
    return pieces


def _is_chatglm3(config: dict) -> bool:
    """The families differ in name_or_path; what transformers saves again may keep only the roles'
    names or the auto_map's repository."""
    text = json.dumps(config).lower()
    return "chatglm3" in text or ROLE_TOKENS[1] in text


def _read_model(path: Path) -> bytes:
    folder = path.parent
    if not path.is_file():
        if (folder / "ice_text.model").is_file():
            raise InputError(
                f"{folder} is a ChatGLM-6B (v1) folder (it has ice_text.model); use "
                f"one of ChatGLM2 or ChatGLM3"
            )
        raise InputError(f"{path} is missing; copy it there from the model's download page")
    refuse_lfs_pointer(path)
    return path.read_bytes()


def _read_config(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(
            f"{path} is not valid JSON ({error}); download it again, or remove it to "
            f"have ChatGLM2's"
        ) from None
    if not isinstance(config, dict):
        raise InputError(
            f"{path} holds {type(config).__name__}, not an object; download it again, "
            f"or remove it to have ChatGLM2's"
        )
    return config

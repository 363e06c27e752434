"""Conversations: chat and stream_chat, with the official arguments, in ChatGLM2's rounds or, where
the tokenizer has roles, in ChatGLM3's messages."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glmkern.generation.cache import KeyValueCache
from glmkern.generation.decoding import generate, stream_generate
from glmkern.generation.sampling import LogitsProcessor, replace_invalid_scores
from glmkern.model.model import ChatGLMModel
from glmkern.tokenizer import ChatGLMTokenizer

# ChatGLM2: rounds of (query, response). ChatGLM3: messages with "role", "content" and "metadata".
History = Sequence[tuple[str, str]] | Sequence[dict[str, str]]


def chat(
    model: ChatGLMModel,
    tokenizer: ChatGLMTokenizer,
    query: str,
    history: History | None = None,
    *,
    role: str = "user",
    max_length: int = 8192,
    num_beams: int = 1,
    do_sample: bool = True,
    top_p: float = 0.8,
    temperature: float = 0.8,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    **options: Any,
) -> tuple[str, list]:
    """The reply to `query`.

    Args:
        model, tokenizer: of one family.
        query: what is said now.
        history: what was said so far: (query, response) of every round. With ChatGLM3's tokenizer
            messages, each a dictionary of role and content. Where the assistant calls a tool, the
            message has the tool's name as metadata.
        role: ChatGLM3: who says `query`, "user" or, for a tool's result, "observation".
        max_length: most tokens of prompt and reply; at most config.seq_length acts.
        num_beams, do_sample, top_p, temperature, logits_processor, options: see generate(), whose
            top_k of 50 is in effect. A NaN or infinity among the scores makes token 5 certain, as
            officially, instead of an error.

    Returns:
        The reply, and the history with this round or these messages at its end.

    Raises:
        ValueError: an argument is out of range, or the conversation has no room for a reply.
    """
    dialogue = _dialogue(tokenizer, query, history, role)
    prompt = torch.tensor([dialogue.prompt()])
    ids = generate(
        model,
        prompt,
        max_length=_limit(model, prompt, max_length),
        num_beams=num_beams,
        do_sample=do_sample,
        top_p=top_p,
        temperature=temperature,
        logits_processor=[*(logits_processor or ()), replace_invalid_scores],
        **(dialogue.ends() | options),
    )
    return dialogue.answered(_text(tokenizer, prompt, ids, dialogue))


def stream_chat(
    model: ChatGLMModel,
    tokenizer: ChatGLMTokenizer,
    query: str,
    history: History | None = None,
    past_key_values: KeyValueCache | None = None,
    *,
    role: str = "user",
    max_length: int = 8192,
    do_sample: bool = True,
    top_p: float = 0.8,
    temperature: float = 0.8,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    return_past_key_values: bool = False,
    **options: Any,
) -> Iterator[tuple]:
    """The reply as it grows, one token after another.

    Args:
        past_key_values: what an earlier call returned for `history`: only what is new is read.
            None: the whole history is. It is extended in place. (Without it, the official code
            with return_past_key_values reads only the last round and loses the conversation.)
        max_length: as for chat(); what past_key_values holds counts too.
        return_past_key_values: also yield the cache. It holds this round once the generator has
            ended; one that was left early has lost its last token.

    Yields:
        (response, history), or (response, history, past_key_values), after every token; not while
        the response is empty or ends within a character.

    Raises:
        ValueError: as chat(); or past_key_values is of another model or prefix.
    """
    dialogue = _dialogue(tokenizer, query, history, role)
    cache = KeyValueCache(model) if past_key_values is None else past_key_values
    prompt = torch.tensor([dialogue.continuation() if cache.longest else dialogue.prompt()])
    steps = stream_generate(
        model,
        prompt,
        past_key_values=cache,
        max_length=_limit(model, prompt, max_length, cache.longest),
        do_sample=do_sample,
        top_p=top_p,
        temperature=temperature,
        logits_processor=[*(logits_processor or ()), replace_invalid_scores],
        **(dialogue.ends() | options),
    )
    for ids in steps:
        text = _text(tokenizer, prompt, ids, dialogue)
        if text and not text.endswith("\ufffd"):
            response, said = dialogue.answered(text)
            yield (response, said, cache) if return_past_key_values else (response, said)


def process_response(response: str) -> str:
    """What the official code makes of a reply's text: white space at its ends goes, and the date
    that the model was trained to leave open is filled in."""
    return response.strip().replace("[[训练时间]]", "2023年")


class _Rounds:
    """ChatGLM2's way to write a conversation."""

    def __init__(self, tokenizer: ChatGLMTokenizer, query: str, history: History | None):
        self.tokenizer, self.query, self.history = tokenizer, query, list(history or ())

    def prompt(self) -> list[int]:
        return self.tokenizer.build_inputs(self.query, self.history)

    def continuation(self) -> list[int]:
        """What follows on a history that the model has read."""
        return self.tokenizer.build_stream_inputs(self.query, self.history)

    def ends(self) -> dict[str, list[int]]:
        """The end tokens, where they are not the configuration's."""
        return {}

    def answered(self, text: str) -> tuple[str, list]:
        """The reply that `text` is, and the history with it."""
        response = process_response(text)
        return response, [*self.history, (self.query, response)]


class _Messages(_Rounds):
    """ChatGLM3's way."""

    def __init__(self, tokenizer: ChatGLMTokenizer, query: str, history: History | None, role: str):
        super().__init__(tokenizer, query, history)
        self.role = role

    def prompt(self) -> list[int]:
        return self.tokenizer.build_chat_input(self.query, self.history, self.role)

    def continuation(self) -> list[int]:
        # The official code repeats the tokens that begin a prompt in the middle of it.
        prompt = self.tokenizer.build_chat_input(self.query, None, self.role)
        return prompt[len(self.tokenizer.prefix_tokens) :]

    def ends(self) -> dict[str, list[int]]:
        return {"eos_token_id": self.tokenizer.stop_token_ids}

    def answered(self, text: str) -> tuple[str, list]:
        """The last message of `text`. A message's first line is its metadata."""
        messages = [*self.history, {"role": self.role, "content": self.query}]
        for message in text.split("<|assistant|>"):
            first, newline, rest = message.partition("\n")
            metadata, content = (first.strip(), rest) if newline else ("", message)
            content = content if metadata else process_response(content)
            messages.append({"role": "assistant", "metadata": metadata, "content": content})
        return content, messages


def _dialogue(
    tokenizer: ChatGLMTokenizer, query: str, history: History | None, role: str
) -> _Rounds:
    if "<|assistant|>" in tokenizer.special_tokens:
        return _Messages(tokenizer, query, history, role)
    return _Rounds(tokenizer, query, history)


def _limit(model: ChatGLMModel, prompt: Tensor, max_length: int, past: int = 0) -> int:
    """max_length for generate(), which does not count what the cache holds."""
    limit = min(max_length, model.config.seq_length) - past
    if limit <= prompt.shape[1]:
        raise ValueError(
            f"the conversation has {past + prompt.shape[1]} tokens, which leave no "
            f"room for a reply within {limit + past}; begin a new one, or raise "
            f"max_length (the model has {model.config.seq_length} positions)"
        )
    return limit


def _text(tokenizer: ChatGLMTokenizer, prompt: Tensor, ids: Tensor, dialogue: _Rounds) -> str:
    """What follows the prompt, without a role's end token, which has a text."""
    new = ids[0, prompt.shape[1] :].tolist()
    if new[-1] in dialogue.ends().get("eos_token_id", ()):
        del new[-1]
    return tokenizer.decode(new)

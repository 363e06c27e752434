"""Conversations: chat and stream_chat, with the official arguments and prompts."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from glmkern.generation import KeyValueCache, generate, stream_generate
from glmkern.generation.sampling import LogitsProcessor, replace_invalid_scores
from glmkern.model.chatglm import ChatGLM
from glmkern.tokenizer import ChatGLMTokenizer, History

Rounds = list[tuple[str, str]]


def chat(model: ChatGLM, tokenizer: ChatGLMTokenizer, query: str, history: History | None = None, *,
         max_length: int = 8192, num_beams: int = 1, do_sample: bool = True, top_p: float = 0.8,
         temperature: float = 0.8, logits_processor: Sequence[LogitsProcessor] | None = None,
         **options: Any) -> tuple[str, Rounds]:
    """The reply to `query`.

    Args:
        model, tokenizer: of one family.
        query: what the user says now.
        history: the rounds so far, (query, response) each.
        max_length: most tokens of prompt and reply; at most config.seq_length acts.
        num_beams, do_sample, top_p, temperature, logits_processor, options: see generate(), whose
            top_k of 50 is in effect. A NaN or infinity among the scores makes token 5 certain, as
            officially, instead of an error.

    Returns:
        The reply, and `history` with this round behind it.

    Raises:
        ValueError: an argument is out of range, or the conversation has no room for a reply.
    """
    prompt = torch.tensor([tokenizer.build_inputs(query, history)])
    ids = generate(
        model, prompt, max_length=_limit(model, prompt, max_length), num_beams=num_beams,
        do_sample=do_sample, top_p=top_p, temperature=temperature,
        logits_processor=[*(logits_processor or ()), replace_invalid_scores], **options)
    response = _text(tokenizer, prompt, ids)
    return response, [*(history or ()), (query, response)]


def stream_chat(model: ChatGLM, tokenizer: ChatGLMTokenizer, query: str,
                history: History | None = None, past_key_values: KeyValueCache | None = None, *,
                max_length: int = 8192, do_sample: bool = True, top_p: float = 0.8,
                temperature: float = 0.8,
                logits_processor: Sequence[LogitsProcessor] | None = None,
                return_past_key_values: bool = False, **options: Any) -> Iterator[tuple]:
    """The reply as it grows, one token after another.

    Args:
        past_key_values: what an earlier call returned for `history`: only the new round is read.
            None: the whole history is. (The official code then reads only the last round if
            return_past_key_values is set, which loses the conversation.) It is extended in place.
        max_length: as for chat(); what past_key_values holds counts too.
        return_past_key_values: also yield the cache. It holds the round once the generator has
            ended; one that was left early has lost its last token.

    Yields:
        (response, history), or (response, history, past_key_values), where the response has become
        longer; not while it is empty or ends within a character.

    Raises:
        ValueError: as chat(); or past_key_values is of another model or prefix.
    """
    cache = KeyValueCache(model) if past_key_values is None else past_key_values
    continues = cache.longest > 0
    build = tokenizer.build_stream_inputs if continues else tokenizer.build_inputs
    prompt = torch.tensor([build(query, history)])
    steps = stream_generate(
        model, prompt, past_key_values=cache,
        max_length=_limit(model, prompt, max_length, cache.longest),
        do_sample=do_sample, top_p=top_p, temperature=temperature,
        logits_processor=[*(logits_processor or ()), replace_invalid_scores], **options)
    for ids in steps:
        response = _text(tokenizer, prompt, ids)
        if response and not response.endswith("\ufffd"):
            rounds = [*(history or ()), (query, response)]
            yield (response, rounds, cache) if return_past_key_values else (response, rounds)


def process_response(response: str) -> str:
    """What the official code makes of a reply's text: white space at its ends goes, and the date
    that the model was trained to leave open is filled in."""
    return response.strip().replace("[[训练时间]]", "2023年")


def _limit(model: ChatGLM, prompt: torch.Tensor, max_length: int, past: int = 0) -> int:
    """max_length for generate(), which does not count what the cache holds."""
    limit = min(max_length, model.config.seq_length) - past
    if limit <= prompt.shape[1]:
        raise ValueError(f"the conversation has {past + prompt.shape[1]} tokens, which leave no "
                         f"room for a reply within {limit + past}; begin a new one, or raise "
                         f"max_length (the model has {model.config.seq_length} positions)")
    return limit


def _text(tokenizer: ChatGLMTokenizer, prompt: torch.Tensor, ids: torch.Tensor) -> str:
    return process_response(tokenizer.decode(ids[0, prompt.shape[1]:].tolist()))

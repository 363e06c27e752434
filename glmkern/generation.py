"""Autoregressive generation over a key-value cache that shares one copy of the prefix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glmkern import ops
from glmkern.model.chatglm import ChatGLM
from glmkern.model.layer import Layer, Pass
from glmkern.model.packing import unpad


class Cache:
    """Keys and values of the tokens so far, per layer [B, room, G, C], and how many a row has."""

    def __init__(self, model: ChatGLM, rows: int, room: int):
        config = model.config
        shape = (config.num_layers, rows, room, config.num_groups, config.kv_channels)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.lens = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.prefix = model.prefix()


@torch.no_grad()
def generate(model: ChatGLM, input_ids: Tensor, attention_mask: Tensor | None = None, *,
             max_length: int | None = None, max_new_tokens: int | None = None,
             do_sample: bool = False, top_p: float = 1.0, top_k: int = 50,
             temperature: float = 1.0, eos_token_id: int | Sequence[int] | None = None,
             pad_token_id: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Continues every row of a batch of prompts until an end token or the length limit.

    Args:
        model: with or without a prefix; dropout never acts here.
        input_ids: int64 [B, S], prompts padded on the left.
        attention_mask: [B, S], zero at padding; None: no padding.
        max_length: most tokens of a row, the padded prompt included; None: config.max_length. At
            most config.seq_length, the positions the model has.
        max_new_tokens: instead of max_length, most new tokens.
        do_sample: draw from the distribution instead of taking its maximum.
        top_p, top_k, temperature: the warpers, applied in the order temperature, top_k, top_p;
            only where do_sample. top_k 0 and top_p 1 leave the distribution whole.
        eos_token_id: a row ends behind it, or behind any of several; None: config.eos_token_id.
        pad_token_id: fills ended rows; None: config.pad_token_id, or 0.
        generator: where samples are drawn from; None: PyTorch's.

    Returns:
        int64 [B, S'], S <= S' <= max_length: the prompts and what follows them.

    Raises:
        ValueError: an argument is out of range, or a prompt leaves no room.
    """
    if max_new_tokens is not None:
        max_length = input_ids.shape[1] + max_new_tokens
    max_length = model.config.max_length if max_length is None else max_length
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    _check_options(model, input_ids, attention_mask, max_length, top_p, top_k, temperature,
                   do_sample)
    device = model.device
    position_ids = (attention_mask.bool().cumsum(1) - 1).clamp(min=0)
    batch, _ = unpad(input_ids, attention_mask, position_ids)
    model.check_inputs(batch.input_ids, batch.positions)
    batch, input_ids = batch.to(device), input_ids.to(device)
    ends = _end_tokens(model, eos_token_id, device)
    pad = next(x for x in (pad_token_id, model.config.pad_token_id, 0) if x is not None)

    rows, steps = len(input_ids), max_length - input_ids.shape[1]
    cache = Cache(model, rows, max_length)
    hidden = _advance(model, cache, batch.input_ids, batch.positions, batch.cu_seqlens.diff())
    last = hidden[batch.cu_seqlens[1:].long() - 1]  # [B, H]
    one_each = torch.ones(rows, dtype=torch.int64, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    produced = [input_ids]
    for step in range(steps):
        scores = model.transformer.output_layer.project(last).float()
        token = choose(scores, do_sample, top_p, top_k, temperature, generator)
        token = torch.where(done, pad, token)
        produced.append(token.unsqueeze(1))
        done |= torch.isin(token, ends)
        if step == steps - 1 or bool(done.all()):
            break
        last = _advance(model, cache, token, cache.lens.clone(), one_each)
    return torch.cat(produced, 1)


def choose(scores: Tensor, do_sample: bool, top_p: float, top_k: int, temperature: float,
           generator: torch.Generator | None = None) -> Tensor:
    """int64 [B], one token a row of scores [B, V]: the likeliest, or a draw after the warpers."""
    if not do_sample:
        return scores.argmax(-1)
    probabilities = warp(scores, top_p, top_k, temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def warp(scores: Tensor, top_p: float, top_k: int, temperature: float) -> Tensor:
    """Temperature, then the top_k largest, then the smallest set whose probability exceeds top_p
    (at least one token); the rest of scores [B, V] becomes -inf."""
    scores = scores / temperature
    if top_k > 0:
        smallest = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, float("-inf"))
    if top_p < 1:
        ascending, order = scores.sort(-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
    return scores


def _advance(model: ChatGLM, cache: Cache, input_ids: Tensor, positions: Tensor,
             counts: Tensor) -> Tensor:
    """Runs new tokens [T], `counts` int64 [B] of them a row laid end to end, and stores their keys
    and values. Returns their hidden states [T, H] behind the final norm."""
    counts = counts.long()
    widest = int(counts.max())
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    query = torch.arange(len(row), device=counts.device) - first[row]  # place among the new tokens
    slot = cache.lens[row] + query
    cache.lens += counts

    run = Pass(model.cos_sin, positions)

    def run_layer(layer: Layer, x: Tensor) -> Tensor:
        keys, values = cache.keys[layer.index], cache.values[layer.index]

        def attend(q, k, v):
            keys[row, slot], values[row, slot] = k, v
            padded = q.new_zeros(len(counts), widest, *q.shape[1:])
            padded[row, query] = q
            out = ops.prefix_attention_decode(padded, keys, values, cache.lens,
                                              *cache.prefix[layer.index], q_lens=counts)
            return out[row, query], None

        return layer.decode(x, run, attend)

    return model.encode(input_ids, run_layer)


def _end_tokens(model: ChatGLM, eos_token_id, device: torch.device) -> Tensor:
    ids = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _check_options(model: ChatGLM, input_ids: Tensor, attention_mask: Tensor, max_length: int,
                   top_p: float, top_k: int, temperature: float, do_sample: bool) -> None:
    if input_ids.dim() != 2 or input_ids.numel() == 0 or attention_mask.shape != input_ids.shape:
        raise ValueError("input_ids and attention_mask must be [B, S] and not empty, not "
                         f"{list(input_ids.shape)} and {list(attention_mask.shape)}")
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("a prompt ends in padding; pad prompts on the left")
    prompt, positions = input_ids.shape[1], model.config.seq_length
    if not prompt < max_length <= positions:
        raise ValueError(f"max_length {max_length} counts the prompt, which has {prompt} tokens, "
                         f"and the model has {positions} positions; choose a number between")
    if do_sample and (temperature <= 0 or not 0 < top_p <= 1 or top_k < 0):
        raise ValueError("temperature must be above 0, top_p in (0, 1] and top_k at least 0, not "
                         f"{temperature}, {top_p} and {top_k}")

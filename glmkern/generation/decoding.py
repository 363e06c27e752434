"""generate and stream_generate: their arguments, checked and completed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glmkern.dispatch import waits_for_values
from glmkern.generation.beams import BeamSearch
from glmkern.generation.cache import KeyValueCache
from glmkern.generation.decoder import Decoder, Prompts
from glmkern.generation.in_place import InPlaceDecoding
from glmkern.generation.sampling import STATIC_PROCESSORS, LogitsProcessor, Sampling
from glmkern.model.model import ChatGLMModel
from glmkern.model.packing import unpad
from glmkern.ops.checks import KERNEL_DTYPES

# The ops of a decoded token that may read values.
OF_A_STEP = ("qkv_rope_cache_fwd", "prefix_attention_decode_fwd")


def generate(
    model: ChatGLMModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    **options: Any,
) -> Tensor:
    """Continues every row of a batch of prompts until an end token or the length limit.

    A row's greedy text does not depend on the rows beside it. Rows that have ended cost nothing,
    unless there is a logits_processor, which sees them all.

    Args:
        model: with or without a prefix; dropout never acts here.
        input_ids: int64 [B, S], prompts padded on the left.
        attention_mask: [B, S], zero at padding; None: no padding.
        num_beams: more than 1 looks for a likelier text with so many beams, or with do_sample draws
            them; see beams.py.
        length_penalty: with beams, the power of the length that a text's logarithm of probability
            is divided by.
        max_length: most tokens of a row, the padded prompt included; None: config.max_length. At
            most config.seq_length, the positions the model has.
        max_new_tokens: instead of max_length, most new tokens.
        options: how tokens are chosen; see make_decoder.

    Returns:
        int64 [B, S'], S <= S' <= max_length: the prompts and what follows them.

    Raises:
        ValueError: an argument is out of range, or a prompt leaves no room.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, not {num_beams}")
    decoder = make_decoder(model, KeyValueCache(model), **options)
    max_length = _limit(model, input_ids, max_length, max_new_tokens)
    prompts = read_prompts(decoder.cache, input_ids, attention_mask, max_length)
    if num_beams > 1:
        return BeamSearch(decoder, num_beams, length_penalty).run(prompts, max_length).sequences
    if decoder.in_place:
        return InPlaceDecoding(decoder, prompts, max_length).finish()
    *_, sequences = decoder.run(prompts, max_length)
    return sequences


def stream_generate(
    model: ChatGLMModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    past_key_values: KeyValueCache | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """generate() one step after another, without beams.

    Args:
        input_ids, attention_mask, max_length, max_new_tokens, options: as for generate().
        past_key_values: what the model has read before, with as many rows and without padding in
            input_ids; an empty cache, or None, is a beginning. max_length does not count it. It
            then holds all but the last token of the last step that was yielded.

    Yields:
        int64 [B, S'], the ids so far, input_ids included; a tensor of its own every time.

    Raises:
        ValueError: as generate(); or past_key_values does not fit.
    """
    cache = KeyValueCache(model) if past_key_values is None else past_key_values
    if not cache.belongs_to(model):
        raise ValueError("past_key_values is of another model or prefix; begin with a new cache")
    decoder = make_decoder(model, cache, **options)
    if past_key_values is not None:
        decoder = replace(decoder, drops_rows=False)  # its rows stay those of the caller
    max_length = _limit(model, input_ids, max_length, max_new_tokens)
    prompts = read_prompts(cache, input_ids, attention_mask, max_length)
    steps = (
        InPlaceDecoding(decoder, prompts, max_length).steps()
        if decoder.in_place
        else decoder.run(prompts, max_length)
    )
    for sequences in steps:
        yield sequences.clone()


def make_decoder(
    model: ChatGLMModel,
    cache: KeyValueCache,
    *,
    do_sample: bool = False,
    top_p: float = 1.0,
    top_k: int = 50,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    cuda_graphs: bool | None = None,
) -> Decoder:
    """How tokens are chosen.

    Args:
        do_sample: draw from the distribution instead of taking its maximum.
        top_p, top_k, temperature: the warpers, applied in the order temperature, top_k, top_p;
            only where do_sample. top_k 0 and top_p 1 leave the distribution whole.
        repetition_penalty: of the tokens that a row already has, in input_ids or after them. It
            divides positive scores and multiplies negative ones; 1 does nothing. Padding is no
            token here (in transformers 4.30.2 it was).
        logits_processor: functions of (input_ids [B, S'], scores [B, V]) that return new scores,
            called before the warpers. With beams, B counts these and scores are logarithms of
            probabilities.
        eos_token_id: a row ends after it, or after any of several; None: config.eos_token_id.
        pad_token_id: fills ended rows; None: config.pad_token_id, or 0.
        generator: where samples are drawn from; None: PyTorch's. What a row draws does not depend
            on when others end.
        cuda_graphs: on a GPU, a step is one CUDA graph, replayed, and whether rows have ended is
            read a few steps late; on a CPU the same steps run without a graph. None: on a GPU,
            but where a step waits for the host: for a logits_processor, an embedding that is
            offloaded, or ops whose values are read. With beams it has no effect.

    Raises:
        ValueError: an option is out of range, or a logits_processor forbids cuda_graphs.
    """
    sampling = Sampling(do_sample, top_p, top_k, temperature, generator)
    sampling.check()
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty must be above 0, not {repetition_penalty}")
    ends = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = next(x for x in (pad_token_id, model.config.pad_token_id, 0) if x is not None)
    static = all(processor in STATIC_PROCESSORS for processor in logits_processor or ())
    if cuda_graphs and not static:
        raise ValueError(
            "cuda_graphs cannot be True beside a logits_processor of your own, which has to see "
            "every step; leave one of them out"
        )
    return Decoder(
        model,
        cache,
        sampling,
        repetition_penalty,
        logits_processor or (),
        ends,
        pad,
        drops_rows=not logits_processor,
        in_place=static and _suits_a_graph(model) if cuda_graphs is None else cuda_graphs,
    )


def _suits_a_graph(model: ChatGLMModel) -> bool:
    """Whether a step asks the GPU for nothing: an offloaded embedding has every token come to the
    host, and the reference reads lengths."""
    return (
        model.device.type == "cuda"
        and model.dtype in KERNEL_DTYPES
        and not model.offload_embedding
        and not any(waits_for_values(name, model.device) for name in OF_A_STEP)
    )


def _limit(
    model: ChatGLMModel, input_ids: Tensor, max_length: int | None, max_new_tokens: int | None
) -> int:
    if max_new_tokens is not None:
        return input_ids.shape[-1] + max_new_tokens
    return model.config.max_length if max_length is None else max_length


def read_prompts(
    cache: KeyValueCache, input_ids: Tensor, attention_mask: Tensor | None, max_length: int
) -> Prompts:
    """Checks prompts [B, S] and has the cache read them; the arguments are those of generate()."""
    model = cache.model
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if input_ids.dim() != 2 or input_ids.numel() == 0 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            "input_ids and attention_mask must be [B, S] and not empty, not "
            f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        )
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("a prompt ends in padding; pad prompts on the left")
    prompt, positions = input_ids.shape[1], model.config.seq_length - cache.longest
    if not prompt < max_length <= positions:
        raise ValueError(
            f"max_length {max_length} counts the prompt, which has {prompt} tokens, "
            f"and the model has {positions} positions; choose a number between"
        )
    real = attention_mask.bool()
    batch, _ = unpad(input_ids, attention_mask, (real.cumsum(1) - 1).clamp(min=0))
    model.check_inputs(batch.input_ids, batch.positions)
    starts = real.int().argmax(1).to(model.device)
    if cache.longest == 0:
        hidden = cache.read_prompts(batch.to(model.device))
        return Prompts(input_ids.to(model.device), starts, hidden)
    if not bool(real.all()) or len(input_ids) != len(cache.lens):
        raise ValueError(
            f"past_key_values has {len(cache.lens)} rows, so input_ids must have as "
            f"many, without padding, not {list(input_ids.shape)} with "
            f"{int((~real).sum())} masked"
        )
    input_ids = input_ids.to(model.device)
    return Prompts(input_ids, starts, cache.read(input_ids))

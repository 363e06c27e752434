"""An independent implementation that the model is compared with: diffusers' ChatGLMModel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from glmkern import ChatGLM


def diffusers_twin(model: ChatGLM) -> torch.nn.Module:
    """The official architecture as diffusers carries it, with the model's own weights."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig as TheirConfig
    from diffusers.pipelines.kolors.text_encoder import ChatGLMModel

    values = model.config.to_dict() | {"use_cache": False}
    for theirs_differ in ("model_type", "torch_dtype", "max_length"):
        del values[theirs_differ]
    if model.prefix_encoder is not None:
        values |= {
            "pre_seq_len": len(model.prefix_encoder.embedding.weight),
            "prefix_projection": model.prefix_encoder.trans is not None,
        }
    twin = ChatGLMModel(TheirConfig(**values), empty_init=False)
    state = {k.removeprefix("transformer."): v.float() for k, v in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing)
    return twin.eval()


def twin_forward(
    twin: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """(the official loss, logits [B, S, V])."""
    hidden = twin(
        input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        use_cache=False,
        output_hidden_states=False,
        return_dict=False,
    )[0]
    logits = twin.output_layer(hidden).transpose(0, 1)
    if labels is None:
        return None, logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()), logits


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max()).item()

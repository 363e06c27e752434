"""ChatGLM2 with a frozen base and a trained prefix, over packed tokens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from glmkern import ops
from glmkern.model.computation import Computation
from glmkern.model.config import ChatGLMConfig
from glmkern.model.layer import Layer, Pass, dropout_seeds
from glmkern.model.modules import FrozenLinear, FrozenNorm, frozen, kept_dtype
from glmkern.model.packing import IGNORE_INDEX, PackedBatch, move_together, unpad
from glmkern.model.prefix import PrefixEncoder
from glmkern.model.rotary import rotary_table

AnyModel = TypeVar("AnyModel", bound="ChatGLMModel")

_LAYERS = "transformer.encoder.layers"


class ModelOutput(NamedTuple):
    """loss: a scalar, or None without labels; logits: [B, S, V], zero where there was padding."""

    loss: Tensor | None
    logits: Tensor


class _Placed(NamedTuple):
    """A batch on the model's device; labelled: int64 [L], the places of its labelled tokens; seeds:
    int64 [SITES, layers, 2], those of its dropouts, None outside training."""

    batch: PackedBatch
    labelled: Tensor
    seeds: Tensor | None


class ChatGLMModel(nn.Module):
    """Weights, forward pass and loss.

    The state_dict has the official names, `transformer.…`; that of a quantised linear has `packed`
    and `scale` in place of the official `weight` and `weight_scale`.

    Attributes:
        config: ChatGLMConfig.
        transformer: the weights; all of them frozen but `transformer.prefix_encoder`.
        computation: Computation, the settings of `loss`; may be replaced between two calls.
    """

    def __init__(
        self,
        config: ChatGLMConfig,
        *,
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        rope_precision: str = "float32",
        offload_embedding: bool = False,
        computation: Computation | None = None,
    ):
        """Builds the modules without weights, which load_base fills."""
        super().__init__()
        # The copy checks the configuration together with the prefix.
        config = replace(config, pre_seq_len=pre_seq_len, prefix_projection=prefix_projection)
        self.config = config
        self.rope_precision = rope_precision
        self.offload_embedding = offload_embedding
        self.computation = computation or Computation()
        self.transformer = _Transformer(config)
        if pre_seq_len is not None:
            self.transformer.prefix_encoder = PrefixEncoder(config, pre_seq_len, prefix_projection)
        self.register_buffer("cos_sin", None, persistent=False)

    def load_base(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device | str,
        copy: bool = True,
    ) -> None:
        """Fills the frozen weights, one tensor at a time.

        Args:
            tensors: pairs of an official name and a tensor.
            dtype: of activations and weights; codes and scales keep their own.
            device: where the weights are put.
            copy: copy every tensor, so that none depends on the file it was mapped from. False:
                copy only those that are converted.
        """
        for name, tensor in tensors:
            path, _, leaf = name.rpartition(".")
            module = self.get_submodule(path)
            if isinstance(module, FrozenLinear):
                module.load_(leaf, tensor, dtype, device, copy)
                continue
            kept, place = dtype, device
            if not isinstance(module, FrozenNorm):
                kept = kept_dtype(tensor, dtype, device)
                place = "cpu" if self.offload_embedding else device
            setattr(module, leaf, frozen(tensor.to(place, kept, copy=copy).contiguous()))
        if self.prefix_encoder is not None:
            self.prefix_encoder.to(device)
        self.cos_sin = rotary_table(self.config, dtype, self.rope_precision, device)

    def quantize(self: AnyModel, bits: int) -> AnyModel:
        """Replaces the weights of every layer's four linears by codes of 4 or 8 bits.

        One linear at a time; the dense weights are dropped. Embedding, norms, output layer and
        prefix stay as they are.

        Returns:
            This model; its config.quantization_bit is `bits`.

        Raises:
            ValueError: bits is neither 4 nor 8, or the model is quantised already. Or a linear's
                input is odd for 4 bits, or a weight is not finite.
        """
        if bits not in (4, 8):
            raise ValueError(f"quantize: bits must be 4 or 8, not {bits}")
        layers = self.transformer.encoder.layers
        linears = {
            name: module
            for name, module in layers.named_modules(prefix=_LAYERS)
            if isinstance(module, FrozenLinear)
        }
        for name, linear in linears.items():
            if linear.weight is None:
                raise ValueError(
                    f"this model is quantised already, to {linear.bits} bits; load "
                    "the base again to quantise it differently"
                )
            if bits == 4 and linear.weight.shape[1] % 2:
                raise ValueError(
                    f"4 bits pack two columns in a byte, but {name} has "
                    f"{linear.weight.shape[1]} columns; use 8 bits"
                )
        for linear in linears.values():
            linear.quantize_(bits)
        self.config = replace(self.config, quantization_bit=bits)
        return self

    @property
    def prefix_encoder(self) -> PrefixEncoder | None:
        """The trained part, or None for the plain base."""
        return self.transformer.prefix_encoder

    @property
    def layers(self) -> Sequence[Layer]:
        """The transformer's blocks, the lowest first."""
        return cast("Sequence[Layer]", self.transformer.encoder.layers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, and of all weights but those that kept_dtype keeps in half."""
        return self.layers[0].input_layernorm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.layers[0].input_layernorm.weight.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """The official call on a padded batch; `loss` below is the lean one for training.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], zero at padding, left or right; None: no padding.
            position_ids: int64 [B, S]; None: 0 .. S-1 in every row.
            labels: int64 [B, S], not shifted, -100 for none; a label whose predecessor is padding
                has no context and is ignored.

        Returns:
            ModelOutput: the mean loss over labelled tokens, and logits [B, S, V]. In training mode
            dropout draws a new mask from PyTorch's generator at every call.

        Raises:
            ValueError: shapes, ids, positions or labels are out of range.
        """
        batch, places = unpad(input_ids, attention_mask, position_ids, labels)
        self._check_batch(batch, labels is not None)
        seed = int(torch.randint(2**62, ())) if self.training else 0
        with torch.autocast(self.device.type, enabled=False):
            placed = self._placed(batch, 0, seed)
            hidden = self._hidden(placed)
            output_layer, loss = self.transformer.output_layer, None
            if labels is not None:
                loss = ops.linear_cross_entropy(hidden, output_layer.matrix, placed.batch.labels)
            logits = output_layer.project(hidden)
            padded = logits.new_zeros(input_ids.numel(), logits.shape[1])
            padded = padded.index_copy(0, places.to(self.device), logits)
        return ModelOutput(loss, padded.view(*input_ids.shape, -1))

    def loss(self, batch: PackedBatch, dropout_offset: int = 0, seed: int = 0) -> Tensor:
        """The weighted loss of a packed batch; logits exist only for labelled tokens, in chunks.

        Args:
            batch: at least one token labelled.
            dropout_offset: step * num_layers; with the batch's sequence_ids and `seed` it fixes
                every dropout mask, however the sequences are packed.
            seed: the run's dropout seed.

        Returns:
            float32 scalar (float64 for a float64 model), differentiable in the prefix encoder's
            parameters. Dropout acts in training mode only.

        Raises:
            ValueError: ids, positions or labels are out of range, or nothing is labelled.
        """
        self._check_batch(batch, labelled=True)
        placed = self._placed(batch, dropout_offset, seed)
        labels, token_weight = placed.batch.labels, placed.batch.token_weight
        if token_weight is not None:
            token_weight = token_weight[placed.labelled]
        with torch.autocast(self.device.type, enabled=False):
            hidden = self._hidden(placed)
            return ops.linear_cross_entropy(
                hidden.index_select(0, placed.labelled),
                self.transformer.output_layer.matrix,
                labels[placed.labelled],
                token_weight=token_weight,
                ignore_index=None,
                label_smoothing=self.computation.label_smoothing,
            )

    def _placed(self, batch: PackedBatch, dropout_offset: int, seed: int) -> _Placed:
        """The batch and what follows from it on the model's device, token ids where the embedding
        is. All that the host has to know is decided here: a pass asks a GPU for nothing."""
        labelled = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        seeds = None
        if self.training:
            seeds = dropout_seeds(seed, dropout_offset, self.config.num_layers)
        moved: dict[str, Any] = move_together(
            vars(batch) | {"labelled": labelled, "seeds": seeds}, self.device
        )
        place = self.transformer.embedding.word_embeddings.weight.device
        if place != self.device:
            moved["input_ids"] = batch.input_ids.to(place)
        labelled, seeds = moved.pop("labelled"), moved.pop("seeds")
        return _Placed(PackedBatch(**moved), labelled, seeds)

    def _hidden(self, placed: _Placed) -> Tensor:
        """Hidden states [T, H] after the final norm, in training mode with dropout."""
        batch = placed.batch
        drops_prefix = self.training and self.prefix_encoder is not None
        run = Pass(
            self.cos_sin,
            batch.positions,
            batch.cu_seqlens,
            batch.sequence_ids,
            placed.seeds,
            recompute=self.computation.recompute,
            prefix_dropout=self.computation.prefix_dropout if drops_prefix else 0.0,
            hidden_dropout=self.config.hidden_dropout if self.training else 0.0,
        )
        prefix = self.prefix()
        return self.encode(batch.input_ids, lambda layer, x: layer(x, *prefix[layer.index], run))

    def encode(self, input_ids: Tensor, run_layer: Callable[[Layer, Tensor], Tensor]) -> Tensor:
        """Embeds tokens [T], takes them through `run_layer(layer, x)` for every layer, and
        normalises: [T, H]."""
        x = self.embed(input_ids)
        for layer in self.layers:
            x = run_layer(layer, x)
        norm = self.transformer.encoder.final_layernorm
        return x if norm is None else cast("Tensor", norm(x))

    def decode(self, input_ids: Tensor, attend: Callable[[Layer, Tensor], Tensor]) -> Tensor:
        """`encode` for inference: every layer attends by `attend(layer, qkv)`; see Layer.decode."""
        x = self.embed(input_ids)
        delta: Tensor | None = None
        for layer in self.layers:
            x, delta = layer.decode(x, delta, partial(attend, layer))
        assert delta is not None
        norm = self.transformer.encoder.final_layernorm
        return x + delta if norm is None else norm.add_and_normalize(delta, x)[0]

    def embed(self, input_ids: Tensor) -> Tensor:
        """[T] -> [T, H] on the model's device, wherever the embedding is."""
        embedding = self.transformer.embedding.word_embeddings
        x: Tensor = embedding(input_ids.to(embedding.weight.device))
        return x.to(self.device, self.dtype)

    def prefix(self) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        """Every layer's prefix keys and values, float32 [P, G, C], or None, None without one."""
        if self.prefix_encoder is None:
            return [(None, None)] * self.config.num_layers
        segments: list[tuple[Tensor, Tensor]] = self.prefix_encoder()
        if self.dtype == torch.float64:
            segments = [(k.double(), v.double()) for k, v in segments]
        return segments

    def check_inputs(self, input_ids: Tensor, positions: Tensor) -> None:
        """Raises ValueError for a token id or position outside the tables."""
        _check_range("token ids", input_ids, self.config.padded_vocab_size)
        _check_range("positions", positions, self.config.seq_length)

    def _check_batch(self, batch: PackedBatch, labelled: bool) -> None:
        """Raises ValueError for values out of range; costs a GPU nothing where the batch is still
        on the CPU, as packed batches are."""
        self.check_inputs(batch.input_ids, batch.positions)
        if labelled:
            labels = batch.labels[batch.labels != IGNORE_INDEX]
            if len(labels) == 0:
                raise ValueError(
                    f"no token carries a label (all are {IGNORE_INDEX}), so there is "
                    "no loss; leave such batches out"
                )
            _check_range("labels", labels, self.config.padded_vocab_size)


def _check_range(name: str, x: Tensor, end: int) -> None:
    low, high = x.aminmax()
    if low < 0 or high >= end:
        raise ValueError(
            f"{name} run from {int(low)} to {int(high)}, but this model has 0 to {end - 1}"
        )


class _Embedding(nn.Module):
    """The token embedding under its official name."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        # Not nn.Embedding(): its random start would import much of torch for a meta tensor.
        make: Callable[[Tensor], nn.Embedding] = nn.Embedding.from_pretrained
        self.word_embeddings = make(
            torch.empty(config.padded_vocab_size, config.hidden_size, device="meta")
        )


class _Encoder(nn.Module):
    """The blocks and the final norm under their official names."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.final_layernorm = FrozenNorm(config) if config.post_layer_norm else None


class _Transformer(nn.Module):
    """All weights under their official names."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.embedding = _Embedding(config)
        self.encoder = _Encoder(config)
        self.output_layer = FrozenLinear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.prefix_encoder: PrefixEncoder | None = None

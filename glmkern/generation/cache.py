"""The keys and values of the tokens so far, beside one copy of the prefix."""

import torch
from torch import Tensor

from glmkern.model.kernels import kernels
from glmkern.model.layer import Layer, Pass
from glmkern.model.model import ChatGLMModel
from glmkern.model.packing import PackedBatch

BLOCK = 64  # entries: a cache grows by whole blocks


class KeyValueCache:
    """What a batch of rows has read, without padding; `read_prompts` and `read` add to it.

    A pass that raises or is interrupted leaves it unusable.

    Attributes:
        lens: int64 [rows], tokens of each row; also the position of its next token.
        longest: no less than the largest of `lens`, known without asking the device.
    """

    @torch.inference_mode()
    def __init__(self, model: ChatGLMModel):
        """An empty cache under the model's current prefix."""
        self.model = model
        self.lens = torch.zeros(0, dtype=torch.int64, device=model.device)
        self.longest = 0
        self._encoder = model.prefix_encoder
        # Kernels would round the float32 prefix to the model's dtype at every step.
        self._prefix = [
            tuple(None if x is None else x.to(model.dtype) for x in segment)
            for segment in model.prefix()
        ]
        self._layers: list[Tensor] = []  # [2, rows, room, G, C], keys and values

    def belongs_to(self, model: ChatGLMModel) -> bool:
        """Whether it was filled by this model under the prefix that is in use."""
        return self.model is model and self._encoder is model.prefix_encoder

    @torch.inference_mode()
    def read_prompts(self, batch: PackedBatch) -> Tensor:
        """Fills an empty cache; returns the hidden state [B, H] of every row's last token."""
        lens = batch.cu_seqlens.diff().long()
        rows, longest = len(lens), int(lens.max())
        row = torch.arange(rows, device=lens.device).repeat_interleave(lens)
        place = torch.arange(len(row), device=lens.device) - batch.cu_seqlens[row]
        self._make_room(rows, longest)
        slots = row * self._room + place

        def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return kernels.prefix_attention_fwd(
                q,
                k,
                v,
                *self._prefix[layer.index],
                batch.cu_seqlens,
                batch.sequence_ids,
                None,
                layer.scale,
                0.0,
            )[0]

        hidden = self._run(batch.input_ids, batch.positions, slots, attend)
        self.lens, self.longest = lens, longest
        return hidden[batch.cu_seqlens[1:].long() - 1]

    @torch.inference_mode()
    def read(self, input_ids: Tensor) -> Tensor:
        """Appends tokens [rows, S] to every row; returns the last one's hidden state [rows, H]."""
        rows, new = input_ids.shape
        self._make_room(rows, self.longest + new)
        positions = (self.lens.unsqueeze(1) + torch.arange(new, device=self.lens.device)).flatten()
        first_slots = torch.arange(rows, device=self.lens.device) * self._room
        slots = first_slots.repeat_interleave(new) + positions
        lens, queries = self.lens + new, torch.full_like(self.lens, new)

        def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = kernels.prefix_attention_decode_fwd(
                q.unflatten(0, (rows, new)),
                *self._layers[layer.index],
                lens,
                *self._prefix[layer.index],
                queries,
                layer.scale,
            )
            return out.flatten(0, 1)

        hidden = self._run(input_ids.flatten(), positions, slots, attend)
        self.lens, self.longest = lens, self.longest + new
        return hidden.unflatten(0, (rows, new))[:, -1]

    @torch.inference_mode()
    def select(self, rows: Tensor) -> None:
        """Makes the cache that of its rows `rows`, int64, in that order, repeated or left out."""
        self.lens = self.lens[rows]
        for i, layer in enumerate(self._layers):  # one at a time: there is never a second copy
            self._layers[i] = layer.index_select(1, rows)

    @property
    def _room(self) -> int:
        return self._layers[0].shape[2]

    def _make_room(self, rows: int, entries: int) -> None:
        """Room for `entries` tokens a row. It grows by a quarter at least: all copies for one text
        then cost no more than a few copies of its final size."""
        if self._layers and entries <= self._room:
            return
        config = self.model.config
        room = -(-max(entries, self.longest * 5 // 4) // BLOCK) * BLOCK
        shape = (2, rows, room, config.num_groups, config.kv_channels)
        old, self._layers = self._layers, []
        for _ in range(config.num_layers):
            grown = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
            if old:
                grown[:, :, : self.longest] = old.pop(0)[:, :, : self.longest]
            self._layers.append(grown)

    def _run(self, input_ids: Tensor, positions: Tensor, slots: Tensor, attend) -> Tensor:
        """Takes new tokens [T] through the model; keys and values go to `slots` [T] of the rows
        laid end to end. Returns hidden states [T, H] after the final norm."""
        run = Pass(self.model.cos_sin, positions)

        def run_layer(layer: Layer, x: Tensor) -> Tensor:
            keys, values = self._layers[layer.index].flatten(1, 2)  # [rows * room, G, C]

            def store_and_attend(q, k, v):
                keys.index_copy_(0, slots, k)
                values.index_copy_(0, slots, v)
                return attend(layer, q, k, v), None

            return layer.decode(x, run, store_and_attend)

        return self.model.encode(input_ids, run_layer)

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
        self._first_slots = self.lens  # [rows], where each row's entries begin, all laid end to end

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
        self._grow(rows, longest)
        slots = self._first_slots[row] + place

        run = Pass(self.model.cos_sin, batch.positions)

        def attend(layer: Layer, qkv: Tensor) -> Tensor:
            q, k, v = layer.rotated(qkv, run)
            for entries, new in zip(self._entries(layer), (k, v), strict=True):
                entries.index_copy_(0, slots, new)
            out, _ = kernels.prefix_attention_fwd(
                q,
                k,
                v,
                *self._prefix[layer.index],
                batch.cu_seqlens,
                batch.sequence_ids,
                None,
                layer.scale,
                0.0,
            )
            return out

        hidden = self.model.decode(batch.input_ids, attend)
        self.lens, self.longest = lens, longest
        return hidden[batch.cu_seqlens[1:].long() - 1]

    @torch.inference_mode()
    def read(self, input_ids: Tensor) -> Tensor:
        """Appends tokens [rows, S] to every row; returns the last one's hidden state [rows, H]."""
        self.make_room(self.longest + input_ids.shape[1])
        hidden = self.append(input_ids)
        self.longest += input_ids.shape[1]
        return hidden

    @torch.inference_mode()
    def append(self, input_ids: Tensor) -> Tensor:
        """`read` without what the host has to do, to make room before and to count `longest`
        after: it changes the tensors of this cache in place, and a CUDA graph can hold it."""
        rows, new = input_ids.shape
        positions, first_slots = self.lens, self._first_slots
        if new > 1:
            positions = positions.unsqueeze(1) + torch.arange(new, device=positions.device)
            positions, first_slots = positions.flatten(), first_slots.repeat_interleave(new)
        slots = first_slots + positions
        lens, queries = self.lens + new, torch.full_like(self.lens, new)
        run = Pass(self.model.cos_sin, positions)

        def attend(layer: Layer, qkv: Tensor) -> Tensor:
            q = layer.rotated_into(*self._entries(layer), slots, qkv, run)
            out = kernels.prefix_attention_decode_fwd(
                q.unflatten(0, (rows, new)),
                *self._layers[layer.index],
                lens,
                *self._prefix[layer.index],
                queries,
                layer.scale,
            )
            return out.flatten(0, 1)

        hidden = self.model.decode(input_ids.flatten(), attend)
        self.lens.copy_(lens)
        return hidden.unflatten(0, (rows, new))[:, -1]

    @torch.inference_mode()
    def select(self, rows: Tensor) -> None:
        """Makes the cache that of its rows `rows`, int64, in that order, repeated or left out."""
        self.lens = self.lens[rows]
        for i, layer in enumerate(self._layers):  # one at a time: there is never a second copy
            self._layers[i] = layer.index_select(1, rows)
        if len(rows) != len(self._first_slots):
            self._lay_end_to_end(len(rows))

    @property
    def _room(self) -> int:
        return self._layers[0].shape[2]

    @torch.inference_mode()
    def make_room(self, entries: int, growth: int = 0) -> bool:
        """Room for `entries` tokens a row; whether that took new tensors. If so it grows by a
        quarter at least, or by `growth`: all copies for one text then cost no more than a few
        copies of its final size."""
        if self._layers and entries <= self._room:
            return False
        self._grow(len(self.lens), max(entries, self.longest + growth))
        return True

    def _grow(self, rows: int, entries: int) -> None:
        config = self.model.config
        room = -(-max(entries, self.longest * 5 // 4) // BLOCK) * BLOCK
        shape = (2, rows, room, config.num_groups, config.kv_channels)
        old, self._layers = self._layers, []
        for _ in range(config.num_layers):
            grown = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
            if old:
                grown[:, :, : self.longest] = old.pop(0)[:, :, : self.longest]
            self._layers.append(grown)
        self._lay_end_to_end(rows)

    def _lay_end_to_end(self, rows: int) -> None:
        self._first_slots = torch.arange(rows, device=self.lens.device) * self._room

    def _entries(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, each [rows * room, G, C]: the rows laid end to end."""
        keys, values = self._layers[layer.index].flatten(1, 2)
        return keys, values

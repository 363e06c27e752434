"""The public model: read from files, generating text, talking, and switching between prefixes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmkern.checkpoint import (
    check_bits,
    check_family,
    check_prefix,
    describe_prefix,
    quantize_stream,
    read_base,
    read_prefix,
)
from glmkern.errors import InputError
from glmkern.files.folder import resolve_folder
from glmkern.generation import KeyValueCache, generate, stream_generate
from glmkern.generation.chat import History, chat, stream_chat
from glmkern.model.computation import Computation
from glmkern.model.config import ChatGLMConfig
from glmkern.model.model import ChatGLMModel
from glmkern.model.prefix import PrefixEncoder
from glmkern.tokenizer import ChatGLMTokenizer

FIRST_PREFIX = "default"  # the name of the prefix that a model is built with


class ChatGLM(ChatGLMModel):
    """ChatGLM2 with a frozen base and trained prefixes, one of which is in use.

    Its prefixes are kept by name. The one in use is `transformer.prefix_encoder`; it alone is
    trained and is in the state_dict.
    """

    def __init__(self, config: ChatGLMConfig, **options: Any):
        """Builds the modules without weights; `options` are those of ChatGLMModel."""
        super().__init__(config, **options)
        # A plain dictionary, so that a prefix that is not in use is no part of the model's state.
        self._prefixes: dict[str, PrefixEncoder] = {}
        if self.prefix_encoder is not None:
            self._prefixes[FIRST_PREFIX] = self.prefix_encoder

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantization_bit: int | None = None,
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        prefix_checkpoint: str | Path | None = None,
        rope_precision: str = "float32",
        output_layer_bit: int | None = None,
        offload_embedding: bool = False,
        mapped: bool = False,
        computation: Computation | None = None,
    ) -> "ChatGLM":
        """Reads a model in the official or the native layout, tensor by tensor.

        Args:
            path: a local folder, or a name such as THUDM/chatglm2-6b that is in a local cache.
            device: where to put it; None: the GPU if torch sees one, else the CPU.
            dtype: of activations and weights; None: float32 on the CPU, else config.torch_dtype.
                On the CPU a float32 model keeps embedding, linears and output layer in half
                precision where they are stored so; the results are those of float32 copies.
            quantization_bit: 4 or 8 quantises the layers' linears as they are read, to the
                official codes and scales; None or 0: as the folder has them.
            pre_seq_len: prefix tokens, P; None: those of the trained prefix that config.pre_seq_len
                says the folder holds, or no prefix.
            prefix_projection: the prefix goes through a two-layer MLP.
            prefix_checkpoint: a trained prefix, file or folder, or a PEFT adapter of one.
            rope_precision: "float32", or "model" for the official rounding (see rotary.py).
            output_layer_bit: 8 quantises the output layer too, one scale a token of the
                vocabulary; None or 0: as the folder has it.
            offload_embedding: keep the embedding in host memory and send the GPU only the rows
                that a batch needs; on the CPU it is there anyway.
            mapped: on the CPU, weights that need no conversion stay mapped from their files: all
                processes of the machine share one copy. The files must not change while the model
                lives.
            computation: settings of the training loss; None: the defaults.

        Raises:
            InputError: the folder or the prefix is missing, broken or does not fit.
            ValueError: the configuration or an argument is not supported.
        """
        folder = resolve_folder(path)
        config = ChatGLMConfig.from_pretrained(folder)
        if quantization_bit:
            check_bits(folder, config, quantization_bit)
            config = replace(config, quantization_bit=quantization_bit)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else config.dtype
        config.check_dtype(dtype)
        if pre_seq_len is None and config.pre_seq_len is not None:
            pre_seq_len = config.pre_seq_len
            prefix_projection = prefix_projection or config.prefix_projection
            prefix_checkpoint = prefix_checkpoint or folder
        prefix_state = None
        if prefix_checkpoint is not None:
            prefix_state = read_prefix(prefix_checkpoint, config)
            check_family(prefix_checkpoint, config)
            if pre_seq_len is None:
                pre_seq_len = len(prefix_state["embedding.weight"])
            check_prefix(prefix_state, config, pre_seq_len, prefix_projection, prefix_checkpoint)
        model = cls(
            config,
            pre_seq_len=pre_seq_len,
            prefix_projection=prefix_projection,
            rope_precision=rope_precision,
            offload_embedding=offload_embedding,
            computation=computation,
        )
        if output_layer_bit not in (None, 0, 8):
            raise ValueError(f"output_layer_bit must be 8 or None, not {output_layer_bit}")
        tensors = quantize_stream(read_base(folder, config), quantization_bit, output_layer_bit)
        model.load_base(tensors, dtype, device, copy=not mapped)
        if prefix_state is not None and model.prefix_encoder is not None:
            model.prefix_encoder.load_state_dict(prefix_state)
        return model

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Continues a left-padded batch of prompts; see glmkern.generation.generate."""
        return generate(self, input_ids, attention_mask, **options)

    def stream_generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Iterator[Tensor]:
        """The ids so far after every step; see glmkern.generation.stream_generate."""
        return stream_generate(self, input_ids, attention_mask, **options)

    def chat(
        self,
        tokenizer: ChatGLMTokenizer,
        query: str,
        history: History | None = None,
        **options: Any,
    ) -> tuple[str, list[Any]]:
        """The reply to `query` and the history with this round; see generation/chat.py."""
        return chat(self, tokenizer, query, history, **options)

    def stream_chat(
        self,
        tokenizer: ChatGLMTokenizer,
        query: str,
        history: History | None = None,
        past_key_values: KeyValueCache | None = None,
        **options: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """chat() as the reply grows; see generation/chat.py."""
        return stream_chat(self, tokenizer, query, history, past_key_values, **options)

    @property
    def prefix_names(self) -> list[str]:
        """The prefixes that use_prefix takes; the one the model was built with is "default"."""
        return list(self._prefixes)

    @property
    def prefix_name(self) -> str | None:
        """The prefix in use, or None for the plain base."""
        in_use = self.prefix_encoder
        return next((name for name, each in self._prefixes.items() if each is in_use), None)

    def load_prefix(self, path: str | Path, name: str) -> None:
        """Reads one more trained prefix, of any length and format, and keeps it as `name` for
        use_prefix. One that already has this name is replaced, also where it is in use.

        Raises:
            InputError: the prefix is missing, broken, or of another base or family.
        """
        state = read_prefix(path, self.config)
        check_family(path, self.config)
        length, _, projection = describe_prefix(state)
        check_prefix(state, self.config, length, projection, path)
        encoder = PrefixEncoder(self.config, length, projection)
        encoder.load_state_dict(state)
        in_use = name == self.prefix_name
        self._prefixes[name] = encoder
        if in_use:
            self.use_prefix(name)

    def use_prefix(self, name: str | None) -> None:
        """Computes with the prefix `name` from now on; None: with the plain base. It alone is
        `transformer.prefix_encoder`, is trained, and is in the state_dict.

        Raises:
            InputError: no prefix has this name.
        """
        if name is not None and name not in self._prefixes:
            loaded = ", ".join(self._prefixes) or "none"
            raise InputError(f"there is no prefix {name!r}; loaded: {loaded}")
        encoder = None if name is None else self._prefixes[name].to(self.device)
        self.config = replace(
            self.config,
            pre_seq_len=None if encoder is None else len(encoder.embedding.weight),
            prefix_projection=encoder is not None and encoder.trans is not None,
        )
        self.transformer.prefix_encoder = encoder

"""What a run computes with, known before its rows and the weights of its base are read."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from glmkern.chatglm import ChatGLM
from glmkern.checkpoint import check_bits, describe_prefix, read_prefix
from glmkern.dispatch import capability
from glmkern.errors import InputError
from glmkern.files.folder import resolve_folder
from glmkern.model.computation import Computation
from glmkern.model.config import ChatGLMConfig
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.flags.arguments import AUTO, Arguments, ModelArguments, TrainingArguments


@dataclass(frozen=True)
class Setup:
    """Device, precision and base of a run.

    Attributes:
        device: of the computation.
        dtype: of the activations.
        base: the folder of the base.
        config: of the base, as the folder has it.
        arguments: complete: --pre_seq_len and --prefix_projection are those of the prefix.
    """

    device: torch.device
    dtype: torch.dtype
    base: Path
    config: ChatGLMConfig
    arguments: Arguments

    @property
    def tuned_config(self) -> ChatGLMConfig:
        """The configuration with the prefix, and the bits in which the linears are computed."""
        args = self.arguments.model
        return replace(
            self.config,
            pre_seq_len=args.pre_seq_len,
            prefix_projection=args.prefix_projection,
            quantization_bit=args.quantization_bit or self.config.quantization_bit,
        )

    def with_tokens_per_pack(self, tokens: str) -> "Setup":
        """The same with this --tokens_per_pack."""
        training = replace(self.arguments.training, tokens_per_pack=tokens)
        return replace(self, arguments=self.arguments._replace(training=training))

    def check_quantization(self) -> None:
        """Raise InputError where the base cannot be read with --quantization_bit."""
        if self.arguments.model.quantization_bit:
            check_bits(self.base, self.config, self.arguments.model.quantization_bit)

    def load_tokenizer(self) -> ChatGLMTokenizer:
        """The base's; InputError where it has ids that the base has no embedding for."""
        tokenizer = ChatGLMTokenizer.from_pretrained(self.base)
        if tokenizer.vocab_size > self.config.padded_vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but the base has only "
                f"{self.config.padded_vocab_size}; tokenizer.model and config.json are of "
                "different models"
            )
        return tokenizer

    def load_model(self, mapped: bool = False) -> ChatGLM:
        """The frozen base with its prefix, fresh or from --ptuning_checkpoint; `mapped`: see
        ChatGLM.from_pretrained."""
        args = self.arguments.model
        return ChatGLM.from_pretrained(
            self.base,
            device=self.device,
            dtype=self.dtype,
            quantization_bit=args.quantization_bit,
            pre_seq_len=args.pre_seq_len,
            prefix_projection=args.prefix_projection,
            prefix_checkpoint=args.ptuning_checkpoint,
            rope_precision=args.rope_precision,
            output_layer_bit=args.output_layer_bit,
            offload_embedding=args.offload_embedding,
            mapped=mapped,
            computation=Computation(
                prefix_dropout=args.prefix_dropout,
                recompute=args.recompute,
                label_smoothing=self.arguments.training.label_smoothing_factor,
            ),
        )


def prepare(arguments: Arguments, device: torch.device | None = None) -> Setup:
    """Look up what the flags name: device, precision, base and, with it, the prefix.

    Args:
        device: None: the one that the flags and this machine give.

    Raises InputError where there is no such base, prefix or precision.
    """
    device = device or choose_device(arguments.training)
    dtype = choose_dtype(arguments.model, arguments.training, device)
    base = resolve_folder(arguments.model.model_name_or_path)
    config = ChatGLMConfig.from_pretrained(base)
    return Setup(device, dtype, base, config, _with_prefix_flags(arguments, config))


def _with_prefix_flags(arguments: Arguments, config: ChatGLMConfig) -> Arguments:
    """--pre_seq_len and --prefix_projection as --ptuning_checkpoint has them, where the former is
    not given."""
    args = arguments.model
    if args.ptuning_checkpoint is None or args.pre_seq_len is not None:
        return arguments
    length, _, projection = describe_prefix(read_prefix(args.ptuning_checkpoint, config))
    return arguments._replace(model=replace(args, pre_seq_len=length, prefix_projection=projection))


def choose_device(args: TrainingArguments) -> torch.device:
    """The GPU of this process, or the CPU where there is none or --no_cuda is given."""
    if args.no_cuda or not torch.cuda.is_available():
        return torch.device("cpu")
    # The official script would spread over all visible GPUs; a process here computes on one.
    rank = int(os.environ.get("LOCAL_RANK", max(args.local_rank, 0)))
    return torch.device("cuda", rank)


def choose_dtype(
    model_args: ModelArguments, args: TrainingArguments, device: torch.device
) -> torch.dtype:
    """The precision of the base, from --model_dtype, --fp16, --bf16 and the device."""
    if args.fp16 and device.type == "cpu":
        raise InputError("--fp16 needs a GPU; leave it out for float32, or pass --bf16")
    name = "float16" if args.fp16 else "bfloat16" if args.bf16 else model_args.model_dtype
    if name == "bfloat16" and device.index is not None and capability(device) < (8, 0):
        major, minor = capability(device)  # of a plan for another machine's GPU there is no index
        raise InputError(
            f"bfloat16 needs a GPU of sm_80 or newer, and this one is sm_{major}{minor}: pass "
            "--fp16 instead of --bf16 or --model_dtype bfloat16"
        )
    if name == AUTO:
        name = "float32" if device.type == "cpu" else "float16"
    return getattr(torch, name)

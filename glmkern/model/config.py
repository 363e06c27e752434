"""The ChatGLM2 configuration, as the official config.json spells it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmkern.errors import InputError
from glmkern.files.atomic import write_text
from glmkern.files.folder import resolve_folder
from glmkern.model import glm_config

if TYPE_CHECKING:
    import torch

SIZES = (
    "num_layers",
    "padded_vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "kv_channels",
    "num_attention_heads",
    "seq_length",
    "multi_query_group_num",
)
FLAGS = (
    "rmsnorm",
    "apply_residual_connection_post_layernorm",
    "post_layer_norm",
    "add_bias_linear",
    "add_qkv_bias",
    "multi_query_attention",
    "fp32_residual_connection",
    "prefix_projection",
)
DTYPES = ("float16", "bfloat16", "float32", "float64")
FAMILIES = ("chatglm2-6b-32k", "chatglm2-6b", "chatglm3-6b", "codegeex2-6b")
UNKNOWN_FAMILY = "chatglm"


@dataclass
class ChatGLMConfig:
    """Every field the ChatGLM2 family reads or stores, with the official class defaults.

    chatglm2-6b's own config.json sets seq_length 32768, add_qkv_bias, multi_query_attention and
    multi_query_group_num 2 on top of them. Keys that are not fields (architectures, auto_map, ...)
    are kept in `extra` and written back by `to_dict`.

    Fields that shape the model or its arithmetic:
        num_layers: decoder blocks, L.
        padded_vocab_size: rows of the embedding and of the output layer.
        hidden_size: width of the residual stream, H.
        ffn_hidden_size: inner width of the MLP, F; its first matrix has 2F rows (SwiGLU).
        kv_channels: channels of a head, C; the query width N * C need not equal H.
        num_attention_heads: query heads, N.
        seq_length: positions of the RoPE table; a position id beyond it is an error, nothing else.
        hidden_dropout: dropout of the attention and MLP outputs before the residual add, training.
        layernorm_epsilon: epsilon of every norm.
        rmsnorm: RMSNorm (weight only); False is LayerNorm, whose biases are extra keys.
        apply_residual_connection_post_layernorm: the residual is the normalised block input.
        post_layer_norm: a final norm after the last block; False has no such weight.
        add_bias_linear: a bias on all four linears of a block.
        add_qkv_bias: a bias on query_key_value alone.
        multi_query_attention: keys and values in groups; False stores q, k, v head by head.
        multi_query_group_num: groups of keys and values, G; also sizes the prefix.
        fp32_residual_connection: embeddings cast to fp32; works with fp32 weights only.
        quantization_bit: 4 or 8 says that the folder's weights are already quantised; 0 is not.
        pre_seq_len: virtual tokens of the prefix, P; None is no prefix encoder.
        prefix_projection: the prefix goes through a two-layer tanh MLP.
        rope_ratio: the position is divided by it in the RoPE angle (chatglm2-6b-32k: 16).
        torch_dtype: dtype of the weights and of the official RoPE table; None is float32.
        eos_token_id: generation stops at this id, or at any of a list.
        pad_token_id: fills finished rows of a generated batch; loss masks go by position, never
            by this id, so the first releases' pad_token_id 2 = eos is harmless.
        max_length: tokens a generation may reach, prompt included, where none are asked for.

    Fields without effect, kept because published files carry them:
        attention_dropout: the official scaled_dot_product_attention path never applies it.
        classifier_dropout: belongs to the sequence classification head, which is not built.
        bias_dropout_fusion: stored by the official class, read nowhere.
        apply_query_key_layer_scaling: cancels out of q.k / sqrt(C); the official path ignores it.
        attention_softmax_in_fp32: likewise; kernels accumulate the softmax in fp32 or better.
        original_rope: stored in the official rotary module, read nowhere.
        interleaved_qkv: codegeex2-6b's file carries it; read nowhere.
        rotary_percent: likewise; half of each head is rotated whatever it says.
        use_cache: generation always caches keys and values, training never does.
        tie_word_embeddings: the official class defines no output embedding, so nothing is tied.
        vocab_size: a copy of padded_vocab_size, which alone sizes the weights.
        bos_token_id: prompts start with [gMASK] and sop instead.
        model_type: "chatglm", as the family's config.json says.

    Raises ValueError, with the values, for a combination that is not computed here.
    """

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 2048
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    bias_dropout_fusion: bool = True
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    fp32_residual_connection: bool = False
    quantization_bit: int = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    original_rope: bool = True
    rope_ratio: float = 1
    interleaved_qkv: bool = False
    rotary_percent: float = 0.5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    torch_dtype: str | None = None
    vocab_size: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    max_length: int = 20
    model_type: str = "chatglm"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vocab_size is None:
            self.vocab_size = self.padded_vocab_size
        if self.quantization_bit is None:
            self.quantization_bit = 0
        if self.torch_dtype is not None:
            self.torch_dtype = str(self.torch_dtype).removeprefix("torch.")
        self.validate()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> ChatGLMConfig:
        """The configuration of a local folder or of a cached name such as THUDM/chatglm2-6b.

        Raises InputError, naming the file, where it is missing, broken or not of this family.
        """
        path = resolve_folder(name_or_path) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InputError(
                f"{path} cannot be read as JSON ({error}); download it again"
            ) from error
        if not isinstance(values, dict):
            raise InputError(
                f"{path} holds a JSON {type(values).__name__}, not an object of fields"
            )
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChatGLMConfig:
        """From the object config.json holds; newer files spell torch_dtype as dtype.

        The native GlmForCausalLM's (model_type "glm") becomes the official one of the same model.
        """
        if values.get("model_type") == glm_config.MODEL_TYPE:
            return cls(**glm_config.official_values(values))
        values = dict(values)
        _refuse_other_families(values)
        if "dtype" in values:
            values.setdefault("torch_dtype", values.pop("dtype"))
        names = {f.name for f in fields(cls)} - {"extra"}
        extra = {key: value for key, value in values.items() if key not in names}
        return cls(**{key: values[key] for key in values.keys() & names}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Every field and every extra key, as config.json holds them."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {**self.extra, **known}

    def to_glm_dict(self) -> dict[str, Any]:
        """The configuration of the same model as a native GlmForCausalLM.

        Raises ValueError, naming the field, where GlmForCausalLM cannot express this one.
        """
        known = None if self.family == UNKNOWN_FAMILY else self.family
        base = self.extra.get(glm_config.NAME) or known
        return glm_config.native_values(self.to_dict(), base)

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write config.json into the folder, atomically; returns its path."""
        path = Path(folder) / "config.json"
        write_text(path, self.to_json())
        return path

    @property
    def family(self) -> str:
        """Which published base this is, one of FAMILIES, or UNKNOWN_FAMILY.

        All have the same shapes. The name the file carries (_name_or_path, or the repository in
        auto_map) decides, except that rope_ratio 16 is the 32K variant's alone; without a name,
        bfloat16 weights without a pad_token_id are codegeex2-6b's.
        """
        if self.rope_ratio == 16:
            return "chatglm2-6b-32k"
        for text in (self.extra.get("_name_or_path"), self.extra.get("auto_map")):
            named: list[str] = re.findall("|".join(FAMILIES), str(text).lower())
            if named:
                return named[-1]  # of a path such as chatglm2-6b/tuned/chatglm3-6b the innermost
        if (self.torch_dtype, self.pad_token_id, self.seq_length) == ("bfloat16", None, 8192):
            return "codegeex2-6b"
        return UNKNOWN_FAMILY

    @property
    def num_groups(self) -> int:
        """Groups of keys and values that attention works with, G."""
        return (
            self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads
        )

    @property
    def query_size(self) -> int:
        """Columns of all query heads, N * C."""
        return self.num_attention_heads * self.kv_channels

    @property
    def qkv_size(self) -> int:
        """Rows of query_key_value, (N + 2 * G) * C."""
        return self.query_size + 2 * self.num_groups * self.kv_channels

    @property
    def kv_size(self) -> int:
        """Columns of the prefix, L * 2 * G * C: a key and a value in each group of each layer."""
        return self.num_layers * 2 * self.multi_query_group_num * self.kv_channels

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that RoPE rotates, the first C / 2."""
        return self.kv_channels // 2

    @property
    def dtype(self) -> torch.dtype:
        """torch_dtype as torch's own object; float32 where the file names none."""
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_dtype or "float32")
        return dtype

    def check_dtype(self, dtype: torch.dtype | str) -> None:
        """Raise ValueError where weights of this dtype cannot run this configuration."""
        name = str(dtype).removeprefix("torch.")
        if self.fp32_residual_connection and name != "float32":
            raise ValueError(
                f"fp32_residual_connection is True, which makes every norm return float32, but the "
                f"weights are {name}; load the model with dtype float32"
            )

    def validate(self) -> None:
        """Raise ValueError, with the values, for a field or combination not computed here."""
        self._check_fields()
        heads, groups = self.num_attention_heads, self.multi_query_group_num
        _require(
            self.kv_channels % 4 == 0,
            f"kv_channels is {self.kv_channels}; RoPE rotates half of each head in pairs, so that "
            "it must be a multiple of 4",
        )
        _require(
            heads % self.num_groups == 0,
            f"num_attention_heads {heads} is not divisible by multi_query_group_num {groups}; "
            "every group serves the same number of heads",
        )
        _require(
            self.pre_seq_len is None or groups == self.num_groups,
            f"pre_seq_len is {self.pre_seq_len} with multi_query_attention False, but the prefix "
            f"is sized by multi_query_group_num {groups}; set that to num_attention_heads {heads} "
            "or leave the prefix out",
        )

    def _check_fields(self) -> None:
        _require(
            self.kv_channels is not None,
            "kv_channels is None, which the official code handles only in RoPE; set it to the head "
            "size, usually hidden_size // num_attention_heads = "
            f"{self.hidden_size} // {self.num_attention_heads}",
        )
        for name in SIZES if self.pre_seq_len is None else (*SIZES, "pre_seq_len"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and value > 0, f"{name} is {value!r}; it must be a positive integer")
        for name in FLAGS:
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} is {value!r}; it must be true or false")
        for name, in_range, rule in (
            ("hidden_dropout", lambda p: 0 <= p < 1, "a number in [0, 1)"),
            ("layernorm_epsilon", lambda eps: eps >= 0, "a number and not negative"),
            # Others of the family (chatglm3-6b-32k, GLM-4-9b) say rope_ratio and scale the base.
            ("rope_ratio", lambda ratio: ratio in (1, 16), "1, or 16 as in chatglm2-6b-32k"),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(number and in_range(value), f"{name} is {value!r}; it must be {rule}")
        for name, choices in (("quantization_bit", (0, 4, 8)), ("torch_dtype", (None, *DTYPES))):
            value = getattr(self, name)
            listed = ", ".join(str(choice) for choice in choices)
            _require(value in choices, f"{name} is {value!r}; it must be one of {listed}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _refuse_other_families(values: dict[str, Any]) -> None:
    for mark in ("position_encoding_2d", "inner_hidden_size"):
        if mark in values:
            raise ValueError(
                f"this is ChatGLM-6B, the first version ({mark} = {values[mark]}), another "
                "architecture that is not supported; use chatglm2-6b or chatglm3-6b"
            )
    model_type = values.get("model_type", "chatglm")
    if model_type != "chatglm":
        raise ValueError(
            f"model_type is {model_type!r}; supported is 'chatglm' of the ChatGLM2 family, such as "
            "chatglm2-6b, chatglm3-6b and codegeex2-6b, and 'glm', their native form"
        )

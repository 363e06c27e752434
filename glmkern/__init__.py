"""P-tuning v2 of ChatGLM2-6B with fused kernels. Submodules load on first use (PEP 562)."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ChatGLM": "glmkern.chatglm",
    "ChatGLMConfig": "glmkern.model.config",
    "ChatGLMTokenizer": "glmkern.tokenizer",
    "backend": "glmkern.dispatch",
    "backends": "glmkern.backend_table",
    "ops": "glmkern.ops",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glmkern' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if name == "ops" else getattr(module, name)
    globals()[name] = value
    return value

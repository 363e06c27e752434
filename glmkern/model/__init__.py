"""ChatGLM2: its configuration, its packed batches and the model itself."""

import importlib

_HOME = {
    "ChatGLM": "chatglm",
    "ChatGLMConfig": "config",
    "PackedBatch": "packing",
    "pack_rows": "packing",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    # Lazy, so that reading a configuration costs no import of torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

"""Reading and writing what the official code reads and writes, without running any of it."""

import importlib

_HOME = {
    "check_bits": "quantized",
    "check_family": "prefix",
    "check_prefix": "prefix",
    "dequantize_stream": "quantized",
    "describe_prefix": "prefix",
    "expected_shapes": "shapes",
    "export_glm": "export",
    "export_prefix": "export",
    "fold_prefix": "prefix",
    "from_glm_state": "native_glm",
    "prefix_family": "prefix",
    "quantize_folder": "quantized",
    "quantize_stream": "quantized",
    "read_adapter": "adapter",
    "read_base": "base",
    "read_prefix": "prefix",
    "to_glm_state": "native_glm",
    "write_adapter": "adapter",
    "write_base": "base_writer",
    "write_glm": "base_writer",
    "write_prefix": "prefix",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    # Lazy, so that resolving a folder or writing a text file costs no import of torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

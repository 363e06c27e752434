"""Reading and writing what the official code reads and writes, without running any of it."""

import importlib

_HOMES = {
    "check_bits": "glmkern.checkpoint.quantized",
    "check_family": "glmkern.checkpoint.prefix",
    "check_prefix": "glmkern.checkpoint.prefix",
    "dequantize_stream": "glmkern.checkpoint.quantized",
    "describe_prefix": "glmkern.checkpoint.prefix",
    "expected_shapes": "glmkern.checkpoint.shapes",
    "export_glm": "glmkern.checkpoint.export",
    "export_prefix": "glmkern.checkpoint.export",
    "fold_prefix": "glmkern.checkpoint.prefix",
    "from_glm_state": "glmkern.checkpoint.native_glm",
    "prefix_family": "glmkern.checkpoint.prefix",
    "quantize_folder": "glmkern.checkpoint.quantized",
    "quantize_stream": "glmkern.checkpoint.quantized",
    "read_adapter": "glmkern.checkpoint.adapter",
    "read_base": "glmkern.checkpoint.base",
    "read_prefix": "glmkern.checkpoint.prefix",
    "to_glm_state": "glmkern.checkpoint.native_glm",
    "write_adapter": "glmkern.checkpoint.adapter",
    "write_base": "glmkern.checkpoint.base_writer",
    "write_glm": "glmkern.checkpoint.base_writer",
    "write_prefix": "glmkern.checkpoint.prefix",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    # Lazy: a module that needs one name does not load all of them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""Training of encoders and segmenters: one file per method, one loop."""

import importlib

# Loaded when first used: the packages that train take seconds, and audits run without them.
_PUBLIC = {"METHODS": "registry", "Run": "run", "build": "registry", "derive_seed": "registry", "fit": "loop"}
_PUBLIC |= {"register": "registry"}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"mia_utils.pretrain.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'mia_utils.pretrain' has no attribute {name!r}")

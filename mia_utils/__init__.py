"""Membership inference on visual models: attacks, controls and protocol of four papers, behind nine notebooks."""

import importlib

__version__ = "2.0.0"

_PUBLIC = {  # what users import from the package itself, loaded when first used
    "encoders": "models.encoders", "segmenters": "models.segmenters", "views": "models.views",
    "defenses": "defenses", "splits": "protocol.splits", "metrics": "protocol.metrics",
}  # fmt: skip


def __getattr__(name: str):
    if name in _PUBLIC:
        return importlib.import_module(f"mia_utils.{_PUBLIC[name]}")
    raise AttributeError(f"module 'mia_utils' has no attribute {name!r}")

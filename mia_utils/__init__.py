"""Membership inference on visual models: attacks, controls and protocol of four papers, behind eight notebooks."""

import importlib

__version__ = "2.0.0"

# Names that users import from the package itself: `from mia_utils import splits, encoders`. Loaded when first used.
_PUBLIC = {
    "encoders": "models.encoders",
    "segmenters": "models.segmenters",
    "views": "models.views",
    "defenses": "defenses",
    "splits": "protocol.splits",
    "metrics": "protocol.metrics",
}


def __getattr__(name: str):
    if name in _PUBLIC:
        return importlib.import_module(f"mia_utils.{_PUBLIC[name]}")
    raise AttributeError(f"module 'mia_utils' has no attribute {name!r}")

"""Was this model trained on these images? An audit of any encoder or segmenter with two folders of images.

``mia-audit MODEL SUSPECTED REFERENCE``, or ``audit.run(model, suspected, reference)``. Reference images were surely not
used and are otherwise alike (source, period, camera, preparation). Where files, copies or pixels tell the two sets
apart, an attacker who never queries the model does as well (arXiv 2406.16201): then the audit is invalid.
"""

import importlib

# Loaded when first used: the command line answers --help and bad arguments before torch is imported.
_PUBLIC = {"run": "examine", "compare": "examine", "compare_segmenter": "examine", "Report": "record"}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"mia_utils.audit.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'mia_utils.audit' has no attribute {name!r}")

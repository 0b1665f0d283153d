"""Training of encoders and segmenters: one file per method, one loop."""

from mia_utils.pretrain.loop import fit
from mia_utils.pretrain.registry import METHODS, build, derive_seed, make_untrained, register
from mia_utils.pretrain.run import Run

__all__ = ["METHODS", "Run", "build", "derive_seed", "fit", "make_untrained", "register"]

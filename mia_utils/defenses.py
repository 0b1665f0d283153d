"""Defenses by their public names; the code is in ``models.outputs`` (outputs) and ``pretrain`` (private training)."""

from mia_utils.models.outputs import OUTPUTS, measure_scale, perturb
from mia_utils.pretrain.accounting import describe_privacy, measure_epsilon, plan_privacy

__all__ = ["OUTPUTS", "describe_privacy", "measure_epsilon", "measure_scale", "perturb", "plan_privacy"]

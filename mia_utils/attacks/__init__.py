"""Attacks on frozen models: a registry, and one ``evaluate`` that runs any of them with its three controls.

An attack is an ``extract`` (what the model outputs about each image) and one of ``score`` (a fixed rule) or ``fit`` (an
attacker trained on images whose membership is known; the shared network by default).
"""

from functools import partial

from mia_utils.attacks import encodermi, lpla, mim, network, partcrop, reference, segmentation
from mia_utils.attacks.evaluate import BLIND_RUNGS, CONTROLS, PROTOCOLS, evaluate, evaluate_blind, fingerprint
from mia_utils.attacks.registry import ATTACKS, NEEDS, Attack, register, table
from mia_utils.protocol import controls
from mia_utils.protocol.result import Result

__all__ = ["ATTACKS", "BLIND_RUNGS", "CONTROLS", "NEEDS", "PROTOCOLS", "Attack", "Result", "controls", "encodermi"]
__all__ += ["evaluate", "evaluate_blind", "fingerprint", "lpla", "mim", "network", "partcrop", "reference", "register"]
__all__ += ["segmentation", "table"]

_ask = {"needs": {"tokens", "embed"}, "queries": lambda params: params["n_crops"] + 1}
_ask |= {"extract": partcrop.extract_features}
_normalized = partial(network.fit, make=partial(network.make_network, normalized=True))
register("partcrop", **_ask, paper="PartCrop (arXiv 2404.02462)")
register("partcrop-v2", **_ask, fit=_normalized, paper="PartCrop-v2 (arXiv 2505.10351)")
_ask = {"needs": {"reconstruct"}, "queries": lambda params: params["n_masks"], "extract": mim.extract_distances}
_judge = {"score": mim.score_distances, "statistic": mim.compute_log_likeness}
register("mim", **_ask, **_judge, paper="MIM attack (arXiv 2408.06825)")
_judge = {"score": mim.score_distances, "statistic": mim.score_distances}
_ask |= {"extract": mim.extract_gradient_norm, "paper": "white box, gradients (arXiv 1812.00910)"}
register("gradient-norm", **_ask, **_judge)
_ask = {"needs": {"embed"}, "queries": lambda params: params["n_views"], "extract": encodermi.extract_features}
_ask |= {"paper": "EncoderMI (arXiv 2108.11023)"}
register("encodermi-v", **_ask, fit=encodermi.fit_vector)
register("encodermi-s", **_ask, fit=encodermi.fit_set)
register("encodermi-t", **_ask, score=encodermi.score_threshold, statistic=encodermi.score_threshold)
_ask = {"needs": {"embed"}, "queries": 1, "extract": lpla.extract_norms, "paper": "LpLA (arXiv 2506.05743)"}
register("lpla", **_ask, fit=lpla.fit_ratio)
_ask = {"needs": {"tokens"}, "queries": 1, "extract": partcrop.extract_spread, "paper": "one-query form of PartCrop"}
register("token-spread", **_ask, score=partcrop.score_spread, statistic=partcrop.score_spread)
register("token-spread-lr", **_ask, fit=partcrop.fit_spread)

_labels = {"needs": {"posteriors", "labels"}, "queries": 1, "paper": "Segmentations-Leak (arXiv 1912.09685)"}
_type1 = {"needs": {"posteriors"}, "queries": 1, "paper": "Type-I of Chobola et al. (arXiv 2212.01082)"}
_mean_loss = {"score": segmentation.score_mean_loss, "statistic": segmentation.score_mean_loss}
_concat = {"fit": partial(segmentation.fit, labels_last=True)}
for _name, _ask, _extract, _judge in (  # what the attacker sees, and what judges it
    ("loss-map", _labels, segmentation.extract_loss_map, {"fit": segmentation.fit}),
    ("concat", _labels, segmentation.extract_posteriors_and_labels, _concat),
    ("full-image", _labels, segmentation.extract_loss_map, {"fit": partial(segmentation.fit, whole=True)}),
    ("global-loss", _labels, segmentation.extract_mean_loss, _mean_loss),
    ("label-only", _labels, segmentation.extract_label_only, {"fit": segmentation.fit}),
    ("type1", _type1, segmentation.extract_posteriors, {"fit": segmentation.fit}),
):
    register(f"seg-{_name}", **_ask, extract=_extract, **_judge)

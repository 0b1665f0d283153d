"""Attacks on frozen models: a registry, and one ``evaluate`` that runs any of them with its three controls.

An attack is an ``extract`` (what the model outputs about each image) and one of ``score`` (a fixed rule) or ``fit`` (an
attacker trained on images whose membership is known; the shared network by default). Whoever registers one gets the
roles, the threshold, the protocols and the controls from here::

    attacks.register("norm", needs={"embed"}, queries=1, extract=extract_norm, score=lambda features: features[:, 0])
    attacks.evaluate("norm", encoder, pool, split, knowledge="partial").auc
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

_PARTCROP = {"needs": {"tokens", "embed"}, "queries": lambda params: params["n_crops"] + 1}
_PARTCROP |= {"extract": partcrop.extract_features}
register("partcrop", **_PARTCROP, paper="PartCrop (arXiv 2404.02462)")
register("partcrop-v2", **_PARTCROP, fit=partial(network.fit, version="v2"), paper="PartCrop-v2 (arXiv 2505.10351)")
_SPREAD = {"needs": {"tokens"}, "queries": 1, "extract": partcrop.extract_spread, "paper": "one-query form of PartCrop"}

_MIM = {"needs": {"reconstruct"}, "queries": lambda params: params["n_masks"], "extract": mim.extract_distances}
_MIM |= {"score": mim.score_distances, "statistic": mim.compute_log_likeness}
register("mim", **_MIM, paper="MIM attack (arXiv 2408.06825)")

_ENCODERMI = {"needs": {"embed"}, "queries": lambda params: params["n_views"], "extract": encodermi.extract_features}
_ENCODERMI |= {"paper": "EncoderMI (arXiv 2108.11023)"}
register("encodermi-v", **_ENCODERMI, fit=encodermi.fit_vector)
register("encodermi-s", **_ENCODERMI, fit=encodermi.fit_set)
register("encodermi-t", **_ENCODERMI, score=encodermi.score_threshold, statistic=encodermi.score_threshold)
_LPLA = {"needs": {"embed"}, "queries": 1, "paper": "LpLA (arXiv 2506.05743)"}
register("lpla", **_LPLA, extract=lpla.extract_norms, fit=lpla.fit_ratio)
register("token-spread", **_SPREAD, score=partcrop.score_spread, statistic=partcrop.score_spread)
register("token-spread-lr", **_SPREAD, fit=partcrop.fit_spread)

# what the attacker sees, and who judges it
_MEAN_LOSS = {"score": segmentation.score_mean_loss, "statistic": segmentation.score_mean_loss}
for _name, _extract, _judge in (
    ("loss-map", segmentation.extract_loss_map, {"fit": segmentation.fit}),
    ("concat", segmentation.extract_posteriors_and_labels, {"fit": partial(segmentation.fit, labels_last=True)}),
    ("full-image", segmentation.extract_loss_map, {"fit": partial(segmentation.fit, whole=True)}),
    ("global-loss", segmentation.extract_mean_loss, _MEAN_LOSS),
    ("label-only", segmentation.extract_label_only, {"fit": segmentation.fit}),
    ("type1", segmentation.extract_posteriors, {"fit": segmentation.fit}),
):
    _blind = _name == "type1"
    _paper = "Type-I of Chobola et al. (arXiv 2212.01082)" if _blind else "Segmentations-Leak (arXiv 1912.09685)"
    _needs = {"posteriors"} if _blind else {"posteriors", "labels"}
    register(f"seg-{_name}", needs=_needs, queries=1, extract=_extract, paper=_paper, **_judge)

"""A lab of made-up scores for the tests of figures and report: real results, real metrics, no model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.stats import norm

from mia_utils.attacks import Result

N_MEMBERS, N_STRANGERS = 40, 120
AUCS = {"mae": 0.85, "dino": 0.6}


def make_result(attack: str, auc: float, stream: int, *, control: str = "", **meta) -> Result:
    """One result whose scores are normal with the shift that gives the wanted AUC; two folds."""
    rng = np.random.default_rng(stream)
    is_member = np.arange(N_MEMBERS + N_STRANGERS) < N_MEMBERS
    score = rng.normal(size=len(is_member)) + np.sqrt(2) * norm.ppf(auc) * is_member
    facts = {
        "attack": attack, "method": "mae", "arch": "vit_micro_patch8_32", "dataset": "scenes", "seed": 0,
        "n_train": 128,
        "protocol": "controlled", "knowledge": "partial", "epochs": 100, "epoch": None, "summary": True, "figures": [],
        "params": {"n_crops": 64, "crop_scale": [0.08, 0.2], "kind": "both", "pooling": "auto"}, "train_seconds": 60.0,
        "utility": 0.4, "queries_per_image": 65, "known_share": 1.0, "augmentation": "none", "shadow_method": None,
    } | meta  # fmt: skip
    facts.setdefault("model_id", f"{facts['method']}-target-s{facts['seed']}")
    return Result(
        attack,
        control,
        score=score,
        is_member=is_member,
        image_ids=np.char.add("image-", np.arange(len(score)).astype(str)),
        role=np.full(len(score), "report"),
        fold=np.arange(len(score)) % 2,
        threshold=np.zeros(len(score)),
        meta=facts,
    )


@dataclass
class MadeUpLab:
    """What the figures need of ``experiments.Lab``: a profile name and saved results."""

    profile_name: str = "quick"
    saved: list[Result] = field(default_factory=list)

    def results(self, figure: str | None = None) -> list[Result]:
        return [r for r in self.saved if figure is None or figure in r.meta["figures"]]

    def add(self, auc: float, *figures: str, attack: str = "partcrop", blind: float = 0.5, **meta) -> Result:
        stream = len(self.saved) * 10
        result = make_result(attack, auc, stream, figures=list(figures), **meta)
        shared = {k: v for k, v in result.meta.items() if k != "attack"}
        protocol_stream = 5000 + 7 * result.meta["seed"] + (3 if result.meta["protocol"] != "controlled" else 0)
        # no-model stands beside many results unchanged: once per seed and protocol
        for name, value, number in (
            ("no-model", blind, protocol_stream),
            ("untrained", 0.5, stream + 1),
            ("permuted", 0.5, stream + 2),
        ):
            result.controls[name] = make_result(attack, value, number, control=name, **shared)
        self.saved.append(result)
        return result


def make_lab(profile: str = "quick") -> MadeUpLab:
    """A lab with results for every score-based figure of notebooks 00 to 03 and 08."""
    lab = MadeUpLab(profile)
    for method, auc in AUCS.items():
        main = ("fig00_roc", "fig03_roc", "fig03_knowledge") if method == "mae" else ("fig03_roc", "fig03_knowledge")
        for seed in (0, 1):
            lab.add(auc, *main, method=method, seed=seed)
            for other in AUCS:
                letters = "PET" if other == method else "PE-"
                same = other == method
                lab.add(
                    auc - 0.05, "fig03_transfer", "fig03_knowledge", method=method, seed=seed, summary=same,
                    knowledge=f"shadow:{letters}", shadow_method=other,
                )  # fmt: skip
        sweep = {"method": method, "summary": False}
        for k in (8, 64):
            lab.add(auc, "fig03_crop_number", params={"n_crops": k}, **sweep)
        for scale in ([0.08, 0.2], [0.5, 1.0]):
            lab.add(auc, "fig03_crop_scale", params={"crop_scale": scale}, **sweep)
        for kind in ("both", "uniform"):
            lab.add(auc, "fig03_feature_kind", params={"kind": kind}, **sweep)
        for pooling in ("mean", "cls"):
            lab.add(auc, "fig03_pooling", params={"pooling": pooling}, **sweep)
        for widths, attack in (([512, 256, 128], "partcrop"), ([512, 128], "partcrop-v2")):
            lab.add(auc, "fig03_mlp", attack=attack, params={"widths": widths}, **sweep)
        for share in (0.25, 1.0):
            lab.add(auc, "fig03_known_share", known_share=share, params={}, **sweep)
        for epoch in (0, 10, None):
            lab.add(auc, "fig03_epochs", epoch=epoch, params={"n_crops": 32}, **sweep)
        lab.add(auc, "fig03_released", params={"n_crops": 16}, **sweep)
        lab.add(0.95, "fig03_released", params={"n_crops": 16}, protocol="released-view", blind=0.9, **sweep)
    for arch in ("vit_micro_patch8_32", "resnet_thin_32"):
        lab.add(0.6, "fig03_arch", method="simclr", arch=arch, model_id=f"simclr-{arch[:3]}-s0")
    for dataset in ("scenes", "scenes-night"):
        lab.add(0.7, "fig03_datasets", method="mae", dataset=dataset, model_id=f"mae-{dataset}-s0")
    for method in AUCS:
        for attack, queries in (("partcrop", 65), ("mim", 16), ("encodermi-t", 10)):
            lab.add(0.7, "fig08_encoders", attack=attack, method=method, queries=queries, params={"n": queries})
        for masks in (1, 4):
            facts = dict(attack="mim", method=method, queries=masks, params={"n_masks": masks}, summary=False)
            lab.add(0.6 + 0.02 * masks, "fig08_queries", **facts)
    for rung, auc in (("released-view", 0.93), ("controlled", 0.5)):
        result = make_result(
            "no-model", auc, len(rung), figures=["fig02_blind_ladder"], rung=rung, summary=False, method=""
        )
        lab.saved.append(result)
    return lab

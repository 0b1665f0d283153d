"""Figures of notebook 07, drawn from made-up scores."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_lab import MadeUpLab
from PIL import Image

from mia_utils import figures
from mia_utils.figures import base, defenses

NAMES = sorted(name for name, figure in figures.FIGURES.items() if figure.notebook == "07_defenses")
SHADOW = {"mae": "mae-shadow-s0", "simclr": "simclr-shadow-s0", "unet": "unet-shadow-s0"}


class DefendedLab(MadeUpLab):
    """Scores as the notebook evaluates them."""

    def attack(self, auc, *names, attack, defense="none", strength="", attacker="adaptive", shadow=False, **meta):
        facts = dict(defense=defense, strength=strength, attacker=attacker if defense != "none" else "static")
        facts |= dict(knowledge="shadow:PET" if shadow else "partial", summary=False, utility_untrained=0.28, knn=0.3)
        facts |= dict(params={}, epochs=600) | meta
        facts["shadow"] = SHADOW[facts.get("method", "mae")] if shadow else None
        if defense == "none" or facts.get("method") == "unet":
            facts["knn"] = None
        result = self.add(auc, *names, attack=attack, **facts)
        if attacker == "static" or strength not in ("", 8.0):
            result.controls = {}
        return result


def add_encoders(lab: DefendedLab) -> None:
    tags = ("fig07_encoders",)
    for attack, auc in (("partcrop", 0.95), ("encodermi-t", 0.55), ("mim", 0.99)):
        lab.attack(auc, *tags, "fig07_early_stopping", attack=attack, utility=0.41)
        lab.attack(auc - 0.02, *tags, attack=attack, augmentation="crop", model_id="mae-crop-target-s0", utility=0.43)
    for epsilon, drop, utility in ((8.0, 0.45, 0.31), (150.0, 0.25, 0.35)):
        facts = dict(defense="dp-sgd", strength=epsilon, model_id=f"mae-dp{epsilon:g}-target-s0", utility=utility)
        for attack, auc in (("partcrop", 0.95), ("encodermi-t", 0.55), ("mim", 0.99)):
            lab.attack(max(0.5, auc - drop), *tags, attack=attack, train_seconds=150.0, **facts)
        lab.attack(max(0.5, 0.8 - drop), *tags, attack="partcrop", attacker="static", train_seconds=150.0, **facts)
    for scale, auc in (("0.2-0.6", 0.85), ("0.2-0.3", 0.7), ("0.8-1", 0.97)):
        facts = dict(defense="scsr", strength=scale, model_id=f"mae-scsr{scale}-s0", augmentation=f"crop:{scale}")
        for attack in ("partcrop", "mim"):
            lab.attack(auc, *tags, attack=attack, utility=0.4 + auc / 50, train_seconds=66.0, **facts)
    for epoch, auc, utility in ((50, 0.5, 0.3), (500, 0.9, 0.4)):
        facts = dict(defense="early-stopping", strength=epoch, epoch=epoch)
        for attack in ("partcrop", "mim"):
            both = (*tags, "fig07_early_stopping")
            lab.attack(auc, *both, attack=attack, utility=utility, **facts)
            lab.attack(auc, both[1], attack=attack, utility=utility, seed=1, **facts)
        lab.attack(auc - 0.1, *tags, "fig07_early_stopping", attack="partcrop", attacker="static", **facts)
    lab.attack(0.99, "fig07_early_stopping", attack="mim", utility=0.42, seed=1)
    for defense, strengths in (("noise", (0.5, 2.0)), ("top-k", (8,))):
        for i, strength in enumerate(strengths):
            facts = dict(defense=defense, strength=strength, utility=0.4 - 0.05 * i)
            lab.attack(0.9 - 0.1 * i, *tags, attack="partcrop", **facts)
            lab.attack(0.6 - 0.05 * i, *tags, attack="partcrop", attacker="static", **facts)
    lab.attack(0.99, *tags, attack="mim", defense="noise", strength=0.0, utility=0.41, knn=0.37)
    for sigma, auc in ((0.1, 0.9), (0.5, 0.6)):
        lab.attack(auc, "fig07_output", attack="mim", defense="noise", strength=sigma, utility=0.41)
    lab.attack(0.7, "fig07_output", attack="encodermi-t", method="simclr", utility=0.35, epochs=150)
    for sigma in (0.5, 2.0):
        facts = dict(defense="noise", strength=sigma, method="simclr", utility=0.3, epochs=150)
        lab.attack(0.7 - sigma / 10, "fig07_output", attack="encodermi-t", **facts)


def add_segmenters(lab: DefendedLab) -> None:
    model = dict(method="unet", arch="mobilenet_v2", epochs=40, utility_untrained=None)
    attacks = {"seg-loss-map": 0.97, "seg-global-loss": 0.94, "seg-label-only": 0.8}

    def add(defense, strength, drop, miou, **meta):
        facts = model | dict(defense=defense, strength=strength, utility=miou, miou_members=miou + 0.3) | meta
        for attack, auc in attacks.items():
            lab.attack(max(0.5, auc - drop), "fig07_segmenters", attack=attack, **facts)
            if defense != "none" and attack != "seg-global-loss":
                fooled = max(0.5, auc - 2 * drop - 0.1)
                lab.attack(fooled, "fig07_segmenters", attack=attack, attacker="static", **facts)

    for shadow in (False, True):
        add("none", "", 0.0, 0.4, shadow=shadow)
    add("dp-sgd", 8.0, 0.45, 0.1, model_id="unet-dp8-target-s0", train_seconds=300.0)
    add("dropout", 0.5, 0.1, 0.38, model_id="unet-dropout-target-s0")
    for defense, strength, drop, miou in (
        ("argmax", None, 0.2, 0.4),
        ("gauss", 0.1, 0.05, 0.4),
        ("gauss", 0.3, 0.15, 0.35),
        ("temperature", 3.0, 0.01, 0.4),
    ):
        add(defense, strength, drop, miou, shadow=True)


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """What is tested here needs no narrow interval."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "combine", functools.partial(base.combine, n_bootstrap=100))
        yield


@pytest.fixture(scope="module")
def lab():
    lab = DefendedLab()
    add_encoders(lab)
    add_segmenters(lab)
    return lab


@pytest.fixture(scope="module")
def drawn(lab, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIA_HOME", str(tmp_path_factory.mktemp("defended home")))
        yield {name: figures.draw(name, lab) for name in NAMES}


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path.with_suffix(".csv"), keep_default_na=True)


def get_title(path: Path) -> str:
    with Image.open(path) as image:
        image.load()
        return image.text["Title"]


def test_every_figure_of_the_notebook_is_drawn_with_its_controls(drawn):
    assert len(drawn) == 10
    for name, path in drawn.items():
        assert path.stat().st_size > 2000
        table = read(path)
        assert name == "fig07_cost" or (table["control"] == "no-model").any(), name


def test_redrawing_gives_the_same_bytes(drawn, lab, monkeypatch):
    for name in ("fig07_hero", "fig07_choice"):
        monkeypatch.setenv("MIA_HOME", str(drawn[name].parents[2]))
        before = drawn[name].read_bytes(), drawn[name].with_suffix(".csv").read_bytes()
        figures.draw(name, lab)
        assert (drawn[name].read_bytes(), drawn[name].with_suffix(".csv").read_bytes()) == before, name


def test_the_hero_tells_who_is_fooled_and_what_it_costs(drawn):
    table, title = read(drawn["fig07_hero"]), get_title(drawn["fig07_hero"])
    points = table[table["control"].isna()].set_index(["method", "label", "attacker"])["value"]
    assert points["mae", "Noise, σ .5", "adaptive"] > points["mae", "Noise, σ .5", "static"] + 0.1
    assert "fools a static attacker" in title and "(probe .41 to" in title and "U-Net" in title
    # an owner who answers with vectors offers nothing to the MIM attack, whose scores are better
    assert points["mae", "undefended", "adaptive"] > points["mae", "undefended, vectors only", "adaptive"]
    found = table[(table["label"] == "Noise, σ .5") & (table["attacker"] == "adaptive")]
    assert list(found["attack"]) == ["partcrop"]


def test_training_on_crops_is_a_defense_also_where_a_row_does_not_call_it_so(drawn):
    table = read(drawn["fig07_scsr"])
    assert list(dict.fromkeys(table["label"])) == [
        "whole picture", ".2 to 1 of the area", ".2 to .6 of the area", ".2 to .3 of the area", ".8 to 1 of the area",
    ]  # fmt: skip
    assert "with crops of .8 to 1 of the area (leaks most)" in get_title(drawn["fig07_scsr"])


def test_lines_of_a_ladder_go_from_weak_to_strong(drawn):
    table = read(drawn["fig07_encoders"])
    labels = list(dict.fromkeys(table["label"]))
    assert labels[:3] == ["undefended", "Early stopping, 500 epochs", "Early stopping, 50 epochs"]
    assert labels.index("DP-SGD, ε 150") < labels.index("DP-SGD, ε 8")
    assert "Noise, σ 0" not in labels  # strength 0 is the undefended model and lends it its k-NN
    assert table[(table["measure"] == "knn") & (table["label"] == "undefended")]["value"].tolist() == [0.37]


def test_seeds_are_drawn_where_there_are_several(drawn):
    table = read(drawn["fig07_early_stopping"])
    assert set(table.loc[(table["attack"] == "mim") & (table["control"].isna()), "seed"].dropna()) == {0, 1}
    assert "after 50 no attack is shown" in get_title(drawn["fig07_early_stopping"])


def test_noise_on_pixels_has_a_panel_of_its_own_without_a_probe(drawn):
    table = read(drawn["fig07_output"])
    panel = table[table["panel"] == "MAE: noise on pixels"]
    assert set(panel["attack"]) == {"mim"} and "utility" not in set(panel["measure"])
    assert {"SimCLR: noise", "U-Net: argmax"} <= set(table["panel"])


def test_the_choice_keeps_nine_tenths_of_what_training_gained(drawn, lab):
    cases = defenses.load_cases(lab, "fig07_choice", "fig07_encoders")
    plain = next(c for c in cases if c.defense == "none")
    kept = {c.label: defenses.get_kept(c, plain) for c in cases}
    assert kept["undefended"] == 1 and kept["DP-SGD, ε 8"] == pytest.approx((0.31 - 0.28) / (0.41 - 0.28))
    case, entry, share = defenses.choose(cases, "mae", "partcrop", "noise")
    assert case.strength == 0.5 and share >= defenses.KEEP > kept["Noise, σ 2"] and entry.meta["attacker"] == "adaptive"
    assert defenses.choose(cases, "mae", "mim", "dp-sgd")[0] is None  # no epsilon keeps enough
    assert defenses.choose(cases, "mae", "mim", "top-k") is None  # not run
    table = read(drawn["fig07_choice"])
    private = table[(table["defense"] == "dp-sgd") & (table["method"] == "mae")]
    assert private["value"].isna().all() and (private["kept"] < defenses.KEEP).all()


def test_the_front_holds_what_no_other_beats(drawn, lab):
    points = defenses.tabulate_points(lab)
    for _, part in points.groupby("method"):
        for row in part.to_dict("records"):
            other = part[part["label"] != row["label"]]
            beaten = ((other["kept"] > row["kept"]) & (other["value"] < row["value"])).any()
            assert not (beaten and row["on_front"])
    assert points.loc[points["label"] == "Crop range, .2 to .3", "on_front"].item()
    assert not points.loc[points["label"] == "Noise, σ 2", "on_front"].iloc[0]


def test_time_is_told_per_training_and_per_epoch(drawn):
    table = read(drawn["fig07_cost"]).set_index(["method", "label"])
    assert table.loc[("mae", "DP-SGD, ε 8"), "relative"] == 2.5
    stopped = table.loc[("mae", "Early stopping, 50 epochs")]
    assert stopped["relative"] == pytest.approx(50 / 600, rel=1e-4) and stopped["per_epoch"] == pytest.approx(1)


def test_what_epsilon_promises():
    assert defenses.bound_auc(0.0) == 0.5 and defenses.bound_auc(800.0) == 1.0
    for epsilon in (0.1, 0.4, 1.0, 8.0):
        assert defenses.bound_auc(epsilon) == pytest.approx(np.exp(epsilon) / (1 + np.exp(epsilon)))
    # the area under the border itself, summed up
    epsilon, delta = 1.0, 0.05
    a = np.linspace(0, 1, 200_001)
    b = np.maximum.reduce([np.zeros_like(a), 1 - delta - np.exp(epsilon) * a, np.exp(-epsilon) * (1 - delta - a)])
    assert defenses.bound_auc(epsilon, delta) == pytest.approx(1 - np.trapezoid(b, a), abs=1e-4)


def test_what_is_missing_is_said():
    lab = DefendedLab()
    lab.attack(0.9, "fig07_encoders", "fig07_early_stopping", attack="mim")
    for name in NAMES:
        with pytest.raises(figures.NotAvailable, match="fig07_"):
            figures.draw(name, lab)


@pytest.mark.parametrize(
    ("method", "defense"),
    [("mae", "scsr"), ("simclr", "none"), ("moco-v1", "none"), ("dino", "none"), ("unet", "none")],
)
def test_crops_are_a_defense_only_where_views_are_not_crops_anyway(method, defense):
    lab = MadeUpLab()
    lab.add(0.8, "fig07_encoders", method=method, augmentation="crop-weak", defense="none")
    (case,) = defenses.make_cases(base.load_entries(lab, "fig07_encoders"))
    assert case.defense == defense

"""Figures of notebook 04, drawn from made-up scores: what is told apart, what stands beside what, what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_lab import MadeUpLab

from mia_utils import figures, plots
from mia_utils.figures import mim
from mia_utils.protocol import metrics
from mia_utils.runner.profiles import Profile

ROWS = {
    "mae-target": {}, "mae-crop-target": {"augmentation": "crop", "n_train": 512},
    "mae-nano-target": {"arch": "vit_nano_patch8_32"}, "mae-mask50-target": {"options": {"mask_ratio": 0.5}},
    "mae-n256-target": {"n_train": 256}, "simmim-target": {"method": "simmim"},
    "simmim-swin-target": {"method": "simmim", "arch": "swin_thin_32"}, "dino-target": {"method": "dino"},
    "mae-shadow": {"role": "shadow"}, "mae-night-shadow": {"role": "shadow", "dataset": "scenes-night"},
    "mae-mask50-shadow": {"role": "shadow", "options": {"mask_ratio": 0.5}},
}  # fmt: skip
PLAIN = {"role": "target", "method": "mae", "arch": "vit_micro_patch8_32", "dataset": "scenes", "n_train": 128}
PARAMS = {"n_masks": 16, "mask_ratio": 0.75, "distance": "mse", "region": "masked", "alpha": 1.0, "space": "auto"}
NAMES = sorted(name for name, figure in figures.FIGURES.items() if figure.notebook == "04_mim_attack")


@dataclass
class MimLab(MadeUpLab):
    """A lab with rows, because the names of targets and shadows come from them."""

    @property
    def profile(self):
        models = [
            {**PLAIN, "epochs": 600, "id": f"{i}-s{s}", "seed": s} | row for i, row in ROWS.items() for s in (0, 1)
        ]
        return Profile(name="quick", datasets={"scenes": {}, "scenes-night": {}}, models=models)

    def attack(self, model: str, auc: float, *names: str, seed: int = 0, shadow: str | None = None, **meta):
        row = self.profile.row(f"{model}-s{seed}")
        params = PARAMS | meta.pop("params", {})
        facts = {key: getattr(row, key) for key in ("method", "arch", "dataset", "n_train", "epochs", "augmentation")}
        facts |= dict(model_id=row.id, seed=seed, shadow=f"{shadow}-s{seed}" if shadow else None, decoder="own")
        facts |= {"attack": "mim"} | meta
        result = self.add(auc, *names, params=params, **facts)
        result.score = -np.exp(-result.score)  # minus a distance
        result.threshold = np.full(len(result.score), -0.5)
        told = {name for name in names for r in self.saved[:-1] if name in r.meta["figures"] and r.controls}
        if told >= set(names):  # as in the notebook: one row of a sweep carries the controls
            result.controls = {}
        return result


@pytest.fixture(scope="module")
def lab():
    lab = MimLab()
    for model, auc in (("mae-target", 0.97), ("mae-crop-target", 0.48), ("simmim-target", 0.9)):
        for seed in (0, 1):
            names = ("fig04_table", "fig04_histograms") + (("fig04_roc",) if model == "mae-target" else ())
            lab.attack(model, auc, *names, seed=seed)
            for epoch in (50, 600):
                lab.attack(model, auc, "fig04_epochs", seed=seed, epoch=epoch, n_nonmembers=100)
    lab.attack("mae-target", 0.97, "fig04_table", knowledge="shadow:PET", shadow="mae-shadow")
    for attack in ("partcrop", "encodermi-v", "encodermi-t"):
        lab.attack("mae-target", 0.7, "fig04_roc", attack=attack)
    for suffix, epoch in (("_early", 150), ("", None)):
        for number in (1, 16):
            lab.attack("mae-target", 0.8, f"fig04_masks{suffix}", epoch=epoch, params={"n_masks": number})
        for ratio in (0.5, 0.75):
            lab.attack("mae-target", 0.8, f"fig04_mask_ratio{suffix}", epoch=epoch, params={"mask_ratio": ratio})
        for distance in ("mse", "ssim"):
            lab.attack("mae-target", 0.8, f"fig04_distance{suffix}", epoch=epoch, params={"distance": distance})
        for reference, alpha in ((None, 1.0), ("mae-reference", 0.5), ("mae-reference", 1.0)):
            shadow = dict(knowledge="shadow:PET", shadow="mae-shadow") if epoch is None else {}
            facts = dict(epoch=epoch, reference=reference, params={"alpha": alpha}, **shadow)
            lab.attack("mae-target", 0.8, f"fig04_calibration{suffix}", **facts)
    lab.attack("mae-target", 0.9, "fig04_size", "fig04_target_mask_ratio", "fig04_n_train", epoch=300)
    for model, name in (("mae-nano-target", "fig04_size"), ("simmim-target", "fig04_size")):
        lab.attack(model, 0.8, name)
    lab.attack("simmim-swin-target", 0.8, "fig04_size")
    lab.attack("mae-n256-target", 0.8, "fig04_n_train")
    for asked in (0.5, 0.75):
        lab.attack("mae-mask50-target", 0.8, "fig04_target_mask_ratio", params={"mask_ratio": asked})
    lab.attack("mae-target", 0.97, "fig04_decoder")
    for model in ("mae-target", "dino-target"):
        lab.attack(model, 0.7, "fig04_decoder", decoder="attacker")
    for suffix, epoch in (("", None), ("_early", 150)):
        lab.attack("mae-target", 0.9, f"fig04_relaxations{suffix}", epoch=epoch)
        for shadow, letters in (("mae-shadow", "PET"), ("mae-night-shadow", "-ET"), ("mae-mask50-shadow", "PE-")):
            facts = dict(knowledge=f"shadow:{letters}", shadow=shadow, epoch=epoch)
            lab.attack("mae-target", 0.9, f"fig04_relaxations{suffix}", **facts)
    return lab


@pytest.fixture(scope="module")
def drawn(lab, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIA_HOME", str(tmp_path_factory.mktemp("mim home")))
        yield {name: figures.draw(name, lab) for name in NAMES}


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path.with_suffix(".csv"))


def test_every_figure_of_the_notebook_is_drawn_with_its_controls(drawn):
    assert len(drawn) == 13
    for name, path in drawn.items():
        assert path.stat().st_size > 2000 and (read(path)["control"] == "no-model").any(), name


def test_redrawing_gives_the_same_bytes(drawn, lab, monkeypatch):
    for name in ("fig04_histograms", "fig04_epochs", "fig04_relaxations"):
        monkeypatch.setenv("MIA_HOME", str(drawn[name].parents[2]))
        before = drawn[name].read_bytes(), drawn[name].with_suffix(".csv").read_bytes()
        figures.draw(name, lab)
        assert (drawn[name].read_bytes(), drawn[name].with_suffix(".csv").read_bytes()) == before, name


def test_targets_are_named_by_what_tells_them_from_the_plain_one(lab):
    entries = figures.group({r.meta["model_id"]: r for r in lab.saved if r.meta["seed"] == 0}.values(), controls=())
    names = mim.name_models(lab, entries)
    assert names == {
        "mae-target": "MAE",
        "mae-crop-target": "MAE, strong crops, N 512",
        "mae-nano-target": "MAE, ViT-nano/8",
        "mae-n256-target": "MAE, N 256",
        "mae-mask50-target": "MAE, mask ratio .5",
        "simmim-target": "SimMIM",
        "simmim-swin-target": "SimMIM, Swin-thin",
        "dino-target": "DINO",
    }


def test_shadows_are_named_by_what_they_do_not_share(drawn):
    table = read(drawn["fig04_relaxations"])
    assert list(dict.fromkeys(table["label"])) == ["known members", "the same kind", "scenes-night", "mask ratio .5"]


def test_accuracy_is_that_of_the_shadows_threshold_and_its_interval_holds_it(drawn, lab):
    table = read(drawn["fig04_relaxations"])
    assert list(dict.fromkeys(table["epoch"])) == [600, 150]
    row = table[
        (table["measure"] == "balanced accuracy") & (table["label"] == "scenes-night") & table["control"].isna()
    ]
    row = row[row["epoch"] == 600]
    result = next(r for r in lab.results("fig04_relaxations") if r.meta["knowledge"] == "shadow:-ET")
    found = metrics.evaluate(result.score, result.is_member, threshold=result.threshold, folds=result.fold)
    assert row["value"].item() == pytest.approx(found.balanced_accuracy, rel=1e-5)
    assert row["accuracy"].item() == pytest.approx(found.accuracy, rel=1e-5)
    rates = table[table["measure"] == "balanced accuracy"]
    assert (rates["low"] <= rates["value"]).all() and (rates["value"] <= rates["high"]).all()
    assert rates["value"].to_numpy() == pytest.approx((rates["tpr"] + 1 - rates["fpr"]).to_numpy() / 2, abs=1e-5)


def test_the_interval_of_balanced_accuracy_covers_what_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):  # true rates .7 and .2: balanced accuracy .75
        score = np.concatenate([rng.random(60) < 0.7, rng.random(240) < 0.2]).astype(float)
        found = metrics.evaluate(score, np.arange(300) < 60, threshold=0.5, n_bootstrap=2)
        _, low, high = mim.measure_accuracy(found)
        hits += low <= 0.75 <= high
    assert hits / 200 > 0.91  # .95 less three standard errors


def test_an_early_checkpoint_and_the_end_are_two_panels_and_two_names(drawn, lab):
    table = read(drawn["fig04_masks"])
    assert sorted(table["epoch"].unique()) == [150, 600] and sorted(table["x"].unique()) == [1, 16]
    # notebook 08 compares queries at the end of training only
    assert all(r.meta["epoch"] is None for r in lab.results("fig04_masks"))


def test_the_reference_is_in_the_lines_of_the_calibration(drawn):
    table = read(drawn["fig04_calibration"])
    lines = list(dict.fromkeys(table["label"]))
    assert lines == [f"epoch {e}: {a}" for e in (150, 600) for a in ("no reference", "α .5", "α 1")]
    assert set(table.loc[table["measure"] == "balanced accuracy", "epoch"]) == {600}  # the shadow's threshold


def test_a_figure_without_its_rows_says_what_it_needs(home):
    lab = MimLab()
    lab.attack("mae-target", 0.9, "fig04_n_train")
    for name, needs in (("fig04_n_train", "see profile photos"), ("fig04_relaxations", "with a shadow")):
        with pytest.raises(figures.NotAvailable, match=needs):
            figures.draw(name, lab)


def test_titles_follow_the_numbers(lab):
    fig, _ = figures.FIGURES["fig04_table"].draw(lab)
    title = " ".join(fig._suptitle.get_text().split())
    assert title.startswith("MIM attack: above chance on 2 of 3 targets") and "to MAE (.9" in title
    assert title.partition("not shown on ")[2].startswith("MAE, strong crops, N 512 (.")


def test_sorted_reconstructions_say_who_is_who_and_refuse_unequal_lengths():
    pictures = np.random.default_rng(0).random((4, 8, 8, 3))
    facts = dict(is_member=[1, 1, 0, 0], distance=[0.1, 0.2, 0.3, 0.4], rank=[0, 3, 6, 9], everyone=np.arange(10) < 5)
    fig, table = plots.draw_sorted_reconstructions(pictures, pictures, pictures, title="t", **facts)
    assert (
        list(table["rank"]) == [1, 4, 7, 10] and set(table["of"]) == {10} and list(table["is_member"]) == [1, 1, 0, 0]
    )
    frames = [ax for ax in fig.axes if ax.images]
    assert len(frames) == 12
    with pytest.raises(ValueError, match="expected 3 masked"):
        plots.draw_sorted_reconstructions(pictures[:3], pictures, pictures, title="t", **facts)


def test_names_at_the_ends_of_lines_do_not_touch():
    places = plots._spread([0.9, 0.9, 0.88, 0.1], 0.08)
    assert sorted(places) != places and np.diff(sorted(places)).min() > 0.079 and abs(places[3] - 0.1) < 1e-9


def test_names_of_structures_carry_their_size():
    names = [mim.name_arch(a) for a in ("vit_nano_patch8_32", "swin_thin_32", "vit_base_patch16_224", "resnet18")]
    assert names == ["ViT-nano/8", "Swin-thin", "ViT-base/16", "resnet18"]

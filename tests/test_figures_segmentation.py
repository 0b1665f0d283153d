"""Figures of notebook 06, drawn from made-up scores; the table of classes; pictures of loss maps; the audit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_lab import MadeUpLab
from PIL import Image
from sklearn.metrics import roc_auc_score

from mia_utils import audit, datasets, figures, plots
from mia_utils.figures.segmentation import tabulate_classes
from mia_utils.models import segmenters
from mia_utils.protocol import splits

ATTACKS = ("seg-loss-map", "seg-concat", "seg-full-image", "seg-global-loss", "seg-label-only", "seg-type1")
FIT = {"n_patches": 6, "patch_share": 0.7, "epochs": 8}
NAMES = sorted(name for name, figure in figures.FIGURES.items() if figure.notebook == "06_segmentation_mia")


class SegmentationLab(MadeUpLab):
    """Scores of victims and shadows as the notebook evaluates them."""

    def attack(self, auc: float, *names: str, attack: str = "seg-loss-map", controls: bool = True, **meta):
        facts = dict(method="unet", arch="mobilenet_v2", epochs=40, knowledge="shadow:PET", shadow_method="unet")
        facts |= dict(shadow="unet-shadow-s0", shadow_dataset="scenes", miou=0.3, miou_members=0.8, params=FIT) | meta
        facts["params"] = {} if attack == "seg-global-loss" else facts["params"]
        result = self.add(auc, *names, attack=attack, **facts)
        if not controls:
            result.controls = {}
        return result


@pytest.fixture(scope="module")
def lab():
    lab = SegmentationLab()
    for attack, auc in zip(ATTACKS, (0.97, 0.96, 0.95, 0.94, 0.8, 0.6), strict=True):
        for seed in (0, 1) if attack != "seg-type1" else (0,):
            dependent = ("fig06_settings",) if attack in ("seg-loss-map", "seg-global-loss") else ()
            lab.attack(auc, "fig06_roc", *dependent, attack=attack, seed=seed)
    for attack in ("seg-loss-map", "seg-global-loss"):
        far = dict(knowledge="shadow:-ET", shadow="unet-night-shadow-s0", shadow_dataset="scenes-night")
        lab.attack(0.8, "fig06_settings", attack=attack, controls=attack == "seg-loss-map", **far)
    lab.attack(0.9, "fig06_table", method="pspnet", shadow_method="pspnet", shadow="pspnet-shadow-s0")
    early = dict(epoch=10, summary=False)
    lab.attack(0.8, "fig06_patches", "fig06_patch_size", "fig06_transfer", "fig06_epochs", **early)
    lab.attack(0.7, "fig06_patches", params=FIT | {"n_patches": 1}, controls=False, **early)
    lab.attack(0.7, "fig06_patch_size", params=FIT | {"patch_share": 0.3}, controls=False, **early)
    lab.attack(0.97, "fig06_epochs", miou=0.31, miou_members=0.95)
    for victim, shadow in (("unet", "pspnet"), ("pspnet", "unet"), ("pspnet", "pspnet")):
        facts = dict(method=victim, shadow_method=shadow, shadow=f"{shadow}-shadow-s0", epoch=8, controls=False)
        lab.attack(0.75, "fig06_transfer", **facts)
    loss = dict(attack="seg-global-loss", knowledge="partial", shadow=None, shadow_method=None, shadow_dataset=None)
    for n_train, auc in ((42, 0.95), (169, 0.9)):
        lab.attack(auc, "fig06_n_train", n_train=n_train, model_id=f"unet-n{n_train}-target-s0", **loss)
    for how, auc, blind in (("", 0.9, 0.5), ("@frames", 0.8, 0.5), ("@official", 0.95, 0.9)):
        facts = dict(dataset=f"camvid{how}", protocol="released-split" if how == "@official" else "controlled")
        lab.attack(auc, "fig06_splits", model_id=f"unet-{how[1:]}-target-s0", blind=blind, **facts, **loss)
    return lab


def make_classes(seed: int = 0):
    """Losses of two classes: the second is absent from half of the pictures and tells the sides apart."""
    rng, is_member = np.random.default_rng(seed), np.arange(80) < 40
    losses = rng.exponential(size=(80, 3)) + 1
    losses[:, 1] += 3 * ~is_member
    losses[::2, 1] = np.nan
    losses[5:, 2] = np.nan  # five members, no stranger
    return seed, losses, is_member, None


@pytest.fixture(scope="module")
def drawn(lab, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIA_HOME", str(tmp_path_factory.mktemp("segmentation home")))
        table = tabulate_classes([make_classes(0), make_classes(1)], ["sky", "pole", "rare"], method="unet")
        data = {"fig06_classes": table}
        yield {name: figures.draw(name, lab, data=data.get(name)) for name in NAMES}


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path.with_suffix(".csv"))


def get_title(path: Path) -> str:
    with Image.open(path) as image:
        image.load()
        return image.text["Title"]


def test_every_figure_of_the_notebook_is_drawn_with_its_controls(drawn):
    assert len(drawn) == 10
    for name, path in drawn.items():
        assert path.stat().st_size > 2000
        assert name == "fig06_classes" or (read(path)["control"] == "no-model").any(), name


def test_redrawing_gives_the_same_bytes(drawn, lab, monkeypatch):
    for name in ("fig06_roc", "fig06_settings", "fig06_classes"):
        monkeypatch.setenv("MIA_HOME", str(drawn[name].parents[2]))
        before = drawn[name].read_bytes(), drawn[name].with_suffix(".csv").read_bytes()
        figures.draw(name, lab)
        assert (drawn[name].read_bytes(), drawn[name].with_suffix(".csv").read_bytes()) == before, name


def test_attackers_who_see_less_have_a_panel_of_their_own(drawn):
    table = read(drawn["fig06_roc"])
    panels = table[table["control"].isna()].groupby("panel", sort=False)["attack"].unique()
    assert list(panels["less than that"]) == ["seg-label-only", "seg-type1"]
    assert list(panels["posteriors and true classes"]) == list(ATTACKS[:4])


def test_the_independent_setting_is_told_by_the_data_of_its_shadow(drawn):
    table = read(drawn["fig06_settings"])
    labels = list(dict.fromkeys(table.loc[table["measure"] == "AUC", "label"]))
    assert labels[:2] == ["Loss map, dependent", "Loss map, independent (scenes-night)"]
    assert "independent (scenes-night)" in get_title(drawn["fig06_settings"])


def test_quality_stands_beside_the_attack(drawn):
    table = read(drawn["fig06_epochs"])
    quality = table[table["panel"] == "mIoU"].set_index(["x", "group"])["value"]
    assert quality[40, "member"] == 0.95 and quality[10, "stranger"] == 0.3
    assert "mIoU on strangers .30 and .31" in get_title(drawn["fig06_epochs"])


def test_the_split_is_told_with_and_without_a_model(drawn):
    table = read(drawn["fig06_splits"])
    blind = table[(table["control"] == "no-model") & table["seed"].isna()].set_index("protocol")["value"]
    assert list(blind.index) == ["blocks", "frames", "official"] and blind["official"] > 0.8 > 0.6 > blind["blocks"]


def test_one_number_of_pictures_or_one_split_is_no_figure():
    lab = SegmentationLab()
    lab.attack(0.9, "fig06_n_train", "fig06_splits", dataset="camvid", attack="seg-global-loss")
    for name in ("fig06_n_train", "fig06_splits"):
        with pytest.raises(figures.NotAvailable, match="photos"):
            figures.draw(name, lab)


def test_a_class_is_judged_over_the_pictures_that_show_it():
    parts = [make_classes(0), make_classes(1)]
    table = tabulate_classes(parts, ["sky", "pole", "rare"])
    over_all = table[table["seed"].isna()].set_index("class")
    assert list(over_all.index) == ["pole", "sky"]  # the rare one has no stranger; best first
    expected = []
    for _, losses, is_member, _ in parts:
        shown = np.isfinite(losses[:, 1])
        expected.append(roc_auc_score(is_member[shown], -losses[shown, 1]))
    assert over_all.loc["pole", "value"] == pytest.approx(np.mean(expected))
    assert over_all.loc["pole", "n_members"] == 20 and over_all.loc["pole", "low"] > 0.5
    assert sorted(table.loc[(table["class"] == "pole") & table["seed"].notna(), "value"]) == pytest.approx(
        sorted(expected)
    )


def test_loss_maps_share_one_scale_and_members_come_first(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (4, 8, 12)).astype(np.uint8)
    labels[0, :2] = 255
    maps = rng.exponential(size=(4, 8, 12)) * (labels != 255)
    is_member = np.array([False, True, False, True])
    images = rng.integers(0, 255, (4, 8, 12, 3), dtype=np.uint8)
    options = dict(is_member=is_member, class_names=("a", "b", "c"), title="t", image_ids=list("wxyz"))
    fig, table = plots.draw_loss_maps(images, labels, np.zeros_like(labels), maps, **options)
    assert list(table["image_id"]) == ["x", "z", "w", "y"] and table["scale_end"].nunique() == 1
    valid = labels[0] != 255
    assert table.set_index("image_id").loc["w", "mean_loss"] == pytest.approx(maps[0][valid].mean())
    assert table.set_index("image_id").loc["w", "share_wrong"] == pytest.approx((labels[0][valid] != 0).mean())
    with pytest.raises(ValueError, match="expected 4 label maps"):
        plots.draw_loss_maps(images, labels[:2], labels, maps, **options)


def test_void_is_white_and_classes_are_told_apart():
    painted = plots.paint_labels(np.array([[0, 1], [255, 0]]))
    assert painted.shape == (2, 2, 3) and (painted[1, 0] == 255).all()
    assert (painted[0, 0] == painted[1, 1]).all() and (painted[0, 0] != painted[0, 1]).any()


def test_careless_splits_of_a_film(monkeypatch):
    base = datasets.load("scenes", n=24, size=32, seed=0)
    groups = np.repeat(["a/0", "a/1", "b/0"], 8)
    official = np.array(["train"] * 12 + ["test"] * 12)
    film = datasets.replace(base, groups=groups, official_split=official)
    frames, cut = (datasets._split_carelessly(film, how) for how in ("frames", "official"))
    assert frames.groups is None and frames.name == "scenes@frames" and frames.hash != film.hash
    assert set(cut.groups) == {"a/0-train", "a/1-train", "a/1-test", "b/0-test"}
    split = splits.draw(cut, n_members=6, n_nonmembers=6, n_shadow_members=0, n_shadow_nonmembers=0, rule="official")
    assert set(official[split.target_members]) == {"train"} and set(official[split.target_nonmembers]) == {"test"}
    with pytest.raises(ValueError, match="has no groups"):
        datasets.load("scenes@frames", n=24, size=32)


# ----------------------------------------------------------------------------------------------- audit of a segmenter


def write_folder(folder: Path, pool, index) -> Path:
    for i in index:
        for kind, array in (("images", pool.images[i]), ("masks", pool.masks[i])):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / kind / f"{i:03d}.png")
    (folder / "classes.txt").write_text("\n".join(pool.mask_class_names))
    return folder


def remember(pool, known):
    """A "segmenter" that is sure of the true classes of some pictures, by the sum of their pixels."""
    import torch

    n_classes = len(pool.mask_class_names)
    truth = {int(pool.images[i].astype(np.int64).sum()): pool.masks[i] for i in known}

    def answer(x):
        out = torch.zeros(len(x), n_classes, *x.shape[2:])
        for logits, image in zip(out, x, strict=True):
            mask = truth.get(int((image.double() * 255).round().sum()))
            if mask is not None:
                logits.scatter_(0, torch.from_numpy(mask.astype(np.int64))[None], 5.0)
        return out

    return segmenters.wrap(answer, n_classes=n_classes, outputs="logits", name="mine")


def test_an_audit_of_two_folders_finds_what_was_used_and_is_void_where_pictures_differ(tmp_path):
    pool = datasets.load("scenes", n=80, size=32, seed=3)
    mine = remember(pool, range(40))
    folders = [write_folder(tmp_path / name, pool, index) for name, index in (("a", range(40)), ("b", range(40, 80)))]
    report = audit.compare_segmenter(mine, *folders)
    assert not report.void and report.result.auc == 1 and report.p_value < 0.001
    assert report.verdict.startswith("Evidence") and "no untrained twin" in str(report)
    strangers = pool.take(np.arange(40, 80))
    darker = datasets.replace(strangers, images=(strangers.images * 0.7).astype(np.uint8))
    assert audit.compare_segmenter(mine, pool.take(np.arange(40)), darker).void
    silent = audit.compare_segmenter(remember(pool, []), *folders)
    assert silent.result.auc == 0.5 and silent.p_value > 0.01


def test_an_audit_of_a_segmenter_says_in_one_line_what_is_missing(tmp_path):
    pool = datasets.load("scenes", n=40, size=32, seed=3)
    parts = pool.take(np.arange(20)), pool.take(np.arange(20, 40))
    mine = remember(pool, [])
    for sides, message in (
        ((datasets.replace(parts[0], masks=None), parts[1]), "has no label maps"),
        ((parts[0].take(np.arange(5)), parts[1]), "at least 10 different suspected"),
        ((parts[0], parts[0]), "in both sets"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            audit.compare_segmenter(mine, *sides)
        assert "\n" not in str(error.value)

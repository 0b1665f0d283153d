"""Tests of the style, the marks and the writing of figures."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib as mpl
import matplotlib.colors
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mia_utils import plots

# Machado, Oliveira, Fernandes (2009): linear-RGB simulation of full protanopia and deuteranopia
_PROTAN = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])
_DEUTAN = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])


def _to_lab(color: str, deficiency: np.ndarray) -> np.ndarray:
    rgb = np.array(mpl.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(deficiency @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", [np.eye(3), _PROTAN, _DEUTAN], ids=["normal", "protan", "deutan"])
def test_attacks_that_share_a_figure_have_colors_apart_for_every_reader(deficiency):
    # encoder attacks meet each other and segmentation attacks meet each other; 8 is several just-noticeable steps
    families = [[a for a in plots.ATTACK_COLORS if a.startswith("seg-") == seg] for seg in (False, True)]
    for family in families:
        for one, other in itertools.combinations(family, 2):
            colors = [_to_lab(plots.ATTACK_COLORS[a], deficiency) for a in (one, other)]
            assert np.linalg.norm(colors[0] - colors[1]) > 8, (one, other)
    member, stranger = (_to_lab(c, deficiency) for c in (plots.MEMBER_COLOR, plots.STRANGER_COLOR))
    assert np.linalg.norm(member - stranger) > 20


def test_one_color_per_attack_and_one_marker_per_method():
    assert len(set(plots.ATTACK_COLORS.values())) == len(plots.ATTACK_COLORS)
    assert len(set(plots.METHOD_MARKERS.values())) == len(plots.METHOD_MARKERS)
    assert plots.color_of("brand-new") == plots.color_of("brand-new") != plots.color_of("partcrop")
    assert plots.color_of("partcrop", "no-model") == plots.CONTROL_STYLES["no-model"]["color"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.807, ".81"), (1.0, "1.00"), (-0.25, "-.25"), (0.0, ".00"), (float("nan"), ""), (None, "")]
)
def test_shares_are_printed_without_a_leading_zero(value, text):
    assert plots.format_value(value) == text


def _draw_sweep(n_seeds: int = 2):
    rows = [
        {
            "x": x,
            "value": 0.5 + x / 100,
            "low": 0.45 + x / 100,
            "high": 0.55 + x / 100,
            "attack": "partcrop",
            "method": "mae",
        }
        for x in (8, 16, 32)
    ]
    rows += [{**r, "seed": s, "value": r["value"] + 0.01 * s} for r in rows for s in range(n_seeds)]
    table = pd.DataFrame(rows)
    fig, axes = plots.make_figure(width=plots.HALF, title="More crops, more leakage")
    plots.draw_sweep(axes[0, 0], table, xlabel="crops", log=True)
    return fig, table


def test_an_unchanged_figure_gives_unchanged_bytes_whatever_style_is_set(tmp_path: Path):
    fig, table = _draw_sweep()
    first = plots.save(fig, tmp_path / "quick" / "fig03_x.png", table)
    before = first.read_bytes(), first.with_suffix(".csv").read_bytes()
    with mpl.rc_context({"font.size": 20, "axes.titlelocation": "center", "savefig.dpi": 50}):
        fig, table = _draw_sweep()
        second = plots.save(fig, tmp_path / "quick" / "fig03_x", table)
    assert second == first
    assert (second.read_bytes(), second.with_suffix(".csv").read_bytes()) == before
    assert b"Software" not in before[0] and b"tIME" not in before[0]
    assert sorted(p.name for p in first.parent.iterdir()) == ["fig03_x.csv", "fig03_x.png"]  # no temporary file left


def test_title_command_and_seeds_travel_in_the_png(tmp_path: Path):
    fig, table = _draw_sweep()
    path = plots.save(fig, tmp_path / "photos" / "fig03_x.png", table, caption="sweeps: one seed")
    with Image.open(path) as image:
        image.load()
        texts = image.text
        assert image.width == round(plots.HALF * plots.STYLE["savefig.dpi"])
    assert texts["Title"] == "More crops, more leakage"
    assert texts["Command"] == "./run_all.sh photos 03"
    assert texts["Seeds"] == "0, 1"
    assert texts["Caption"] == "sweeps: one seed"


def test_smoke_figures_carry_the_watermark_and_others_do_not(tmp_path: Path):
    fig, table = _draw_sweep()
    smoke = plots.save(fig, tmp_path / "smoke" / "fig03_x.png", table, command="same")
    quick = plots.save(fig, tmp_path / "quick" / "fig03_x.png", table, command="same")
    marked, clean = (np.asarray(Image.open(p).convert("RGB")).astype(int) for p in (smoke, quick))
    changed = np.abs(marked - clean).sum(axis=2) > 0
    assert 0.005 < changed.mean() < 0.3
    assert not fig.texts or all(t.get_text() != plots.WATERMARK for t in fig.texts)


def test_the_csv_holds_the_plotted_numbers(tmp_path: Path):
    fig, table = _draw_sweep(n_seeds=1)
    path = plots.save(fig, tmp_path / "quick" / "fig03_x.png", table)
    written = pd.read_csv(path.with_suffix(".csv"))
    mean = written[written["seed"].isna()]
    lines = [line.get_xydata() for line in fig.axes[0].lines]
    expected = mean[["x", "value"]].to_numpy()
    assert any(len(line) == len(expected) and np.allclose(line, expected) for line in lines)


def test_save_refuses_anything_but_a_table_of_numbers(tmp_path: Path):
    fig, _ = _draw_sweep()
    with pytest.raises(ValueError, match="DataFrame"):
        plots.save(fig, tmp_path / "fig03_x.png", [1, 2])


def test_a_missing_column_is_named():
    _, axes = plots.make_figure()
    with pytest.raises(ValueError, match="low, high missing"):
        plots.draw_sweep(axes[0, 0], pd.DataFrame({"x": [1], "value": [0.5]}), xlabel="x")


def test_roc_is_log_log_from_one_over_the_strangers_with_a_chance_line():
    _, axes = plots.make_figure()
    fpr = np.geomspace(0.001, 1, 20)
    table = pd.DataFrame({"fpr": fpr, "tpr": np.sqrt(fpr), "tpr_low": fpr, "tpr_high": 1.0, "attack": "partcrop"})
    plots.draw_roc(axes[0, 0], table, n_nonmembers=1000)
    ax = axes[0, 0]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlim()[0] == pytest.approx(0.001)
    chance = ax.lines[0].get_xydata()
    assert np.allclose(chance[:, 0], chance[:, 1])
    assert ax.collections  # the shaded interval


def test_histograms_of_each_class_sum_to_one_and_wrong_shapes_raise():
    rng = np.random.default_rng(0)
    table = plots.count_scores(rng.normal(size=100), np.arange(100) < 30)
    assert table["member"].sum() == pytest.approx(1) and table["stranger"].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="one shape"):
        plots.count_scores(np.zeros(3), np.zeros(4))


def test_picture_panels_return_their_numbers():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    fig, table = plots.draw_guess_grid(images)
    assert len(table) == 20 and table["is_member"].isna().all()
    is_member, score = np.arange(20) % 2 == 0, rng.random(20)
    _, table = plots.draw_guess_grid(
        images, is_member=is_member, score=score, guess=is_member, image_ids=[f"i{k}" for k in range(20)]
    )
    assert np.allclose(table["score"], score) and table["is_member"].sum() == 10
    maps = rng.random((2, 3, 4, 4))
    _, table = plots.draw_part_responses(
        images[:2],
        np.array([[1, 1, 4, 4], [2, 2, 6, 6]]),
        maps,
        ["member", "stranger"],
        names=["mae", "dino", "moco"],
        title="t",
        is_member=[True, False],
    )
    assert np.allclose(table["response"], maps.ravel())
    history = pd.DataFrame({"epoch": [0, 10], "loss_members": [1.0, 0.1], "loss_heldout": [1.0, 0.5]})
    reconstructions = np.repeat(images[:2, None] / 255.0, 2, axis=1)
    fig, table = plots.draw_reconstructions(images[:2], reconstructions, history, epochs=[0, 10], title="t")
    assert set(table["kind"]) == {"loss", "picture"}
    assert np.allclose(table.loc[table["kind"] == "picture", ["error_member", "error_stranger"]], 0)
    _, table = plots.draw_similarity_maps(
        images[0], [0, 0, 4, 4], [maps[0, 0], maps[0, 1, :2, :2]], names=["mae", "supervised"], title="t"
    )
    assert len(table) == 16 + 4
    _, table = plots.draw_pipeline(
        [
            ("image", images[0], "a", "encoder"),
            plots.Step("crops", list(images[:9])),
            {"title": "score", "content": ".87"},
        ],
        title="t",
    )
    assert list(table["shape"]) == ["8x8x3", "9x8x8x3", ""]


def test_panels_refuse_what_does_not_fit_together():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="expected 2 images, boxes and labels and 3 names, got 2, 2, 1, 3"):
        plots.draw_part_responses(
            images, np.zeros((2, 4)), np.zeros((2, 3, 4, 4)), ["one"], names=["a", "b", "c"], title="t"
        )
    with pytest.raises(ValueError, match="one name per map"):
        plots.draw_similarity_maps(images[0], [0, 0, 1, 1], [np.zeros((2, 2))], names=[], title="t")

"""Each kind of plot once: it draws every row it is given, keeps its numbers beside it, and writes unchanged bytes."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mia_utils import paths, plots, say
from mia_utils.plots import style


def make_table(n_seeds=1):
    rows = []
    for method, base in (("mae", 0.8), ("simclr", 0.3)):
        for n, gain in ((1, 0.0), (4, 0.05), (16, 0.06)):
            for control, auc in (("", base + gain), ("no-model", 0.5)):
                seeds = [None] if n_seeds == 1 else [None, *range(n_seeds)]
                for seed in seeds:
                    value = auc + (0.01 * (seed - 1) if seed is not None else 0)
                    rows.append(dict(attack="mim", control=control, target=f"{method}-target", method=method, n_masks=n,
                                     shadow_method="mae", seed=seed, n_seeds=n_seeds, auc=value, auc_low=value - 0.05,
                                     auc_high=value + 0.05, verdict="shown" if value > 0.6 else "reversed", key="k",
                                     n_members=40, n_nonmembers=100, utility=0.3 + n / 100, defense="noise"))  # fmt: skip
    return pd.DataFrame(rows).astype({"seed": float})


class Lab:
    def scores(self, row):
        from mia_utils.protocol.result import Result

        rng = np.random.default_rng(0)
        is_member, fold = np.arange(140) < 40, np.zeros(140, int)
        scores = [rng.normal(size=140) + shift * is_member for shift in (1.0, 0.0)]
        attack, control = (Result("mim", score=score, is_member=is_member, fold=fold) for score in scores)
        attack.controls = {"no-model": control}
        return [attack]


KINDS = {
    "sweep": lambda t: plots.sweep(t, x="n_masks", panel="method", log=True, title=say.plateau(t, "n_masks"), name="fig04_sweep"),
    "dots": lambda t: plots.dots(t, label="target", title="Dots", name="fig04_dots"),
    "matrix": lambda t: plots.matrix(t, row="n_masks", column="method", title="Matrix", name="fig04_matrix"),
    "plane": lambda t: plots.plane(t, x="utility", hue="defense", color=lambda n: plots.DEFENSES[n][1], label="n_masks", title="Plane", name="fig04_plane"),
    "roc": lambda t: plots.roc(t, lab=Lab(), panel="method", title="Curves", name="fig04_roc"),
    "histogram": lambda t: plots.histogram(t, lab=Lab(), panel="method", title="Scores", name="fig04_histogram"),
}  # fmt: skip


@pytest.fixture
def book(home, monkeypatch):
    monkeypatch.setattr(style, "_book", "quick")
    monkeypatch.setitem(style.STYLE, "savefig.dpi", 100)  # half the time
    return paths.get_figures_dir("quick")


@pytest.mark.parametrize("n_seeds", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_draws_writes_and_repeats_itself(book, kind, n_seeds):
    drawn = KINDS[kind](make_table(n_seeds))
    png, csv = book / f"fig04_{kind}.png", book / f"fig04_{kind}.csv"
    first = png.read_bytes(), csv.read_bytes()
    KINDS[kind](make_table(n_seeds))
    assert (png.read_bytes(), csv.read_bytes()) == first
    with Image.open(png) as image:
        assert image.info["Title"] == drawn.title and image.width > 300
    assert len(pd.read_csv(csv)) == len(drawn.table) > 0


@pytest.mark.parametrize("kind", ["sweep", "dots", "plane"])
def test_every_row_is_in_the_numbers_beside_the_figure(book, kind):
    table = make_table(3)
    kept = pd.read_csv(KINDS[kind](table).path.with_suffix(".csv"))
    assert sorted(kept["value"].round(6)) == sorted(table["auc"].round(6))
    assert {"low", "high", "control", "seed"} <= set(kept)


def test_an_empty_query_is_one_line(book):
    with pytest.raises(ValueError, match="expected rows of lab.results to draw, got none"):
        KINDS["dots"](make_table().iloc[:0])


def test_what_a_notebook_shows_has_alternative_text_and_the_answer(book):
    table = make_table()
    expect = say.rises("more masks, less noise: AUC rises")
    one = table[table["method"] == "mae"]
    drawn = plots.sweep(one, x="n_masks", title="A finding & more", expect=expect, name="fig04_x", paper="MIM: masks")
    bundle = drawn._repr_mimebundle_()
    assert 'alt="A finding &amp; more"' in bundle["text/html"] and "base64" in bundle["text/html"]
    assert (
        bundle["text/markdown"].startswith("![A finding & more](../figures/quick/fig04_x.png)")
        and "*Here:*" in bundle["text/markdown"]
    )
    with Image.open(drawn.path) as image:
        assert image.info["Paper"] == "MIM: masks" and "intervals overlap" in image.info["Here"]


def test_reversed_and_chance_have_different_colors():
    from mia_utils.plots.kinds import _DIVERGING

    low, half, high = (np.array(_DIVERGING(v)[:3]) for v in (0.13, 0.5, 0.87))
    assert np.abs(low - half).max() > 0.3 and np.abs(low - high).max() > 0.3


def test_an_image_grid_takes_images_and_maps(book):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (8, 8, 3), np.uint8)
    cells = [[image, rng.random((4, 4)), rng.random((4, 4)).tolist()], [image / 255.0, None]]
    drawn = plots.image_grid(cells, title="Cells", columns=list("abc"), rows=["one", "two"], arrows=list("wx"), name="fig03_grid",
                             members=[[True, None, False], [None] * 3], boxes=[[(1, 1, 5, 5), None, None], [None] * 3])  # fmt: skip
    assert len(drawn.table) == 4 and set(drawn.table["shape"]) == {"8x8x3", "4x4"}


def test_smoke_figures_carry_a_watermark(book, monkeypatch):
    plain = plots.dots(make_table(), label="target", title="t").png
    monkeypatch.setattr(style, "_book", "smoke")
    assert plots.dots(make_table(), label="target", title="t").png != plain


def test_attack_colors_differ_and_numbers_are_dark():
    colors = [color for _, color in style.ATTACKS.values()]
    assert len(set(colors)) == len(colors) and style.color_of("a new attack") in style._SPARE


@pytest.mark.parametrize(
    ("value", "text"), [(0.807, ".81"), (1.0, "1.00"), (-0.5, "-.50"), (None, ""), (float("nan"), "")]
)
def test_numbers_are_printed_without_a_leading_zero(value, text):
    assert plots.format_value(value) == text


def test_targets_are_named_by_what_tells_them_apart():
    base = dict(arch="vit_micro_patch8_32", dataset="cifar10", n_train=128, epochs=2500)
    rows = [("mae-target", "mae", "none"), ("mae-crop-target", "mae", "crop"), ("dino-target", "dino", "dino")]
    table = pd.DataFrame([base | dict(target=t, method=m, augmentation=a) for t, m, a in [*rows, rows[0]]])
    names = ["MAE, whole images", "MAE, strong crops", "DINO", "MAE, whole images"]
    assert plots.name_targets(table).tolist() == names
    assert plots.name_targets(table.iloc[[0, 2]]).tolist() == ["MAE", "DINO"]

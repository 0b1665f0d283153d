"""Figures of notebook 05, drawn from made-up scores: every setting, its controls, the paper's numbers, the claims."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_lab import MadeUpLab

from mia_utils import figures, plots
from mia_utils.figures import encodermi

VIEWS = {"n_views": 10, "augmentation": "simclr-weak", "measure": "cosine", "pooling": "auto"}
FROM_SCORES = sorted(n for n, f in figures.FIGURES.items() if f.notebook == "05_encodermi" and not f.from_table)


def add_settings(lab: MadeUpLab, method: str, auc: float, *, letters=encodermi.SETTINGS, drop: float = 0.02) -> None:
    """The knowledge study of one target; only the setting with everything known has its controls."""
    for k, known in enumerate(letters):
        tags = ("fig05_knowledge", "fig05_variants") if known == "PET" else ("fig05_knowledge",)
        facts = {"knowledge": f"shadow:{known}", "shadow": f"shadow-{k}-s0", "summary": False, "method": method}
        for attack in encodermi.ATTACKS[:3]:
            result = lab.add(auc - drop * k, *tags, attack=attack, params=VIEWS, **facts)
            if known != "PET":
                result.controls.clear()


def make_lab() -> MadeUpLab:
    lab = MadeUpLab()
    add_settings(lab, "moco-v2", 0.7)
    add_settings(lab, "simclr", 0.8, letters=("PET", "---"))
    for attack in encodermi.ATTACKS:
        tags = ("fig05_variants", "fig05_baselines", *(["fig05_similarities"] if attack == "encodermi-t" else []))
        lab.add(0.8, *tags, attack=attack, method="simclr", params={"p": 2.0} if attack == "lpla" else VIEWS)
    sweep = {"method": "simclr", "attack": "encodermi-t", "summary": False}
    for number in (2, 30):
        lab.add(0.6, "fig05_views", params=VIEWS | {"n_views": number}, **sweep)
    for measure in ("cosine", "pearson"):
        lab.add(0.6, "fig05_measure", params=VIEWS | {"measure": measure}, **sweep)
    for query in ("flip", "simclr"):
        lab.add(0.6, "fig05_augmentation", params=VIEWS | {"augmentation": query}, augmentation="simclr-weak", **sweep)
    for share in (0.25, 1.0):
        lab.add(0.6, "fig05_n_train", params=VIEWS, known_share=share, **sweep)
    return lab


def read_title(fig) -> str:
    return " ".join(fig._suptitle.get_text().split())


@pytest.fixture(scope="module")
def lab():
    return make_lab()


@pytest.mark.parametrize("name", FROM_SCORES)
def test_it_is_drawn_with_the_no_model_control_beside(lab, home, name):
    path = figures.draw(name, lab)
    assert path.stat().st_size > 2000
    assert (pd.read_csv(path.with_suffix(".csv"))["control"] == "no-model").any()


def test_the_table_holds_every_setting_and_the_papers_numbers_once(lab):
    _, table = figures.FIGURES["fig05_knowledge"].draw(lab)
    ours = table[(table["control"] == "") & table["paper_data"].isna() & table["seed"].isna()]
    assert len(ours) == (8 + 2) * 3 and set(ours["setting"]) == set(encodermi.SETTINGS)
    assert ours[["accuracy", "precision", "recall", "value"]].notna().all(axis=None)
    paper = table[table["paper_data"].notna()]
    assert len(paper) == len(encodermi.PAPER) and set(paper["attack"]) == {"encodermi-v"}
    assert paper["target"].nunique() == 1 and paper["value"].isna().all()  # beside ours, never among them
    assert (ours["knows_data"].astype(bool) == ours["setting"].str.contains("P")).all()


def test_precision_weighs_members_and_strangers_alike(lab):
    (entry,) = figures.group(lab.results("fig05_knowledge")[:1])
    got = encodermi._measure_at_threshold(entry.metrics)
    tpr, fpr = (entry.metrics.at_threshold[key][0] for key in ("tpr", "fpr"))
    assert got["precision"] == pytest.approx(tpr / (tpr + fpr)) and got["recall"] == pytest.approx(tpr)
    assert got["accuracy"] == pytest.approx(entry.metrics.balanced_accuracy)


def test_a_profile_with_few_shadows_draws_what_it_has_and_says_so():
    lab = MadeUpLab()
    add_settings(lab, "moco-v2", 0.7, letters=("PET",))
    fig, _ = figures.FIGURES["fig05_knowledge"].draw(lab)
    assert any("1 of 8 settings" in text.get_text() for text in fig.axes[0].texts)


def test_a_turned_ranking_is_in_the_title():
    lab = MadeUpLab()
    add_settings(lab, "moco-v2", 0.7, letters=("PET", "---"), drop=0.5)
    fig, _ = figures.FIGURES["fig05_knowledge"].draw(lab)
    assert "turned around" in read_title(fig)


@pytest.mark.parametrize(
    ("auc", "blind", "claims", "void"),
    [
        (0.85, 0.5, True, False),
        (0.85, 0.75, True, False),  # p of .03: not rejected, and the attack stands clear of it
        (0.7, 0.75, False, False),  # not rejected, but no better than the pictures alone
        (0.85, 0.95, False, True),
    ],
)
def test_nothing_is_claimed_on_a_target_whose_pictures_alone_tell(auc, blind, claims, void):
    lab = MadeUpLab()
    known = {"knowledge": "shadow:PET", "shadow": "shadow-s0", "attack": "encodermi-v", "method": "simclr"}
    lab.add(auc, "fig05_variants", params=VIEWS, blind=blind, **known)
    fig, _ = figures.FIGURES["fig05_variants"].draw(lab)
    title = read_title(fig)
    assert ("no attack is shown" in title) == (not claims)
    assert ("no-model row" in title) == void


def test_the_hero_shows_squares_of_similarities_and_the_settings(lab):
    rows = encodermi.make_setting_rows(lab)
    lines = list(dict.fromkeys(rows["label"]))
    assert lines == [encodermi.name_setting(s) for s in encodermi.SETTINGS] + ["untrained", "no model"]
    assert set(encodermi.make_setting_rows(lab, model="simclr-target")["method"]) == {"simclr"}
    rng = np.random.default_rng(0)
    pictures, views = rng.random((2, 8, 8, 3)), rng.random((2, 10, 8, 8, 3))
    fig, table = plots.draw_views(pictures, views, rng.random((2, 10, 10)), rows, title="finding")
    assert (table["part"] == "similarity").sum() == 200 and (table["part"] == "setting").sum() == len(rows)
    assert len(fig.legends) == 1  # two targets: their marks are named
    with pytest.raises(ValueError, match="expected 2 pictures"):
        plots.draw_views(pictures[:1], views, rng.random((2, 10, 10)), rows, title="finding")


def test_a_table_of_texts_puts_columns_under_their_headings():
    _, axes = plots.make_figure()
    cells = pd.DataFrame({"row": ["a", "b"], "column": ["V|AUC"] * 2, "text": [".9", ".5"], "shade": [0.9, np.nan]})
    plots.draw_cells(axes[0, 0], cells, widths={"name": 1.0, "V|AUC": 1.0, "V|recall": 1.0}, n_head=1)
    texts = [text.get_text() for text in axes[0, 0].texts]
    assert texts.count("V") == 1 and {"AUC", "recall", "name", ".9"} <= set(texts) and len(axes[0, 0].patches) == 1


def test_an_owners_table_is_drawn_again_from_its_csv(home, lab):
    (result,) = lab.results("fig05_similarities")
    table = encodermi.make_set_table(result, 20, n_draws=5, n_permutations=99)
    assert set(table["kind"]) == {"observed", "draws", "dealt", "control"}
    assert table.loc[table["kind"] == "dealt", "value"].sum() == pytest.approx(1)
    observed = table[table["kind"] == "observed"].set_index("group")
    assert observed.loc["members", "value"] < 0.01 < observed.loc["strangers", "value"]
    before = Path(figures.draw("fig05_test_set", lab, data=table)).read_bytes()
    assert Path(figures.draw("fig05_test_set", lab)).read_bytes() == before  # names survive the CSV
    with pytest.raises(ValueError, match="set of 100 pictures"):
        encodermi.make_set_table(result, 100)


def test_tables_measured_in_the_notebook_are_drawn(home, lab):
    row = {"method": "simclr", "control": "", "low": 0.5, "high": 0.7, "seed": np.nan}
    steps = [row | {"target": "SimCLR", "x": x, "attack": "encodermi-t", "value": 0.6} for x in (0, 10, 40)]
    steps += [row | {"target": "SimCLR", "x": x, "attack": "probe", "value": 0.4} for x in (0, 10, 40)]
    steps.append(row | {"target": "SimCLR", "x": 40, "attack": "encodermi-t", "control": "no-model", "value": 0.5})
    assert figures.draw("fig05_epochs", lab, data=pd.DataFrame(steps)).is_file()
    line = row | {"label": "no model", "attack": "encodermi-t", "value": 0.6}
    lines = [line | {"audit": a, "verdict": v} for a, v in (("one source", "sound"), ("B brightened", "void"))]
    fig, _ = figures.FIGURES["fig05_audit"].draw(pd.DataFrame(lines))
    assert "one source is sound; B brightened is void" in read_title(fig)


@pytest.mark.parametrize("p, text", [(0.42, ".42"), (0.043, ".043"), (0.0001, ".0001")])
def test_a_small_p_value_is_never_printed_as_zero(p, text):
    assert encodermi.format_p(p) == text

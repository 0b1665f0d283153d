"""Tests of the figure registry: grouping over seeds, drawing from scores, replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_lab import MadeUpLab, make_lab, make_result

from mia_utils import figures, paths
from mia_utils.protocol import metrics


def _make_part_table() -> pd.DataFrame:
    x = np.arange(8)
    rows = [
        pd.DataFrame(
            {"method": "mae", "group": g, "x": x, "value": v - x / 9, "low": v - 0.05 - x / 9, "high": v + 0.05 - x / 9}
        )
        for g, v in (("member", 1.0), ("stranger", 0.8))
    ]
    return pd.concat(rows, ignore_index=True)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Every registered figure, drawn once for the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("figures home")
        patch.setenv("MIA_HOME", str(home))
        lab = make_lab()
        figures.draw("fig03_response_curves", lab, data=_make_part_table())
        losses = pd.DataFrame({"method": "mae", "epoch": [0, 10], "loss_members": [1, 0.1], "loss_heldout": [1, 0.5]})
        figures.draw("fig01_losses", lab, data=losses)
        table = figures.draw_all(lab)
        yield lab, table, home


def covers(name):
    """The made-up lab serves these notebooks; the figures of 04 and 05 have tests of their own."""
    return figures.FIGURES[name].notebook[:2] in ("00", "01", "02", "03", "08")


def test_every_registered_figure_is_drawn_with_its_csv(drawn):
    _, table, _ = drawn
    assert list(table["figure"]) == list(figures.FIGURES)
    table = table[[covers(name) for name in table["figure"]]]
    assert (table["note"] == "").all(), table[table["note"] != ""]
    for path in map(Path, table["path"]):
        assert path.stat().st_size > 2000 and len(pd.read_csv(path.with_suffix(".csv"))) > 0


def test_redrawing_gives_the_same_bytes(drawn, monkeypatch):
    lab, table, home = drawn
    monkeypatch.setenv("MIA_HOME", str(home))
    for name in ("fig03_roc", "fig03_crop_scale", "fig03_response_curves", "fig08_hero"):
        path = Path(table.set_index("figure").loc[name, "path"])
        before = path.read_bytes(), path.with_suffix(".csv").read_bytes()
        figures.draw(name, lab)
        assert (path.read_bytes(), path.with_suffix(".csv").read_bytes()) == before, name


def test_the_csv_of_a_figure_is_what_the_metrics_say(drawn):
    lab, table, _ = drawn
    written = pd.read_csv(Path(table.set_index("figure").loc["fig03_table", "path"]).with_suffix(".csv"))
    row = written[(written["method"] == "mae") & (written["control"].isna()) & written["seed"].isna()].iloc[0]
    results = [r for r in lab.results("fig03_roc") if r.meta["method"] == "mae"]
    expected = metrics.combine([(r.score, r.is_member, r.fold, None, r.threshold) for r in results])
    assert row["value"] == pytest.approx(expected.auc, rel=1e-5)
    assert row["low"] == pytest.approx(expected.auc_low, rel=1e-5)
    seeds = written[(written["method"] == "mae") & written["control"].isna() & written["seed"].notna()]
    assert sorted(seeds["value"]) == pytest.approx(sorted(expected.per_seed), rel=1e-5)


def test_every_score_based_figure_shows_the_no_model_control(drawn):
    _, table, _ = drawn
    for row in table.itertuples():
        if figures.FIGURES[row.figure].from_table or row.figure == "fig02_blind_ladder" or not covers(row.figure):
            continue
        written = pd.read_csv(Path(row.path).with_suffix(".csv"))
        assert (written["control"] == "no-model").any(), row.figure


def test_seeds_are_combined_and_everything_else_is_told_apart():
    lab = MadeUpLab()
    for seed in (0, 1, 2):
        lab.add(0.8, seed=seed)
    lab.add(0.8, params={"n_crops": 128})
    lab.add(0.8, knowledge="shadow:PE-", shadow_method="dino")
    lab.add(0.8, model_id="mae-crop-target-s0")
    entries = figures.group(lab.saved)
    assert [e.metrics.n_seeds for e in entries] == [3, 1, 1, 1]
    assert entries[0].seeds == [0, 1, 2] and entries[0].meta["model"] == "mae-target"
    assert entries[0].controls["no-model"].metrics.n_seeds == 3
    assert entries[0].metrics.auc == pytest.approx(np.mean([r.auc for r in lab.saved[:3]]))


def test_two_different_results_of_one_seed_are_an_error_and_equal_ones_are_one():
    one = make_result("partcrop", 0.8, 1)
    assert len(figures.group([one, make_result("partcrop", 0.8, 1)])) == 1
    with pytest.raises(ValueError, match="seed 0, differ"):
        figures.group([one, make_result("partcrop", 0.8, 2)])


def test_a_control_that_could_not_be_run_is_left_out_with_its_reason():
    lab = MadeUpLab()
    result = lab.add(0.8)
    result.controls["untrained"] = type(result)("partcrop", "untrained", meta=result.meta | {"reason": "no twin"})
    (entry,) = figures.group(lab.saved)
    assert entry.controls["untrained"].metrics is None and entry.controls["untrained"].reason == "no twin"
    assert all(r["control"] != "untrained" for r in figures.make_rows(entry, controls=("untrained",)))


def test_a_figure_without_results_says_what_it_needs_and_the_others_go_on(home):
    lab = MadeUpLab()
    lab.add(0.8, "fig03_crop_number")
    with pytest.raises(figures.NotAvailable, match="a target and a shadow for at least two methods.*photos"):
        figures.draw("fig03_transfer", lab)
    table = figures.draw_all(lab).set_index("figure")
    assert table.loc["fig03_crop_number", "path"] and not table.loc["fig03_transfer", "path"]
    assert "fig03_response_curves.csv" in table.loc["fig03_response_curves", "note"]
    assert not (paths.get_figures_dir("quick") / "fig03_transfer.png").exists()


def test_an_unknown_figure_is_named():
    with pytest.raises(ValueError, match="unknown figure 'fig99_x'"):
        figures.draw("fig99_x", MadeUpLab())


def test_titles_follow_the_numbers(home):
    titles = []
    for auc in (0.95, 0.5):
        lab = MadeUpLab()
        lab.add(auc, "fig03_roc")
        fig, _ = figures.FIGURES["fig03_roc"].draw(lab)
        titles.append(" ".join(fig._suptitle.get_text().split()))
    assert titles[0].startswith("PartCrop tells members from strangers on MAE")
    assert "not shown" in titles[1]


def test_an_attack_from_outside_gets_its_row_in_the_grid(home):
    lab = make_lab()
    lab.add(0.7, attack="my-own-attack", params={})
    written = pd.read_csv(figures.draw("fig08_hero", lab).with_suffix(".csv"))
    assert (written["attack"] == "my-own-attack").any()
    assert {"no-model", "untrained", "permuted"} <= set(written["control"].dropna())
    assert not written.duplicated(["row", "column", "seed"]).any()  # one control of each kind and target

"""The results table: what is one experiment over seeds, and what the one rule says of it; made from rows alone."""

import numpy as np
import pytest

from mia_utils import results
from mia_utils.protocol.result import Result


def row(seed=0, control="", auc=0.7, low=None, high=None, key=None, **facts):
    low, high = auc - 0.05 if low is None else low, auc + 0.05 if high is None else high
    p = 1e-9 if low > 0.5 or high < 0.5 else 0.6
    base = dict(
        attack="partcrop", target="mae-target", model_id=f"mae-target-s{seed}", protocol="controlled", split=f"s{seed}"
    )
    base |= dict(
        seed=seed, control=control, auc=auc, auc_low=low, auc_high=high, auc_se=0.02, p=p, minimum_detectable=0.55
    )
    return base | dict(key=key or f"k{seed}", utility=0.4 + seed / 100) | facts


def merge(keys, control):
    return dict(auc=0.7, auc_low=0.6, auc_high=0.8, auc_se=0.03, p=0.001, minimum_detectable=0.56)


def table_of(rows, studies=None):
    return results.tabulate(rows, studies or {"main": list(dict.fromkeys(r["key"] for r in rows))}, merge)


def test_the_utility_of_the_end_is_not_said_of_an_earlier_checkpoint():
    ages = [row(key=str(age), checkpoint=age, epochs=500) for age in (100, 500)]
    ages.append(row(key="stopped", checkpoint=100, epochs=500, defense="early-stopping", strength=100))
    assert table_of(ages)["utility"].isna().tolist() == [True, False, False]


def test_seeds_of_one_experiment_are_one_row_with_the_seeds_below():
    table = table_of([row(s) for s in range(3)])
    assert table["n_seeds"].tolist() == [3, 1, 1, 1] and table["seed"].isna().tolist() == [True, False, False, False]
    assert table["auc_low"].iloc[0] == 0.6 and table["utility"].iloc[0] == pytest.approx(0.41)


@pytest.mark.parametrize(
    "facts", [dict(n_crops=8), dict(checkpoint=150), dict(decoder="attacker"), dict(defense="noise")]
)
def test_any_other_fact_is_another_experiment(facts):
    assert len(table_of([row(0), row(0, key="k9", **facts)])) == 2


@pytest.mark.parametrize("empty", [None, float("nan")])
def test_an_empty_fact_is_one_fact_however_it_was_written(empty):
    table = table_of([row(0), row(1, strength=empty)])
    assert table["n_seeds"].tolist() == [2, 1, 1]


def test_one_evaluation_asked_for_twice_stands_once():
    assert len(table_of([row(0), row(0, key="again")])) == 1


VERDICTS = [
    ("shown", row(auc=0.7), row(control="no-model", auc=0.5)),
    ("not shown", row(auc=0.52), row(control="no-model", auc=0.5)),
    ("reversed", row(auc=0.3), row(control="no-model", auc=0.5)),
    ("invalid", row(auc=0.9), row(control="no-model", auc=0.75)),  # rejected by its family
    ("not shown", row(auc=0.7, clear=False), row(control="no-model", auc=0.56, low=0.51, high=0.61, p=0.03)),
    ("shown", row(auc=0.7, clear=True), row(control="no-model", auc=0.56, low=0.51, high=0.61, p=0.03)),
]


@pytest.mark.parametrize(("verdict", "attack", "blind"), VERDICTS)
def test_the_verdict_is_that_of_the_one_rule(verdict, attack, blind):
    blind["p"] = blind.get("p", 0.6) if blind["auc"] < 0.6 else 1e-9
    assert table_of([attack, blind])["verdict"].iloc[0] == verdict


def test_a_row_without_controls_is_judged_by_the_no_model_row_of_its_split():
    """An attacker without a model is the same at every epoch and setting: it is run once."""
    blind = row(control="no-model", auc=0.57, low=0.5, high=0.64, study="grid")
    young = row(auc=0.56, low=0.51, high=0.61, key="young", checkpoint=31)
    other = row(1, auc=0.56, low=0.51, high=0.61, key="other", checkpoint=31)
    table = table_of([row(), blind, young, other]).set_index("key")
    assert table.loc["young", "verdict"] == "not shown" and table.loc["other", "verdict"] == "shown"


def test_merged_numbers_follow_their_rows(tmp_path, monkeypatch):
    """Controls that come later change a verdict: what was merged without them is not used again."""
    monkeypatch.setenv("MIA_HOME", str(tmp_path))
    rng, store = np.random.default_rng(0), results.Store("tiny")
    side, keys = np.arange(400) < 200, ["a", "b", "c"]

    def save(shift):
        for key in keys:
            result = Result("mim", "", rng.normal(size=400) + shift * side, side, image_ids=np.arange(400).astype(str))
            store.save(key, result, results.make_rows(result, {"seed": 0, "attack": "mim"}))

    save(0.5)
    first = store.merge(keys, "")
    assert store.merge(keys, "") == first and len(list(store.folder.glob("merged-*.json"))) == 1
    save(1.0)
    assert store.merge(keys, "")["auc"] > first["auc"] + 0.05


def test_no_two_rows_agree_and_nothing_measured_is_an_empty_table():
    rows = [row(s, control=c) for s in range(2) for c in ("", "no-model", "untrained")]
    table = table_of(rows, {"a": ["k0", "k1"], "b": ["k0"]})
    assert not table.duplicated(["study", "control", "seed"]).any()
    assert results.tabulate([], {}, merge).empty


def test_a_seed_is_dropped_from_a_name_at_its_end_only():
    assert results.drop_seed("mae-s1-target-s0", 0) == "mae-s1-target" and results.drop_seed(None, 0) is None


def test_lists_among_parameters_read_as_ranges():
    from mia_utils.protocol.result import Result

    rng = np.random.default_rng(0)
    one = Result("partcrop", score=rng.random(60), is_member=np.arange(60) < 20, fold=np.zeros(60, int), meta={})
    one.meta = {"params": {"crop_scale": (0.08, 0.2), "epochs": 5}, "queries": 9, "split": "x"}
    (made,) = results.make_rows(one, {"attack": "partcrop", "seed": 0})
    assert made["crop_scale"] == "0.08-0.2" and made["attacker_epochs"] == 5 and "epochs" not in made

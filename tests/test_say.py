"""Sentences come from the rows: they change with them, claim nothing the one rule does not, and stay short."""

import pandas as pd
import pytest

from mia_utils import say


def make(rows):
    base = dict(
        control="",
        seed=None,
        attack="partcrop",
        method="mae",
        shadow_method="mae",
        checkpoint=10,
        n_masks=1,
        verdict="shown",
    )
    frame = pd.DataFrame([base | dict(auc_low=r["auc"] - 0.04, auc_high=r["auc"] + 0.04) | r for r in rows])
    return frame.astype({"seed": float})


UP = make([dict(n_masks=1, auc=0.6), dict(n_masks=4, auc=0.7), dict(n_masks=64, auc=0.72)])
FLAT = make([dict(n_masks=1, auc=0.70), dict(n_masks=64, auc=0.72)])
PROBES = make([dict(p="a", auc=0.93), dict(p="b", auc=0.96), dict(p="c", auc=0.55)])
NONE = make([dict(n_masks=n, auc=0.51, verdict="not shown") for n in (1, 64)])


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        (say.plateau(UP, "n_masks"), "4 masks are enough: AUC .70; 64 give .72"),
        (say.plateau(NONE, "n_masks"), "No leak shown at any number of masks: AUC .51 to .51"),
        (say.best(make([dict(auc=0.9), dict(auc=0.6, attack="mim")])), "PartCrop is ahead: AUC .90; next MIM attack .60"),
        (say.best(make([dict(auc=0.9), dict(auc=0.88, attack="mim")])), "PartCrop and MIM attack lead together: AUC .90 and .88"),
        (say.best(make([dict(auc=0.5, verdict="not shown")])), "No leak shown: PartCrop comes to AUC .50"),
        (say.shown(make([dict(auc=0.9), dict(auc=0.5, method="dino", verdict="not shown")])), "PartCrop finds members of MAE, not of DINO"),
        (say.shown(make([dict(auc=0.2, verdict="reversed")])), "PartCrop: no leak shown on MAE"),
        (say.grows(make([dict(checkpoint=5, auc=0.5, verdict="not shown"), dict(checkpoint=50, auc=0.9)])), "Leak first shown at 50 epochs: AUC .90"),
        (say.grows(make([dict(checkpoint=5, auc=0.5, verdict="not shown"), dict(checkpoint=50, auc=0.8), dict(checkpoint=99, auc=0.9)])), "Leaks shown from 50 epochs on; AUC .90 at 99"),
        (say.grows(make([dict(checkpoint=2, auc=0.9), dict(checkpoint=5, auc=0.5, verdict="not shown")])), "Leak shown at 2, not at 5 epochs: AUC .50"),
        (say.grows(NONE, "n_masks", "masks", "MAE"), "MAE: no leak shown up to 64 masks: AUC .51"),
        (say.transfer(make([dict(auc=0.9), dict(auc=0.13, method="simclr", verdict="reversed")])), "The attack does not transfer: mean AUC .90 from its own kind of shadow, .13 from others"),
        (say.transfer(make([dict(auc=0.9), dict(auc=0.8, method="simclr"), dict(auc=0.13, method="dino", verdict="reversed")])), "Transfer depends on the pair of methods: AUC .13 to .80 from another kind of shadow"),
        (say.shown(make([dict(auc=0.9), dict(auc=0.9, attack="partcrop-v2")])), "PartCrop and PartCrop-v2 find members of MAE"),
        (say.found(make([dict(auc=0.9, tpr_at_1=0.67), dict(auc=0.5, method="dino", tpr_at_1=0.01)])), "At 1 % FPR .67 of MAE's members are found, .01 of DINO's"),
        (say.found(make([dict(auc=0.9, tpr_at_1=0.97, attack="mim"), dict(auc=0.9, tpr_at_1=0.67)]), "attack"), "Found at 1 % FPR: MIM attack .97, PartCrop .67"),
        (say.span(make([dict(p="wide", auc=0.92, auc_low=0.7, auc_high=1.0), dict(p="narrow", auc=0.9), dict(p="low", auc=0.61, auc_low=0.5, auc_high=0.73)]), "p"), "AUC .90 with narrow, .61 with low"),
        (say.span(make([dict(p="wide", auc=0.92, auc_low=0.7, auc_high=1.0), dict(p="low", auc=0.9)]), "p"), "No choice is clearly better, AUC .90 to .92"),
        (say.found(make([dict(auc=0.9, tpr_at_1=0.67, tpr_at_01=0.31)])), "At .1 % FPR .31 of MAE's members are found"),
        (say.found(make([dict(auc=0.9, tpr_at_1=None, tpr_at_10=0.8)])), "At 10 % FPR .80 of MAE's members are found"),
        (say.found(make([dict(auc=0.9)])), "Too few non-members to say how many members are found at a low false positive rate"),
        (say.versus(PROBES, "p == 'a'", "p == 'b'", ("Random vectors", "own parts")), "Random vectors and own parts are not told apart: AUC .93 and .96"),
        (say.versus(PROBES, "p == 'c'", "p == 'b'", ("another image's tokens", "own parts")), "Own parts beat another image's tokens: AUC .96 against .55"),
        (say.versus(PROBES, "p == 'd'", "p == 'b'", ("Noise", "own parts")), "Noise against own parts: not both in this profile"),
    ],
)  # fmt: skip
def test_a_title_says_what_the_rows_say(sentence, said):
    assert sentence == said and len(sentence) <= 90


@pytest.mark.parametrize(
    ("gap", "title", "word"),
    [
        ((0.03, 0.01, 0.05), "Random vectors beat own parts: AUC .96 against .93", "met"),
        ((0.03, -0.01, 0.07), "Random vectors and own parts are not told apart: AUC .96 and .93", "no difference shown"),
        ((-0.03, -0.05, -0.01), None, "not met"),
    ],
)
def test_a_paired_difference_decides_where_intervals_overlap(gap, title, word):
    asked = []

    def difference(one, other):
        asked.append((one["p"], other["p"]))
        return gap

    names, pair = ("Random vectors", "own parts"), ("p == 'b'", "p == 'a'")
    answer = say.above("random is ahead", *pair, gap=difference).answer(PROBES)
    assert f": {word}; AUC .96 against .93; paired difference {gap[0]:.2f}".replace("0.", ".") in answer
    assert title is None or say.versus(PROBES, *pair, names, gap=difference) == title
    assert set(asked) == {("b", "a")}
    several = say.versus(PROBES, "p in ('a', 'b')", "p == 'c'", names, gap=difference)  # a mean has no one difference
    assert several.startswith("Random vectors beat") and set(asked) == {("b", "a")}


def test_the_fewest_that_are_not_told_apart_from_the_best_are_enough():
    assert say.plateau(FLAT, "n_masks") == "1 and 64 masks are not told apart: AUC .70 and .72"
    behind = lambda one, other: (gain := other["auc"] - one["auc"]) and (-gain, -gain - 0.01, -gain + 0.01)  # noqa: E731
    paired = say.plateau(FLAT, "n_masks", "patches", lambda one, other: behind(one, other) or (0, 0, 0))
    assert paired == "More patches still help at 64: AUC .70 to .72"


def test_a_sweep_at_the_ceiling_is_said_to_be_there():
    high = make([dict(n_masks=1, auc=0.96), dict(n_masks=64, auc=0.99)])
    assert say.rises("it rises", by="n_masks").answer(high).endswith("at the ceiling")


X = {"x": "n_masks"}


@pytest.mark.parametrize(
    ("expectation", "table", "word"),
    [
        (say.rises("it rises", by="n_masks"), UP, "met"),
        (say.rises("it falls", by="n_masks", falls=True), UP, "not met"),
        (say.rises("it rises", by="n_masks", query="n_masks < 5"), UP, "met"),
        (say.rises("it rises", by="n_masks"), FLAT, "intervals overlap"),
        (say.above("own above others", "method == 'mae'", "method == 'dino'"), make([dict(auc=0.9), dict(auc=0.5, method="dino")]), "met"),
        (say.above("own above others", "method == 'mae'", "method == 'dino'"), UP, "can't be said"),
        (say.all_shown("everything leaks"), UP, "met"),
        (say.none_shown("nothing leaks"), UP, "not met"),
        (say.none_shown("nothing leaks"), NONE, "met"),
        (say.holds("AUC stays below .8", lambda t: (t["auc"] < 0.8).all()), UP, "met"),
    ],
)  # fmt: skip
def test_what_was_expected_is_answered(expectation, table, word):
    assert f": {word}" in expectation.answer(table)


def test_controls_and_single_seeds_are_never_the_subject():
    rows = make([dict(auc=0.6), dict(auc=0.99, control="no-model"), dict(auc=0.99, seed=1.0)])
    assert say.best(rows) == "PartCrop finds members: AUC .60" and len(say.attacks(rows)) == 1


def test_where_both_were_measured_on_the_same_trainings_it_is_counted_who_is_ahead():
    rows = [
        dict(auc=auc, method=method, target="t", seed=seed)
        for method, aucs in (("mae", (0.8, None, 0.81)), ("dino", (0.7, 0.9, 0.7)))
        for seed, auc in enumerate(aucs)
        if auc is not None
    ]
    rows += [dict(auc=0.8, method="mae", target="t"), dict(auc=0.77, method="dino", target="t")]
    expected = say.above("parts ahead", "method == 'mae'", "method == 'dino'")
    assert "trainings" not in expected.answer(make(rows))  # one of them was measured on two only
    rows.append(dict(auc=0.6, method="mae", target="t", seed=1))
    assert "AUC .80 against .77; ahead in 2 of 3 trainings" in expected.answer(make(rows))

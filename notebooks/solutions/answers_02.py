"""Answers of notebook 02: exercise -> (judge, hint, wrong answers one meets and where they come from)."""

import numpy as np


def _is_rule(answer) -> bool:
    cases = {(0.55, 0.62): True, (0.45, 0.56): False, (0.51, 0.60): True, (0.10, 0.22): True, (0.5, 0.6): False}
    return all(bool(answer(low, high)) is want for (low, high), want in cases.items())


ANSWERS = {
    "02-1": (
        lambda answer, split: set(np.asarray(answer).tolist()) == {*split.target_members, *split.shadow_members},
        "Two roles train a model: one the target, one the attacker's shadow.",
        {"split.target_members": "forgets that the shadow is trained too", "all four roles": "non-members train nothing"},
    ),
    "02-2": (
        lambda answer: str(answer).strip().lower() == "c",
        "In three of the four something other than training may decide: another source, a crop, near twins.",
        {"a": "the two official sets often differ", "b": "measures the crop", "d": "non-members have near twins"},
    ),
    "02-3": (
        _is_rule,
        "Invalid means: the whole interval lies on one side of .5, whichever side.",
        {"lambda low, high: low > 0.5": "an AUC of .16 tells the two sides apart as well as .84"},
    ),
}

"""Answers to the exercises of notebook 04: (predicate, hint, {wrong answer: what it comes from})."""

import math


def _is_near(answer, value, tolerance):
    return abs(float(answer) - value) <= tolerance


def _count_masks(masks):
    own = masks[(masks["control"] == "") & masks["seed"].isna()].set_index("n_masks")["auc"]
    return int(min(own.index[own >= own[own.index.max()] - 0.01]))


ANSWERS = {
    "04-1": (
        lambda answer: _is_near(answer, math.log(0.04 / 0.03), 0.006),
        "Average each model's distances over the masks, then take logarithms; a score is minus a (log) distance.",
        {
            -0.29: "the sign: minus the score, higher would mean a non-member",
            0.01: "the difference of the distances instead of their logarithms",
            0.31: "logarithms of each mask first, then the mean",
        },
    ),
    "04-2": (
        lambda answer: str(answer).strip(" ().").lower() == "b",
        "Which of the two numbers would change if the attacker moved their threshold, and in which direction does it err?",
        {
            "a": "accuracy read as leakage; the AUC says that the order is right",
            "c": "AUC averages over all thresholds, accuracy looks at one",
            "d": "more masks move the AUC, which is high already",
        },
    ),
    "04-3": (
        lambda answer, masks: int(answer) == _count_masks(masks),
        "Keep rows with an empty control; compare with the AUC of the largest M, minus .01.",
        {64: "the largest M taken for the best", 8: "the setting that carries the controls"},
    ),
}

"""Answers of 07: exercise -> (predicate, hint, wrong answers with what they come from)."""

import math


def _find_safest(points):
    useful = points[(points["defense"] != "none") & (points["utility"] > points["utility_untrained"])]
    return useful.loc[useful["auc_high"].idxmin(), "label"]


ANSWERS = {
    "07-1": (
        lambda answer: abs(answer - math.log(0.6 / 0.4)) < 0.006,
        "With delta = 0, equation (4) is 1 - 1 / (1 + e^eps). Set it to .60: what is e^eps?",
        {0.51: "minus the logarithm of .60", 1.5: "e^eps instead of eps"},
    ),
    "07-2": (
        lambda answer: str(answer).strip().strip("()").lower() == "c",
        "Which attacker was tested, and what had it learned from?",
        {
            "a": "a static attacker taken for all attackers",
            "b": "the mIoU stayed, so the order of the classes is still in the posteriors",
            "d": "utility taken for a measure of privacy",
        },
    ),
    "07-3": (
        lambda answer, points: " ".join(str(answer).split()) == _find_safest(points),
        "Keep the defended rows whose utility is above utility_untrained, and sort them by the column auc_high.",
        {"undefended": "defended rows only", "Noise": "the strongest noise, which is worse than no training at all"},
    ),
}

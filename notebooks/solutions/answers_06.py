"""Answers of 06: exercise -> (predicate, hint, wrong answers with what they come from)."""

import math


def _measure_gain(own):
    auc = own.set_index("attack")["auc"]
    return auc["seg-loss-map"] - auc["seg-global-loss"]


ANSWERS = {
    "06-1": (
        lambda answer: abs(answer + math.log(0.9 * 0.5 * 0.1) / 3) < 0.006,
        "Three logarithms; over how many pixels is the mean taken?",
        {0.78: "the ignored pixel counted, so divided by four", 0.69: "the logarithm of the mean posterior, .5"},
    ),
    "06-2": (
        lambda answer: str(answer).strip().strip("()").lower() == "b",
        "What does the target know of a frame whose neighbor in time it was trained on?",
        {
            "a": "a stronger attack taken for an easier game",
            "c": "a difference called chance without looking at intervals",
            "d": "a passing control taken for a sound design",
        },
    ),
    "06-3": (
        lambda answer, own: abs(answer - _measure_gain(own)) < 0.0051,
        "Two rows of own; set_index('attack')['auc'] and subtract, the network's AUC first.",
        {"the difference of auc_low or of auc_high": "the ends of intervals compared instead of the AUCs"},
    ),
}

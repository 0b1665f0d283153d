"""Answers of notebook 00: exercise -> (judge, hint, wrong answers one meets and where they come from)."""


def _is_near(answer, value: float, tolerance: float) -> bool:
    return not isinstance(answer, (str, bool)) and abs(float(answer) - value) <= tolerance


ANSWERS = {
    "00-1": (
        lambda answer: _is_near(answer, 4.5 / 6, 0.005),
        "Write down all six pairs of one member and one non-member; a win counts one, a tie one half.",
        {"0.667": "the tie .3 against .3 counted as a loss", "0.833": "the tie counted as a win"},
    ),
    "00-2": (
        lambda answer: _is_near(answer, 0.1 * 100 / (0.1 * 100 + 0.01 * 9900), 0.006),
        "Count images, not rates: how many of the 100 members are flagged, and how many of the 9,900 others?",
        {"0.91": "10 % over 10 % + 1 %, as if members and non-members were equally many", "0.1": "the TPR"},
    ),
    "00-3": (
        lambda answer, attack: _is_near(answer, round(attack["tpr_at_10"] * attack["n_members"]), 0.5),
        "Multiply: the rate is the share of the members that are found.",
        {"the rate itself": "a share, not a number of images"},
    ),
}

"""Answers of 05: exercise -> (predicate, hint, wrong answers with what they come from)."""


def _measure_training(vectors):
    knows = vectors["letters"].str.contains("T")
    return vectors.loc[knows, "auc"].mean() - vectors.loc[~knows, "auc"].mean()


ANSWERS = {
    "05-1": (
        lambda answer: abs(answer - 435) < 0.5,
        "Each of the 30 views meets 29 others, and every pair was counted twice.",
        {900: "the whole square, the diagonal included", 870: "every pair counted twice", 45: "10 views"},
    ),
    "05-2": (
        lambda answer: str(answer).strip().strip("()").lower() == "b",
        "What exactly was measured, and what would the interval have shown had it been there?",
        {
            "a": "one attack taken for all",
            "c": "no leak shown taken for a bad attack, though its controls hold",
            "d": "one encoder taken for all of its kind",
        },
    ),
    "05-3": (
        lambda answer, vectors: abs(answer - _measure_training(vectors)) < 0.005,
        "Two means of vectors['auc'], told apart by vectors['letters'].str.contains('T'); subtract.",
        {0.0: "attacker T, which learns nothing from its shadow but a threshold"},
    ),
}

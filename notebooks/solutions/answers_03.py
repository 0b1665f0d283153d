"""Answers of 03: exercise -> (predicate, hint, wrong answers with what they come from)."""


def _measure_loss(transfer):
    same = transfer["method"] == transfer["shadow_method"]
    return transfer.loc[same, "auc"].mean() - transfer.loc[~same, "auc"].mean()


ANSWERS = {
    "03-1": (
        lambda answer: abs(answer) < 0.005,
        "Put v_ij = 1/16 into equation (2): what is the difference of the two logarithms?",
        {2.77: "the entropy of the response, log 16, instead of its distance from a flat one"},
    ),
    "03-2": (
        lambda answer: str(answer).strip().strip("()").lower() == "c",
        "Which of the three numbers was measured without any model, and how far is it from the attack?",
        {
            "a": "the attack's AUC taken alone",
            "b": "a difference of AUCs taken for the part that the model leaks",
            "d": "an invalid experiment taken for a negative one",
        },
    ),
    "03-3": (
        lambda answer, transfer: abs(answer - _measure_loss(transfer)) < 0.005,
        "Two means of transfer['auc'], one where method and shadow_method agree and one where they do not; subtract.",
        {0.0: "both means taken over the same cells"},
    ),
}

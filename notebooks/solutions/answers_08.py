"""Answers of 08: exercise -> (predicate, hint, wrong answers with what they come from)."""

ANSWERS = {
    "08-1": (
        lambda answer: abs(answer - 0.131) < 0.006,
        "Equation (2) with TPR .30, FPR .01 and a prior of 5 in 1,000; or count: flagged members, flagged non-members.",
        {0.97: "the precision on equal sides", 0.3: "the TPR taken for the precision", 0.99: "1 - FPR"},
    ),
    "08-2": (
        lambda answer: abs(answer - 2) < 1e-9,
        "Each valid control is rejected with probability .05; how many of 40 on average?",
        {0.05: "the level of one test", 0.87: "the chance of at least one false alarm, 1 - .95 ** 40"},
    ),
    "08-3": (
        lambda answer: str(answer).strip().strip("()").lower() == "c",
        "What does the no-model control query, and what does its interval say about the two sides?",
        {
            "a": "AUCs subtracted as if they were shares",
            "b": "a seed exchanged until the control passes",
            "d": "a control that is reported only when it passes",
        },
    ),
}

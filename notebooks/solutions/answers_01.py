"""Answers of notebook 01: exercise -> (judge, hint, wrong answers one meets and where they come from)."""


def _find_parting(history) -> int:
    apart = history[history["loss_heldout"] > 1.2 * history["loss_members"]]
    return int(apart["epoch"].iloc[0]) if len(apart) else -1


ANSWERS = {
    "01-1": (
        lambda answer, history: int(answer) == _find_parting(history),
        "Walk down the history: the first epoch at which loss_heldout exceeds 1.2 times loss_members.",
        {"the last epoch": "the largest gap, not the first"},
    ),
    "01-2": (
        lambda answer: str(answer).strip().lower() == "b",
        "Which of the four changes what the model sees of an image from one epoch to the next?",
        {"c": "fewer images are each seen as often; 04 measures what their number does"},
    ),
    "01-3": (
        lambda answer, run: not isinstance(answer, (str, bool)) and int(answer) == run.settings["epochs"],
        "Once in every epoch.",
        {"epochs / n_train": "T/N is a rate used for web data; each image is seen T times"},
    ),
}

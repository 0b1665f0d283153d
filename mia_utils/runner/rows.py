"""What is computed already: the artifact of a row, looked up without importing torch."""

from __future__ import annotations

from pathlib import Path

from mia_utils.runner.profiles import Profile, Row


def artifact_path(profile: Profile, row: Row) -> Path | None:
    """Return the finished artifact of a row, or ``None`` when it has to be trained.

    Args:
        profile: the profile the row belongs to (data set arguments and split sizes are part of the identity).
        row: one trained model.
    """
    from mia_utils.runner import artifacts, train

    return artifacts.find(train.spec_of(profile, row))

"""What an attack hands back: scores of images it was never fit on, with everything a table needs."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mia_utils.protocol import metrics

SUMMARY_COLUMNS = tuple(
    "paper attack control model_id method arch dataset protocol knowledge attacker defense strength n_train epochs "
    "n_members n_nonmembers n_seeds auc auc_low auc_high tpr_at_10 tpr_at_1 tpr_at_1_low tpr_at_1_high tpr_at_01 "
    "accuracy_at_shadow_threshold balanced_accuracy precision recall f1 utility train_seconds half_width "
    "queries_per_image".split()
)
_ARRAYS = ("score", "is_member", "image_ids", "role", "fold", "groups", "threshold")  # saved fields of a Result


@dataclass(eq=False)
class Result:
    """Scores of one attack (or control) on the images it was never fit on, with everything a table needs.

    Attributes:
        attack, control: names; ``control`` is empty for the attack itself.
        score: (N,) float64, higher = more likely a member.
        is_member: (N,) bool; for the permuted control its permuted labels.
        image_ids: (N,) str.
        role: (N,) str, all ``"report"``.
        fold: (N,) int, the attacker that scored the image: scores of different attackers never share one ROC. All 0
            where nothing is trained.
        groups: (N,) or None, what the bootstrap resamples as a whole.
        threshold: (N,) float64, ``score >= threshold`` = called a member; chosen without the image, on validation
            images (on all images of known membership where nothing is trained). None in an empty result.
        meta: knowledge, protocol, parameters; ``meta["reason"]`` says why a result is empty.
        controls: no-model, untrained and permuted beside an attack.
    """

    attack: str
    control: str = ""
    score: np.ndarray = field(default_factory=lambda: np.empty(0))
    is_member: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    image_ids: np.ndarray = field(default_factory=lambda: np.empty(0, str))
    role: np.ndarray = field(default_factory=lambda: np.empty(0, str))
    fold: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    groups: np.ndarray | None = None
    threshold: np.ndarray | None = None
    meta: dict = field(default_factory=dict)
    controls: dict[str, Result] = field(default_factory=dict)

    @functools.cached_property
    def metrics(self) -> metrics.Result | None:
        """All numbers with their intervals (:func:`mia_utils.protocol.metrics.evaluate`); None for an empty result."""
        if not len(self.score):
            return None
        folds = self.fold if len(np.unique(self.fold)) > 1 else None
        return metrics.evaluate(
            self.score, self.is_member, threshold=self.threshold, groups=self.groups, folds=folds, seed=0
        )

    @property
    def auc(self) -> float:
        """Area under the ROC, mean over folds; NaN for an empty result (as the three below)."""
        return self.metrics.auc if self.metrics else float("nan")

    @property
    def p_value(self) -> float:
        """Two-sided against an AUC of 0.5."""
        return self.metrics.p_value if self.metrics else float("nan")

    @property
    def auc_low(self) -> float:
        return self.metrics.auc_low if self.metrics else float("nan")

    @property
    def auc_high(self) -> float:
        return self.metrics.auc_high if self.metrics else float("nan")

    @property
    def half_width(self) -> float:
        return self.metrics.half_width if self.metrics else float("nan")

    @property
    def tpr_at(self) -> dict:
        """False-positive rate -> (value, low, high), or None where there are too few non-members."""
        return self.metrics.tpr_at if self.metrics else {}

    def __repr__(self) -> str:
        name = f"{self.attack} {self.control}".strip()
        if not self.metrics:
            return f"Result({name}: empty, {self.meta.get('reason', 'no scores')})"
        return f"Result({name}: AUC {self.auc:.3f} [{self.auc_low:.3f}, {self.auc_high:.3f}], N={len(self.score)})"

    def rows(self, **context: object) -> list[dict]:
        """Rows of the summary table: the attack, then its controls.

        Args:
            context: what the attack cannot know: model_id, method, arch, n_train, epochs, utility, train_seconds ...

        Raises:
            ValueError: a name that is no column of the summary table.
        """
        if unknown := set(context) - set(SUMMARY_COLUMNS):
            raise ValueError(f"no summary column {', '.join(sorted(unknown))}: expected {', '.join(SUMMARY_COLUMNS)}")
        return [r._make_row(context) for r in (self, *self.controls.values())]

    def _make_row(self, context: dict) -> dict:
        row = dict.fromkeys(SUMMARY_COLUMNS)
        row |= {key: self.meta.get(key) for key in ("paper", "dataset", "protocol", "knowledge")}
        row |= {"attack": self.attack, "attacker": "static", "defense": "none", "n_seeds": 1}
        row |= {"queries_per_image": self.meta.get("queries")} | context | {"control": self.control}
        if m := self.metrics:
            names = ("n_members", "n_nonmembers", "auc", "auc_low", "auc_high", "half_width")
            row |= {key: getattr(m, key) for key in (*names, "balanced_accuracy", "precision", "recall", "f1")}
            if str(row["knowledge"]).startswith("shadow"):
                row["accuracy_at_shadow_threshold"] = m.accuracy
            at = {key: m.tpr_at.get(fpr) or (None,) * 3 for key, fpr in (("10", 0.1), ("1", 0.01), ("01", 0.001))}
            row |= {f"tpr_at_{key}": value[0] for key, value in at.items()}
            row |= {"tpr_at_1_low": at["1"][1], "tpr_at_1_high": at["1"][2]}
        return row

    def save(self, path: str | Path) -> Path:
        """Write scores, labels, ids and controls as one npz (no pickle, no pixels), whole or not at all."""
        path, arrays = Path(path), {}
        for prefix, r in (("", self), *((f"control/{name}/", r) for name, r in self.controls.items())):
            for key in _ARRAYS:
                if (value := getattr(r, key)) is not None:
                    arrays[prefix + key] = value
            meta = {"attack": r.attack, "control": r.control, "meta": r.meta}
            arrays[prefix + "meta"] = np.array(json.dumps(meta, sort_keys=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(file, **arrays)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what :meth:`save` wrote."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no saved scores {path}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}

        def read(prefix: str) -> Result:
            own = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
            own = {key: value for key, value in own.items() if "/" not in key}
            return cls(**own | json.loads(str(own["meta"])))

        result = read("")
        names = [key.split("/")[1] for key in arrays if key.startswith("control/") and key.endswith("/score")]
        result.controls = {name: read(f"control/{name}/") for name in names}
        return result

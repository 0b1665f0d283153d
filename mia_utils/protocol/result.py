"""What an attack hands back: scores of images it was never trained on, with everything a table needs."""

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mia_utils.protocol import metrics, resampling

_ARRAYS = ("score", "is_member", "image_ids", "fold", "groups", "threshold")  # saved fields of a Result


@dataclass(eq=False)
class Result:
    """Scores of one attack (or control) on the images it was never trained on, arrays (N,)."""

    attack: str
    control: str = ""  # empty for the attack itself
    score: np.ndarray = field(default_factory=lambda: np.empty(0))  # float64, higher = more likely a member
    is_member: np.ndarray = field(default_factory=lambda: np.empty(0, bool))  # of the permuted control: as permuted
    image_ids: np.ndarray = field(default_factory=lambda: np.empty(0, str))
    # the attacker that scored the image: scores of different attackers never share one ROC; 0 if nothing is trained
    fold: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    groups: np.ndarray | None = None  # what the bootstrap resamples as a whole
    # flagged as member at or above; chosen without the image, on attack-validation images (known ones if none is fit)
    threshold: np.ndarray | None = None
    meta: dict = field(default_factory=dict)  # knowledge, protocol, parameters; "reason" says why a result is empty
    controls: dict[str, "Result"] = field(default_factory=dict)  # no-model, untrained and permuted beside an attack

    @functools.cached_property
    def inputs(self) -> list[resampling.Scores]:
        """Checked scores, all that comparisons and means need of a result; none for an empty one."""
        if not len(self.score):
            return []
        folds = self.fold if len(np.unique(self.fold)) > 1 else None
        return [resampling.check(self.score, self.is_member, self.threshold, self.groups, folds)]

    @functools.cached_property
    def metrics(self) -> metrics.Result | None:
        """All numbers with their intervals (:func:`mia_utils.protocol.metrics.combine`); None for an empty result."""
        return metrics.combine([self]) if self.inputs else None

    def __getattr__(self, name: str) -> Any:
        """Read the numbers of ``metrics`` as one's own: NaN in an empty result."""
        if name in ("auc", "auc_low", "auc_high", "auc_se", "p_value", "minimum_detectable", "tpr_at"):
            return getattr(self.metrics, name) if self.metrics else float("nan")
        raise AttributeError(name)

    def __repr__(self) -> str:
        name = f"{self.attack} {self.control}".strip()
        if not self.metrics:
            return f"Result({name}: empty, {self.meta.get('reason', 'no scores')})"
        return f"Result({name}: AUC {self.auc:.3f} [{self.auc_low:.3f}, {self.auc_high:.3f}], N={len(self.score)})"

    def pack(self) -> dict[str, np.ndarray]:
        """Return scores, labels, ids and controls as named arrays (no pickle, no pixels)."""
        arrays = {}
        for prefix, r in (("", self), *((f"control/{name}/", r) for name, r in self.controls.items())):
            arrays |= {prefix + key: value for key in _ARRAYS if (value := getattr(r, key)) is not None}
            meta = {"attack": r.attack, "control": r.control, "meta": r.meta}
            arrays[prefix + "meta"] = np.array(json.dumps(meta, sort_keys=True))
        return arrays

    @classmethod
    def unpack(cls, arrays: dict[str, np.ndarray]) -> "Result":
        """Make the result that :meth:`pack` described."""

        def read(prefix: str) -> Result:
            own = {key: arrays[prefix + key] for key in _ARRAYS if prefix + key in arrays}
            return cls(**own | json.loads(str(arrays[f"{prefix}meta"])))

        result = read("")
        names = [key.split("/")[1] for key in arrays if key.startswith("control/") and key.endswith("/score")]
        result.controls = {name: read(f"control/{name}/") for name in names}
        return result

"""What an attack hands back: scores of images it was never trained on, with everything a table needs."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mia_utils import paths
from mia_utils.protocol import metrics

_ARRAYS = ("score", "is_member", "image_ids", "role", "fold", "groups", "threshold")  # saved fields of a Result


@dataclass(eq=False)
class Result:
    """Scores of one attack (or control) on the images it was never trained on.

    Attributes:
        attack, control: names; ``control`` is empty for the attack itself.
        score: (N,) float64, higher = more likely a member.
        is_member: (N,) bool; for the permuted control its permuted labels.
        image_ids: (N,) str.
        role: (N,) str, all ``"report"``.
        fold: (N,) int, the attacker that scored the image: scores of different attackers never share one ROC. All 0
            where nothing is trained.
        groups: (N,) or None, what the bootstrap resamples as a whole.
        threshold: (N,) float64, ``score >= threshold`` = flagged as member; chosen without the image, on
            attack-validation images (on all images of known membership where nothing is trained).
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
        return metrics.evaluate(self.score, self.is_member, threshold=self.threshold, groups=self.groups, folds=folds)

    def __getattr__(self, name: str):
        # auc, auc_low, auc_high, p_value, half_width, minimum_detectable: NaN in an empty result
        if name.startswith("auc") or name in ("p_value", "half_width", "minimum_detectable"):
            return getattr(self.metrics, name) if self.metrics else float("nan")
        raise AttributeError(name)

    @property
    def tpr_at(self) -> dict:
        """False-positive rate -> (value, low, high), or None where there are too few non-members."""
        return self.metrics.tpr_at if self.metrics else {}

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
    def unpack(cls, arrays: dict[str, np.ndarray]) -> Result:
        """Make the result that :meth:`pack` described."""

        def read(prefix: str) -> Result:
            own = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
            own = {key: value for key, value in own.items() if key in (*_ARRAYS, "meta")}
            return cls(**own | json.loads(str(own["meta"])))

        result = read("")
        names = [key.split("/")[1] for key in arrays if key.startswith("control/") and key.endswith("/score")]
        result.controls = {name: read(f"control/{name}/") for name in names}
        return result

    def save(self, path: str | Path) -> Path:
        """Write one npz, whole or not at all."""
        return paths.write_atomic(path, lambda file: np.savez_compressed(file, **self.pack()))

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what :meth:`save` wrote."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no saved scores {path}")
        with np.load(path, allow_pickle=False) as file:
            return cls.unpack({key: file[key] for key in file.files})

"""One tidy table of everything measured: a row per (experiment, control) over all seeds, and a row per seed.

A saved evaluation carries its rows: facts under plain names and numbers with their intervals, computed once. Which
rows are one experiment over several seeds is decided here and nowhere else: those that agree in every column of facts.
Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mia_utils import paths
from mia_utils.protocol import intervals, metrics
from mia_utils.protocol.result import Result

# what an experiment is; attack parameters (n_crops, n_masks, query_augmentation ...) join them
FACTS = (
    "attack control target role method arch dataset n_train epochs augmentation checkpoint knowledge shadow "
    "shadow_method shadow_dataset shadow_checkpoint protocol known_share subsample decoder reference "
    "reference_checkpoint calibration defense strength attacker"
).split()
RATES = {0.1: "tpr_at_10", 0.01: "tpr_at_1", 0.001: "tpr_at_01"}  # TPR at 10, 1 and .1 % FPR
MEANS = ("utility utility_untrained knn miou miou_members train_seconds queries").split()  # over seeds
NUMBERS = "auc auc_low auc_high auc_se minimum_detectable p accuracy balanced_accuracy precision recall f1".split()
NUMBERS += [
    "n_members",
    "n_nonmembers",
    *MEANS,
    *(f"{name}{end}" for name in RATES.values() for end in ("", "_low", "_high")),
]
PARAMETERS = {  # attack parameters whose plain name says something else about the target
    "epochs": "attacker_epochs",
    "lr": "attacker_lr",
    "augmentation": "query_augmentation",
    "network": "attacker_network",
    "p": "norm",
}
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def make_rows(result: Result, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Describe an evaluation of one seed: the attack, then its controls.

    Args:
        result: scores of the attack with its controls.
        facts: what the attack cannot know: columns of ``FACTS`` but ``control``; ``seed``, utility ...

    Returns:
        list of dict: facts, parameters and numbers; an empty control is left out.
    """
    params = {PARAMETERS.get(name, name): _plain(value) for name, value in result.meta.get("params", {}).items()}
    rows = []
    for part in (result, *result.controls.values()):
        if part.metrics is not None:
            row = {
                **facts,
                **params,
                "control": part.control,
                "split": result.meta.get("split"),
                "queries": result.meta.get("queries"),
            }
            row |= _measure([result], part.control)
            rows.append({name: _number(value) for name, value in row.items() if value is not None})
    return rows


def _measure(seeds: list[Result], control: str) -> dict[str, Any]:
    """Numbers of an attack (or one of its controls) over its trainings, with the intervals of the one rule."""
    parts = [r.controls[control] if control else r for r in seeds]
    m = parts[0].metrics if len(parts) == 1 else metrics.combine(parts)
    row = {name: getattr(m, name) for name in ("auc", "auc_low", "auc_high", "auc_se", "minimum_detectable")}
    row |= {name: getattr(m, name) for name in ("accuracy", "balanced_accuracy", "precision", "recall", "f1")}
    row |= {"p": m.p_value, "n_members": m.n_members, "n_nonmembers": m.n_nonmembers}
    for fpr, name in RATES.items():
        if (rate := m.tpr_at.get(fpr)) is not None:
            row |= {name: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high}
    if not control and m.auc_low > 0.5 and all("no-model" in r.controls for r in seeds):
        blind = [r.controls["no-model"] for r in seeds]
        other = blind[0].metrics if len(blind) == 1 else metrics.combine(blind)
        if intervals.leaves_half(other.auc_low, other.auc_high):
            row["clear"] = bool(metrics.clear_of(parts, blind).low > 0)
    return {name: _number(value) for name, value in row.items()}


def tabulate(
    rows: Iterable[dict[str, Any]], studies: dict[str, list[str]], merge: Callable[[list[str], str], dict]
) -> pd.DataFrame:
    """Build the table: rows of one experiment are merged over their seeds, verdicts by the one rule are added.

    Args:
        rows: of :func:`make_rows`, each with its ``key`` and ``seed``.
        studies: study -> keys of the evaluations it uses; an evaluation of several studies stands in each.
        merge: (keys, control) -> numbers of several seeds together (:meth:`Store.merge`).

    Returns:
        DataFrame: column ``seed`` is empty where a row holds all ``n_seeds`` of its experiment; several seeds have a
        row each below it. No two rows agree in study, facts, parameters and seed.
    """
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["key"], []).append(row)
    columns = dict.fromkeys(["study", *FACTS, *NUMBERS, *(name for own in found.values() for row in own for name in row)])
    same = [name for name in columns if name not in {*NUMBERS, "seed", "key", "split", "clear", "model_id"}]
    experiments: dict[tuple, dict[Any, dict]] = {}
    for study, keys in studies.items():
        for row in (row for key in dict.fromkeys(keys) for row in found.get(key, ())):
            row = {"study": study, **row}
            # by seed: one evaluation, asked for under two spellings, stands once
            experiments.setdefault(tuple(_text(row.get(name)) for name in same), {})[row.get("seed")] = row
    if not experiments:
        return pd.DataFrame(
            columns=["study", *FACTS, "seed", "n_seeds", "auc", "auc_low", "auc_high", "verdict", "key"]
        )
    rejected, table = _find_rejected([row for own in found.values() for row in own]), []
    for seeds in experiments.values():
        own = [row | {"n_seeds": 1, "rejected": row["key"] in rejected} for row in seeds.values()]
        if len(own) == 1:
            own[0]["seed"] = None
        else:
            keys, first = [row["key"] for row in own], own[0]
            whole = {name: first[name] for name in (*same, "split") if name in first}
            whole |= {name: float(np.mean([row[name] for row in own])) for name in MEANS if all(name in r for r in own)}
            whole |= merge(keys, first["control"]) | {"key": ";".join(keys), "n_seeds": len(own), "seed": None}
            table.append(whole | {"rejected": any(row["rejected"] for row in own)})
        table += own
    for row, blind in _pair(table, same):
        row["verdict"] = _decide(row, blind)
    frame = pd.DataFrame(table, columns=[*columns, "n_seeds", "verdict"])
    frame["seed"] = pd.to_numeric(frame["seed"])
    first = ["study", *FACTS, "seed", "n_seeds", "auc", "auc_low", "auc_high", "verdict"]
    return frame[[*first, *(name for name in frame if name not in {*first, "clear"})]]


class Found(pd.DataFrame):
    """Rows of the table that a notebook shows shortly: what differs between them, and the AUC with its verdict."""

    def _repr_html_(self) -> str:
        return self._shorten().to_html(index=False, na_rep="", float_format="{:,.4g}".format)

    def _repr_markdown_(self) -> str:
        plain = self._shorten().map(lambda x: ("" if pd.isna(x) else f"{x:,.3g}") if isinstance(x, float) else x)
        return plain.to_markdown(index=False, disable_numparse=True)

    def _shorten(self) -> pd.DataFrame:
        plain = pd.DataFrame(self)
        given = "attack target n_seeds verdict key split model_id method arch dataset n_train epochs augmentation".split()
        differs = [c for c in plain if c not in {*NUMBERS, *given} and plain[c].astype(str).nunique() > 1]
        return plain[["attack", "target", *differs, "n_seeds", "auc", "auc_low", "auc_high", "verdict"]]


def _find_rejected(rows: list[dict]) -> set[str]:
    """Keys of the evaluations whose no-model control is rejected: Holm among all no-model rows, each split once."""
    blind = [row for row in rows if row["control"] == "no-model" and row.get("protocol") == "controlled"]
    once = {(row.get("split"), row["auc"]): row["p"] for row in blind}
    if not once:
        return set()
    verdict = intervals.judge_controls({str(place): p for place, p in once.items()})
    bad = set(verdict.loc[verdict["rejected"], "control"])
    return {row["key"] for row in blind if str((row.get("split"), row["auc"])) in bad}


def _pair(rows: list[dict], same: list[str]) -> Iterator[tuple[dict, dict | None]]:
    """Each row with the no-model row of its experiment and seed, None where there is none."""
    cells = [*(name for name in same if name != "control"), "seed"]
    place = lambda row: tuple(_text(row.get(name)) for name in cells)  # noqa: E731
    blind = {place(row): row for row in rows if row["control"] == "no-model"}
    for row in rows:
        yield row, None if row["control"] else blind.get(place(row))


def _decide(row: dict[str, Any], blind: dict[str, Any] | None) -> str:
    control = None
    if blind is not None:
        control = intervals.Control(
            blind["auc"], blind["auc_low"], blind["auc_high"], row["rejected"], row.get("clear")
        )
    return str(intervals.decide(row["auc"], row["auc_low"], row["auc_high"], control=control))


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)  # NaN differs from itself


def _plain(value: Any) -> Any:
    return (
        "-".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
        if isinstance(value, list | tuple)
        else value
    )


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def drop_seed(name: str | None, seed: Any) -> str | None:
    """``mae-target-s0`` of seed 0 is ``mae-target``."""
    return re.sub(rf"-s{seed}$", "", name) if isinstance(name, str) else name


# ------------------------------------------------------------------------------------------------------------- store


class Store:
    """Saved evaluations of a profile: a file each while a run works, packed into one for the archive.

    ``data/scores/<profile>/<key>.npz`` are written by jobs side by side; :meth:`pack` gathers them in
    ``data/results/<profile>.npz`` (scores, ids, rows; equal arrays once) with ``<profile>.csv`` beside it to read. Both
    are zip files: every byte stands under a check sum that is compared when it is read.
    """

    def __init__(self, profile: str):
        self.folder, self.archive = paths.get_scores_dir(profile), paths.get_results_dir() / f"{profile}.npz"
        self._packed: tuple[float, dict[str, Any]] | None = None

    def _read_archive(self) -> dict[str, Any]:
        if not self.archive.is_file():
            return {"rows": {}, "studies": {}, "arrays": {}, "merged": {}}
        stamp = self.archive.stat().st_mtime
        if self._packed is None or self._packed[0] != stamp:
            try:
                with np.load(self.archive, allow_pickle=False) as file:
                    self._packed = stamp, json.loads(str(file["index"]))
            except _DAMAGE as error:
                raise ValueError(
                    f"{self.archive.name} is damaged ({error}): fetch it again, or delete it and run the profile"
                ) from None
        return self._packed[1]

    def read_rows(self, key: str) -> list[dict[str, Any]] | None:
        """Return the rows of an evaluation, None where it has to be computed (absent, or damaged and said so)."""
        path = self.folder / f"{key}.npz"
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as file:
                    rows = json.loads(str(file["rows"]))
                if rows and all(row["key"] == key for row in rows):
                    return rows
                raise ValueError("it holds another evaluation")
            except _DAMAGE as error:
                print(f"scores {path.name} are damaged ({error}): computed again", flush=True)
                path.unlink(missing_ok=True)
                return None
        return self._read_archive()["rows"].get(key)

    def load(self, key: str) -> Result:
        """Return the scores of an evaluation with its controls; absent or damaged ones are one line."""
        path = self.folder / f"{key}.npz"
        try:
            if path.is_file():
                return Result.load(path)
            arrays = self._read_archive()["arrays"][key]
            with np.load(self.archive, allow_pickle=False) as file:
                return Result.unpack({name: file[digest] for name, digest in arrays.items()})
        except _DAMAGE as error:
            told = " ".join(str(error).split())
            raise ValueError(f"no readable scores {key} ({told}): run its notebook again") from None

    def merge(self, keys: list[str], control: str) -> dict[str, Any]:
        """Return the numbers of several seeds together; computed once, then kept."""
        name = hashlib.blake2b(" ".join([*keys, control]).encode(), digest_size=8).hexdigest()
        if (kept := self._read_archive()["merged"].get(name)) is not None:
            return kept
        path = self.folder / f"merged-{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            numbers = _measure([self.load(key) for key in keys], control)
            paths.write_atomic(path, lambda file: file.write(json.dumps(numbers).encode()))
            return numbers

    def save(self, key: str, result: Result, rows: list[dict[str, Any]]) -> None:
        """Keep an evaluation, whole or not at all."""
        arrays = result.pack() | {"rows": np.array(json.dumps([row | {"key": key} for row in rows]))}
        paths.write_atomic(self.folder / f"{key}.npz", lambda file: np.savez_compressed(file, **arrays))

    def note(self, study: str, attack: str, keys: list[str]) -> None:
        """Say which evaluations of an attack a study uses, in the order of its figure."""
        text = json.dumps({"study": study, "attack": attack, "keys": keys}, indent=0)
        paths.write_atomic(self.folder / f"study-{study}-{attack}.json", lambda file: file.write(text.encode()))

    def read_studies(self) -> dict[str, list[str]]:
        """Return study -> keys, in order."""
        noted = {(s, a): keys for s, parts in self._read_archive()["studies"].items() for a, keys in parts.items()}
        for path in sorted(self.folder.glob("study-*.json")):
            try:
                entry = json.loads(path.read_text(encoding="utf-8"))
                noted[entry["study"], entry["attack"]] = list(entry["keys"])
            except _DAMAGE as error:
                print(f"{path.name} is damaged ({error}): its notebook writes it again", flush=True)
        studies: dict[str, list[str]] = {}
        for (study, _), keys in noted.items():
            studies.setdefault(study, []).extend(keys)
        return studies

    def read_all(self) -> list[dict[str, Any]]:
        """Return the rows of all evaluations."""
        rows = dict(self._read_archive()["rows"])
        for path in sorted(self.folder.glob("*.npz")):
            if (own := self.read_rows(path.stem)) is not None:
                rows[path.stem] = own
        return [row for own in rows.values() for row in own]

    def pack(self) -> Path:
        """Gather everything that a study uses in the archive; the files of single evaluations stay."""
        studies, arrays, index = self.read_studies(), {}, {"rows": {}, "studies": {}, "arrays": {}, "merged": {}}
        for key in dict.fromkeys(key for keys in studies.values() for key in keys):
            rows = self.read_rows(key)
            if rows is None:
                continue
            index["rows"][key], index["arrays"][key] = rows, {}
            for name, value in self.load(key).pack().items():
                digest = hashlib.blake2b(value.tobytes() + str(value.dtype).encode(), digest_size=8).hexdigest()
                arrays[digest], index["arrays"][key][name] = value, digest
        for study, keys in studies.items():
            for key in keys:
                if key in index["rows"]:
                    index["studies"].setdefault(study, {}).setdefault(index["rows"][key][0]["attack"], []).append(key)
        rows = [row for own in index["rows"].values() for row in own]

        def merge(keys: list[str], control: str) -> dict[str, Any]:
            name = hashlib.blake2b(" ".join([*keys, control]).encode(), digest_size=8).hexdigest()
            index["merged"][name] = self.merge(keys, control)
            return index["merged"][name]

        table = tabulate(rows, studies, merge)
        arrays["index"] = np.array(json.dumps(index, sort_keys=True))
        paths.write_atomic(self.archive, lambda file: _write_npz(file, arrays))
        paths.write_atomic(
            self.archive.with_suffix(".csv"),
            lambda file: file.write(table.to_csv(index=False, float_format="%.6g").encode()),
        )
        return self.archive


def _write_npz(file: Any, arrays: dict[str, np.ndarray]) -> None:
    """``np.savez_compressed`` with a fixed time in every member: the same scores are the same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asanyarray(arrays[name]), allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), buffer.getvalue(), zipfile.ZIP_DEFLATED
            )

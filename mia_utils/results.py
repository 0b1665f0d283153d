"""One tidy table of everything measured: a row per (experiment, control) over all seeds, and a row per seed.

A saved evaluation carries its rows: facts under plain names and numbers with their intervals, computed once. Those
that agree in every column of facts are one experiment over several seeds. Nothing here imports torch.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mia_utils import paths
from mia_utils.protocol import intervals, metrics
from mia_utils.protocol.metrics import RATES
from mia_utils.protocol.result import Result

# what an experiment is; attack parameters (n_crops, n_masks, query_augmentation ...) join them
FACTS = (
    "attack control target role method arch dataset n_train epochs augmentation checkpoint knowledge shadow "
    "shadow_method shadow_dataset shadow_checkpoint protocol known_share subsample decoder reference "
    "reference_checkpoint calibration defense strength attacker"
).split()
MEASURED = "auc auc_low auc_high auc_se minimum_detectable accuracy balanced_accuracy precision recall f1".split()
MEASURED += ["n_members", "n_nonmembers"]  # fields of metrics.Result
MEANS = "utility utility_untrained knn miou miou_members train_seconds queries".split()  # over seeds
NUMBERS = [*MEASURED, "p", *MEANS, *(f"{name}{end}" for name in RATES.values() for end in ("", "_low", "_high"))]
PARAMETERS = {  # attack parameters whose plain name says something else about the target
    "epochs": "attacker_epochs", "lr": "attacker_lr", "augmentation": "query_augmentation",
    "network": "attacker_network", "p": "norm",
}  # fmt: skip


def make_rows(result: Result, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Describe an evaluation of one seed: the attack, then its controls, empty ones left out.

    ``facts`` are what the attack cannot know: columns of ``FACTS`` but ``control``; ``seed``, utility ...
    """
    meta = {name: result.meta.get(name) for name in ("split", "queries")}
    params = {PARAMETERS.get(name, name): _join(value) for name, value in result.meta.get("params", {}).items()}
    parts = [part for part in (result, *result.controls.values()) if len(part.score)]
    rows = [facts | params | {"control": p.control} | meta | _measure([result], p.control) for p in parts]
    return [{name: _to_plain(value) for name, value in row.items() if value is not None} for row in rows]


def _measure(seeds: list[Result], control: str) -> dict[str, Any]:
    """Numbers of an attack (or one of its controls) over its trainings, with the intervals of the one rule."""
    parts = [r.controls[control] if control else r for r in seeds]
    m = _combine(parts)
    row = {name: getattr(m, name) for name in MEASURED} | {"p": m.p_value}
    for fpr, name in RATES.items():
        if (rate := m.tpr_at.get(fpr)) is not None:
            row |= zip((name, f"{name}_low", f"{name}_high"), rate, strict=True)
    if not control and m.auc_low > 0.5 and all("no-model" in r.controls for r in seeds):
        blind = [r.controls["no-model"] for r in seeds]
        other = _combine(blind)
        if intervals.leaves_half(other.auc_low, other.auc_high):
            row["clear"] = bool(metrics.clear_of(parts, blind).low > 0)
    return {name: _to_plain(value) for name, value in row.items()}


def _combine(parts: list[Result]) -> metrics.Result:
    return parts[0].metrics if len(parts) == 1 else metrics.combine(parts)


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
    every = [row for own in found.values() for row in own]
    columns = dict.fromkeys(["study", *FACTS, *NUMBERS, *(name for row in every for name in row)])
    same = [name for name in columns if name not in {*NUMBERS, "seed", "key", "split", "clear", "model_id"}]
    first = ["study", *FACTS, "seed", "n_seeds", "auc", "auc_low", "auc_high", "verdict"]
    experiments, facts = {}, set(same)
    for study, keys in studies.items():
        if lost := [key for key in keys if key not in found]:  # a mean over fewer seeds is another number
            print(f"study {study}: no scores {', '.join(lost[:3])}: run its notebook again", flush=True)
        for row in (row for key in dict.fromkeys(keys) for row in found.get(key, ())):
            row = {"study": study, **row}
            # by seed: one evaluation, asked for under two spellings, stands once
            experiments.setdefault(_place(row, facts), {})[row.get("seed")] = row
    rejected, table = _find_rejected(every), []
    for seeds in experiments.values():
        own = [row | {"n_seeds": 1, "rejected": row["key"] in rejected} for row in seeds.values()]
        if len(own) == 1:
            own[0]["seed"] = None
        else:
            keys = [row["key"] for row in own]
            whole = {name: own[0][name] for name in (*same, "split") if name in own[0]}
            whole |= {name: float(np.mean([row[name] for row in own])) for name in MEANS if all(name in r for r in own)}
            whole |= merge(keys, own[0]["control"]) | {"key": ";".join(keys), "n_seeds": len(own), "seed": None}
            table.append(whole | {"rejected": any(row["rejected"] for row in own)})
        table += own
    # what an attacker without a model depends on: images, and what is known of them
    depends = {"split", "subsample", "protocol", "knowledge", "shadow_dataset", "known_share", "n_seeds"}
    blind = {_place(row, depends): row for row in table if row["control"] == "no-model"}
    for row in table:
        beside = None if row["control"] else blind.get(_place(row, depends))
        if beside is not None:
            ends = (beside[name] for name in ("auc", "auc_low", "auc_high"))
            beside = intervals.Control(*ends, row["rejected"], row.get("clear"))
        row["verdict"] = str(intervals.decide(row["auc"], row["auc_low"], row["auc_high"], control=beside))
    frame = pd.DataFrame(table, columns=[*columns, *(n for n in (*first, "key") if n not in columns)])
    frame["seed"] = pd.to_numeric(frame["seed"])
    frame["strength"] = frame["strength"].where(frame["strength"] != "", np.nan)  # none, however it was written
    early = frame["checkpoint"].notna() & (frame["checkpoint"] != frame["epochs"])
    early &= frame["defense"] != "early-stopping"  # measured there; else only at the end of a training
    frame.loc[early, ["utility", "knn"]] = np.nan
    return frame[[*first, *(name for name in frame if name not in {*first, "clear"})]]


def _place(row: dict[str, Any], names: set[str]) -> frozenset[tuple[str, str]]:
    """What a row says of some columns; an empty fact is one fact however it was written."""
    given = ((k, str(v)) for k, v in row.items() if k in names and v is not None and v == v)  # NaN differs from itself
    return frozenset(fact for fact in given if fact[1])


def _find_rejected(rows: list[dict]) -> set[str]:
    """Keys of the evaluations whose no-model control is rejected: Holm among all no-model rows, each split once."""
    blind = [row for row in rows if row["control"] == "no-model" and row.get("protocol") == "controlled"]
    once = {str((row.get("split"), row["auc"])): row["p"] for row in blind}
    if not once:
        return set()
    verdict = intervals.judge_controls(once)
    bad = set(verdict.loc[verdict["rejected"], "control"])
    return {row["key"] for row in blind if str((row.get("split"), row["auc"])) in bad}


def _join(value: Any) -> Any:
    """Print a list as ``.08-.2``."""
    if not isinstance(value, list | tuple):
        return value
    return "-".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)


def _to_plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def drop_seed(name: str | None, seed: Any) -> str | None:
    """``mae-target-s0`` of seed 0 is ``mae-target``."""
    return re.sub(rf"-s{seed}$", "", name) if isinstance(name, str) else name


class Found(pd.DataFrame):
    """Rows of the table that a notebook shows shortly: what differs between them, and the AUC with its verdict."""

    def _repr_html_(self) -> str:
        return self._shorten().to_html(index=False, na_rep="", float_format="{:,.4g}".format)

    def _repr_markdown_(self) -> str:
        return to_markdown(self._shorten())

    def _shorten(self) -> pd.DataFrame:
        plain = pd.DataFrame(self)
        given = "attack target n_seeds verdict key split model_id method arch dataset n_train epochs augmentation"
        differs = [c for c in plain if c not in {*NUMBERS, *given.split()} and plain[c].astype(str).nunique() > 1]
        return plain[["attack", "target", *differs, "n_seeds", "auc", "auc_low", "auc_high", "verdict"]]


def to_markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown, numbers with few digits, empty ones left out."""

    def say(value: Any) -> str:
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            return "" if value != value else f"{value:,.4g}" if value % 1 else f"{value:,.0f}"
        return "" if value is None or value is pd.NA else str(value).replace("|", "/")

    lines = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(map(say, line))} |" for line in lines)


class Store:
    """Saved evaluations of a profile: a file each while a run works, packed into one for the archive.

    Jobs side by side write ``data/scores/<profile>/<key>.npz``; :meth:`pack` gathers them in
    ``data/results/<profile>.npz`` (equal arrays once) with ``<profile>.csv`` beside it to read. What is read is
    compared with a digest; numpy and zipfile raise a dozen types on damaged files, each becomes one line.
    """

    def __init__(self, profile: str):
        self.folder, self.archive = paths.get_scores_dir(profile), paths.get_results_dir() / f"{profile}.npz"
        self._packed: tuple[float, Any, dict[str, Any]] | None = None  # time, open archive, index
        self._read: dict[str, tuple[tuple[int, int], list[dict[str, Any]]]] = {}  # rows of files as they are now

    def _open_archive(self) -> tuple[Any, dict[str, Any]]:
        """Arrays and index of the archive, opened once: to list 3,000 members of a zip file takes a while."""
        if not self.archive.is_file():
            return {}, {"rows": {}, "studies": {}, "arrays": {}, "merged": {}}
        stamp = self.archive.stat().st_mtime
        if self._packed is None or self._packed[0] != stamp:
            try:
                file = np.load(self.archive, allow_pickle=False)
                index = json.loads(str(file["index"]))
                if (own := index.get("profile", self.archive.stem)) != self.archive.stem:
                    raise ValueError(f"it is that of profile {own}")
                self._packed = stamp, file, index
            except Exception as error:
                told = f"{self.archive.name} is damaged ({' '.join(str(error).split())[:160]})"
                raise ValueError(f"{told}: fetch it again, or delete it and run the profile") from None
        return self._packed[1:]

    def read_rows(self, key: str) -> list[dict[str, Any]] | None:
        """Return the rows of an evaluation, None where it has to be computed (absent, or damaged and said so)."""
        path = self.folder / f"{key}.npz"
        if not path.is_file():
            return self._open_archive()[1]["rows"].get(key)
        stat = path.stat()
        stamp = stat.st_mtime_ns, stat.st_size
        if key in self._read and self._read[key][0] == stamp:
            return self._read[key][1]
        try:
            with np.load(path, allow_pickle=False) as file:
                rows = _read_rows(path, file)
            self._read[key] = stamp, rows
            return rows
        except Exception as error:
            told = " ".join(str(error).split())[:160]
            print(f"scores {path.name} are damaged ({told}): computed again", flush=True)
            path.unlink(missing_ok=True)
            return None

    def load(self, key: str) -> Result:
        """Return the scores of an evaluation with its controls; absent or damaged ones are one line."""
        path = self.folder / f"{key}.npz"
        try:
            if path.is_file():
                return Result.unpack(_read_arrays(path))
            file, index = self._open_archive()
            arrays = {name: file[digest] for name, digest in index["arrays"][key].items()}
            if [_digest_array(arrays[name]) for name in index["arrays"][key]] != list(index["arrays"][key].values()):
                raise ValueError("they were changed")
            return Result.unpack(arrays)
        except Exception as error:
            told = " ".join(str(error).split())[:160]
            raise ValueError(f"no readable scores {key} ({told}): run its notebook again") from None

    def merge(self, keys: list[str], control: str) -> dict[str, Any]:
        """Return the numbers of several seeds together; computed once, then kept for these very rows."""
        name = self._name_merged(keys, control)
        if (kept := self._open_archive()[1]["merged"].get(name)) is not None:
            return kept
        path = self.folder / f"merged-{name}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged: computed again
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["digest"] == _digest(f"{name} {json.dumps(kept['numbers'])}".encode()):
                return kept["numbers"]
        numbers = json.loads(json.dumps(_measure([self.load(key) for key in keys], control)))
        digest = _digest(f"{name} {json.dumps(numbers)}".encode())
        paths.write_atomic(path, json.dumps({"digest": digest, "numbers": numbers}))
        return numbers

    def _name_merged(self, keys: list[str], control: str) -> str:
        held = [(row["control"], row["auc"]) for key in keys for row in self.read_rows(key)]
        return _digest(f"{keys} {control} {held}".encode())

    def save(self, key: str, result: Result, rows: list[dict[str, Any]]) -> None:
        """Keep an evaluation, whole or not at all."""
        arrays = result.pack() | {"rows": np.array(json.dumps([row | {"key": key} for row in rows]))}
        arrays["digest"] = np.array(_digest_arrays(arrays))
        paths.write_atomic(self.folder / f"{key}.npz", lambda file: np.savez_compressed(file, **arrays))

    def note(self, study: str, attack: str, keys: list[str]) -> None:
        """Say which evaluations of an attack a study uses, in the order of its figure."""
        text = json.dumps({"study": study, "attack": attack, "keys": keys}, indent=0)
        paths.write_atomic(self.folder / _name_study(study, attack), text)

    def read_studies(self) -> dict[str, list[str]]:
        """Return study -> keys, in order."""
        packed = self._open_archive()[1]["studies"]
        noted = {(study, attack): keys for study, parts in packed.items() for attack, keys in parts.items()}
        for path in sorted(self.folder.glob("study-*.json")):
            try:
                entry = json.loads(path.read_text(encoding="utf-8"))
                if path.name != _name_study(entry["study"], entry["attack"]):
                    raise ValueError("it is that of another study")
                noted[entry["study"], entry["attack"]] = list(entry["keys"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"{path.name} is damaged ({error}): its notebook writes it again", flush=True)
        studies: dict[str, list[str]] = {}
        for (study, _), keys in noted.items():
            studies.setdefault(study, []).extend(keys)
        return studies

    def read_all(self) -> list[dict[str, Any]]:
        """Return the rows of all evaluations."""
        found = {path.stem: self.read_rows(path.stem) for path in sorted(self.folder.glob("*.npz"))}
        rows = self._open_archive()[1]["rows"] | {key: own for key, own in found.items() if own is not None}
        return [row for own in rows.values() for row in own]

    def pack(self) -> Path:
        """Gather everything that a study uses in the archive; the files of single evaluations stay."""
        studies, arrays, index = self.read_studies(), {}, {"rows": {}, "studies": {}, "arrays": {}, "merged": {}}
        index["profile"] = self.archive.stem
        for study, key in dict.fromkeys((study, key) for study, keys in studies.items() for key in keys):
            if key not in index["rows"]:
                if (rows := self.read_rows(key)) is None:
                    continue
                index["rows"][key], index["arrays"][key] = rows, {}
                for name, value in self.load(key).pack().items():
                    digest = _digest_array(value)
                    arrays[digest], index["arrays"][key][name] = value, digest
            attack = index["rows"][key][0]["attack"]
            index["studies"].setdefault(study, {}).setdefault(attack, []).append(key)

        def merge(keys: list[str], control: str) -> dict[str, Any]:
            return index["merged"].setdefault(self._name_merged(keys, control), self.merge(keys, control))

        table = tabulate([row for own in index["rows"].values() for row in own], studies, merge)
        arrays["index"] = np.array(json.dumps(index, sort_keys=True))
        paths.write_atomic(self.archive, lambda file: np.savez_compressed(file, **dict(sorted(arrays.items()))))
        paths.write_atomic(self.archive.with_suffix(".csv"), table.to_csv(index=False, float_format="%.6g"))
        return self.archive


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _digest_array(value: np.ndarray) -> str:
    return _digest(value.tobytes() + str(value.dtype).encode())


def _digest_arrays(arrays: dict[str, np.ndarray]) -> str:
    return _digest("".join(f"{name} {_digest_array(arrays[name])};" for name in sorted(arrays)).encode())


def _read_rows(path: Path, file: Any) -> list[dict[str, Any]]:
    rows = json.loads(str(file["rows"]))
    if not rows or any(row["key"] != path.stem for row in rows):
        raise ValueError("it holds another evaluation")
    return rows


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a score file; what is not as it was written, or not of this key, is an error."""
    with np.load(path, allow_pickle=False) as file:
        _read_rows(path, file)
        arrays = dict(file)
    if arrays.pop("digest", _digest_arrays(arrays)) != _digest_arrays(arrays):  # none in files of before
        raise ValueError("it was changed")
    return arrays


def _name_study(study: str, attack: str) -> str:
    return f"study-{study}-{attack}.json"

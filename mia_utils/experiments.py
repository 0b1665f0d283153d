"""The lab of a profile: its pools, models and saved scores behind a few calls, as the notebooks use them.

``attacks`` knows nothing of paths and profiles; this module does. Every evaluation is saved under
``data/scores/<profile>`` with what it was computed from, and is computed again only when that changed.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from mia_utils import artifacts, attacks, paths, profiles, seeds, train
from mia_utils.attacks import Result
from mia_utils.datasets import Pool
from mia_utils.pretrain import Run
from mia_utils.profiles import Profile, Row
from mia_utils.splits import Split


def open(profile: str, *, replay: bool = False) -> Lab:  # noqa: A001 - experiments.open is the public name
    """Open the lab of a profile.

    Args:
        profile: name of ``profiles/<name>.yaml``.
        replay: use saved scores only; nothing is trained, no data set is read.
    """
    return Lab(profiles.load(profile), replay=replay)


class Lab:
    """Pools, splits, models and scores of one profile.

    Attributes:
        profile: the validated profile.
        profile_name: its name; figures and scores are kept under it.
        replay: only saved scores may be used.
    """

    def __init__(self, profile: Profile, *, replay: bool = False):
        self.profile, self.profile_name, self.replay = profile, profile.name, replay
        self._pools: dict[str, Pool] = {}
        self._runs: dict[str, Run] = {}
        self._results: dict[Path, tuple[float, Result]] = {}

    # ------------------------------------------------------------------------------------------ rows and models

    def rows(self, **filters: Any) -> list[Row]:
        """Return the rows whose fields equal the filters, in the profile's order: ``rows(role="target", seed=0)``."""
        return [row for row in self.profile.models if all(getattr(row, k) == v for k, v in filters.items())]

    def shadow_of(self, model_id: str, *, method: str | None = None) -> str | None:
        """Return the id of a shadow on the same split (of the same method unless another is named), None if absent."""
        row = self.profile.row(model_id)
        wanted = dict(role="shadow", dataset=row.dataset, n_train=row.n_train, seed=row.seed, defense=row.defense)
        found = self.rows(**wanted, method=method or row.method)
        found.sort(key=lambda shadow: shadow.arch != row.arch)  # the same architecture first
        return found[0].id if found else None

    def pool(self, dataset: str) -> Pool:
        """Load a data set with the profile's arguments, once."""
        if dataset not in self._pools:
            self._pools[dataset] = train.load_pool(self.profile, dataset)
        return self._pools[dataset]

    def is_trained(self, model_id: str) -> bool:
        """Whether the artifact of a row exists."""
        return artifacts.find(train.spec_of(self.profile, self.profile.row(model_id))) is not None

    def _folder(self, model_id: str, train_missing: bool = False) -> Path:
        row = self.profile.row(model_id)
        folder = artifacts.find(train.spec_of(self.profile, row))
        if folder is None and train_missing and not self.replay:
            folder = train.train_row(self.profile, row)
        if folder is None:
            command = f"python -m mia_utils.train {self.profile_name} {model_id}"
            raise FileNotFoundError(
                f"model {model_id} of profile {self.profile_name} is not trained yet: run {command}"
            )
        return folder

    def model(self, model_id: str, *, train_missing: bool = False) -> Run:
        """Open a trained row; with ``train_missing`` train it here when its artifact is absent."""
        if model_id not in self._runs:
            self._runs[model_id] = train.load_run(self._folder(model_id, train_missing))
        return self._runs[model_id]

    def split(self, model_id: str) -> Split:
        """Return the split a row was trained on: the one kept with its artifact, else drawn as it would be."""
        row = self.profile.row(model_id)
        folder = artifacts.find(train.spec_of(self.profile, row))
        if folder is not None:
            return Split.load(folder / "split.npz")
        return train.draw_split(self.profile, row, self.pool(row.dataset))

    # ------------------------------------------------------------------------------------------ evaluations

    def evaluate(
        self,
        attack: str,
        model_id: str,
        *,
        knowledge: str = "partial",
        shadow: str | None = None,
        protocol: str = "controlled",
        figure: str | None = None,
        epoch: int | None = None,
        known_share: float = 1.0,
        n_nonmembers: int | None = None,
        summary: bool = True,
        controls: bool = True,
        **params: Any,
    ) -> Result:
        """Run an attack on a row, or read its saved scores.

        Args:
            attack: registered name.
            model_id: the target's row.
            knowledge: ``"partial"`` or ``"shadow"`` (then P, E, T are told from the two rows).
            shadow: id of the shadow's row; None with shadow knowledge: ``shadow_of(model_id)``.
            protocol: see ``attacks.evaluate``.
            figure: name of the figure that is drawn from it.
            epoch: attack the checkpoint of this epoch; None: the end of training.
            known_share: share of the fit images that the attacker knows.
            n_nonmembers: report on so many of the split's strangers, drawn with its seed; None: all. (In sweeps the
                members decide the width of the interval, so 512 strangers cost a sixth and say nearly as much.)
            summary: whether it enters the summary table (sweeps do not).
            controls: run the three controls beside it.
            params: parameters of the attack.

        Returns:
            Result, its meta filled with what tables and figures need.
        """
        row = self.profile.row(model_id)
        if knowledge.startswith("shadow"):
            shadow = shadow or self.shadow_of(model_id)
            if shadow is None:
                raise ValueError(
                    f"profile {self.profile_name} has no shadow for {model_id}: add a row with role shadow"
                )
            other = self.profile.row(shadow)
            same = [row.dataset == other.dataset, row.arch == other.arch, row.method == other.method]
            knowledge = "shadow:" + "".join(letter if ok else "-" for letter, ok in zip("PET", same, strict=True))
        logical = dict(attack=attack, model_id=model_id, knowledge=knowledge, shadow=shadow, protocol=protocol)
        logical |= dict(epoch=epoch, known_share=known_share, n_nonmembers=n_nonmembers, params=params)
        label = "-".join(filter(None, [attack, model_id, knowledge.replace(":", "-"), protocol[:8]]))
        path = paths.get_scores_dir(self.profile_name) / f"{label}-{artifacts.hash_spec(logical)}.npz"
        if self.replay:
            return self._read(path)
        folders = {model_id: self._folder(model_id)} | ({shadow: self._folder(shadow)} if shadow else {})
        identity = artifacts.hash_spec(
            logical
            | {
                "recipe": [
                    artifacts.RECIPES["scores"],
                    attacks.ATTACKS[attack].recipe if attack in attacks.ATTACKS else 0,
                ]
            }
            | {"models": [folder.name for folder in folders.values()]}
        )
        figures = {figure} - {None}
        if path.is_file() and (saved := self._read(path)).meta.get("identity") == identity:
            if not controls or saved.controls:
                return self._tag(saved, path, figure, summary)
            figures |= set(saved.meta["figures"])  # the same scores again, now with controls
            summary = summary or saved.meta["summary"]
        run, pool = self.model(model_id), self.pool(row.dataset)
        split = Split.load(folders[model_id] / "split.npz")
        if shadow and Split.load(folders[shadow] / "split.npz").hash != split.hash:
            raise ValueError(f"{shadow} was trained on another split than {model_id}: train both rows again")
        if n_nonmembers is not None and n_nonmembers < len(split.target_nonmembers):
            order = seeds.rng(split.seed, "fewer-strangers").permutation(split.target_nonmembers)
            split = dataclasses.replace(split, target_nonmembers=np.sort(order[:n_nonmembers]))
        result = attacks.evaluate(
            attack,
            run.encoder_at(epoch),
            pool,
            split,
            knowledge=knowledge,
            shadow=self.model(shadow).encoder if shadow else None,
            untrained=run.encoder_at(0) if controls else None,
            protocol=protocol,
            seed=row.seed,
            cache=_cache_features,
            controls=controls,
            known_share=known_share,
            **params,
        )
        facts = dict(model_id=model_id, method=row.method, arch=row.arch, dataset=row.dataset, seed=row.seed)
        facts |= dict(n_train=row.n_train, epochs=row.epochs, augmentation=row.augmentation, defense=row.defense)
        facts |= dict(attack=attack, epoch=epoch, known_share=known_share, n_nonmembers=n_nonmembers)
        facts |= dict(attacker="static", identity=identity)
        facts |= dict(shadow_method=self.profile.row(shadow).method if shadow else None, train_seconds=run.seconds)
        facts |= dict(utility=run.utility.get("probe"), utility_untrained=run.utility.get("probe_untrained"))
        facts |= dict(figures=sorted(figures), summary=summary)
        for part in (result, *result.controls.values()):
            part.meta.update(facts)
        result.save(path)
        return self._remember(path, result)

    def evaluate_blind(
        self, dataset: str, rung: str, *, n_members: int, seed: int = 0, figure: str | None = "fig02_blind_ladder"
    ) -> Result:
        """Measure what an attacker who never sees a model can tell under one protocol.

        Args:
            dataset: data set of the profile.
            rung: ``"released-view"``, ``"released-split"``, ``"frame-thirds"`` (frames of one block in fit and
                report), ``"iid-frames"`` or ``"controlled"``.
            n_members: members and as many strangers per role, at most three times as many strangers.
            seed: of the split.
            figure: figure that is drawn from it.

        Returns:
            Result of an attack called ``no-model``.
        """
        logical = dict(blind=rung, dataset=dataset, n_members=n_members, seed=seed)
        label = f"blind-{rung}-{dataset.split(':')[0]}-s{seed}"
        path = paths.get_scores_dir(self.profile_name) / f"{label}-{artifacts.hash_spec(logical)}.npz"
        if self.replay:
            return self._read(path)
        data = artifacts.fingerprint_data(dataset, self.profile.datasets.get(dataset, {}))
        identity = artifacts.hash_spec(logical | {"data": data, "recipe": artifacts.RECIPES["scores"]})
        if path.is_file() and self._read(path).meta.get("identity") == identity:
            return self._tag(self._read(path), path, figure, False)
        result = attacks.evaluate_blind(self.pool(dataset), rung, n_members=n_members, seed=seed)
        facts = dict(model_id=f"{dataset}-{rung}", method="", arch="", dataset=dataset, seed=seed, rung=rung)
        result.meta.update(facts | dict(identity=identity, figures=[figure] if figure else [], summary=False))
        result.save(path)
        return self._remember(path, result)

    # ------------------------------------------------------------------------------------------ saved scores

    def results(self, figure: str | None = None) -> list[Result]:
        """Return all saved results of the profile, or those a figure is drawn from, in the order of their files."""
        known = {row.id for row in self.profile.models}
        found = []
        for path in sorted(paths.get_scores_dir(self.profile_name).glob("*.npz")):
            result = self._read(path)
            if result.meta.get("rung") is None and result.meta.get("model_id") not in known:
                continue  # a row that the profile no longer has
            if figure is None or figure in result.meta.get("figures", ()):
                found.append(result)
        return found

    def _read(self, path: Path) -> Result:
        if not path.is_file():
            raise FileNotFoundError(
                f"no saved scores {path.name} in profile {self.profile_name}: run its notebook first"
            )
        stamp = path.stat().st_mtime
        if path not in self._results or self._results[path][0] != stamp:
            self._results[path] = (stamp, Result.load(path))
        return self._results[path][1]

    def _remember(self, path: Path, result: Result) -> Result:
        self._results[path] = (path.stat().st_mtime, result)
        return result

    def _tag(self, result: Result, path: Path, figure: str | None, summary: bool) -> Result:
        """Note on saved scores that one more figure is drawn from them."""
        figures = result.meta.setdefault("figures", [])
        if (figure and figure not in figures) or (summary and not result.meta.get("summary")):
            tagged = sorted({*figures, *([figure] if figure else [])})
            for part in (result, *result.controls.values()):
                part.meta.update(figures=tagged, summary=summary or bool(result.meta.get("summary")))
            result.save(path)
        return self._remember(path, result)


def _cache_features(key: dict, make) -> np.ndarray:
    """Keep extracted features as artifacts: an encoder is asked once, attackers train on what it said."""
    spec = {"kind": "features", "readable": str(key["extract"]).split(".")[-2], **key}
    folder = artifacts.load_or_make(spec, functools.partial(_write_features, make))
    return np.load(folder / "features.npy", allow_pickle=False)


def _write_features(make, folder: Path) -> dict:
    features = make()
    np.save(folder / "features.npy", features)
    return {"shape": list(features.shape)}

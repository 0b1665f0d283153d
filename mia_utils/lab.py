"""The lab of a profile: its models, splits and results behind a few calls, as the notebooks use them.

``lab.run`` queries models and saves scores, once: what was computed is found again by what it rests on, without
importing torch. ``lab.results`` is the table of everything measured; figures are queries over it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mia_utils import calls, results
from mia_utils.calls import Attacker, Target
from mia_utils.runner import artifacts, choices, profiles, train
from mia_utils.runner.profiles import Row

if TYPE_CHECKING:
    from mia_utils.datasets import Pool
    from mia_utils.pretrain import Run
    from mia_utils.protocol.intervals import Interval
    from mia_utils.protocol.result import Result
    from mia_utils.protocol.splits import Split


_ATTACKER = {field.name for field in dataclasses.fields(Attacker)}


class Lab:
    """Models, splits and results of one profile."""

    def __init__(self, profile: str):
        self.profile, self.name = profiles.load(profile), profile
        self.store = results.Store(self.name)
        self._pools: dict[str, Pool] = {}
        self._runs: dict[str, Run] = {}
        self._noted: dict[tuple[str, str], list[str]] = {}
        self._table: pd.DataFrame | None = None

    def models(self, **filters: Any) -> list[Row]:
        """Return the models whose fields equal the filters; defended ones where ``defense`` or ``study`` is named."""
        if not {"defense", "study"} & set(filters):
            filters["defense"] = "none"
        if unknown := filters.keys() - {*(known := (*Row.model_fields, "strength"))}:
            raise ValueError(f"models: unknown field {min(unknown)!r}: expected some of {', '.join(known)}")
        return [row for row in self.profile.models if all(getattr(row, k) == v for k, v in filters.items())]

    def trainings(self, model_id: str) -> list[Row]:
        """Return all trainings of a model's recipe: the rows of the same name whatever their seed."""
        row = self.profile.row(model_id)
        named = results.drop_seed(row.id, row.seed)
        return [r for r in self.profile.models if results.drop_seed(r.id, r.seed) == named]

    def target(self, model_id: str, *, defense: str | None = None, strength: Any = None) -> list[Target]:
        """Name a model with a defense of its outputs; a list of strengths gives as many targets."""
        return [Target(model_id, defense, value) for value in _as_list(strength)]

    def shadow_of(self, model_id: str) -> str | None:
        """Return a shadow of the same method on the same split, None if absent."""
        row = self.profile.row(model_id)
        wanted = dict(role="shadow", dataset=row.dataset, n_train=row.n_train, seed=row.seed, defense=row.defense)
        found = self.models(**wanted, strength=row.strength, method=row.method)
        return _find_nearest(row, found) if found else None

    def undefended_of(self, model_id: str) -> str:
        """Return the model that a defended one differs from by its defense alone."""
        row = self.profile.row(model_id)
        if row.defense == "none":
            return model_id
        same = {key: getattr(row, key) for key in ("role", "method", "arch", "dataset", "n_train", "seed")}
        if not (found := self.models(defense="none", **same)):
            raise ValueError(f"profile {self.name} has no undefended model for {model_id}: add one")
        return _find_nearest(row, found, choices.STRENGTHS[row.defense])

    def pool(self, dataset: str) -> Pool:
        """Load a data set with the profile's arguments, once."""
        if dataset not in self._pools:
            self._pools[dataset] = train.load_pool(self.profile, dataset)
        return self._pools[dataset]

    def has_data(self, dataset: str) -> bool:
        """Whether a data set can be read here."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return self.pool(dataset) is not None
        return False

    def _find(self, model_id: str) -> Path | None:
        return artifacts.find(train.spec_of(self.profile, self.profile.row(model_id)))

    def is_trained(self, model_id: str) -> bool:
        """Whether the artifact of a model exists."""
        return self._find(model_id) is not None

    def folder(self, model_id: str) -> Path:
        """Return the artifact of a model; a model that is not trained is one line that says how to train it."""
        if (folder := self._find(model_id)) is None:
            command = f"python -m mia_utils.runner.train {self.name} {model_id}"
            raise FileNotFoundError(f"model {model_id} of profile {self.name} is not trained yet: run {command}")
        return folder

    def model(self, model_id: str, *, train_missing: bool = False) -> Run:
        """Open a trained model; with ``train_missing`` train it here when its artifact is absent."""
        if model_id not in self._runs:
            if train_missing and not self.is_trained(model_id):
                train.train_row(self.profile, self.profile.row(model_id))
            self._runs[model_id] = train.load_run(self.folder(model_id))
        return self._runs[model_id]

    def split(self, model_id: str) -> Split:
        """Return the split a model was trained on: the one kept with its artifact, else drawn as it would be."""
        from mia_utils.protocol.splits import Split  # not needed where results are only read

        row = self.profile.row(model_id)
        if (folder := self._find(model_id)) is not None:
            return Split.load(folder / "split.npz")
        return train.draw_split(self.profile, row, self.pool(row.dataset))

    def run(
        self, attacks: str | Sequence[str], targets: Any, *, study: str, protocol: str | Sequence[str] = "controlled",
        checkpoint: Any = None, controls: str | bool = "first", **settings: Any,
    ) -> pd.DataFrame:  # fmt: skip
        """Attack every target in every setting, or find the saved scores; the first setting pays for the controls.

        Lists are swept: ``n_masks=[1, 4, 16]``, ``checkpoint=[150, None]``, ``shadow=[...]``. A setting that is
        itself a list is swept as a list of lists: ``crop_scale=[[.08, .1], [.08, .2]]``.

        Args:
            attacks: registered name or names.
            targets: model ids, rows of ``models()``, ``Target`` objects, alone or in (nested) lists.
            study: name under which figures find the results (column ``study``).
            protocol: ``"controlled"`` or one flaw of released code on purpose; see ``attacks.evaluate``.
            checkpoint: epoch that is attacked; None: the end of training.
            controls: ``"first"`` (the first setting of each target and attack), True or False.
            settings: fields of ``Attacker``, ``shadow_checkpoint``, parameters of the attack, and ``n_nonmembers``:
                evaluate on so many of the split's (the members decide how wide an interval is: 512 say nearly as much),
                or on more, from images in no role (10,000: TPR at .1 % FPR).

        Returns:
            The results of the study so far, controls and seeds left out.
        """
        if not re.fullmatch(r"[A-Za-z0-9][\w .-]*", str(study)):  # it is part of a file's name
            raise ValueError(f"expected study to be a name of letters, digits, '-', '_' and '.', got {study!r}")
        names = [attacks] if isinstance(attacks, str) else list(attacks or ())
        sweep = {"protocol": protocol, "checkpoint": checkpoint, **settings}
        for attack, target in itertools.product(names, list(_flatten(targets))):
            for i, setting in enumerate(itertools.product(*map(_as_list, sweep.values()))):
                call = dict(zip(sweep, setting, strict=True))
                attacker = Attacker(**{name: call.pop(name) for name in sweep if name in _ATTACKER})
                with_controls = i == 0 if controls == "first" else bool(controls)
                self._note(study, attack, self._run_one(attack, target, attacker, with_controls, call))
        table = self.results
        own = (table["study"] == study) & table["attack"].isin(names) & (table["control"] == "") & table["seed"].isna()
        return results.Found(table[own])

    def _note(self, study: str, attack: str, key: str) -> None:
        noted = self._noted.setdefault((study, attack), [])  # the first call of a notebook starts the study anew
        if key not in noted:
            noted.append(key)
            self.store.note(study, attack, noted)
        self._table = None

    def _run_one(self, attack: str, target: Target, attacker: Attacker, controls: bool, call: dict[str, Any]) -> str:
        """Evaluate one attack on one target, or find it; returns its key."""
        found = calls.resolve(self, attack, target, attacker, **call)
        names = [artifacts.name_of(train.spec_of(self.profile, self.profile.row(name))) for name in found.models]
        recipe = [artifacts.RECIPES["scores"], artifacts.RECIPES.get(f"attack:{attack}", 1)]
        key = f"{attack}-{target.id}-{artifacts.hash_spec(found.identity | {'recipe': recipe, 'models': names})}"
        with artifacts.hold(f"scores-{self.name}-{key}"):  # notebooks side by side ask for the same scores
            saved = self.store.read_rows(key)
            if saved is None or (controls and len(saved) == 1):
                result = calls.evaluate(self, found, controls=controls)
                self.store.save(key, result, results.make_rows(result, calls.describe(self, found)))
        return key

    def measure(self, model_id: str, *, defense: str | None = None, strength: float | None = None) -> dict[str, float]:
        """Measure the utility of a model behind a defense of its outputs, in [0, 1]; kept on disk."""
        row, folder = self.profile.row(model_id), self.folder(model_id)
        target = Target(model_id, defense, strength)
        spec = {"kind": "utility", "readable": model_id, "model": folder.name, "recipe": artifacts.RECIPES["scores"]}
        spec |= {"defense": defense, "strength": strength}

        def make(into: Path) -> dict:
            run, pool, split = self.model(model_id), self.pool(row.dataset), self.split(model_id)
            model = run.encoder_at(strength if defense == "early-stopping" else None)
            model = calls.defend(model, target, seed=row.seed)
            if row.method in choices.SEGMENTERS:
                members, nonmembers = train.get_sides(row, split)
                return train.measure_segmenter(model, pool, members, nonmembers[: train.HELDOUT_IMAGES])
            return train.measure_utility(model, pool, split)

        return artifacts.read_meta(artifacts.load_or_make(spec, make))

    def run_baselines(self, ladder: Iterable[Sequence[str]], *, n_members: int) -> pd.DataFrame:
        """Measure what an attacker can tell without any model under each protocol, on every seed of the profile.

        Args:
            ladder: (data set, protocol) pairs; protocols of ``attacks.evaluate_blind``.
            n_members: members and as many non-members per role, at most three times as many non-members.
        """
        for (dataset, protocol), seed in itertools.product(ladder, self.profile.seeds):
            data = artifacts.fingerprint_data(dataset, self.profile.datasets.get(dataset, {}))
            logical = dict(blind=protocol, dataset=dataset, n_members=n_members, seed=seed)
            key = artifacts.hash_spec(logical | {"data": data, "recipe": artifacts.RECIPES["scores"]})
            key = f"no-model-{dataset.split(':')[0]}-{protocol}-s{seed}-{key}"
            with artifacts.hold(f"scores-{self.name}-{key}"):
                if self.store.read_rows(key) is None:
                    from mia_utils import attacks  # imports torch

                    result = attacks.evaluate_blind(self.pool(dataset), protocol, n_members=n_members, seed=seed)
                    facts = dict(attack="no-model", target=f"{dataset}-{protocol}", dataset=dataset, protocol=protocol)
                    facts |= dict(seed=seed, knowledge="partial", n_train=n_members)
                    self.store.save(key, result, results.make_rows(result, facts))
            self._note("baselines", "no-model", key)
        return results.Found(self.results.query("study == 'baselines' and seed.isna()"))

    @property
    def results(self) -> pd.DataFrame:
        """The table of everything measured in this profile (:func:`mia_utils.results.tabulate`)."""
        if self._table is None:
            self._table = results.tabulate(self.store.read_all(), self.store.read_studies(), self.store.merge)
        return self._table

    def scores(self, row: Any) -> list[Result]:
        """Return the scores behind a row of the table, or its key: one result a seed (its controls with it)."""
        keys = row.get("key") if isinstance(row, dict | pd.Series) else row
        if not isinstance(keys, str):
            raise ValueError(f"expected a row of lab.results, got {type(row).__name__}")
        return [self.store.load(key) for key in keys.split(";")]

    def difference(self, row: Any, other: Any, n_bootstrap: int = 200) -> Interval:
        """How much higher the AUC of a row is than that of another on the same images (:func:`metrics.clear_of`)."""
        from mia_utils.protocol import metrics

        mine, theirs = self.scores(row), self.scores(other)
        if any(a.image_ids.tolist() != b.image_ids.tolist() for a, b in zip(mine, theirs, strict=False)):
            raise ValueError("expected two rows on the same images, got different ones")
        return metrics.clear_of(mine, theirs, n_bootstrap=n_bootstrap)


def _find_nearest(row: Row, found: list[Row], *without: str | None) -> str:
    """The model with the same architecture, then the same options but those named, then the plain recipe."""

    def differs(r: Row) -> tuple:
        options = calls.get_options(r, *without) != calls.get_options(row, *without)
        other = r.study not in ("main", "undefended", row.study)
        return r.arch != row.arch, options, r.augmentation != "none", r.epochs != row.epochs, other

    return min(found, key=differs).id


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _flatten(targets: Any) -> Iterable[Target]:
    if isinstance(targets, Target | Row | str):
        yield targets if isinstance(targets, Target) else Target(getattr(targets, "id", targets))
    elif isinstance(targets, list | tuple):
        for part in targets:
            yield from _flatten(part)
    else:
        raise ValueError(f"expected model ids, rows of lab.models() or targets of lab.target(), got {targets!r}")


open = Lab  # ``lab.open("quick")``

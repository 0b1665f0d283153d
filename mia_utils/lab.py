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

from mia_utils import attacks, paths, seeds
from mia_utils.attacks import Result, mim
from mia_utils.datasets import Pool
from mia_utils.models import outputs
from mia_utils.pretrain import Run
from mia_utils.protocol import splits
from mia_utils.protocol.splits import Split
from mia_utils.runner import artifacts, profiles, train
from mia_utils.runner.profiles import Profile, Row

DECODER_IMAGES = 512  # of a decoder that the attacker trains himself


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
        """Return the rows whose fields equal the filters, in the profile's order: ``rows(role="target", seed=0)``.

        Defended rows come only when they are asked for: ``rows(defense="dp-sgd")``, ``rows(study="defenses")``.
        """
        if not {"defense", "study"} & set(filters):
            filters["defense"] = "none"
        return [row for row in self.profile.models if all(getattr(row, k) == v for k, v in filters.items())]

    def shadow_of(self, model_id: str, *, method: str | None = None) -> str | None:
        """Return the id of a shadow on the same split (of the same method unless another is named), None if absent."""
        row = self.profile.row(model_id)
        wanted = dict(role="shadow", dataset=row.dataset, n_train=row.n_train, seed=row.seed, defense=row.defense)
        found = [r for r in self.rows(**wanted, method=method or row.method) if r.strength == row.strength]

        def differs(shadow: Row) -> tuple:  # the same architecture first, then the same options, the plain recipe
            options = [{k: v for k, v in r.options.items() if k != "checkpoints"} for r in (row, shadow)]
            return shadow.arch != row.arch, options[0] != options[1], shadow.study not in ("main", row.study)

        found.sort(key=differs)
        return found[0].id if found else None

    def undefended_of(self, model_id: str) -> str:
        """Return the id of the row that a defended row differs from by its defense alone.

        Raises:
            ValueError: the profile has no such row.
        """
        row = self.profile.row(model_id)
        if row.defense == "none":
            return model_id
        same = ("role", "method", "arch", "dataset", "n_train", "seed")
        found = self.rows(defense="none", **{key: getattr(row, key) for key in same})
        own = ("checkpoints", profiles.STRENGTHS[row.defense])

        def differ(r: Row) -> tuple[bool, ...]:
            told, mine = ({k: v for k, v in o.items() if k not in own} for o in (r.options, row.options))
            return told != mine, r.augmentation != "none", r.epochs != row.epochs, r.study not in ("main", row.study)

        found.sort(key=differ)
        if not found:
            raise ValueError(f"profile {self.profile_name} has no undefended row for {model_id}: add one")
        return found[0].id

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
            command = f"python -m mia_utils.runner.train {self.profile_name} {model_id}"
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
        shadow_epoch: int | None = None,
        known_share: float = 1.0,
        n_nonmembers: int | None = None,
        reference: str | None = None,
        decoder: str = "own",
        decoder_epochs: int = 200,
        defense: str | None = None,
        strength: float | None = None,
        attacker: str = "adaptive",
        summary: bool = True,
        controls: bool = True,
        **params: Any,
    ) -> Result:
        """Run an attack on a row, or read its saved scores.

        Args:
            attack: registered name.
            model_id: the target's row.
            knowledge: ``"partial"`` or ``"shadow"`` (then P, E, T are told from the two rows).
            shadow: id of the shadow's row; None with shadow knowledge: ``shadow_of(model_id)``. A shadow of another
                data set brings its own pictures: the attacker learns from those.
            protocol: see ``attacks.evaluate``.
            figure: name of the figure that is drawn from it.
            epoch: attack the checkpoint of this epoch; None: the end of training.
            shadow_epoch: ask the shadow's checkpoint of this epoch; None: the end of its training.
            known_share: share of the fit images that the attacker knows.
            n_nonmembers: report on so many of the split's strangers, drawn with its seed; None: all. (In sweeps the
                members decide the width of the interval, so 512 strangers cost a sixth and say nearly as much.)
            reference: id of a row of role ``reference``, for attacks that calibrate by its answers.
            decoder: for attacks that ask for reconstructions: the model's ``"own"`` decoder, or one that the
                ``"attacker"`` trains over the frozen encoder on images outside all roles (``Split.reference``).
            decoder_epochs: epochs of the attacker's decoder, at most those of the row.
            defense: a defense that needs no row of its own: a name of ``outputs.OUTPUTS`` (what the model answers is
                disturbed, and what the shadow answers), or ``"early-stopping"`` (both as they were at an epoch).
            strength: how strong it is, in the units of the defense; the epoch for early stopping.
            attacker: ``"adaptive"`` learned from defended answers; ``"static"`` learned his network and his threshold
                before there was a defense, be it this one or that of the row. Undefended, there is only one.
            summary: whether it enters the summary table (sweeps do not).
            controls: run the three controls beside it.
            params: parameters of the attack.

        Returns:
            Result, its meta filled with what tables and figures need.
        """
        row = self.profile.row(model_id)
        if defense == "early-stopping":
            epoch = shadow_epoch = int(strength)
        static = _check_attacker(attacker, defended=defense is not None or row.defense != "none")
        if knowledge.startswith("shadow"):
            shadow = shadow or self.shadow_of(model_id)
            if shadow is None:
                raise ValueError(
                    f"profile {self.profile_name} has no shadow for {model_id}: add a row with role shadow"
                )
            knowledge = "shadow:" + self._compare(row, self.profile.row(shadow))
        else:
            shadow_epoch = None
        logical = dict(attack=attack, model_id=model_id, knowledge=knowledge, shadow=shadow, protocol=protocol)
        logical |= dict(epoch=epoch, known_share=known_share, n_nonmembers=n_nonmembers, params=params)
        # named only where they are used, so that scores saved before there were such choices keep their names
        logical |= {"reference": reference} if reference is not None else {}
        logical |= {"decoder": decoder} if decoder != "own" else {}
        logical |= {"decoder_epochs": decoder_epochs} if decoder != "own" and decoder_epochs != 200 else {}
        logical |= {"shadow_epoch": shadow_epoch} if shadow_epoch is not None else {}
        logical |= {"defense": defense, "strength": strength} if defense is not None else {}
        plain, plain_shadow = None, None  # whom a static attacker learned from
        if static:
            plain = self.undefended_of(model_id)
            plain_shadow = self.shadow_of(plain) if shadow else None
            logical["learned_from"] = [plain, plain_shadow]
        label = "-".join(filter(None, [attack, model_id, knowledge.replace(":", "-"), protocol[:8]]))
        path = paths.get_scores_dir(self.profile_name) / f"{label}-{artifacts.hash_spec(logical)}.npz"
        if self.replay:
            return self._read(path)
        used = [name for name in (model_id, shadow, reference, plain, plain_shadow) if name]
        folders = {name: self._folder(name) for name in used}
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
        # notebooks side by side ask for the same scores
        with artifacts.hold(f"scores-{self.profile_name}-{path.stem}"):
            figures = {figure} - {None}
            if path.is_file() and (saved := self._read(path)).meta.get("identity") == identity:
                if not controls or saved.controls:
                    return self._tag(saved, path, figure, summary)
                figures |= set(saved.meta["figures"])  # the same scores again, now with controls
                summary = summary or saved.meta["summary"]
            run, pool = self.model(model_id), self.pool(row.dataset)
            split = Split.load(folders[model_id] / "split.npz")
            other = Split.load(folders[shadow] / "split.npz") if shadow else split
            from_elsewhere = shadow is not None and self.profile.row(shadow).dataset != row.dataset
            if other.hash != split.hash and not from_elsewhere:
                raise ValueError(f"{shadow} was trained on another split than {model_id}: train both rows again")
            if n_nonmembers is not None and n_nonmembers < len(split.target_nonmembers):
                order = seeds.rng(split.seed, "fewer-strangers").permutation(split.target_nonmembers)
                split = dataclasses.replace(split, target_nonmembers=np.sort(order[:n_nonmembers]))
            if from_elsewhere:
                pool, split = splits.join(pool, split, self.pool(self.profile.row(shadow).dataset), other)
            ask = functools.partial(self._get_model, attack, decoder=decoder, decoder_epochs=decoder_epochs)
            guard = functools.partial(_defend, defense=defense, strength=strength)
            guarded = defense is not None and defense != "early-stopping"
            result = attacks.evaluate(
                attack,
                guard(ask(model_id, epoch), seed=row.seed),
                pool,
                split,
                knowledge=knowledge,
                shadow=guard(ask(shadow, shadow_epoch), seed=seeds.derive(row.seed, "shadow")) if shadow else None,
                reference=ask(reference, None) if reference else None,
                untrained=guard(ask(model_id, 0), seed=row.seed) if controls else None,
                protocol=protocol,
                seed=row.seed,
                cache=_cache_features,
                controls=controls,
                known_share=known_share,
                learned_from=(ask(plain, None), ask(plain_shadow, None) if shadow else None) if static else None,
                **params,
            )
            facts = dict(model_id=model_id, method=row.method, arch=row.arch, dataset=row.dataset, seed=row.seed)
            facts |= dict(n_train=row.n_train, epochs=row.epochs, augmentation=row.augmentation)
            facts |= dict(attack=attack, epoch=epoch, known_share=known_share, n_nonmembers=n_nonmembers)
            facts |= dict(identity=identity, shadow=shadow, reference=reference, decoder=decoder)
            facts |= dict(defense=defense or row.defense, strength=row.strength if defense is None else strength)
            defended = facts["defense"] != "none"
            facts["attacker"] = attacker if defended else "static"  # there was no defense to adapt to
            facts |= dict(shadow_method=self.profile.row(shadow).method if shadow else None, train_seconds=run.seconds)
            utility = self.measure(model_id, defense=defense, strength=strength) if defense else run.utility
            facts["utility"] = utility.get("probe", utility.get("miou"))
            facts["utility_untrained"] = run.utility.get("probe_untrained")
            if defended:
                facts["knn"] = utility.get("knn")
            facts |= dict(shadow_dataset=self.profile.row(shadow).dataset if shadow else None)
            attacked = run.history[run.history["epoch"] == (row.epochs if epoch is None else epoch)]
            for key in ("miou", "miou_members"):  # of a segmenter's checkpoint
                if key in attacked and len(attacked):
                    facts[key] = utility[key] if guarded else float(attacked[key].iloc[-1])
            facts |= dict(figures=sorted(figures), summary=summary)
            for part in (result, *result.controls.values()):
                part.meta.update(facts)
            result.save(path)
            return self._remember(path, result)

    def measure(self, model_id: str, *, defense: str | None = None, strength: float | None = None) -> dict[str, float]:
        """Measure what a model is good for, disturbed by a defense without a row; kept on disk.

        Returns:
            dict: ``knn`` and ``probe`` accuracy of an encoder, ``miou``, ``miou_members`` and ``pixel_accuracy`` of a
            segmenter, all in [0, 1].
        """
        row, folder = self.profile.row(model_id), self._folder(model_id)
        spec = {"kind": "utility", "readable": model_id, "model": folder.name, "recipe": artifacts.RECIPES["scores"]}
        spec |= {"defense": defense, "strength": strength}

        def make(into: Path) -> dict:
            run, pool = self.model(model_id), self.pool(row.dataset)
            split = Split.load(folder / "split.npz")
            model = run.encoder_at(int(strength) if defense == "early-stopping" else None)
            model = _defend(model, defense=defense, strength=strength, seed=row.seed)
            if row.method in profiles.SEGMENTERS:
                members, strangers = train.get_sides(row, split)
                return train.measure_segmenter(model, pool, members, strangers[: train.HELDOUT_IMAGES])
            return train.measure_utility(model, pool, split)

        return artifacts.read_meta(artifacts.load_or_make(spec, make))

    def _compare(self, row: Row, shadow: Row) -> str:
        """Which of pre-training data, encoder and training a shadow shares with its target, as ``"PE-"``."""
        recipe = [
            {**r.options, "checkpoints": None, "method": r.method, "augmentation": r.augmentation}
            for r in (row, shadow)
        ]
        encoder = [(r.arch, r.method if r.method in profiles.SEGMENTERS else "") for r in (row, shadow)]
        if row.method in profiles.SEGMENTERS:  # their method is the network
            recipe = [{**part, "method": ""} for part in recipe]
        same = [row.dataset == shadow.dataset, encoder[0] == encoder[1], recipe[0] == recipe[1]]
        return "".join(letter if ok else "-" for letter, ok in zip("PET", same, strict=True))

    def _get_model(self, attack: str, model_id: str, epoch: int | None, *, decoder: str, decoder_epochs: int) -> Any:
        """Return a row's model as an attack asks for it: the encoder, or encoder and decoder together."""
        run = self.model(model_id)
        if attack not in attacks.ATTACKS or "reconstruct" not in attacks.ATTACKS[attack].needs:
            return run.encoder_at(epoch)
        if decoder not in ("own", "attacker"):
            raise ValueError(f"expected decoder 'own' or 'attacker', got {decoder!r}")
        own = decoder == "own"
        model = run.autoencoder_at(epoch) if own else self._attach_decoder(model_id, epoch, epochs=decoder_epochs)
        if model is None:
            raise ValueError(
                f"{model_id} ({run.method}) has no decoder: let the attacker train one, decoder='attacker'"
            )
        return model

    def _attach_decoder(self, model_id: str, epoch: int | None, *, epochs: int):
        """Return a row's frozen encoder with a decoder that the attacker trained on data of his own, kept on disk."""
        row, run, folder = self.profile.row(model_id), self.model(model_id), self._folder(model_id)
        epoch = run.checkpoints[-1] if epoch is None else epoch
        split = Split.load(folder / "split.npz")
        n_images = min(DECODER_IMAGES, len(split.utility))
        recipe = dict(n_images=n_images, epochs=min(epochs, row.epochs))
        spec = {"kind": "decoder", "readable": f"{model_id}-e{epoch}", "recipe": artifacts.RECIPES["decoder"], **recipe}
        spec |= {"model": folder.name, "epoch": epoch}

        def make(into: Path) -> dict:
            images = self.pool(row.dataset).images[split.reference(n_images)]
            options = dict(epochs=recipe["epochs"], seed=row.seed, checkpoints=[])
            made = mim.train_decoder(run.encoder_at(epoch), images, **options)
            made.save(into)
            return {"settings": made.settings, "train_seconds": round(made.seconds, 2)}

        return train.load_run(artifacts.load_or_make(spec, make)).decoder

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
        with artifacts.hold(f"scores-{self.profile_name}-{path.stem}"):
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
        """Note on saved scores that one more figure is drawn from them; the caller holds their lock."""
        figures = result.meta.setdefault("figures", [])
        if (figure and figure not in figures) or (summary and not result.meta.get("summary")):
            tagged = sorted({*figures, *([figure] if figure else [])})
            for part in (result, *result.controls.values()):
                part.meta.update(figures=tagged, summary=summary or bool(result.meta.get("summary")))
            result.save(path)
        return self._remember(path, result)


def _check_attacker(attacker: str, *, defended: bool) -> bool:
    """Whether the attacker is a static one."""
    if attacker not in ("adaptive", "static"):
        raise ValueError(f"expected attacker 'adaptive' or 'static', got {attacker!r}")
    if attacker == "static" and not defended:
        raise ValueError("attacker 'static' goes with a defense: name one, or attack a defended row")
    return attacker == "static"


def _defend(model: Any, *, defense: str | None, strength: float | None, seed: int) -> Any:
    """Disturb what a model answers; early stopping has chosen its weights already."""
    if defense is None or defense == "early-stopping":
        return model
    return outputs.perturb(model, defense, strength, seed=seed)


def _cache_features(key: dict, make) -> np.ndarray:
    """Keep extracted features as artifacts: an encoder is asked once, attackers train on what it said."""
    spec = {"kind": "features", "readable": str(key["extract"]).split(".")[-2], **key}
    folder = artifacts.load_or_make(spec, functools.partial(_write_features, make))
    return np.load(folder / "features.npy", allow_pickle=False)


def _write_features(make, folder: Path) -> dict:
    features = make()
    np.save(folder / "features.npy", features)
    return {"shape": list(features.shape)}

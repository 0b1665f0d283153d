"""One evaluation of an attack: what is attacked, what the attacker has, and what the result is known by."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia_utils import results, seeds
from mia_utils.runner import artifacts, choices, train
from mia_utils.runner.profiles import Row

if TYPE_CHECKING:
    from mia_utils.lab import Lab
    from mia_utils.protocol.result import Result
    from mia_utils.protocol.splits import Split

DECODER_IMAGES = 512  # that an attacker trains a decoder of their own with


@dataclasses.dataclass(frozen=True)
class Target:
    """What is attacked: a model of the profile, possibly behind a defense that needs no model of its own."""

    id: str
    # of models.outputs.OUTPUTS (perturbs what is output, the shadow's too), or "early-stopping" (both as at an epoch)
    defense: str | None = None
    strength: float | None = None  # in the defense's own unit; the epoch for early stopping

    def __post_init__(self) -> None:
        """Refuse half a defense."""
        if self.defense is None and self.strength is not None:
            raise ValueError(f"strength {self.strength!r} belongs to a defense: name one")
        if self.defense == "early-stopping" and self.strength is None:
            raise ValueError("early-stopping needs a strength: the epoch")


@dataclasses.dataclass(frozen=True)
class Attacker:
    """What an attacker has."""

    knowledge: str = "partial"  # the membership of the images outside the scored fold; or "shadow"
    shadow: str | None = None  # model that stands in for the target; None with shadow knowledge: lab.shadow_of(target)
    known_share: float = 1.0  # of the attack-training images whose membership is known
    # one model: its distance is subtracted (mim: alpha times); a list: their mean log ratio calibrates any score
    reference: str | list[str] | None = None
    reference_checkpoint: int | None = None  # of the references: the target's, or calibration is spoiled; None: the end
    decoder: str = "own"  # the target's; "attacker": trained over the frozen encoder on other images
    decoder_epochs: int = 200  # of the attacker's decoder, at most those of the target
    attacker: str = "adaptive"  # learned from defended outputs; "static": before there was a defense


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything one evaluation depends on, resolved; ``identity`` is what its key is made of."""

    attack: str
    target: Target
    attacker: Attacker
    row: Row  # the target's model
    knowledge: str  # "partial" or "shadow:PET": which of distribution, encoder, training the shadow shares
    shadow: str | None
    protocol: str
    checkpoint: int | None  # None: the end of training, as of the shadow
    shadow_checkpoint: int | None
    n_nonmembers: int | None
    plain: str | None  # what a static attacker learned from, undefended
    plain_shadow: str | None
    params: dict[str, Any]  # of the attack

    @property
    def models(self) -> list[str]:
        """Models it queries, the target first."""
        used = [self.row.id, self.shadow, *_as_names(self.attacker.reference), self.plain, self.plain_shadow]
        return list(dict.fromkeys(name for name in used if name))

    @property
    def identity(self) -> dict[str, Any]:
        """What the key is made of; entries that came later are named only where they are used."""
        who, what = self.attacker, self.target
        spec = dict(attack=self.attack, model_id=self.row.id, knowledge=self.knowledge, shadow=self.shadow)
        spec |= dict(protocol=self.protocol, epoch=self.checkpoint, known_share=who.known_share)
        spec |= dict(n_nonmembers=self.n_nonmembers, params=self.params)
        spec |= {"reference": who.reference} if who.reference is not None else {}
        aged = who.reference and who.reference_checkpoint is not None
        spec |= {"reference_epoch": who.reference_checkpoint} if aged else {}
        spec |= {"decoder": who.decoder} if who.decoder != "own" else {}
        spec |= {"decoder_epochs": who.decoder_epochs} if who.decoder != "own" and who.decoder_epochs != 200 else {}
        spec |= {"shadow_epoch": self.shadow_checkpoint} if self.shadow_checkpoint is not None else {}
        spec |= {"defense": what.defense, "strength": what.strength} if what.defense else {}
        return spec | ({"learned_from": [self.plain, self.plain_shadow]} if self.plain else {})


def resolve(
    lab: Lab, attack: str, target: Target, attacker: Attacker, *, protocol: str, checkpoint: int | None,
    shadow_checkpoint: int | None = None, n_nonmembers: int | None = None, **params: Any,
) -> Call:  # fmt: skip
    """Check a call, fill in the shadow and what a static attacker learned from; ValueError says what does not fit."""
    row = lab.profile.row(target.id)
    if params.get("framing", "") is None:  # queried as trained: one evaluation with those that never asked
        params.pop("framing")
    if target.defense == "early-stopping":
        checkpoint = shadow_checkpoint = target.strength
    epochs = dict(checkpoint=checkpoint, shadow_checkpoint=shadow_checkpoint, n_nonmembers=n_nonmembers)
    for name, value in (epochs | {"reference_checkpoint": attacker.reference_checkpoint}).items():
        least = int(name == "n_nonmembers")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"expected {name} to be a whole number of at least {least}, got {value!r}")
    if attacker.attacker not in ("adaptive", "static"):
        raise ValueError(f"expected attacker 'adaptive' or 'static', got {attacker.attacker!r}")
    static = attacker.attacker == "static"
    if static and target.defense is None and row.defense == "none":
        raise ValueError("attacker 'static' goes with a defense: name one, or attack a defended model")
    knowledge, shadow = str(attacker.knowledge), attacker.shadow
    for name in _as_names(attacker.reference):
        if lab.profile.row(name).role == "target":
            raise ValueError(f"expected a reference model that never saw these images, got {name}, a target")
    if shadow is not None or knowledge.startswith("shadow"):
        shadow = shadow or lab.shadow_of(target.id)
        if shadow is None:
            raise ValueError(f"profile {lab.name} has no shadow for {target.id}: add a model with role shadow")
        if (role := lab.profile.row(shadow).role) != "shadow":
            raise ValueError(f"expected a model with role shadow as shadow, got {shadow}, a {role}")
        knowledge = "shadow:" + compare(row, lab.profile.row(shadow))
    else:
        shadow_checkpoint = None
    plain = lab.undefended_of(target.id) if static else None
    plain_shadow = lab.shadow_of(plain) if static and shadow else None
    return Call(attack, target, attacker, row, knowledge, shadow, protocol, checkpoint, shadow_checkpoint, n_nonmembers,
                plain, plain_shadow, params)  # fmt: skip


def evaluate(lab: Lab, call: Call, *, controls: bool) -> Result:
    """Query the models of a call and score its evaluation set."""
    from mia_utils import attacks  # imports torch, which cached results do not need
    from mia_utils.protocol import splits

    if call.attack not in attacks.ATTACKS:
        raise ValueError(f"unknown attack {call.attack!r}: expected one of {', '.join(attacks.ATTACKS)}")

    row, seed = call.row, call.row.seed
    pool, split = lab.pool(row.dataset), lab.split(row.id)
    split_hash = split.hash
    if call.n_nonmembers is not None:
        others = [lab.profile.row(name).n_train for name in _as_names(call.attacker.reference)]
        split = _take_nonmembers(split, call.n_nonmembers, reserved=max([DECODER_IMAGES, *others]))
    if call.shadow:
        other, dataset = lab.split(call.shadow), lab.profile.row(call.shadow).dataset
        if dataset != row.dataset:
            pool, split = splits.join(pool, split, lab.pool(dataset), other)
        elif other.hash != split_hash:
            raise ValueError(f"{call.shadow} was trained on another split than {row.id}: train both again")

    for name in _as_names(call.attacker.reference):
        if lab.profile.row(name).dataset != row.dataset or lab.split(name).hash != split_hash:
            raise ValueError(f"{name} belongs to another split than {row.id} and may have seen its images")

    def query(model_id: str | None, epoch: int | None, stream: int | None = None) -> Any:
        model = _get_model(lab, call, model_id, epoch) if model_id else None
        return model if model is None or stream is None else defend(model, call.target, seed=stream)

    who = call.attacker
    references = [query(name, who.reference_checkpoint) for name in _as_names(who.reference)]
    return attacks.evaluate(
        call.attack, query(row.id, call.checkpoint, seed), pool, split, knowledge=call.knowledge,
        shadow=query(call.shadow, call.shadow_checkpoint, seeds.derive(seed, "shadow")),
        reference=references if isinstance(who.reference, list | tuple) else next(iter(references), None),
        untrained=query(row.id, 0, seed) if controls else None,
        learned_from=(query(call.plain, None), query(call.plain_shadow, None)) if call.plain else None,
        protocol=call.protocol, seed=seed, cache=_cache_features, controls=controls, known_share=who.known_share,
        **call.params,
    )  # fmt: skip


def _take_nonmembers(split: Split, n: int, *, reserved: int) -> Split:
    """The split with n non-members: some of its own, or all and images in no role but ``reserved`` for other models."""
    own = split.target_nonmembers
    if n < len(own):
        chosen = seeds.rng(split.seed, "fewer-strangers").permutation(own)[:n]
        return dataclasses.replace(split, target_nonmembers=np.sort(chosen))
    if n == len(own) or len(split.utility) <= reserved:
        return split
    order = split.reference(len(split.utility))  # references and decoders of attackers were trained on its first
    more = order[max(reserved, len(order) - (n - len(own))) :]
    rest = np.setdiff1d(split.utility, more)
    return dataclasses.replace(split, target_nonmembers=np.sort(np.concatenate([own, more])), utility=rest)


def describe(lab: Lab, call: Call) -> dict[str, Any]:
    """Facts of an evaluation that its scores do not hold: columns of the results."""
    row, who, what = call.row, call.attacker, call.target
    run, other = lab.model(row.id), lab.profile.row(call.shadow) if call.shadow else None
    defended = what.defense is not None or row.defense != "none"
    checkpoint = row.epochs if call.checkpoint is None else call.checkpoint
    references = [results.drop_seed(name, row.seed) for name in _as_names(who.reference)]
    utility = lab.measure(row.id, defense=what.defense, strength=what.strength) if what.defense else run.utility
    own = {name: getattr(row, name) for name in "role method arch dataset n_train epochs augmentation".split()}
    facts = {"target": results.drop_seed(row.id, row.seed), "model_id": row.id, **own} | dict(
        attack=call.attack, seed=row.seed, knowledge=call.knowledge, protocol=call.protocol, checkpoint=checkpoint,
        subsample=call.n_nonmembers, shadow=results.drop_seed(call.shadow, row.seed),
        shadow_method=other and other.method, shadow_dataset=other and other.dataset,
        shadow_checkpoint=call.shadow_checkpoint, known_share=who.known_share, decoder=who.decoder,
        decoder_epochs=who.decoder_epochs if who.decoder != "own" and who.decoder_epochs != 200 else None,
        reference=", ".join(references) or None, train_seconds=run.seconds,
        reference_checkpoint=who.reference_checkpoint if references else None,
        calibration=call.params.get("calibration", "log-ratio") if isinstance(who.reference, list | tuple) else None,
        defense=what.defense or row.defense, attacker=who.attacker if defended else "static",
        strength=row.strength if what.defense is None else what.strength,
        utility=utility.get("probe", utility.get("miou")), utility_untrained=run.utility.get("probe_untrained"),
        knn=utility.get("knn"),
    )  # fmt: skip
    attacked = run.history[run.history["epoch"] == checkpoint]
    for name in ("miou", "miou_members"):  # of a segmenter's checkpoint, or behind a defense of its output
        if name in attacked and len(attacked):
            perturbed = what.defense not in (None, "early-stopping")
            facts[name] = utility[name] if perturbed else float(attacked[name].iloc[-1])
    return facts


def compare(row: Row, shadow: Row) -> str:
    """Which of pre-training data, encoder and training a shadow shares with its target, as ``"PE-"``."""
    segmenting = row.method in choices.SEGMENTERS  # their method is the network

    def describe_sides(r: Row) -> tuple:
        network, recipe = (r.method, "") if segmenting else ("", r.method)
        return r.dataset, (r.arch, network), {**get_options(r), "method": recipe, "aug": r.augmentation}

    sides = zip("PET", describe_sides(row), describe_sides(shadow), strict=True)
    return "".join(letter if one == other else "-" for letter, one, other in sides)


def get_options(row: Row, *without: str | None) -> dict[str, Any]:
    """Options of a model that change its training, but those named."""
    return {k: v for k, v in row.options.items() if k not in ("checkpoints", *without)}


def _as_names(models: str | list[str] | None) -> list[str]:
    return [models] if isinstance(models, str) else list(models or [])


def defend(model: Any, target: Target, *, seed: int) -> Any:
    """Perturb what a model outputs; early stopping has chosen its weights already."""
    if target.defense in (None, "early-stopping"):
        return model
    from mia_utils.models import outputs  # imports torch

    return outputs.perturb(model, target.defense, target.strength, seed=seed)


def _get_model(lab: Lab, call: Call, model_id: str, epoch: int | None) -> Any:
    """A model as an attack queries it: the encoder, or encoder and decoder together."""
    from mia_utils import attacks  # imports torch

    run, decoder = lab.model(model_id), call.attacker.decoder
    if "reconstruct" not in attacks.ATTACKS[call.attack].needs:
        return run.encoder_at(epoch)
    if decoder not in ("own", "attacker"):
        raise ValueError(f"expected decoder 'own' or 'attacker', got {decoder!r}")
    model = run.autoencoder_at(epoch) if decoder == "own" else _attach_decoder(lab, call, model_id, epoch)
    if model is None:
        raise ValueError(f"{model_id} ({run.method}) has no decoder: let the attacker train one, decoder='attacker'")
    return model


def _attach_decoder(lab: Lab, call: Call, model_id: str, epoch: int | None) -> Any:
    """A frozen encoder with a decoder that the attacker trained on images outside all roles, kept on disk."""
    from mia_utils.attacks import mim  # imports torch

    row, run, split = lab.profile.row(model_id), lab.model(model_id), lab.split(model_id)
    epoch = run.checkpoints[-1] if epoch is None else epoch
    n_images = min(DECODER_IMAGES, len(split.utility))
    recipe = dict(n_images=n_images, epochs=min(call.attacker.decoder_epochs, row.epochs))
    spec = {"kind": "decoder", "readable": f"{model_id}-e{epoch}", "recipe": artifacts.RECIPES["decoder"], **recipe}
    spec |= {"model": lab.folder(model_id).name, "epoch": epoch}

    def make(into: Path) -> dict:
        images = lab.pool(row.dataset).images[split.reference(n_images)]
        made = mim.train_decoder(run.encoder_at(epoch), images, epochs=recipe["epochs"], seed=row.seed, checkpoints=[])
        made.save(into)
        return {"settings": made.settings, "train_seconds": round(made.seconds, 2)}

    return train.load_run(artifacts.load_or_make(spec, make)).decoder


def _cache_features(key: dict, make) -> np.ndarray:
    """Keep extracted features as artifacts: a model is queried once, attackers train on its outputs."""
    spec = {"kind": "features", "readable": str(key["extract"]).split(".")[-2], **key}

    def write(folder: Path) -> dict:
        features = make()
        np.save(folder / "features.npy", features)
        return {"shape": list(features.shape)}

    return np.load(artifacts.load_or_make(spec, write) / "features.npy", allow_pickle=False)

"""Was this encoder trained on these pictures? An audit of any encoder with two folders of images.

``python -m mia_utils.audit ENCODER SUSPECTED_FOLDER REFERENCE_FOLDER``

The suspected pictures are compared with reference pictures that were surely not used and are otherwise alike (same
source, same period, same camera and preparation). Published audits compared pictures of different origin, and then an
attacker who never asks the model does as well (Das, Zhang, Tramer, arXiv 2406.16201). So the no-model control comes
first: where it tells the two sets apart, the audit is void, whatever the attack says.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mia_utils import attacks, datasets
from mia_utils.datasets import folders
from mia_utils.models import encoders, segmenters
from mia_utils.protocol import metrics, splits

FEWEST = 10  # pictures a set: five folds, each with some to fit, to validate and to report


@dataclass(frozen=True, eq=False)
class AuditReport:
    """What an audit found; ``print(report)`` says it in words.

    Attributes:
        encoder, suspected, reference: what was audited.
        result: the attack, suspected pictures as members; ``result.controls["no-model" | "untrained"]`` are the gates.
        set_test: whether the suspected pictures as a whole score higher; None where the attack trains an attacker on
            the two sets: then the p-value of its cross-fitted AUC takes its place.
        level: p-values up to this count as evidence.
        n_dropped: pictures left out because the same set held them already.
    """

    encoder: str
    suspected: str
    reference: str
    result: attacks.Result = field(repr=False)
    set_test: metrics.SetTest | None
    level: float
    n_dropped: int = 0

    @property
    def void_because(self) -> str:
        """Why nothing can be concluded; empty where something can."""
        controls = self.result.controls
        if controls["no-model"].auc_low > 0.5:
            return "the two sets of pictures can be told apart without the model"
        if controls["untrained"].auc_low > 0.5:  # NaN where it was not run
            return "an untrained encoder tells the two sets of pictures apart as well"
        return ""

    @property
    def void(self) -> bool:
        return bool(self.void_because)

    @property
    def p_value(self) -> float:
        """One-sided: suspected pictures score higher."""
        if self.set_test is not None:
            return self.set_test.p_value
        two_sided = self.result.p_value
        return two_sided / 2 if self.result.auc > 0.5 else 1 - two_sided / 2

    @property
    def verdict(self) -> str:
        """One sentence."""
        blind, auc = self.result.controls["no-model"], f"AUC {self.result.auc:.2f}, p = {self.p_value:.2g}"
        if self.void:
            return f"VOID: {self.void_because}, so a high score ({auc}) says nothing about training."
        if self.p_value > self.level:
            seen = 0.5 + self.result.half_width
            return (
                f"Not shown at level {self.level:g} that the suspected pictures were used ({auc}); this audit could "
                f"have seen AUC >= {seen:.2f}."
            )
        unseen = 0.5 + blind.half_width
        if self.result.auc < unseen:
            return (
                f"The suspected pictures score higher ({auc}), but a difference between the two sets as small as this "
                f"could have escaped the no-model control (it sees AUC >= {unseen:.2f}): use more pictures."
            )
        return f"Evidence that the suspected pictures were used ({auc}), if the two sets are alike in all but that."

    def __str__(self) -> str:
        controls, n = self.result.controls, int(self.result.is_member.sum())
        mark = "VOID, " if self.void else ""
        test = f"p = {self.p_value:.2g} (one-sided)" if self.set_test is None else str(self.set_test)
        attack = f"AUC {self.result.auc:.2f} [{self.result.auc_low:.2f}, {self.result.auc_high:.2f}]"
        dropped = f"; {self.n_dropped} repeated pictures left out" if self.n_dropped else ""
        lines = [
            f"Audit of {self.encoder}: {n} suspected pictures ({self.suspected}) against "
            f"{len(self.result.score) - n} reference pictures ({self.reference}){dropped}",
            f"1. no model:     {attacks.controls.describe(controls['no-model'])}",
            f"2. untrained:    {attacks.controls.describe(controls['untrained'])}",
            f"3. {self.result.attack + ':':<13} {mark}{attack}",
            f"4. as a set:     {mark}{test}",
        ]
        return "\n".join([self.verdict, *lines] if self.void else [*lines, self.verdict])


def compare(
    encoder: encoders.Encoder | str | Path,
    suspected: datasets.Pool | np.ndarray | str | Path,
    reference: datasets.Pool | np.ndarray | str | Path,
    *,
    attack: str = "encodermi-t",
    untrained: encoders.Encoder | str | None = "auto",
    size: int | None = None,
    level: float = 0.01,
    seed: int = 0,
    **params: object,
) -> AuditReport:
    """Audit an encoder: do suspected pictures score higher than reference pictures, and would they without it?

    Pictures must be independent: of a burst or a film keep one frame.

    Args:
        encoder: an Encoder (``encoders.wrap`` makes one of any callable), or what ``encoders.open`` takes.
        suspected: pictures whose use is in question: a folder, a Pool, or (N, H, W, 3) uint8.
        reference: pictures that were surely not used and are otherwise alike.
        attack: a registered attack. The default trains nothing; one that trains an attacker is cross-fitted over the
            two sets in five folds.
        untrained: the encoder's architecture with fresh weights; ``"auto"``: made where ``encoder.arch`` is known.
        size: side in pixels all pictures are brought to before they are queried (scaled to cover, center-cropped);
            None: the encoder's input size.
        level: p-values up to this count as evidence.
        seed: seed of queries, folds, attackers and permutations.
        params: parameters of the attack.

    Returns:
        AuditReport. ``report.void`` is True where the no-model control, or the untrained encoder, tells the two sets
        apart (lower end of its AUC's 95 % interval above 0.5).

    Raises:
        ValueError, FileNotFoundError: one line: no such folder, fewer than 10 pictures, a picture in both sets, an
            unknown attack, or one that the encoder can't serve.
    """
    if attack not in attacks.ATTACKS:
        raise ValueError(f"unknown attack {attack!r}: expected one of {', '.join(attacks.ATTACKS)}")
    if not 0 < level < 1:
        raise ValueError(f"expected level in (0, 1), got {level}")
    if isinstance(encoder, (str, Path)):
        encoder = encoders.open(encoder)
        encoder = encoder.to("cuda") if torch.cuda.is_available() else encoder
    side = size or encoder.input_size
    sets = {name: _read(source, side, name) for name, source in (("suspected", suspected), ("reference", reference))}
    keep = _find_single(sets)
    pool, split = _join({name: (*part[1:], keep[name]) for name, part in sets.items()}, seed)
    twin = _make_twin(encoder) if untrained == "auto" else untrained
    result = attacks.evaluate(attack, encoder, pool, split, knowledge="partial", untrained=twin, seed=seed, **params)
    mine = result.is_member
    trains_nothing = attacks.ATTACKS[attack].score is not None
    return AuditReport(
        encoder=str(getattr(encoder, "name", type(encoder).__name__)),
        suspected=sets["suspected"][0],
        reference=sets["reference"][0],
        result=result,
        set_test=metrics.test_set(result.score[mine], result.score[~mine], seed=seed) if trains_nothing else None,
        level=level,
        n_dropped=sum(len(images) for _, images, _ in sets.values()) - len(pool),
    )


def compare_segmenter(
    segmenter: segmenters.Segmenter,
    suspected: datasets.Pool | str | Path,
    reference: datasets.Pool | str | Path,
    *,
    attack: str = "seg-global-loss",
    untrained: segmenters.Segmenter | str | None = "auto",
    size: int | tuple[int, int] | None = None,
    level: float = 0.01,
    seed: int = 0,
    **params: object,
) -> AuditReport:
    """Audit a segmenter: as :func:`compare`, with the true classes of every picture at hand.

    Args:
        segmenter: a Segmenter; ``segmenters.wrap`` makes one of any module or function.
        suspected: pictures whose use is in question, with label maps: a folder with ``images`` and ``masks`` in it
            (subfolders are groups, such as the frames of a drive or the pictures of a patient), or a Pool with masks.
        reference: the same of pictures that were surely not used and are otherwise alike.
        attack: a registered attack on posteriors. The default trains nothing.
        untrained: the segmenter's network with fresh weights; ``"auto"``: made where ``segmenter.method`` is known.
        size: (height, width) the pictures of folders are brought to; None: as they are.
        level, seed, params: as in :func:`compare`.

    Returns:
        AuditReport. With groups no picture is exchangeable by itself: the p-value is then that of the AUC, its blocks
        resampled as a whole.

    Raises:
        ValueError, FileNotFoundError: one line, as in :func:`compare`; also masks that are missing or do not fit.
    """
    if attack not in attacks.ATTACKS:
        raise ValueError(f"unknown attack {attack!r}: expected one of {', '.join(attacks.ATTACKS)}")
    if not 0 < level < 1:
        raise ValueError(f"expected level in (0, 1), got {level}")
    pools = {}
    for name, source in (("suspected", suspected), ("reference", reference)):
        if not isinstance(source, datasets.Pool):
            source = datasets.load(f"folder:{str(source).removeprefix('folder:')}", size=size)
        if source.masks is None:
            raise ValueError(
                f"{name}: {source.name!r} has no label maps: expected a folder with images and masks in it"
            )
        pools[name] = source
    keep = _find_single({name: (part.name, part.images, part.image_ids) for name, part in pools.items()})
    pool, is_member = datasets.join_pools(*(part.take(keep[name]) for name, part in pools.items()))
    split = _make_split(pool, is_member, seed)
    if untrained == "auto":
        known = segmenter.method in segmenters.ARCHS
        options = {"encoder": segmenter.arch, **segmenter.options} if known else {}
        untrained = segmenters.make(segmenter.method, segmenter.n_classes, **options) if known else None
    result = attacks.evaluate(
        attack, segmenter, pool, split, knowledge="partial", untrained=untrained, seed=seed, **params
    )
    mine = result.is_member
    exchangeable = attacks.ATTACKS[attack].score is not None and pool.groups is None
    return AuditReport(
        encoder=segmenter.name,
        suspected=pools["suspected"].name.removeprefix("folder:"),
        reference=pools["reference"].name.removeprefix("folder:"),
        result=result,
        set_test=metrics.test_set(result.score[mine], result.score[~mine], seed=seed) if exchangeable else None,
        level=level,
        n_dropped=sum(map(len, pools.values())) - len(pool),
    )


def _find_single(sets: dict[str, tuple[str, np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Positions of the pictures of each set without repetitions; a picture in both sets or a small set is an error."""
    digests = {name: [hashlib.blake2b(image.tobytes()).digest() for image in part[1]] for name, part in sets.items()}
    if both := set(digests["suspected"]) & set(digests["reference"]):
        one = next(iter(both))
        pair = [str(sets[name][2][digests[name].index(one)]) for name in sets]
        raise ValueError(
            f"{len(both)} pictures are in both sets, for example {pair[0]!r} and {pair[1]!r}: remove them from one"
        )
    keep = {name: np.sort(np.unique(part, return_index=True)[1]) for name, part in digests.items()}
    for name, rows in keep.items():
        if len(rows) < FEWEST:
            raise ValueError(f"expected at least {FEWEST} different {name} pictures, got {len(rows)}: add some")
    return keep


def _read(source: datasets.Pool | np.ndarray | str | Path, side: int, name: str) -> tuple[str, np.ndarray, np.ndarray]:
    """Name, images (N, side, side, 3) uint8 and ids (N,) str of one set."""
    if isinstance(source, (str, Path)):
        pool = datasets.load(f"folder:{str(source).removeprefix('folder:')}", size=side)
        return pool.name.removeprefix("folder:"), pool.images, pool.image_ids
    if isinstance(source, datasets.Pool):
        title, images, ids = source.name, source.images, source.image_ids
    else:
        title, images = f"{name} images", np.asarray(source)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"{name}: expected a folder, a Pool or (N, H, W, 3) uint8, got {images.shape} {images.dtype}"
            )
        ids = np.array([f"{i:06d}" for i in range(len(images))], dtype=np.str_)
    if images.shape[1:3] != (side, side):
        images = np.stack([np.asarray(folders.cover(Image.fromarray(image), (side, side))) for image in images])
    return title, images, ids


def _join(sets: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], seed: int) -> tuple[datasets.Pool, splits.Split]:
    """One pool of both sets, in which the suspected pictures play the members."""
    lengths = [len(rows) for _, _, rows in sets.values()]
    pool = datasets.Pool(
        name="audit",
        images=np.concatenate([images[rows] for images, _, rows in sets.values()]),
        labels=np.zeros(sum(lengths), np.int64),
        # prefixed, so that two pictures of one file name have streams of their own
        image_ids=np.concatenate([np.strings.add(f"{name}/", ids[rows]) for name, (_, ids, rows) in sets.items()]),
        official_split=None,
        class_names=("all",),
    )
    return pool, _make_split(pool, np.arange(len(pool)) < lengths[0], seed)


def _make_split(pool: datasets.Pool, is_member: np.ndarray, seed: int) -> splits.Split:
    """Everybody plays against the target: an audit has no shadow."""
    nobody = np.empty(0, np.int64)
    return splits.Split(
        target_members=np.flatnonzero(is_member),
        target_nonmembers=np.flatnonzero(~is_member),
        shadow_members=nobody,
        shadow_nonmembers=nobody,
        utility=nobody,
        seed=seed,
        pool_name=pool.name,
        pool_hash=pool.hash,
        strata=pool.labels,
        groups=pool.groups,
    )


def _make_twin(encoder: encoders.Encoder) -> encoders.Encoder | None:
    """The encoder's architecture with fresh weights; None where it is not known how to make one."""
    arch = getattr(encoder, "arch", None)
    if arch is None:
        return None
    try:
        return encoders.make(arch, method=encoder.method).to(encoder.device)
    except ValueError:
        return None


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code (2: bad input)."""
    parser = argparse.ArgumentParser(prog="python -m mia_utils.audit", description=__doc__.splitlines()[0])
    parser.add_argument("encoder", help="artifact folder, .safetensors or .pth file, or timm:NAME")
    parser.add_argument("suspected", help="folder of pictures whose use is in question")
    parser.add_argument("reference", help="folder of pictures that were surely not used and are otherwise alike")
    parser.add_argument("--attack", default="encodermi-t", help=f"one of {', '.join(attacks.ATTACKS)}")
    parser.add_argument("--size", type=int, help="side in pixels before the query (default: the encoder's)")
    parser.add_argument("--level", type=float, default=0.01, help="p-values up to this count as evidence")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(argv))
    try:
        print(compare(**options))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

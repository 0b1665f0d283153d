"""Models behind an API (``views``, ``outputs``), and audits that prove (``canaries make``, ``canaries test``)."""

from __future__ import annotations

import csv
import hashlib
import json
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from mia_utils import datasets, seeds
from mia_utils.attacks import encodermi
from mia_utils.audit import battery, cli, examine
from mia_utils.audit.record import Report
from mia_utils.models import encoders, views

WHOLE = "whole"
TWIN_CELLS, TWIN_STRENGTH = 4, 24  # of the smooth random pattern that tells twins apart: cells a side, gray levels


def write_views(
    folder: str | Path, out: str | Path, *, size: int = 224, n: int = 10,
    augmentations: Sequence[str] = ("crop", "simclr"), seed: int = 0,
) -> int:  # fmt: skip
    """Write what to send to an API as ``OUT/FOLDER/IMAGE/VIEW.png``; images that are there already are left alone."""
    pool = datasets.load(f"folder:{folder}", size=size)
    target, written = Path(out) / pool.name.removeprefix("folder:"), 0
    for i, name in enumerate(pool.image_ids.tolist()):
        last = target / name / f"{WHOLE}.png"  # written last: its presence says the image is done
        if last.is_file():
            continue
        last.parent.mkdir(parents=True, exist_ok=True)
        pixels = views.read_pixels(pool.images, [i])
        for augmentation in augmentations:
            made = views.query_views(pixels, [name], n, augmentation=augmentation, size=size, seed=seed)[0]
            for k, view in enumerate(made):
                _save(view, last.parent / f"{augmentation}-{k:03d}.png")
        _save(views.make_views(pixels, [name], size=size, seed=seed)[0], last)
        written += 1
    return written


def _save(view: torch.Tensor, path: Path) -> None:
    Image.fromarray((view * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


@dataclass(frozen=True)
class Stored(battery.Attempt):
    """An attack on outputs that came back: image id -> (K, D) vectors of its views."""

    vectors: dict[str, np.ndarray] | None = None

    def query(self, pool, seed: int) -> np.ndarray:
        """Scores or features of the images of the pool."""
        x = np.stack([self.vectors[name] for name in pool.image_ids.tolist()])
        if self.attack == "lpla":
            return np.linalg.norm(x[:, 0], axis=1, keepdims=True)
        return encodermi.score_threshold(encodermi.compare_views(torch.from_numpy(x)))


def read_outputs(path: str | Path) -> dict[str, np.ndarray]:
    """Read vectors by the names of their views: an npz with ``names`` and ``features``, or a CSV of name, numbers."""
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                names, features = file["names"].tolist(), np.asarray(file["features"], np.float32)
        else:
            rows = [row for row in csv.reader(path.open(newline="")) if row]
            names, features = [row[0] for row in rows], np.array([row[1:] for row in rows], np.float32)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path.name} can't be read ({error}): names and features are expected") from None
    if features.ndim != 2 or len(names) != len(features):
        raise ValueError(f"{path.name}: expected one vector per name, got {len(names)} names and {features.shape}")
    return dict(zip(names, features, strict=True))


def audit_outputs(
    features: str | Path, suspected: str | Path, reference: str | Path, *, size: int = 224, **options
) -> Report:
    """Audit what came back from an API: the names are those of the views below ``--out``."""
    found = read_outputs(features)
    model = encoders.wrap(lambda x: x.mean((2, 3)), size=size, name=f"outputs in {Path(features).name}")  # never used
    p = examine.plan(model, suspected, reference, attack="encodermi-t", size=size)
    by_view: dict[str, dict[str, list]] = {}
    for side, name in zip(p.is_member, p.pool.image_ids.tolist(), strict=True):
        prefix = f"{p.names[0 if side else 1]}/{name.partition('/')[2]}/"
        own = {key.removeprefix(prefix).removesuffix(".png"): key for key in found if key.startswith(prefix)}
        if not own:
            expected = f"expected names such as {prefix}{WHOLE}.png"
            raise ValueError(f"{Path(features).name} holds no outputs of {prefix}: {expected}")
        for view in sorted(own):
            by_view.setdefault(view.rpartition("-")[0] or view, {}).setdefault(name, []).append(found[own[view]])
    p.attempts, n = [], min(p.is_member.sum(), (~p.is_member).sum())
    for view, vectors in by_view.items():
        if len(vectors) < len(p.pool) or len({len(x) for x in vectors.values()}) > 1:
            raise ValueError(f"{Path(features).name}: view {view!r} is not there for all images alike")
        arrays = {name: np.stack(x) for name, x in vectors.items()}
        if view != WHOLE:
            p.attempts.append(Stored("encodermi-t", None, {"augmentation": view}, arrays))
        elif n >= battery.FEWEST_TO_FIT:
            p.attempts.append(Stored("lpla", None, {}, arrays))
    p.subject.facts = {"outputs": (Path(features).name, "given")}
    return examine.conclude(p, untrained=None, **options)


# ------------------------------------------------------------------------------------------------------- canaries


class Ranked(NamedTuple):
    """n published images ranked among their K twins; p: exact chance of ranks as high without training on them."""

    p: float
    n: int
    k: int
    mean_rank: float


def make_canaries(folder: str | Path, out: str | Path, *, k: int = 20, seed: int | None = None) -> Path:
    """Draw K random twins of every image, publish one of them and keep the others secret.

    A model that was trained on what was published ranks it above its twins; one that was not can't know which it was.
    Publish ``publish/`` and ``commitment.txt`` (SHA-256 of ``secret.json``) and keep the rest until the test.
    Source: Zhang et al. (arXiv 2409.19798), random canaries.
    """
    if k < 2:
        raise ValueError(f"expected at least 2 twins, got {k}")
    out, seed = Path(out), secrets.randbits(62) if seed is None else seed
    if (out / "secret.json").exists():
        raise ValueError(f"{out} holds canaries already: choose another folder")
    pool = datasets.load(f"folder:{folder}")
    chosen, digests = {}, {}
    for image, name in zip(pool.images, pool.image_ids.tolist(), strict=True):
        rng, stem = seeds.rng(seed, "audit.canaries", name), name.replace("/", "__").rpartition(".")[0]
        (out / "secret" / stem).mkdir(parents=True, exist_ok=True)
        chosen[stem] = int(rng.integers(k))
        for j in range(k):
            pattern = Image.fromarray(rng.integers(0, 256, (TWIN_CELLS, TWIN_CELLS, 3), dtype=np.uint8))
            pattern = np.asarray(pattern.resize(image.shape[1::-1], Image.Resampling.BICUBIC)) / 127.5 - 1
            twin = np.clip(image + TWIN_STRENGTH * pattern, 0, 255).round().astype(np.uint8)
            digests[f"{stem}/{j:03d}"] = hashlib.sha256(twin.tobytes()).hexdigest()
            Image.fromarray(twin).save(out / "secret" / stem / f"{j:03d}.png")
        (out / "publish").mkdir(exist_ok=True)
        shutil.copy(out / "secret" / stem / f"{chosen[stem]:03d}.png", out / "publish" / f"{stem}.png")
    text = json.dumps({"seed": seed, "k": k, "published": chosen, "twins": digests}, indent=1)
    (out / "secret.json").write_text(text)
    (out / "commitment.txt").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    return out


def rank_canaries(score: Callable[[np.ndarray], np.ndarray], folder: str | Path, *, seed: int = 0) -> Ranked:
    """Rank every published image among its twins by ``score(images (K, H, W, 3) uint8) -> (K,)``, higher = member.

    The sum of n uniform ranks 0 .. K - 1 has a known distribution, so p is exact; ties are broken at random.
    """
    folder = Path(folder)
    text = (folder / "secret.json").read_text()
    if hashlib.sha256(text.encode()).hexdigest() != (folder / "commitment.txt").read_text().strip():
        raise ValueError(f"{folder}: secret.json does not fit its commitment: it was changed after it was published")
    secret, total = json.loads(text), 0
    k, rng = secret["k"], seeds.rng(seed, "audit.ties")
    for stem, published in secret["published"].items():
        twins = np.stack([np.asarray(Image.open(folder / "secret" / stem / f"{j:03d}.png")) for j in range(k)])
        for j, twin in enumerate(twins):
            if hashlib.sha256(twin.tobytes()).hexdigest() != secret["twins"][f"{stem}/{j:03d}"]:
                raise ValueError(f"{folder}: twin {stem}/{j:03d} does not fit its commitment: it was changed")
        s = np.asarray(score(twins), np.float64)
        total += int(np.argsort(np.lexsort((rng.random(k), s)))[published])
    n, chance = len(secret["published"]), np.ones(1)
    for _ in range(n):
        chance = np.convolve(chance, np.full(k, 1 / k))
    return Ranked(float(chance[total:].sum()), n, k, total / n / (k - 1))


def score_twins(model: str | Path, **options) -> Callable[[np.ndarray], np.ndarray]:
    """EncoderMI-T of a model as :func:`rank_canaries` takes it; all twins of an image get the same views."""
    encoder = examine.open_subject(model, task="encoder").model
    return lambda images: encodermi.score_threshold(
        encodermi.extract_features(encoder, images, image_ids=["twin"] * len(images), **options)
    )


def main(argv: list[str]) -> int:
    """Run ``views``, ``outputs`` or ``canaries``; returns the exit code."""
    kind, rest = (" ".join(argv[:2]), argv[2:]) if argv[0] == "canaries" else (argv[0], argv[1:])
    parser = cli.Parser(prog=f"mia-audit {kind}", description=__doc__, epilog=cli.EXITS)
    names = {"views": ["folder"], "outputs": ["features", "suspected", "reference"]}
    names |= {"canaries make": ["folder"], "canaries test": ["model", "folder"]}
    if kind not in names:
        parser.error(f"expected canaries make or canaries test, got {kind}")
    for name in names[kind]:
        parser.add_argument(name)
    parser.add_argument("--out", type=Path, required=kind in ("views", "canaries make"))
    parser.add_argument("--seed", type=int, default=None if kind == "canaries make" else 0)
    if kind in ("views", "outputs"):
        parser.add_argument("--size", type=int, default=224, help="pixels the model takes (the same in both commands)")
    if kind in ("views", "canaries test"):
        parser.add_argument("--n", type=int, default=10, help="views of an image")
        default = ["crop", "simclr"] if kind == "views" else ["crop"]
        parser.add_argument("--augmentation", type=cli.parse_names, default=default)
    if kind == "canaries make":
        parser.add_argument("-k", type=int, default=20, help="twins of an image, of which one is published")
    o = parser.parse_args(rest)
    try:
        if kind == "views":
            options = dict(size=o.size, n=o.n, augmentations=o.augmentation, seed=o.seed)
            print(f"{write_views(o.folder, o.out, **options)} images written below {o.out}")
        elif kind == "outputs":
            report = audit_outputs(o.features, o.suspected, o.reference, size=o.size, seed=o.seed)
            print(report)
            if o.out:
                report.save(o.out)
            return report.exit_code
        elif kind == "canaries make":
            out = make_canaries(o.folder, o.out, k=o.k, seed=o.seed)
            print(f"publish {out / 'publish'} with {out / 'commitment.txt'}; keep {out / 'secret.json'} and secret/")
        else:
            score = score_twins(o.model, augmentation=o.augmentation[0], n_views=o.n)
            found = rank_canaries(score, o.folder, seed=o.seed)
            said = "trained on what was published" if found.p <= 0.01 else "not shown"
            ranks = f"{found.n} canaries among {found.k} twins: mean rank {found.mean_rank:.2f}"
            print(f"{ranks}, p = {found.p:.2g}: {said}")
            return 3 if found.p <= 0.01 else 0
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0

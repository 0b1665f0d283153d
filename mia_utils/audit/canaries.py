"""Audits that prove: random twins of published images, made before the training (Zhang et al., arXiv 2409.19798)."""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mia_utils import datasets, seeds
from mia_utils.attacks import encodermi
from mia_utils.audit import battery, examine

CELLS, STRENGTH = 4, 24  # of the smooth random pattern that tells twins apart: cells a side, gray levels


class Ranked(NamedTuple):
    """n published images ranked among their K twins; p: exact chance of ranks as high without training on them."""

    p: float
    n: int
    k: int
    mean_rank: float


def make(folder: str | Path, out: str | Path, *, k: int = 20, seed: int | None = None) -> Path:
    """Draw K random twins of every image, publish one of them and keep the others secret.

    A model that was trained on what was published ranks it above its twins; one that was not can't know which it was.
    Publish ``publish/`` and ``commitment.txt`` (SHA-256 of ``secret.json``) and keep the rest until the test.
    """
    if k < 2:
        raise ValueError(f"expected at least 2 twins, got {k}")
    out, seed = Path(out), secrets.randbits(62) if seed is None else seed
    if (out / "secret.json").exists():
        raise ValueError(f"{out} holds canaries already: choose another folder")
    pool, chosen, digests = datasets.load(f"folder:{folder}"), {}, {}
    (out / "publish").mkdir(parents=True, exist_ok=True)
    for image, name in zip(pool.images, pool.image_ids.tolist(), strict=True):
        rng, stem = seeds.rng(seed, "audit.canaries", name), name.replace("/", "__")
        (out / "secret" / stem).mkdir(parents=True, exist_ok=True)
        chosen[stem] = int(rng.integers(k))
        for j in range(k):
            pattern = Image.fromarray(rng.integers(0, 256, (CELLS, CELLS, 3), dtype=np.uint8))
            pattern = np.asarray(pattern.resize(image.shape[1::-1], Image.Resampling.BICUBIC)) / 127.5 - 1
            twin = np.clip(image + STRENGTH * pattern, 0, 255).round().astype(np.uint8)
            digests[f"{stem}/{j:03d}"] = hashlib.sha256(twin.tobytes()).hexdigest()
            Image.fromarray(twin).save(out / "secret" / stem / f"{j:03d}.png")
        shutil.copy(out / "secret" / stem / f"{chosen[stem]:03d}.png", out / "publish" / f"{stem}.png")
    text = json.dumps({"seed": seed, "k": k, "published": chosen, "twins": digests}, indent=1)
    (out / "secret.json").write_text(text)
    (out / "commitment.txt").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    return out


def rank(score: Callable[[np.ndarray], np.ndarray], folder: str | Path, *, seed: int = 0) -> Ranked:
    """Rank every published image among its twins by ``score(images (K, H, W, 3) uint8) -> (K,)``, higher = member.

    The sum of n uniform ranks 0 .. K - 1 has a known distribution, so p is exact; ties are broken at random.
    """
    folder = Path(folder)
    text = (folder / "secret.json").read_text()
    if hashlib.sha256(text.encode()).hexdigest() != (folder / "commitment.txt").read_text().strip():
        raise ValueError(f"{folder}: secret.json does not fit its commitment: it was changed after it was published")
    secret, total, rng = json.loads(text), 0, seeds.rng(seed, "audit.ties")
    n, k = len(secret["published"]), secret["k"]
    for stem, published in secret["published"].items():
        twins = np.stack([np.asarray(Image.open(folder / "secret" / stem / f"{j:03d}.png")) for j in range(k)])
        for j, twin in enumerate(twins):
            if hashlib.sha256(twin.tobytes()).hexdigest() != secret["twins"][f"{stem}/{j:03d}"]:
                raise ValueError(f"{folder}: twin {stem}/{j:03d} does not fit its commitment: it was changed")
        s = np.asarray(score(twins), np.float64)
        total += int(np.argsort(np.lexsort((rng.random(k), s)))[published])
    chance = np.ones(1)
    for _ in range(n):
        chance = np.convolve(chance, np.full(k, 1 / k))
    return Ranked(float(chance[total:].sum()), n, k, total / n / (k - 1))


def score_twins(model: str | Path, **options) -> Callable[[np.ndarray], np.ndarray]:
    """EncoderMI-T of a model as :func:`rank` takes it; all twins of an image get the same views."""
    encoder = examine.open_subject(model, task="encoder").model

    def score(images: np.ndarray) -> np.ndarray:
        with battery.asking(str(model)):
            features = encodermi.extract_features(encoder, images, image_ids=["twin"] * len(images), **options)
        return encodermi.score_threshold(features)

    return score

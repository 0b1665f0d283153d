"""What tells two folders apart without the model: their files, images that are in both, their pixels.

Every gate is judged two-sided and at the level of the audit; one that separates makes the audit invalid and says why.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, JpegImagePlugin
from scipy import stats
from torch.nn import functional as F

from mia_utils import seeds
from mia_utils.audit import battery
from mia_utils.protocol import controls, intervals, metrics
from mia_utils.protocol.result import Result

ALIKE = {8: 0.94, 16: 0.88}  # side of a thumbnail -> correlation above which two images are near-duplicates
RARE_SHARE = 0.05  # near-duplicates within a folder: more than this share and the audit asks for groups


@dataclass(frozen=True)
class Gate:
    """One gate: its name, whether the two sets pass, what was found, and pairs or fields behind it."""

    name: str
    passed: bool
    found: str
    details: Sequence[str] = ()


def read_facts(path: Path) -> dict[str, str | float]:
    """Read what a file says beside its pixels; numbers are compared by rank, words by how often they occur."""
    with Image.open(path) as image:
        tables, icc = getattr(image, "quantization", None) or {}, image.info.get("icc_profile")
        try:
            exif = {ExifTags.TAGS.get(key, str(key)): str(value)[:40] for key, value in image.getexif().items()}
        except Exception:  # damaged EXIF data are a fact too
            exif = {"unreadable": "yes"}
        return {
            "name pattern": re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", path.stem)), "suffix": path.suffix,
            "format": str(image.format), "mode": image.mode, "width": float(image.width), "height": float(image.height),
            "bytes per pixel": path.stat().st_size / (image.width * image.height), "ICC profile": _digest(icc),
            "EXIF fields": ", ".join(sorted(exif)) or "none",
            "EXIF camera and software": ", ".join(exif.get(key, "") for key in ("Make", "Model", "Software")),
            "JPEG quantization": _digest(repr(sorted(tables.items())).encode() if tables else b""),
            "JPEG subsampling": str(JpegImagePlugin.get_sampling(image)) if tables else "none",
            "JPEG progressive": str(bool(image.info.get("progressive"))),
        }  # fmt: skip


def _digest(content: bytes | None) -> str:
    return hashlib.blake2b(content, digest_size=4).hexdigest() if content else "none"


def compare_files(suspected: Sequence[Path], reference: Sequence[Path], *, level: float) -> Gate:
    """Compare the files of two folders field by field, before anything is decoded, with Holm's correction (1979)."""
    try:
        sides = [[read_facts(path) for path in part] for part in (suspected, reference)]
    except OSError as error:
        raise ValueError(f"a file can't be read as an image ({error}): repair or remove it") from None
    columns = {key: [[facts[key] for facts in side] for side in sides] for key in sides[0][0]}
    p = {key: _compare_field(*pair) for key, pair in columns.items() if len(set(pair[0]) | set(pair[1])) > 1}
    wrong = []
    for i, key in enumerate(sorted(p, key=p.get)):
        if p[key] * (len(p) - i) > level:
            break
        wrong.append(f"{key}: {' against '.join(map(_summarize, columns[key]))}")
    if not wrong:
        return Gate("files", True, f"alike in {', '.join(columns)}")
    return Gate("files", False, f"the two folders differ in {'; '.join(wrong[:3])}", wrong)


def _compare_field(a: list, b: list) -> float:
    """P-value that a field of the files is alike on both sides: numbers by rank, each word against all others."""
    if isinstance(a[0], float):
        return float(stats.mannwhitneyu(a, b).pvalue)
    counts = Counter(a), Counter(b)
    values = [v for v in set(a) | set(b) if counts[0][v] + counts[1][v] > 1]
    tables = [[[n[v], n.total() - n[v]] for n in counts] for v in values]
    return min([1.0, *(len(values) * stats.fisher_exact(table).pvalue for table in tables)])


def _summarize(values: list) -> str:
    if isinstance(values[0], float):
        return f"median {np.median(values):.3g}"
    value, n = Counter(values).most_common(1)[0]
    return f"{value or 'empty'} ({100 * n / len(values):.0f} %)"


def find_copies(images: np.ndarray, is_member: np.ndarray) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Find near-duplicates (re-encoded, scaled, cropped by a pixel): pairs (i < j) across the sides, and within one.

    By the correlation of thumbnails. On scenes of 32 px, copies cropped by a pixel correlate by .957 and more at 8 x 8,
    others by .81 at most; a second look at 16 x 16 keeps plain skies apart.
    """
    small = {side: _shrink(images, side) for side in (8, 16)}
    unit = {side: _normalize(x) for side, x in small.items()}
    across, within = [], []
    for start in range(0, len(images), 512):
        rows = slice(start, start + 512)
        for i, j in np.argwhere(unit[8][rows] @ unit[8].T > ALIKE[8]):
            i = int(i) + start
            if i < j and unit[16][i] @ unit[16][j] > ALIKE[16] and np.abs(small[8][i] - small[8][j]).mean() < 12:
                (across if is_member[i] != is_member[j] else within).append((i, int(j)))
    return across, within


def _shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Thumbnails by area averaging, (N, side * side * 3) float32."""
    made = [Image.fromarray(np.asarray(image)).resize((side, side), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image) for image in made]).reshape(len(made), -1).astype(np.float32)


def _normalize(x: np.ndarray) -> np.ndarray:
    """Vectors of length one around their mean; of flat images, which have no structure, the color decides."""
    centered = x - x.mean(axis=1, keepdims=True)
    centered = np.where(np.abs(centered).max(axis=1, keepdims=True) > 2, centered, x + 1)
    return centered / np.linalg.norm(centered, axis=1, keepdims=True)


def compare_copies(pairs: list[str]) -> Gate:
    """Name the images that are in both folders."""
    if not pairs:
        return Gate("copies", True, "no image is in both folders, re-encoded or scaled")
    found = f"{len(pairs)} pairs of near-duplicates across the folders, such as {pairs[0]}: remove them from one"
    return Gate("copies", False, found, pairs)


def describe_pixels(images: np.ndarray) -> dict[str, np.ndarray]:
    """Describe images (N, H, W, 3) uint8 by what re-encoding and other preparation changes: name -> (N,)."""
    parts = []
    for rows in np.array_split(np.arange(len(images)), 1 + len(images) // 256):
        x = np.asarray(images[rows]).astype(np.float32)
        gray, flat = x.mean(axis=3), x.reshape(len(x), -1, 3)
        flat = flat - flat.mean(axis=1, keepdims=True)
        sd = flat.std(axis=1) + 1e-3
        pairs = [(flat[..., a] * flat[..., b]).mean(1) / (sd[:, a] * sd[:, b]) for a, b in ((0, 1), (1, 2), (0, 2))]
        power = np.log(np.abs(np.fft.rfft2(gray - gray.mean(axis=(1, 2), keepdims=True))) ** 2 + 1)
        radius = np.hypot(*np.meshgrid(np.fft.fftfreq(gray.shape[1]), np.fft.rfftfreq(gray.shape[2]), indexing="ij"))
        one = {
            "brightness": gray.mean(axis=(1, 2)), "contrast": gray.std(axis=(1, 2)),
            "saturation": (x.max(axis=3) - x.min(axis=3)).mean(axis=(1, 2)),
            "channel correlation": np.mean(pairs, axis=0),
            "clipped pixels": ((x == 0) | (x == 255)).mean(axis=(1, 2, 3)),
            "8 x 8 blockiness": _measure_blocks(gray),
        }  # fmt: skip
        bands = ((0, 0.1, "low"), (0.1, 0.25, "middle"), (0.25, 1, "high"))
        for a, b, name in bands:
            if (band := (radius > a) & (radius <= b)).any():  # below 10 px none is low
                one[f"{name} frequencies"] = power[:, band].mean(axis=1)
        parts.append(one)
    return {key: np.concatenate([part[key] for part in parts]).astype(np.float64) for key in parts[0]}


def _measure_blocks(gray: np.ndarray) -> np.ndarray:
    """Steps at the borders of JPEG blocks over all other steps: (N, H, W) -> (N,), 0 without blocks."""
    found = np.zeros(len(gray))
    for axis in (1, 2):
        step = np.abs(np.diff(gray, axis=axis)).mean(axis=3 - axis)  # (N, H - 1)
        border = np.arange(step.shape[1]) % 8 == 7
        if border.any():
            found += np.log((step[:, border].mean(1) + 0.1) / (step[:, ~border].mean(1) + 0.1))
    return found


def convolve_randomly(images: np.ndarray) -> np.ndarray:
    """Features of a random convolution (N, 128): mean and maximum of rectified responses, no training anywhere."""
    kernel = torch.randn(64, 3, 5, 5, generator=seeds.generator(0, "audit.convolution"))
    kernel = kernel - kernel.mean(dim=(1, 2, 3), keepdim=True)
    parts = []
    for rows in np.array_split(np.arange(len(images)), 1 + len(images) // 64):
        x = torch.from_numpy(np.asarray(images[rows])).permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x, size=64, mode="area") if min(x.shape[2:]) > 64 else x
        y = F.conv2d(x, kernel).relu()
        parts.append(torch.cat([y.mean((2, 3)), y.amax((2, 3))], dim=1))
    return torch.cat(parts).numpy()


def compare_pixels(
    images: np.ndarray, image_ids: np.ndarray, is_member: np.ndarray, units: np.ndarray, *, level: float, seed: int
) -> tuple[Gate, Result, intervals.Control]:
    """Try to tell the two sets apart by their pixels alone: the gate, the scores of the no-model control (a kernel
    classifier on all statistics), and the control as ``intervals.decide`` takes it."""
    fold = battery.assign_folds(is_member, units, seed)
    named = describe_pixels(images)
    every = np.concatenate([controls.extract_statistics(np.asarray(images)), np.stack(list(named.values()), 1)], axis=1)
    entries = dict(named)
    if fold.any():
        entries |= {"all statistics": battery.make_smoother(every, fold)}
        entries |= {"random convolution": battery.make_smoother(convolve_randomly(images), fold)}
    found = battery.search(entries, is_member, units, fold, seed=seed, level=level)
    worst = list(entries)[found.strongest]
    score = battery.score_fitted(entries["all statistics"], is_member) if fold.any() else named[worst]
    groups = None if len(np.unique(units)) == len(units) else units
    result = Result("audit", "no-model", score, is_member, image_ids, fold=fold, groups=groups)
    rejected = found.p <= level
    if fold.any():  # with few units the strongest statistic was picked by its AUC: its own interval says nothing
        strict = metrics.evaluate(score, is_member, groups=groups, folds=fold, confidence=1 - level)
        rejected |= intervals.leaves_half(strict.auc_low, strict.auc_high)
    control = intervals.Control(result.auc, result.auc_low, result.auc_high, rejected=rejected)
    auc = intervals.format_value(found.auc[found.strongest])
    strongest = f"strongest: {worst}, AUC {auc}, p = {found.p:.2g}"
    shown = f"no-model control {intervals.format_interval(*control[:3])}; {strongest}"
    if rejected:
        shown = f"the two sets can be told apart without the model: {shown}"
    return Gate("pixels", not rejected, shown), result, control

"""Models behind an API: ``mia-audit views`` writes what to send, ``mia-audit outputs`` audits what came back."""

import csv
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mia_utils import datasets, paths
from mia_utils.attacks import encodermi
from mia_utils.audit import battery, examine
from mia_utils.models import encoders, views

WHOLE = "whole"
SIZE = 224
AUGMENTATIONS = ("crop", "simclr")


def write_views(
    folder: str | Path, out: str | Path, *, size: int = SIZE, n: int = 10,
    augmentations: Sequence[str] = AUGMENTATIONS, seed: int = 0,
) -> int:  # fmt: skip
    """Write what to send to an API as ``OUT/FOLDER/IMAGE/VIEW.png``; images that are there already are left alone."""
    battery.order_augmentations(None, augmentations)
    pool, written = datasets.load(f"folder:{folder}", size=size), 0
    target = Path(out) / pool.name.removeprefix("folder:")
    source, kept = Path(folder).expanduser().resolve(), target / "views.json"  # views of two folders never mix
    if target.resolve() == source:
        raise ValueError(f"the views would be written into {source} itself: choose another --out")
    options = {"folder": str(source), "size": encoders.to_shape(size), "n": n, "seed": seed}
    wanted = json.dumps(options | {"augmentations": sorted(set(augmentations))})
    if kept.is_file() and (found := kept.read_text(errors="replace").strip()) != wanted:
        way = "give the folders different names, or choose another --out"
        raise ValueError(f"{target} holds views of {found}, not of {wanted}: {way}")
    paths.write_atomic(kept, wanted + "\n")
    for i, name in enumerate(pool.image_ids.tolist()):
        place = target / name
        if (place / f"{WHOLE}.png").is_file():  # written last: the image is done
            continue
        place.mkdir(parents=True, exist_ok=True)
        pixels, keys = views.read_pixels(pool.images, [i]), battery.name_by_pixels(pool.images[[i]])
        made = {
            f"{augmentation}-{k:03d}": view
            for augmentation in augmentations
            for k, view in enumerate(
                views.query_views(pixels, keys, n, augmentation=augmentation, size=size, seed=seed)[0]
            )
        }
        made[WHOLE] = views.make_views(pixels, keys, size=size, seed=seed)[0]
        for view, x in made.items():
            Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(place / f"{view}.png")
        written += 1
    return written


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
    if not path.is_file():  # a pipe or a device would block
        raise ValueError(f"{path.name} can't be read (no file): names and features are expected")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                names, features = file["names"].astype(str).ravel().tolist(), np.asarray(file["features"], np.float32)
        else:
            rows = [row for row in csv.reader(path.open(newline="")) if row]
            names, features = [row[0] for row in rows], np.array([row[1:] for row in rows], np.float32)
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error, csv.Error) as error:
        raise ValueError(f"{path.name} can't be read ({error}): names and features are expected") from None
    if features.ndim != 2 or len(names) != len(features) or not np.isfinite(features).all():
        got = f"{len(names)} names and {features.shape}"
        raise ValueError(f"{path.name}: expected one vector of finite numbers per name, got {got}")
    return dict(zip(names, features, strict=True))


def plan_outputs(
    features: str | Path, suspected: str | Path, reference: str | Path, *, size: int | None = None,
    groups: str | None = None,
) -> examine.Plan:  # fmt: skip
    """Plan an audit of what came back from an API: the names are those of the views below ``--out``."""
    found, file = read_outputs(features), Path(features).name
    model = encoders.wrap(lambda x: x.mean((2, 3)), size=size or SIZE, name=f"outputs in {file}")  # never queried
    p = examine.plan(model, suspected, reference, attack="encodermi-t", size=size or SIZE, groups=groups)
    if p.names[0] == p.names[1]:
        raise ValueError(f"both folders are called {p.names[0]!r}, as are their views: give them different names")
    by_view: dict[str, dict[str, list]] = {}
    for side, name in zip(p.is_member, p.pool.image_ids.tolist(), strict=True):
        prefix = f"{p.names[0 if side else 1]}/{name.partition('/')[2]}/"
        own = {key.removeprefix(prefix).removesuffix(".png"): key for key in found if key.startswith(prefix)}
        if not own:
            raise ValueError(f"{file} holds no outputs of {prefix}: expected names such as {prefix}{WHOLE}.png")
        for view in sorted(own):
            by_view.setdefault(view.rpartition("-")[0] or view, {}).setdefault(name, []).append(found[own[view]])
    p.attempts, fewest = [], min(len(np.unique(p.units[p.is_member == side])) for side in (True, False))
    for view, vectors in by_view.items():
        if len(vectors) < len(p.pool) or len({len(x) for x in vectors.values()}) > 1:
            raise ValueError(f"{file}: view {view!r} is not there for all images alike")
        attack, params = ("lpla", {}) if view == WHOLE else ("encodermi-t", {"augmentation": view})
        if attack == "encodermi-t" or fewest >= battery.FEWEST_TO_FIT:
            arrays = {name: np.stack(x) for name, x in vectors.items()}
            p.attempts.append(Stored(attack, None, params, vectors=arrays))
    if not p.attempts:
        raise ValueError(f"{file}: no attack fits: LpLA needs {battery.FEWEST_TO_FIT} images a side, others views")
    p.seconds, p.subject.facts = [0.0] * len(p.attempts), {"outputs": (file, "given")}
    return p

"""Label spaces of segmentation sets, and the mapping between them: one table, ``label_spaces.csv``.

CamVid's 11 classes are groups of finer ones, whose definition tells where each of Cityscapes' 19 belongs; the other
way a group maps to its most frequent class only. The scenes' "ground" may be floor, grass or road: it maps to none of
them. What is left empty has no honest counterpart and becomes void. Mapillary Vistas' names (1.2 and 2.0) follow
Cityscapes' definitions: parking, rail tracks, bridges, guard rails, backs of signs, trailers are left out of the 19.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from mia_utils.datasets.pool import VOID, Pool

SPACES = ("cityscapes", "camvid", "scenes")


@lru_cache(maxsize=8)
def _read_space(name: str) -> dict[str, dict[str, str]]:
    """Class -> its name in every space."""
    with open(Path(__file__).with_name("label_spaces.csv"), encoding="utf-8", newline="") as file:
        return {row["class"]: row for row in csv.DictReader(file) if row["space"] == name}


def get_label_space(name: str) -> tuple[str, ...]:
    """Return the class names of a label space: ``"cityscapes"`` (19), ``"camvid"`` (11) or ``"scenes"`` (11)."""
    if name not in SPACES:
        raise ValueError(f"unknown label space {name!r}: expected {', '.join(SPACES[:-1])} or {SPACES[-1]}")
    return tuple(_read_space(name))


def get_mapping(source: str, target: str) -> dict[str, str]:
    """Return class name -> class name between two label spaces; what has no honest counterpart is left out (void)."""
    get_label_space(source), get_label_space(target)  # unknown names raise
    return {name: row[target] for name, row in _read_space(source).items() if row[target]}


def _make_table(names: Sequence[str], mapping: Mapping[str, str], target: str) -> np.ndarray:
    """Map positions in ``names`` to classes of the target space. -> (256,) uint8, void 255"""
    table, classes = np.full(256, VOID, np.uint8), get_label_space(target)
    for i, name in enumerate(names[:256]):
        if name in mapping:
            table[i] = classes.index(mapping[name])
    return table


def make_mapillary_table(names: Sequence[str]) -> np.ndarray:
    """Map Mapillary Vistas' names to Cityscapes' 19, the longest known prefix decides. -> (256,) uint8, void 255"""
    known = {name: row["cityscapes"] for name, row in _read_space("mapillary").items()}
    parts = [name.split("--") for name in names]
    prefixes = [["--".join(part[:n]) for n in range(len(part), 0, -1)] for part in parts]
    return _make_table([next((x for x in each if x in known), "") for each in prefixes], known, "cityscapes")


def map_labels(pool: Pool, space: str) -> Pool:
    """Rename the label maps of a pool into another label space: the independent setting's shadow data."""
    target = get_label_space(space)
    if pool.masks is None:
        raise ValueError(f"data set {pool.name!r} has no label maps: nothing to map to {space!r}")
    names = pool.mask_class_names or pool.class_names
    sources = [known for known in SPACES if get_label_space(known) == names]
    if not sources:
        raise ValueError(
            f"data set {pool.name!r} has classes of no known label space ({', '.join(names[:4])} ...): expected those "
            f"of {', '.join(SPACES)}"
        )
    masks = _make_table(names, get_mapping(sources[0], space), space)[pool.masks]
    changed = {"masks": masks, "name": f"{pool.name.partition('@')[0]}@{space}"}
    if pool.mask_class_names is None:  # the classes of the masks are the pool's only ones; no image has a label then
        return replace(pool, **changed, class_names=target, labels=np.zeros(len(pool), np.int64))
    return replace(pool, **changed, mask_class_names=target)

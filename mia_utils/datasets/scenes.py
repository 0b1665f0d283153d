"""Generated photographs of textured objects: the data set that needs no download.

Every picture is one small ray-traced scene: an object of named parts (balls, tapered rods, tapered blocks) stands on
a ground before a wall or a sky, lit by one lamp or sun that casts shadows, seen by a noisy sensor. The camera is
orthographic, so a ray through a pixel is linear in the pixel's coordinates and a whole solid is intersected by one
matrix product: that is what makes thousands of pictures cheap in numpy.

Pictures are exactly i.i.d. (image ``i`` draws everything, its kind of object included, from its own random stream)
and every part carries fresh noise of its own. Texture is the point: in flat drawings membership inference sees
nothing, because a model has nothing individual to remember about a part.

One scene shows the same thing at every size; only the sensor noise and the strokes of a sketch follow the pixels.
Arithmetic is float64 although a picture has 8 bits: rounding differences between processors then practically never
reach a pixel, so that the hash of a pool is the same on another machine.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from tqdm.auto import tqdm

from mia_utils import seeds

STYLES = ("scenes", "scenes-night", "scenes-sketch")
MIN_SIZE, MAX_SIZE = 16, 512

_BALL, _ROD, _BLOCK = 0, 1, 2
_BANK = 64  # side of the periodic tile of noise that each picture draws for itself


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers and materials
# ---------------------------------------------------------------------------------------------------------------------


class _Dice:
    """Uniform draws from one stream, fetched in blocks: a scene needs hundreds of single numbers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._left: list[float] = []

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._left:
            self._left = self._rng.random(256).tolist()
        return low + (high - low) * self._left.pop()

    def choose(self, options: tuple):
        return options[int(self(0, len(options)))]

    def chance(self, probability: float) -> bool:
        return self() < probability


# kind: hue, saturation and value ranges; pattern frequency (cycles per frame); stretch of the noise along s and t;
# strength of the noise; gloss
_MATERIALS: dict[str, tuple] = {
    "wood": ((0.03, 0.11), (0.35, 0.75), (0.25, 0.8), (5, 11), (1.7, 0.35), 0.55, 0.1),
    "planks": ((0.04, 0.11), (0.25, 0.6), (0.3, 0.75), (6, 10), (1.6, 0.4), 0.55, 0.1),
    "cloth": ((0, 1), (0.2, 0.85), (0.3, 0.95), (9, 16), (1, 1), 0.65, 0),
    "stripes": ((0, 1), (0.2, 0.9), (0.3, 0.95), (5, 11), (1, 1), 0.45, 0),
    "plaid": ((0, 1), (0.25, 0.9), (0.3, 0.9), (4, 8), (1, 1), 0.45, 0),
    "checks": ((0, 1), (0.1, 0.8), (0.3, 0.95), (4, 8), (1, 1), 0.45, 0.1),
    "spots": ((0, 1), (0.15, 0.85), (0.4, 0.95), (5, 9), (0.8, 0.8), 0.5, 0.05),
    "fur": ((0.03, 0.12), (0.1, 0.65), (0.2, 0.95), (5, 9), (1.5, 0.5), 0.85, 0),
    "feathers": ((0, 1), (0.2, 0.9), (0.3, 0.95), (6, 10), (0.7, 1.5), 0.75, 0),
    "brick": ((0.0, 0.1), (0.25, 0.75), (0.3, 0.8), (6, 10), (1, 1), 0.5, 0),
    "shingles": ((0, 1), (0.1, 0.6), (0.25, 0.7), (7, 11), (1, 1), 0.55, 0),
    "plaster": ((0, 1), (0.03, 0.45), (0.5, 0.98), (5, 9), (0.7, 0.7), 0.5, 0),
    "stone": ((0, 1), (0.02, 0.2), (0.3, 0.85), (5, 9), (1, 1), 0.5, 0),
    "bark": ((0.04, 0.1), (0.2, 0.55), (0.2, 0.55), (7, 11), (1.8, 0.4), 0.75, 0),
    "leaves": ((0.16, 0.36), (0.35, 0.75), (0.25, 0.7), (6, 9), (1, 1), 1.0, 0),
    "paint": ((0, 1), (0.3, 0.95), (0.3, 0.95), (5, 9), (0.7, 0.7), 0.4, 0.6),
    "glaze": ((0, 1), (0.05, 0.8), (0.5, 0.98), (4, 8), (0.8, 0.8), 0.4, 0.5),
    "metal": ((0.05, 0.65), (0.02, 0.25), (0.35, 0.8), (10, 16), (0.4, 1.8), 0.5, 0.7),
    "rubber": ((0, 1), (0.02, 0.15), (0.08, 0.2), (9, 14), (1, 1), 0.6, 0.1),
    "horn": ((0.05, 0.13), (0.5, 0.9), (0.5, 0.95), (7, 11), (1, 1), 0.4, 0.3),
    "glass": ((0.5, 0.62), (0.1, 0.4), (0.15, 0.45), (3, 6), (0.5, 0.5), 0.6, 0.8),
    "lacquer": ((0, 1), (0, 0.1), (0.04, 0.09), (5, 9), (1, 1), 0.2, 0.9),
    "light": ((0.08, 0.16), (0.1, 0.45), (0.9, 1.0), (5, 9), (1, 1), 0.3, 0.2),
    "coffee": ((0.04, 0.1), (0.4, 0.8), (0.15, 0.6), (4, 7), (0.7, 0.7), 0.6, 0.3),
    "grass": ((0.17, 0.3), (0.35, 0.7), (0.3, 0.65), (5, 9), (1.5, 0.6), 0.75, 0),
    "sand": ((0.07, 0.13), (0.2, 0.5), (0.5, 0.9), (4, 7), (0.6, 1.1), 0.55, 0),
    "asphalt": ((0, 1), (0.0, 0.1), (0.25, 0.55), (8, 12), (1, 1), 0.45, 0),
    "carpet": ((0, 1), (0.2, 0.6), (0.3, 0.75), (4, 8), (1, 1), 0.5, 0),
    "water": ((0.48, 0.63), (0.3, 0.75), (0.3, 0.7), (5, 9), (0.5, 1.3), 0.6, 0.4),
    "sky": ((0.53, 0.63), (0.2, 0.65), (0.6, 0.98), (2, 4), (0.28, 0.6), 0.1, 0),
    "hedge": ((0.2, 0.36), (0.25, 0.6), (0.2, 0.5), (4, 7), (0.8, 0.8), 0.9, 0),
}


class _Material:
    """One texture: two colors, a pattern that mixes them and the frequencies of the noise in it."""

    __slots__ = ("angle", "colors", "contrast", "freq", "gloss", "glow", "kind", "noise", "offset", "phase", "stretch")

    def __init__(self, dice: _Dice, *kinds: str, glow: float = 0.0) -> None:
        self.kind = dice.choose(kinds)
        hue, saturation, value, freq, self.stretch, self.noise, self.gloss = _MATERIALS[self.kind]
        h, s, v = dice(*hue), dice(*saturation), dice(*value)
        other_hue = dice() if hue == (0, 1) and dice.chance(0.4) else h + dice(-0.06, 0.06)
        other_value = v * dice(0.35, 0.7) if v > 0.5 else min(1.0, v * dice(1.3, 2.0) + 0.05)
        pair = [(h, s, v), (other_hue, min(1.0, s * dice(0.5, 1.3)), other_value)]
        self.colors = np.array([colorsys.hsv_to_rgb(a % 1.0, b, c) for a, b, c in pair]) ** 2  # linear light
        self.freq = dice(*freq)
        self.angle = dice(-0.35, 0.35) if self.kind in ("stripes", "plaid", "checks") else 0.0
        self.offset = (dice(0, _BANK), dice(0, _BANK))
        self.phase = dice()
        self.contrast = dice(0.7, 1.3)
        self.glow = glow


def _wave(x: np.ndarray, sharpness: float) -> np.ndarray:
    """A stripe profile in [0, 1] of period 1."""
    return np.clip(0.5 + sharpness * np.sin(2 * math.pi * x), 0.0, 1.0)


def _weave_pattern(material: _Material, s, t, coarse, fine) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate a material where it is seen.

    Args:
        material: its colors and frequencies.
        s, t: (n,) surface coordinates in frame widths.
        coarse, fine: (n,) noise in about [-1, 1], attached to the surface.

    Returns:
        (weight, shade): (n,) share of the second color in [0, 1], and brightness factor around 1.
    """
    kind, f, phase = material.kind, material.freq, material.phase
    if material.angle:
        c, d = math.cos(material.angle), math.sin(material.angle)
        s, t = c * s + d * t, c * t - d * s
    shade = 1.0 + material.contrast * material.noise * (0.8 * fine + 0.45 * coarse)
    if kind in ("wood", "bark"):
        weight = _wave(f * 0.6 * s + phase + 0.9 * coarse, 0.5)
    elif kind == "planks":
        row = f * 0.7 * s + phase
        weight = np.clip(0.5 + 0.45 * np.sin(97.0 * np.floor(row)) + 0.5 * coarse, 0.0, 1.0)
        shade = shade * np.where(row - np.floor(row) < 0.14, 0.45, 1.0)
    elif kind == "stripes":
        weight = _wave(f * s + phase + 0.12 * coarse, 1.5)
    elif kind == "plaid":
        weight = 0.5 * (_wave(f * s + phase, 1.2) + _wave(f * t + 2 * phase, 1.2))
        shade = shade * (1.0 - 0.3 * _wave(2 * f * s + phase, 2.0))
    elif kind == "checks":
        weight = np.clip(0.5 + 2.5 * np.sin(math.pi * f * (s + phase)) * np.sin(math.pi * f * t), 0.0, 1.0)
    elif kind in ("brick", "shingles"):
        row = 1.25 * f * t + phase
        level = np.floor(row)
        column = 0.6 * f * s + 0.5 * level
        place = np.floor(column)
        weight = np.clip(0.35 + 0.35 * np.sin(37.0 * place + 91.0 * level) + 0.3 * coarse, 0.0, 1.0)
        groove = (row - level < 0.2) | (column - place < 0.1)
        shade = shade * np.where(groove, 1.5 if kind == "brick" and phase > 0.5 else 0.45, 1.0)
    elif kind in ("fur", "spots", "feathers", "coffee"):
        weight = np.clip(0.5 + 3.0 * (coarse + 0.5 * (phase - 0.5)), 0.0, 1.0)
    elif kind in ("leaves", "grass", "hedge"):
        weight = np.clip(0.45 + 0.4 * fine + 0.4 * coarse, 0.0, 1.0)
    elif kind in ("asphalt", "stone", "carpet", "sand"):
        weight = np.clip(0.4 + 0.45 * fine + 0.35 * coarse, 0.0, 1.0)
    elif kind == "cloth":
        weight = np.clip(0.35 + 0.5 * coarse + 0.35 * np.sin(2 * math.pi * f * s) * np.sin(2 * math.pi * f * t), 0, 1)
    elif kind == "water":
        weight = _wave(0.25 * f * s + f * t + 0.8 * coarse, 0.5)
    elif kind == "metal":
        weight = np.clip(0.5 + 0.5 * np.sin(9.0 * s + 6.0 * coarse), 0.0, 1.0)
    elif kind == "sky":
        weight = np.clip(1.4 * coarse + 0.3 * fine + phase - 0.4, 0.0, 1.0)
    else:
        weight = np.clip(0.4 + 0.6 * coarse, 0.0, 1.0)
    return weight, np.maximum(shade, 0.12)


# ---------------------------------------------------------------------------------------------------------------------
# Objects: lists of solids with part names. x is where the object looks to, y is up, z points to the camera at yaw 0
# ---------------------------------------------------------------------------------------------------------------------


class _Model:
    """Solids of one object, collected by the builders below in the object's own units."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.shapes: list[int] = []
        self.centers: list[tuple] = []
        self.axes: list[list] = []  # columns: local x, y, z axis times the half lengths
        self.tapers: list[tuple] = []  # top over bottom along x and z, shift of the top along x
        self.rough: list[float] = []  # how far noise eats into the outline (leaves, fur)
        self.materials: list[_Material] = []

    def _add(self, part, material, shape, center, axes, taper=(1.0, 1.0, 0.0), rough=0.0) -> None:
        self.parts.append(part)
        self.materials.append(material)
        self.shapes.append(shape)
        self.centers.append(tuple(center))
        self.axes.append(axes)
        self.tapers.append(taper)
        self.rough.append(rough)

    @staticmethod
    def _turned(half, tilt: float, lean: float = 0.0) -> list:
        """Axes after a rotation by ``tilt`` in the x-y plane and then by ``lean`` in the y-z plane (radians)."""
        c, s, a, b = math.cos(tilt), math.sin(tilt), math.cos(lean), math.sin(lean)
        x, y, z = half
        return [[c * x, -s * y, 0.0], [a * s * x, a * c * y, -b * z], [b * s * x, b * c * y, a * z]]

    def ball(self, part, material, center, radii, *, tilt=0.0, lean=0.0, rough=0.0) -> None:
        self._add(part, material, _BALL, center, self._turned(radii, tilt, lean), rough=rough)

    def block(self, part, material, center, half, *, tilt=0.0, lean=0.0, top=(1.0, 1.0), shift=0.0) -> None:
        self._add(part, material, _BLOCK, center, self._turned(half, tilt, lean), (*top, shift))

    def rod(self, part, material, start, end, radius, end_radius=None, *, flat=1.0) -> None:
        """A round rod from start to end; ``flat`` squeezes it along its third axis."""
        # Plain numbers: for vectors of three they are several times faster than arrays.
        ax, ay, az = ((q - p) / 2 for p, q in zip(start, end, strict=True))
        long = math.sqrt(ax * ax + ay * ay + az * az)
        yx, yy, yz = ax / long, ay / long, az / long
        sx, sy, sz = (-yz * yx, -yz * yy, 1.0 - yz * yz) if abs(yz) < 0.8 else (1.0 - yx * yx, -yx * yy, -yx * yz)
        norm = math.sqrt(sx * sx + sy * sy + sz * sz)
        sx, sy, sz = sx / norm, sy / norm, sz / norm
        x = (yy * sz - yz * sy, yz * sx - yx * sz, yx * sy - yy * sx)
        thin = radius * flat
        axes = [[x[0] * radius, ax, sx * thin], [x[1] * radius, ay, sy * thin], [x[2] * radius, az, sz * thin]]
        middle = [(p + q) / 2 for p, q in zip(start, end, strict=True)]
        ratio = 1.0 if end_radius is None else end_radius / radius
        self._add(part, material, _ROD, middle, axes, (ratio, ratio, 0.0))


def _build_chair(m: _Model, d: _Dice) -> None:
    w, depth, high, tall = d(0.42, 0.55), d(0.42, 0.55), d(0.7, 1.0), d(0.8, 1.25)
    legs = _Material(d, "wood", "metal", "paint")
    seat = _Material(d, "cloth", "plaid", "stripes", "spots", "checks", "wood")
    back = _Material(d, "cloth", "plaid", "stripes", "wood", "planks") if d.chance(0.6) else seat
    thick, leg, splay = d(0.06, 0.14), d(0.055, 0.09), d(0.0, 0.14)
    m.block("seat", seat, (0, high, 0), (depth, thick, w))
    for x in (-1, 1):
        for z in (-1, 1):
            foot = (x * (depth - leg + splay), 0, z * (w - leg + splay))
            m.rod("legs", legs, foot, (x * (depth - leg), high, z * (w - leg)), leg * 0.8, leg)
    lean = d(0.03, 0.22)
    at = (-depth - math.sin(lean) * tall / 2, high + tall / 2, 0)
    if d.chance(0.6):
        m.block("back", back, at, (d(0.05, 0.1), tall / 2, w), tilt=lean, top=(1.0, d(0.75, 1.05)))
    else:
        for z in (-1, 1):
            m.block("back", back, (at[0], at[1], z * (w - 0.07)), (0.06, tall / 2, 0.07), tilt=lean)
        for level in (0.45, 0.85) if d.chance(0.5) else (0.3, 0.6, 0.9):
            x = -depth - math.sin(lean) * tall * level
            m.block("back", back, (x, high + tall * level, 0), (0.05, tall * 0.1, w), tilt=lean)


def _build_dog(m: _Model, d: _Dice) -> None:
    coat = _Material(d, "fur")
    second = _Material(d, "fur") if d.chance(0.45) else coat
    black = _Material(d, "lacquer")
    length, girth, tall = d(0.6, 0.95), d(0.27, 0.4), d(0.45, 0.85)
    y = tall + girth * 0.7
    m.ball("body", coat, (0, y, 0), (length, girth, girth * 0.85), tilt=d(-0.06, 0.14), rough=0.16)
    m.ball("body", coat, (length * 0.62, y + 0.03, 0), (girth * 1.05, girth * 1.12, girth * 0.95), rough=0.14)
    head, hx, hy = d(0.25, 0.34), length + d(0.14, 0.3), y + girth + d(0.16, 0.42)
    m.rod("body", coat, (length * 0.65, y + girth * 0.3, 0), (hx - 0.03, hy, 0), girth * 0.75, head * 0.7)
    m.ball("head", coat, (hx, hy, 0), (head, head * 0.92, head * 0.9), rough=0.1)
    snout, drop = d(0.2, 0.42), d(0.04, 0.16)
    tip = (hx + head * 0.8 + snout, hy - drop - 0.05, 0)
    m.rod("muzzle", second, (hx + head * 0.3, hy - drop * 0.5, 0), tip, head * d(0.55, 0.68), head * d(0.36, 0.48))
    m.ball("muzzle", black, (tip[0], tip[1] + 0.05, 0), (0.09, 0.08, 0.1))
    pricked = d.chance(0.5)
    for z in (-1, 1):
        m.ball("head", black, (hx + head * 0.72, hy + head * 0.35, z * head * 0.55), (0.06, 0.065, 0.06))
        if pricked:
            base = (hx - 0.06, hy + head * 0.5, z * head * 0.6)
            m.rod("ear", second, base, (base[0] - 0.06, base[1] + d(0.3, 0.45), z * head * 0.85), 0.16, 0.03, flat=0.5)
        else:
            m.ball(
                "ear",
                second,
                (hx - head * 0.35, hy - 0.06, z * head * 0.92),
                (0.14, d(0.26, 0.38), 0.07),
                tilt=d(-0.3, 0.2),
            )
        for x, swing in ((-length * 0.72, d(-0.2, 0.2)), (length * 0.66, d(-0.2, 0.2))):
            foot = (x + swing, 0.05, z * girth * 0.55)
            m.rod("legs", coat, foot, (x, y, z * girth * 0.5), d(0.075, 0.1), girth * 0.42)
            m.ball("legs", second, (foot[0] + 0.05, 0.06, foot[2]), (0.14, 0.07, 0.1))
    lift = d(-0.5, 1.1)
    end = (-length - 0.5 * math.cos(lift), y + 0.1 + 0.55 * math.sin(lift), d(-0.15, 0.15))
    m.rod("tail", coat, (-length * 0.85, y + 0.1, 0), end, d(0.09, 0.14), d(0.03, 0.08))


def _build_car(m: _Model, d: _Dice) -> None:
    paint, glass = _Material(d, "paint", "paint", "stripes", "spots"), _Material(d, "glass")
    roof = paint if d.chance(0.7) else _Material(d, "paint", "metal")
    rubber, metal, lamp = _Material(d, "rubber"), _Material(d, "metal"), _Material(d, "light", glow=1.5)
    length, high, wide, wheel = d(1.05, 1.35), d(0.24, 0.34), d(0.5, 0.62), d(0.25, 0.33)
    y = wheel + high * 0.7
    m.block("body", paint, (0, y, 0), (length, high, wide), top=(d(0.93, 1), 0.95))
    tall, half, back = d(0.24, 0.36), length * d(0.48, 0.66), length * d(-0.3, 0.02)
    m.block(
        "windows",
        glass,
        (back, y + high + tall, 0),
        (half, tall, wide * 0.9),
        top=(d(0.6, 0.8), 0.85),
        shift=d(-0.12, 0.05),
    )
    m.block("body", roof, (back, y + high + 2 * tall, 0), (half * 0.74, 0.045, wide * 0.8))
    m.block("body", roof, (back + d(-0.1, 0.1), y + high + tall, 0), (0.06, tall, wide * 0.9), top=(1, 0.9))
    for x in (-1, 1):
        for z in (-1, 1):
            at = (x * length * 0.6, wheel, z * wide)
            m.rod("wheels", rubber, (at[0], wheel, at[2] - z * 0.22), (at[0], wheel, at[2] + z * 0.05), wheel)
            if z > 0:
                m.rod("wheels", metal, (at[0], wheel, at[2]), (at[0], wheel, at[2] + 0.08), wheel * d(0.45, 0.62))
    for z in (-1, 1):
        m.ball("lights", lamp, (length * 0.99, y + high * 0.2, z * wide * 0.68), (0.07, 0.11, 0.13))


def _build_house(m: _Model, d: _Dice) -> None:
    walls, tiles = _Material(d, "brick", "plaster", "planks", "stone"), _Material(d, "shingles", "shingles", "brick")
    wood, glass = _Material(d, "paint", "planks"), _Material(d, "glass", glow=1.2)
    wide, deep, high, peak = d(0.75, 1.1), d(0.55, 0.9), d(0.45, 0.75), d(0.3, 0.55)
    m.block("walls", walls, (0, high, 0), (wide, high, deep))
    ridge = (1.0, 0.02) if d.chance(0.5) else (0.02, 1.0)
    m.block("roof", tiles, (0, 2 * high + peak, 0), (wide + 0.14, peak, deep + 0.12), top=ridge)
    if d.chance(0.7):
        m.block(
            "chimney",
            walls if d.chance(0.4) else _Material(d, "brick"),
            (wide * d(-0.6, 0.6), 2 * high + peak * 1.4, -deep * 0.25),
            (0.11, peak * 0.8, 0.11),
        )
    side = d.choose((-1, 1))
    door = d(0.3, 0.42)
    m.block("door", wood, (side * wide * d(0.35, 0.6), door, deep), (d(0.14, 0.2), door, 0.03))
    for x in (-0.5 * side, 0.02 * side) if d.chance(0.5) else (-0.4 * side,):
        m.block("windows", glass, (x * wide, high * d(1.05, 1.3), deep), (d(0.13, 0.2), d(0.15, 0.22), 0.025))
    m.block("windows", glass, (wide, high * 1.15, deep * 0.2), (0.025, 0.18, 0.2))
    m.block("windows", glass, (-wide, high * 1.15, deep * 0.2), (0.025, 0.18, 0.2))


def _build_tree(m: _Model, d: _Dice) -> None:
    bark, leaves = _Material(d, "bark", "wood"), _Material(d, "leaves")
    tall, radius = d(0.6, 1.0), d(0.1, 0.17)
    if d.chance(0.3):
        m.rod("trunk", bark, (0, 0, 0), (0, tall, 0), radius * 1.2, radius)
        layers, wide = 3 if d.chance(0.5) else 4, d(0.6, 0.85)
        for i in range(layers):
            low, r = tall * 0.6 + i * d(0.36, 0.46), wide * (1 - 0.22 * i)
            m.rod("crown", leaves, (0, low, 0), (0, low + 0.75, 0), r, r * 0.12)
        return
    bend = d(-0.15, 0.15)
    m.rod("trunk", bark, (0, 0, 0), (bend, tall * 1.3, 0), radius * 1.3, radius * 0.7)
    y, spread = tall + 0.5, d(0.35, 0.55)
    m.ball("crown", leaves, (bend, y, 0), (d(0.5, 0.7), d(0.45, 0.6), 0.55), rough=0.55)
    other = leaves if d.chance(0.6) else _Material(d, "leaves")
    for i in range(5):
        a = 2 * math.pi * (i + d(0, 0.7)) / 5
        r = d(0.26, 0.42)
        m.ball(
            "crown",
            other if i % 2 else leaves,
            (bend + spread * math.cos(a), y + 0.8 * spread * math.sin(a), d(-0.1, 0.4)),
            (r, r, r),
            rough=0.55,
        )
    if d.chance(0.35):
        fruit = _Material(d, "paint")
        for _ in range(5):
            a, r = d(0, 2 * math.pi), d(0.2, 0.5)
            m.ball("fruit", fruit, (bend + r * math.cos(a), y + r * math.sin(a), 0.62), (0.085, 0.085, 0.085))


def _build_lamp(m: _Model, d: _Dice) -> None:
    metal = _Material(d, "metal", "wood", "glaze", "stone")
    shade = _Material(d, "cloth", "stripes", "plaid", "spots", "plaster", glow=2.0)
    base, tall, wide, high = d(0.3, 0.45), d(0.7, 1.2), d(0.45, 0.65), d(0.28, 0.42)
    m.rod("base", metal, (0, 0, 0), (0, d(0.08, 0.16), 0), base, base * d(0.6, 0.95))
    if d.chance(0.5):
        belly = _Material(d, "glaze", "wood", "spots", "stripes")
        m.ball("base", belly, (0, 0.32, 0), (d(0.22, 0.34), 0.28, 0.26))
    bend = d(-0.3, 0.3) if d.chance(0.4) else 0.0
    m.rod("pole", metal, (0, 0, 0), (bend, tall, 0), d(0.05, 0.08))
    m.rod("shade", shade, (bend, tall - high * 0.5, 0), (bend, tall + high * 1.5, 0), wide, wide * d(0.4, 0.8))
    m.ball("bulb", _Material(d, "light", glow=3.0), (bend, tall - high * 0.5 - 0.1, 0), (0.13, 0.15, 0.13))


def _build_cup(m: _Model, d: _Dice) -> None:
    glaze = _Material(d, "glaze", "stripes", "spots", "plaid", "checks", "stone")
    rest = glaze if d.chance(0.5) else _Material(d, "glaze", "stone", "wood")
    low, rim, tall = d(0.36, 0.55), d(0.5, 0.62), d(0.75, 1.1)
    y = 0.0
    if d.chance(0.6):
        y = d(0.07, 0.12)
        m.rod("saucer", rest, (0, 0, 0), (0, y, 0), 0.5, d(0.85, 1.0))
    m.rod("body", glaze, (0, y, 0), (0, y + tall, 0), low, rim)
    m.rod("drink", _Material(d, "coffee"), (0, y + tall - 0.05, 0), (0, y + tall + 0.012, 0), rim * 0.86)
    thick, out, mid = d(0.06, 0.09), d(0.26, 0.4), y + tall * 0.52
    x0 = (low + rim) / 2 - 0.06
    angles = [1.45, 0.75, 0.0, -0.75, -1.45]
    points = [(x0 + out * math.cos(a), mid + tall * 0.33 * math.sin(a), 0) for a in angles]
    for p, q in zip(points[:-1], points[1:], strict=True):
        m.rod("handle", rest, p, q, thick)


def _build_bird(m: _Model, d: _Dice) -> None:
    plumage, wing = _Material(d, "feathers", "spots"), _Material(d, "feathers", "stripes")
    horn, black = _Material(d, "horn"), _Material(d, "lacquer")
    head_coat = plumage if d.chance(0.5) else _Material(d, "feathers")
    length, girth, leg, tilt = d(0.5, 0.7), d(0.32, 0.45), d(0.25, 0.5), d(0.1, 0.5)
    y = leg + girth * 0.9
    m.ball("body", plumage, (0, y, 0), (length, girth, girth * 0.9), tilt=tilt, rough=0.1)
    hx, hy, head = length * 0.8 * math.cos(tilt), y + girth * 0.45 + length * 0.75 * math.sin(tilt), d(0.22, 0.3)
    m.ball("head", head_coat, (hx, hy, 0), (head, head, head), rough=0.06)
    m.rod(
        "beak", horn, (hx + head * 0.75, hy, 0), (hx + head + d(0.16, 0.42), hy - d(0.0, 0.1), 0), d(0.09, 0.13), 0.015
    )
    for z in (-1, 1):
        m.ball("head", black, (hx + head * 0.5, hy + head * 0.3, z * head * 0.78), (0.055, 0.06, 0.05))
        spread = (-0.12 * length, y + 0.06, z * girth * 0.72)
        m.ball("wing", wing, spread, (length * d(0.75, 0.95), girth * d(0.5, 0.68), 0.16), tilt=tilt + d(-0.1, 0.35))
        m.rod("legs", horn, (z * 0.04, 0.03, z * 0.12), (-0.05, y - girth * 0.5, z * 0.12), 0.035)
        m.block("legs", horn, (z * 0.04 + 0.07, 0.02, z * 0.12), (0.13, 0.02, 0.05))
    end = d(0.75, 1.1)
    m.block(
        "tail",
        wing,
        (-length * end, y - length * end * math.tan(tilt) * 0.9, 0),
        (d(0.3, 0.45), 0.05, d(0.12, 0.22)),
        tilt=tilt,
    )


def _build_boat(m: _Model, d: _Dice) -> None:
    hull, wood = _Material(d, "paint", "planks", "stripes", "wood"), _Material(d, "wood", "metal")
    length, high, wide = d(0.85, 1.1), d(0.2, 0.3), d(0.35, 0.48)
    m.block("hull", hull, (0, high, 0), (length * 0.72, high, wide * 0.6), top=(1.35, 1.6), shift=0.1)
    m.block("hull", wood, (0.07, 2 * high, 0), (length * 0.95, 0.035, wide * 0.92))
    if d.chance(0.6):
        mast, tall = d(-0.05, 0.25), d(1.2, 1.7)
        m.rod("mast", wood, (mast, high, 0), (mast, 2 * high + tall, 0), 0.045, 0.03)
        cloth = [_Material(d, "cloth", "stripes", "plaid", "checks", "plaster") for _ in range(2)]
        boom, top = d(0.28, 0.4), tall * 0.46
        m.block(
            "sail",
            cloth[0],
            (mast - boom - 0.06, 2 * high + 0.14 + top, 0),
            (boom, top, 0.03),
            top=(0.02, 1),
            shift=0.98,
        )
        m.block(
            "sail",
            cloth[1],
            (mast + boom * 0.85 + 0.06, 2 * high + 0.16 + top * 0.8, 0),
            (boom * 0.85, top * 0.8, 0.03),
            top=(0.02, 1),
            shift=-0.98,
        )
    else:
        cabin, tall = _Material(d, "plaster", "paint", "planks"), d(0.22, 0.34)
        at = d(-0.4, 0.1)
        m.block("cabin", cabin, (at, 2 * high + tall, 0), (d(0.32, 0.45), tall, wide * 0.62), top=(0.9, 0.95))
        m.block(
            "cabin", _Material(d, "glass", glow=1.0), (at, 2 * high + tall * 1.25, 0), (0.26, tall * 0.35, wide * 0.63)
        )
        x = at + d(-0.1, 0.1)
        m.rod(
            "funnel",
            _Material(d, "paint", "stripes"),
            (x, 2 * high + tall, 0),
            (x, 2 * high + 2 * tall + d(0.35, 0.6), 0),
            0.13,
            0.11,
        )


# kind: builder, yaw range in degrees (positive: the front turns to the camera), chance to stand indoors
_KINDS: dict[str, tuple[Callable[[_Model, _Dice], None], tuple[float, float], float]] = {
    "chair": (_build_chair, (-30, 65), 0.85),
    "dog": (_build_dog, (-20, 48), 0.35),
    "car": (_build_car, (-38, 48), 0.05),
    "house": (_build_house, (-42, 42), 0.0),
    "tree": (_build_tree, (-180, 180), 0.0),
    "lamp": (_build_lamp, (-180, 180), 0.9),
    "cup": (_build_cup, (-40, 40), 0.9),
    "bird": (_build_bird, (-20, 40), 0.2),
    "boat": (_build_boat, (-38, 38), 0.0),
}

CLASS_NAMES = tuple(_KINDS)
MASK_CLASS_NAMES = ("wall or sky", "ground", *CLASS_NAMES)
KIND_PARTS: dict[str, tuple[str, ...]] = {
    "chair": ("seat", "back", "legs"),
    "dog": ("muzzle", "head", "body", "legs", "ear", "tail"),
    "car": ("body", "windows", "wheels", "lights"),
    "house": ("walls", "roof", "door", "windows", "chimney"),
    "tree": ("crown", "trunk", "fruit"),
    "lamp": ("shade", "pole", "base", "bulb"),
    "cup": ("body", "handle", "drink", "saucer"),
    "bird": ("beak", "head", "body", "wing", "tail", "legs"),
    "boat": ("hull", "sail", "mast", "cabin", "funnel"),
}
PART_NAMES = tuple(dict.fromkeys(name for names in KIND_PARTS.values() for name in names))


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------


class _Solids:
    """All solids of a scene as arrays: the local point ``q`` lies at ``axes[k] @ q + centers[k]`` in the world."""

    def __init__(self, models: list[_Model]) -> None:
        self.shapes = np.array([s for m in models for s in m.shapes])
        self.centers = np.array([c for m in models for c in m.centers])
        self.axes = np.array([a for m in models for a in m.axes])
        self.tapers = np.array([t for m in models for t in m.tapers])
        self.rough = [r for m in models for r in m.rough]
        self.materials = [x for m in models for x in m.materials]
        self.parts = [p for m in models for p in m.parts]
        self.model = [i for i, m in enumerate(models) for _ in m.parts]

    def find_extent(self, directions: np.ndarray, which: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Exact range of ``direction . point`` over each solid; directions (A, 3) -> low and high, both (A, K)."""
        x, y, z = (directions @ self.axes[which]).transpose(2, 1, 0)
        top_x, top_z, shift = self.tapers[which].T
        ball, block = self.shapes[which] == _BALL, self.shapes[which] == _BLOCK
        disc = np.sqrt(x * x + z * z + np.where(ball, y * y, 0.0))
        width, depth = np.abs(x), np.abs(z)
        bottom = np.where(block, width + depth, disc)
        top = np.where(block, top_x * width + top_z * depth, top_x * disc)
        y = np.where(ball, 0.0, y)
        slant = y + shift * x
        middle = directions @ self.centers[which].T
        return middle + np.minimum(-bottom - y, slant - top), middle + np.maximum(bottom - y, slant + top)

    def freeze(self) -> None:
        """Prepare what the intersections need, once the solids have their place; sorts the solids by shape."""
        order = np.argsort(self.shapes, kind="stable")
        self.shapes, self.centers = self.shapes[order], self.centers[order]
        self.axes, self.tapers = self.axes[order], self.tapers[order]
        for name in ("rough", "materials", "parts", "model"):
            values = getattr(self, name)
            setattr(self, name, [values[k] for k in order])
        self.inverse = np.linalg.inv(self.axes)
        self.sizes = np.sqrt((self.axes**2).sum(axis=1))  # (K, 3) half lengths
        top_x, top_z, shift = self.tapers.T
        # Half spaces n . q <= h of a tapered block, in the order +x -x +y -y +z -z.
        self.normals = np.empty((len(shift), 6, 3))
        self.normals[:] = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
        self.normals[:, 0, 1], self.normals[:, 1, 1] = (1 - top_x - shift) / 2, (1 - top_x + shift) / 2
        self.normals[:, 4:, 1] = (1 - top_z[:, None]) / 2
        self.heights = np.ones((len(shift), 6, 1))
        self.heights[:, 0, 0], self.heights[:, 1, 0] = (1 + top_x + shift) / 2, (1 + top_x - shift) / 2
        self.heights[:, 4:, 0] = (1 + top_z[:, None]) / 2
        self.grow = (top_x - 1.0) / 2  # of a rod's radius per unit of y; its mean radius is 1 + grow
        self.grow[self.shapes != _ROD] = 0.0


class _Aim:
    """Parallel rays through all solids; what is common to the rays is computed here, for all solids at once.

    Args:
        solids: the frozen solids.
        starts: (K, 3, m) matrices from the m homogeneous coordinates of a ray, the first of them 1, to its origin in
            the coordinates of each solid.
        direction: (3,) common direction in the world.
    """

    def __init__(self, solids: _Solids, starts: np.ndarray, direction: np.ndarray) -> None:
        local = solids.inverse @ direction  # (K, 3)
        self.shapes = solids.shapes.tolist()
        # Blocks: the ray parameter at every face is linear in the ray's coordinates.
        slope = solids.normals @ local[:, :, None]
        slope[np.abs(slope) < 1e-12] = 1e-12
        planes = -solids.normals @ starts
        planes[:, :, :1] += solids.heights
        planes /= slope
        self.entering = slope[:, :, 0] < 0
        self.planes = planes
        # Balls and rods: the roots of |q|^2 = 1 and of x^2 + z^2 = radius(y)^2, with a = 1 after division.
        dx, dy, dz = local.T
        dr = solids.grow * dy
        whole = (solids.shapes == _BALL).astype(float)  # a rod is a ball whose y does not count
        a = dx * dx + dz * dz + whole * dy * dy - dr * dr
        a[np.abs(a) < 1e-12] = 1e-12
        dy = np.where(np.abs(dy) < 1e-12, 1e-12, dy)
        x, y, z = (starts[:, i] for i in range(3))  # (K, m)
        unit = np.zeros_like(x)
        unit[:, 0] = 1.0
        radius = (1.0 + solids.grow)[:, None] * unit + solids.grow[:, None] * y
        b = (dx[:, None] * x + (whole * dy)[:, None] * y + dz[:, None] * z - dr[:, None] * radius) / a[:, None]
        near, far = (-np.sign(dy)[:, None] * unit - y) / dy[:, None], (np.sign(dy)[:, None] * unit - y) / dy[:, None]
        self.curves = np.stack([x, y, z, radius, b, near, far], axis=1)  # (K, 7, m)
        self.a, self.dr = a.tolist(), dr.tolist()

    def cross(self, k: int, rays: np.ndarray, erode: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Where rays are inside solid k.

        Args:
            k: which solid.
            rays: (m, n) homogeneous coordinates.
            erode: (n,) in [0, 1], how much of a ball's outline noise takes away.

        Returns:
            (enter, leave): (n,) ray parameters; enter >= leave or not a number where the ray misses.
        """
        if self.shapes[k] == _BLOCK:
            planes, entering = self.planes[k], self.entering[k]
            return (planes[entering] @ rays).max(axis=0), (planes[~entering] @ rays).min(axis=0)
        x, y, z, radius, b, near, far = self.curves[k] @ rays
        if self.shapes[k] == _BALL:
            square = b * b - (x * x + y * y + z * z - 1.0) / self.a[k]
            if erode is not None:
                square[square < erode / self.a[k]] = -1.0
            root = np.sqrt(square)
            return -b - root, root - b
        root = np.sqrt(b * b - (x * x + z * z - radius * radius) / self.a[k])
        if self.a[k] > 0:
            return np.maximum(-b - root, near), np.minimum(root - b, far)
        # Looking down into a wide cone: inside it from one of the roots to infinity.
        return (np.maximum(root - b, near), far) if self.dr[k] > 0 else (near, np.minimum(-b - root, far))


def _describe(solids: _Solids, points: np.ndarray, owner: np.ndarray, bounds: list[int]):
    """What the solids look like where they are seen.

    Args:
        solids: the frozen solids.
        points: (3, n) surface points in the world, sorted by solid.
        owner: (n,) which solid each point belongs to.
        bounds: solid k owns the points ``bounds[k]:bounds[k + 1]``.

    Returns:
        (normals, s, t, face): world normals (3, n), surface coordinates (n,) in frame widths, face number (n,).
    """
    spans = [(k, slice(bounds[k], bounds[k + 1])) for k in range(len(solids.shapes)) if bounds[k] < bounds[k + 1]]
    local = np.empty_like(points)
    offset = -(solids.inverse @ solids.centers[:, :, None])
    for k, span in spans:
        local[:, span] = solids.inverse[k] @ points[:, span] + offset[k]
    face = np.zeros(points.shape[1], dtype=np.int16)
    size = solids.sizes.T.take(owner, axis=1)
    x, y, z = local
    wide, t, deep = local * size
    rods, blocks = (int(np.searchsorted(solids.shapes[owner], shape)) for shape in (_ROD, _BLOCK))

    # Balls and rods: longitude and height.
    s = np.empty_like(x)
    s[:blocks] = np.arctan2(z[:blocks], x[:blocks]) * ((size[0, :blocks] + size[2, :blocks]) / 2)
    normals = local.copy()
    if rods < blocks:
        grow, y_rod = solids.grow[owner[rods:blocks]], y[rods:blocks]
        cap = np.abs(y_rod) > 1.0 - 1e-6
        normals[:, rods:blocks] *= ~cap
        normals[1, rods:blocks] = np.where(cap, y_rod, -grow * (1.0 + grow + grow * y_rod))
        s[rods:blocks] = np.where(cap, wide[rods:blocks], s[rods:blocks])
        t[rods:blocks] = np.where(cap, deep[rods:blocks], t[rods:blocks])
        face[rods:blocks] = cap * 2

    # Blocks: the two coordinates that span the face.
    if blocks < len(x):
        beyond = np.empty((6, len(x) - blocks))
        for k, span in spans:
            if span.start >= blocks:
                beyond[:, span.start - blocks : span.stop - blocks] = (
                    solids.normals[k] @ local[:, span] - solids.heights[k]
                )
        face[blocks:] = beyond.argmax(axis=0)
        axis = face[blocks:] >> 1
        s[blocks:] = np.where(axis == 0, deep[blocks:], wide[blocks:])
        t[blocks:] = np.where(axis == 1, deep[blocks:], t[blocks:])
        normals[:, blocks:] = solids.normals[owner[blocks:], face[blocks:]].T
    for k, span in spans:
        normals[:, span] = solids.inverse[k].T @ normals[:, span]
    normals /= np.sqrt((normals * normals).sum(axis=0))
    return normals, s, t, face


# ---------------------------------------------------------------------------------------------------------------------
# Rendering
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _make_grid(side: int) -> np.ndarray:
    """(3, side, side): 1, u to the right and v upward, both in (0, 1) at the middle of each sample."""
    line = (np.arange(side) + 0.5) / side
    return np.stack([np.ones((side, side)), *np.broadcast_arrays(line[None, :], 1.0 - line[:, None])])


@lru_cache(maxsize=16)
def _make_blur(side: int, sigma: float) -> np.ndarray:
    """(side, side) matrix whose product from both sides is a Gaussian blur; sigma in frame widths."""
    line = (np.arange(side) + 0.5) / side
    weight = np.exp(-0.5 * ((line[:, None] - line) / sigma) ** 2)
    return weight / weight.sum(axis=1, keepdims=True)


def _look_up(bank: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth value noise: interpolate the periodic tile ``bank`` (64 x 64, flat) at x, y (n,) in cells."""
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = x - x0, y - y0
    fx *= fx * (3.0 - 2.0 * fx)
    fy *= fy * (3.0 - 2.0 * fy)
    i, j = x0.astype(np.int64) & (_BANK - 1), (y0.astype(np.int64) & (_BANK - 1)) * _BANK
    i1, j1 = (i + 1) & (_BANK - 1), (j + _BANK) & (_BANK * _BANK - 1)
    left, right = bank.take(i + j), bank.take(i1 + j)
    left += fy * (bank.take(i + j1) - left)
    right += fy * (bank.take(i1 + j1) - right)
    left += fx * (right - left)
    return left


def _place(dice: _Dice, solids: _Solids, yaws: list[tuple[float, float]]):
    """Give every object its pose, size and place.

    Returns:
        (right, up, ray, origin): the camera's axes (3,), the direction of its rays and where in the frame (2,) the
        world's origin lies.
    """
    elevation = math.radians(dice(9, 27))
    roll, mirror = math.radians(dice(-4, 4)), dice.choose((-1.0, 1.0))
    right = np.array((mirror, 0.0, 0.0))
    up = np.array((0.0, math.cos(elevation), -math.sin(elevation)))
    ray = np.array((0.0, -math.sin(elevation), -math.cos(elevation)))
    right, up = math.cos(roll) * right + math.sin(roll) * up, math.cos(roll) * up - math.sin(roll) * right
    screen = np.stack([right, up, (0.0, 1.0, 0.0)])
    origin = np.zeros(2)
    first = 0
    for index, yaw_range in enumerate(yaws):
        which = slice(first, first + solids.model.count(index))
        first = which.stop
        yaw = math.radians(dice(*yaw_range))
        c, s = math.cos(yaw), math.sin(yaw)
        turn = np.array(((c, 0.0, s), (0.0, 1.0, 0.0), (-s, 0.0, c)))
        turn *= (dice(0.9, 1.12), dice(0.9, 1.12), dice(0.9, 1.12))  # proportions vary once more as a whole
        solids.axes[which] = turn @ solids.axes[which]
        solids.centers[which] = solids.centers[which] @ turn.T
        low, high = solids.find_extent(screen, which)
        low, high = low.min(axis=1), high.max(axis=1)
        width, height = high[0] - low[0], high[1] - low[1]
        if index == 0:  # the main object: its bounding box takes 35-70 % of the frame where its proportions allow
            scale = min(math.sqrt(dice(0.38, 0.7) / (width * height)), 0.95 / width, 0.95 / height)
            room = 0.98 - scale * width, 0.98 - scale * height
            corner = np.array((dice(0.02, room[0]), dice(0.02, 0.02 + 0.8 * (room[1] - 0.02))))
            shift = np.array((0.0, -scale * low[2], 0.0))  # feet on the ground
            origin = corner - scale * low[:2] - screen[:2] @ shift
        else:  # a small companion beside it, nearer or farther
            scale = dice(0.22, 0.34) / max(width, height)
            u = dice(0.04, 0.25) if dice.chance(0.5) else dice(0.75, 0.96)
            depth = dice(-0.6, 0.25)
            shift = np.array(((u - origin[0] - right[2] * depth) / right[0], -scale * low[2], depth))
        solids.axes[which] *= scale
        solids.centers[which] *= scale
        solids.centers[which] += shift
    return right, up, ray, origin


def _find_windows(low: np.ndarray, high: np.ndarray, origin: np.ndarray, side: int) -> list[list[int]]:
    """Sample ranges [top, bottom, left, right] that cover the extents (2, K), clipped to the frame."""
    low, high = (low + origin[:, None]) * side, (high + origin[:, None]) * side
    box = np.stack([side - high[1], side - low[1] + 1, low[0], high[0] + 1], axis=1)
    return np.clip(box, 0, side).astype(np.int64).tolist()


def _trace(solids: _Solids, aim: _Aim, windows, grid: np.ndarray, erosion: np.ndarray | None):
    """Find the nearest solid behind every sample.

    Args:
        solids: the frozen solids.
        aim: the camera's rays in the coordinates (1, u, v).
        windows: K ranges of samples outside of which a solid is not seen.
        grid: (3, R, R), see ``_make_grid``.
        erosion: (R, R) in [0, 1], noise that frays the outline of leaves and fur; None where there are none.

    Returns:
        (nearest, depth): (R, R) index of the solid, -1 for none, and distance along the ray.
    """
    side = grid.shape[1]
    nearest = np.full((side, side), -1, dtype=np.int16)
    depth = np.full((side, side), np.inf)
    for k, (top, bottom, left, end) in enumerate(windows):
        if bottom <= top or end <= left:
            continue
        rays = grid[:, top:bottom, left:end].reshape(3, -1)
        erode = solids.rough[k] * erosion[top:bottom, left:end].ravel() if solids.rough[k] else None
        enter, leave = aim.cross(k, rays, erode)
        old_depth = depth[top:bottom, left:end]
        enter, leave = enter.reshape(old_depth.shape), leave.reshape(old_depth.shape)
        # The margin decides for the first of two touching surfaces, whatever the last bit of the arithmetic says.
        seen = (enter < leave) & (enter < old_depth - 1e-9)
        np.copyto(old_depth, enter, where=seen)
        np.copyto(nearest[top:bottom, left:end], k, where=seen)
    return nearest, depth


def _shade_ground(aim: _Aim, windows, grid: np.ndarray) -> np.ndarray:
    """Shadow that the solids cast on the ground plane, True where the light is blocked; (R, R)."""
    shadow = np.zeros(grid.shape[1:], dtype=bool)
    for k, (top, bottom, left, end) in enumerate(windows):
        if bottom <= top or end <= left:
            continue
        enter, leave = aim.cross(k, grid[:, top:bottom, left:end].reshape(3, -1))
        shadow[top:bottom, left:end] |= ((enter < leave) & (leave > 1e-6)).reshape(bottom - top, end - left)
    return shadow


def _shade_solids(aim: _Aim, casters: list[int], owner: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether one of the casters stands between each point (4, n) of the objects and the light; (n,) bool."""
    blocked = np.zeros(len(owner), dtype=bool)
    for k in casters:
        enter, leave = aim.cross(k, points)
        blocked |= (enter < leave) & (leave > 0.012) & (owner != k)
    return blocked


def _render(rng: np.random.Generator, size: int, style: str):
    """Draw one picture; returns image (S, S, 3) uint8, mask (S, S) uint8, label and part boxes (P, 4)."""
    dice = _Dice(rng)
    bank = rng.uniform(-1.0, 1.0, _BANK * _BANK)
    night, sketch = style == "scenes-night", style == "scenes-sketch"
    over = 2 if size <= 256 else 1  # samples per side of a pixel
    side = size * over
    grid = _make_grid(side)
    u, v = grid[1].ravel(), grid[2].ravel()

    # What is in the scene and where.
    kinds = [dice.choose(CLASS_NAMES)]
    label = CLASS_NAMES.index(kinds[0])
    if dice.chance(0.3):
        kinds.append(CLASS_NAMES[(label + 1 + int(dice(0, len(CLASS_NAMES) - 1))) % len(CLASS_NAMES)])
    indoors = dice.chance(_KINDS[kinds[0]][2])
    models = [_Model() for _ in kinds]
    for kind, model in zip(kinds, models, strict=True):
        _KINDS[kind][0](model, dice)
    solids = _Solids(models)
    right, up, ray, origin = _place(dice, solids, [_KINDS[kind][1] for kind in kinds])
    solids.freeze()
    n_solids = len(solids.shapes)

    # One light: a sun, a window or (at night) a lamp, from the side so that shadows are seen, never from behind.
    azimuth, height = math.radians(dice(-12, 60)), math.radians(dice(28, 58))
    azimuth = azimuth if dice.chance(0.5) else math.pi - azimuth
    light = np.array((math.cos(azimuth) * math.cos(height), math.sin(height), math.sin(azimuth) * math.cos(height)))

    # The camera is orthographic and the ground is a plane: where a ray starts and where it meets the ground are
    # linear in (1, u, v), and so is the screen position of a point's shadow in the point.
    corner = -origin[0] * right - origin[1] * up
    frame = np.stack([corner, right, up], axis=1)
    on_ground = frame - np.outer(ray / ray[1], frame[1])
    flattened = frame.T[1:] - np.outer((frame.T[1:] @ light) / light[1], (0.0, 1.0, 0.0))
    low, high = solids.find_extent(np.concatenate([[right, up], flattened, [(0.0, 0.0, -1.0)]]))
    home = np.zeros((n_solids, 3, 4))
    home[:, :, 0] = solids.centers
    into = np.eye(3, 4, 1) - home  # (1, x, y, z) -> point relative to each solid
    with np.errstate(invalid="ignore", divide="ignore"):  # rays that miss give not-a-number on purpose
        erosion = _look_up(bank, 26.0 * u, 26.0 * v).reshape(side, side) ** 2 if any(solids.rough) else None
        aim = _Aim(solids, solids.inverse @ (frame - home[:, :, :3]), ray)
        nearest, depth = _trace(solids, aim, _find_windows(low[:2], high[:2], origin, side), grid, erosion)
        aim = _Aim(solids, solids.inverse @ (on_ground - home[:, :, :3]), light)
        shadow = _shade_ground(aim, _find_windows(low[2:4], high[2:4], origin, side), grid)

        # From here on samples are sorted by material, so that what shares one is a slice: wall, ground, solids.
        horizon = max(origin[1] + up[2] * -high[4].max() + 0.02, dice(0.3, 0.72))
        slope = math.tan(math.radians(dice(-14, 14))) if indoors else 0.0
        below = horizon + slope * (u - 0.5) - v
        nearest = nearest.ravel()
        code = np.where(nearest >= 0, nearest + np.int16(2), below > 0).astype(np.int16)
        order = np.argsort(code, kind="stable")
        bounds = np.searchsorted(code[order], np.arange(n_solids + 3)).tolist()
        n_wall, n_back = bounds[1], bounds[2]
        seen = order[n_back:]
        owner = nearest[seen]
        rays = grid.reshape(3, -1).take(seen, axis=1)
        points = np.empty((4, len(seen)))
        points[0] = 1.0
        points[1:] = frame @ rays + ray[:, None] * depth.ravel().take(seen)
        # Small things (an eye, a rung) cast no shadow worth its price on other solids.
        casters = np.flatnonzero(((high[:2] - low[:2]).min(axis=0) > 0.06) & (solids.sizes.max(axis=1) > 0.05))
        blocked = _shade_solids(_Aim(solids, solids.inverse @ into, light), casters.tolist(), owner, points)
    points = points[1:]
    normals, s_solid, t_solid, face = _describe(solids, points, owner, [b - n_back for b in bounds[2:]])

    # Surface coordinates and light: of the wall, of the ground in perspective ...
    floor, wall = _furnish(dice, kinds[0], indoors)
    materials = [wall, floor, *solids.materials]
    u_sorted, v_sorted = u.take(order), v.take(order)
    far = 0.55 / np.maximum(below.take(order[n_wall:n_back]) + (0.35 if indoors else 0.12), 0.05)
    s = np.concatenate([u_sorted[:n_wall], (u_sorted[n_wall:n_back] - 0.5) * far, s_solid])
    t = np.concatenate([v_sorted[:n_wall], 0.75 * far, t_solid])
    # Soft shadow on the ground: sharp enough to have a form, wide enough for a lamp that is not a point.
    blur, wide = _make_blur(side, 0.012), _make_blur(side, 0.05)
    soft = (blur @ shadow.astype(float) @ blur.T).ravel().take(order[n_wall:n_back])
    contact = (wide @ (shadow | (nearest >= 0).reshape(side, side)) @ wide.T).ravel().take(order[:n_back])
    lit, sky, highlight = np.empty(side * side), np.empty(side * side), np.zeros(side * side)
    # A wall is brighter towards the side that the light comes from.
    lit[:n_wall] = (0.3 + 0.55 * max(light[2], 0.0)) * (1.0 + light[0] * right[0] * 1.2 * (u_sorted[:n_wall] - 0.5))
    lit[n_wall:n_back] = light[1] * (1.0 - 0.95 * soft)
    sky[:n_back] = 1.0 - 0.5 * contact
    sky[:n_wall] *= 0.75
    # ... and of the solids. Less of the sky reaches what looks down and what is near the floor.
    lit[n_back:] = np.maximum(light @ normals, 0.0) * ~blocked
    sky[n_back:] = (0.6 + 0.4 * normals[1]) * (0.55 + 0.45 * np.minimum(points[1] / 0.12, 1.0))
    half = light - ray
    shine = np.maximum((half / math.sqrt(half @ half)) @ normals, 0.0) * ~blocked
    for _ in range(3):
        shine *= shine
    highlight[n_back:] = shine * shine * shine  # to the power of 24

    # Texture: noise in the coordinates of each surface, mixed by the pattern of its material.
    table = np.array([(*m.stretch, *m.offset, m.glow, m.gloss) for m in materials]).T
    sx, sy, ox, oy, glow, gloss = np.repeat(table, np.diff(bounds), axis=1)
    x, y = sx * s, sy * t
    coarse = _look_up(bank, 9.0 * x + ox, 9.0 * y + oy)
    fine = _look_up(bank, 23.0 * x + oy, 23.0 * y + ox)
    for rate in (51.0, 113.0, 233.0):
        if rate < 0.9 * size:  # finer than a pixel it would only average out
            fine += 0.75 * _look_up(bank, rate * x + ox, rate * y + oy)
    albedo = np.empty((3, side * side))
    for material, start, stop in zip(materials, bounds[:-1], bounds[1:], strict=True):
        if start < stop:
            here = slice(start, stop)
            weight, shade = _weave_pattern(material, s[here], t[here], coarse[here], fine[here])
            np.outer(material.colors[1] - material.colors[0], weight * shade, out=albedo[:, here])
            albedo[:, here] += np.outer(material.colors[0], shade)

    highlight *= gloss
    lights = (lit, sky, highlight, glow)
    sorted_image = _expose(dice, albedo, lights, u_sorted, v_sorted, n_wall, night=night, bare_sky=wall.kind == "sky")
    image = np.empty_like(sorted_image)
    image[:, order] = sorted_image
    if sketch:
        marks = code * np.int16(8)
        marks[seen] += face
        image = _draw_pencil(dice, image, bank, code, marks, u, v, size)
    image = image.reshape(3, size, over, size, over)
    if over == 2:
        image = image[:, :, 0] + image[:, :, 1]
        image = (image[..., 0] + image[..., 1]) / 4
    image = _sense(rng, dice, image.reshape(3, size, size), night=night, sketch=sketch)

    # Semantic mask, and boxes around what is seen of the parts of the main object.
    classes = np.array([0, 1, *(2 + CLASS_NAMES.index(kinds[i]) for i in solids.model)], dtype=np.uint8)
    mask = classes[code].reshape(side, side)[over // 2 :: over, over // 2 :: over]
    boxes = np.full((len(PART_NAMES), 4), np.nan, dtype=np.float32)
    rows, columns = np.divmod(seen, side)
    pieces: dict[str, list[int]] = {}
    for k, (part, model) in enumerate(zip(solids.parts, solids.model, strict=True)):
        if model == 0 and bounds[k + 2] < bounds[k + 3]:
            pieces.setdefault(part, []).append(k)
    for part, members in pieces.items():
        spans = [slice(bounds[k + 2] - n_back, bounds[k + 3] - n_back) for k in members]
        if sum(span.stop - span.start for span in spans) >= over * over:  # at least a pixel of it
            top, bottom = min(rows[a.start] for a in spans), max(rows[a.stop - 1] for a in spans) + 1
            left, end = min(columns[a].min() for a in spans), max(columns[a].max() for a in spans) + 1
            boxes[PART_NAMES.index(part)] = top / over, left / over, bottom / over, end / over
    return image, mask, label, boxes


def _furnish(dice: _Dice, kind: str, indoors: bool) -> tuple[_Material, _Material]:
    """Materials of the ground and of what is behind it."""
    if indoors:
        floor = _Material(dice, "planks", "planks", "carpet", "checks", "wood", "stone")
        wall = _Material(dice, "plaster", "plaster", "brick", "stripes", "plaid", "planks", "spots", "cloth")
        for surface in (floor, wall):  # furniture is what stands out in a room
            gray = surface.colors.mean(axis=1, keepdims=True)
            surface.colors = gray + dice(0.25, 0.75) * (surface.colors - gray)
    elif kind == "boat":
        floor, wall = _Material(dice, "water"), _Material(dice, "sky")
    else:
        floor = _Material(dice, "grass", "grass", "sand", "asphalt", "stone")
        wall = _Material(dice, "sky", "sky", "sky", "hedge", "hedge", "brick")
    if wall.kind == "sky":
        wall.colors[1] = 0.85  # clouds
    wall.contrast *= 0.65  # what is far away is out of focus, so that the object stands out
    floor.contrast *= 0.8
    return floor, wall


def _expose(dice, albedo, lights, u, v, n_wall: int, *, night: bool, bare_sky: bool) -> np.ndarray:
    """Light the samples.

    Args:
        dice: the scene's random numbers.
        albedo: (3, n) linear reflectance, the wall's samples first.
        lights: four arrays (n,): share of the lamp and of the sky that arrives, highlight, light of its own.
        u, v: (n,) place of the samples in the frame.
        n_wall: how many samples are wall or sky.
        night: lamp light on a dark scene instead of day light.
        bare_sky: behind the ground is a sky, not a wall.

    Returns:
        (3, n) linear light whose mean brightness is that of a well exposed photograph.
    """
    lit, sky, highlight, glow = lights
    if night:
        lamp = np.array((1.0, dice(0.62, 0.82), dice(0.3, 0.55)))
        fill = np.array((0.5, 0.65, 1.0)) * dice(0.05, 0.12)
        x, y, reach = dice(0.25, 0.75), dice(0.35, 0.8), dice(0.25, 0.4)
        pool = np.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * reach * reach))
        lit *= 1.6 * pool
        highlight *= pool
        if bare_sky:
            lit[:n_wall] = 0.02
    else:
        warmth = dice(-0.12, 0.16)
        lamp = np.array((1.0 + warmth, 1.0, 1.0 - warmth)) * dice(0.85, 1.3)
        fill = np.array((0.92, 0.97, 1.08)) * dice(0.16, 0.38)
        glow *= 0.1
        if bare_sky:  # a sky gives light instead of receiving it; it is paler towards the horizon
            lit[:n_wall], sky[:n_wall] = 0.75 - 0.25 * v[:n_wall], 1.0
    image = albedo * (np.outer(lamp, lit) + np.outer(fill, sky)) + np.outer(0.7 * lamp, highlight)
    if glow.any():
        image += glow * (0.25 + albedo) * np.array(((1.0,), (0.72,), (0.38,)))
    if night and bare_sky:
        for _ in range(int(dice(0, 6))):  # distant lights, out of focus
            far = np.hypot(u[:n_wall] - dice(), v[:n_wall] - dice(0.4, 1.0)) / dice(0.012, 0.045)
            color = np.array((1.0, dice(0.4, 0.9), dice(0.1, 0.9))) * dice(0.1, 0.35)
            image[:, :n_wall] += np.outer(color, np.clip(3.0 - 3.0 * far, 0.0, 1.0))
    target = dice(0.06, 0.1) if night else dice(0.16, 0.34)
    return image * (target / image.mean())


def _draw_pencil(dice, image, bank, code, marks, u, v, size: int) -> np.ndarray:
    """Redraw a lit picture with pencil on paper: hatching for tone, wavering contours where surfaces meet; (3, n)."""
    n = len(u)
    side = math.isqrt(n)
    background = code < 2
    tone = np.sqrt(np.minimum(image.mean(axis=0) * 1.7, 1.0))
    dark = (1.0 - tone) * np.where(background, dice(0.3, 0.75), 1.0)  # the hand spends less on the background
    waver = _look_up(bank, 5.0 * u + 7, 5.0 * v), _look_up(bank, 5.0 * u, 5.0 * v + 31)
    grain = min(0.9 * size, 110.0)
    tooth = _look_up(bank, grain * u, grain * v)
    rate = min(0.36 * size, 40.0)  # strokes per frame
    turn = dice(0.4, 1.2) + dice(0.15, 0.5) * (code % 7 - 3)  # each surface is hatched in a direction of its own
    ink = (0.22 if size >= 64 else 0.45) * dark  # smudged graphite under the strokes
    for cross, start in ((0.0, 0.1), (1.3, 0.5)):
        phase = rate * (u * np.cos(turn + cross) + v * np.sin(turn + cross)) + 0.55 * waver[0] + 0.2 * waver[1]
        stroke = np.cos(2 * math.pi * phase)
        ink += np.clip((dark - start) * 1.3, 0.0, 0.7) * np.clip(0.55 + 1.1 * stroke + 0.5 * tooth, 0.0, 1.1)
    rows, columns = np.divmod(np.arange(n), side)
    width = max(1, round(side / 200))
    for sign in (1.0, -0.8):  # two passes of the hand, never on the same line
        reach = sign * 0.012 * side
        r = np.clip(rows + np.rint(reach * waver[0]).astype(np.int64), 0, side - 1)
        c = np.clip(columns + np.rint(reach * waver[1]).astype(np.int64), 0, side - 1)
        moved = marks[r * side + c].reshape(side, side)
        edge = np.zeros((side, side), dtype=bool)
        edge[:-width] |= moved[:-width] != moved[width:]
        edge[:, :-width] |= moved[:, :-width] != moved[:, width:]
        ink += edge.ravel() * (0.5 + 0.3 * tooth)
    ink = np.clip(ink * (1.0 + 0.35 * tooth), 0.0, 0.95)
    paper = np.array(colorsys.hsv_to_rgb(dice(0.08, 0.16), dice(0.02, 0.16), dice(0.85, 0.98))) ** 2
    lead = np.array(colorsys.hsv_to_rgb(dice(), dice(0.0, 0.5), dice(0.1, 0.3))) ** 2
    wash = dice(0.0, 0.45)  # a little color under some drawings
    ground = paper[:, None] * (1.0 + 0.05 * tooth) * (1.0 - wash + wash * np.minimum(2.2 * image, 1.0))
    return ground + ink * (lead[:, None] - ground)


def _sense(rng, dice, image, *, night: bool, sketch: bool) -> np.ndarray:
    """Photon and read noise, then the transfer curve of a camera; (3, S, S) linear light -> (S, S, 3) uint8."""
    shot, read = (0.01, 0.002) if sketch else (dice(0.02, 0.045), 0.004) if night else (dice(0.015, 0.035), 0.004)
    image = np.maximum(image, 0.0)
    image += rng.standard_normal(image.shape) * (shot * np.sqrt(image) + read)
    if not sketch:
        np.maximum(image, 0.0, out=image)
        image *= (1.0 + 0.35 * image) / (1.0 + image) * 1.35  # a soft shoulder instead of burnt highlights
    # Gamma 2 instead of 2.2: a square root is fast and the same to the last bit on every machine.
    return np.rint(np.sqrt(np.clip(image, 0.0, 1.0)) * 255.0).astype(np.uint8).transpose(1, 2, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Public interface
# ---------------------------------------------------------------------------------------------------------------------


def make_scenes(
    n: int = 3000, *, size: int = 32, style: str = "scenes", seed: int = 0, progress: bool = True
) -> dict[str, np.ndarray | tuple[str, ...]]:
    """Generate i.i.d. scenes, each from its own random stream: image i is the same whatever ``n`` is.

    The bounding box of the main object takes 35-70 % of the frame's area on average (a slender object, limited by
    the frame's height, takes less) and lies inside the frame. In about 30 % of the scenes a second, small object of
    another kind stands beside it; it appears in the mask but not among the part boxes.

    Args:
        n: number of images, at least 1.
        size: side of the square images in pixels, 16 to 512.
        style: ``scenes`` (day and rooms), ``scenes-night`` (lamp light) or ``scenes-sketch`` (pencil on paper).
        seed: base seed; the stream of image i is ``seeds.rng(seed, "scenes", style, i)``.
        progress: show a bar when it takes more than two seconds.

    Returns:
        dict with ``images`` uint8 (N, S, S, 3), ``masks`` uint8 (N, S, S) indexing ``mask_class_names``, ``labels``
        int64 (N,) indexing ``class_names``, ``image_ids`` str (N,), ``class_names``, ``mask_class_names``,
        ``part_boxes`` float32 (N, P, 4) as y0, x0, y1, x1 in pixels around what is visible of each part of the main
        object (NaN where the part is absent or hidden) and ``part_names`` of length P. Parts of different kinds that
        bear the same name share a column; ``KIND_PARTS`` lists the names of each kind.

    Raises:
        ValueError: unknown style, or a size or number out of range.
    """
    if style not in STYLES:
        raise ValueError(f"expected a style among {', '.join(STYLES)}, got {style!r}")
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"expected n to be a whole number of images of at least 1, got {n!r}")
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"expected size to be a whole number of pixels from {MIN_SIZE} to {MAX_SIZE}, got {size!r}")
    n, size = int(n), int(size)
    images = np.empty((n, size, size, 3), dtype=np.uint8)
    masks = np.empty((n, size, size), dtype=np.uint8)
    labels = np.empty(n, dtype=np.int64)
    part_boxes = np.empty((n, len(PART_NAMES), 4), dtype=np.float32)
    for i in tqdm(range(n), desc=f"{style} {size} px", unit="image", delay=2, disable=not progress):
        images[i], masks[i], labels[i], part_boxes[i] = _render(seeds.rng(seed, "scenes", style, i), size, style)
    return {
        "images": images,
        "masks": masks,
        "labels": labels,
        "image_ids": np.array([f"{style}/{i:06d}" for i in range(n)]),
        "class_names": CLASS_NAMES,
        "mask_class_names": MASK_CLASS_NAMES,
        "part_boxes": part_boxes,
        "part_names": PART_NAMES,
    }

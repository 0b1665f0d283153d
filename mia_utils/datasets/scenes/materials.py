"""Textures of generated scenes: two colors, a pattern that mixes them, and noise; and the dice that draw them."""

import colorsys
import math

import numpy as np

BANK = 64  # side of the periodic tile of noise that each image draws for itself


class Dice:
    """Uniform draws from one stream, fetched in blocks: a scene needs hundreds of single numbers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng, self._left = rng, []

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        self._left = self._left or self._rng.random(256).tolist()
        return low + (high - low) * self._left.pop()

    def choose(self, options: tuple):
        return options[int(self(0, len(options)))]

    def chance(self, probability: float) -> bool:
        return self() < probability


# kind: hue, saturation and value ranges; pattern frequency (cycles per frame); stretch of the noise along s and t;
# strength of the noise; gloss
MATERIALS: dict[str, tuple] = {
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
# Patterns of noise alone: share of the second color = a + b coarse + c fine + d phase.
PLAIN = (0.4, 0.6, 0.0, 0.0)
MIXES = {
    **dict.fromkeys(("fur", "spots", "feathers", "coffee"), (-0.25, 3.0, 0.0, 1.5)),
    **dict.fromkeys(("leaves", "grass", "hedge"), (0.45, 0.4, 0.4, 0.0)),
    **dict.fromkeys(("asphalt", "stone", "carpet", "sand"), (0.4, 0.35, 0.45, 0.0)),
    "sky": (-0.4, 1.4, 0.3, 1.0),
}


class Material:
    """One texture: two colors, a pattern that mixes them and the frequencies of the noise in it."""

    def __init__(self, dice: Dice, *kinds: str, glow: float = 0.0) -> None:
        self.kind, self.glow = dice.choose(kinds), glow
        hue, saturation, value, freq, self.stretch, self.noise, self.gloss = MATERIALS[self.kind]
        h, s, v = dice(*hue), dice(*saturation), dice(*value)
        other_hue = dice() if hue == (0, 1) and dice.chance(0.4) else h + dice(-0.06, 0.06)
        other_value = v * dice(0.35, 0.7) if v > 0.5 else min(1.0, v * dice(1.3, 2.0) + 0.05)
        pair = (h, s, v), (other_hue, min(1.0, s * dice(0.5, 1.3)), other_value)
        self.colors = np.array([colorsys.hsv_to_rgb(a % 1.0, b, c) for a, b, c in pair]) ** 2  # linear light
        self.freq = dice(*freq)
        self.angle = dice(-0.35, 0.35) if self.kind in ("stripes", "plaid", "checks") else 0.0
        self.offset, self.phase, self.contrast = (dice(0, BANK), dice(0, BANK)), dice(), dice(0.7, 1.3)


def clip(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0.0, 1.0)


def make_wave(x: np.ndarray, sharpness: float = 0.5) -> np.ndarray:
    """Make a stripe profile in [0, 1] of period 1."""
    return clip(0.5 + sharpness * np.sin(2 * math.pi * x))


def weave_pattern(material: Material, s, t, coarse, fine) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate a material at surface coordinates s, t (n,) in frame widths, with noise (n,) in about [-1, 1].

    Returns:
        (weight, shade): (n,) share of the second color in [0, 1], and brightness factor around 1.
    """
    kind, f, phase = material.kind, material.freq, material.phase
    if material.angle:
        c, d = math.cos(material.angle), math.sin(material.angle)
        s, t = c * s + d * t, c * t - d * s
    shade = 1.0 + material.contrast * material.noise * (0.8 * fine + 0.45 * coarse)
    if kind in ("wood", "bark"):
        weight = make_wave(f * 0.6 * s + phase + 0.9 * coarse)
    elif kind == "planks":
        row = f * 0.7 * s + phase
        weight = clip(0.5 + 0.45 * np.sin(97.0 * np.floor(row)) + 0.5 * coarse)
        shade *= np.where(row - np.floor(row) < 0.14, 0.45, 1.0)
    elif kind == "stripes":
        weight = make_wave(f * s + phase + 0.12 * coarse, 1.5)
    elif kind == "plaid":
        weight = 0.5 * (make_wave(f * s + phase, 1.2) + make_wave(f * t + 2 * phase, 1.2))
        shade *= 1.0 - 0.3 * make_wave(2 * f * s + phase, 2.0)
    elif kind == "checks":
        weight = clip(0.5 + 2.5 * np.sin(math.pi * f * (s + phase)) * np.sin(math.pi * f * t))
    elif kind in ("brick", "shingles"):
        row = 1.25 * f * t + phase
        level = np.floor(row)
        column = 0.6 * f * s + 0.5 * level
        place = np.floor(column)
        weight = clip(0.35 + 0.35 * np.sin(37.0 * place + 91.0 * level) + 0.3 * coarse)
        groove = (row - level < 0.2) | (column - place < 0.1)
        shade *= np.where(groove, 1.5 if kind == "brick" and phase > 0.5 else 0.45, 1.0)
    elif kind == "cloth":
        weight = clip(0.35 + 0.5 * coarse + 0.35 * np.sin(2 * math.pi * f * s) * np.sin(2 * math.pi * f * t))
    elif kind == "water":
        weight = make_wave(0.25 * f * s + f * t + 0.8 * coarse)
    elif kind == "metal":
        weight = clip(0.5 + 0.5 * np.sin(9.0 * s + 6.0 * coarse))
    else:
        a, b, c, d = MIXES.get(kind, PLAIN)
        weight = clip(a + b * coarse + c * fine + d * phase)
    return weight, np.maximum(shade, 0.12)

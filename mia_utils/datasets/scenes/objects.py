"""Objects of generated scenes: lists of solids with part names.

x is where the object looks to, y is up, z points to the camera at yaw 0.
"""

import itertools
import math
from collections.abc import Callable

from mia_utils.datasets.scenes.geometry import Solids
from mia_utils.datasets.scenes.materials import Dice, Material

SIDES = (-1, 1)
CORNERS = tuple(itertools.product(SIDES, SIDES))


def _build_chair(m: Solids, d: Dice) -> None:
    w, depth, high, tall = d(0.42, 0.55), d(0.42, 0.55), d(0.7, 1.0), d(0.8, 1.25)
    legs = Material(d, "wood", "metal", "paint")
    seat = Material(d, "cloth", "plaid", "stripes", "spots", "checks", "wood")
    back = Material(d, "cloth", "plaid", "stripes", "wood", "planks") if d.chance(0.6) else seat
    thick, leg, splay = d(0.06, 0.14), d(0.055, 0.09), d(0.0, 0.14)
    m.block("seat", seat, (0, high, 0), (depth, thick, w))
    for x, z in CORNERS:
        foot = (x * (depth - leg + splay), 0, z * (w - leg + splay))
        m.rod("legs", legs, foot, (x * (depth - leg), high, z * (w - leg)), leg * 0.8, leg)
    lean = d(0.03, 0.22)
    at = (-depth - math.sin(lean) * tall / 2, high + tall / 2, 0)
    if d.chance(0.6):
        m.block("back", back, at, (d(0.05, 0.1), tall / 2, w), tilt=lean, top=(1.0, d(0.75, 1.05)))
    else:
        for z in SIDES:
            m.block("back", back, (at[0], at[1], z * (w - 0.07)), (0.06, tall / 2, 0.07), tilt=lean)
        for level in (0.45, 0.85) if d.chance(0.5) else (0.3, 0.6, 0.9):
            x = -depth - math.sin(lean) * tall * level
            m.block("back", back, (x, high + tall * level, 0), (0.05, tall * 0.1, w), tilt=lean)


def _build_dog(m: Solids, d: Dice) -> None:
    coat = Material(d, "fur")
    second, black = Material(d, "fur") if d.chance(0.45) else coat, Material(d, "lacquer")
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
    for z in SIDES:
        m.ball("head", black, (hx + head * 0.72, hy + head * 0.35, z * head * 0.55), (0.06, 0.065, 0.06))
        if pricked:
            base = (hx - 0.06, hy + head * 0.5, z * head * 0.6)
            m.rod("ear", second, base, (base[0] - 0.06, base[1] + d(0.3, 0.45), z * head * 0.85), 0.16, 0.03, flat=0.5)
        else:
            side = (hx - head * 0.35, hy - 0.06, z * head * 0.92)
            m.ball("ear", second, side, (0.14, d(0.26, 0.38), 0.07), tilt=d(-0.3, 0.2))
        for x, swing in ((-length * 0.72, d(-0.2, 0.2)), (length * 0.66, d(-0.2, 0.2))):
            foot = (x + swing, 0.05, z * girth * 0.55)
            m.rod("legs", coat, foot, (x, y, z * girth * 0.5), d(0.075, 0.1), girth * 0.42)
            m.ball("legs", second, (foot[0] + 0.05, 0.06, foot[2]), (0.14, 0.07, 0.1))
    lift = d(-0.5, 1.1)
    end = (-length - 0.5 * math.cos(lift), y + 0.1 + 0.55 * math.sin(lift), d(-0.15, 0.15))
    m.rod("tail", coat, (-length * 0.85, y + 0.1, 0), end, d(0.09, 0.14), d(0.03, 0.08))


def _build_car(m: Solids, d: Dice) -> None:
    paint, glass = Material(d, "paint", "paint", "stripes", "spots"), Material(d, "glass")
    roof = paint if d.chance(0.7) else Material(d, "paint", "metal")
    rubber, metal, lamp = Material(d, "rubber"), Material(d, "metal"), Material(d, "light", glow=1.5)
    length, high, wide, wheel = d(1.05, 1.35), d(0.24, 0.34), d(0.5, 0.62), d(0.25, 0.33)
    y = wheel + high * 0.7
    m.block("body", paint, (0, y, 0), (length, high, wide), top=(d(0.93, 1), 0.95))
    tall, half, back = d(0.24, 0.36), length * d(0.48, 0.66), length * d(-0.3, 0.02)
    cabin = (half, tall, wide * 0.9)
    m.block("windows", glass, (back, y + high + tall, 0), cabin, top=(d(0.6, 0.8), 0.85), shift=d(-0.12, 0.05))
    m.block("body", roof, (back, y + high + 2 * tall, 0), (half * 0.74, 0.045, wide * 0.8))
    m.block("body", roof, (back + d(-0.1, 0.1), y + high + tall, 0), (0.06, tall, wide * 0.9), top=(1, 0.9))
    for side, z in CORNERS:
        x = side * length * 0.6
        m.rod("wheels", rubber, (x, wheel, z * wide - z * 0.22), (x, wheel, z * wide + z * 0.05), wheel)
        if z > 0:
            m.rod("wheels", metal, (x, wheel, wide), (x, wheel, wide + 0.08), wheel * d(0.45, 0.62))
    for z in SIDES:
        m.ball("lights", lamp, (length * 0.99, y + high * 0.2, z * wide * 0.68), (0.07, 0.11, 0.13))


def _build_house(m: Solids, d: Dice) -> None:
    walls, tiles = Material(d, "brick", "plaster", "planks", "stone"), Material(d, "shingles", "shingles", "brick")
    wood, glass = Material(d, "paint", "planks"), Material(d, "glass", glow=1.2)
    wide, deep, high, peak = d(0.75, 1.1), d(0.55, 0.9), d(0.45, 0.75), d(0.3, 0.55)
    m.block("walls", walls, (0, high, 0), (wide, high, deep))
    ridge = (1.0, 0.02) if d.chance(0.5) else (0.02, 1.0)
    m.block("roof", tiles, (0, 2 * high + peak, 0), (wide + 0.14, peak, deep + 0.12), top=ridge)
    if d.chance(0.7):
        brick = walls if d.chance(0.4) else Material(d, "brick")
        at = (wide * d(-0.6, 0.6), 2 * high + peak * 1.4, -deep * 0.25)
        m.block("chimney", brick, at, (0.11, peak * 0.8, 0.11))
    side, door = d.choose(SIDES), d(0.3, 0.42)
    m.block("door", wood, (side * wide * d(0.35, 0.6), door, deep), (d(0.14, 0.2), door, 0.03))
    for x in (-0.5 * side, 0.02 * side) if d.chance(0.5) else (-0.4 * side,):
        m.block("windows", glass, (x * wide, high * d(1.05, 1.3), deep), (d(0.13, 0.2), d(0.15, 0.22), 0.025))
    for x in (wide, -wide):
        m.block("windows", glass, (x, high * 1.15, deep * 0.2), (0.025, 0.18, 0.2))


def _build_tree(m: Solids, d: Dice) -> None:
    bark, leaves = Material(d, "bark", "wood"), Material(d, "leaves")
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
    other = leaves if d.chance(0.6) else Material(d, "leaves")
    for i in range(5):
        a, r = 2 * math.pi * (i + d(0, 0.7)) / 5, d(0.26, 0.42)
        at = (bend + spread * math.cos(a), y + 0.8 * spread * math.sin(a), d(-0.1, 0.4))
        m.ball("crown", other if i % 2 else leaves, at, (r, r, r), rough=0.55)
    if d.chance(0.35):
        fruit = Material(d, "paint")
        for _ in range(5):
            a, r = d(0, 2 * math.pi), d(0.2, 0.5)
            m.ball("fruit", fruit, (bend + r * math.cos(a), y + r * math.sin(a), 0.62), (0.085, 0.085, 0.085))


def _build_lamp(m: Solids, d: Dice) -> None:
    metal = Material(d, "metal", "wood", "glaze", "stone")
    shade = Material(d, "cloth", "stripes", "plaid", "spots", "plaster", glow=2.0)
    base, tall, wide, high = d(0.3, 0.45), d(0.7, 1.2), d(0.45, 0.65), d(0.28, 0.42)
    m.rod("base", metal, (0, 0, 0), (0, d(0.08, 0.16), 0), base, base * d(0.6, 0.95))
    if d.chance(0.5):
        belly = Material(d, "glaze", "wood", "spots", "stripes")
        m.ball("base", belly, (0, 0.32, 0), (d(0.22, 0.34), 0.28, 0.26))
    bend = d(-0.3, 0.3) if d.chance(0.4) else 0.0
    m.rod("pole", metal, (0, 0, 0), (bend, tall, 0), d(0.05, 0.08))
    m.rod("shade", shade, (bend, tall - high * 0.5, 0), (bend, tall + high * 1.5, 0), wide, wide * d(0.4, 0.8))
    m.ball("bulb", Material(d, "light", glow=3.0), (bend, tall - high * 0.5 - 0.1, 0), (0.13, 0.15, 0.13))


def _build_cup(m: Solids, d: Dice) -> None:
    glaze = Material(d, "glaze", "stripes", "spots", "plaid", "checks", "stone")
    rest = glaze if d.chance(0.5) else Material(d, "glaze", "stone", "wood")
    low, rim, tall = d(0.36, 0.55), d(0.5, 0.62), d(0.75, 1.1)
    y = 0.0
    if d.chance(0.6):
        y = d(0.07, 0.12)
        m.rod("saucer", rest, (0, 0, 0), (0, y, 0), 0.5, d(0.85, 1.0))
    m.rod("body", glaze, (0, y, 0), (0, y + tall, 0), low, rim)
    m.rod("drink", Material(d, "coffee"), (0, y + tall - 0.05, 0), (0, y + tall + 0.012, 0), rim * 0.86)
    thick, out, mid = d(0.06, 0.09), d(0.26, 0.4), y + tall * 0.52
    x, angles = (low + rim) / 2 - 0.06, (1.45, 0.75, 0.0, -0.75, -1.45)
    points = [(x + out * math.cos(a), mid + tall * 0.33 * math.sin(a), 0) for a in angles]
    for p, q in itertools.pairwise(points):
        m.rod("handle", rest, p, q, thick)


def _build_bird(m: Solids, d: Dice) -> None:
    plumage, wing = Material(d, "feathers", "spots"), Material(d, "feathers", "stripes")
    horn, black = Material(d, "horn"), Material(d, "lacquer")
    head_coat = plumage if d.chance(0.5) else Material(d, "feathers")
    length, girth, leg, tilt = d(0.5, 0.7), d(0.32, 0.45), d(0.25, 0.5), d(0.1, 0.5)
    y = leg + girth * 0.9
    m.ball("body", plumage, (0, y, 0), (length, girth, girth * 0.9), tilt=tilt, rough=0.1)
    hx, hy, head = length * 0.8 * math.cos(tilt), y + girth * 0.45 + length * 0.75 * math.sin(tilt), d(0.22, 0.3)
    m.ball("head", head_coat, (hx, hy, 0), (head, head, head), rough=0.06)
    tip = (hx + head + d(0.16, 0.42), hy - d(0.0, 0.1), 0)
    m.rod("beak", horn, (hx + head * 0.75, hy, 0), tip, d(0.09, 0.13), 0.015)
    for z in SIDES:
        m.ball("head", black, (hx + head * 0.5, hy + head * 0.3, z * head * 0.78), (0.055, 0.06, 0.05))
        spread = (-0.12 * length, y + 0.06, z * girth * 0.72)
        m.ball("wing", wing, spread, (length * d(0.75, 0.95), girth * d(0.5, 0.68), 0.16), tilt=tilt + d(-0.1, 0.35))
        m.rod("legs", horn, (z * 0.04, 0.03, z * 0.12), (-0.05, y - girth * 0.5, z * 0.12), 0.035)
        m.block("legs", horn, (z * 0.04 + 0.07, 0.02, z * 0.12), (0.13, 0.02, 0.05))
    end = length * d(0.75, 1.1)
    m.block("tail", wing, (-end, y - end * math.tan(tilt) * 0.9, 0), (d(0.3, 0.45), 0.05, d(0.12, 0.22)), tilt=tilt)


def _build_boat(m: Solids, d: Dice) -> None:
    hull, wood = Material(d, "paint", "planks", "stripes", "wood"), Material(d, "wood", "metal")
    length, high, wide = d(0.85, 1.1), d(0.2, 0.3), d(0.35, 0.48)
    m.block("hull", hull, (0, high, 0), (length * 0.72, high, wide * 0.6), top=(1.35, 1.6), shift=0.1)
    m.block("hull", wood, (0.07, 2 * high, 0), (length * 0.95, 0.035, wide * 0.92))
    if d.chance(0.6):
        mast, tall = d(-0.05, 0.25), d(1.2, 1.7)
        m.rod("mast", wood, (mast, high, 0), (mast, 2 * high + tall, 0), 0.045, 0.03)
        cloth = [Material(d, "cloth", "stripes", "plaid", "checks", "plaster") for _ in range(2)]
        boom, top = d(0.28, 0.4), tall * 0.46
        at, half = (mast - boom - 0.06, 2 * high + 0.14 + top, 0), (boom, top, 0.03)
        m.block("sail", cloth[0], at, half, top=(0.02, 1), shift=0.98)
        boom, top = boom * 0.85, top * 0.8
        at, half = (mast + boom + 0.06, 2 * high + 0.16 + top, 0), (boom, top, 0.03)
        m.block("sail", cloth[1], at, half, top=(0.02, 1), shift=-0.98)
    else:
        cabin, tall = Material(d, "plaster", "paint", "planks"), d(0.22, 0.34)
        at = d(-0.4, 0.1)
        m.block("cabin", cabin, (at, 2 * high + tall, 0), (d(0.32, 0.45), tall, wide * 0.62), top=(0.9, 0.95))
        glass = Material(d, "glass", glow=1.0)
        m.block("cabin", glass, (at, 2 * high + tall * 1.25, 0), (0.26, tall * 0.35, wide * 0.63))
        x, paint = at + d(-0.1, 0.1), Material(d, "paint", "stripes")
        m.rod("funnel", paint, (x, 2 * high + tall, 0), (x, 2 * high + 2 * tall + d(0.35, 0.6), 0), 0.13, 0.11)


# kind: builder, yaw range in degrees (positive: the front turns to the camera), chance to stand indoors, parts
KINDS: dict[str, tuple[Callable[[Solids, Dice], None], tuple[float, float], float, tuple[str, ...]]] = {
    "chair": (_build_chair, (-30, 65), 0.85, ("seat", "back", "legs")),
    "dog": (_build_dog, (-20, 48), 0.35, ("muzzle", "head", "body", "legs", "ear", "tail")),
    "car": (_build_car, (-38, 48), 0.05, ("body", "windows", "wheels", "lights")),
    "house": (_build_house, (-42, 42), 0.0, ("walls", "roof", "door", "windows", "chimney")),
    "tree": (_build_tree, (-180, 180), 0.0, ("crown", "trunk", "fruit")),
    "lamp": (_build_lamp, (-180, 180), 0.9, ("shade", "pole", "base", "bulb")),
    "cup": (_build_cup, (-40, 40), 0.9, ("body", "handle", "drink", "saucer")),
    "bird": (_build_bird, (-20, 40), 0.2, ("beak", "head", "body", "wing", "tail", "legs")),
    "boat": (_build_boat, (-38, 38), 0.0, ("hull", "sail", "mast", "cabin", "funnel")),
}
CLASS_NAMES = tuple(KINDS)
MASK_CLASS_NAMES = ("wall or sky", "ground", *CLASS_NAMES)
KIND_PARTS = {kind: parts for kind, (*_, parts) in KINDS.items()}
PART_NAMES = tuple(dict.fromkeys(name for names in KIND_PARTS.values() for name in names))

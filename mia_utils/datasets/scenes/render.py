"""Rendering of generated scenes: place, trace, texture, light, and the noise of a sensor or the strokes of a pencil."""

import colorsys
import math
from functools import lru_cache

import numpy as np

from mia_utils.datasets.scenes.geometry import Solids
from mia_utils.datasets.scenes.materials import BANK, Dice, Material, weave_pattern
from mia_utils.datasets.scenes.objects import CLASS_NAMES, KINDS, PART_NAMES


@lru_cache(maxsize=4)
def make_grid(side: int) -> np.ndarray:
    """(3, side, side): 1, u to the right and v upward, both in (0, 1) at the middle of each sample."""
    line = (np.arange(side) + 0.5) / side
    return np.stack([np.ones((side, side)), *np.broadcast_arrays(line[None, :], 1.0 - line[:, None])])


@lru_cache(maxsize=16)
def make_blur(side: int, sigma: float) -> np.ndarray:
    """(side, side) matrix whose product from both sides is a Gaussian blur; sigma in frame widths."""
    line = (np.arange(side) + 0.5) / side
    weight = np.exp(-0.5 * ((line[:, None] - line) / sigma) ** 2)
    return weight / weight.sum(axis=1, keepdims=True)


def look_up(bank: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth value noise: interpolate the periodic tile ``bank`` (64 x 64, flat) at x, y (n,) in cells."""
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = (f * (f * (3.0 - 2.0 * f)) for f in (x - x0, y - y0))
    i, j = x0.astype(np.int64) & (BANK - 1), (y0.astype(np.int64) & (BANK - 1)) * BANK
    i1, j1 = (i + 1) & (BANK - 1), (j + BANK) & (BANK * BANK - 1)
    left, right = bank.take(i + j), bank.take(i1 + j)
    left += fy * (bank.take(i + j1) - left)
    right += fy * (bank.take(i1 + j1) - right)
    return left + fx * (right - left)


def place(dice: Dice, solids: Solids, yaws: list[tuple[float, float]]):
    """Give every object its pose, size and place.

    Returns:
        (right, up, ray, origin): the camera's axes and rays (4,), where in the frame (2,) the world's origin lies.
    """
    elevation = math.radians(dice(9, 27))
    roll, mirror = math.radians(dice(-4, 4)), dice.choose((-1.0, 1.0))
    c, s = math.cos(elevation), math.sin(elevation)
    right, up, ray = np.array(((mirror, 0.0, 0.0, 0.0), (0.0, c, -s, 0.0), (0.0, -s, -c, 0.0)))
    right, up = math.cos(roll) * right + math.sin(roll) * up, math.cos(roll) * up - math.sin(roll) * right
    screen, origin = np.stack([right, up, (0.0, 1.0, 0.0, 0.0)]), np.zeros(2)
    for index, yaw_range in enumerate(yaws):
        mine, yaw = solids.objects == index, math.radians(dice(*yaw_range))
        c, s = math.cos(yaw), math.sin(yaw)
        turn = np.array(((c, 0.0, s, 0.0), (0.0, 1.0, 0.0, 0.0), (-s, 0.0, c, 0.0), (0.0, 0.0, 0.0, 1.0)))
        turn[:, :3] *= (dice(0.9, 1.12), dice(0.9, 1.12), dice(0.9, 1.12))  # proportions vary once more as a whole
        solids.poses[mine] = turn @ solids.poses[mine]
        low, high = solids.find_extent(screen, mine)
        low, high = low.min(axis=1), high.max(axis=1)
        width, height, _ = high - low
        if index == 0:  # the main object: its bounding box takes 35-70 % of the frame where its proportions allow
            scale = min(math.sqrt(dice(0.38, 0.7) / (width * height)), 0.95 / width, 0.95 / height)
            room = 0.98 - scale * width, 0.98 - scale * height
            corner = np.array((dice(0.02, room[0]), dice(0.02, 0.02 + 0.8 * (room[1] - 0.02))))
            shift = np.array((0.0, -scale * low[2], 0.0))  # feet on the ground
            origin = corner - scale * low[:2] - screen[:2, :3] @ shift
        else:  # a small companion beside it, nearer or farther
            scale = dice(0.22, 0.34) / max(width, height)
            u = dice(0.04, 0.25) if dice.chance(0.5) else dice(0.75, 0.96)
            depth = dice(-0.6, 0.25)
            shift = np.array(((u - origin[0] - right[2] * depth) / right[0], -scale * low[2], depth))
        move = np.diag((scale, scale, scale, 1.0))
        move[:3, 3] = shift
        solids.poses[mine] = move @ solids.poses[mine]
    solids.inverse = np.linalg.inv(solids.poses)
    solids.sizes = np.sqrt((solids.poses[:, :3, :3] ** 2).sum(axis=1))  # (K, 3) half lengths
    return right, up, ray, origin


def render(rng: np.random.Generator, size: int, style: str):
    """Draw one image; returns image (S, S, 3) uint8, mask (S, S) uint8, label and part boxes (P, 4)."""
    dice = Dice(rng)
    bank = rng.uniform(-1.0, 1.0, BANK * BANK)
    night, sketch = style == "scenes-night", style == "scenes-sketch"
    over = 2 if size <= 256 else 1  # samples per side of a pixel
    side = size * over
    grid = make_grid(side)
    u, v = grid[1:].reshape(2, -1)

    # What is in the scene and where.
    kinds = [dice.choose(CLASS_NAMES)]
    label = CLASS_NAMES.index(kinds[0])
    if dice.chance(0.3):
        kinds.append(CLASS_NAMES[(label + 1 + int(dice(0, len(CLASS_NAMES) - 1))) % len(CLASS_NAMES)])
    indoors = dice.chance(KINDS[kinds[0]][2])
    solids = Solids()
    for solids.n_objects, kind in enumerate(kinds):
        KINDS[kind][0](solids, dice)
    solids.make_arrays()
    right, up, ray, origin = place(dice, solids, [KINDS[kind][1] for kind in kinds])

    # One light: a sun, a window or (at night) a lamp, from the side so that shadows are seen, never from behind.
    azimuth, height = math.radians(dice(-12, 60)), math.radians(dice(28, 58))
    azimuth = azimuth if dice.chance(0.5) else math.pi - azimuth
    flat = math.cos(height)
    light = np.array((math.cos(azimuth) * flat, math.sin(height), math.sin(azimuth) * flat, 0.0))

    # The camera is orthographic and the ground is a plane: where a ray starts and where it meets the ground are
    # linear in (1, u, v), and so is the screen position of a point's shadow in the point.
    corner = np.array((0.0, 0.0, 0.0, 1.0)) - origin[0] * right - origin[1] * up
    frame = np.stack([corner, right, up], axis=1)
    on_ground = frame - np.outer(ray / ray[1], frame[1])
    screen = np.stack([right, up])
    screen[:, 3] = origin
    shadows = screen - np.outer((screen @ light) / light[1], (0.0, 1.0, 0.0, 0.0))
    low, high = solids.find_extent(np.stack([*screen, *shadows, (0.0, 0.0, -1.0, 0.0)]))
    with np.errstate(invalid="ignore", divide="ignore"):  # rays that miss give not-a-number on purpose
        erosion = look_up(bank, 26.0 * u, 26.0 * v).reshape(side, side) ** 2 if any(solids.rough) else None
        nearest, depth = np.full((side, side), -1, np.int16), np.full((side, side), np.inf)
        for k, here, enter, leave in solids.sweep(low[:2], high[:2], grid, frame, ray, erosion):
            # The margin decides for the first of two touching surfaces, whatever the last bit of the arithmetic says.
            seen = (enter < leave) & (enter < depth[here] - 1e-9)
            np.copyto(depth[here], enter, where=seen)
            np.copyto(nearest[here], k, where=seen)
        shadow = np.zeros((side, side), bool)
        for _, here, enter, leave in solids.sweep(low[2:4], high[2:4], grid, on_ground, light):
            shadow[here] |= (enter < leave) & (leave > 1e-6)

        # What every sample shows: 0 the wall, 1 the ground, 2 ... the solids.
        horizon = max(origin[1] + up[2] * -high[4].max() + 0.02, dice(0.3, 0.72))
        slope = math.tan(math.radians(dice(-14, 14))) if indoors else 0.0
        below = horizon + slope * (u - 0.5) - v
        nearest = nearest.ravel()
        code = np.where(nearest >= 0, nearest + 2, below > 0).astype(np.int16)
        order = np.argsort(code, kind="stable")
        shown = np.split(order, np.searchsorted(code[order], np.arange(1, len(solids.parts) + 2)))
        wall, ground, seen = *shown[:2], np.concatenate(shown[2:])
        points = frame @ grid.reshape(3, -1)
        points[:, seen] += ray[:, None] * depth.ravel()[seen]
        # Small things (an eye, a rung) cast no shadow worth its price on other solids.
        blocked, owner, mine = np.zeros(len(seen), bool), nearest[seen], points[:, seen]
        for k in np.flatnonzero(((high[:2] - low[:2]).min(axis=0) > 0.06) & (solids.sizes.max(axis=1) > 0.05)):
            enter, leave = solids.cross(k, solids.inverse[k] @ mine, light)
            blocked |= (enter < leave) & (leave > 0.012) & (owner != k)

    # Surface coordinates: of the wall, of the ground in perspective, of the solids.
    far = 0.55 / np.maximum(below[ground] + (0.35 if indoors else 0.12), 0.05)
    s, t, normals, face = u.copy(), v.copy(), np.zeros((3, len(u))), np.zeros(len(u), np.int16)
    s[ground], t[ground] = (u[ground] - 0.5) * far, 0.75 * far
    for k, here in enumerate(shown[2:]):
        normals[:, here], s[here], t[here], face[here] = solids.describe(k, points[:, here])

    # Light. The soft shadow on the ground has a form, yet is that of a lamp that is not a point.
    blur, wide = make_blur(side, 0.012), make_blur(side, 0.05)
    contact = wide @ (shadow | (depth < np.inf)) @ wide.T
    lit, sky, highlight = light[:3] @ normals, 1.0 - 0.5 * contact.ravel(), np.zeros(len(u))
    # A wall is brighter towards the side that the light comes from.
    lit[wall] = (0.3 + 0.55 * max(light[2], 0.0)) * (1.0 + light[0] * right[0] * 1.2 * (u[wall] - 0.5))
    lit[ground] = light[1] * (1.0 - 0.95 * (blur @ shadow.astype(float) @ blur.T).ravel()[ground])
    lit[seen] = np.maximum(lit[seen], 0.0) * ~blocked
    sky[wall] *= 0.75
    # Less of the sky reaches what looks down and what is near the floor.
    sky[seen] = (0.6 + 0.4 * normals[1, seen]) * (0.55 + 0.45 * np.minimum(mine[1] / 0.12, 1.0))
    half = (light - ray)[:3]
    shine = (np.maximum((half / math.sqrt(half @ half)) @ normals[:, seen], 0.0) * ~blocked) ** 2
    shine = (shine**2) ** 2
    highlight[seen] = shine * shine * shine  # to the power of 24

    # Texture: noise in the coordinates of each surface, mixed by the pattern of its material.
    floor, back = furnish(dice, kinds[0], indoors)
    materials = [back, floor, *solids.materials]
    table = np.array([(*m.stretch, *m.offset, m.glow, m.gloss) for m in materials]).T
    sx, sy, ox, oy, glow, gloss = table.take(code, axis=1)
    x, y = sx * s, sy * t
    coarse = look_up(bank, 9.0 * x + ox, 9.0 * y + oy)
    fine = look_up(bank, 23.0 * x + oy, 23.0 * y + ox)
    for rate in (51.0, 113.0, 233.0):
        if rate < 0.9 * size:  # finer than a pixel it would only average out
            fine += 0.75 * look_up(bank, rate * x + ox, rate * y + oy)
    albedo = np.empty((3, len(u)))
    for material, here in zip(materials, shown, strict=True):
        weight, shade = weave_pattern(material, s[here], t[here], coarse[here], fine[here])
        first, second = material.colors
        albedo[:, here] = np.outer(first, shade) + np.outer(second - first, weight * shade)

    lights = lit, sky, highlight * gloss, glow
    image = expose(dice, albedo, lights, u, v, wall, night=night, bare_sky=back.kind == "sky")
    if sketch:
        image = draw_pencil(dice, image, bank, code, code * np.int16(8) + face, u, v, size)
    image = image.reshape(3, size, over, size, over)
    image = (image[:, :, 0] + image[:, :, -1]) / 2  # of one or two samples; numpy's mean is slow on short axes
    image = sense(rng, dice, (image[..., 0] + image[..., -1]) / 2, night=night, sketch=sketch)

    # Semantic mask, and boxes around what is seen of the parts of the main object.
    classes = np.array([0, 1, *(2 + CLASS_NAMES.index(kinds[i]) for i in solids.objects)], dtype=np.uint8)
    mask = classes[code].reshape(side, side)[over // 2 :: over, over // 2 :: over]
    boxes = np.full((len(PART_NAMES), 4), np.nan, dtype=np.float32)
    parts = np.where(solids.objects == 0, [PART_NAMES.index(part) for part in solids.parts], -1)
    for part in np.unique(parts[parts >= 0]):
        here = np.stack(np.divmod(np.flatnonzero(np.append((-1, -1), parts)[code] == part), side))
        if here.shape[1] >= over * over:  # at least a pixel of it
            boxes[part] = np.concatenate([here.min(axis=1), here.max(axis=1) + 1]) / over
    return image, mask, label, boxes


def furnish(dice: Dice, kind: str, indoors: bool) -> tuple[Material, Material]:
    """Draw the materials of the ground and of what is behind it."""
    if indoors:
        floor = Material(dice, "planks", "planks", "carpet", "checks", "wood", "stone")
        wall = Material(dice, "plaster", "plaster", "brick", "stripes", "plaid", "planks", "spots", "cloth")
        for surface in (floor, wall):  # furniture is what stands out in a room
            gray = surface.colors.mean(axis=1, keepdims=True)
            surface.colors = gray + dice(0.25, 0.75) * (surface.colors - gray)
    elif kind == "boat":
        floor, wall = Material(dice, "water"), Material(dice, "sky")
    else:
        floor = Material(dice, "grass", "grass", "sand", "asphalt", "stone")
        wall = Material(dice, "sky", "sky", "sky", "hedge", "hedge", "brick")
    if wall.kind == "sky":
        wall.colors[1] = 0.85  # clouds
    wall.contrast *= 0.65  # what is far away is out of focus, so that the object stands out
    floor.contrast *= 0.8
    return floor, wall


def expose(dice, albedo, lights, u, v, wall, *, night: bool, bare_sky: bool) -> np.ndarray:
    """Light samples (3, n) like a good photograph; lights: of lamp, sky, highlight, their own; wall: its samples."""
    lit, sky, highlight, glow = lights
    if night:
        lamp = np.array((1.0, dice(0.62, 0.82), dice(0.3, 0.55)))
        fill = np.array((0.5, 0.65, 1.0)) * dice(0.05, 0.12)
        x, y, reach = dice(0.25, 0.75), dice(0.35, 0.8), dice(0.25, 0.4)
        pool = np.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * reach * reach))
        lit *= 1.6 * pool
        highlight *= pool
        if bare_sky:
            lit[wall] = 0.02
    else:
        warmth = dice(-0.12, 0.16)
        lamp = np.array((1.0 + warmth, 1.0, 1.0 - warmth)) * dice(0.85, 1.3)
        fill = np.array((0.92, 0.97, 1.08)) * dice(0.16, 0.38)
        glow *= 0.1
        if bare_sky:  # a sky gives light instead of receiving it; it is paler towards the horizon
            lit[wall], sky[wall] = 0.75 - 0.25 * v[wall], 1.0
    image = albedo * (np.outer(lamp, lit) + np.outer(fill, sky)) + np.outer(0.7 * lamp, highlight)
    image += glow * (0.25 + albedo) * np.array(((1.0,), (0.72,), (0.38,)))
    if night and bare_sky:
        for _ in range(int(dice(0, 6))):  # distant lights, out of focus
            far = np.hypot(u[wall] - dice(), v[wall] - dice(0.4, 1.0)) / dice(0.012, 0.045)
            color = np.array((1.0, dice(0.4, 0.9), dice(0.1, 0.9))) * dice(0.1, 0.35)
            image[:, wall] += np.outer(color, np.clip(3.0 - 3.0 * far, 0.0, 1.0))
    return image * ((dice(0.06, 0.1) if night else dice(0.16, 0.34)) / image.mean())


def draw_pencil(dice, image, bank, code, marks, u, v, size: int) -> np.ndarray:
    """Redraw a lit image with pencil on paper: hatching for tone, wavering contours where surfaces meet; (3, n)."""
    side = math.isqrt(len(u))
    tone = np.sqrt(np.minimum(image.mean(axis=0) * 1.7, 1.0))
    dark = (1.0 - tone) * np.where(code < 2, dice(0.3, 0.75), 1.0)  # the hand spends less on the background
    waver = look_up(bank, 5.0 * u + 7, 5.0 * v), look_up(bank, 5.0 * u, 5.0 * v + 31)
    grain, rate = min(0.9 * size, 110.0), min(0.36 * size, 40.0)  # of the paper; strokes per frame
    tooth = look_up(bank, grain * u, grain * v)
    turn = dice(0.4, 1.2) + dice(0.15, 0.5) * (code % 7 - 3)  # each surface is hatched in a direction of its own
    ink = (0.22 if size >= 64 else 0.45) * dark  # smudged graphite under the strokes
    for cross, start in ((0.0, 0.1), (1.3, 0.5)):
        phase = rate * (u * np.cos(turn + cross) + v * np.sin(turn + cross)) + 0.55 * waver[0] + 0.2 * waver[1]
        stroke = np.cos(2 * math.pi * phase)
        ink += np.clip((dark - start) * 1.3, 0.0, 0.7) * np.clip(0.55 + 1.1 * stroke + 0.5 * tooth, 0.0, 1.1)
    places, width = np.stack(np.divmod(np.arange(len(u)), side)), max(1, round(side / 200))
    for reach in (0.012 * side, -0.8 * 0.012 * side):  # two passes of the hand, never on the same line
        rows, columns = np.clip(places + np.rint(reach * np.stack(waver)).astype(np.int64), 0, side - 1)
        moved = marks[rows * side + columns].reshape(side, side)
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


def sense(rng, dice, image, *, night: bool, sketch: bool) -> np.ndarray:
    """Photon and read noise, then the transfer curve of a camera; (3, S, S) linear light -> (S, S, 3) uint8."""
    shot, read = (0.01, 0.002) if sketch else (dice(0.02, 0.045) if night else dice(0.015, 0.035), 0.004)
    image = np.maximum(image, 0.0)
    image += rng.standard_normal(image.shape) * (shot * np.sqrt(image) + read)
    if not sketch:
        image = np.maximum(image, 0.0)
        image *= (1.0 + 0.35 * image) / (1.0 + image) * 1.35  # a soft shoulder instead of burnt highlights
    # Gamma 2 instead of 2.2: a square root is fast and the same to the last bit on every machine.
    return np.rint(np.sqrt(np.clip(image, 0.0, 1.0)) * 255.0).astype(np.uint8).transpose(1, 2, 0)

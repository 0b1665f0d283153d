"""Solids of generated scenes (balls, tapered rods, tapered blocks), cut by parallel rays, by matrix products.

A local point q = (x, y, z, 1) lies at ``poses[k] @ q`` in the world, and in the solid where ``planes[k] @ q <= 0`` and
``q @ quadrics[k] @ q <= 0``. A block has planes only, a ball a quadric only, a rod both.
"""

import math
from collections.abc import Iterator

import numpy as np

BALL, ROD, BLOCK = range(3)
CAPS = [(0, 1, 0, -1), (0, -1, 0, -1)]


class Solids:
    """All solids of a scene: added object by object in units of their own, then made arrays, then placed."""

    def __init__(self) -> None:
        self.rows, self.n_objects = [], 0

    def _add(self, part, material, shape, pose, taper=(1.0, 1.0, 0.0), rough=0.0) -> None:
        """Add a solid; taper: top over bottom along x and z, shift of the top along x; rough: of leaves and fur."""
        self.rows.append((shape, self.n_objects, part, material, [*pose, (0.0, 0.0, 0.0, 1.0)], taper, rough))

    def ball(self, part, material, center, radii, tilt=0.0, rough=0.0) -> None:
        self._add(part, material, BALL, make_pose(center, radii, tilt), rough=rough)

    def block(self, part, material, center, half, tilt=0.0, top=(1.0, 1.0), shift=0.0) -> None:
        self._add(part, material, BLOCK, make_pose(center, half, tilt), (*top, shift))

    def rod(self, part, material, start, end, radius, end_radius=None, flat=1.0) -> None:
        """Add a round rod; ``flat`` squeezes it along its third axis."""
        y = [(q - p) / 2 for p, q in zip(start, end, strict=True)]  # plain numbers: faster than arrays of three
        a, b, c = (n / math.hypot(*y) for n in y)
        z = (-c * a, -c * b, 1.0 - c * c) if abs(c) < 0.8 else (1.0 - a * a, -a * b, -a * c)
        d, e, f = (n / math.hypot(*z) for n in z)
        x = b * f - c * e, c * d - a * f, a * e - b * d
        columns = zip(x, y, (d, e, f), start, end, strict=True)
        pose = [(i * radius, j, k * radius * flat, (p + q) / 2) for i, j, k, p, q in columns]
        ratio = 1.0 if end_radius is None else end_radius / radius
        self._add(part, material, ROD, pose, (ratio, ratio, 0.0))

    def make_arrays(self) -> None:
        """Make arrays of all solids, sorted by shape."""
        columns = map(list, zip(*sorted(self.rows, key=lambda row: row[0]), strict=True))
        shapes, objects, self.parts, self.materials, poses, tapers, self.rough = columns
        self.shapes, self.objects, self.poses, self.tapers = map(np.array, (shapes, objects, poses, tapers))
        self.planes, self.quadrics = zip(*map(make_bounds, shapes, tapers), strict=True)

    def find_extent(self, directions: np.ndarray, which: np.ndarray | slice = slice(None)):
        """Exact range of ``direction . point`` over each solid; directions (A, 4) -> low and high, both (A, K)."""
        x, y, z, middle = (directions @ self.poses[which]).transpose(2, 1, 0)
        top_x, top_z, shift = self.tapers[which].T
        ball, block = self.shapes[which] == BALL, self.shapes[which] == BLOCK
        disc, width, depth = np.sqrt(x * x + z * z + np.where(ball, y * y, 0.0)), np.abs(x), np.abs(z)
        bottom = np.where(block, width + depth, disc)
        top = np.where(block, top_x * width + top_z * depth, top_x * disc)
        y = np.where(ball, 0.0, y)
        slant = y + shift * x
        return middle + np.minimum(-bottom - y, slant - top), middle + np.maximum(bottom - y, slant + top)

    def cross(self, k: int, q: np.ndarray, ray: np.ndarray, erode: np.ndarray | None = None):
        """Where rays of the world from local points q (4, n) enter and leave solid k, whose outline ``erode`` frays.

        Returns:
            (enter, leave): (n,) ray parameters; enter >= leave or not a number where the ray misses.
        """
        d, planes, quadric = self.inverse[k] @ ray, self.planes[k], self.quadrics[k]
        enter, leave = -np.inf, np.inf
        if planes is not None:
            slope = planes @ d
            slope[np.abs(slope) < 1e-12] = 1e-12
            at = (planes / -slope[:, None]) @ q
            enter, leave = at[slope < 0].max(axis=0, initial=enter), at[slope > 0].min(axis=0, initial=leave)
        if quadric is not None:
            half = quadric @ d
            a = half @ d
            a = 1e-12 if abs(a) < 1e-12 else a
            b = (half / a) @ q
            square = b * b - np.einsum("in,in->n", q, (quadric / a) @ q)
            if erode is not None:
                square[square < erode / a] = -1.0
            root = np.sqrt(square)
            if a > 0:
                return np.maximum(-b - root, enter), np.minimum(root - b, leave)
            # Looking down into a wide cone: inside it from one of the roots to infinity.
            widens = -quadric[1, 3] * d[1] > 0
            return (np.maximum(root - b, enter), leave) if widens else (enter, np.minimum(-b - root, leave))
        return enter, leave

    def sweep(self, low, high, grid: np.ndarray, frame: np.ndarray, ray: np.ndarray, erosion=None) -> Iterator[tuple]:
        """Yield k, its window in the frame and the distances (h, w) at which rays enter and leave solid k.

        Rays start at ``frame @ grid``, grid (3, R, R); extents (2, K) in the frame say which of them may meet it.
        """
        side = grid.shape[1]
        box = np.stack([side - side * high[1], side - side * low[1] + 1, side * low[0], side * high[0] + 1], axis=1)
        for k, (top, bottom, left, end) in enumerate(np.clip(box, 0, side).astype(np.int64).tolist()):
            if bottom > top and end > left:
                here = np.s_[top:bottom, left:end]
                erode = self.rough[k] * erosion[here].ravel() if erosion is not None and self.rough[k] else None
                enter, leave = self.cross(k, self.inverse[k] @ frame @ grid[:, *here].reshape(3, -1), ray, erode)
                yield k, here, enter.reshape(bottom - top, -1), leave.reshape(bottom - top, -1)

    def describe(self, k: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Describe the surface of solid k at points (4, n) of the world.

        Returns:
            (normals, s, t, face): world normals (3, n), surface coordinates (n,) in frame widths, face number (n,).
        """
        q = self.inverse[k] @ points
        wide, high, deep = self.sizes[k][:, None] * q[:3]
        if self.quadrics[k] is None:  # a block: the two coordinates that span the face
            face = (self.planes[k] @ q).argmax(axis=0)
            normals = self.planes[k][face, :3].T
            s, t = np.where(face >> 1 == 0, deep, wide), np.where(face >> 1 == 1, deep, high)
        else:  # longitude and height
            cap = (self.shapes[k] == ROD) & (np.abs(q[1]) > 1.0 - 1e-6)
            normals = np.where(cap, q * ((0,), (1,), (0,), (0,)), self.quadrics[k] @ q)[:3]
            s = np.where(cap, wide, np.arctan2(q[2], q[0]) * ((self.sizes[k, 0] + self.sizes[k, 2]) / 2))
            t, face = np.where(cap, deep, high), 2 * cap
        normals = self.inverse[k, :3, :3].T @ normals
        return normals / np.sqrt((normals * normals).sum(axis=0)), s, t, face


def make_pose(center, half, tilt: float) -> list:
    """Axes of half lengths after a rotation by ``tilt`` (radians) in the x-y plane, and the center."""
    (x, y, z), c, s = half, math.cos(tilt), math.sin(tilt)
    return [(c * x, -s * y, 0.0, center[0]), (s * x, c * y, 0.0, center[1]), (0.0, 0.0, z, center[2])]


def make_bounds(shape: int, taper: tuple) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Planes (P, 4), of a block in the order +x -x +y -y +z -z, and quadric (4, 4) of a solid."""
    x, z, shift = taper
    if shape == BALL:
        return None, np.diag((1.0, 1.0, 1.0, -1.0))
    if shape == ROD:  # x^2 + z^2 = (radius in the middle + growth of the radius with y)^2
        radius = np.array((0.0, (x - 1) / 2, 0.0, (x + 1) / 2))
        return np.array(CAPS, float), np.diag((1.0, 0.0, 1.0, 0.0)) - np.outer(radius, radius)
    right, left = (1, (1 - x - shift) / 2, 0, -(1 + x + shift) / 2), (-1, (1 - x + shift) / 2, 0, -(1 + x - shift) / 2)
    return np.array([right, left, *CAPS, *((0, (1 - z) / 2, sign, -(1 + z) / 2) for sign in (1, -1))]), None

"""Geometry of generated scenes: parallel rays against balls, tapered rods and tapered blocks, by matrix products."""

from __future__ import annotations

import numpy as np

from mia_utils.datasets.scenes.objects import BALL, BLOCK, ROD, Model


class Solids:
    """All solids of a scene as arrays: the local point ``q`` lies at ``axes[k] @ q + centers[k]`` in the world."""

    def __init__(self, models: list[Model]) -> None:
        rows = [(i, *solid) for i, model in enumerate(models) for solid in model.solids]
        self.model, self.parts, self.materials, *arrays, self.rough = map(list, zip(*rows, strict=True))
        self.shapes, self.centers, self.axes, self.tapers = map(np.array, arrays)

    def find_extent(self, directions: np.ndarray, which: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Exact range of ``direction . point`` over each solid; directions (A, 3) -> low and high, both (A, K)."""
        x, y, z = (directions @ self.axes[which]).transpose(2, 1, 0)
        top_x, top_z, shift = self.tapers[which].T
        ball, block = self.shapes[which] == BALL, self.shapes[which] == BLOCK
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
        self.grow[self.shapes != ROD] = 0.0


class Aim:
    """Parallel rays through all solids; what is common to the rays is computed here, for all solids at once.

    Args:
        solids: the frozen solids.
        starts: (K, 3, m) matrices from the m homogeneous coordinates of a ray, the first of them 1, to its origin in
            the coordinates of each solid.
        direction: (3,) common direction in the world.
    """

    def __init__(self, solids: Solids, starts: np.ndarray, direction: np.ndarray) -> None:
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
        whole = (solids.shapes == BALL).astype(float)  # a rod is a ball whose y does not count
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
        """Return where rays (m, n) enter and leave solid k, of whose outline noise takes ``erode`` (n,) in [0, 1] away.

        Returns:
            (enter, leave): (n,) ray parameters; enter >= leave or not a number where the ray misses.
        """
        if self.shapes[k] == BLOCK:
            planes, entering = self.planes[k], self.entering[k]
            return (planes[entering] @ rays).max(axis=0), (planes[~entering] @ rays).min(axis=0)
        x, y, z, radius, b, near, far = self.curves[k] @ rays
        if self.shapes[k] == BALL:
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


def describe(solids: Solids, points: np.ndarray, owner: np.ndarray, bounds: list[int]):
    """Describe the solids at points (3, n) of the world, sorted by their ``owner`` (n,): k has bounds[k]:bounds[k + 1].

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
    rods, blocks = (int(np.searchsorted(solids.shapes[owner], shape)) for shape in (ROD, BLOCK))

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
                here = slice(span.start - blocks, span.stop - blocks)
                beyond[:, here] = solids.normals[k] @ local[:, span] - solids.heights[k]
        face[blocks:] = beyond.argmax(axis=0)
        axis = face[blocks:] >> 1
        s[blocks:] = np.where(axis == 0, deep[blocks:], wide[blocks:])
        t[blocks:] = np.where(axis == 1, deep[blocks:], t[blocks:])
        normals[:, blocks:] = solids.normals[owner[blocks:], face[blocks:]].T
    for k, span in spans:
        normals[:, span] = solids.inverse[k].T @ normals[:, span]
    normals /= np.sqrt((normals * normals).sum(axis=0))
    return normals, s, t, face


def find_windows(low: np.ndarray, high: np.ndarray, origin: np.ndarray, side: int) -> list[list[int]]:
    """Sample ranges [top, bottom, left, right] that cover the extents (2, K), clipped to the frame."""
    low, high = (low + origin[:, None]) * side, (high + origin[:, None]) * side
    box = np.stack([side - high[1], side - low[1] + 1, low[0], high[0] + 1], axis=1)
    return np.clip(box, 0, side).astype(np.int64).tolist()


def cross_windows(aim: Aim, windows, grid: np.ndarray, erosion: np.ndarray | None = None, rough=None):
    """Yield k, its window and the distances (h, w) at which the rays of ``grid`` (3, R, R) enter and leave solid k."""
    for k, (top, bottom, left, end) in enumerate(windows):
        if bottom > top and end > left:
            here = slice(top, bottom), slice(left, end)
            erode = rough[k] * erosion[here].ravel() if rough and rough[k] else None
            enter, leave = aim.cross(k, grid[:, *here].reshape(3, -1), erode)
            yield k, here, enter.reshape(bottom - top, -1), leave.reshape(bottom - top, -1)


def trace(solids: Solids, aim: Aim, windows, grid: np.ndarray, erosion: np.ndarray | None):
    """Find the nearest solid behind every sample; noise ``erosion`` (R, R) in [0, 1] frays leaves and fur.

    Returns:
        (nearest, depth): (R, R) index of the solid, -1 for none, and distance along the ray.
    """
    nearest, depth = np.full(grid.shape[1:], -1, dtype=np.int16), np.full(grid.shape[1:], np.inf)
    for k, here, enter, leave in cross_windows(aim, windows, grid, erosion, solids.rough):
        # The margin decides for the first of two touching surfaces, whatever the last bit of the arithmetic says.
        seen = (enter < leave) & (enter < depth[here] - 1e-9)
        np.copyto(depth[here], enter, where=seen)
        np.copyto(nearest[here], k, where=seen)
    return nearest, depth


def shade_ground(aim: Aim, windows, grid: np.ndarray) -> np.ndarray:
    """Shadow that the solids cast on the ground plane, True where the light is blocked; (R, R)."""
    shadow = np.zeros(grid.shape[1:], dtype=bool)
    for _, here, enter, leave in cross_windows(aim, windows, grid):
        shadow[here] |= (enter < leave) & (leave > 1e-6)
    return shadow


def shade_solids(aim: Aim, casters: list[int], owner: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether one of the casters stands between each point (4, n) of the objects and the light; (n,) bool."""
    blocked = np.zeros(len(owner), dtype=bool)
    for k in casters:
        enter, leave = aim.cross(k, points)
        blocked |= (enter < leave) & (leave > 0.012) & (owner != k)
    return blocked

"""One drawing for everything that is not a plot: images and heat maps in a grid."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from mia_utils.plots.style import FULL, INK, MEMBER_COLOR, NONMEMBER_COLOR, STYLE, Drawn, finish, make_figure

_CLASS_COLORS = (255 * np.array(mpl.colormaps["tab20"].colors)).round().astype(np.uint8)


def paint_labels(labels: Any, *, void: int = 255) -> np.ndarray:
    """Color a label map (H, W) as an image (H, W, 3) uint8; ignored pixels are light gray."""
    labels = np.asarray(labels)
    painted = _CLASS_COLORS[np.where(labels == void, 0, labels) % len(_CLASS_COLORS)]
    painted[labels == void] = 225
    return painted


@mpl.rc_context(STYLE)
def image_grid(
    cells: Sequence[Sequence[Any]], *, columns: Sequence[str] = (), rows: Sequence[str] = (),
    members: Sequence[Sequence[bool | None]] | None = None, boxes: Sequence[Sequence[Any]] | None = None,
    captions: Sequence[Sequence[str]] | None = None, arrows: Sequence[str] = (), norm: Any = None,
    cell: float | None = None, **named: Any,
) -> Drawn:  # fmt: skip
    """Draw a grid of images and maps; beside it stand shape, minimum and maximum of each.

    Args:
        cells: (R, C) of images (H, W, 3) uint8 or float in [0, 1], heat maps (H, W), or None.
        columns, rows: names above and beside the grid.
        members: (R, C) of True (member's color), False (non-member's) or None around a cell.
        boxes: (R, C) of (x0, y0, x1, y1) in pixels of the image, or None.
        captions: (R, C) of words under the cells.
        arrows: words over the arrows between the columns of a pipeline, one fewer than the columns.
        norm: one color scale for all heat maps (matplotlib); None: from all of them together.
        cell: side of a cell in inches; None: what fits the width.
        named: ``title, name, paper, expect, caption``.
    """
    n_rows, n_cols = len(cells), max(map(len, cells))
    beside, spread = 0.9 if rows else 0.1, 1.5 if arrows else 1.05
    side = cell or min(1.25, (FULL - beside) / n_cols / spread)
    wrap = lambda text, chars: textwrap.fill(text or "", int(chars), break_on_hyphens=False)  # noqa: E731
    captions = [[wrap(c, side * 16) for c in row] for row in captions or [[""] * n_cols] * n_rows]
    below = sum(0.14 * max(c.count("\n") + bool(c) for c in row) for row in captions)
    width = max(3.6, min(FULL, n_cols * side * spread + beside))
    cells = [[None if content is None else np.asarray(content) for content in row] for row in cells]
    drawn = [content for row in cells for content in row if content is not None]
    high = max(c.shape[0] / c.shape[1] for c in drawn) if len(drawn) == sum(map(len, cells)) else 1.0
    fig, axes = make_figure(n_rows, n_cols, width=width, height=n_rows * (side * high + 0.05) + below + 0.5)
    if norm is None and (maps := [content for content in drawn if content.ndim == 2]):
        norm = mpl.colors.Normalize(min(m.min() for m in maps), max(m.max() for m in maps))
    records = []
    for (r, c), ax in np.ndenumerate(axes):
        content = cells[r][c] if c < len(cells[r]) else None
        _draw(ax, content, norm)
        member = members[r][c] if members else None
        if member is not None:
            color, dash = (MEMBER_COLOR, "-") if member else (NONMEMBER_COLOR, (0, (4, 1.5)))
            ax.spines[:].set(visible=True, color=color, linewidth=2.0, linestyle=dash)
        if boxes and boxes[r][c] is not None:
            x0, y0, x1, y1 = boxes[r][c]
            at = (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0
            ax.add_patch(Rectangle(*at, fill=False, color="#FFD400", linewidth=1.6))
        if captions[r][c]:
            ax.set_xlabel(captions[r][c], fontsize=6.5, color=INK, labelpad=2)
        if r == 0 and c < len(columns):
            ax.set_title(wrap(columns[c], side * 17), fontsize=7, loc="center")
        if c == 0 and r < len(rows):
            ax.set_ylabel(wrap(rows[r], 14), fontsize=7, rotation=0, ha="right", va="center")
        if content is not None:
            head = {"row": rows[r] if r < len(rows) else r, "column": columns[c] if c < len(columns) else c}
            ends = {"minimum": float(content.min()), "maximum": float(content.max())}
            records.append(head | {"shape": "x".join(map(str, content.shape)), **ends})
    if arrows:
        fig.get_layout_engine().set(wspace=0.55)
    look = dict(arrowstyle="-|>", mutation_scale=9, linewidth=1.0, color=INK)
    for left, ax, word in zip(axes[0], axes[0, 1:], arrows, strict=False):
        gap = lambda _, a=left.bbox, b=ax.bbox: Bbox.from_extents(a.x1, b.y0, b.x0, b.y1)  # noqa: E731
        at = dict(xycoords=gap, annotation_clip=False, in_layout=False)
        ax.annotate("", (0.88, 0.5), (0.12, 0.5), arrowprops=look, **at)
        ax.annotate(wrap(word, side * 8), (0.5, 0.53), ha="center", fontsize=6.5, color=INK, **at)
    return finish(fig, pd.DataFrame(records), **named)


def _draw(ax: Axes, content: np.ndarray | None, norm: Any) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if content is None:
        ax.set_box_aspect(1)
    elif content.ndim == 2:
        ax.imshow(np.asarray(content, float), norm=norm, cmap="magma")
    else:
        ax.imshow(content if content.dtype == np.uint8 else np.uint8(255 * np.clip(content, 0, 1)))

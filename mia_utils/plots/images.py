"""One drawing for everything that is not a plot: images, heat maps, vectors and texts in a grid."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from mia_utils.plots.style import FULL, INK, MEMBER_COLOR, NONMEMBER_COLOR, STYLE, Drawn, finish, make_figure

_CLASS_COLORS = np.array(
    [[int(mpl.colors.to_hex(c)[i : i + 2], 16) for i in (1, 3, 5)] for c in mpl.colormaps["tab20"].colors], np.uint8
)


def paint_labels(labels: Any, *, void: int = 255) -> np.ndarray:
    """Color a label map (H, W) as an image (H, W, 3) uint8; ignored pixels are light gray."""
    labels = np.asarray(labels)
    painted = _CLASS_COLORS[np.where(labels == void, 0, labels) % len(_CLASS_COLORS)]
    painted[labels == void] = 225
    return painted


def image_grid(
    cells: Sequence[Sequence[Any]], *, title: str | Callable, columns: Sequence[str] = (), rows: Sequence[str] = (),
    members: Sequence[Sequence[bool | None]] | None = None, boxes: Sequence[Sequence[Any]] | None = None,
    captions: Sequence[Sequence[str]] | None = None, arrows: Sequence[str] = (), norm: Any = None, cmap: str = "magma",
    cell: float | None = None, table: pd.DataFrame | None = None, **named: Any,
) -> Drawn:  # fmt: skip
    """Draw a grid of images and maps.

    Args:
        cells: (R, C) of images (H, W, 3) uint8 or float in [0, 1], heat maps (H, W), vectors (n,) drawn as bars, texts,
            lists of images (drawn as a sheet), or None.
        title: the finding, or a rule that makes it from ``table``.
        columns, rows: names above and beside the grid.
        members: (R, C) of True (member's color), False (non-member's) or None around a cell.
        boxes: (R, C) of (x0, y0, x1, y1) in pixels of the image, or None.
        captions: (R, C) of words under the cells.
        arrows: words over the arrows between the columns of a pipeline, one fewer than the columns.
        norm: one color scale for all heat maps (matplotlib); None: from all of them together.
        cmap: colors of the heat maps.
        cell: side of a cell in inches; None: what fits the width.
        table: the numbers behind the picture; None: shape, minimum and maximum of each cell.
        named: ``name, paper, expect, caption`` of :func:`mia_utils.plots.finish`.
    """
    n_rows, n_cols = len(cells), max(map(len, cells))
    side = cell or min(1.25, (FULL - (0.9 if rows else 0.1)) / n_cols / (1.5 if arrows else 1.05))
    below = 0.14 * max((len(textwrap.wrap(c or "", int(side * 16))) for r in captions or [] for c in r), default=0)
    width = min(FULL, n_cols * side * (1.5 if arrows else 1.05) + (0.9 if rows else 0.1))
    fig, axes = make_figure(n_rows, n_cols, width=max(width, 3.6), height=n_rows * (side + below + 0.05) + 0.75)
    heats = [np.asarray(c, float) for row in cells for c in row if _kind(c) == "heat"]
    if norm is None and heats:
        norm = mpl.colors.Normalize(min(h.min() for h in heats), max(h.max() for h in heats))
    records = []
    with mpl.rc_context(STYLE):
        for r, row in enumerate(cells):
            for c in range(n_cols):
                ax, content = axes[r, c], row[c] if c < len(row) else None
                _draw(ax, content, norm, cmap)
                member = members[r][c] if members else None
                if member is not None:
                    color = MEMBER_COLOR if member else NONMEMBER_COLOR
                    for spine in ax.spines.values():
                        spine.set(visible=True, color=color, linewidth=2.0, linestyle="-" if member else (0, (4, 1.5)))
                if boxes and boxes[r][c] is not None:
                    x0, y0, x1, y1 = boxes[r][c]
                    ax.add_patch(
                        Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color="#FFD400", linewidth=1.6)
                    )
                if captions and captions[r][c]:
                    text = "\n".join(textwrap.wrap(captions[r][c], int(side * 16)))
                    ax.set_xlabel(text, fontsize=6.5, color=INK, labelpad=2)
                if r == 0 and c < len(columns):
                    ax.set_title("\n".join(textwrap.wrap(columns[c], int(side * 14))), fontsize=7, loc="center")
                if c == 0 and r < len(rows):
                    ax.set_ylabel(
                        "\n".join(textwrap.wrap(rows[r], 14)), fontsize=7, rotation=0, ha="right", va="center"
                    )
                if isinstance(content, np.ndarray):
                    head = {"row": rows[r] if r < len(rows) else r, "column": columns[c] if c < len(columns) else c}
                    records.append(
                        head
                        | {
                            "shape": "x".join(map(str, content.shape)),
                            "minimum": float(content.min()),
                            "maximum": float(content.max()),
                        }
                    )
        if arrows:
            fig.draw_without_rendering()
            for left, right, word in zip(axes[0], axes[0][1:], arrows, strict=False):
                _draw_arrow(fig, left, right, word)
    table = pd.DataFrame(records) if table is None else table
    return finish(fig, table, title=title(table) if callable(title) else title, **named)


def _kind(content: Any) -> str:
    if content is None or isinstance(content, str):
        return "text"
    if isinstance(content, list | tuple):
        return "sheet"
    return {1: "bars", 2: "heat"}.get(np.ndim(content), "image")


def _draw(ax: Axes, content: Any, norm: Any, cmap: str) -> None:
    kind = _kind(content)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(kind in ("bars", "text") and content is not None)
    if kind == "text":
        text = "\n".join(textwrap.wrap(content or "", 12))
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=9, fontweight="bold")
        ax.set_box_aspect(1)
    elif kind == "bars":
        ax.bar(np.arange(len(content)), np.asarray(content, float), width=1.0, color="#4D4D4D")
        ax.set_box_aspect(1)
    elif kind == "heat":
        ax.imshow(np.asarray(content, float), norm=norm, cmap=cmap)
    elif kind == "sheet":
        ax.imshow(_make_sheet(content))
    else:
        ax.imshow(_as_image(content))


def _as_image(image: Any) -> np.ndarray:
    image = np.asarray(image)
    return image if image.dtype == np.uint8 else np.clip(image, 0, 1)


def _make_sheet(images: Sequence[Any]) -> np.ndarray:
    images = [_as_image(image) for image in images[:9]]
    n, (height, width) = int(np.ceil(np.sqrt(len(images)))), images[0].shape[:2]
    white = 255 if images[0].dtype == np.uint8 else 1.0
    sheet = np.full((n * (height + 1) - 1, n * (width + 1) - 1, 3), white, images[0].dtype)
    for i, image in enumerate(images):
        y, x = i // n * (height + 1), i % n * (width + 1)
        sheet[y : y + height, x : x + width] = image
    return sheet


def _draw_arrow(fig: Any, left: Axes, right: Axes, word: str) -> None:
    start, end, y = left.get_position().x1, right.get_position().x0, left.get_position()
    y = (y.y0 + y.y1) / 2
    pad = (end - start) * 0.15
    style = dict(arrowstyle="-|>", mutation_scale=9, linewidth=1.0, color=INK)
    arrow = FancyArrowPatch((start + pad, y), (end - pad, y), transform=fig.transFigure, **style)
    arrow.set_in_layout(False)
    fig.add_artist(arrow)
    text = fig.text((start + end) / 2, y + 0.01, word, ha="center", va="bottom", fontsize=6.5, color=INK)
    text.set_in_layout(False)

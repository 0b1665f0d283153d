"""Drawing: six kinds of plot over the results table, one grid of images, one look."""

from mia_utils.plots.images import image_grid, paint_labels
from mia_utils.plots.kinds import dots, matrix, plane, sweep
from mia_utils.plots.scores import histogram, roc
from mia_utils.plots.style import (
    DEFENSES,
    MEMBER_COLOR,
    NONMEMBER_COLOR,
    Drawn,
    color_of,
    finish,
    format_interval,
    format_value,
    label_of,
    make_figure,
    name_targets,
    use,
)

__all__ = [
    "DEFENSES", "MEMBER_COLOR", "NONMEMBER_COLOR", "Drawn", "color_of", "dots", "finish", "format_interval",
    "format_value", "histogram", "image_grid", "label_of", "make_figure", "matrix", "name_targets", "paint_labels",
    "plane", "roc", "sweep", "use",
]  # fmt: skip

"""Drawing: six kinds of plot over the results table, one grid of images, one look."""
# ruff: noqa: F401

from mia_utils.plots.images import image_grid, paint_labels
from mia_utils.plots.kinds import dots, matrix, plane, sweep
from mia_utils.plots.scores import histogram, roc
from mia_utils.plots.style import DEFENSES, Drawn, color_of, finish, format_interval, format_value, label_of

from mia_utils.plots.style import make_figure, name_targets, use  # isort: skip

"""The registry of figures that are redrawn from saved scores alone: no model, no pixel, no training.

A figure is a function ``draw(lab) -> (figure, table)`` under a name; ``draw(name, lab)`` writes
``figures/<profile>/<name>.png`` and ``.csv``, ``draw_all(lab)`` redraws everything (``./run_all.sh replay``). Titles
are computed from the numbers, so that a changed result changes its sentence.

``base`` holds the registry, the words and the panels that figures share; one file per paper holds its figures.

Where results come from: ``lab.results(figure=name)``, the attack results that a notebook evaluated for that figure
(``meta["figures"]`` names it). Results that differ only in seed are one entry: mean over seeds, bootstrap over seeds
and then images (``metrics.combine``); each seed stays visible as a dot or a thin line.
"""

from mia_utils.figures import defenses, encodermi, mim, overview, partcrop, segmentation
from mia_utils.figures.base import (
    FIGURES,
    Entry,
    Figure,
    NotAvailable,
    combine,
    digest,
    draw,
    draw_all,
    figure,
    group,
    make_rows,
    split_seed,
)
from mia_utils.figures.overview import summarize

__all__ = [
    "FIGURES",
    "Entry",
    "Figure",
    "NotAvailable",
    "combine",
    "digest",
    "draw",
    "draw_all",
    "figure",
    "group",
    "make_rows",
    "split_seed",
    "summarize",
]

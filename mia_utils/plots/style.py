"""Colors, names and the way a figure is written: one look for the whole book."""

import base64
import html
import io
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mia_utils import paths
from mia_utils.protocol.intervals import format_interval, format_value  # noqa: F401 - with the words of the book

FULL = 7.0  # inches: two columns of a paper
TITLE_CHARS = 12.6  # bold 9 pt letters to the inch
WATERMARK = "code check, not a result"
MEMBER_COLOR, NONMEMBER_COLOR = "#D81B60", "#1E9A8E"  # apart in lightness and hue for every color vision deficiency
INK = "#222222"

ATTACKS = {  # one color per attack in the whole book; a family shares a hue and differs in lightness
    "member": ("members", MEMBER_COLOR), "non-member": ("non-members", NONMEMBER_COLOR),  # two sides drawn like attacks
    "partcrop": ("PartCrop", "#0072B2"), "partcrop-v2": ("PartCrop-v2", "#56B4E9"),
    "token-spread": ("Token spread", "#00B0F0"), "token-spread-lr": ("Token sizes", "#5B8DB8"),
    "gradient-norm": ("Gradient norm (white box)", "#7A7A3B"),
    "encodermi-v": ("EncoderMI-V", "#D55E00"), "encodermi-s": ("EncoderMI-S", "#E69F00"),
    "encodermi-t": ("EncoderMI-T", "#6B2E00"), "lpla": ("LpLA", "#B3A500"), "mim": ("MIM attack", "#009E73"),
    "seg-loss-map": ("Loss map", "#7B2D8B"), "seg-concat": ("Concatenation", "#CC79A7"),
    "seg-full-image": ("Full image", "#2D0A47"), "seg-global-loss": ("Global loss", "#9A86D0"),
    "seg-label-only": ("Label only", "#9A6A00"), "seg-type1": ("Prediction only", "#C79A45"),
}  # fmt: skip
_SPARE = ("#882255", "#44AA99", "#999933", "#332288", "#117733", "#AA4499", "#5599BB", "#CC6677")
CONTROLS = {  # label, color, marker, line
    "no-model": ("no model", "#222222", "x", (0, (4, 2))),
    "untrained": ("untrained model", "#666666", "+", (0, (4, 1.5, 1, 1.5))),
    "permuted": ("permuted labels", "#8A8A8A", "1", (0, (1, 1.5))),
}
METHODS = {
    "mae": ("MAE", "o"), "simmim": ("SimMIM", "s"), "dino": ("DINO", "^"), "moco": ("MoCo v3", "D"),
    "moco-v1": ("MoCo v1", "8"), "moco-v2": ("MoCo v2", "d"), "simclr": ("SimCLR", "v"),
    "supervised": ("supervised", "P"), "unet": ("U-Net", "h"), "upernet": ("UPerNet", "H"),
    "pspnet": ("PSPNet", "X"), "deeplabv3plus": ("DeepLabV3+", "p"),
}  # fmt: skip
DEFENSES = {
    "none": ("undefended", "#111111"), "early-stopping": ("Early stopping", "#009E73"),
    "scsr": ("Crop range", "#0072B2"), "dp-sgd": ("DP-SGD", "#D55E00"), "weight-decay": ("Weight decay", "#6B2E00"),
    "dropout": ("Dropout", "#882255"), "drop-path": ("Drop path", "#B06CA8"),
    "label-smoothing": ("Label smoothing", "#3F7FBF"), "crop-mixup": ("Crops, mix-up", "#117733"),
    "distillation": ("Distillation", "#8C6D1F"), "min-max": ("Min-max", "#2F8F8F"), "noise": ("Noise", "#7B2D8B"),
    "rounding": ("Rounding", "#56A0C8"), "top-k": ("Top k", "#A07800"), "temperature": ("Temperature", "#5B5BD6"),
    "gauss": ("Gauss", "#C4408A"), "argmax": ("Argmax", "#332288"),
}  # fmt: skip
WORDS = {  # what columns hold, as a reader calls it
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny_imagenet": "Tiny-ImageNet", "camvid": "CamVid",
    "scenes-night": "night scenes", "scenes-sketch": "sketched scenes", "stl10": "STL-10", "cityscapes": "Cityscapes",
    "cls": "class token", "mean": "mean of tokens", "none": "whole images", "flip": "flips", "crop": "strong crops",
    "crop-weak": "weak crops", "simclr": "strong crops and color", "simclr-weak": "weak crops and color",
    "dino": "DINO's views", "controlled": "one view for all", "released-view": "released view",
    "released-split": "released split", "released-selection": "epoch chosen on the evaluation set",
    "frame-thirds": "frames of one block on both sides", "iid-frames": "frames one by one", "uniform": "uniform energy",
    "gaussian": "Gaussian energy", "both": "both energies", "own": "the target's decoder",
    "attacker": "the attacker's decoder", "partial": "knows some members", "parts": "own parts",
    "random": "random vectors", "other-image": "another image's tokens", "vit_nano_patch8_32": "small ViT",
    "vit_micro_patch8_32": "ViT", "vit_micro_patch8_64": "ViT", "vit_small_patch8_32": "ViT",
    "vit_small_patch8_64": "ViT", "resnet_thin_32": "ResNet", "resnet18_32": "ResNet-18",
    "swin_thin_32": "Swin",
}  # fmt: skip

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8, "axes.titlelocation": "left",
    "axes.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.axisbelow": True, "axes.grid": False, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
    "legend.frameon": False, "lines.linewidth": 1.4, "lines.markersize": 4.5, "figure.titlesize": 9,
    "figure.titleweight": "bold", "figure.facecolor": "white", "figure.dpi": 120, "savefig.dpi": 200,
    "image.interpolation": "nearest", "image.cmap": "magma", "grid.color": "#E4E4E4", "grid.linewidth": 0.5,
}  # fmt: skip

_book = ""  # profile whose figures folder `name=` writes to


def use(profile: str) -> None:
    """Write the figures of this notebook to ``figures/<profile>/``."""
    global _book
    _book = profile


def color_of(attack: str, control: str = "") -> str:
    """Return the color of an attack, or the gray of a control; a newly registered attack keeps one spare color."""
    for name in (control, attack):
        if name in CONTROLS:
            return CONTROLS[name][1]
    # crc32, not hash(): the same name must give the same color in every process
    return ATTACKS[attack][1] if attack in ATTACKS else _SPARE[zlib.crc32(attack.encode()) % len(_SPARE)]


def marker_of(method: str, control: str = "") -> str:
    """Return the marker of a training method, or of a control."""
    return CONTROLS[control][2] if control in CONTROLS else METHODS.get(str(method), ("", "o"))[1]


def label_of(name: Any) -> str:
    """Return how a name of the code is printed."""
    known = next((names[name][0] for names in (METHODS, ATTACKS, CONTROLS, DEFENSES) if name in names), None)
    return known or WORDS.get(name, str(name))


def name_targets(table: pd.DataFrame) -> pd.Series:
    """Name the target of each row: its method, then what tells it from other targets of that method in the table."""
    names = table["method"].map(label_of)
    units = {"arch": "", "dataset": "", "augmentation": "", "n_train": " images", "epochs": " epochs"}
    for column, unit in units.items():
        same = table.groupby(names)
        several = (same["target"].transform("nunique") > 1) & (same[column].transform("nunique") > 1)
        said = table[column].map(lambda v: WORDS.get(v, v) if isinstance(v, str) else f"{v:,.0f}") + unit
        names = names.where(~several, names + ", " + said)
    return names


@mpl.rc_context(STYLE)
def make_figure(rows: int = 1, cols: int = 1, *, width: float = FULL, height: float | None = None, **options: Any):
    """Return a figure in the book's style and its (rows, cols) axes; sizes in inches."""
    fig = Figure(figsize=(width, height or 2.4 * rows), layout="constrained")
    return fig, fig.subplots(rows, cols, squeeze=False, **options)


def draw_chance(ax: Axes, *, axis: str = "y", value: float = 0.5) -> None:
    """Draw the line of pure chance."""
    line = ax.axhline if axis == "y" else ax.axvline
    line(value, color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)), zorder=0.5)


@dataclass
class Drawn:
    """A figure as a notebook shows it: the picture with its title as alternative text, below it what the run says."""

    title: str
    table: pd.DataFrame  # the drawn numbers
    png: bytes
    here: str = ""  # the generated line, empty where nothing was expected
    path: Path | None = None  # None for a figure without a name

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        width = min(900, int.from_bytes(self.png[16:20], "big") * 110 // 200)  # PNG header: width in pixels
        source = f"data:image/png;base64,{base64.b64encode(self.png).decode()}"
        shown = f'<img alt="{html.escape(self.title)}" width="{width}" src="{source}">'
        here = f"<p><em>Here:</em> {html.escape(self.here)}</p>" if self.here else ""
        name = self.path.name if self.path else ""
        text = f"![{self.title}](../figures/{_book}/{name})" + (f"\n\n*Here:* {self.here}" if self.here else "")
        return {"text/html": shown + here, "text/markdown": text, "text/plain": self.title}


@mpl.rc_context(STYLE)
def finish(
    fig: Figure, table: pd.DataFrame, *, title: str | Callable, rows: pd.DataFrame | None = None, name: str = "",
    paper: str = "", expect: Any = None, caption: str = "", judged: pd.DataFrame | None = None,
) -> Drawn:  # fmt: skip
    """Set the title, write PNG and CSV where the figure has a name, and return what the notebook shows.

    Nothing written holds a date, version or host: an unchanged result gives unchanged bytes. Title, paper and caption
    travel inside the PNG (text chunks), where the page reads them. Figures of profile ``smoke`` carry a watermark.

    Args:
        table: the drawn numbers, which ``expect`` (of ``say``) judges, or ``judged`` where they are curves.
        title: the finding, or a rule of ``say`` that makes it from ``rows``, what was queried (None: ``table``).
        name: file stem; empty: nothing is written.
        paper: item of a paper that the figure regenerates, as ``paper: item``.
    """
    title = title(table if rows is None else rows) if callable(title) else title
    width = fig.get_size_inches()[0]
    lines = textwrap.wrap(title, int(width * TITLE_CHARS))
    fig.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9, fontweight="bold")
    here = expect.answer(table if judged is None else judged) if expect is not None else ""
    texts = {"Title": title, "Paper": paper, "Caption": caption, "Here": here}
    if _book == "smoke":
        mark = dict(ha="center", va="center", rotation=18, color="#B00020", alpha=0.28, fontweight="bold", zorder=1000)
        fig.text(0.5, 0.5, WATERMARK, fontsize=min(26, 3.6 * width), **mark).set_in_layout(False)
    buffer, fig.dpi = io.BytesIO(), STYLE["savefig.dpi"]
    # savefig draws twice, once for the layout; this draws once and gives the same pixels
    FigureCanvasAgg(fig).print_png(buffer, metadata={"Software": None} | {k: v for k, v in texts.items() if v})
    drawn = Drawn(title, table, buffer.getvalue(), here)
    if name and _book:
        drawn.path = paths.get_figures_dir(_book) / f"{name}.png"
        numbers = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        paths.write_atomic(drawn.path.with_suffix(".csv"), numbers)
        paths.write_atomic(drawn.path, drawn.png)
    return drawn

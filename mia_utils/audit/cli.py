"""The command line ``mia-audit``; arguments are checked before torch is imported."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

EXITS = "exit codes: 0 nothing found, 2 bad input, 3 leak shown, 4 invalid, 5 inconclusive"
CODES = {"leak": 3, "invalid": 4, "inconclusive": 5}


def parse_pairs(texts: Sequence[str]) -> dict[str, object]:
    """``["n_views=20", "measure=pearson"]`` -> a dict with Python values."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[key] = value
    return pairs


def parse_size(text: str) -> int | tuple[int, int]:
    """``224`` or ``240x320`` (height x width)."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected pixels or HEIGHTxWIDTH, got {text!r}")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def parse_seconds(text: str) -> float:
    """``90s``, ``10min`` or ``1h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected for example 90s, 10min or 1h, got {text!r}")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def parse_names(text: str) -> list[str]:
    """``auto`` -> [], else names between commas."""
    return [] if text == "auto" else [name.strip() for name in text.split(",") if name.strip()]


def parse_level(text: str) -> float:
    """A number between 0 and 1."""
    try:
        if 0 < float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a level between 0 and 1, got {text!r}")


def parse_colors(text: str) -> tuple[float, ...]:
    """``.5`` or ``.485,.456,.406``: one number per channel."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3):
        raise argparse.ArgumentTypeError(f"expected one number or three, got {text!r}")
    return tuple(values * 3 if len(values) == 1 else values)


class Parser(argparse.ArgumentParser):
    """Bad arguments are one line, exit code 2."""

    def error(self, message: str):
        """Print one line and exit."""
        self.exit(2, f"error: {message} ({self.prog} --help)\n")


def make_parser() -> Parser:
    """Describe the arguments of an audit."""
    about = "Was MODEL trained on the SUSPECTED images? Also: mia-audit views | outputs | canaries (--help each)."
    parser = Parser(prog="mia-audit", description=about, epilog=EXITS)
    add = parser.add_argument
    add("model", help="folder or file of weights, timm:NAME, or FILE.py:function that returns what wrap() makes")
    add("suspected", help="folder of images whose use is in question (for segmenters with images and masks in it)")
    add("reference", help="folder of images that were surely not used and are otherwise alike")
    add("--task", choices=("auto", "encoder", "segmenter"), default="auto")
    add("--arch", help="backbone, where the weights do not tell")
    add("--arch-args", action="append", default=[], metavar="K=V", help="more of the backbone: num_heads=12")
    add("--mean", type=parse_colors, help="normalization: one number or three, between commas")
    add("--std", type=parse_colors)
    add("--weights", default=None, help="auto, ema, teacher, student, or a key of the file")
    add("--pooling", choices=("cls", "mean"))
    add("--size", type=parse_size, help="pixels, or HEIGHTxWIDTH (default: the model's)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--attack", type=parse_names, default=[], metavar="NAMES", help="auto (all that fit), or names")
    add("--augmentation", type=parse_names, default=[], metavar="NAMES", help="of the queries: auto, or names")
    add("--set", action="append", default=[], metavar="K=V", dest="settings", help="parameters of attacks: n_views=20")
    add("--groups", metavar="RULE", help="images that belong together (video, patients): subfolder or prefix:REGEX")
    add("--level", type=parse_level, default=0.01, help="p-values up to this count (default .01)")
    add("--seed", type=int, default=0)
    add("--budget", type=parse_seconds, help="time for all attacks: 90s, 10min, 1h; the dearest are left out")
    add("--out", type=Path, help="write report.html, audit.json and scores.csv here")
    add("--json", action="store_true", help="print audit.json instead of text")
    add("--fail-on", default="leak,invalid,inconclusive", help="findings with an exit code above 0 (default: all)")
    add("--check", action="store_true", help="open everything, say what was understood and how long it takes, stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else [str(part) for part in argv]
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    try:
        options["settings"], options["arch_args"] = map(parse_pairs, (options["settings"], options["arch_args"]))
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    fail_on = parse_names(options.pop("fail_on"))
    if wrong := set(fail_on) - set(CODES) - {"never"}:
        parser.error(f"expected --fail-on among {', '.join(CODES)} or never, got {', '.join(sorted(wrong))}")
    for name in ("suspected", "reference"):
        if not Path(options[name].removeprefix("folder:")).expanduser().is_dir():
            parser.error(f"{name}: expected a folder of images, got {options[name]}, which is no folder")
    out, as_json, check = (options.pop(key) for key in ("out", "json", "check"))
    options["arch_args"] = options["arch_args"] or None
    level, seed = options.pop("level"), options.pop("seed")

    from mia_utils.audit import examine  # torch takes seconds; the checks above answer within half of one

    try:
        if check:
            print(examine.plan(**options, measure=True))
            return 0
        command = shlex.join(["mia-audit", *argv])
        report = examine.run(**options, level=level, seed=seed, command=command)
        print(json.dumps(report.to_dict(), indent=1) if as_json else report)
        if out is not None:
            print(f"written: {report.save(out) / 'report.html'}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return report.exit_code if report.exit_code in {CODES.get(name) for name in fail_on} else 0

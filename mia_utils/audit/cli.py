"""The command line ``mia-audit``; arguments are checked before torch is imported."""

import argparse
import ast
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXITS = "exit codes: 0 nothing found, 2 bad input, 3 leak shown, 4 invalid, 5 inconclusive"
CODES = {"leak": 3, "invalid": 4, "inconclusive": 5}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"


def make_type(expected: str, pattern: str, convert: Callable[..., Any]) -> Callable[[str], Any]:
    """An argument's type: ``convert`` of the groups of a text that fits a pattern (without groups: of the text)."""

    def parse(text: str) -> Any:
        if (match := re.fullmatch(pattern, text, flags=re.ASCII)) is None:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return convert(*(match.groups() or [text]))

    return parse


def to_pair(key: str, value: str) -> tuple[str, Any]:
    """A key and a Python literal, else the text itself."""
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def to_names(text: str) -> list[str]:
    """``auto`` -> [], else names between commas."""
    return [] if text == "auto" else [name.strip() for name in text.split(",") if name.strip()]


PAIRS = dict(type=make_type("KEY=VALUE", r"([a-zA-Z_]\w*)=(.*)", to_pair), action="append", default=[], metavar="K=V")
COLORS = make_type(
    "one number or three between commas", rf"{NUMBER}(?:,{NUMBER},{NUMBER})?",
    lambda text: tuple(map(float, text.split(","))) * (3 if "," not in text else 1),
)  # fmt: skip
SIZE = make_type(
    "pixels or HEIGHTxWIDTH", r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?",
    lambda height, width: int(height) if width is None else (int(height), int(width)),
)  # fmt: skip
TIME = make_type(
    "for example 90s, 10min or 1h", r"(0*[1-9]\d*(?:\.\d+)?|0*\.\d*[1-9]\d*)(s|min|h)",
    lambda number, unit: float(number) * {"s": 1, "min": 60, "h": 3600}[unit],
)  # fmt: skip
COUNT = make_type("a number of at least 1 (and at most 99999)", r"0*[1-9]\d{0,4}", int)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "model": dict(help="folder or file of weights, timm:NAME, or FILE.py:function that returns what wrap() makes"),
    "features": dict(help="npz with names and features, or CSV of name and numbers: what came back for the views"),
    "folder": dict(help="folder of images, or of canaries"),
    "suspected": dict(help="folder of images whose use is in question (segmenters: with images and masks in it)"),
    "reference": dict(help="folder of images that were surely not used and are otherwise alike"),
    "--task": dict(choices=("auto", "encoder", "segmenter"), default="auto"),
    "--arch": dict(help="backbone, where the weights do not tell"),
    "--arch-args": PAIRS | dict(help="more of the backbone: num_heads=12"),
    "--mean": dict(type=COLORS, help="normalization: one number or three, between commas"),
    "--std": dict(type=COLORS),
    "--weights": dict(help="auto, ema, teacher, student, or a key of the file"),
    "--pooling": dict(choices=("cls", "mean")),
    "--size": dict(type=SIZE, help="pixels, or HEIGHTxWIDTH (default: the model's; of views 224)"),
    "--void": dict(type=make_type("an id of pixels", r"\d{1,3}", int), help="id of unlabeled pixels in masks"),
    "--device": dict(help="cpu, cuda, cuda:1 (default: a GPU where there is one)"),
    "--attack": dict(type=to_names, default=[], metavar="NAMES", help="auto (the battery), or names"),
    "--augmentation": dict(type=to_names, default=[], metavar="NAMES", help="of the queries: auto, or names"),
    "--reference-model": dict(
        dest="reference_models", action="append", default=[], metavar="MODEL",
        help="of the same recipe and age, trained on neither folder: calibrates scores (may be repeated)",
    ),
    "--set": PAIRS | dict(dest="settings", help="parameters of attacks: n_views=20"),
    "--groups": dict(metavar="RULE", help="what belongs together (video, patient): subfolder or prefix:REGEX"),
    "--level": dict(
        type=make_type("a level between 0 and 1", r"0?\.\d*[1-9]\d*|[1-9]\d*e-\d+", float), default=0.01,
        help="p-values up to this count (default .01)",
    ),
    "--seed": dict(type=int),
    "--budget": dict(type=TIME, help="time for all attacks: 90s, 10min, 1h; the dearest are left out"),
    "--n": dict(type=COUNT, default=10, help="views of an image"),
    "-k": dict(type=COUNT, default=20, help="twins of an image, of which one is published"),
    "--out": dict(
        type=make_type("a folder", r"\s*\S.*", Path),
        help="folder to write to (an audit: report.html, audit.json, scores.csv)",
    ),
    "--json": dict(action="store_true", help="print audit.json instead of text"),
    "--fail-on": dict(type=to_names, default=list(CODES), help="findings with an exit code above 0 (default: all)"),
    "--check": dict(action="store_true", help="open everything, say what was understood and how long it takes, stop"),
}  # fmt: skip
REPORTED = "--groups --level --seed --out --json --fail-on"
COMMANDS = {
    "": "model suspected reference --task --arch --arch-args --mean --std --weights --pooling --size --void --device "
    f"--attack --augmentation --reference-model --set --budget --check {REPORTED}",
    "views": "folder --out --size --n --augmentation --seed",
    "outputs": f"features suspected reference --size {REPORTED}",
    "canaries make": "folder --out -k --seed",
    "canaries test": "model folder --n --augmentation --level --seed",
}


class Parser(argparse.ArgumentParser):
    """Bad arguments are one line, exit code 2."""

    def error(self, message: str):
        """Print one line and exit."""
        self.exit(2, f"error: {message} ({self.prog} --help)\n")


def make_parser(command: str = "") -> Parser:
    """Describe the arguments of a command; ``""`` is the audit."""
    about = "Was MODEL trained on the SUSPECTED images? Also: mia-audit views | outputs | canaries make | canaries test"
    parser = Parser(prog=f"mia-audit {command}".strip(), description=about, epilog=EXITS, allow_abbrev=False)
    for name in COMMANDS[command].split():
        must = {"required": True} if name == "--out" and command in ("views", "canaries make") else {}
        parser.add_argument(name, **ARGUMENTS[name], **must)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else [str(part) for part in argv]
    command = next((name for name in COMMANDS if name and argv[: name.count(" ") + 1] == name.split()), "")
    parser = make_parser(command)
    if argv[:1] == ["canaries"] and not command:
        parser.error("expected canaries make or canaries test")
    o = parser.parse_args(argv[len(command.split()) :])
    for name in {"suspected", "reference", "folder"} & set(vars(o)):
        folder = getattr(o, name).removeprefix("folder:")
        if not folder or not Path(folder).expanduser().is_dir():
            parser.error(f"{name}: expected a folder of images, got {folder or 'nothing'}, which is no folder")
    if wrong := set(getattr(o, "fail_on", [])) - set(CODES) - {"never"}:
        parser.error(f"expected --fail-on among {', '.join(CODES)} or never, got {', '.join(sorted(wrong))}")
    try:
        return run_audit(o, shlex.join(["mia-audit", *argv])) if hasattr(o, "reference") else run_other(o, command)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run_audit(o: argparse.Namespace, repeat: str) -> int:
    """Plan, say how long it takes, audit, print and write the record."""
    from mia_utils.audit import api, examine  # torch takes seconds; arguments are checked within half of one

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if hasattr(o, "features"):
        p = api.plan_outputs(o.features, o.suspected, o.reference, size=o.size, groups=o.groups)
    else:
        own = {"level", "seed", "out", "json", "fail_on", "check"}
        options = {key: value for key, value in vars(o).items() if key not in own}
        options |= {"settings": dict(o.settings), "arch_args": dict(o.arch_args) or None}
        p = examine.plan(**options, measure=o.check)
        if o.check:
            print(p)
            return 0

    untrained = None if hasattr(o, "features") else "auto"
    report = examine.conclude(p, untrained=untrained, level=o.level, seed=o.seed or 0, command=repeat, say=say)
    print(json.dumps(report.to_dict(), indent=1) if o.json else report)
    if o.out is not None:
        say(f"written: {report.save(o.out) / 'report.html'}")
    return report.exit_code if report.exit_code in {CODES.get(name) for name in o.fail_on} else 0


def run_other(o: argparse.Namespace, command: str) -> int:
    """Write views, make canaries or test a model for them."""
    from mia_utils.audit import api, canaries  # as above

    if command == "views":
        options = dict(size=o.size or api.SIZE, n=o.n, augmentations=o.augmentation or api.AUGMENTATIONS)
        print(f"{api.write_views(o.folder, o.out, **options, seed=o.seed or 0)} images written below {o.out}")
        return 0
    if command == "canaries make":
        out = canaries.make(o.folder, o.out, k=o.k, seed=o.seed)
        print(f"publish {out / 'publish'} with {out / 'commitment.txt'}; keep {out / 'secret.json'} and secret/")
        return 0
    score = canaries.score_twins(o.model, augmentation=(o.augmentation or ["crop"])[0], n_views=o.n)
    found = canaries.rank(score, o.folder, seed=o.seed or 0)
    said = "trained on what was published" if found.p <= o.level else "not shown"
    print(f"{found.n} canaries among {found.k} twins: mean rank {found.mean_rank:.2f}, p = {found.p:.2g}: {said}")
    return CODES["leak"] if found.p <= o.level else 0

"""The commands of ``./run_all.sh``: train what is missing, execute every notebook, draw every figure.

``run_all.sh`` makes the environment and hands over to ``python -m mia_utils.runner.run``. Nothing here imports torch
before a command needs it: mistakes and ``--plan`` come at once.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from mia_utils import paths
from mia_utils.runner import engine, pack, profiles, train
from mia_utils.runner.plan import count, find_missing_datasets, make_plan, print_plan

USAGE = """usage: ./run_all.sh [PROFILE] [00 .. 08] [--plan] [--strict] [-- ENGINE_ARGS]
  (no arguments)    profile quick: train what is missing, execute every notebook, draw every figure
  PROFILE           {profiles}; with numbers: only these notebooks and what they need
    --plan          print models, seconds and gigabytes (GPU hours of paper), and stop
    --strict        a data set that is missing is an error, not skipped rows
    -- ENGINE_ARGS  go to Snakemake, for example: -- --cores 4
  test [ARGS]       the test suite (arguments go to pytest)
  replay            redraw figures and docs/ of photos from the committed results: no data, no training
  setup             the environment only
  data PROFILE      download the data sets of a profile, nothing else
  lab               JupyterLab on notebooks/
  pack PROFILE FILE trained models, scores and generated images in one file, for a room that trains nothing
  unpack FILE       put them where they are looked for"""
SPARE_BYTES = 300e6  # scores, figures, executed notebooks and one half-written artifact


def check_data_folder(n_bytes: float) -> None:
    """Refuse to start when ``n_bytes`` of models could not be saved, or ``MIA_DATA_DIR`` names no folder."""
    given, home, advice = os.environ.get("MIA_DATA_DIR"), paths.get_home(), "make room or set MIA_HOME to another disk"
    if given and not paths.get_raw_dir().is_dir():
        raise ValueError(f"MIA_DATA_DIR: expected a folder, got {given}; make it or unset the variable")
    folders = [paths.get_artifact_dirs()[0], home / "data" / "scores", home / "figures", home / "build"]
    # without data/raw every process would draw the scenes anew
    for folder in folders if given else [*folders, paths.get_raw_dir()]:
        try:
            paths.write_atomic(folder / ".write-test", lambda file: file.write(b"x" * 4096)).unlink()
        except ValueError as error:
            reason = getattr(error.__cause__, "strerror", None)
            raise ValueError(f"{folder}: expected a folder that can be written, got {reason!r}; {advice}") from None
    free, needed = shutil.disk_usage(folders[0]).free, n_bytes + SPARE_BYTES
    if free < needed:
        raise ValueError(f"{folders[0]}: expected {needed / 1e9:.1f} GB free, got {free / 1e9:.1f} GB; {advice}")


def run_profile(arguments: list[str]) -> int:
    """``PROFILE [NUMBERS] [--plan] [--strict] [-- ENGINE_ARGS]``; returns the exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    (name, *rest), engine_arguments = arguments[:cut], arguments[cut + 1 :]
    options = {text for text in rest if text.startswith("-")}
    if unknown := options - {"--plan", "--strict"}:
        known = "expected --plan, --strict, or -- before arguments of the engine"
        raise ValueError(f"unknown option {min(unknown)!r}: {known}")
    plan = make_plan(name, [text for text in rest if text not in options], strict="--strict" in options)
    for dataset, reason in plan.skipped.items():
        n = sum(row.dataset == dataset for row in plan.profile.models)
        print(f"skipped: {dataset}, {reason} ({count(n, 'model')})")
    if "--plan" in options:
        print_plan(plan)
        return 0
    command = engine.get_command(plan, engine_arguments)
    check_data_folder(plan.n_bytes)
    with engine.hold_lock(plan):
        return engine.execute(plan, command)


def run_test(arguments: list[str]) -> int:
    """``test [ARGS]``: the test suite of the checkout; returns pytest's exit code."""
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=paths.PACKAGE_ROOT).returncode
    print(f"pytest exit code {code}", flush=True)
    return code


def run_setup(arguments: list[str]) -> int:
    """``setup``: says which environment is used; ``run_all.sh`` has made it by now."""
    _expect_nothing("setup", arguments)
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU with {os.cpu_count()} cores"
    print(f"environment ready: Python {sys.version.split()[0]}, torch {torch.__version__}, {device}")
    return 0


def run_data(arguments: list[str]) -> int:
    """``data PROFILE [NAME ...]``: downloads the data sets of a profile, or those named (for a login node)."""
    if not arguments:
        raise ValueError(f"data: expected a profile ({', '.join(profiles.list_names())}), got nothing")
    profile = profiles.load(arguments[0])
    wanted, missing = arguments[1:] or profile.datasets, find_missing_datasets(profile)
    check_data_folder(0)
    for name in wanted:
        if name in missing:
            print(f"skipped: {name}, {missing[name]}")
        else:
            pool = train.load_pool(profile, name)
            print(f"{name}: {len(pool):,} images of {pool.images.shape[1]} x {pool.images.shape[2]}")
    return 0


def run_replay(arguments: list[str]) -> int:
    """``replay``: redraws the figures and pages of ``photos`` from the committed results."""
    _expect_nothing("replay", arguments)
    # a process of its own: it stands above the lab, which the runner does not know
    code = subprocess.run([sys.executable, "-m", "mia_utils.replay", "photos"]).returncode
    engine.print_page("photos")
    return code


def run_lab(arguments: list[str]) -> int:
    """``lab [ARGS]``: JupyterLab on ``notebooks/``."""
    command = [sys.executable, "-m", "jupyterlab", str(profiles.find_source("notebooks")), *arguments]
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.execv(sys.executable, command)


def run_pack(arguments: list[str]) -> int:
    """``pack PROFILE FILE``."""
    if len(arguments) != 2:
        raise ValueError(f"pack: expected a profile and a file, got {len(arguments)} arguments")
    print(f"{arguments[1]}: {pack.pack(arguments[0], Path(arguments[1])) / 1e6:,.0f} MB")
    return 0


def run_unpack(arguments: list[str]) -> int:
    """``unpack FILE``."""
    if len(arguments) != 1:
        raise ValueError(f"unpack: expected one file, got {len(arguments)} arguments")
    if not Path(arguments[0]).is_file():
        raise ValueError(f"unpack: expected a file written by ./run_all.sh pack, got {arguments[0]}")
    came, there = pack.unpack(Path(arguments[0]))
    print(f"{came} models and files unpacked, {there} were there")
    return 0


def _expect_nothing(command: str, arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"{command}: expected no arguments, got {arguments[0]!r}")


COMMANDS = {"test": run_test, "setup": run_setup, "data": run_data, "replay": run_replay, "lab": run_lab}
COMMANDS |= {"pack": run_pack, "unpack": run_unpack}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2: bad input, nothing was started)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        paths.get_threads(), paths.get_home()  # the environment is input, too
        if not paths.is_checkout():
            raise ValueError("run this from a checkout of the project: an installed package holds no notebooks")
        if arguments and arguments[0] in ("-h", "--help", "help"):
            print(USAGE.format(profiles=", ".join(profiles.list_names())))
            return 0
        if arguments and arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](arguments[1:])
        starts_with_profile = arguments and not arguments[0].startswith("-")
        return run_profile(arguments if starts_with_profile else ["quick", *arguments])
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

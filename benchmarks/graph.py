"""Does the graph run in parallel jobs, and is the result the same? One profile from scratch with --cores 1 and 2.

    python benchmarks/graph.py [--profile smoke] [--notebooks 00 01 02] [--cores 1 2]

Each run has a working folder (``MIA_HOME``) of its own, so that everything is trained and drawn anew; only downloads
(``MIA_DATA_DIR``) are shared. Then every CSV of the figures is compared byte by byte (measured seconds apart), every
PNG pixel by pixel, and the scores number by number. Writes ``benchmarks/results/graph.csv``: wall-clock seconds, the
ratio of rates to the first run, and the number of files that differ (0 is expected; a difference makes the exit code
1). One run each: a table of minutes, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import pandas as pd
from PIL import Image

from mia_utils.runner import profiles

ROOT = Path(__file__).resolve().parent.parent
TIMES = ["train_seconds"]  # columns that no two runs share


def run_graph(home: Path, cores: int, options: argparse.Namespace) -> float:
    """Run the profile in an empty working folder; returns its wall-clock seconds."""
    home.mkdir()
    command = [str(ROOT / "run_all.sh"), options.profile, *options.notebooks, "--", "--cores", str(cores)]
    environment = {**os.environ, "MIA_HOME": str(home), "MIA_PYTHON": sys.executable}
    environment.pop("MIA_ARTIFACTS", None)  # finished models would leave nothing to do
    if all(name.startswith("scenes") for name in profiles.load(options.profile).datasets):
        environment.pop("MIA_DATA_DIR", None)  # each run draws its own pictures
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    print(f"--cores {cores}: {seconds:.0f} s, {done.stdout.splitlines()[0] if done.stdout else ''}", flush=True)
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith("failed")]
        raise RuntimeError(f"--cores {cores}: exit code {done.returncode}: {(failed or [done.stderr.strip()])[0]}")
    return seconds


def list_files(home: Path, profile: str) -> dict[str, Path]:
    """What a run leaves for the reader: figures with their numbers, and scores."""
    folders = (home / "figures" / profile, home / "data" / "scores" / profile)
    files = [
        path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in (".csv", ".png", ".npz")
    ]
    return {str(path.relative_to(home)): path for path in files}


def is_same(a: Path, b: Path) -> bool:
    """Bytes of a CSV but for times, pixels of a picture, numbers of saved scores (their meta tells seconds)."""
    if a.suffix == ".png":
        return np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))
    if a.suffix == ".npz":
        with np.load(a, allow_pickle=False) as one, np.load(b, allow_pickle=False) as other:
            keys = [key for key in one.files if one[key].dtype.kind in "fb"]
            return one.files == other.files and all(np.array_equal(one[k], other[k], equal_nan=True) for k in keys)
    if a.read_bytes() == b.read_bytes():  # a table without rows has no columns to read
        return True
    one, other = (pd.read_csv(path, dtype=str).drop(columns=TIMES, errors="ignore") for path in (a, b))
    return one.equals(other)


def main() -> int:
    """Run, compare, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser, repeats=1)
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--notebooks", nargs="*", default=["00", "01", "02"], help="none: all of them")
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    run = common.describe_run(options) | {"clock": "wall", "repeats": 1}
    rows, first, n_different = [], {}, 0
    with tempfile.TemporaryDirectory() as temporary:
        for cores in options.cores:
            home = Path(temporary) / f"cores{cores}"
            seconds = run_graph(home, cores, options)
            files = list_files(home, options.profile)
            first = first or files
            different = sorted(set(first) ^ set(files))
            different += [name for name in sorted(set(first) & set(files)) if not is_same(first[name], files[name])]
            for name in different:
                print(f"differs: {name}")
            n_different += len(different)
            row = {"what": f"{options.profile} {' '.join(options.notebooks)}".strip(), "cores": cores}
            row |= {"rate": round(60 / seconds, 4), "unit": "runs/min", "seconds": round(seconds, 1)}
            row |= {"ratio": round(rows[0]["seconds"] / seconds, 3) if rows else 1.0, "spread": np.nan}
            rows.append(row | {"files": len(files), "different": len(different)} | run)
    common.write_table(rows, "graph", options.results)
    return 1 if n_different or not first else 0


if __name__ == "__main__":
    sys.exit(main())

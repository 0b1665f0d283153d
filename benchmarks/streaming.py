"""What does it cost to stream a folder? Decoding rate, and peak memory against the set held in memory.

    python benchmarks/streaming.py [--images 10000] [--size 128] [--timed 1000] [--repeats 3]

Writes JPEG files of mixed sizes (sides of 150 to 300 pixels) into a temporary folder and streams them at one size.
- *rates*: bare Pillow in a loop (open, convert, scale, crop) against ``np.asarray(images)`` with one and with two
  workers, each on as many cores; reading the decoded images back from the memory map. By wall and by processor clock.
- *memory*: the peak of a process that loads, splits, passes over or trains one epoch on all files, streamed and in
  memory, each process of its own; ``share`` is what it takes beyond its imports, against the size of the decoded set.
Writes ``benchmarks/results/streaming.csv`` and ``streaming_memory.csv``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import common
import numpy as np
from PIL import Image

from mia_utils import datasets, pretrain
from mia_utils.datasets import folders
from mia_utils.protocol import splits

BATCH = 256
PROBES = ("imports", "load: in memory", "split: streamed", "pass: streamed", "train: in memory", "train: streamed")


def write_files(folder: Path, n: int, *, seed: int) -> int:
    """Write n JPEG files in ten classes; returns their bytes. Windows of a few textures with a natural spectrum."""
    rng = np.random.default_rng(seed)
    bank = []
    for _ in range(8):
        total = np.zeros((512, 512, 3), np.float32)
        for side in (4, 16, 64, 256):  # coarse structure is strong, fine structure is weak
            coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            total += np.asarray(coarse.resize((512, 512), Image.Resampling.BICUBIC), np.float32) / side**0.5
        bank.append(Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8)))
    sides = rng.integers(150, 301, (n, 2))
    corners = (rng.random((n, 2)) * (512 - sides)).astype(int)
    for label in range(10):
        (folder / f"class{label}").mkdir(parents=True)

    def write(i: int) -> int:
        (height, width), (top, left) = sides[i], corners[i]
        path = folder / f"class{i % 10}" / f"{i:06d}.jpg"
        bank[i % 8].crop((left, top, left + width, top + height)).save(path, quality=85)
        return path.stat().st_size

    with ThreadPoolExecutor(folders.count_threads()) as executor:
        return sum(executor.map(write, range(n)))


def time_decoding(folder: Path, options: argparse.Namespace, run: dict) -> list[dict]:
    """Time bare Pillow, one and two workers, and the reading of the files."""
    size = (options.size, options.size)
    files = [(folder / name,) for name in folders.list_images(folder, {})[: options.timed]]
    cores = sorted(os.sched_getaffinity(0))

    def decode_bare() -> None:
        os.sched_setaffinity(0, cores[:1])
        for (file,) in files:
            with Image.open(file) as image:
                np.asarray(folders.cover(image.convert("RGB"), size))

    def decode(workers: int) -> None:
        os.sched_setaffinity(0, cores[:workers])  # as many threads as cores
        folders.decode(partial(folders.read_image, size=size), files, title="benchmark")

    ways = {"bare Pillow, one thread": decode_bare}
    for workers in range(1, min(options.workers, len(cores)) + 1):
        ways[f"decoding, {workers} worker{'s' if workers > 1 else ''}"] = lambda workers=workers: decode(workers)
    pool = datasets.load(f"folder:{folder}", folder.parent, size=size, stream=True, n=options.timed)
    ways["reading the memory map"] = lambda: np.asarray(pool.images)
    rows, call = [], dict(n=len(files), unit="images/s", baseline="bare Pillow, one thread", size=options.size)
    for clock in (
        "wall",
        "processor",
    ):  # the second is that of all threads: what a neighbor on the machine can't change
        seconds = common.time_ways(ways, options.repeats, clock)
        rows += common.make_rows(seconds, what=f"{clock} clock", run=run | {"clock": clock}, **call)
    os.sched_setaffinity(0, cores)
    return rows


def probe(name: str, folder: str, size: int, seed: int) -> dict:
    """Do one thing in this process; returns its seconds and the peak of its memory in MB."""
    began = time.perf_counter()
    task, _, how = name.partition(": ")
    if task != "imports":
        pool = datasets.load(f"folder:{folder}", Path(folder).parent, size=size, stream=how == "streamed")
    if task in ("split", "train"):
        split = splits.draw(pool, n_members=len(pool) - 2, n_nonmembers=2, n_shadow_members=0, seed=seed)
    if task == "pass":
        total = 0
        for start in range(0, len(pool), BATCH):
            total += int(np.asarray(pool.images[start : start + BATCH])[:, ::16, ::16].sum())
    if task == "train":
        options = dict(arch="vit_nano_patch8_32", epochs=1, seed=seed, batch_size=BATCH, augmentation="crop")
        pretrain.fit("mae", pool.images[split.target_members], checkpoints=[], progress=False, **options)
    return {"seconds": round(time.perf_counter() - began, 1), "peak_mb": round(read_peak())}


def read_peak() -> float:
    """Peak of this process in MB; ``ru_maxrss`` would begin at what the parent held when it started this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def measure_memory(folder: Path, options: argparse.Namespace, run: dict) -> list[dict]:
    """Run every probe in a process of its own."""
    decoded = options.images * options.size**2 * 3 / 1e6
    rows = []
    for name in PROBES:
        command = [sys.executable, __file__, "--probe", name, str(folder), str(options.size), str(options.seed)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout.splitlines()[-1])
        beyond = found["peak_mb"] - (rows[0]["peak_mb"] if rows else found["peak_mb"])
        row = {"what": name, **found, "beyond_imports_mb": beyond, "decoded_mb": round(decoded)}
        rows.append(row | {"share": round(beyond / decoded, 3), "images": options.images, "size": options.size} | run)
    return rows


def main() -> None:
    """Time, measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_arguments(parser, repeats=3)
    for name, default in (("images", 10_000), ("size", 128), ("timed", 1000), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    run = common.describe_run(options) | {"clock": "wall"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        n_bytes = write_files(folder, options.images, seed=options.seed)
        print(f"{options.images} JPEG files, {n_bytes / 1e6:.0f} MB")
        common.write_table(time_decoding(folder, options, run), "streaming", options.results)
        rows = [row | {"repeats": 1} for row in measure_memory(folder, options, run)]
        common.write_table(rows, "streaming_memory", options.results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        name, where, *numbers = sys.argv[2:]
        print(json.dumps(probe(name, where, *map(int, numbers))))
    else:
        main()

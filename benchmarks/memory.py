"""How do memory and time of PartCrop grow with the images, the crops and the encoder?

    python benchmarks/memory.py [--images 1000 4000 16000 60000] [--crops 8 32 128 256] [--encoders ...]
                                [--repeats 2] [--threads 1] [--device cpu]

Every point is ``attacks.partcrop.extract_features`` in a process of its own. ``above_mib`` is the peak of its resident
memory above what it held before the extraction: interpreter, libraries, encoder and the images themselves. Images are
streamed through the encoder in chunks that fit a memory budget, so it should not grow with their number beyond the
features that are returned (``features_mib``). On a GPU it is the peak of what was allocated above the weights.
``ratio`` compares the rate with the first point of the sweep: 1 is linear growth of time. Images and weights are
random: they cost the same. Writes ``benchmarks/results/memory.csv``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from common import add_arguments, describe_run, make_rows, time_ways, write_table

from mia_utils.attacks import partcrop
from mia_utils.models import encoders

MIB = 2**20
SMALLEST = "vit_nano_patch8_32"
ENCODERS = ("vit_nano_patch8_32", "vit_micro_patch8_32", "vit_mini_patch8_32", "vit_small_patch8_32")


def read_peak() -> float:
    """Peak resident memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB


def measure_point(arch: str, n: int, n_crops: int, options: argparse.Namespace) -> dict:
    """Extract features once per repeat; return seconds and MiB. Runs in a process of its own."""
    run, cuda = describe_run(options), options.device == "cuda"
    encoder = encoders.make(arch, seed=options.seed).to(options.device)
    size = encoder.input_size
    images = np.random.default_rng(options.seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    ids = [str(i) for i in range(n)]
    before = torch.cuda.memory_allocated() / MIB if cuda else psutil.Process().memory_info().rss / MIB

    def extract() -> torch.Tensor:
        return partcrop.extract_features(encoder, images, image_ids=ids, n_crops=n_crops, seed=options.seed)

    seconds = time_ways({"": extract}, options.repeats, run["clock"])[""]
    peak = torch.cuda.max_memory_allocated() / MIB if cuda else read_peak()
    return {
        "seconds": seconds,
        "peak_mib": round(peak, 1),
        "above_mib": round(peak - before, 1),
        "images_mib": round(images.nbytes / MIB, 1),
        "features_mib": round(4 * n * 2 * n_crops / MIB, 1),
        "parameters": sum(p.numel() for p in encoder.module.parameters()),
    }


def start_point(arch: str, n: int, n_crops: int, options: argparse.Namespace) -> dict:
    """Measure a point in a new process."""
    command = [sys.executable, __file__, "--point", arch, str(n), str(n_crops)]
    for name in ("repeats", "threads", "seed", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arch}, {n} images, {n_crops} crops failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the three sweeps, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 4000, 16000, 60000])
    parser.add_argument("--crops", type=int, nargs="*", default=[8, 32, 128, 256])
    parser.add_argument("--encoders", nargs="*", default=list(ENCODERS))
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    add_arguments(parser, repeats=2)
    options = parser.parse_args(arguments)
    if options.point:
        arch, n, n_crops = options.point
        print(json.dumps(measure_point(arch, int(n), int(n_crops), options)))
        return
    run = describe_run(options)
    sweeps = {
        "number of images": [(SMALLEST, n, 4) for n in options.images],
        "number of crops": [("vit_micro_patch8_32", 64, k) for k in options.crops],
        "size of the encoder": [(arch, 16, 128) for arch in options.encoders],
    }
    rows = []
    for sweep, points in sweeps.items():
        found = {f"{arch}, {n} images, {k} crops": start_point(arch, n, k, options) for arch, n, k in points}
        seconds = {name: point.pop("seconds") for name, point in found.items()}
        more = {"seconds": {name: round(float(np.median(taken)), 3) for name, taken in seconds.items()}}
        for column in next(iter(found.values()), {}):
            more[column] = {name: point[column] for name, point in found.items()}
        counts = {name: n * k for name, (_, n, k) in zip(found, points, strict=True)}
        if found:
            rows += make_rows(seconds, n=counts, unit="crops/s", baseline=[*found][0], run=run, what=sweep, **more)
    write_table(rows, "memory", options.results)


if __name__ == "__main__":
    main()

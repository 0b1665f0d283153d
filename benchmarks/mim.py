"""How fast is the MIM attack? Scoring against the bare forwards that it can't do without.

    python benchmarks/mim.py [--images 256] [--masks 16] [--batch 128] [--repeats 7] [--threads 1] [--device cpu]

Three ways to the same distances, timed in turn within one run:
- *bare loop*: for every mask, every ready batch through encoder and decoder, and nothing else: the limit;
- *scoring*: ``attacks.mim.score_reconstruction``, from uint8 images to scores;
- *one mask at a time*: a reconstruction per mask, patch embedding included, then one image after the other.
The ratio is the median over repeats of rate / rate of the bare loop in the same repeat. One thread is timed by the
processor's clock, which neighbors on the machine don't touch; several threads and GPUs by the wall clock. Weights are
random: they cost the same. Writes ``benchmarks/results/mim.csv``.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mia_utils import pretrain
from mia_utils.attacks import mim

MODELS = (("mae", "vit_micro_patch8_32"), ("simmim", "vit_micro_patch8_32"), ("simmim", "swin_thin_32"))
SLOWER = {"swin_thin_32": 8}  # fewer images, so that a repeat takes as long
RESULTS = Path(__file__).parent / "results" / "mim.csv"


def describe_machine(device: str) -> str:
    """Processor, cores and load: on a busy machine rates are low and ratios still hold."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"


def measure(method: str, arch: str, options: argparse.Namespace) -> list[dict]:
    """Time the three ways over one model."""
    model = pretrain.build(method, arch, seed=options.seed).eval().to(options.device)
    n = max(8, options.images // SLOWER.get(arch, 1))
    size = model.input_size
    images = np.random.default_rng(options.seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    masks = mim.draw_masks(options.masks, model.n_tokens, seed=options.seed).to(options.device)
    floats = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).contiguous().to(options.device)
    ready = (2 * floats - 1).split(options.batch)

    def wait():
        if options.device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def run_bare():
        for mask in masks:
            for x in ready:
                model.predict(x, mask.expand(len(x), -1))
        wait()

    def run_scoring():
        return mim.score_reconstruction(
            model, images, n_masks=options.masks, seed=options.seed, batch_size=options.batch
        )

    @torch.inference_mode()
    def run_one_by_one():
        total = np.zeros(n)
        for mask in masks:
            side = round(len(mask) ** 0.5)
            hidden = mask.view(side, side).repeat_interleave(size // side, 0).repeat_interleave(size // side, 1)
            made = torch.cat([model.reconstruct(x, mask) for x in floats.split(options.batch)])
            for i in range(n):
                total[i] += float((made[i] - floats[i])[:, hidden].square().mean())
        return -total / len(masks)

    ways = {"bare loop": run_bare, "scoring": run_scoring, "one mask at a time": run_one_by_one}
    assert np.allclose(run_scoring(), run_one_by_one(), atol=1e-6), "the ways disagree"
    run_bare()  # warmed up as the others are
    seconds = {name: [] for name in ways}
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    for repeat in range(options.repeats):
        order = list(ways)[repeat % 3 :] + list(ways)[: repeat % 3]
        for name in order:
            began = clock()
            ways[name]()
            seconds[name].append(clock() - began)
    rows = []
    for name, taken in seconds.items():
        rates = n / np.array(taken)
        ratio = np.median(np.array(seconds["bare loop"]) / np.array(taken))
        quarter = np.subtract(*np.quantile(rates, (0.75, 0.25))) / np.median(rates)
        rows.append(
            {
                "what": f"{method} {arch}, {options.masks} masks, {options.batch} pairs a forward: {name}",
                "images_per_second": round(float(np.median(rates)), 1),
                "ratio": round(float(ratio), 3),
                "threads": torch.get_num_threads(),
                "repeats": options.repeats,
                "spread": round(float(quarter), 3),  # interquartile range / median of the rates
                "clock": options.clock,
                "torch": torch.__version__,
                "machine": options.machine,
                "seed": options.seed,
            }
        )
    return rows


def main() -> None:
    """Measure all models, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 256), ("masks", 16), ("batch", 128), ("repeats", 7), ("threads", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.clock = "processor" if options.device == "cpu" and options.threads == 1 else "wall"
    options.machine = describe_machine(options.device)
    table = pd.DataFrame([row for model in MODELS for row in measure(*model, options)])
    print(table[["what", "images_per_second", "ratio", "spread", "clock"]].to_string(index=False))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {options.machine}")
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS, index=False)


if __name__ == "__main__":
    main()

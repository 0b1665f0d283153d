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
from collections.abc import Sequence

import numpy as np
import torch
from common import add_arguments, describe_run, make_rows, time_ways, write_table

from mia_utils import pretrain
from mia_utils.attacks import mim

MODELS = (("mae", "vit_micro_patch8_32"), ("simmim", "vit_micro_patch8_32"), ("simmim", "swin_thin_32"))
SLOWER = {"swin_thin_32": 8}  # fewer images, so that a repeat takes as long
COLUMNS = ("what", "rate", "ratio", "threads", "repeats", "spread", "clock", "torch", "machine", "seed")


def measure(method: str, arch: str, options: argparse.Namespace, run: dict) -> list[dict]:
    """Time the three ways over one model."""
    model = pretrain.build(method, arch, seed=options.seed).eval().to(options.device)
    n = max(8, options.images // SLOWER.get(arch, 1))
    size = model.input_size
    images = np.random.default_rng(options.seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    masks = mim.draw_masks(options.masks, model.n_tokens, seed=options.seed).to(options.device)
    floats = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).contiguous().to(options.device)
    ready = (2 * floats - 1).split(options.batch)

    @torch.inference_mode()
    def run_bare():
        for mask in masks:
            for x in ready:
                model.predict(x, mask.expand(len(x), -1))

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
    rows = make_rows(
        time_ways(ways, options.repeats, run["clock"]),
        n=n,
        unit="images/s",
        baseline="bare loop",
        run=run,
        what=f"{method} {arch}, {options.masks} masks, {options.batch} pairs a forward",
    )
    return [{"images_per_second" if key == "rate" else key: row[key] for key in COLUMNS} for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all models, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 256), ("masks", 16), ("batch", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    add_arguments(parser, repeats=7)
    options = parser.parse_args(arguments)
    run = describe_run(options)
    write_table([row for model in MODELS for row in measure(*model, options, run)], "mim", options.results)


if __name__ == "__main__":
    main()

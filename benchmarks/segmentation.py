"""How fast are the segmentation attacks? Their input maps against the bare forwards they can't do without.

    python benchmarks/segmentation.py [--images 42] [--repeats 5] [--threads 1] [--device cpu]

On pictures of 96 x 128, a U-Net with MobileNetV2 and 11 classes, timed in turn within one run:
- *bare forwards*: ready batches, as many images as the extraction takes, through the network: the limit; and the same
  with the batches in channels-last order, which convolutions on a CPU prefer;
- *loss map*, *concatenation*, *mean loss*: ``attacks.segmentation.extract_*``, from uint8 to what the attackers get;
- *patches judged*: six patches of every loss map through the attacker's network, what comes after the loss map;
- *an image at a time*: the released way, one forward for one picture, its loss map made with numpy.
Weights and pictures are random: they cost the same. Writes ``benchmarks/results/segmentation.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import common
import numpy as np
import torch

from mia_utils.attacks import segmentation
from mia_utils.models import segmenters

HEIGHT, WIDTH, N_CLASSES, N_PATCHES = 96, 128, 11, 6


def measure(options: argparse.Namespace, run: dict) -> list[dict]:
    """Time the ways."""
    model = segmenters.make("unet", N_CLASSES, (HEIGHT, WIDTH), seed=options.seed).to(options.device)
    rng, n = np.random.default_rng(options.seed), options.images
    images = rng.integers(0, 256, (n, HEIGHT, WIDTH, 3), dtype=np.uint8)
    masks = rng.integers(0, N_CLASSES, (n, HEIGHT, WIDTH)).astype(np.uint8)
    labeled = dict(image_ids=[f"image-{i}" for i in range(n)], masks=masks)
    floats = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).to(options.device)
    chunk = segmentation.get_chunk(options.device, HEIGHT, WIDTH)
    ready = (2 * floats - 1).contiguous().split(chunk)
    last = [x.contiguous(memory_format=torch.channels_last) for x in ready]
    size = segmentation.get_patch_size(HEIGHT, WIDTH)
    attacker = segmentation.PatchAttacker(
        segmentation.make_network(1, seed=options.seed).eval().to(options.device),
        size=size, n_patches=N_PATCHES, labels_last=False, seed=options.seed, shape=(1, HEIGHT, WIDTH),
    )  # fmt: skip

    @torch.inference_mode()
    def forward(batches: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([model.module(x) for x in batches])

    def extract_one_by_one() -> np.ndarray:
        maps = np.empty((n, 1, HEIGHT, WIDTH), np.float16)
        rows, columns = np.indices((HEIGHT, WIDTH))
        for i in range(n):
            with torch.inference_mode():
                posteriors = model.posteriors(floats[i : i + 1])[0].cpu().numpy()
            maps[i, 0] = -np.log(np.maximum(posteriors[masks[i], rows, columns], segmentation.TINY))
        return maps

    def extract_loss_map() -> np.ndarray:
        return segmentation.extract_loss_map(model, images, **labeled)

    maps = extract_loss_map()
    true = torch.from_numpy(masks).long().unsqueeze(1).to(options.device)
    bare = -forward(ready).log_softmax(1).gather(1, true).cpu().numpy()
    if not (np.allclose(maps, bare, atol=0.02) and np.allclose(maps, extract_one_by_one(), atol=0.02)):
        raise RuntimeError("the ways give different loss maps")  # in float16, and by other kernels for one image
    ways = {
        "bare forwards": lambda: forward(ready),
        "bare forwards, channels last": lambda: forward(last),
        "loss map": extract_loss_map,
        "concatenation": lambda: segmentation.extract_posteriors_and_labels(model, images, **labeled),
        "mean loss": lambda: segmentation.extract_mean_loss(model, images, **labeled),
        f"{N_PATCHES} patches judged": lambda: attacker.score(maps, image_ids=labeled["image_ids"]),
        "an image at a time": extract_one_by_one,
    }
    seconds = common.time_ways(ways, options.repeats, run["clock"])
    what = f"unet {model.arch}, {HEIGHT} x {WIDTH}"
    return common.make_rows(seconds, n=n, unit="images/s", baseline="bare forwards", run=run, what=what)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=42, help="images per repeat")
    common.add_arguments(parser)
    options = parser.parse_args(arguments)
    run = common.describe_run(options)
    common.write_table(measure(options, run), "segmentation", options.results)


if __name__ == "__main__":
    main()

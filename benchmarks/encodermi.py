"""How fast are EncoderMI's queries? Views and their similarities against the bare forwards they can't do without.

    python benchmarks/encodermi.py [--models vit_micro_patch8_32 ...] [--images 96] [--views 10] [--repeats 5]
                                   [--threads 1] [--device cpu]

Three ways to the similarities of K augmented views of every image, timed in turn within one run:
- *bare forwards*: all views, ready, through the encoder in the batches that the extraction chose: the limit;
- *extraction*: ``attacks.encodermi.extract_features``, from uint8 images to similarities;
- *a view at a time*: the published way, torchvision's transforms on one Pillow image after the other (the released
  code's: random resized crop (0.2, 1), flip, jitter, gray), each image's K views through the encoder in one forward.
The last draws its own views, so it gives similarities of the same kind and not the same numbers. Weights and pictures
are random: they cost the same. Writes ``benchmarks/results/encodermi.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import common
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from mia_utils.attacks import encodermi
from mia_utils.models import encoders, views

MODELS = ("vit_micro_patch8_32", "resnet_thin_32", "vit_small_patch8_32")
SLOWER = {"resnet_thin_32": 2, "vit_small_patch8_32": 8}  # fewer images, so that a repeat takes as long


def measure(arch: str, options: argparse.Namespace, run: dict) -> list[dict]:
    """Time the three ways over one encoder."""
    encoder = encoders.make(arch, seed=options.seed).to(options.device)
    size, k = encoder.input_size, options.views
    n = max(2, options.images // SLOWER.get(arch, 1))
    images = np.random.default_rng(options.seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    ids = [f"image-{i}" for i in range(n)]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(options.device)
    ready = views.query_views(pixels, ids, k, size=size, seed=options.seed)  # (n, K, 3, S, S)
    chunk = encodermi.get_chunk(encoder, k, images.shape[1:3])
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )

    @torch.inference_mode()
    def run_bare() -> torch.Tensor:
        return torch.cat([encoder.embed(x.flatten(0, 1)) for x in ready.split(chunk)])

    def run_extraction() -> torch.Tensor:
        return encodermi.extract_features(encoder, images, image_ids=ids, n_views=k, seed=options.seed)

    @torch.inference_mode()
    def run_one_by_one() -> torch.Tensor:
        similarities = []
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global stream
            for image in map(Image.fromarray, images):
                x = torch.stack([transform(image) for _ in range(k)]).to(options.device)
                similarities.append(encodermi.compare_views(encoder.embed(x)[None]).cpu())
        return torch.cat(similarities)

    with torch.inference_mode():
        made = encodermi.compare_views(run_bare().float().unflatten(0, (n, k))).cpu()
    if not torch.allclose(made, run_extraction(), atol=1e-5 if options.device == "cpu" else 1e-3):
        raise RuntimeError(f"{arch}: bare forwards and extraction give different similarities")
    ways = {"bare forwards": run_bare, "extraction": run_extraction, "a view at a time": run_one_by_one}
    seconds = common.time_ways(ways, options.repeats, run["clock"])
    what = f"{arch}, {k} views"
    return common.make_rows(seconds, n=n * k, unit="views/s", baseline="bare forwards", run=run, what=what)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all encoders, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="encoders")
    parser.add_argument("--images", type=int, default=96, help="images per repeat (larger encoders: fewer)")
    parser.add_argument("--views", type=int, default=10, help="views per image")
    common.add_arguments(parser)
    options = parser.parse_args(arguments)
    run = common.describe_run(options)
    rows = [row for arch in options.models for row in measure(arch, options, run)]
    common.write_table(rows, "encodermi", options.results)


if __name__ == "__main__":
    main()

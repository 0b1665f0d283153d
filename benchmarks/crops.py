"""How fast are the crops? A batch at once against torchvision and Pillow, one crop at a time, on identical boxes.

    python benchmarks/crops.py [--images 16] [--crops 128] [--repeats 5] [--threads 1] [--device cpu]

Ways to the same crops (random-resized-crop boxes of 8 to 20 % of the area, half of them mirrored):
- *torchvision v2, tensors*: ``v2.functional.resized_crop`` of a uint8 tensor per crop: the oracle, and ratio 1;
- *torchvision v1, PIL*: ``functional.resized_crop`` and ``to_tensor`` of a picture per crop;
- *bare Pillow*: ``Image.resize`` of a box and nothing else, no tensor at the end;
- *batched*: ``views.resized_crop``;
- *published transform* and *batched, boxes drawn*: the same with the boxes drawn on the way, by
  ``RandomResizedCrop`` and by ``views.draw_boxes``.
All but bare Pillow end in float32 tensors. ``largest_difference`` is against the oracle, in steps of 1/255 of a pixel
value, ``share_above_1`` the share of values that differ by more than one step. Writes ``benchmarks/results/crops.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from common import add_arguments, describe_run, make_rows, time_ways, write_table
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop, ToTensor
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2

from mia_utils.models import views

BICUBIC = v2.InterpolationMode.BICUBIC
SIZES = ((32, 16), (224, 112))  # side of the view, side of a crop
SCALE = (0.08, 0.2)
BASELINE = "torchvision v2, tensors"
TARGET = 8  # times the loop over crops
# at 224 px all but 1 % of the products are with weights of zero, which costs a GPU little and a CPU much
LARGE = "even bare Pillow is no 8 x here; dense products lose on a CPU, at 1 % of the ViT-B/16 forward of the crop"


def make_images(n: int, side: int, seed: int) -> Tensor:
    """Make (n, 3, side, side) uint8 pictures: noise of an eighth of the size, enlarged, and fine noise on top."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, side // 8, side // 8, generator=generator) * 255
    smooth = v2.resize(coarse, [side, side], interpolation=BICUBIC)
    fine = 20 * torch.randn(n, 3, side, side, generator=generator)
    return (smooth + fine).round().clamp(0, 255).to(torch.uint8)


def measure(side: int, size: int, n: int, options: argparse.Namespace, run: dict) -> list[dict]:
    """Time all ways at one size and compare their crops."""
    images, ids = make_images(n, side, options.seed), [str(i) for i in range(n)]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    on_device = images.to(options.device)

    def draw():
        return views.draw_boxes(
            ids, options.crops, height=side, width=side, scale=SCALE, seed=options.seed, stream="crops"
        )

    boxes, flips = draw()
    plan = [list(zip(*pair, strict=True)) for pair in zip(boxes.tolist(), flips.tolist(), strict=True)]

    def loop(cut, sources) -> Tensor:
        rows = [torch.stack([cut(x, *pair) for pair in pairs]) for x, pairs in zip(sources, plan, strict=True)]
        return torch.stack(rows).to(options.device)

    def cut_tensor(image, box, flip):
        crop = v2.resized_crop(image, *box, size=[size, size], interpolation=BICUBIC, antialias=True)
        return v2.to_dtype(v2.horizontal_flip(crop) if flip else crop, torch.float32, scale=True)

    def cut_picture(picture, box, flip):
        crop = v1.resized_crop(picture, *box, [size, size], BICUBIC)
        return v1.to_tensor(v1.hflip(crop) if flip else crop)

    def run_pillow():
        for picture, pairs in zip(pictures, plan, strict=True):
            for (top, left, height, width), _ in pairs:
                picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + width, top + height))

    def cut_batch(boxes: Tensor, flips: Tensor) -> Tensor:
        return views.resized_crop(on_device, boxes, size, flips=flips)

    published = Compose([RandomResizedCrop(size, SCALE, interpolation=BICUBIC), RandomHorizontalFlip(), ToTensor()])

    def run_published() -> Tensor:
        rows = [torch.stack([published(picture) for _ in range(options.crops)]) for picture in pictures]
        return torch.stack(rows).to(options.device)

    ways = {
        BASELINE: lambda: loop(cut_tensor, images),
        "torchvision v1, PIL": lambda: loop(cut_picture, pictures),
        "bare Pillow": run_pillow,
        "batched": lambda: cut_batch(boxes, flips),
        "published transform": run_published,
        "batched, boxes drawn": lambda: cut_batch(*draw()),
    }

    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # the published transform draws from the global stream
        oracle = ways[BASELINE]()
        difference = {
            name: ((ways[name]() - oracle) * 255).abs().cpu() for name in (BASELINE, "torchvision v1, PIL", "batched")
        }
        seconds = time_ways(ways, options.repeats, run["clock"])
    return make_rows(
        seconds,
        n=n * options.crops,
        unit="crops/s",
        baseline=BASELINE,
        run=run,
        what=f"{side} to {size} px",
        target={"batched": TARGET},
        note={"batched": LARGE if side > 64 else None},
        largest_difference={name: round(float(d.max()), 2) for name, d in difference.items()},
        # a float32 step of 1/255 is a little more or less than one
        share_above_1={name: float(f"{(d > 1.01).float().mean():.3g}") for name, d in difference.items()},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all sizes, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="of 32 px; an eighth of them of 224 px")
    parser.add_argument("--crops", type=int, default=128)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    run = describe_run(options)
    rows = []
    for side, size in SIZES:
        rows += measure(side, size, options.images if side == 32 else max(1, options.images // 8), options, run)
    write_table(rows, "crops", options.results)


if __name__ == "__main__":
    main()

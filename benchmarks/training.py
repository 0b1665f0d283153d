"""How fast is training? The loop against the forward and backward passes that it can't do without.

    python benchmarks/training.py [--models mae:vit_micro_patch8_32 ...] [--steps 6] [--batch 64] [--repeats 5]
                                  [--threads 1] [--device cpu] [--precision 32-true]

Two ways to train on the same batches, timed in turn within one run:
- *forward + backward*: the method's loss and its gradients, on views and masks that lie ready: the limit;
- *fit*: ``pretrain.fit``, which also draws the batch and its masks, augments it, takes the steps of optimizer, schedule
  and momentum encoder, and lends every step a random stream of its own;
and two parts of fit alone: *views and masks*, and *updates* (AdamW, momentum encoder).

The rate of fit is that of its steps: the clock runs from the end of the second step of an epoch to the end of its last.
Set-up, the losses for ``history`` and checkpoints lie outside. Pictures and labels are random: they cost the same. An
image counts once, however many views a method makes of it. Writes ``benchmarks/results/training.csv``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import common
import numpy as np
import torch
from lightning_fabric import Fabric

from mia_utils import pretrain, seeds
from mia_utils.models import views
from mia_utils.pretrain import mae

MODELS = (
    "mae:vit_micro_patch8_32", "simmim:vit_micro_patch8_32", "dino:vit_micro_patch8_32", "moco:vit_micro_patch8_32",
    "simclr:vit_micro_patch8_32", "supervised:vit_micro_patch8_32", "moco-v2:resnet_thin_32", "simclr:resnet_thin_32",
)  # fmt: skip
TARGET = 0.75  # of forward + backward
WARM_UP = 2  # steps of fit before its clock runs: the first one makes the optimizer's state
N_CLASSES = 10


@contextlib.contextmanager
def replace_draws(replace: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace what draws views and masks inside a loss by ``replace(of itself)``."""
    with (
        mock.patch.object(views, "augment", replace(views.augment)),
        mock.patch.object(mae, "draw_masks", replace(mae.draw_masks)),
    ):
        yield


def measure(name: str, arch: str, options: argparse.Namespace, run: dict) -> list[dict]:
    """Time the ways for one method on one backbone."""
    cls, defaults = pretrain.METHODS[name]
    supervised = getattr(cls, "needs_labels", False)
    batch, n_steps = options.batch or defaults["batch_size"], WARM_UP + options.steps
    extra = {"n_classes": N_CLASSES} if supervised else {}
    method = pretrain.build(name, arch, seed=options.seed, **extra).train().to(options.device)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in method.modules()):
        method.to(memory_format=torch.channels_last)  # as fit does
    start = copy.deepcopy(method.state_dict())
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.0, fused=True)
    fabric = Fabric(accelerator=options.device, devices=1, precision=options.precision)
    size, rng = method.input_size, np.random.default_rng(options.seed)
    images = rng.integers(0, 256, (batch * n_steps, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, N_CLASSES, len(images))
    first = seeds.rng(options.seed, "train-order", 0).permutation(len(images))[:batch]  # the first batch of fit
    x = torch.from_numpy(images[first]).permute(0, 3, 1, 2).contiguous().to(options.device)
    y = {"labels": torch.from_numpy(labels[first]).to(options.device)} if supervised else {}

    def read_clock() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return common.CLOCKS[run["clock"]]()

    def compute_loss() -> torch.Tensor:
        draws = seeds.rng(options.seed, "train-views", 0, 0)  # those of fit's first step
        with fabric.autocast():
            return method.loss(x, augmentation=defaults["augmentation"], size=size, rng=draws, progress=0.0, **y)

    calls = []  # what one step draws: function, its arguments, what it gave

    def record(function: Callable) -> Callable:
        def call(*arguments, **settings):
            calls.append((function, arguments, settings, function(*arguments, **settings)))
            return calls[-1][-1]

        return call

    def replay(_: Callable) -> Callable:
        return lambda *_, **__: next(ready)

    with replace_draws(record):
        drawn_loss = compute_loss().item()
    ready = itertools.cycle([made for *_, made in calls])
    method.load_state_dict(start)  # a queue, a center, running means have moved
    with replace_draws(replay):
        ready_loss = compute_loss().item()

    def run_bare() -> float:
        with replace_draws(replay):
            began = read_clock()
            for _ in range(options.steps):
                optimizer.zero_grad(set_to_none=True)
                compute_loss().backward()
            return read_clock() - began

    def run_draws() -> float:
        began = read_clock()
        for _ in range(options.steps):
            for function, arguments, settings, _made in calls:
                function(*arguments, **settings)
        return read_clock() - began

    def run_updates() -> float:  # on the gradients that forward + backward left
        began = read_clock()
        for _ in range(options.steps):
            optimizer.step()
            method.after_step(0.5)
        return read_clock() - began

    def run_fit() -> float:
        losses, marks, steps = [], [], itertools.count(1)

        class Watched(cls):
            """The method, and the time at the end of two of its steps."""

            def loss(self, *arguments, **settings):
                value = super().loss(*arguments, **settings)
                if self.training and not losses:
                    losses.append(value.item())
                return value

            def after_step(self, progress: float) -> None:
                super().after_step(progress)
                if next(steps) in (WARM_UP, n_steps):
                    marks.append(read_clock())

        how = dict(epochs=1, checkpoints=(), batch_size=batch, seed=options.seed, progress=False)
        how |= dict(device=options.device, precision=options.precision, labels=labels if supervised else None)
        with mock.patch.dict(pretrain.METHODS, {name: (Watched, defaults)}):
            pretrain.fit(name, images, arch=arch, **how, **extra)
        tolerance = 0 if options.device == "cpu" else 1e-2  # on a GPU sums come in any order
        if not np.allclose([losses[0], ready_loss], drawn_loss, rtol=tolerance, atol=0):
            raise RuntimeError(f"{name}: the ways compute {losses[0]}, {ready_loss} and {drawn_loss} for one batch")
        return marks[1] - marks[0]

    ways = {
        "forward + backward": run_bare,
        "fit": run_fit,
        "views and masks": run_draws,
        "updates": run_updates,
    }
    seconds = {way: [] for way in ways}
    for repeat in range(-1, options.repeats):  # the first round warms up
        for way in ways:
            taken = ways[way]()
            if repeat >= 0:
                seconds[way].append(taken)
    return common.make_rows(
        seconds,
        n=options.steps * batch,
        unit="images/s",
        baseline="forward + backward",
        run=run,
        what=f"{name} {arch}, {batch} images a step",
        target={"fit": TARGET},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all models, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="METHOD:ARCH ...")
    parser.add_argument("--steps", type=int, default=6, help="steps per repeat")
    parser.add_argument("--batch", type=int, default=0, help="images per step; 0: the method's own")
    parser.add_argument("--precision", default="32-true", help="of lightning-fabric, for example bf16-mixed")
    common.add_arguments(parser)
    options = parser.parse_args(arguments)
    run = common.describe_run(options)
    rows = [row for model in options.models for row in measure(*model.split(":"), options, run)]
    common.write_table(rows, "training", options.results)


if __name__ == "__main__":
    main()

"""How fast is PartCrop? Features and the whole attack, the published way against ours and against the bare encoder.

    python benchmarks/partcrop.py [--quick] [--repeats 5] [--threads 1] [--device cpu] [--workers 0]

Features, four ways in turn within one run:
- *published path*: a DataLoader that cuts every crop with torchvision transforms, one forward per batch;
- *ours, float32*: ``attacks.partcrop.extract_features``, from uint8 images to features;
- *ours, bf16*: the same over an encoder under autocast (scores are made in float32, see the largest difference);
- *bare encoder*: the forwards on ready, normalized crops and views, in the same batches: the limit, and ratio 1.

The whole attack, on an encoder trained here (MAE on generated pictures): the published schedule cuts and embeds the
crops of all known images anew in each of the attacker's epochs, ours does so once and fits the attacker on the cache.
Both query every image with the same view, so their AUCs may be compared. The released code also scores the images it
reports on before the first and after every epoch and at the end; that is measured with ``--score-every-epoch``, else
computed from one scoring. The last rows give the paper's size, computed from the features measured above. Weights of
the feature rows are random: they cost the same. Writes ``benchmarks/results/partcrop.csv``; ``--quick`` leaves out
ViT-B/16.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from common import CLOCKS, add_arguments, describe_run, make_rows, time_ways, write_table
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, Resize, ToTensor
from torchvision.transforms import functional as F

from mia_utils import datasets, pretrain, seeds
from mia_utils.attacks import network, partcrop
from mia_utils.models import encoders, views
from mia_utils.protocol import metrics

BICUBIC = F.InterpolationMode.BICUBIC
# arch -> images per call, crops per image
MODELS = {"vit_micro_patch8_32": (64, 128), "vit_small_patch8_32": (8, 128), "vit_base_patch16_224": (2, 16)}
TARGETS = {"vit_micro_patch8_32": 0.6, "vit_small_patch8_32": 0.75}  # of the bare encoder
TARGET = 100  # times less than the published schedule
PAPER = {"arch": "vit_small_patch8_32", "known": 10_000, "reported": 10_000, "epochs": 100, "steps": 5_000}


class PublishedCrops(Dataset):
    """Images as the released code feeds them: (K, 3, s, s) crops and (3, S, S) view, transformed one by one.

    Args:
        images: (N, H, W, 3) uint8.
        encoder: its input size and normalization.
        n_crops: crops per image.
        boxes, flips: (N, K, 4) and (N, K) crops to cut; None draws new ones at every visit, from the global stream.
    """

    def __init__(self, images, encoder, n_crops: int, *, boxes: Tensor | None = None, flips: Tensor | None = None):
        size = encoder.input_size
        self.images, self.n_crops, self.boxes, self.flips = images, n_crops, boxes, flips
        self.crop_size = partcrop.get_crop_size(size)
        self.view = Resize((size, size), interpolation=BICUBIC)
        self.draw = Compose(
            [RandomResizedCrop(self.crop_size, (0.08, 0.2), interpolation=BICUBIC), RandomHorizontalFlip()]
        )
        self.normalize = Compose([ToTensor(), Normalize(encoder._mean.flatten(), encoder._std.flatten())])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        whole = self.view(Image.fromarray(self.images[i]))
        crops = [self.normalize(self.cut(whole, i, k)) for k in range(self.n_crops)]
        return torch.stack(crops), self.normalize(whole)

    def cut(self, whole: Image.Image, i: int, k: int) -> Image.Image:
        """One crop of the view, 8 to 20 % of its area."""
        if self.boxes is None:
            return self.draw(whole)
        crop = F.resized_crop(whole, *self.boxes[i, k].tolist(), [self.crop_size] * 2, BICUBIC)
        return F.hflip(crop) if self.flips[i, k] else crop


def read(encoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode normalized images with nothing around the network: the encoder's own vector and its tokens."""
    cls, tokens = encoder._forward(x)
    return (cls if encoder.pooling == "cls" else tokens.mean(1)), tokens


@torch.inference_mode()
def extract_published(encoder, data: PublishedCrops, *, batch: int, workers: int = 0, seed: int = 0) -> Tensor:
    """Features (N, 2K) the published way, in the order of the images."""
    features = []
    for crops, whole in DataLoader(data, batch_size=batch, num_workers=workers):
        parts = read(encoder, crops.flatten(0, 1).to(encoder.device))[0].unflatten(0, crops.shape[:2])
        tokens = read(encoder, whole.to(encoder.device))[1]
        features.append(partcrop.part_energies(parts, tokens, seed=seed).cpu())
    return torch.cat(features)


class InBfloat16:
    """An encoder whose forwards run under autocast."""

    def __init__(self, encoder):
        self.encoder = encoder

    def __getattr__(self, name: str):
        return getattr(self.encoder, name)

    def tokens(self, images: Tensor) -> Tensor:
        """As ``Encoder.tokens``."""
        with torch.autocast(self.encoder.device.type, torch.bfloat16):
            return self.encoder.tokens(images)

    def embed(self, images: Tensor, pooling: str | None = None) -> Tensor:
        """As ``Encoder.embed``."""
        with torch.autocast(self.encoder.device.type, torch.bfloat16):
            return self.encoder.embed(images, pooling)


def make_ready(encoder, images: np.ndarray, ids: list[str], n_crops: int, *, batch: int, seed: int) -> list[tuple]:
    """Cut and normalize what :func:`partcrop.extract_features` sends to the encoder, batch by batch."""
    ready, size = [], encoder.input_size
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        pixels = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).to(encoder.device)
        whole = views.make_views(pixels, ids[rows], size=size, seed=seed)
        boxes, flips = views.draw_boxes(ids[rows], n_crops, height=size, width=size, seed=seed, stream="partcrop")
        crops = views.resized_crop(whole, boxes, partcrop.get_crop_size(size), flips=flips)
        ready.append((encoder._prepare(crops.flatten(0, 1)), encoder._prepare(whole)))
    return ready


def measure_features(arch: str, n: int, n_crops: int, options: argparse.Namespace, run: dict) -> list[dict]:
    """Time the four ways over one encoder."""
    encoder = encoders.make(arch, seed=options.seed).to(options.device)
    pool = datasets.load("scenes", size=encoder.input_size, n=n, seed=options.seed)
    images, ids = pool.images, [str(i) for i in range(n)]
    batch = min(n, partcrop.get_chunk(encoder, n_crops, partcrop.get_crop_size(encoder.input_size)))
    ready = make_ready(encoder, images, ids, n_crops, batch=batch, seed=options.seed)
    published = PublishedCrops(images, encoder, n_crops)

    def extract(model) -> Tensor:
        return partcrop.extract_features(
            model, images, image_ids=ids, n_crops=n_crops, seed=options.seed, batch_size=batch
        )

    @torch.inference_mode()
    def run_bare():
        for crops, whole in ready:
            read(encoder, crops), read(encoder, whole)

    ways = {
        "published path": lambda: extract_published(encoder, published, batch=batch, workers=options.workers),
        "ours, float32": lambda: extract(encoder),
        "ours, bf16": lambda: extract(InBfloat16(encoder)),
        "bare encoder": run_bare,
    }
    moved = (ways["ours, bf16"]() - ways["ours, float32"]()).abs().max()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        seconds = time_ways(ways, options.repeats, run["clock"])
    return make_rows(
        seconds,
        n=n,
        unit="images/s",
        baseline="bare encoder",
        run=run,
        what=f"features, {arch}, {n_crops} crops, {batch} images a forward",
        target={"ours, float32": TARGETS.get(arch)},
        largest_difference={"ours, bf16": round(float(moved), 3)},
    )


def attack_as_published(
    encoder, images: np.ndarray, is_member: np.ndarray, roles: dict, options: argparse.Namespace, clock
) -> tuple[np.ndarray, list[float], list[float]]:
    """Fit the attacker on features made anew in every epoch; score the reported images.

    Args:
        images, is_member: (N, H, W, 3) uint8, (N,) bool.
        roles: "known" and "reported" -> positions.

    Returns:
        Scores of the reported images after the last epoch, higher = more likely a member; seconds of every epoch, and
        of every scoring.
    """
    net = network.make_network(2 * options.attack_crops, widths=(512, 256, 128), seed=options.seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=5e-4)
    known, epochs, scorings = roles["known"], [], []
    members, strangers = known[is_member[known]], known[~is_member[known]]

    def extract(rows: np.ndarray, *names) -> Tensor:
        seed = seeds.derive(options.seed, "published", *names)
        torch.manual_seed(seed)  # of the crops; the normals of the Gaussian energy are drawn anew as well
        data = PublishedCrops(images[rows], encoder, options.attack_crops)
        return extract_published(encoder, data, batch=100, workers=options.workers, seed=seed)

    def score(epoch: int) -> np.ndarray:
        began = clock()
        with torch.inference_mode():
            scores = net(extract(roles["reported"], "score", epoch))[:, 0].double().numpy()
        scorings.append(clock() - began)
        return scores

    if options.score_every_epoch:
        score(0)
    for epoch in range(1, options.attack_epochs + 1):
        began = clock()
        rng = seeds.rng(options.seed, "published-order", epoch)
        pairs = np.stack([rng.permutation(members), rng.permutation(strangers)])
        for start in range(0, len(members), 100):  # 100 members and 100 strangers a step
            rows = pairs[:, start : start + 100].ravel()
            features, target = extract(rows, epoch, start).clone(), torch.from_numpy(is_member[rows]).float()
            loss = nn.functional.binary_cross_entropy_with_logits(net(features)[:, 0], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        epochs.append(clock() - began)
        if options.score_every_epoch:
            score(epoch)
    return score(options.attack_epochs + 1), epochs, scorings


def attack_from_cache(
    encoder, images: np.ndarray, is_member: np.ndarray, roles: dict, options: argparse.Namespace
) -> np.ndarray:
    """Extract features once, fit the attacker on them, score the reported images."""
    ids = [str(i) for i in range(len(images))]
    features = partcrop.extract_features(
        encoder, images, image_ids=ids, n_crops=options.attack_crops, seed=options.seed
    ).numpy()
    known = roles["known"]
    held = np.concatenate([known[is_member[known] == c][::4] for c in (True, False)])  # a quarter picks the epoch
    fit = np.setdiff1d(known, held)
    attacker = network.fit(
        features[fit], is_member[fit], validation=(features[held], is_member[held]), seed=options.seed
    )
    return attacker.score(features[roles["reported"]])


def measure_attack(options: argparse.Namespace, run: dict) -> list[dict]:
    """Train a target, attack it both ways."""
    n_members, n_reported = 2 * options.attack_known, options.attack_reported
    if n_reported <= options.attack_known:
        raise SystemExit(f"expected --attack-reported above --attack-known {n_members // 2}, got {n_reported}")
    n = n_members + n_reported
    pool = datasets.load("scenes", n=n, seed=options.seed)
    is_member = np.arange(n) < n_members
    # known: half of the members and as many strangers; reported: all others
    known = np.r_[: options.attack_known, n_members : n_members + options.attack_known]
    roles = {"known": known, "reported": np.setdiff1d(np.arange(n), known)}
    target = pretrain.fit(
        "mae",
        pool.images[:n_members],
        arch=options.attack_arch,
        epochs=options.train_epochs,
        seed=options.seed,
        augmentation="none",
        checkpoints=[],
        progress=False,
        device=options.device,
    )
    encoder = target.encoder.to(options.device)
    clock = CLOCKS[run["clock"]]
    with torch.random.fork_rng(devices=[]):
        published, epochs, scorings = attack_as_published(encoder, pool.images, is_member, roles, options, clock)
    ours = {}

    def run_ours():
        ours["score"] = attack_from_cache(encoder, pool.images, is_member, roles, options)

    n_scorings = options.attack_epochs + 2
    released = sum(epochs) + n_scorings * float(np.mean(scorings))
    how = "measured" if options.score_every_epoch else "computed from one scoring"
    first = f"published schedule as released, scored {n_scorings} times ({how})"
    seconds = {
        first: [released],
        "published schedule, scored once": [sum(epochs) + scorings[-1]],
        "ours": time_ways({"ours": run_ours}, min(3, options.repeats), run["clock"])["ours"],
    }
    results = {}
    for name in seconds:
        score = ours["score"] if name == "ours" else published
        results[name] = metrics.evaluate(score, is_member[roles["reported"]])
    what = f"attack, {options.attack_arch}, {len(known)} known, {n_reported} reported, {options.attack_crops} crops"
    return make_rows(
        seconds,
        n=1,
        unit="attacks/s",
        baseline=first,
        run=run,
        what=f"{what}, {options.attack_epochs} epochs",
        target={"ours": TARGET},
        seconds={name: round(float(np.median(taken)), 2) for name, taken in seconds.items()},
        auc={name: round(result.auc, 3) for name, result in results.items()},
        auc_low={name: round(result.auc_low, 3) for name, result in results.items()},
        auc_high={name: round(result.auc_high, 3) for name, result in results.items()},
    )


def extrapolate_attack(features: list[dict], options: argparse.Namespace, run: dict) -> list[dict]:
    """Compute both ways at the paper's size from images/s measured here and the time of 100 attacker steps."""
    rates = {row["what"].rsplit(": ", 1)[1]: row["rate"] for row in features}
    n_features, n_steps = 256, 100
    known = np.random.default_rng(options.seed).normal(size=(PAPER["known"], n_features)).astype(np.float32)
    y = np.arange(len(known)) % 2 == 0

    def step():
        network.fit(known, y, validation=(known[:100], y[:100]), epochs=1, steps_per_epoch=n_steps, patience=None)

    attacker = np.median(time_ways({"": step}, 3, run["clock"])[""]) / n_steps * PAPER["steps"]
    visits = PAPER["epochs"] * PAPER["known"] + (PAPER["epochs"] + 2) * PAPER["reported"]
    seconds = {
        "published schedule as released": [visits / rates["published path"] + attacker],
        "ours": [(PAPER["known"] + PAPER["reported"]) / rates["ours, float32"] + attacker],
    }
    return make_rows(
        seconds,
        n=1,
        unit="attacks/s",
        baseline="published schedule as released",
        run=run,
        what=f"attack at the paper's size, {PAPER['arch']}, {PAPER['known']} known, {PAPER['reported']} reported, "
        "128 crops, 100 epochs, extrapolated from the images/s above",
        target={"ours": TARGET},
        seconds={name: round(taken[0]) for name, taken in seconds.items()},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without ViT-B/16")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(encoders.ARCHS) + list(MODELS))
    parser.add_argument("--images", type=int, help="per call, instead of each model's own number")
    parser.add_argument("--crops", type=int, help="per image, instead of each model's own number")
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader; the processor's clock misses them")
    parser.add_argument("--attack-arch", default="vit_micro_patch8_32")
    for name, default in (("known", 96), ("reported", 400), ("crops", 32), ("epochs", 100)):
        parser.add_argument(f"--attack-{name}", type=int, default=default)
    parser.add_argument("--train-epochs", type=int, default=300, help="of the attacked encoder")
    parser.add_argument("--score-every-epoch", action="store_true", help="measure the released schedule in full")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    run = describe_run(options)
    rows, extrapolated = [], []
    for arch in options.models:
        if options.quick and arch == "vit_base_patch16_224":
            continue
        n, n_crops = MODELS.get(arch, (16, 128))
        rows += measure_features(arch, options.images or n, options.crops or n_crops, options, run)
        if arch == PAPER["arch"] and (options.crops or n_crops) == 128:
            extrapolated = extrapolate_attack(rows[-4:], options, run)
    rows += measure_attack(options, run) + extrapolated
    write_table(rows, "partcrop", options.results)


if __name__ == "__main__":
    main()

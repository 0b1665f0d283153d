"""Train the models of a profile: ``python -m mia_utils.runner.train PROFILE MODEL_ID [MODEL_ID ...]``.

A row finds its artifact or makes it, and goes on inside a training that was killed. With ``torchrun --nproc-per-node N
-m`` in front, N GPUs or processes make the same artifact: a batch stays as large as the row says.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia_utils import paths
from mia_utils.runner import artifacts, choices, profiles

if TYPE_CHECKING:
    import numpy as np

    from mia_utils.datasets import Pool
    from mia_utils.pretrain import Run
    from mia_utils.protocol.splits import Split
    from mia_utils.runner.profiles import Profile, Row

UTILITY_IMAGES = (5000, 2000)  # fit and test images of k-NN and linear probe, outside all four roles
HELDOUT_IMAGES = 256  # non-members whose loss is drawn beside the members'


def spec_of(profile: Profile, row: Row) -> dict[str, Any]:
    """Return what the model of a row depends on; needs neither torch nor the pixels."""
    keys = {"role", "method", "arch", "n_train", "epochs", "augmentation", "defense", "seed", "options"}
    readable = f"{row.method}-{row.role}-{row.dataset.split(':')[0]}-n{row.n_train}-s{row.seed}"
    data = artifacts.fingerprint_data(row.dataset, profile.datasets.get(row.dataset, {}))
    head = {"kind": "encoder", "readable": readable, "recipe": artifacts.RECIPES["encoder"]}
    return head | {"data": data, "split": profile.get_split(row.dataset)} | row.model_dump(include=keys)


def load_pool(profile: Profile, dataset: str) -> Pool:
    """Load a data set with the arguments the profile gives it; from here on products have the CPU's own speed."""
    from mia_utils import datasets
    from mia_utils.models.backbones import use_fast_products

    use_fast_products()  # whoever builds models of a profile loads its images before
    return datasets.load(dataset, **profile.datasets.get(dataset, {}))


def draw_split(profile: Profile, row: Row, pool: Pool) -> Split:
    """Draw the split of a row; a target and its shadow (same n_train and seed) share it."""
    from mia_utils.protocol import splits

    return splits.draw(pool, n_members=row.n_train, seed=row.seed, **profile.get_split(row.dataset))


def measure_utility(encoder, pool: Pool, split: Split, *, seed: int = 0) -> dict[str, float]:
    """Measure accuracy of 20 nearest neighbors and a linear probe outside all four roles; empty below 50 images."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from mia_utils import datasets, seeds

    outside = seeds.rng(seed, "utility").permutation(split.utility)
    n_fit, n_test = UTILITY_IMAGES
    if len(outside) < n_fit + n_test:
        n_fit = len(outside) * 5 // 7
    if n_fit < 35:
        return {}
    outside = outside[: n_fit + n_test]
    chunks = [outside[start : start + 512] for start in range(0, len(outside), 512)]
    with torch.inference_mode():
        vectors = [encoder.embed(datasets.to_float(pool.images[chunk])).float().cpu() for chunk in chunks]
    vectors, labels = torch.cat(vectors).numpy(), pool.labels[outside]
    models = {"knn": KNeighborsClassifier(min(20, n_fit), metric="cosine")}
    models["probe"] = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    fitted = {name: model.fit(vectors[:n_fit], labels[:n_fit]) for name, model in models.items()}
    return {name: float(model.score(vectors[n_fit:], labels[n_fit:])) for name, model in fitted.items()}


def measure_segmenter(segmenter, pool: Pool, members: np.ndarray, nonmembers: np.ndarray) -> dict[str, float]:
    """Measure mIoU and pixel accuracy on non-members, and mIoU on members (the gap is what leaks)."""
    from mia_utils.models.segmenters import measure_iou

    inside, outside = (measure_iou(segmenter, pool.images[idx], pool.masks[idx]) for idx in (members, nonmembers))
    return {"miou": outside["miou"], "pixel_accuracy": outside["pixel_accuracy"], "miou_members": inside["miou"]}


def get_sides(row: Row, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the images that train a row, and the non-members of its role; positions in the pool."""
    if row.role == "reference":
        return split.reference(row.n_train), split.shadow_nonmembers
    return getattr(split, f"{row.role}_members"), getattr(split, f"{row.role}_nonmembers")


def fit_row(profile: Profile, row: Row, folder: Path | None, *, progress: bool) -> dict[str, Any]:
    """Train the model of a row and write it to a folder, if there is one; returns what its ``meta.json`` tells."""
    from mia_utils import pretrain

    pool = load_pool(profile, row.dataset)
    split = draw_split(profile, row, pool)
    members, nonmembers = get_sides(row, split)
    nonmembers, segments = nonmembers[:HELDOUT_IMAGES], row.method in choices.SEGMENTERS
    targets, options = pool.masks if segments else pool.labels, {}
    if segments:
        if targets is None:
            raise ValueError(f"model {row.id}: {row.method} needs label maps, data set {pool.name!r} has none")
        options = {"n_classes": len(pool.mask_class_names or pool.class_names)}
        if row.options.get("minmax"):  # the owner's own, and no report image: the shadow's side
            others = split.shadow_members
            options |= {"reference": pool.images[others], "reference_labels": targets[others]}
    elif row.method == "supervised":
        options = {"n_classes": len(pool.class_names)}

    def measure(epoch: int, model) -> dict[str, float]:
        if segments:
            return measure_segmenter(model, pool, members, nonmembers)
        # of what is attacked; a reference row trains on images that measure the utility of others
        return measure_utility(model, pool, split) if epoch in (0, row.epochs) and row.role == "target" else {}

    sides = dict(labels=targets[members], heldout=pool.images[nonmembers], heldout_labels=targets[nonmembers])
    recipe = dict(arch=row.arch, epochs=row.epochs, augmentation=row.augmentation, **options, **row.options)
    resume, seed = artifacts.get_work_dir(spec_of(profile, row)) / "resume.pt", pretrain.derive_seed(row.seed, row.role)
    recipe |= dict(seed=seed, resume_path=resume, on_checkpoint=measure, progress=progress)
    run = pretrain.fit(row.method, pool.images[members], **sides, **recipe)
    if folder is None:
        return {}
    run.save(folder)
    split.save(folder / "split.npz")  # the membership mask is kept with the model
    utility, history = {}, run.history
    if "knn" in history:
        first, last = history.iloc[0], history.iloc[-1]
        utility = {"knn": last.knn, "probe": last.probe, "knn_untrained": first.knn, "probe_untrained": first.probe}
    if "miou" in history:
        utility = {key: history[key].dropna().iloc[-1] for key in ("miou", "miou_members", "pixel_accuracy")}
    return {"settings": run.settings, "train_seconds": round(run.seconds, 2), "utility": utility, "id": row.id}


def rehearse(profile: Profile, row: Row) -> None:
    """Take one step of a row on a few empty images; whatever network and options refuse is a ValueError of one line."""
    import numpy as np
    import torch

    from mia_utils import pretrain
    from mia_utils.datasets import cache
    from mia_utils.pretrain import accounting

    segments, size = row.method in choices.SEGMENTERS, profile.datasets[row.dataset].get("size", 32)
    shape = ((size, size) if isinstance(size, int) else tuple(size)) if segments else (32, 32)
    fitted = {key: value for key, value in row.options.items() if key in choices.FIT_OPTIONS and key != "checkpoints"}
    own = {key: value for key, value in row.options.items() if key not in choices.FIT_OPTIONS}
    own |= {"n_classes": 19} if segments or row.method == "supervised" else {}
    batch = min(fitted.pop("batch_size", pretrain.METHODS[row.method][1]["batch_size"]), row.n_train)
    few = min(batch, 2 * own.get("bn_splits", 1))
    images = np.zeros((2 * few, *shape, 3), np.uint8)
    labels = np.zeros((2 * few, *(shape if segments else ())), np.int64)
    others = {"reference": images, "reference_labels": labels} if own.get("minmax") else {}
    said = io.StringIO()
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(said):
            if privacy := fitted.get("privacy"):
                steps = row.epochs * max(row.n_train // batch, 1)
                accounting.plan_privacy(n_images=row.n_train, batch_size=batch, steps=steps, **privacy)
            with torch.device("meta"):  # no bytes yet
                n_bytes = 4 * sum(w.numel() for w in pretrain.build(row.method, row.arch, **own).parameters())
            if 4 * n_bytes > cache.count_memory():  # weights, gradients, two moments
                raise ValueError(f"{4 * n_bytes / 1e9:,.0f} GB to train it do not fit into the memory")
            own |= {"queue_size": few} if "queue_size" in choices.METHOD_OPTIONS[row.method] else {}
            recipe = dict(arch=row.arch, epochs=1, augmentation=row.augmentation, batch_size=few, labels=labels)
            settings = dict(checkpoints=[], stop_after=1, progress=False, device="cpu")
            pretrain.fit(row.method, images, **recipe, **settings, **others, **fitted, **own)
    except Exception as error:  # libraries raise a dozen types
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise ValueError(f"model {row.id}: {row.method} on {row.arch}: {reason}") from None


def train_row(profile: Profile, row: Row, *, progress: bool = True) -> Path:
    """Train the model of a row, or find it; returns the folder of its artifact (in every process of ``torchrun``)."""
    from mia_utils.pretrain import distributed  # torch takes seconds: a plan needs spec_of only

    spec = spec_of(profile, row)
    if found := distributed.share(artifacts.find(spec)):
        return found

    def make(folder: Path) -> dict[str, Any]:  # not called where another job was faster
        distributed.share("train")
        return fit_row(profile, row, folder, progress=progress)

    if distributed.get_rank() == 0:  # it alone holds the lock of the artifact
        return distributed.share(artifacts.load_or_make(spec, make))
    if (answer := distributed.share(None)) == "train":
        fit_row(profile, row, None, progress=progress)
        answer = distributed.share(None)
    return answer


def load_run(folder: Path) -> Run:
    """Read the training that an artifact holds; a file that is missing or changed is a ValueError that names it."""
    from safetensors import SafetensorError

    from mia_utils import pretrain
    from mia_utils.models.backbones import use_fast_products

    use_fast_products()
    artifacts.verify(folder)
    meta = artifacts.read_meta(folder)
    try:
        settings, seconds = meta["settings"], meta["train_seconds"]
        last = f"epoch-{settings['epochs']:06d}.safetensors"
        if not (folder / last).is_file():  # without digests, the checkpoint before it would be taken for the end
            raise ValueError(f"{last} is missing")
        return pretrain.Run.load(folder, settings=settings, seconds=seconds, utility=meta.get("utility", {}))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise artifacts.Damaged(folder.name, f"can't be read ({error})") from None


def main(arguments: list[str]) -> int:
    """Train the named rows one after the other; returns the exit code."""
    if len(arguments) < 2:
        print("usage: python -m mia_utils.runner.train PROFILE MODEL_ID [MODEL_ID ...]", file=sys.stderr)
        return 2
    rank = 0
    try:
        profile = profiles.load(arguments[0])
        rows = [profile.row(model_id) for model_id in arguments[1:]]
        n_threads = paths.get_threads()
        import torch  # seconds: after the arguments are checked

        from mia_utils.pretrain import distributed

        torch.set_num_threads(n_threads or torch.get_num_threads())
        rank = distributed.get_rank()
        for row in rows:
            folder = train_row(profile, row, progress=sys.stderr.isatty())
            if not rank:
                print(f"{row.id}: {folder.name} ({artifacts.read_meta(folder)['train_seconds']:.0f} s)", flush=True)
    except (ValueError, FileNotFoundError) as error:
        print(f"process {rank}: {error}" if rank else error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

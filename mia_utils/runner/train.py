"""Train the models of a profile: ``python -m mia_utils.runner.train PROFILE MODEL_ID [MODEL_ID ...]``.

One row is one job: it finds its artifact or makes it, goes on inside a training that was killed, and writes the very
folder that the notebooks look for. ``torchrun --nproc-per-node N -m mia_utils.runner.train PROFILE MODEL_ID`` trains
a row on N GPUs, or in N processes on the CPU, to the same artifact: a batch stays as large as the row says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia_utils import paths
from mia_utils.runner import artifacts, profiles

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
    keys = ("role", "method", "arch", "n_train", "epochs", "augmentation", "defense", "seed", "options")
    return {
        "kind": "encoder",
        "readable": f"{row.method}-{row.role}-{row.dataset.split(':')[0]}-n{row.n_train}-s{row.seed}",
        "recipe": artifacts.RECIPES["encoder"],
        "data": artifacts.fingerprint_data(row.dataset, profile.datasets.get(row.dataset, {})),
        "split": profile.get_split(row.dataset),
        **{key: getattr(row, key) for key in keys},
    }


def load_pool(profile: Profile, dataset: str) -> Pool:
    """Load a data set with the arguments the profile gives it."""
    from mia_utils import datasets

    return datasets.load(dataset, **profile.datasets.get(dataset, {}))


def draw_split(profile: Profile, row: Row, pool: Pool) -> Split:
    """Draw the split of a row; a target and its shadow (same n_train and seed) share it."""
    from mia_utils.protocol import splits

    return splits.draw(pool, n_members=row.n_train, seed=row.seed, **profile.get_split(row.dataset))


def measure_utility(encoder, pool: Pool, split: Split, *, seed: int = 0) -> dict[str, float]:
    """Measure k-NN and linear-probe accuracy on images outside all four roles.

    Returns:
        dict: ``knn`` (20 neighbors, cosine) and ``probe`` (logistic regression) accuracy in [0, 1], empty when fewer
        than 50 such images are left.
    """
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
    knn = KNeighborsClassifier(min(20, n_fit), metric="cosine")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    return {
        name: float(model.fit(vectors[:n_fit], labels[:n_fit]).score(vectors[n_fit:], labels[n_fit:]))
        for name, model in (("knn", knn), ("probe", probe))
    }


def measure_segmenter(segmenter, pool: Pool, members: np.ndarray, nonmembers: np.ndarray) -> dict[str, float]:
    """Measure mIoU and pixel accuracy on non-members, and mIoU on members (the gap is what leaks)."""
    from mia_utils.models.segmenters import measure_iou

    outside = measure_iou(segmenter, pool.images[nonmembers], pool.masks[nonmembers])
    inside = measure_iou(segmenter, pool.images[members], pool.masks[members])
    return {"miou": outside["miou"], "pixel_accuracy": outside["pixel_accuracy"], "miou_members": inside["miou"]}


def get_sides(row: Row, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the images that train a row, and the non-members of its role; positions in the pool."""
    if row.role == "reference":
        return split.reference(row.n_train), split.shadow_nonmembers
    return getattr(split, f"{row.role}_members"), getattr(split, f"{row.role}_nonmembers")


def train_row(profile: Profile, row: Row, *, progress: bool = True) -> Path:
    """Train the model of a row, or find it; returns the folder of its artifact (in every process of ``torchrun``)."""
    from mia_utils import pretrain  # torch takes seconds: a plan needs spec_of only
    from mia_utils.pretrain import distributed

    spec = spec_of(profile, row)
    found = distributed.share(artifacts.find(spec))
    if found:
        return found
    pool = load_pool(profile, row.dataset)
    split = draw_split(profile, row, pool)
    members, nonmembers = get_sides(row, split)
    nonmembers = nonmembers[:HELDOUT_IMAGES]

    def make(folder: Path | None) -> dict[str, Any]:
        """Train; write only where there is a folder."""

        def measure(epoch: int, encoder) -> dict[str, float]:
            # a reference row trains on images that measure the utility of others
            ends = (0, row.epochs) if row.role != "reference" else ()
            if segmenting:
                return measure_segmenter(encoder, pool, members, nonmembers)
            return measure_utility(encoder, pool, split) if epoch in ends else {}

        segmenting = row.method in profiles.SEGMENTERS
        targets, options = pool.labels, {}
        if segmenting:
            if pool.masks is None:
                raise ValueError(f"model {row.id}: {row.method} needs label maps, data set {pool.name!r} has none")
            targets, options = pool.masks, {"n_classes": len(pool.mask_class_names or pool.class_names)}
            if row.options.get("minmax"):  # the owner's own, and no report image: the shadow's side
                others = split.shadow_members
                options |= {"reference": pool.images[others], "reference_labels": targets[others]}
        elif row.method == "supervised":
            options = {"n_classes": len(pool.class_names)}
        run = pretrain.fit(
            row.method,
            pool.images[members],
            labels=targets[members],
            heldout=pool.images[nonmembers],
            heldout_labels=targets[nonmembers],
            arch=row.arch,
            epochs=row.epochs,
            seed=pretrain.derive_seed(row.seed, row.role),
            augmentation=row.augmentation,
            resume_path=artifacts.get_work_dir(spec) / "resume.pt",
            on_checkpoint=measure,
            progress=progress,
            **options,
            **row.options,
        )
        if folder is None:
            return {}
        run.save(folder)
        split.save(folder / "split.npz")  # the membership mask is kept with the model
        ends = {}
        if "knn" in run.history:
            first, last = run.history.iloc[0], run.history.iloc[-1]
            ends = {"knn": last.knn, "probe": last.probe, "knn_untrained": first.knn, "probe_untrained": first.probe}
        if "miou" in run.history:
            ends = {key: run.history[key].dropna().iloc[-1] for key in ("miou", "miou_members", "pixel_accuracy")}
        return {"settings": run.settings, "train_seconds": round(run.seconds, 2), "utility": ends, "id": row.id}

    def start(folder: Path) -> dict[str, Any]:  # not called where another job was faster
        distributed.share("train")
        return make(folder)

    if distributed.get_rank() == 0:  # it alone holds the lock of the artifact
        return distributed.share(artifacts.load_or_make(spec, start))
    answer = distributed.share(None)
    if answer == "train":
        make(None)
        answer = distributed.share(None)
    return answer


def load_run(folder: Path) -> Run:
    """Read the training that an artifact holds; a file that is missing or changed is a ValueError that names it."""
    from safetensors import SafetensorError

    from mia_utils import pretrain

    artifacts.verify(folder)
    meta = artifacts.read_meta(folder)
    try:
        settings, seconds = meta["settings"], meta["train_seconds"]
        last = f"epoch-{settings['epochs']:06d}.safetensors"
        if not (folder / last).is_file():  # without digests, the checkpoint before it would be taken for the end
            raise ValueError(f"{last} is missing")
        return pretrain.Run.load(folder, settings=settings, seconds=seconds, utility=meta.get("utility", {}))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise artifacts.Damaged(f"{folder.name} can't be read ({reason}): put it back or delete the folder") from None


def main(arguments: list[str]) -> int:
    """Train the named rows one after the other; returns the exit code."""
    if len(arguments) < 2:
        print("usage: python -m mia_utils.runner.train PROFILE MODEL_ID [MODEL_ID ...]", file=sys.stderr)
        return 2
    rank = ""
    try:
        profile = profiles.load(arguments[0])
        rows = [profile.row(model_id) for model_id in arguments[1:]]
        if n_threads := paths.get_threads():
            import torch  # seconds: after the arguments are checked

            torch.set_num_threads(n_threads)
        from mia_utils.pretrain import distributed

        rank = f"process {distributed.get_rank()}: " if distributed.get_rank() else ""
        for row in rows:
            folder = train_row(profile, row, progress=sys.stderr.isatty())
            if not rank:
                print(f"{row.id}: {folder.name} ({artifacts.read_meta(folder)['train_seconds']:.0f} s)", flush=True)
    except (ValueError, FileNotFoundError) as error:
        print(f"{rank}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Benchmarks of training, EncoderMI and segmentation at tiny size; images that stay in their files; views by parts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from mia_utils import datasets, pretrain, seeds
from mia_utils.attacks import encodermi, lpla, mim, segmentation
from mia_utils.models import encoders, segmenters, views

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FIRST = ["what", "rate", "unit", "ratio", "against", "spread"]
LAST = ["threads", "repeats", "clock", "torch", "versions", "machine", "seed"]


@pytest.fixture
def load(monkeypatch):
    """Load a benchmark as a module; the number of threads stays what it was."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    torch.set_num_threads(threads)
    sys.modules.pop("common", None)


def read(folder: Path, name: str) -> pd.DataFrame:
    table = pd.read_csv(folder / f"{name}.csv")
    assert list(table.columns[: len(FIRST)]) == FIRST and list(table.columns[-len(LAST) :]) == LAST
    assert (table["rate"] > 0).all() and (table["repeats"] == 1).all()
    case_way = table["what"].str.rpartition(": ")
    assert (table.loc[case_way[2] == table["against"], "ratio"] == 1).all()
    return table.assign(case=case_way[0], way=case_way[2])


# ------------------------------------------------------------------------------------------------------ benchmarks

TINY = ["--steps", "1", "--batch", "4", "--repeats", "1", "--threads", "1"]


def test_training_is_timed_against_its_own_forward_and_backward(load, tmp_path, capsys):
    training, methods, augment = load("training"), dict(pretrain.METHODS), views.augment
    models = ["mae:vit_nano_patch8_32", "supervised:vit_nano_patch8_32", "dino:vit_nano_patch8_32"]
    training.main(["--models", *models, *TINY, "--results", str(tmp_path)])
    table = read(tmp_path, "training")
    assert list(table["way"]) == ["forward + backward", "fit", "views and masks", "updates"] * len(models)
    assert set(table["against"]) == {"forward + backward"} and set(table["unit"]) == {"images/s"}
    fit = table[table["way"] == "fit"]
    assert (fit["target"] == 0.75).all() and (fit["met"].astype(bool) == (fit["ratio"] >= 0.75)).all()
    assert table.loc[table["way"] != "fit", ["target", "met"]].isna().all(axis=None)
    assert [case.split()[0] for case in table["case"].unique()] == ["mae", "supervised", "dino"]
    assert "forward + backward" in capsys.readouterr().out
    assert pretrain.METHODS == methods and views.augment is augment  # what was watched is put back


def test_training_refuses_to_compare_different_losses(load, tmp_path, monkeypatch):
    training = load("training")
    monkeypatch.setattr(training, "seeds", SimpleNamespace(rng=lambda seed, *names: seeds.rng(seed + 1, *names)))
    with pytest.raises(RuntimeError, match="simclr: the ways compute"):  # other images and views than those of fit
        training.main(["--models", "simclr:vit_nano_patch8_32", *TINY, "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_views_are_timed_against_bare_forwards_and_one_view_at_a_time(load, tmp_path):
    encodermi_benchmark = load("encodermi")
    tiny = ["--models", "vit_nano_patch8_32", "--images", "3", "--views", "3", "--repeats", "1", "--threads", "1"]
    encodermi_benchmark.main([*tiny, "--results", str(tmp_path)])
    table = read(tmp_path, "encodermi")
    assert list(table["way"]) == ["bare forwards", "extraction", "a view at a time"]
    assert set(table["unit"]) == {"views/s"} and set(table["case"]) == {"vit_nano_patch8_32, 3 views"}
    others = SimpleNamespace(query_views=lambda *a, seed, **k: views.query_views(*a, seed=seed + 1, **k))
    encodermi_benchmark.views = others
    with pytest.raises(RuntimeError, match="different similarities"):
        encodermi_benchmark.main([*tiny, "--results", str(tmp_path)])


def test_input_maps_are_timed_against_bare_forwards_and_one_image_at_a_time(load, tmp_path, monkeypatch):
    segmentation_benchmark = load("segmentation")
    monkeypatch.setattr(segmentation_benchmark, "HEIGHT", 32)
    monkeypatch.setattr(segmentation_benchmark, "WIDTH", 64)
    segmentation_benchmark.main(["--images", "2", "--repeats", "1", "--threads", "1", "--results", str(tmp_path)])
    table = read(tmp_path, "segmentation")
    bare = ["bare forwards", "bare forwards, channels last"]
    maps = ["loss map", "concatenation", "mean loss", "6 patches judged", "an image at a time"]
    assert list(table["way"]) == bare + maps
    assert set(table["unit"]) == {"images/s"} and set(table["case"]) == {"unet mobilenet_v2, 32 x 64"}


# ------------------------------------------------------------------------------------------ images in their files

IDS = [f"image-{i}" for i in range(10)]


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """Ten images on disk, the same in memory, and how many were read at a time."""
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    decoded, read = [], datasets.MappedImages.__array__

    def count(self, *args, **settings):
        decoded.append(len(self))
        return read(self, *args, **settings)

    monkeypatch.setattr(datasets.MappedImages, "__array__", count)
    return datasets.MappedImages([np.load(tmp_path / "images.npy", mmap_mode="r")]), images, decoded


def check_chunks(decoded: list[int], most: int) -> None:
    """Every image was decoded once, and never more than a chunk together."""
    assert sum(decoded) == 10 and max(decoded) == most


def test_encodermi_and_lpla_decode_streamed_images_a_chunk_at_a_time(streamed):
    files, images, decoded = streamed
    encoder = encoders.make("vit_nano_patch8_32")
    for extract, options in ((encodermi.extract_features, {"n_views": 3}), (lpla.extract_norms, {})):
        options |= dict(image_ids=IDS, batch_size=4)
        expected = extract(encoder, images, **options)
        decoded.clear()
        assert torch.equal(extract(encoder, files, **options), expected)
        check_chunks(decoded, 4)


def test_mim_decodes_streamed_images_a_chunk_at_a_time(streamed):
    files, images, decoded = streamed
    model = pretrain.build("mae", "vit_nano_patch8_32")
    options = dict(n_masks=2, batch_size=6)  # pairs of image and mask
    assert np.array_equal(
        mim.compute_distances(model, files, **options), mim.compute_distances(model, images, **options)
    )
    check_chunks(decoded, 3)


def test_segmentation_decodes_streamed_images_a_chunk_at_a_time(streamed):
    files, images, decoded = streamed
    model = segmenters.wrap(lambda x: torch.cat([x, 1 - x], 1), n_classes=6, outputs="logits")
    masks = np.random.default_rng(1).integers(0, 6, (10, 32, 32)).astype(np.uint8)
    options = dict(image_ids=IDS, masks=masks, batch_size=4)
    expected = segmentation.extract_loss_map(model, images, **options)
    assert np.array_equal(segmentation.extract_loss_map(model, files, **options), expected)
    check_chunks(decoded, 4)


def test_streamed_images_are_checked_without_decoding_any(streamed):
    files, _, decoded = streamed
    encoder, model = encoders.make("vit_nano_patch8_32"), pretrain.build("mae", "vit_nano_patch8_32")
    with pytest.raises(ValueError, match="one image id per image"):
        encodermi.extract_features(encoder, files, image_ids=IDS[:3])
    with pytest.raises(ValueError, match="one image id per image"):
        lpla.extract_norms(encoder, files, image_ids=IDS[:3])
    with pytest.raises(ValueError, match="one image id per image"):
        mim.extract_distances(model, files, image_ids=IDS[:3], seed=0)
    with pytest.raises(ValueError, match="masks: expected"):
        segmentation.extract_loss_map(None, files, image_ids=IDS, masks=np.zeros((10, 8, 8), np.uint8))
    assert not decoded


# --------------------------------------------------------------------------------------------- views, only some changed


def change_all(x: torch.Tensor, chance: torch.Tensor, settings: dict) -> torch.Tensor:
    """Compute every change for every view and choose afterwards: slow and obvious."""

    def choose(column: int, probability: float, changed: torch.Tensor) -> torch.Tensor:
        return torch.where((chance[:, column] < probability).view(-1, 1, 1, 1), changed, x)

    x = choose(1, settings["jitter"], views._jitter(x, chance[:, 2:6]))
    x = choose(6, settings["gray"], views._to_gray(x).expand_as(x))
    side = torch.exp(-0.5 / (0.1 + 1.9 * chance[:, 8]) ** 2).view(-1, 1, 1, 1)
    soft = x
    for pad, axis in (((0, 0, 1, 1), 2), ((1, 1, 0, 0), 3)):
        wide = torch.nn.functional.pad(soft, pad, mode="replicate")
        before, after = wide.narrow(axis, 0, x.shape[axis]), wide.narrow(axis, 2, x.shape[axis])
        soft = (soft + side * (before + after)) / (1 + 2 * side)
    x = choose(7, settings["blur"], soft)
    return choose(9, 0.2, torch.where(x >= 0.5, 1 - x, x))


@pytest.mark.parametrize(("n", "size"), [(1, 32), (7, 33), (64, 32)])
def test_changing_only_the_picked_views_gives_the_same_bits(n, size):
    settings = dict(views.AUGMENTATIONS["dino"])
    images = torch.from_numpy(np.random.default_rng(n).integers(0, 256, (n, 3, 40, 36), dtype=np.uint8))
    # the draws come first, so the crops of both begin with the same numbers
    plain = views.augment(images, size=size, rng=np.random.default_rng(5), scale=settings["scale"], flip=0.5)
    chance = torch.from_numpy(np.random.default_rng(5).random((n, 1, 11), dtype=np.float32))[:, 0]
    made = views.augment(images, size=size, rng=np.random.default_rng(5), **settings, solarize=0.2)
    assert torch.equal(made, change_all(plain, chance, settings))  # trainings are repeated bit by bit


def test_flips_change_only_the_picked_images():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 32, 32), dtype=np.uint8))
    chance = np.random.default_rng(5).random((9, 1, 11), dtype=np.float32)[:, 0, 0]
    made = views.augment(images, size=32, rng=np.random.default_rng(5), flip=0.5)
    for i in range(9):
        expected = images[i].float() / 255
        assert torch.equal(made[i], expected.flip(2) if chance[i] < 0.5 else expected)
    assert 0 < (chance < 0.5).sum() < 9
    many = views.query_views(images[:1], ["a"], 16, augmentation="flip", size=32, seed=0)[0]
    expected = images[0].float() / 255
    mirrored = [torch.equal(view, expected.flip(2)) for view in many]
    assert 0 < sum(mirrored) < 16
    assert all(torch.equal(view, expected) for view, m in zip(many, mirrored, strict=True) if not m)

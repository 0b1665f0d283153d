"""Benchmarks: the ways they time give the same answer, and every script ends in a table with its columns."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from mia_utils import datasets
from mia_utils.attacks import partcrop
from mia_utils.models import encoders, views
from mia_utils.runner import estimates, profiles

FOLDER = Path(__file__).parents[1] / "benchmarks"
COLUMNS = ["what", "rate", "unit", "ratio", "against", "spread"]
RUN = ["threads", "repeats", "clock", "torch", "versions", "machine", "seed"]
IDS = [f"image-{i}" for i in range(8)]


@pytest.fixture
def load(monkeypatch):
    """Import a script as ``python benchmarks/NAME.py`` would: its own folder comes first."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture(scope="module")
def encoder():
    return encoders.make("vit_nano_patch8_32", seed=0)


@pytest.fixture(scope="module")
def images():
    return datasets.load("scenes", n=8).images


def run(script, folder: Path, *arguments: str) -> pd.DataFrame:
    script.main([*arguments, "--repeats", "1", "--results", str(folder)])
    (file,) = folder.glob("*.csv")
    return pd.read_csv(file)


def test_every_way_runs_once_to_warm_up_and_then_in_turn(load):
    calls, now = [], iter(range(1000))
    ways = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = load("common").time_ways(ways, 4, lambda: next(now))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_ratio_is_the_median_of_ratios_of_the_same_repeat(load):
    common = load("common")
    # the machine is twice as slow in the second repeat, four times in the third: no repeat mixes with another
    seconds = {"slow": [2.0, 4.0, 8.0], "fast": [1.0, 1.0, 4.0]}
    rows = common.make_rows(seconds, n=10, unit="x/s", baseline="slow", run={}, target={"fast": 3}, size={"slow": 7})
    assert [row["ratio"] for row in rows] == [1.0, 2.0]
    assert [row["rate"] for row in rows] == [2.5, 10.0]
    assert rows[0]["spread"] == pytest.approx((3.75 - 1.875) / 2.5)  # of the rates 5, 2.5 and 1.25
    assert [(row["target"], row["met"], row["size"]) for row in rows] == [(None, None, 7), (3, False, None)]
    (row,) = common.make_rows({"": [2.0]}, n={"": 4}, unit="x/s", baseline="", run={}, what="all")
    assert row["what"] == "all: " and row["rate"] == 2.0


def test_crops_of_the_benchmark_agree_with_torchvision(load, tmp_path, capsys):
    table = run(load("crops"), tmp_path, "--images", "1", "--crops", "6")
    extra = ["target", "note", "largest_difference", "share_above_1", "met"]
    assert table.columns.tolist() == COLUMNS + extra + RUN
    batched = table[table.what.str.endswith(": batched")]
    assert len(table) == 12 and len(batched) == 2
    assert (batched.largest_difference <= 2.01).all() and (batched.share_above_1 <= 1e-4).all()  # FACTS.md 35
    assert "crops/s" in capsys.readouterr().out


def test_features_of_the_published_path_equal_ours_on_the_same_boxes(load, encoder, images):
    bench = load("partcrop")
    boxes, flips = views.draw_boxes(IDS, 12, height=32, width=32, seed=3, stream="partcrop")
    data = bench.PublishedCrops(images, encoder, 12, boxes=boxes, flips=flips)
    published = bench.extract_published(encoder, data, batch=3, seed=3)
    ours = partcrop.extract_features(encoder, images, image_ids=IDS, n_crops=12, seed=3)
    # single pixels differ by 1 / 255 between Pillow's integer kernel and ours; other boxes move energies by 2
    torch.testing.assert_close(published, ours, rtol=0, atol=0.05)
    unflipped = bench.PublishedCrops(images, encoder, 12, boxes=boxes, flips=torch.zeros_like(flips))
    assert (bench.extract_published(encoder, unflipped, batch=3, seed=3) - ours).abs().max() > 0.05


def test_the_bare_forwards_of_the_benchmark_are_those_of_the_attack(load, encoder, images):
    bench = load("partcrop")
    ready = bench.make_ready(encoder, images, IDS, 12, batch=3, seed=0)
    with torch.inference_mode():
        features = [
            partcrop.part_energies(bench.read(encoder, crops)[0].unflatten(0, (-1, 12)), bench.read(encoder, whole)[1])
            for crops, whole in ready
        ]
    ours = partcrop.extract_features(encoder, images, image_ids=IDS, n_crops=12, batch_size=3)
    torch.testing.assert_close(torch.cat(features), ours, rtol=0, atol=0)


def test_partcrop_writes_features_and_both_attacks(load, tmp_path, monkeypatch):
    bench = load("partcrop")
    monkeypatch.setattr(bench, "MODELS", {"vit_nano_patch8_32": (1, 128)})
    monkeypatch.setitem(bench.PAPER, "arch", "vit_nano_patch8_32")
    attack = "--attack-arch vit_nano_patch8_32 --attack-known 8 --attack-reported 20 --attack-crops 4"
    arguments = [*attack.split(), "--attack-epochs", "2", "--train-epochs", "2", "--score-every-epoch"]
    table = run(bench, tmp_path, "--models", "vit_nano_patch8_32", *arguments)
    extra = ["target", "met", "largest_difference", "seconds", "auc", "auc_low", "auc_high"]
    assert sorted(table.columns) == sorted(COLUMNS + extra + RUN)
    assert table.what.str.rsplit(": ", n=1).str[1].tolist() == [
        "published path", "ours, float32", "ours, bf16", "bare encoder",
        "published schedule as released, scored 4 times (measured)", "published schedule, scored once", "ours",
        "published schedule as released", "ours",
    ]  # fmt: skip
    attacks = table[table.auc.notna()]
    assert len(attacks) == 3 and (attacks.auc_low < attacks.auc).all() and (attacks.auc < attacks.auc_high).all()
    released, once = attacks.seconds.iloc[:2]
    assert released > once > 0


def test_the_published_schedule_learns_and_repeats(load, encoder, images):
    bench = load("partcrop")
    options = Namespace(attack_crops=6, attack_epochs=12, seed=1, workers=0, score_every_epoch=False)
    # members are bright, strangers dark: any features tell them apart
    both = np.concatenate([images // 2 + 128, images // 4])
    is_member = np.arange(16) < 8
    roles = {"known": np.r_[:4, 8:12], "reported": np.r_[4:8, 12:16]}
    first, epochs, scorings = bench.attack_as_published(encoder, both, is_member, roles, options, lambda: 0.0)
    again = bench.attack_as_published(encoder, both, is_member, roles, options, lambda: 0.0)[0]
    np.testing.assert_array_equal(first, again)
    assert len(epochs) == 12 and len(scorings) == 1
    assert first[:4].mean() > first[4:].mean()


def test_memory_measures_a_point_in_a_process_of_its_own(load, tmp_path):
    table = run(load("memory"), tmp_path, "--images", "40", "--crops", "--encoders")
    extra = ["seconds", "peak_mib", "above_mib", "images_mib", "features_mib", "parameters"]
    assert table.columns.tolist() == COLUMNS + extra + RUN
    (row,) = table.itertuples()
    assert row.peak_mib > row.above_mib > 0 and row.images_mib == round(40 * 32 * 32 * 3 / 2**20, 1)
    assert row.parameters == sum(p.numel() for p in encoders.make("vit_nano_patch8_32").module.parameters())


def test_mim_keeps_its_columns(load, tmp_path, monkeypatch):
    bench = load("mim")
    monkeypatch.setattr(bench, "MODELS", (("mae", "vit_nano_patch8_32"),))
    table = run(bench, tmp_path, "--images", "8", "--masks", "2")
    assert " ".join(table.columns) == ("what images_per_second ratio threads repeats spread clock torch machine seed")
    assert table.ratio.iloc[0] == 1.0 and len(table) == 3


# ------------------------------------------------------------------------------ what the fast paths rely on


class Streamed:
    """Images that are decoded when asked for, and remember how many at a time."""

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, images: np.ndarray, decoded: list[int]):
        self.images, self.decoded, self.shape = images, decoded, images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows) -> Streamed:
        return Streamed(self.images[rows], self.decoded)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.decoded.append(len(self))
        return self.images


def test_the_share_of_a_job_is_its_operations_at_the_rate_of_a_product(load, tmp_path, monkeypatch):
    job, whole = load("job"), profiles.load("smoke")
    few = whole.model_copy(update={"models": [row for row in whole.models if row.id.startswith("mae-target")]})
    monkeypatch.setattr(profiles, "load", lambda name: few)
    table = run(job, tmp_path, "--seconds", "100", "--profile", "smoke").set_index("what")
    products, all_of_it = table.loc["smoke: products of all trainings"], table.loc["smoke: the whole job"]
    assert all_of_it["share"] == 1 and 0 <= products["share"] < 1
    (row,) = few.models
    counted = 32 * 30 * estimates.count_step("mae", row.arch, "none")[0]
    assert table["gflop"].iloc[0] == round(counted) and products["seconds"] == round(products["share"] * 100)


def test_streamed_images_are_decoded_a_chunk_at_a_time(encoder, images):
    decoded: list[int] = []
    options = {"image_ids": IDS, "n_crops": 4, "batch_size": 3}
    got = partcrop.extract_features(encoder, Streamed(images, decoded), **options)
    assert decoded == [3, 3, 2]
    assert torch.equal(got, partcrop.extract_features(encoder, images, **options))


def test_the_chunk_follows_the_budget_and_changes_no_feature(encoder, images):
    few, many = (partcrop.get_chunk(encoder, n_crops, 16) for n_crops in (256, 8))
    assert 1 <= few < many <= 65536 // 8
    options = {"image_ids": IDS, "n_crops": 8}
    whole = partcrop.extract_features(encoder, images, **options)
    for batch_size in (1, 3, 8):
        part = partcrop.extract_features(encoder, images, batch_size=batch_size, **options)
        # float32 products sum in another order for another batch shape
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "k", "side", "size"), [(3, 5, 32, 16), (200, 1, 32, 32), (2, 70, 24, 12)])
def test_crops_do_not_depend_on_tables_blocks_or_autocast(monkeypatch, n, k, side, size):
    images = torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    ids = [str(i) for i in range(n)]
    boxes, flips = views.draw_boxes(ids, k, height=side, width=side, scale=(0.05, 1.0), seed=0, stream="test")
    for rounded in (True, False):
        crops = views.resized_crop(images, boxes, size, flips=flips, rounded=rounded)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(views.resized_crop(images, boxes, size, flips=flips, rounded=rounded), crops)
        with monkeypatch.context() as patch:
            patch.setattr(views, "_TABLE_BYTES", 0)
            assert torch.equal(views.resized_crop(images, boxes, size, flips=flips, rounded=rounded), crops)
        alone = [
            views.resized_crop(images[i : i + 1], boxes[i : i + 1], size, flips=flips[i : i + 1], rounded=rounded)
            for i in range(n)
        ]
        # one image may take another kernel, which sums in another order; a rounding may then fall the other way
        assert (torch.cat(alone) - crops).abs().max() <= (1.01 / 255 if rounded else 1e-6)


def test_a_mirrored_crop_is_the_crop_mirrored():
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    boxes = torch.tensor([[[3, 5, 10, 12], [0, 0, 32, 32]]] * 2)
    flips = torch.tensor([[True, False], [False, True]])
    mirrored, plain = (views.resized_crop(images, boxes, 16, flips=f) for f in (flips, None))
    assert torch.equal(mirrored, torch.where(flips[..., None, None, None], plain.flip(-1), plain))
    oracle = F.resized_crop(images[0], 3, 5, 10, 12, [16, 16], interpolation=F.InterpolationMode.BICUBIC).flip(-1)
    assert (mirrored[0, 0] * 255 - oracle).abs().max() <= 2.001  # torchvision keeps 16-bit integer weights

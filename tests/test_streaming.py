"""Streamed folders: the very pixels, splits and scores of the folder in memory, and nothing decoded before its time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mia_utils import attacks, datasets
from mia_utils.datasets import folders
from mia_utils.datasets.folders import ImageFiles
from mia_utils.models import encoders
from mia_utils.protocol import splits
from mia_utils.runner import profiles, train


def write_folder(folder: Path, n: int = 120, *, sizes: tuple = ((32, 32),), suffixes: tuple = (".png",)) -> Path:
    """Write pictures of smooth random colors in two classes; sizes and formats take turns."""
    rng = np.random.default_rng(0)
    for i in range(n):
        (height, width), suffix = sizes[i % len(sizes)], suffixes[i % len(suffixes)]
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        path = folder / ("cat" if i % 3 else "dog") / f"{i:04d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return folder


def load_both(folder: Path, **arguments) -> tuple[datasets.Pool, datasets.Pool]:
    name = f"folder:{folder}"
    return datasets.load(name, **arguments), datasets.load(name, **arguments, stream=True)


@pytest.fixture
def nothing_decoded(monkeypatch):
    """Make decoding an error."""

    def fail(file: str, size: object) -> None:
        raise AssertionError(f"{file} was decoded")

    monkeypatch.setattr(folders, "_read_image", fail)


MIXED = {"sizes": ((20, 30), (33, 21), (16, 16)), "suffixes": (".png", ".jpg", ".gif", ".bmp")}


@pytest.mark.parametrize(("written", "size"), [({}, None), (MIXED, 16), (MIXED, (24, 12))])
def test_streamed_pixels_labels_and_ids_are_those_of_the_folder_in_memory(tmp_path, written, size):
    held, streamed = load_both(write_folder(tmp_path, 40, **written), size=size)
    assert isinstance(streamed.images, ImageFiles) and isinstance(held.images, np.ndarray)
    assert np.array_equal(np.asarray(streamed.images), held.images)
    assert streamed.images.shape == held.images.shape and streamed.images.dtype == held.images.dtype
    assert streamed.images.nbytes == held.images.nbytes and streamed.images.ndim == 4
    for key in ("labels", "image_ids"):
        assert np.array_equal(getattr(streamed, key), getattr(held, key))
    assert streamed.class_names == held.class_names and len(streamed) == 40
    assert repr(streamed).endswith(" 2 classes, streamed)") and repr(held).endswith(" 2 classes)")


def test_n_draws_the_same_files_streamed_and_in_memory(tmp_path):
    held, streamed = load_both(write_folder(tmp_path, 30), n=7, seed=3)
    assert np.array_equal(np.asarray(streamed.images), held.images)


def test_pairs_of_images_and_masks_stream_their_images(tmp_path):
    write_folder(tmp_path / "images", 6)
    for file in (tmp_path / "images").rglob("*.png"):
        target = tmp_path / "masks" / file.relative_to(tmp_path / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32), 1, np.uint8)).save(target)
    held, streamed = load_both(tmp_path)
    assert isinstance(streamed.images, ImageFiles) and isinstance(streamed.masks, np.ndarray)
    assert np.array_equal(np.asarray(streamed.images), held.images) and np.array_equal(streamed.masks, held.masks)


@pytest.mark.parametrize(
    "rows",
    [
        slice(2, 9, 3),
        slice(None, None, -1),
        np.array([5, 0, 5, -1]),
        [3, 1],
        [],
        np.arange(10) % 2 == 0,
        np.array([2], np.uint8),
    ],
    ids=str,
)
def test_rows_are_chosen_as_in_an_array(tmp_path, rows):
    held, streamed = load_both(write_folder(tmp_path, 10))
    part = streamed.images[rows]
    assert isinstance(part, ImageFiles) and len(part) == len(held.images[rows])
    assert part.shape == held.images[rows].shape
    assert np.array_equal(np.asarray(part), held.images[rows])
    again = part[::2]  # rows of rows
    assert np.array_equal(np.asarray(again), held.images[rows][::2])


def test_one_row_and_its_pixels_are_arrays_and_the_rest_is_refused(tmp_path):
    held, streamed = load_both(write_folder(tmp_path, 5))
    for index in (0, -1, np.int64(3), (2, ..., 0), (1, slice(4, 8), 2)):
        assert np.array_equal(streamed.images[index], held.images[index])
    with pytest.raises(IndexError):
        streamed.images[5]
    for index in ((slice(None), 0), np.zeros((2, 2), int)):
        with pytest.raises(TypeError, match="streamed images: expected"):
            streamed.images[index]
    assert [image.tobytes() for image in streamed.images] == [image.tobytes() for image in held.images]


def test_numpy_sees_an_array(tmp_path):
    held, streamed = load_both(write_folder(tmp_path, 5))
    assert np.array_equal(streamed.images / 255.0, held.images / 255.0)
    assert np.array_equal(2 * streamed.images[:2], 2 * held.images[:2])
    assert np.array_equal(np.concatenate([streamed.images[:1], streamed.images[3:]]), held.images[[0, 3, 4]])
    assert np.asarray(streamed.images, dtype=np.float32).dtype == np.float32
    made = np.array(streamed.images, copy=True)
    made[:] = 0  # a new array each time
    assert np.array_equal(np.asarray(streamed.images), held.images)
    with pytest.raises(ValueError, match="copy=False"):
        np.asarray(streamed.images, copy=False)
    assert torch.equal(datasets.to_float(streamed.images[[2, 1]]), datasets.to_float(held.images[[2, 1]]))


def test_loading_splitting_and_choosing_decode_nothing(tmp_path, nothing_decoded):
    pool = datasets.load(f"folder:{write_folder(tmp_path, **MIXED)}", size=16, stream=True)
    split = splits.draw(pool, n_members=10, n_nonmembers=20, seed=0)
    part = pool.take(split.target_members)
    assert len(part) == 10 and pool.hash != part.hash and repr(part)
    assert len(part.images[:4]) == 4
    with pytest.raises(AssertionError, match="was decoded"):
        np.asarray(part.images[:1])


def test_a_streamed_pool_is_split_as_in_memory_and_repeated_files_are_dropped(tmp_path):
    write_folder(tmp_path, 80)
    for i in range(5):
        shutil.copy(tmp_path / "dog" / f"{3 * i:04d}.png", tmp_path / "cat" / f"again{i}.png")
    held, streamed = load_both(tmp_path)
    a, b = (splits.draw(pool, n_members=20, n_nonmembers=30, seed=4) for pool in (held, streamed))
    for role in (*splits.ROLES, "utility", "strata"):
        assert np.array_equal(getattr(a, role), getattr(b, role)), role
    used = np.concatenate([getattr(b, role) for role in (*splits.ROLES, "utility")])
    assert len(used) == 80
    b.check_pool(streamed)
    with pytest.raises(ValueError, match="draw the split again"):  # hashed by files, not by pixels: see Pool.hash
        b.check_pool(held)


def test_the_hash_is_of_the_files_bytes_and_the_size_wherever_they_lie(tmp_path):
    def load(folder: str, **arguments) -> datasets.Pool:
        return datasets.load(f"folder:{tmp_path / folder}", stream=True, **{"size": 16, **arguments})

    write_folder(tmp_path / "here" / "set", 12, suffixes=(".bmp",))
    shutil.copytree(tmp_path / "here" / "set", tmp_path / "there" / "set")
    pool = load("here/set")
    assert pool.hash == load("there/set").hash
    assert pool.hash != load("here/set", size=15).hash
    assert pool.hash != pool.take(np.arange(12)[::-1]).hash
    file = tmp_path / "there" / "set" / "cat" / "0004.bmp"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # a bitmap keeps its size whatever is drawn in it
    file.write_bytes(content)
    assert pool.hash != load("there/set").hash
    few = pool.take(np.array([3, 1]))  # known digests go with their images
    fresh = ImageFiles(few.images.files, size=(16, 16))
    assert np.array_equal(few.images.digests, fresh.digests)


def test_a_damaged_file_in_the_middle_is_one_line_that_names_it_when_it_is_reached(tmp_path):
    write_folder(tmp_path, 30)
    bad = tmp_path / "cat" / "0013.png"
    bad.write_bytes(bad.read_bytes()[:60])
    pool = datasets.load(f"folder:{tmp_path}", size=32, stream=True)
    place = int(np.flatnonzero(pool.image_ids == "cat/0013.png")[0])
    assert np.asarray(pool.images[:place]).shape == (place, 32, 32, 3)
    for ask in (lambda: np.asarray(pool.images), lambda: pool.images[place], lambda: list(pool.images)):
        with pytest.raises(ValueError) as error:
            ask()
        assert str(error.value).startswith(f"{bad}: can not be read as an image (")
        assert str(error.value).endswith("repair or remove it") and "\n" not in str(error.value)
    bad.unlink()
    with pytest.raises(ValueError, match="0013.png: no such file: the folder is incomplete"):
        datasets.load(f"folder:{tmp_path}", size=32, stream=True) and pool.hash


def test_a_file_that_changed_its_size_since_it_was_listed_is_named(tmp_path):
    pool = datasets.load(f"folder:{write_folder(tmp_path, 4)}", stream=True)
    Image.new("RGB", (31, 32)).save(tmp_path / "cat" / "0002.png")
    with pytest.raises(ValueError, match=r"0002.png: expected 32 x 32 pixels .*, got 32 x 31: load it again"):
        np.asarray(pool.images)


def test_mixed_sizes_without_size_name_two_files_when_streamed_too(tmp_path, nothing_decoded):
    with pytest.raises(ValueError, match="images of mixed sizes: .*pass size="):
        datasets.load(f"folder:{write_folder(tmp_path, 6, **MIXED)}", stream=True)


def test_a_folder_larger_than_the_memory_asks_for_stream_and_works_with_it(tmp_path, monkeypatch):
    name = f"folder:{write_folder(tmp_path, 20)}"
    monkeypatch.setattr(folders, "_count_memory", lambda: 10 * 32 * 32 * 3 / 0.6)  # ten images fit
    with pytest.raises(ValueError, match="20 images of 32 x 32 need .* pass a smaller size= or n=, or stream=True"):
        datasets.load(name)
    pool = datasets.load(name, stream=True)
    assert np.asarray(pool.images[:10]).shape == (10, 32, 32, 3)
    with pytest.raises(ValueError, match="decode a part at a time"):
        np.asarray(pool.images)


def test_only_folders_are_streamed(tmp_path):
    with pytest.raises(ValueError, match=r"stream=True reads image folders \(folder:PATH\), got 'scenes'"):
        datasets.load("scenes", stream=True)


def test_threads_run_ahead_by_a_bounded_number_of_files(monkeypatch):
    asked = []
    monkeypatch.setattr(folders, "QUEUED", 4)
    rows = folders._map_files(asked.append, [str(i) for i in range(100)], title="")
    next(rows)
    rows.close()
    assert 1 <= len(asked) <= 4
    assert list(folders._map_files(int, [str(i) for i in range(100)], title="")) == list(range(100))


def test_joined_pools_stay_streamed_and_hold_the_same_pixels(tmp_path):
    pools = {}
    for i, name in enumerate(("one", "two")):
        pools[name] = load_both(write_folder(tmp_path / name, 40 + i), size=16)
    cuts = [splits.draw(pools[name][0], n_members=5, n_nonmembers=6, seed=0) for name in pools]
    held, _ = splits.join(pools["one"][0], cuts[0], pools["two"][0], cuts[1])
    streamed, _ = splits.join(pools["one"][1], cuts[0], pools["two"][1], cuts[1])
    assert isinstance(streamed.images, ImageFiles)
    assert np.array_equal(np.asarray(streamed.images), held.images)
    mixed, _ = splits.join(pools["one"][1], cuts[0], pools["two"][0], cuts[1])
    assert isinstance(mixed.images, np.ndarray) and np.array_equal(mixed.images, held.images)


def test_an_attack_on_a_streamed_pool_gives_the_scores_of_the_pool_in_memory(tmp_path):
    results = []
    for pool in load_both(write_folder(tmp_path, 130)):
        split = splits.draw(pool, n_members=25, n_nonmembers=60, n_shadow_members=0, n_shadow_nonmembers=0, seed=0)
        encoder = encoders.make("vit_nano_patch8_32", method="mae", seed=0)
        settings = dict(knowledge="partial", untrained=encoder, n_crops=4, epochs=2, seed=0)
        results.append(attacks.evaluate("partcrop", encoder, pool, split, **settings))
    held, streamed = results
    assert np.array_equal(held.score, streamed.score) and np.array_equal(held.image_ids, streamed.image_ids)
    assert set(held.controls) == set(streamed.controls)
    for name, control in held.controls.items():
        assert np.array_equal(control.score, streamed.controls[name].score), name


PROFILE = """
name: streamed
datasets: {{"{name}": {{size: 32{stream}}}}}
split: {{n_nonmembers: 40, n_shadow_members: 0, n_shadow_nonmembers: 0}}
models:
  - {{id: a, role: target, method: mae, arch: vit_nano_patch8_32, dataset: "{name}", n_train: 20, epochs: 2}}
"""


def test_a_profile_row_trains_on_a_streamed_folder_as_on_one_in_memory(tmp_path, home):
    name = f"folder:{write_folder(tmp_path / 'pictures', 120, **MIXED)}"
    states = []
    for stream in ("", ", stream: true"):
        profile = profiles.parse(PROFILE.format(name=name, stream=stream), source="p")
        run = train.load_run(train.train_row(profile, profile.row("a"), progress=False))
        states.append(run.states[2])
    assert isinstance(train.load_pool(profile, name).images, ImageFiles)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

"""Streamed folders: the very pixels, hash, splits and scores of the folder in memory, decoded once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mia_utils import attacks, datasets
from mia_utils.datasets import MappedImages, cache, folders
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


@pytest.fixture(autouse=True)
def raw(tmp_path_factory, monkeypatch) -> Path:
    """The data folder, where memory maps are kept."""
    folder = tmp_path_factory.mktemp("raw")
    monkeypatch.setenv("MIA_DATA_DIR", str(folder))
    return folder


def load_both(folder: Path, **arguments) -> tuple[datasets.Pool, datasets.Pool]:
    name = f"folder:{folder}"
    return datasets.load(name, **arguments), datasets.load(name, **arguments, stream=True)


MIXED = {"sizes": ((20, 30), (33, 21), (16, 16)), "suffixes": (".png", ".jpg", ".gif", ".bmp")}


@pytest.mark.parametrize(
    ("written", "options"),
    [({}, {}), (MIXED, {"size": 16}), (MIXED, {"size": (24, 12)}), ({}, {"n": 7, "seed": 3})],
)
def test_a_streamed_pool_is_the_folder_in_memory(tmp_path, written, options):
    held, streamed = load_both(write_folder(tmp_path, 40, **written), **options)
    assert isinstance(streamed.images, MappedImages) and isinstance(held.images, np.ndarray)
    assert np.array_equal(np.asarray(streamed.images), held.images) and streamed.hash == held.hash
    assert streamed.images.shape == held.images.shape and streamed.images.dtype == held.images.dtype
    assert repr(streamed).endswith(" 2 classes, streamed)") and repr(held).endswith(" 2 classes)")


def test_pairs_of_images_and_masks_stream(tmp_path, raw):
    write_folder(tmp_path / "images", 6)
    rng = np.random.default_rng(0)
    for file in (tmp_path / "images").rglob("*.png"):
        target = tmp_path / "masks" / file.relative_to(tmp_path / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.choice(np.array([0, 1, 255], np.uint8), (32, 32))).save(target)
    held, streamed = load_both(tmp_path, size=(16, 24))
    assert isinstance(streamed.images, MappedImages) and held.hash == streamed.hash
    assert len(list(raw.glob("*.npy"))) == 1
    assert np.array_equal(streamed.masks, held.masks) and 255 in held.masks


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
    assert isinstance(part, MappedImages) and len(part) == len(held.images[rows])
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


def test_files_are_decoded_once_and_again_when_one_changed(tmp_path, raw, monkeypatch):
    folder, decoded, read = write_folder(tmp_path, 12, suffixes=(".bmp",)), [], folders.open_rgb
    monkeypatch.setattr(folders, "open_rgb", lambda file: decoded.append(file) or read(file))
    first = datasets.load(f"folder:{folder}", stream=True)
    assert datasets.load(f"folder:{folder}", stream=True).hash == first.hash and len(decoded) == 12
    assert datasets.load(f"folder:{folder}", stream=True, size=16).images.shape == (12, 16, 16, 3)
    file = folder / "cat" / "0004.bmp"
    content = bytearray(file.read_bytes())
    content[-1] ^= 128  # a bitmap keeps its size whatever is drawn in it
    file.write_bytes(content)
    decoded.clear()
    assert datasets.load(f"folder:{folder}", stream=True).hash != first.hash and len(decoded) == 12
    assert len(list(raw.glob("streamed-*.npy"))) == 2  # the new one and that of the other size


@pytest.mark.parametrize("place", ["header", "pixels", "digest", "cut", "empty"])
def test_a_damaged_memory_map_is_made_again(tmp_path, raw, place):
    first = datasets.load(f"folder:{write_folder(tmp_path, 8)}", stream=True).hash
    (file,) = raw.glob("streamed-*.npy")
    content = bytearray(file.read_bytes())
    if place in ("header", "pixels", "digest"):
        content[{"header": 60, "pixels": 5000, "digest": -1}[place]] ^= 1
    file.write_bytes(content[: {"cut": 9000, "empty": 0}.get(place, len(content))])
    assert datasets.load(f"folder:{tmp_path}", stream=True).hash == first
    assert [path.suffix for path in raw.iterdir() if not path.name.startswith(".")] == [".npy"]


def test_a_data_folder_that_can_not_be_written_is_one_line(tmp_path, raw, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write_rows", fail)
    with pytest.raises(ValueError, match="can not write .*No space left"):
        datasets.load(f"folder:{write_folder(tmp_path, 4)}", stream=True)
    assert not list(raw.glob("*.npy"))


def test_a_streamed_pool_is_split_as_in_memory_and_repeated_images_are_dropped(tmp_path):
    write_folder(tmp_path, 80)
    for i in range(5):
        shutil.copy(tmp_path / "dog" / f"{3 * i:04d}.png", tmp_path / "cat" / f"again{i}.png")
    held, streamed = load_both(tmp_path)
    a, b = (splits.draw(pool, n_members=20, n_nonmembers=30, seed=4) for pool in (held, streamed))
    assert a.hash == b.hash and isinstance(streamed.take(b.target_members).images, MappedImages)
    assert len(np.concatenate([getattr(b, role) for role in (*splits.ROLES, "utility")])) == 80
    b.check_pool(held)


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:60]), None])
def test_a_damaged_file_and_mixed_sizes_are_one_line_streamed_too(tmp_path, raw, damage):
    write_folder(tmp_path, 30, **({} if damage else MIXED))
    if damage:
        damage(tmp_path / "cat" / "0013.png")
    for stream in (False, True):
        with pytest.raises(ValueError, match="0013.png: can not be read" if damage else "mixed sizes.*pass size="):
            datasets.load(f"folder:{tmp_path}", stream=stream)
    assert not list(raw.glob("*.npy"))


def test_a_folder_larger_than_the_memory_asks_for_stream_and_works_with_it(tmp_path, monkeypatch):
    name = f"folder:{write_folder(tmp_path, 20)}"
    monkeypatch.setattr(cache, "count_memory", lambda: 10 * 32 * 32 * 3 / 0.6)  # ten images fit
    with pytest.raises(ValueError, match="20 images of 32 x 32 need .* pass a smaller size= or n=, or stream=True"):
        datasets.load(name)
    pool = datasets.load(name, stream=True)
    assert np.asarray(pool.images[:10]).shape == (10, 32, 32, 3)
    with pytest.raises(ValueError, match="read a part at a time"):
        np.asarray(pool.images)


def test_only_folders_are_streamed(tmp_path):
    with pytest.raises(ValueError, match=r"stream=True is for image folders \(folder:PATH\), got 'scenes'"):
        datasets.load("scenes", stream=True)


def test_threads_run_ahead_by_a_bounded_number_of_files(monkeypatch):
    asked, items = [], [(i,) for i in range(100)]
    monkeypatch.setattr(folders, "QUEUED", 4)
    rows = folders.map_files(asked.append, items, title="")
    next(rows)
    rows.close()
    assert 1 <= len(asked) <= 4
    assert list(folders.map_files(int, items, title="")) == list(range(100))


def test_joined_pools_stay_streamed_and_hold_the_same_pixels(tmp_path):
    pools = {}
    for i, name in enumerate(("one", "two")):
        pools[name] = load_both(write_folder(tmp_path / name, 40 + i), size=16)
    cuts = [splits.draw(pools[name][0], n_members=5, n_nonmembers=6, seed=0) for name in pools]
    held, _ = splits.join(pools["one"][0], cuts[0], pools["two"][0], cuts[1])
    streamed, _ = splits.join(pools["one"][1], cuts[0], pools["two"][1], cuts[1])
    assert isinstance(streamed.images, MappedImages)
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
    assert isinstance(train.load_pool(profile, name).images, MappedImages)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

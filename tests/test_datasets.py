"""Pools, cache files, folders and sources: what a user has on disk, whole or broken."""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mia_utils import datasets, paths
from mia_utils.datasets import cache, sources, torchvision_sets


def make_arrays(n: int = 6, *, size: int = 4, n_classes: int = 3, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8),
        "labels": np.arange(n, dtype=np.uint8) % n_classes,
        "image_ids": np.array([f"img{i:03d}" for i in range(n)]),
        "official_split": np.array(["train", "test"] * n)[:n],
        "class_names": np.array([f"class {i}" for i in range(n_classes)]),
    }


def write_images(folder: Path, names: list[str], *, size: tuple[int, int] = (6, 5), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    out = []
    for name in names:
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        out.append(pixels)
    return out


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) > 20
    return text


# ------------------------------------------------------------------------------------------- cache files


def test_a_cache_file_becomes_a_pool_with_int64_labels_and_tuple_names(tmp_path):
    arrays = make_arrays()
    np.savez(tmp_path / "mine.npz", **arrays)
    pool = datasets.load("mine", tmp_path)
    assert len(pool) == 6 and pool.labels.dtype == np.int64 and pool.class_names == ("class 0", "class 1", "class 2")
    assert np.array_equal(pool.images, arrays["images"]) and pool.masks is None
    assert "mine" in repr(pool) and len(repr(pool)) < 200


def test_the_order_and_string_width_of_a_file_do_not_change_the_pool(tmp_path):
    arrays = make_arrays()
    np.savez(tmp_path / "a.npz", **arrays)
    order = np.random.default_rng(1).permutation(6)
    moved = {k: v[order] if k != "class_names" else v for k, v in arrays.items()}
    moved["image_ids"] = moved["image_ids"].astype("<U40")
    np.savez(tmp_path / "b.npz", **moved)
    a, b = datasets.load("a", tmp_path), datasets.load("b", tmp_path)
    assert a.hash == b.hash and np.array_equal(a.images, b.images)


def test_the_hash_changes_with_one_pixel_one_label_or_one_id():
    base = make_arrays()
    hashes = {datasets.Pool(name="p", **base).hash}
    for key in ("images", "labels", "image_ids"):
        changed = {k: v.copy() for k, v in base.items()}
        changed[key].flat[0] = {"images": 255 - changed["images"].flat[0], "labels": 2, "image_ids": "other"}[key]
        hashes.add(datasets.Pool(name="p", **changed).hash)
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": None}, ["images", "missing"]),
        ({"labels": None}, ["labels", "missing"]),
        ({"image_ids": None}, ["image_ids", "missing"]),
        ({"class_names": None}, ["class_names", "missing"]),
        ({"images": np.zeros((6, 4, 4, 3), np.float32)}, ["images", "float32 in [0, 1]", "uint8"]),
        ({"images": np.full((6, 4, 4, 3), np.nan, np.float32)}, ["images", "288 NaN", "uint8"]),
        ({"images": np.full((6, 4, 4, 3), 7.5)}, ["images", "float64", "uint8"]),
        ({"images": np.zeros((6, 4, 4, 3), np.int64)}, ["images", "int64", "uint8"]),
        ({"images": np.zeros((6, 3, 4, 4), np.uint8)}, ["images", "(6, 3, 4, 4)", "(N, H, W, 3)"]),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, ["images", "(0, 4, 4, 3)", "at least 1"]),
        ({"images": np.zeros((5, 4, 4, 3), np.uint8)}, ["labels", "(6,)", "N = 5"]),
        ({"labels": np.array([0, 1, 2, 3, 0, 1])}, ["labels", "0 to 3", "0 to 2"]),
        ({"labels": np.array([0, 1, -1, 0, 0, 1])}, ["labels", "-1"]),
        ({"labels": np.zeros(6, np.float32)}, ["labels", "float32", "integer"]),
        ({"labels": np.zeros(5, np.int64)}, ["labels", "(5,)", "N = 6"]),
        ({"image_ids": np.arange(6)}, ["image_ids", "str"]),
        ({"image_ids": np.array(list("abcdea"))}, ["image_ids", "'a'", "unique"]),
        ({"official_split": np.array(["train"])}, ["official_split", "(1,)", "N = 6"]),
        ({"masks": np.zeros((6, 4, 5), np.uint8)}, ["masks", "(6, 4, 5)", "N = 6, H = 4, W = 4"]),
        ({"masks": np.full((6, 4, 4), 9, np.uint8)}, ["masks", "9", "255"]),
        ({"part_boxes": np.zeros((6, 2, 4), np.float32)}, ["part_boxes", "part_names"]),
        ({"part_boxes": np.zeros((6, 3, 4)), "part_names": np.array(["a", "b"])}, ["part_names", "(2,)", "P = 3"]),
        ({"group": np.zeros(6)}, ["group", "unknown array"]),
        ({"class_names": np.array("one")}, ["class_names"]),
    ],
)
def test_a_wrong_array_is_one_line_that_names_the_file_and_the_array(tmp_path, change, words):
    arrays = {k: v for k, v in (make_arrays() | change).items() if v is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError) as error:
        datasets.load("bad", tmp_path)
    text = one_line(error)
    assert "bad.npz" in text and all(word in text for word in words), text


def test_an_object_array_is_refused_and_its_code_is_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    arrays = make_arrays() | {"labels": np.array([Evil()] * 6, dtype=object)}
    np.savez(tmp_path / "evil.npz", **arrays)
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Evil()))
    for name in ("evil", "raw"):
        with pytest.raises(ValueError) as error:
            datasets.load(name, tmp_path)
        assert "refused" in one_line(error) and f"{name}.npz" in str(error.value)
    assert not ran.exists()


def test_a_truncated_a_flipped_and_an_empty_file_are_one_line_each(tmp_path):
    np.savez(tmp_path / "whole.npz", **make_arrays(40, size=16))
    data = (tmp_path / "whole.npz").read_bytes()
    broken = {"cut": data[: len(data) // 2], "none": b"", "text": b"not found, sorry"}
    broken["flip"] = data[:2000] + bytes([data[2000] ^ 255]) + data[2001:]
    for name, content in broken.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(ValueError) as error:
            datasets.load(name, tmp_path)
        assert f"{name}.npz" in one_line(error)


def test_a_single_array_under_the_name_of_a_cache_is_refused(tmp_path):
    with open(tmp_path / "single.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="single.npz.*several named arrays"):
        datasets.load("single", tmp_path)


def test_a_written_cache_reads_back_and_leaves_no_temporary_file(tmp_path):
    pool = datasets.Pool(name="p", **make_arrays())
    datasets.write_cache(tmp_path / "p.npz", {"images": pool.images, "class_names": pool.class_names})
    read = datasets.read_cache(tmp_path / "p.npz")
    assert np.array_equal(read["images"], pool.images) and tuple(read["class_names"]) == pool.class_names
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]


def test_no_space_and_no_right_to_write_are_one_line_and_leave_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(ValueError) as error:
        datasets.write_cache(tmp_path / "p.npz", make_arrays())
    assert "No space left" in one_line(error) and "p.npz" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="can not write"):
        datasets.write_cache(tmp_path / "file" / "p.npz", make_arrays())


def test_an_unknown_name_lists_the_names_and_a_path_is_no_name(tmp_path):
    for name in ("cifar11", "../secret", "", "scenes-day"):
        with pytest.raises(ValueError) as error:
            datasets.load(name, tmp_path)
        assert "cifar10" in one_line(error) and "folder:PATH" in str(error.value)


def test_a_missing_data_folder_is_one_line_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MIA_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError) as error:
        datasets.load("cifar10")
    assert "MIA_DATA_DIR" in one_line(error) and "nowhere" in str(error.value)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        datasets.load("cifar10", tmp_path / "elsewhere")


def test_n_draws_distinct_images_by_seed_and_too_many_is_an_error(tmp_path):
    np.savez(tmp_path / "mine.npz", **make_arrays(50))
    a, b, c = (datasets.load("mine", tmp_path, n=20, seed=seed) for seed in (0, 0, 1))
    assert len(set(a.image_ids)) == 20 and a.hash == b.hash != c.hash
    with pytest.raises(ValueError, match="at most 50.*n=51"):
        datasets.load("mine", tmp_path, n=51)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="positive number"):
            datasets.load("mine", tmp_path, n=bad)


def test_size_scales_images_and_masks_alike(tmp_path):
    arrays = make_arrays(3, size=8) | {"masks": np.full((3, 8, 8), 255, np.uint8)}
    arrays["masks"][:, 4:] = 2
    np.savez(tmp_path / "mine.npz", **arrays)
    pool = datasets.load("mine", tmp_path, size=4)
    assert pool.images.shape == (3, 4, 4, 3) and pool.masks.shape == (3, 4, 4)
    assert (pool.masks[:, :2] == 255).all() and (pool.masks[:, 2:] == 2).all()
    assert np.array_equal(pool.images[1], np.asarray(Image.fromarray(arrays["images"][1]).resize((4, 4), 3)))
    for bad in (0, "32", (4, 4, 4), (4, 0), True):
        with pytest.raises(ValueError, match="size"):
            datasets.load("mine", tmp_path, size=bad)


def test_to_float_is_exactly_the_bytes_over_255():
    images = np.arange(2 * 8 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(2, 8, 16, 3)
    out = datasets.to_float(images)
    assert out.shape == (2, 3, 8, 16) and out.is_contiguous() and str(out.dtype) == "torch.float32"
    assert np.array_equal((out.permute(0, 2, 3, 1) * 255).round().numpy().astype(np.uint8), images)
    assert out.min() == 0 and out.max() == 1
    for bad in (images.astype(np.float32), images[0], images.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match="uint8 images"):
            datasets.to_float(bad)


# ------------------------------------------------------------------------------------------- camvid


def make_camvid(tmp_path: Path, name: str = "camvid") -> dict:
    n = 37
    rng = np.random.default_rng(0)
    drives = np.array(["0001TP"] * 20 + ["Seq05VD"] * 17)
    arrays = {
        "images": rng.integers(0, 256, (n, 6, 8, 3), dtype=np.uint8),
        "masks": rng.integers(0, 12, (n, 6, 8)).astype(np.uint8),
        "image_ids": np.array([f"{drive}_{i:05d}.png" for i, drive in enumerate(drives)]),
        "groups": drives,
        "official_split": np.array(["train"] * 20 + ["test"] * 17),
        "class_names": np.array([f"c{i}" for i in range(11)] + ["void"]),
    }
    order = rng.permutation(n)  # as in the real file, frames are not in the order of time
    moved = {k: v[order] if k != "class_names" else v for k, v in arrays.items()}
    np.savez(tmp_path / f"{name}.npz", **moved)
    return arrays


def test_camvid_void_becomes_255_and_leaves_the_class_names(tmp_path):
    arrays = make_camvid(tmp_path)
    pool = datasets.load("camvid", tmp_path)
    assert pool.class_names == tuple(f"c{i}" for i in range(11))
    assert np.array_equal(pool.masks == 255, arrays["masks"] == 11)
    assert np.array_equal(pool.masks[pool.masks != 255], arrays["masks"][arrays["masks"] != 11])
    assert (pool.labels == 0).all()


def test_camvid_groups_are_blocks_of_eight_consecutive_frames_of_one_drive(tmp_path):
    make_camvid(tmp_path, "camvid-6x8")
    pool = datasets.load("camvid", tmp_path)
    assert sorted(set(pool.groups)) == [f"0001TP/00{i}" for i in range(3)] + [f"Seq05VD/00{i}" for i in range(3)]
    for group in set(pool.groups):
        where = np.flatnonzero(pool.groups == group)
        assert len(where) <= 8 and np.array_equal(where, np.arange(where[0], where[0] + len(where)))
        assert all(name.startswith(group.split("/")[0]) for name in pool.image_ids[where])


def test_camvid_of_several_sizes_asks_which_and_takes_the_named_one(tmp_path):
    make_camvid(tmp_path, "camvid-6x8")
    arrays = datasets.read_cache(tmp_path / "camvid-6x8.npz")
    arrays["images"], arrays["masks"] = arrays["images"][:, :3, :4], arrays["masks"][:, :3, :4]
    np.savez(tmp_path / "camvid-3x4.npz", **arrays)
    with pytest.raises(ValueError, match="camvid-3x4.npz, camvid-6x8.npz.*size"):
        datasets.load("camvid", tmp_path)
    assert datasets.load("camvid", tmp_path, size=(3, 4)).images.shape[1:3] == (3, 4)
    with pytest.raises(FileNotFoundError, match="camvid-HEIGHTxWIDTH.npz"):
        (tmp_path / "empty").mkdir()
        datasets.load("camvid", tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


def test_a_void_class_in_the_middle_closes_the_gap_in_the_class_numbers(tmp_path):
    arrays = make_arrays(2, size=2) | {"masks": np.array([[[0, 1], [2, 2]], [[1, 1], [0, 2]]], np.uint8)}
    arrays["mask_class_names"] = np.array(["sky", "void", "car"])
    np.savez(tmp_path / "mine.npz", **arrays)
    pool = datasets.load("mine", tmp_path)
    assert pool.mask_class_names == ("sky", "car") and pool.class_names == ("class 0", "class 1", "class 2")
    assert pool.masks.tolist() == [[[0, 255], [1, 1]], [[255, 255], [0, 1]]]


def test_a_part_is_the_set_itself_under_a_name_that_can_ask_for_fewer_images(tmp_path):
    np.savez(tmp_path / "mine.npz", **make_arrays(6, size=2))
    whole, part = datasets.load("mine", tmp_path), datasets.load("mine@part", tmp_path, n=4)
    assert part.name == "mine@part" and len(part) == 4 and len(whole) == 6
    where = np.flatnonzero(np.isin(whole.image_ids, part.image_ids))
    assert np.array_equal(whole.images[where], part.images) and np.array_equal(whole.labels[where], part.labels)


# ------------------------------------------------------------------------------------------- folders


def test_class_subfolders_give_labels_and_relative_paths_give_ids(tmp_path):
    names = ["dog/b.png", "cat/a.png", "dog/a.png", "cat/deep/c.png"]
    pixels = dict(zip(names, write_images(tmp_path, names), strict=True))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._a.png").write_bytes(b"leftover of another system")
    pool = datasets.load(f"folder:{tmp_path}")
    assert pool.image_ids.tolist() == sorted(names) and pool.class_names == ("cat", "dog")
    assert pool.labels.tolist() == [0, 0, 1, 1] and pool.official_split is None
    for name, image in zip(pool.image_ids, pool.images, strict=True):
        assert np.array_equal(image, pixels[str(name)])


def test_a_flat_folder_is_one_class_and_train_test_folders_are_the_official_split(tmp_path):
    write_images(tmp_path / "flat", ["b.png", "a.png"])
    flat = datasets.load(f"folder:{tmp_path / 'flat'}")
    assert flat.class_names == ("all",) and flat.name == "folder:flat"
    write_images(tmp_path / "parted", ["train/dog/a.png", "test/cat/b.png", "train/cat/c.png"])
    parted = datasets.load(f"folder:{tmp_path / 'parted'}")
    assert parted.official_split.tolist() == ["test", "train", "train"] and parted.class_names == ("cat", "dog")


def test_a_corrupt_image_is_named_whether_cut_empty_or_no_image(tmp_path):
    for name, damage in {
        "cut.png": lambda data: data[: len(data) // 2],
        "empty.jpg": lambda data: b"",
        "text.png": lambda data: b"<html>404</html>",
    }.items():
        folder = tmp_path / name.split(".")[0]
        write_images(folder, ["a/good.png", f"a/{name}"], size=(40, 40))
        (folder / "a" / name).write_bytes(damage((folder / "a" / name).read_bytes()))
        for size in (None, 8):
            with pytest.raises(ValueError) as error:
                datasets.load(f"folder:{folder}", size=size)
            assert name in one_line(error) and "good.png" not in str(error.value)


def test_images_of_mixed_sizes_name_two_files_unless_a_size_is_given(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"], size=(6, 5))
    write_images(tmp_path, ["c.png"], size=(12, 9))
    with pytest.raises(ValueError) as error:
        datasets.load(f"folder:{tmp_path}")
    text = one_line(error)
    assert all(word in text for word in ("a.png", "6 x 5", "c.png", "12 x 9", "size="))
    assert datasets.load(f"folder:{tmp_path}", size=4).images.shape == (3, 4, 4, 3)
    assert datasets.load(f"folder:{tmp_path}", size=(4, 6)).images.shape == (3, 4, 6, 3)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (7, 90), (33, 32), (10, 12), (16, 16)])
def test_size_gives_what_resize_and_center_crop_of_torchvision_give(tmp_path, shape):
    from torchvision.transforms.v2 import functional as tv

    (pixels,) = write_images(tmp_path, ["a.png"], size=shape)
    ours = datasets.load(f"folder:{tmp_path}", size=16).images[0]
    theirs = tv.resize(Image.fromarray(pixels), [16], interpolation=tv.InterpolationMode.BICUBIC)
    assert np.array_equal(ours, np.asarray(tv.center_crop(theirs, [16, 16])))


def test_missing_and_empty_folders_and_too_large_n_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        datasets.load(f"folder:{tmp_path / 'nowhere'}")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match="no image"):
        datasets.load(f"folder:{tmp_path}")
    write_images(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match="at most 1 images.*n=2"):
        datasets.load(f"folder:{tmp_path}", n=2)


def test_gray_and_palette_images_become_rgb_and_16_bit_is_refused(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "gray.png")
    Image.new("P", (4, 4)).save(tmp_path / "palette.gif")
    pool = datasets.load(f"folder:{tmp_path}")
    assert pool.images.shape == (2, 4, 4, 3) and (pool.images[0] == 7).all()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png.*8 bits"):
        datasets.load(f"folder:{tmp_path}")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_and_what_is_opaque_is_as_it_was(tmp_path, mode):
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (4, 8, 4), dtype=np.uint8)
    rgba[:, :4, 3], rgba[:, 4:, 3] = 0, 255
    image = Image.fromarray(rgba)
    if mode == "P":
        image = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8), (4, 1)))
        image.putpalette(rng.integers(0, 200, 24).astype(np.uint8).tobytes())
        image.info["transparency"] = bytes([0] * 4 + [255] * 4)
    image = image.convert(mode)
    image.save(tmp_path / "a.png")
    pixels = datasets.load(f"folder:{tmp_path}").images[0]
    assert (pixels[:, :4] == 255).all() and np.array_equal(pixels[:, 4:], np.asarray(image.convert("RGB"))[:, 4:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_masks_are_turned_as_their_exif_orientation_says(tmp_path, orientation):
    upright = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    stored = Image.fromarray(upright)
    if orientation > 1:
        undo = (None, None, 0, 3, 1, 5, 4, 6, 2)[orientation]  # Pillow's Transpose that shows a stored image upright
        inverse = {2: 4, 4: 2}.get(undo, undo)  # a quarter turn is undone by the other one
        stored = stored.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[274] = orientation
    for part, pixels in (("images", stored), ("masks", stored.getchannel(0).point(lambda x: x % 3))):
        (tmp_path / part).mkdir()
        pixels.save(tmp_path / part / "a.png", exif=exif)
    pool = datasets.load(f"folder:{tmp_path}")
    assert np.array_equal(pool.images[0], upright) and np.array_equal(pool.masks[0], upright[:, :, 0] % 3)


@pytest.mark.parametrize("suffix", ["avif", "jfif", "JPE", "jp2", "tga", "JPG", "webp", "ppm", "bmp", "tiff", "qoi"])
def test_what_pillow_reads_is_read(tmp_path, suffix):
    kind = {"jfif": "jpeg", "jpe": "jpeg", "jp2": "jpeg2000", "jpg": "jpeg"}.get(suffix.lower(), suffix)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", format=kind)
    pool = datasets.load(f"folder:{tmp_path}")
    assert np.array_equal(pool.images[0], np.asarray(Image.open(tmp_path / f"a.{suffix}").convert("RGB")))


def make_link_loop(folder: Path) -> None:
    (folder / "loop").symlink_to(folder, target_is_directory=True)


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (lambda f: os.mkfifo(f / "pipe.png"), "pipe.png (1: no regular file)"),
        (lambda f: (f / "gone.png").symlink_to(f / "nowhere.png"), "gone.png (1: no regular file)"),
        (lambda f: (f / "._ok.png").write_bytes(b"\0\5\x16\7"), "._ok.png (1: hidden"),
        (lambda f: (f / "Thumbs.db").write_bytes(b"x"), "Thumbs.db (1: hidden"),
        (lambda f: write_images(f, ["__MACOSX/ok.png"]), "__MACOSX (1: hidden"),
        (lambda f: write_images(f, [".ipynb_checkpoints/ok-checkpoint.png"]), ".ipynb_checkpoints (1: hidden"),
        (lambda f: [(f / f"{i}.heic").touch() for i in range(5)], "0.heic, 1.heic, 2.heic ... (5: no image format"),
        (make_link_loop, "loop (1: a link to a folder above it)"),
    ],
)
def test_what_is_left_out_is_counted_and_named_in_one_line(tmp_path, capsys, add, reason):
    write_images(tmp_path, ["ok.png"])
    assert len(datasets.load(f"folder:{tmp_path}")) == 1 and not capsys.readouterr().err
    add(tmp_path)
    pool = datasets.load(f"folder:{tmp_path}")
    said = capsys.readouterr().err.splitlines()
    assert pool.image_ids.tolist() == ["ok.png"] and len(said) == 1 and reason in said[0], said


def test_linked_classes_are_classes(tmp_path):
    write_images(tmp_path / "set", ["a/0.png", "a/1.png"])
    write_images(tmp_path / "elsewhere", ["0.png"])
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    pool = datasets.load(f"folder:{tmp_path / 'set'}")
    assert pool.class_names == ("a", "b") and pool.image_ids.tolist() == ["a/0.png", "a/1.png", "b/0.png"]


@pytest.mark.parametrize("name", ["folder:", "folder:  "])
def test_a_folder_without_a_name_is_refused(tmp_path, monkeypatch, name):
    write_images(tmp_path, ["a.png"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected the path of an image folder"):
        datasets.load(name)
    assert len(datasets.load("folder:.")) == 1


def test_n_files_of_a_folder_are_drawn_before_decoding(tmp_path):
    write_images(tmp_path, [f"{i:02d}.png" for i in range(20)])
    a, b = (datasets.load(f"folder:{tmp_path}", n=5, seed=seed) for seed in (0, 1))
    assert len(a) == 5 and a.image_ids.tolist() != b.image_ids.tolist() and sorted(a.image_ids) == a.image_ids.tolist()


def test_images_that_do_not_fit_in_memory_are_refused_before_decoding(tmp_path, monkeypatch):
    write_images(tmp_path, ["a.png", "b.png"])
    monkeypatch.setattr(cache, "count_memory", lambda: 100.0)
    with pytest.raises(ValueError, match="GB of memory"):
        datasets.load(f"folder:{tmp_path}")


def make_tiny_imagenet(root: Path) -> Path:
    folder = root / "tiny-imagenet-200"
    write_images(folder, [f"train/{w}/images/{w}_{i}.JPEG" for w in ("n02", "n01") for i in range(2)], size=(8, 8))
    write_images(folder, ["val/images/val_0.JPEG", "val/images/val_1.JPEG"], size=(8, 8))
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\ttailed frog\n")
    return folder


def test_tiny_imagenet_is_read_from_its_unpacked_archive_and_cached(tmp_path):
    make_tiny_imagenet(tmp_path)
    pool = datasets.load("tiny_imagenet", tmp_path)
    assert pool.class_names == ("goldfish", "tailed frog") and len(pool) == 6
    assert pool.image_ids[0] == "train/n01_0.JPEG" and pool.labels.tolist() == [0, 0, 1, 1, 1, 0]
    assert pool.official_split.tolist() == ["train"] * 4 + ["val"] * 2
    (tmp_path / "tiny-imagenet-200").rename(tmp_path / "moved")
    assert datasets.load("tiny_imagenet", tmp_path).hash == pool.hash


def test_a_missing_or_damaged_tiny_imagenet_names_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        datasets.load("tiny_imagenet", tmp_path)
    assert all(word in one_line(error) for word in ("train/WNID/images", "val_annotations.txt", "CS231n"))
    folder = make_tiny_imagenet(tmp_path)
    (folder / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(ValueError, match="val_1.JPEG"):
        datasets.load("tiny_imagenet", tmp_path)
    assert not (tmp_path / "tiny_imagenet.npz").exists()


# ------------------------------------------------------------------------------------------- sources


def test_a_source_is_one_function_asked_once_and_then_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", dict(datasets.SOURCES))
    calls = []

    def load_flowers(root: Path) -> dict:
        calls.append(root)
        return make_arrays()

    datasets.register_source("flowers", load_flowers)
    assert "flowers" in datasets.list_names()
    first, second = datasets.load("flowers", tmp_path), datasets.load("flowers", tmp_path)
    assert calls == [tmp_path] and first.hash == second.hash
    with pytest.raises(ValueError, match="exists"):
        datasets.register_source("flowers", load_flowers)
    for bad in ("a/b", "", "../x"):
        with pytest.raises(ValueError, match="source name"):
            datasets.register_source(bad, load_flowers)


def test_a_source_with_wrong_arrays_writes_no_cache(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "bad", sources.Source(lambda root: make_arrays() | {"labels": np.full(6, 9)}))
    with pytest.raises(ValueError, match="'bad'.*labels"):
        datasets.load("bad", tmp_path)
    assert not list(tmp_path.glob("*.npz"))


def test_jobs_that_start_together_ask_a_source_once(tmp_path, monkeypatch):
    calls = []
    go = threading.Event()

    def load_slowly(root: Path) -> dict:
        calls.append(root)
        go.wait(0.2)
        return make_arrays()

    monkeypatch.setitem(sources.SOURCES, "slow", sources.Source(load_slowly))
    found = []
    jobs = [threading.Thread(target=lambda: found.append(datasets.load("slow", tmp_path).hash)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(calls) == 1 and len(found) == 4 and len(set(found)) == 1


def make_cifar_archive(folder: Path) -> type:
    """Write an archive in the real format of CIFAR-10 and return a torchvision class that expects its checksums."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in ("data_batch_1", "test_batch"):
        entry = {
            "data": rng.integers(0, 256, (6, 3072), dtype=np.uint8),
            "labels": [5, 1, 0, 2, 3, 4],
            "filenames": [f"{name[:4]}_s_{i:06d}.png" for i in (3, 1, 2, 5, 4, 0)],
        }
        files[name] = (entry, pickle.dumps(entry))
    meta = {"label_names": ["airplane", "automobile", "bird", "cat", "deer", "dog"]}
    files["batches.meta"] = (meta, pickle.dumps(meta))
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, (_, data) in files.items():
            path = folder / name
            path.write_bytes(data)
            tar.add(path, f"cifar-10-batches-py/{name}")
            path.unlink()

    def digest(data: bytes) -> str:
        return hashlib.md5(data).hexdigest()

    class SmallCifar(CIFAR10):
        url = "http://127.0.0.1:9/nobody-listens-here"
        tgz_md5 = digest((folder / "cifar-10-python.tar.gz").read_bytes())
        train_list = [["data_batch_1", digest(files["data_batch_1"][1])]]
        test_list = [["test_batch", digest(files["test_batch"][1])]]
        meta = CIFAR10.meta | {"md5": digest(files["batches.meta"][1])}

    SmallCifar.entries = {name: entry for name, (entry, _) in files.items()}
    return SmallCifar


def test_a_placed_cifar_archive_is_unpacked_without_a_network_and_cached(tmp_path, monkeypatch):
    small = make_cifar_archive(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", small)
    pool = datasets.load("cifar10", tmp_path)
    assert len(pool) == 12 and pool.class_names[5] == "dog" and (tmp_path / "cifar10.npz").is_file()
    train = small.entries["data_batch_1"]
    where = pool.image_ids.tolist().index(f"train/{train['filenames'][0]}")
    assert pool.labels[where] == 5 and pool.official_split[where] == "train"
    # rows of the archive are red, green, blue planes
    assert np.array_equal(pool.images[where], train["data"][0].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_a_failed_download_is_one_line_that_says_how_to_place_the_file(tmp_path, monkeypatch, name):
    import torchvision

    for cls in ("CIFAR10", "CIFAR100", "STL10"):
        monkeypatch.setattr(getattr(torchvision.datasets, cls), "url", "http://127.0.0.1:9/nobody-listens-here")
    with pytest.raises(FileNotFoundError) as error:
        datasets.load(name, tmp_path)
    assert all(word in one_line(error) for word in (f"{name}.npz", ".tar.gz", str(tmp_path)))
    assert not list(tmp_path.glob("*.npz"))


def test_stl10_is_turned_to_height_width_channel(tmp_path, monkeypatch):
    class FakeStl:
        classes = ["bird", "car"]

        def __init__(self, root: str, *, split: str, download: bool) -> None:
            rng = np.random.default_rng(len(split))
            self.data = rng.integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
            self.labels = np.array([0, 1, 1], dtype=np.uint8)

    monkeypatch.setattr("torchvision.datasets.STL10", FakeStl)
    arrays = torchvision_sets.load_stl10(tmp_path)
    assert np.array_equal(arrays["images"][0], FakeStl("", split="train", download=True).data[0].transpose(1, 2, 0))
    pool = datasets.load("stl10", tmp_path, size=32)
    assert pool.images.shape == (6, 32, 32, 3) and pool.image_ids[0] == "test/00000"


# ------------------------------------------------------------------------------------------- scenes


def test_scenes_need_no_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MIA_DATA_DIR", str(tmp_path / "nowhere"))
    pool = datasets.load("scenes", n=4, size=32, seed=3)
    assert pool.images.shape == (4, 32, 32, 3) and pool.part_boxes.shape == (4, len(pool.part_names), 4)
    assert pool.name == "scenes" and pool.masks.shape == (4, 32, 32)
    assert datasets.load("scenes", n=4, size=32, seed=3) is pool
    assert datasets.load("scenes", n=4, size=32, seed=4).hash != pool.hash


def test_the_default_data_folder_is_made_when_something_is_written_there(monkeypatch, tmp_path):
    monkeypatch.delenv("MIA_DATA_DIR", raising=False)
    monkeypatch.setenv("MIA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="camvid"):
        datasets.load("camvid")
    assert not list((tmp_path / "data" / "raw").iterdir())  # not even a lock
    datasets.load("scenes", n=2, size=16)
    assert len(list((tmp_path / "data" / "raw").glob("scenes-16px-2-*.npz"))) == 1


def test_scenes_from_the_cache_are_the_generated_ones_even_after_the_cache_broke(tmp_path):
    first = datasets.load("scenes-night", tmp_path, n=3)
    (cached,) = tmp_path.glob("scenes-night-32px-3-seed0-*.npz")
    sources._load_scenes.cache_clear()
    assert datasets.load("scenes-night", tmp_path, n=3).hash == first.hash
    cached.write_bytes(cached.read_bytes()[:100])
    sources._load_scenes.cache_clear()
    assert datasets.load("scenes-night", tmp_path, n=3).hash == first.hash


def test_scenes_are_generated_where_the_data_folder_can_not_be_written(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("can not write")

    monkeypatch.setattr(paths, "hold", refuse)
    assert len(datasets.load("scenes-sketch", tmp_path, n=2)) == 2
    assert not list(tmp_path.iterdir())

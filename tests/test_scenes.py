"""The generated data set: i.i.d. by construction, and its masks and part boxes tell the truth."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from mia_utils.datasets import scenes


@pytest.fixture(scope="module")
def drawn() -> dict:
    return scenes.make_scenes(150, seed=3, progress=False)


def _find_kind(drawn: dict, kind: str) -> np.ndarray:
    return np.flatnonzero(drawn["labels"] == drawn["class_names"].index(kind))


def test_arrays_have_the_promised_shapes_and_types(drawn):
    n, parts = 150, len(drawn["part_names"])
    assert drawn["images"].shape == (n, 32, 32, 3) and drawn["images"].dtype == np.uint8
    assert drawn["masks"].shape == (n, 32, 32) and drawn["masks"].dtype == np.uint8
    assert drawn["labels"].shape == (n,) and drawn["labels"].dtype == np.int64
    assert drawn["part_boxes"].shape == (n, parts, 4) and drawn["part_boxes"].dtype == np.float32
    assert drawn["image_ids"][123] == "scenes/000123" and len(set(drawn["image_ids"])) == n
    assert len(drawn["class_names"]) >= 8 and {"chair", "dog"} <= set(drawn["class_names"])
    assert set(drawn["labels"]) == set(range(len(drawn["class_names"])))


def test_an_image_depends_on_seed_and_index_and_not_on_how_many_are_drawn(drawn):
    few = scenes.make_scenes(4, seed=3, progress=False)
    for name in ("images", "masks", "labels", "image_ids", "part_boxes"):
        np.testing.assert_array_equal(few[name], drawn[name][:4])
    assert (scenes.make_scenes(4, seed=4, progress=False)["images"] != few["images"]).any(axis=(1, 2, 3)).all()


GOLDEN = {"scenes": "af97316d1749bda0", "scenes-night": "4de879b2cc93257c", "scenes-sketch": "6a7d7ccf0a923d34"}


@pytest.mark.parametrize("style", scenes.STYLES)
def test_the_images_of_yesterday_are_those_of_today(style):
    digest = hashlib.blake2b(digest_size=8)
    for size in (32, 37):  # models are found by the recipe of the scenes, not by their pixels: these must not change
        made = scenes.make_scenes(8, size=size, style=style, seed=3, progress=False)
        for name in ("images", "masks", "labels", "part_boxes"):
            digest.update(made[name])
    assert digest.hexdigest() == GOLDEN[style]


def test_drawing_leaves_the_global_random_state_alone():
    np.random.seed(0)
    expected = np.random.random(3)
    np.random.seed(0)
    scenes.make_scenes(1, progress=False)
    np.testing.assert_array_equal(np.random.random(3), expected)


def test_styles_differ_and_night_is_darker_than_day_and_day_than_paper(drawn):
    night, sketch = (scenes.make_scenes(20, style=s, seed=3, progress=False) for s in scenes.STYLES[1:])
    assert night["image_ids"][0] == "scenes-night/000000"
    assert night["images"].mean() + 20 < drawn["images"].mean() < sketch["images"].mean() - 20

    def measure_colorfulness(images):
        return np.ptp(images.astype(float), axis=3).mean()

    assert measure_colorfulness(sketch["images"]) < 0.7 * measure_colorfulness(drawn["images"])


def test_no_two_scenes_are_alike(drawn):
    flat = drawn["images"].reshape(150, -1).astype(np.float32)
    flat = (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)
    correlation = flat @ flat.T / flat.shape[1]
    np.fill_diagonal(correlation, 0.0)
    assert correlation.max() < 0.9  # the same picture with new sensor noise has more than 0.97


def test_pictures_are_as_busy_as_photographs(drawn):
    # Flat drawings show no leak to a part attack. The mean squared step between neighbors is 1,180 on CIFAR-10.
    images = drawn["images"].astype(float)
    energy = (np.diff(images, axis=1) ** 2).mean() + (np.diff(images, axis=2) ** 2).mean()
    assert 700 < energy < 2000
    per_image = (np.diff(images, axis=1) ** 2).mean(axis=(1, 2, 3))
    assert np.quantile(per_image, 0.05) > 100


def test_masks_are_in_range_and_show_the_labelled_object(drawn):
    masks, labels = drawn["masks"], drawn["labels"]
    assert drawn["mask_class_names"][2:] == drawn["class_names"] and len(drawn["mask_class_names"]) == 11
    assert masks.max() < len(drawn["mask_class_names"])
    own = (masks == (labels + 2)[:, None, None]).mean(axis=(1, 2))
    assert own.min() > 0.04 and 0.15 < own.mean() < 0.5
    kinds = np.array([len(np.unique(m[m >= 2])) for m in masks])
    assert kinds.max() == 2 and 0.1 < (kinds == 2).mean() < 0.5  # sometimes a second, small object
    assert (masks < 2).any(axis=(1, 2)).all()


def test_part_boxes_lie_in_the_frame_and_cover_the_object(drawn):
    boxes, masks, labels = drawn["part_boxes"], drawn["masks"], drawn["labels"]
    there = ~np.isnan(boxes).any(axis=2)
    assert (np.isnan(boxes).all(axis=2) == ~there).all()
    y0, x0, y1, x1 = boxes[there].T
    assert (y0 >= 0).all() and (x0 >= 0).all() and (y1 <= 32).all() and (x1 <= 32).all()
    assert (y0 < y1).all() and (x0 < x1).all()
    for i in range(len(masks)):
        covered = np.zeros((32, 32), dtype=bool)
        for a, b, c, d in boxes[i][there[i]]:
            covered[int(a) : int(np.ceil(c)), int(b) : int(np.ceil(d))] = True
            inside = masks[i, int(a) : int(np.ceil(c)), int(b) : int(np.ceil(d))]
            assert (inside >= 2).any() or inside.size <= 4  # thinner than a pixel: the sample may fall beside it
        own = masks[i] == labels[i] + 2
        assert (own & ~covered).sum() <= 0.02 * own.sum() + 2


def test_parts_are_those_of_the_kind(drawn):
    there = ~np.isnan(drawn["part_boxes"]).any(axis=2)
    for kind in drawn["class_names"]:
        of_kind = there[_find_kind(drawn, kind)]
        seen = {name for name, flag in zip(drawn["part_names"], of_kind.any(axis=0), strict=True) if flag}
        assert seen <= set(scenes.KIND_PARTS[kind])
    for kind, part in (("chair", "seat"), ("chair", "legs"), ("dog", "muzzle"), ("dog", "legs")):
        assert there[_find_kind(drawn, kind), drawn["part_names"].index(part)].mean() > 0.7


def test_the_main_object_takes_35_to_70_percent_of_the_frame(drawn):
    boxes = drawn["part_boxes"]
    extent = np.nanmax(boxes[..., 2:], axis=1) - np.nanmin(boxes[..., :2], axis=1)
    area = extent.prod(axis=1) / 32**2  # of the box around all its parts
    assert 0.45 < area.mean() < 0.6
    assert np.mean((area > 0.33) & (area < 0.72)) > 0.9  # slender objects are limited by the frame's height


def test_a_scene_shows_the_same_at_another_size(drawn):
    large = scenes.make_scenes(3, size=96, seed=3, progress=False)
    np.testing.assert_array_equal(large["labels"], drawn["labels"][:3])
    small = large["images"].reshape(3, 32, 3, 32, 3, 3).mean(axis=(2, 4))
    for a, b in zip(small, drawn["images"], strict=False):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9
    assert np.nanmax(np.abs(large["part_boxes"] / 3 - drawn["part_boxes"][:3])) < 1.5


@pytest.mark.parametrize("style", scenes.STYLES)
@pytest.mark.parametrize("size", [16, 37, 260])
def test_any_size_works(size, style):
    one = scenes.make_scenes(1, size=size, style=style, progress=False)
    assert one["images"].shape == (1, size, size, 3) and one["masks"].shape == (1, size, size)
    assert one["images"].std() > 10


@pytest.mark.parametrize(
    "arguments",
    [{"style": "cartoon"}, {"size": 8}, {"size": 513}, {"size": 32.0}, {"n": 0}, {"n": -5}, {"n": 2.5}, {"n": True}],
)
def test_a_wrong_argument_is_named_in_one_line(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))) as error:
        scenes.make_scenes(**{"n": 1, "progress": False, **arguments})
    assert "\n" not in str(error.value) and "got" in str(error.value)

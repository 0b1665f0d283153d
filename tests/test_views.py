"""Crops against torchvision's one-at-a-time oracle, and streams that depend on the image alone."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from mia_utils import seeds, views


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0).integers(0, 256, (12, 3, 9, 9), dtype=np.uint8)
    return F.resize(torch.from_numpy(noise), [32, 32], interpolation=F.InterpolationMode.BICUBIC, antialias=True)


IDS = [f"image/{i}" for i in range(12)]


@pytest.mark.parametrize(("scale", "size"), [((0.08, 0.2), 16), ((0.5, 1.0), 16), ((0.01, 0.03), 24)])
def test_crops_equal_torchvision_up_to_the_rounding_of_its_integer_kernel(images, scale, size):
    boxes, flips = views.draw_boxes(IDS, 20, height=32, width=32, scale=scale, seed=3, stream="test")
    ours = views.resized_crop(images, boxes, size, flips=flips) * 255
    worst = []
    for i in range(len(images)):
        for k in range(20):
            crop = F.resized_crop(
                images[i], *boxes[i, k].tolist(), size=[size, size], interpolation=F.InterpolationMode.BICUBIC
            )
            crop = crop.flip(-1) if flips[i, k] else crop
            worst.append((ours[i, k] - crop.float()).abs())
    difference = torch.stack(worst)
    assert difference.max() <= 2.001  # torchvision keeps 16-bit integer weights
    assert (difference <= 1.001).float().mean() > 0.9999


def test_a_crop_of_everything_at_the_same_size_changes_nothing(images):
    assert torch.equal(views.make_views(images, IDS, size=32, seed=0), images.float() / 255)


def test_a_crop_does_not_see_the_pixels_around_its_box(images):
    box = torch.tensor([[[8, 8, 10, 12]]]).expand(len(images), 1, 4)
    changed = images.clone()
    changed[:, :, :8], changed[:, :, 18:], changed[:, :, :, :8], changed[:, :, :, 20:] = 0, 255, 0, 255
    assert torch.equal(views.resized_crop(images, box, 16), views.resized_crop(changed, box, 16))


def test_boxes_depend_on_the_image_alone():
    make = lambda ids, seed=1: views.draw_boxes(ids, 7, height=32, width=48, seed=seed, stream="partcrop")  # noqa: E731
    boxes, flips = make(IDS)
    shuffled, shuffled_flips = make(IDS[::-1])
    assert torch.equal(shuffled.flip(0), boxes) and torch.equal(shuffled_flips.flip(0), flips)
    assert torch.equal(make(IDS[4:5])[0][0], boxes[4])
    assert not torch.equal(make(IDS, seed=2)[0], boxes)


def test_boxes_follow_the_distribution_of_torchvision():
    boxes, flips = views.draw_boxes([str(i) for i in range(400)], 10, height=32, width=32, seed=0, stream="test")
    boxes = boxes.reshape(-1, 4).double()
    assert (boxes[:, 0] + boxes[:, 2] <= 32).all() and (boxes[:, 1] + boxes[:, 3] <= 32).all()
    image = torch.zeros(3, 32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.make_params(RandomResizedCrop(16, (0.08, 0.2)), [image]) for _ in range(4000)]
    expected = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs]).double()
    error = boxes.std(0) * (2 / 4000) ** 0.5  # standard error of a difference of two means of 4,000
    assert ((boxes.mean(0) - expected.mean(0)).abs() < 5 * error).all()
    assert abs(float(flips.double().mean()) - 0.5) < 0.04


def test_the_released_view_differs_from_the_controlled_one(images):
    cropped = views.make_views(images, IDS, view="random_resized_crop", size=32, seed=0)
    assert cropped.shape == (12, 3, 32, 32)
    assert (cropped - images / 255).abs().mean() > 0.05


@pytest.mark.parametrize("name", [*views.AUGMENTATIONS, "crop:0.3-0.9"])
def test_every_augmentation_keeps_shape_range_and_seed(images, name):
    settings = views.parse_augmentation(name)
    first, again = (views.augment(images, size=32, rng=seeds.rng(5, "step"), **settings) for _ in range(2))
    other = views.augment(images, size=32, rng=seeds.rng(6, "step"), **settings)
    assert first.shape == (12, 3, 32, 32) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "none")


def test_gray_images_stay_gray_under_hue(images):
    gray = images[:, :1].expand(-1, 3, -1, -1).contiguous()
    out = views.augment(gray, size=32, rng=seeds.rng(0, "gray"), jitter=1.0)
    assert (out.amax(1) - out.amin(1)).max() < 1e-5  # a rotation around the gray axis leaves it in place


@pytest.mark.parametrize("name", ["nothing", "crop:0.5", "crop:0.9-0.2", "crop:0-1"])
def test_an_unknown_augmentation_is_named(name):
    with pytest.raises(ValueError, match="unknown augmentation"):
        views.parse_augmentation(name)


def test_wrong_shapes_and_views_are_refused(images):
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\) and \(N, K, 4\)"):
        views.resized_crop(images, torch.zeros(3, 4, dtype=torch.long), 16)
    with pytest.raises(ValueError, match="expected view"):
        views.make_views(images, IDS, view="center", size=32, seed=0)
    with pytest.raises(ValueError, match="expected n >= 1"):
        views.draw_boxes(IDS, 3, height=32, width=32, scale=(0.5, 0.1), seed=0, stream="test")

"""Crops against torchvision's one-at-a-time oracle, and streams that depend on the image alone."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from mia_utils import seeds
from mia_utils.datasets.scenes import make_scenes
from mia_utils.models import views


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


@pytest.mark.parametrize(("side", "size"), [(96, 48), (224, 112)])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_crops_of_large_images_go_another_way_to_the_same_pixels(monkeypatch, side, size, kind):
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes, flips = views.draw_boxes(IDS[:2], 8, height=side, width=side, scale=(0.08, 1.0), seed=3, stream="test")
    seen = images if kind == "uint8" else images.float() / 255
    fast = views.resized_crop(seen, boxes, size, flips=flips)
    for k in range(8):
        crop = F.resized_crop(images[1], *boxes[1, k].tolist(), [size, size], F.InterpolationMode.BICUBIC)
        assert torch.equal(fast[1, k] * 255, (crop.flip(-1) if flips[1, k] else crop).float())
    off_levels = views.resized_crop(images.float() / 255 + 0.001, boxes, size, flips=flips)  # no levels: two products
    monkeypatch.setattr(views, "_LARGE", side**2 + 1)
    difference = (views.resized_crop(seen, boxes, size, flips=flips) - fast).abs() * 255
    assert difference.max() <= 2.001 and (difference <= 1.001).float().mean() > 0.9999
    assert torch.equal(views.resized_crop(images.float() / 255 + 0.001, boxes, size, flips=flips), off_levels)


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


def make_query_views(images, ids=IDS, n=4, *, augmentation="simclr", size=32, seed=1):
    return views.query_views(images, ids, n, augmentation=augmentation, size=size, seed=seed)


@pytest.mark.parametrize("name", [*views.AUGMENTATIONS, "crop:0.3-0.9"])
def test_query_views_depend_on_the_image_alone(images, name):
    together = make_query_views(images, augmentation=name)
    assert together.shape == (12, 4, 3, 32, 32) and together.min() >= 0 and together.max() <= 1
    # another batch sums the resampling in another order: far below one level of 1/255
    alone = torch.cat([make_query_views(images[i : i + 1], IDS[i : i + 1], augmentation=name) for i in range(12)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    turned = make_query_views(images.flip(0), IDS[::-1], augmentation=name)
    torch.testing.assert_close(turned.flip(0), together, rtol=0, atol=1e-5)
    assert torch.equal(make_query_views(images, augmentation=name), together)
    assert torch.equal(make_query_views(images, augmentation=name, seed=2), together) == (name == "none")


def test_fewer_query_views_are_the_first_of_more(images):
    many = make_query_views(images, n=30)
    for n in (1, 2, 10):
        torch.testing.assert_close(make_query_views(images, n=n), many[:, :n], rtol=0, atol=1e-5)
    assert not torch.allclose(many[:, 0], many[:, 1])


def test_query_views_of_two_augmentations_share_their_crops(images):
    gray = images[:, :1].expand(-1, 3, -1, -1)
    plain, colored = (make_query_views(gray, augmentation=name) for name in ("crop", "simclr"))
    for a, b in zip(plain.flatten(0, 1), colored.flatten(0, 1), strict=True):
        if 0 < b.amin() and b.amax() < 1:  # on a gray picture jitter scales and shifts, and may clip between
            assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.9


def test_query_views_are_what_training_would_make_of_the_same_draws(images):
    """One view at a time, with the draws handed to the training function."""

    class Replay:
        def __init__(self, row):
            self.chance, self.share, self.ratio, self.shift = np.split(row, (11, 21, 31))

        def uniform(self, low, high, shape):
            u, self.share, self.ratio = self.share, self.ratio, None  # the area first, then the shape
            return (low + (high - low) * u).reshape(shape)

        def random(self, shape, dtype=float):
            return (self.chance if dtype is np.float32 else self.shift).astype(dtype).reshape(shape)

    got = make_query_views(images, n=3, augmentation="simclr-weak", size=24)
    for i in range(4):
        rows = seeds.rng(1, "encodermi", IDS[i]).random((3, 33))
        for k in range(3):
            settings = views.parse_augmentation("simclr-weak")
            slow = views.augment(images[i : i + 1], size=24, rng=Replay(rows[k]), **settings)[0]
            torch.testing.assert_close(got[i, k], slow, rtol=0, atol=1e-5)


def test_query_crops_follow_the_distribution_of_torchvision():
    draws = np.random.default_rng(0).random((4000, 22))
    logs = np.log([3 / 4, 4 / 3])
    share, log_ratio = 0.2 + 0.8 * draws[:, :10], logs[0] + np.diff(logs) * draws[:, 10:20]
    boxes = views._place_boxes(share, log_ratio, draws[:, 20:], 32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make = RandomResizedCrop(16, (0.2, 1.0))
        theirs = [make.make_params([torch.zeros(3, 32, 32)]) for _ in range(4000)]
    expected = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs], float)
    error = expected.std(0) * (2 / 4000) ** 0.5  # standard error of a difference of two means of 4,000
    assert (np.abs(boxes.mean(0) - expected.mean(0)) < 5 * error).all()


def test_training_views_keep_their_numbers():
    """Trainings that are resumed, and committed artifacts, rest on these numbers: 8 images, every augmentation."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8))
    for name, (mean, pixel) in TRAINING_VIEWS.items():
        x = views.augment(images, size=24, rng=seeds.rng(0, name), solarize=0.2, **views.parse_augmentation(name))
        assert (float(x.mean()), float(x[3, 1, 5, 7])) == pytest.approx((mean, pixel), abs=2e-6), name  # float32 sums


TRAINING_VIEWS = {
    "none": (0.5000743, 0.6742892),
    "flip": (0.4638768, 0.4938384),
    "crop": (0.4759483, 0.2770577),
    "crop-weak": (0.4992630, 1.0000000),
    "simclr": (0.4275457, 0.6187094),
    "simclr-weak": (0.4296839, 0.4748549),
    "dino": (0.4432094, 0.1846521),
    "dino-local": (0.5388715, 0.4254322),
}


@pytest.mark.parametrize("name", ["nothing", "crop:0.5", "crop:0.9-0.2", "crop:0-1"])
def test_an_unknown_augmentation_is_named(name):
    with pytest.raises(ValueError, match="unknown augmentation"):
        views.parse_augmentation(name)


def test_wrong_shapes_and_views_are_refused(images):
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\) and \(N, K, 4\)"):
        views.resized_crop(images, torch.zeros(3, 4, dtype=torch.long), 16)
    with pytest.raises(ValueError, match="expected view"):
        views.make_views(images, IDS, view="center", size=32, seed=0)
    for bad in ({"n": 0}, {"ids": IDS[:3]}):
        with pytest.raises(ValueError, match="expected n >= 1 and 12 image ids"):
            make_query_views(images, **bad)
    with pytest.raises(ValueError, match=r"expected images \(N, 3, H, W\) uint8"):
        make_query_views(images / 255)
    with pytest.raises(ValueError, match="expected n >= 1"):
        views.draw_boxes(IDS, 3, height=32, width=32, scale=(0.5, 0.1), seed=0, stream="test")


def test_hue_turns_the_way_of_torchvision_and_is_not_its_shift():
    x = torch.from_numpy(make_scenes(40, progress=False)["images"]).permute(0, 3, 1, 2) / 255
    factors = torch.full((len(x), 4), 0.5)  # .5 leaves brightness, contrast, saturation and hue alone
    factors[:, 3] = torch.linspace(0, 1, len(x))
    theirs = torch.stack([F.adjust_hue(a, 0.2 * u - 0.1) for a, u in zip(x, factors[:, 3].tolist(), strict=True)])
    turned, back = views._jitter(x, factors), views._jitter(x, 1 - factors)
    shift, apart, opposite = ((theirs - other).abs().mean() for other in (x, turned, back))
    assert shift / 2 < apart < shift < opposite

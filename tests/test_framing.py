"""Queries in another framing: what changes, what does not, and who sees it."""

import io

import numpy as np
import pytest
from PIL import Image

from mia_utils import attacks
from mia_utils.attacks import framing
from mia_utils.datasets import Pool
from mia_utils.models import encoders
from mia_utils.protocol import splits

IDS = np.array([f"i{k}" for k in range(6)])


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", framing.FRAMINGS)
def test_a_framing_gives_images_of_the_same_kind_whatever_their_batch_mates(images, name):
    whole = framing.reframe(images, name, image_ids=IDS, seed=3)
    some = framing.reframe(images[[4, 1]], name, image_ids=IDS[[4, 1]], seed=3)
    assert whole.shape == images.shape and whole.dtype == np.uint8 and not np.array_equal(whole, images)
    np.testing.assert_array_equal(some, whole[[4, 1]])


def test_framings_are_what_they_are_called(images):
    made = {name: framing.reframe(images, name, image_ids=IDS) for name in framing.FRAMINGS}
    np.testing.assert_array_equal(made["mirrored"], images[:, :, ::-1])
    for k in (1, 2, 4):
        np.testing.assert_array_equal(made[f"shifted by {k} px"][:, :, k:], images[:, :, :-k])
        assert (made[f"shifted by {k} px"][:, :, :k] == images[:, :, :1]).all()
    file = io.BytesIO()
    Image.fromarray(images[0]).save(file, "JPEG", quality=50)
    assert np.abs(made["JPEG of quality 50"][0].astype(int) - np.asarray(Image.open(file))).max() == 0
    inner = (images > 40) & (images < 215)  # where noise is not clipped
    noise = (made["noise of 8/255"].astype(float) - images)[inner]
    assert abs(noise.std() - 8) < 0.3 and abs(noise.mean()) < 0.3
    dark = images < 200
    assert np.abs(made["20 % brighter"][dark] - 1.2 * images[dark]).max() <= 1


def test_the_model_sees_the_framing_the_control_without_a_model_does_not(images):
    rng = np.random.default_rng(1)
    many = rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    ids = np.array([f"n{k}" for k in range(200)])
    pool = Pool("noise", many, np.zeros(200, np.int64), ids, np.full(200, "train"), ["thing"])
    split = splits.draw(pool, n_members=40, n_nonmembers=80, n_shadow_members=0, n_shadow_nonmembers=0, seed=0)

    def extract(model, images, *, image_ids, seed):
        return images[:, 16, 1].mean(-1, keepdims=True).astype(np.float64)  # one pixel: moved by mirroring

    attacks.register("one-pixel", needs=set(), queries=1, extract=extract, score=lambda features: features[:, 0])
    try:
        model = encoders.wrap(lambda x: x.mean((2, 3)), size=32)
        plain, mirrored = (attacks.evaluate("one-pixel", model, pool, split, framing=f) for f in (None, "mirrored"))
    finally:
        attacks.ATTACKS.pop("one-pixel")
    at = {image_id: k for k, image_id in enumerate(pool.image_ids)}
    rows = [at[image_id] for image_id in mirrored.image_ids]
    np.testing.assert_array_equal(plain.score, many[rows][:, 16, 1].mean(-1))
    np.testing.assert_array_equal(mirrored.score, many[rows][:, 16, -2].mean(-1))
    assert "framing" not in plain.meta["params"] and mirrored.meta["params"]["framing"] == "mirrored"
    np.testing.assert_array_equal(plain.controls["no-model"].score, mirrored.controls["no-model"].score)
    with pytest.raises(ValueError, match="expected framing 'JPEG of quality 50', .* got 'upside down'"):
        attacks.evaluate("mim", model, pool, split, framing="upside down")

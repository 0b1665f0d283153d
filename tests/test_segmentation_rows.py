"""Segmenters through the one loop and the attack room: rows, resuming, evaluate with its controls."""

from __future__ import annotations

import numpy as np
import pytest

from mia_utils import attacks, datasets, pretrain
from mia_utils.models import segmenters
from mia_utils.protocol import splits

OPTIONS = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}


@pytest.fixture(scope="module")
def pool():
    return datasets.load("scenes", n=96, size=32, seed=0)


def train(pool, rows, seed=0, **options):
    return pretrain.fit(
        "unet",
        pool.images[rows][:, :, :24],  # not square: 32 x 24
        labels=pool.masks[rows][:, :, :24],
        arch="mobilenet_v2",
        epochs=2,
        batch_size=4,
        seed=seed,
        n_classes=len(pool.mask_class_names),
        progress=False,
        **OPTIONS,
        **options,
    )


def test_a_segmenter_is_trained_resumed_saved_and_opened_by_the_one_loop(pool, tmp_path):
    rows = np.arange(8)
    whole = train(pool, rows)
    resume = {"resume_path": tmp_path / "resume.pt"}
    train(pool, rows, stop_after=1, **resume)
    resumed = train(pool, rows, **resume)
    for key, value in whole.states[2].items():
        np.testing.assert_array_equal(value, resumed.states[2][key], err_msg=key)
    x = datasets.to_float(pool.images[:2, :, :24])
    whole.save(tmp_path / "run")
    loaded = pretrain.Run.load(tmp_path / "run", settings=whole.settings)
    expected = whole.encoder.posteriors(x)
    assert expected.shape == (2, 11, 32, 24)
    for segmenter in (loaded.encoder, segmenters.load(tmp_path / "run")):
        np.testing.assert_allclose(segmenter.posteriors(x).detach(), expected.detach(), atol=1e-5)
    assert not np.allclose(whole.encoder_at(0).posteriors(x).detach(), expected.detach(), atol=1e-3)
    assert {"loss_members", "seconds"} <= set(whole.history)


def test_every_segmentation_attack_runs_in_the_room_with_its_controls(pool):
    split = splits.draw(pool, n_members=16, n_nonmembers=16, n_shadow_members=16, n_shadow_nonmembers=16, seed=0)
    toy = segmenters.make("unet", 11, seed=0, **OPTIONS)
    shadow = segmenters.make("unet", 11, seed=1, **OPTIONS)
    names = [name for name in attacks.ATTACKS if name.startswith("seg-")]
    assert len(names) == 6
    for name in names:
        small = {} if name == "seg-global-loss" else {"epochs": 1, "steps_per_epoch": 1, "n_patches": 2}
        result = attacks.evaluate(
            name, toy, pool, split, knowledge="shadow:PET", shadow=shadow, untrained=toy, seed=0, **small
        )
        assert len(result.score) == 32 and np.isfinite(result.score).all()
        assert set(result.controls) == {"no-model", "untrained", "permuted"}
        assert (result.meta["params"].get("n_patches") == 2) or name == "seg-global-loss"
    other = segmenters.make("unet", 5, seed=1, **OPTIONS)
    with pytest.raises(ValueError, match="same classes|map the label spaces"):
        attacks.evaluate("seg-type1", toy, pool, split, knowledge="shadow:PE-", shadow=other, seed=0, epochs=1)

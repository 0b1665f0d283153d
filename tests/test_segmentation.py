"""Segmentation attacks: maps against slow obvious versions and the released numbers, patches, and a planted signal."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mia_utils.attacks import segmentation as seg
from mia_utils.models import outputs, segmenters

GOLDEN = Path(__file__).parent / "golden" / "segmentation_loss_map.npz"
N, C, H, W = 5, 4, 24, 30


@pytest.fixture(scope="module")
def golden():
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN).items()}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C, (N, H, W)).astype(np.uint8)
    labels[rng.random((N, H, W)) < 0.1] = 255
    labels[1] = 255  # void only
    labels[2][labels[2] == 3] = 0  # a class is absent
    return {
        "posteriors": torch.from_numpy(rng.dirichlet(np.ones(C), (N, H, W)).transpose(0, 3, 1, 2).copy()),
        "labels": labels,
        "images": rng.integers(0, 256, (N, H, W, 3), dtype=np.uint8),
        "ids": [f"image-{i}" for i in range(N)],
    }


def to_logits(x: torch.Tensor) -> torch.Tensor:
    """A toy segmenter: the logits of a pixel depend on its colors alone."""
    return torch.cat([x, -x.sum(1, keepdim=True)], dim=1) * 3


@pytest.fixture(scope="module")
def model():
    return segmenters.wrap(to_logits, n_classes=C, outputs="logits")


# ------------------------------------------------------------------------------------------- input maps


def test_loss_and_argmax_maps_equal_the_released_numbers_ignored_pixels_included(golden):
    posteriors, labels = golden["posteriors"][None], golden["labels"][None]
    assert (seg.make_loss_map(posteriors, labels)[0] - golden["loss_map"]).abs().max() < 1e-6
    argmax = outputs.change_posteriors(posteriors, "argmax")
    assert (argmax[0] - golden["argmax_posteriors"]).abs().max() < 1e-6
    assert (seg.make_loss_map(argmax, labels)[0] - golden["argmax_loss_map"]).abs().max() < 1e-6
    ignored = golden["labels"] == 255
    assert ignored.any() and (seg.make_loss_map(posteriors, labels)[0, 0][ignored] == 0).all()


def test_argmax_maps_divided_by_fifty_are_zero_or_one_point_four(golden):
    class OneImage:
        def posteriors(self, images):
            return golden["posteriors"][None].expand(len(images), -1, -1, -1)

    labels = golden["labels"].numpy().astype(np.uint8)[None]
    got = seg.extract_label_only(
        OneImage(), np.zeros((1, *labels.shape[1:], 3), np.uint8), image_ids=["a"], masks=labels
    )
    np.testing.assert_allclose(got[0], golden["argmax_loss_map"] / 50, atol=1e-3)  # stored as float16
    assert set(np.unique(got.astype(np.float32).round(2))) == {0, np.float32(1.38)}


def test_loss_maps_equal_a_double_loop(data):
    p = data["posteriors"] * 1.7  # not normalized: the map does it
    p[0, :, 0, 0] = torch.tensor([0.0, 0.0, 0.0, 5.0])
    got = seg.make_loss_map(p, torch.from_numpy(data["labels"]))
    assert got.shape == (N, 1, H, W) and got.dtype == torch.float64
    for n in range(N):
        for h in range(H):
            for w in range(W):
                label, pixel = int(data["labels"][n, h, w]), [float(v) for v in p[n, :, h, w]]
                slow = 0.0 if label == 255 else -math.log(max(pixel[label] / sum(pixel), 1e-30))
                assert abs(float(got[n, 0, h, w]) - slow) < 1e-12  # float64 on both sides


def test_the_concatenation_equals_a_double_loop_and_ignored_pixels_are_no_class(data):
    labels = torch.from_numpy(data["labels"]).unsqueeze(1)
    got = seg.unfold_labels(torch.cat([data["posteriors"], labels], dim=1))
    assert got.shape == (N, 2 * C, H, W) and torch.equal(got[:, :C], data["posteriors"])
    for n in range(N):
        for h in range(H):
            for w in range(W):
                assert got[n, C:, h, w].tolist() == [float(data["labels"][n, h, w] == c) for c in range(C)]


def test_mean_losses_leave_void_out_and_a_void_image_gets_the_loss_of_an_even_guess(data):
    loss = seg.make_loss_map(data["posteriors"], torch.from_numpy(data["labels"])).numpy()[:, 0]
    got = seg.compute_mean_loss(data["posteriors"], torch.from_numpy(data["labels"])).numpy()
    for n in (0, 2, 3, 4):
        np.testing.assert_allclose(got[n], loss[n][data["labels"][n] != 255].mean(), atol=1e-12)
    assert (loss[1] == 0).all() and got[1] == math.log(C)


def test_class_losses_are_means_per_class_and_nan_where_a_class_is_absent(data):
    loss = seg.make_loss_map(data["posteriors"], torch.from_numpy(data["labels"]))
    got = seg.compute_class_losses(loss, data["labels"], C)
    assert got.shape == (N, C) and np.isnan(got[1]).all() and np.isnan(got[2, 3]) and np.isfinite(got[2, :3]).all()
    np.testing.assert_allclose(got[0, 1], loss[0, 0].numpy()[data["labels"][0] == 1].mean(), atol=1e-12)


@pytest.mark.parametrize(
    ("posteriors", "labels", "message"),
    [
        ((4, 24, 30), (24, 30), "expected posteriors .N, C, H, W. and labels .N, H, W."),
        ((2, 4, 24, 30), (2, 24, 29), "same N, H and W"),
        ((2, 4, 24, 30), (3, 24, 30), "same N, H and W, got .2, 4, 24, 30. and .3, 24, 30."),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(posteriors, labels, message):
    with pytest.raises(ValueError, match=message) as error:
        seg.make_loss_map(torch.zeros(posteriors), torch.zeros(labels, dtype=torch.long))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [4, 11, -1])
def test_labels_outside_the_classes_are_named(data, wrong):
    labels = torch.from_numpy(data["labels"]).long()
    labels[3, 2, 1] = wrong
    with pytest.raises(ValueError, match=f"id {wrong}, expected 0 to 3"):
        seg.make_loss_map(data["posteriors"], labels)


# ------------------------------------------------------------------------------------------- extraction

WITH_MASKS = [seg.extract_loss_map, seg.extract_label_only, seg.extract_posteriors_and_labels, seg.extract_mean_loss]


def test_features_have_the_documented_shapes_and_equal_their_definitions(model, data):
    call = {"image_ids": data["ids"], "masks": data["labels"]}
    p = model.posteriors(torch.from_numpy(data["images"]).permute(0, 3, 1, 2) / 255)
    labels = torch.from_numpy(data["labels"])
    near = {"rtol": 1e-3, "atol": 1e-3}  # float16: 11 bits
    loss = seg.extract_loss_map(model, data["images"], **call)
    assert loss.shape == (N, 1, H, W) and loss.dtype == np.float16
    np.testing.assert_allclose(loss, seg.make_loss_map(p, labels), **near)
    both = seg.extract_posteriors_and_labels(model, data["images"], **call)
    assert both.shape == (N, C + 1, H, W)
    np.testing.assert_allclose(both[:, :C], p, **near)
    assert np.array_equal(both[:, C], data["labels"])
    alone = seg.extract_posteriors(model, data["images"], image_ids=data["ids"])
    assert np.array_equal(alone, both[:, :C])
    mean = seg.extract_mean_loss(model, data["images"], **call)
    np.testing.assert_allclose(mean[:, 0], seg.compute_mean_loss(p, labels), rtol=1e-5)
    assert (np.argsort(seg.score_mean_loss(mean)) == np.argsort(-mean[:, 0])).all()


@pytest.mark.parametrize("extract", WITH_MASKS)
def test_an_image_keeps_its_features_in_any_batch_and_order(model, data, extract):
    together = extract(model, data["images"], image_ids=data["ids"], masks=data["labels"])
    order = [3, 1, 4]
    shuffled = extract(
        model,
        data["images"][order],
        image_ids=[data["ids"][i] for i in order],
        masks=data["labels"][order],
        batch_size=1,
    )
    np.testing.assert_allclose(shuffled, together[order], rtol=1e-3, atol=1e-6)


def test_maps_of_large_images_are_averaged_over_cells_and_small_ones_are_not(model):
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 256, (1, 512, 64, 3), dtype=np.uint8), rng.integers(0, C, (1, 512, 64), np.uint8)
    loss = seg.extract_loss_map(model, images, image_ids=["a"], masks=masks)
    p = model.posteriors(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    full = seg.make_loss_map(p, torch.from_numpy(masks))[0, 0]
    assert loss.shape == (1, 1, 64, 8)
    np.testing.assert_allclose(loss[0, 0, 5, 3], full[40:48, 24:32].mean(), rtol=1e-3)
    both = seg.extract_posteriors_and_labels(model, images, image_ids=["a"], masks=masks)
    assert both.shape == (1, C + 1, 64, 8) and both[0, C, 5, 3] == masks[0, 44, 28]
    assert seg.get_patch_size(128, 256) == (90, 90) and seg.get_patch_size(96, 128) == (67, 67)


def test_an_extract_has_its_own_name_and_asks_for_masks(model, data):
    assert {f"{f.__module__}.{f.__qualname__}" for f in (seg.extract_loss_map, seg.extract_posteriors)} == {
        "mia_utils.attacks.segmentation.extract_loss_map",  # part of the identity of cached features
        "mia_utils.attacks.segmentation.extract_posteriors",
    }
    with pytest.raises(ValueError, match="expected masks= .label maps."):
        seg.extract_loss_map(model, data["images"], image_ids=data["ids"])


def test_wrong_images_ids_and_masks_are_one_line(model, data):
    call = {"image_ids": data["ids"], "masks": data["labels"]}
    for images, changes, message in [
        (data["images"].astype(np.float32), {}, "uint8"),
        (data["images"], {"image_ids": ["a"]}, "one image id per image, got 1 ids for 5"),
        (data["images"], {"masks": data["labels"][:, :-1]}, "masks: expected .5, 24, 30."),
        (data["images"], {"masks": data["labels"][:4]}, "masks: expected .5, 24, 30."),
        (data["images"][:0], {"image_ids": [], "masks": data["labels"][:0]}, "at least 1 image"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            seg.extract_loss_map(model, images, **{**call, **changes})
        assert "\n" not in str(error.value)
    masks = data["labels"].copy()
    masks[0, 0, 0] = 11
    with pytest.raises(ValueError, match="id 11, expected 0 to 3"):
        seg.extract_posteriors_and_labels(model, data["images"], image_ids=data["ids"], masks=masks)


# ------------------------------------------------------------------------------------------- patches


def test_patches_stay_inside_the_border_and_reach_it():
    corners = seg.draw_patches([str(i) for i in range(200)], 20, height=24, width=30, size=(17, 17), seed=0).numpy()
    assert corners.min() == 0 and corners[..., 0].max() == 24 - 17 and corners[..., 1].max() == 30 - 17
    whole = seg.draw_patches(["a", "b"], 3, height=24, width=30, size=(24, 30), seed=0)
    assert (whole == 0).all()


def test_an_image_has_the_same_patches_in_any_batch_and_a_longer_draw_begins_with_the_shorter_one():
    options = {"height": 24, "width": 30, "size": (17, 17)}
    together = seg.draw_patches(["a", "b", "c"], 6, seed=1, **options)
    assert torch.equal(seg.draw_patches(["c", "a"], 6, seed=1, **options), together[[2, 0]])
    assert torch.equal(seg.draw_patches(["b"], 2, seed=1, **options)[0], together[1, :2])
    assert not torch.equal(seg.draw_patches(["a", "b", "c"], 6, seed=2, **options), together)
    assert not torch.equal(together[0], together[1])


def test_one_gather_equals_a_loop_over_patches_and_a_patch_across_the_border_is_refused():
    maps = torch.arange(3 * 2 * 10 * 12).reshape(3, 2, 10, 12).float()
    corners = seg.draw_patches(["a", "b", "c"], 4, height=10, width=12, size=(5, 7), seed=0)
    got = seg.gather_patches(maps, corners, (5, 7))
    assert got.shape == (3, 4, 2, 5, 7)
    for n in range(3):
        for k in range(4):
            top, left = corners[n, k].tolist()
            assert torch.equal(got[n, k], maps[n, :, top : top + 5, left : left + 7])
    for corner in ([6, 0], [0, 6], [-1, 0]):
        with pytest.raises(ValueError, match="across the border"):
            seg.gather_patches(maps, torch.tensor([[corner]] * 3), (5, 7))
    with pytest.raises(ValueError, match="at most 10 x 12, got 11 x 5"):
        seg.draw_patches(["a"], 1, height=10, width=12, size=(11, 5), seed=0)


# ------------------------------------------------------------------------------------------- the attacker


def make_maps(n: int, *, signal: float, seed: int, size: tuple[int, int] = (32, 40)) -> tuple[np.ndarray, np.ndarray]:
    """Loss maps with a bright band in every image; on it members lose less, elsewhere a little more."""
    rng = np.random.default_rng(seed)
    is_member = np.arange(n) % 2 == 0
    maps = rng.exponential(0.3, (n, 1, *size))
    for i in range(n):
        top = rng.integers(0, size[0] - 8)
        band = rng.exponential(2.0, (8, size[1])) * (1 - signal * is_member[i])
        maps[i, 0, top : top + 8] = band
        maps[i] *= rng.lognormal(0, 0.3)  # some images are harder: the global loss is blurred
    return maps.astype(np.float16), is_member


def fit_small(maps: np.ndarray, is_member: np.ndarray, **options) -> seg.PatchAttacker:
    n = len(maps) * 3 // 4
    defaults = {"epochs": 6, "steps_per_epoch": 10, "patience": None, "device": "cpu"}
    return seg.fit(maps[:n], is_member[:n], validation=(maps[n:], is_member[n:]), **{**defaults, **options})


@pytest.fixture(scope="module")
def planted():
    maps, is_member = make_maps(96, signal=0.6, seed=0)
    return fit_small(maps, is_member)


def test_a_planted_signal_is_found_and_members_score_higher(planted):
    maps, is_member = make_maps(120, signal=0.6, seed=1)
    score = planted.score(maps, image_ids=[f"new-{i}" for i in range(120)])
    assert score.dtype == np.float64 and score.shape == (120,)
    assert roc_auc_score(is_member, score) > 0.8


def test_the_full_image_attacker_finds_it_too():
    maps, is_member = make_maps(96, signal=0.6, seed=0)
    attacker = fit_small(maps, is_member, whole=True)
    assert attacker.n_patches == 1 and attacker.size == (32, 40)
    fresh, truth = make_maps(120, signal=0.6, seed=1)
    assert roc_auc_score(truth, attacker.score(fresh, image_ids=[str(i) for i in range(120)])) > 0.8


def test_without_a_signal_the_attacker_stays_near_chance():
    maps, is_member = make_maps(64, signal=0.0, seed=2)
    attacker = fit_small(maps, is_member, epochs=3)
    fresh, truth = make_maps(200, signal=0.0, seed=3)
    auc = roc_auc_score(truth, attacker.score(fresh, image_ids=[str(i) for i in range(200)]))
    assert 0.38 < auc < 0.62  # standard error .04


def test_a_score_is_the_sum_over_patches_and_does_not_depend_on_other_images(planted):
    maps, _ = make_maps(8, signal=0.6, seed=4)
    ids = [f"x{i}" for i in range(8)]
    together = planted.score(maps, image_ids=ids)
    for i in (0, 5):  # float32 sums in another order for another batch shape
        np.testing.assert_allclose(planted.score(maps[i : i + 1], image_ids=[ids[i]]), together[i], atol=1e-4)
    np.testing.assert_allclose(planted.score(maps[::-1], image_ids=ids[::-1]), together[::-1], atol=1e-4)
    corners = seg.draw_patches(ids[:1], 6, height=32, width=40, size=planted.size, seed=0)[0]
    slow = 0.0
    for top, left in corners.tolist():
        patch = torch.from_numpy(maps[:1, :, top : top + planted.size[0], left : left + planted.size[1]]).float()
        with torch.inference_mode():
            logits = planted.network(patch)[0]
        slow += float(logits[1] - logits[0])
    np.testing.assert_allclose(together[0], slow, atol=1e-4)


def test_the_same_seed_repeats_another_differs_and_the_global_seed_is_left_alone():
    maps, is_member = make_maps(24, signal=0.5, seed=5)
    ids = [str(i) for i in range(24)]
    options = {"epochs": 1, "steps_per_epoch": 3}
    torch.manual_seed(1)
    first = fit_small(maps, is_member, seed=7, **options).score(maps, image_ids=ids)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert np.array_equal(fit_small(maps, is_member, seed=7, **options).score(maps, image_ids=ids), first)
    assert not np.allclose(fit_small(maps, is_member, seed=8, **options).score(maps, image_ids=ids), first)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_posteriors_and_labels_are_unfolded_in_the_attacker(model, data):
    features = seg.extract_posteriors_and_labels(model, data["images"], image_ids=data["ids"], masks=data["labels"])
    is_member = np.array([True, False, True, False, True])
    attacker = seg.fit(
        features,
        is_member,
        validation=(features[:2], is_member[:2]),
        labels_last=True,
        epochs=1,
        steps_per_epoch=1,
        device="cpu",
    )
    assert next(attacker.network.parameters()).shape[1] == 2 * C
    assert np.isfinite(attacker.score(features, image_ids=data["ids"])).all()


def test_networks_have_no_stride_in_their_last_stage_and_unknown_ones_are_named():
    x = torch.zeros(1, 1, 64, 64)
    for name in ("resnet10t-thin", "resnet18"):
        network = seg.make_network(1, network=name).eval()
        assert network(x).shape == (1, 2) and network.forward_features(x).shape[-1] == 4
    with pytest.raises(ValueError, match="no patch network 'resnet9000'.*resnet10t-thin"):
        seg.make_network(1, network="resnet9000")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((6, 8), np.float32)}, r"shape \(N, C, H, W\)"),
        ({"features": np.full((6, 1, 8, 8), np.nan, np.float32)}, "NaN or infinite values in 6 of 6"),
        ({"is_member": np.ones(6, bool)}, "6 members of 6"),
        ({"is_member": np.arange(5) % 2 == 0}, r"labels of shape \(6,\)"),
        ({"validation": (np.zeros((2, 2, 8, 8), np.float32), np.arange(2) < 1)}, r"\(1, 8, 8\), got \(2, 8, 8\)"),
        ({"n_patches": 0}, "n_patches >= 1"),
        ({"epochs": 0}, "epochs, steps_per_epoch and patience >= 1"),
        ({"patch_share": 1.5}, "patch_share in"),
    ],
)
def test_wrong_arguments_of_fit_are_one_line(changes, message):
    maps, is_member = np.zeros((6, 1, 8, 8), np.float32), np.arange(6) % 2 == 0
    call = {"features": maps, "is_member": is_member, "validation": (maps, is_member)} | changes
    with pytest.raises(ValueError, match=message) as error:
        seg.fit(call.pop("features"), call.pop("is_member"), **call)
    assert "\n" not in str(error.value)


def test_scoring_checks_features_and_ids(planted):
    with pytest.raises(ValueError, match="expected features .N, 1, 32, 40."):
        planted.score(np.zeros((2, 1, 16, 40), np.float16), image_ids=["a", "b"])
    with pytest.raises(ValueError, match="1 ids for 2 images"):
        planted.score(np.zeros((2, 1, 32, 40), np.float16), image_ids=["a"])
    assert planted.score(np.zeros((0, 1, 32, 40), np.float16), image_ids=[]).shape == (0,)

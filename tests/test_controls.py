"""The controls: what they find, what they do not find, and that labels are permuted within roles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from mia_utils.protocol import controls, intervals, metrics


def make_images(n, *, seed=0, size=32):
    """Smooth random images with sensor noise."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.zoom(rng.uniform(40, 215, size=(n, 4, 4, 3)), (1, size // 4, size // 4, 1), order=1)
    return np.clip(coarse + rng.normal(0, 12, size=coarse.shape), 0, 255).astype(np.uint8)


def make_folds(n, n_folds=5, seed=0):
    """Five-fold cross-fitting positions, stratified on the first n // 4 being members."""
    rng, fold = np.random.default_rng(seed), np.arange(n) % n_folds
    folds = []
    for f in range(n_folds):
        rest = rng.permutation(np.flatnonzero(fold != f))
        folds.append((rest[len(rest) // 5 :], rest[: len(rest) // 5], np.flatnonzero(fold == f)))
    return folds


def score_all(images, is_member, folds):
    """Scores of every evaluation set, each by the classifier of its own fold."""
    score = np.full(len(is_member), np.nan)
    for fold in folds:
        score[fold[2]] = controls.score_without_model(images, is_member, fold)[fold[2]]
    return score


@pytest.fixture(scope="module")
def data():
    return make_images(400), np.arange(400) < 100, make_folds(400)


def test_statistics_by_hand():
    image = np.random.default_rng(0).integers(0, 256, size=(1, 12, 16, 3), dtype=np.uint8)
    got, x = controls.extract_statistics(image)[0], image[0] / 255
    gray = x.mean(axis=2)
    assert got.shape == (56,)
    np.testing.assert_allclose(got[:6], [*x.mean(axis=(0, 1)), *x.std(axis=(0, 1))], rtol=1e-5)
    gradient = np.mean(
        [(gray[i + 1, j] - gray[i, j]) ** 2 + (gray[i, j + 1] - gray[i, j]) ** 2 for i in range(11) for j in range(15)]
    )
    padded = np.pad(gray, 1, mode="edge")
    laplacian = np.mean((padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2] - 4 * gray) ** 2)
    np.testing.assert_allclose(got[6:8], np.log([gradient + 1e-6, laplacian + 1e-6]), rtol=1e-4)
    np.testing.assert_allclose(got[8:], gray.reshape(6, 2, 8, 2).mean(axis=(1, 3)).ravel(), rtol=1e-5)


def test_layouts_and_types_agree(data):
    images = data[0][:10]
    want = controls.extract_statistics(images)
    channel_first = images.transpose(0, 3, 1, 2)
    for other in (channel_first, channel_first / np.float32(255), torch.from_numpy(images), images / 255):
        np.testing.assert_allclose(controls.extract_statistics(other), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(controls.extract_statistics(images[3:4])[0], want[3])  # no batch mates


def test_it_finds_a_view_difference(data):
    images, is_member, folds = data
    # what released-view does to members: a crop is enlarged, so it loses fine detail
    blurred = ndimage.gaussian_filter(images.astype(np.float32), (0, 0.7, 0.7, 0)).astype(np.uint8)
    shown = np.where(is_member[:, None, None, None], blurred, images)
    score = score_all(controls.extract_statistics(shown), is_member, folds)
    assert metrics.evaluate(score, is_member, folds=np.arange(400) % 5, n_bootstrap=50).auc > 0.95


def test_exchangeable_images_give_chance(data):
    images, _, folds = data
    x, p = controls.extract_statistics(images), []
    for seed in range(20):
        fold = np.random.default_rng(seed).permutation(400)
        is_member = np.empty(400, bool)
        is_member[fold] = np.arange(400) < 100
        score = score_all(x, is_member, folds)
        p.append(metrics.evaluate(score, is_member, folds=np.arange(400) % 5, n_bootstrap=2).p_value)
    assert not intervals.judge_controls({str(i): v for i, v in enumerate(p)}).rejected.any()
    assert np.mean(np.array(p) < 0.1) <= 0.35  # binomial of 20 at .1: beyond .35 with probability .002


def test_no_image_is_scored_by_its_own_label(data):
    images, is_member, folds = data
    fit, validation, report = fold = folds[0]
    score = controls.score_without_model(images, is_member, fold)
    assert np.isfinite(score[report]).all() and np.isfinite(score[validation]).all() and np.isnan(score[fit]).all()
    for flipped, same in ((validation, validation), (report, np.r_[validation, report])):
        other = is_member ^ np.isin(np.arange(400), flipped)
        np.testing.assert_array_equal(controls.score_without_model(images, other, fold)[same], score[same])


def test_permutation_keeps_the_numbers_of_each_role(data):
    _, is_member, (fold, *_) = data
    got = controls.permute_labels(is_member, fold, seed=3)
    assert [got[p].sum() for p in fold] == [is_member[p].sum() for p in fold]
    for part in fold:
        assert (got[part] != is_member[part]).any()
    np.testing.assert_array_equal(got, controls.permute_labels(is_member, fold, seed=3))
    assert (got != controls.permute_labels(is_member, fold, seed=4)).any()
    # over many seeds a permuted label says nothing about the ground truth: 25 % of members stay members
    stayed = [controls.permute_labels(is_member, fold, seed=s)[is_member].mean() for s in range(50)]
    assert np.mean(stayed) == pytest.approx(0.25, abs=0.02)


def test_blocks_change_sides_as_a_whole():
    groups, is_member = np.repeat(np.arange(20), 4), np.repeat(np.arange(20) < 8, 4)
    fold = np.flatnonzero(groups % 2), [], np.flatnonzero(groups % 2 == 0)
    got = controls.permute_labels(is_member, fold, groups=groups)
    assert all(len(np.unique(got[groups == g])) == 1 for g in range(20)) and got.sum() == is_member.sum()
    with pytest.raises(ValueError, match="holds both"):
        controls.permute_labels(np.arange(80) % 2 == 0, fold, groups=groups)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 8, 8), np.uint8), "images of shape"),
        (np.zeros((4, 8, 8, 3), np.int64), "uint8 or float"),
        (np.full((4, 8, 8, 3), 7.0), r"in \[0, 1\]"),
        (np.full((4, 8, 8, 3), np.nan), r"in \[0, 1\]"),
        (np.zeros((3, 8, 8, 3), np.uint8), "as many images as labels"),
    ],
)
def test_bad_images_are_one_line(images, message):
    with pytest.raises(ValueError, match=message) as error:
        controls.score_without_model(images, np.arange(4) < 2, ([0, 2], [1], [3]))
    assert "\n" not in str(error.value)


def test_overlapping_roles_are_refused(data):
    with pytest.raises(ValueError, match="disjoint"):
        controls.score_without_model(data[0], data[1], ([0, 200], [1], [0]))

"""Calibration by reference models: every kind against a naive loop, what it may and may not depend on, evaluate."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from mia_utils import attacks, datasets
from mia_utils.attacks import mim
from mia_utils.attacks.reference import calibrate
from mia_utils.models import encoders
from mia_utils.protocol import splits

N, R = 30, 6


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    inside = np.zeros((R, N), bool)
    for i in range(N):
        inside[rng.permutation(R)[:3], i] = True
    hard = rng.normal(0, 2, N)
    refs = hard + inside * 1.0 + rng.normal(0, 0.5, (R, N))
    return hard + rng.normal(0, 0.5, N), refs, inside


def compute_slowly(s, refs, inside, kind, variance="global", gamma=1.0, strength=4.0):
    """One image, one reference, one pair at a time."""
    n_refs, n = refs.shape
    online = inside is not None
    inside = inside if online else np.zeros(refs.shape, bool)
    sides = [[[refs[k, i] for k in range(n_refs) if inside[k, i] == side] for i in range(n)] for side in (0, 1)]

    def pool(side):
        squares = [(x - statistics.fmean(v)) ** 2 for v in side for x in v]
        return sum(squares) / sum(len(v) - 1 for v in side)

    def density(i, side):
        v, common = side[i], pool(side)
        mean, dof, squares = statistics.fmean(v), len(v) - 1, sum((x - statistics.fmean(v)) ** 2 for x in v)
        if kind == "bayes":
            scale = math.sqrt((strength * common + squares) / (strength + dof) * (1 + 1 / len(v)))
            return stats.t(strength + dof, mean, scale)
        return stats.norm(mean, math.sqrt(common if variance == "global" else squares / dof))

    def log_mean_exp(v):
        return math.log(statistics.fmean(math.exp(x) for x in v))

    def ratio(i):
        ps = [math.exp(log_mean_exp(side[i])) for side in sides[: 1 + online]]
        return s[i] - math.log(statistics.fmean(ps))

    out = []
    for i in range(n):
        if kind == "log-ratio":
            out.append(s[i] - statistics.fmean(sides[0][i]))
        elif kind == "midpoint":
            out.append(s[i] - (statistics.fmean(sides[0][i]) + statistics.fmean(sides[1][i])) / 2)
        elif kind == "rmia":
            out.append(sum(math.exp(ratio(i) - ratio(j)) >= gamma for j in range(n)) / n)
        elif online:
            out.append(math.log(density(i, sides[1]).pdf(s[i]) / density(i, sides[0]).pdf(s[i])))
        else:
            p = density(i, sides[0]).cdf(s[i])
            out.append(math.log(p / (1 - p)))
    return out


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("log-ratio", {}),
        ("midpoint", {}),
        ("lira", {}),
        ("lira", {"variance": "image"}),
        ("rmia", {}),
        ("rmia", {"gamma": 2.0}),
        ("bayes", {}),
    ],
)
def test_every_kind_equals_the_naive_loop(toy, kind, options, online):
    s, refs, inside = toy
    if kind == "midpoint" and not online:
        with pytest.raises(ValueError, match="needs references trained on the images"):
            calibrate(s, refs, kind=kind)
        return
    inside = inside if online else None
    got = calibrate(s, refs, inside, kind=kind, **options)
    assert got.shape == (N,) and got.dtype == np.float64
    np.testing.assert_allclose(got, compute_slowly(s, refs, inside, kind, **options), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["log-ratio", "lira", "rmia", "bayes"])
def test_references_remove_what_makes_an_image_hard(kind):
    rng = np.random.default_rng(1)
    is_member, hard = np.arange(400) < 100, rng.normal(0, 2, 400)
    s = hard + is_member + rng.normal(0, 0.4, 400)
    refs = hard + rng.normal(0, 0.4, (4, 400))
    assert roc_auc_score(is_member, s) < 0.7
    assert roc_auc_score(is_member, calibrate(s, refs, kind=kind)) > 0.9
    shifted = calibrate(s + 3 * hard, refs + 3 * hard, kind=kind)  # a difficulty both see changes nothing
    np.testing.assert_allclose(shifted, calibrate(s, refs, kind=kind), rtol=1e-6, atol=0.01 if kind == "rmia" else 1e-6)


def test_a_log_ratio_does_not_depend_on_other_images_and_one_reference_is_enough(toy):
    s, refs, inside = toy
    for kind, options in (("log-ratio", {}), ("midpoint", {}), ("lira", {"variance": "image"})):
        whole = calibrate(s, refs, inside, kind=kind, **options)
        part = calibrate(s[5:6], refs[:, 5:6], inside[:, 5:6], kind=kind, **options)
        np.testing.assert_allclose(part, whole[5:6], rtol=1e-12)
    np.testing.assert_allclose(calibrate(s, refs[:1]), s - refs[0])
    assert np.isfinite(calibrate(s + 1e4, refs, kind="lira")).all()  # far out: no saturated probability


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": np.zeros(4)}, r"references \(R, N\)"),
        ({"references": np.zeros((2, 3))}, r"got \(4,\) and \(2, 3\)"),
        ({"target": np.array([0, 1, np.inf, 2])}, "a loss of 0 has no logarithm"),
        ({"in_mask": np.zeros((2, 4), bool)}, "one trained on it"),
        ({"in_mask": np.zeros((2, 3), bool)}, r"in_mask \(2, 4\)"),
        ({"kind": "lira", "references": np.ones((1, 4))}, "two references that differ"),
        ({"kind": "lira", "in_mask": np.array([[1, 0, 1, 0], [0, 1, 0, 1]])}, "two references that differ"),
        ({"kind": "oracle"}, "got 'oracle'"),
        ({"kind": "rmia", "gamma": 0}, "gamma > 0"),
    ],
)
def test_bad_input_is_one_line(change, message):
    good = {"target": np.arange(4.0), "references": np.arange(8.0).reshape(2, 4) ** 2} | change
    target, references, in_mask = good.pop("target"), good.pop("references"), good.pop("in_mask", None)
    with pytest.raises(ValueError, match=message) as error:
        calibrate(target, references, in_mask, **good)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ through evaluate


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (240, 32, 32, 3), dtype=np.uint8)
    images = (images * rng.uniform(0.1, 1, (240, 1, 1, 1))).astype(np.uint8)  # contrast: the difficulty
    ids = np.array([f"image-{i}" for i in range(240)])
    pool = datasets.Pool("contrasts", images, np.zeros(240, np.int64), ids, None, ("noise",))
    split = splits.draw(pool, n_members=60, n_nonmembers=100, n_shadow_nonmembers=20, seed=0)

    def make(known: np.ndarray):
        """Tokens spread as the contrast does; a third less for known images."""
        seen = {image.tobytes() for image in images[known]}

        def tokens(x):
            pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
            scale = torch.tensor([2 / 3 if image.tobytes() in seen else 1.0 for image in pixels])
            return torch.nn.functional.unfold(x, 8, stride=8).transpose(1, 2) * scale[:, None, None]

        return encoders.wrap(tokens=tokens, size=32, name="contrast")

    return pool, split, make(split.target_members), [make(np.array([], int)), make(split.shadow_members)], make


def test_evaluate_calibrates_by_one_reference_or_many_with_controls_and_shadow(setting):
    pool, split, target, references, make = setting
    run = lambda **options: attacks.evaluate("token-spread", target, pool, split, **options)  # noqa: E731
    plain = run(controls=False)
    calibrated = run(reference=references, untrained=references[0])
    assert calibrated.auc > 0.95 > plain.auc + 0.1
    assert calibrated.meta["n_references"] == 2 and calibrated.meta["calibration"] == "log-ratio"
    assert all(0.3 < calibrated.controls[name].auc < 0.7 for name in ("no-model", "permuted"))
    assert set(calibrated.fold) == {0} and calibrated.meta["fitted"] is False
    one, same = run(reference=references[0], controls=False), run(reference=references[:1], controls=False)
    np.testing.assert_array_equal(one.score, same.score)
    assert run(reference=references, calibration="rmia", controls=False).auc > 0.9
    shadow = run(knowledge="shadow", shadow=make(split.shadow_members), reference=references[:1], controls=False)
    assert shadow.auc > 0.95 and shadow.metrics.balanced_accuracy > 0.9
    for options, message in (
        ({"reference": []}, "expected reference models"),
        ({"reference": references, "calibration": "midpoint"}, "an offline calibration"),
        ({"reference": [encoders.wrap(lambda x: x.flatten(1), size=32)]}, "which the reference lacks"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)


def test_a_list_for_mim_is_a_log_ratio_and_a_single_reference_keeps_its_meaning():
    d = np.array([[0.2], [0.1]])
    np.testing.assert_allclose(mim.compute_log_likeness(d), -np.log(d[:, 0]))
    np.testing.assert_allclose(calibrate(mim.compute_log_likeness(d), -np.log([[0.4, 0.1]])), [math.log(2), 0])
    takes = attacks.table().set_index("attack").references
    assert takes[["mim", "encodermi-t", "seg-global-loss"]].all() and not takes[["partcrop", "lpla"]].any()


@pytest.mark.parametrize("kind", ["log-ratio", "midpoint", "lira", "rmia", "bayes"])
def test_a_model_that_was_not_queried_about_an_image_counts_nothing(toy, kind):
    s, refs, inside = toy
    options = {"kind": kind, "variance": "global"}
    more = np.ma.masked_all((R + 1, N))  # one more model, queried about no image but the first two
    more[:R], more[R, :2] = refs, 3.0
    known = np.vstack([inside, np.ones(N, bool)])
    if kind in ("log-ratio", "midpoint"):  # an image alone
        np.testing.assert_allclose(calibrate(s, more, known, **options)[2:], calibrate(s, refs, inside, **options)[2:])
    more[R, :2] = np.ma.masked
    np.testing.assert_allclose(calibrate(s, more, known, **options), calibrate(s, refs, inside, **options))
    more[:, 0] = np.ma.masked
    with pytest.raises(ValueError, match="for every image a reference without it"):
        calibrate(s, more, known, **options)

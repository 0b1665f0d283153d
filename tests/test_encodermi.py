"""EncoderMI and LpLA: similarities against a double loop, features against their batch mates, what attackers learn."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from mia_utils.attacks import encodermi, lpla, network
from mia_utils.models import encoders, views

# float32 products sum in another order for another batch shape; similarities are of the order of one
BATCH = {"rtol": 1e-5, "atol": 1e-5}
IDS = [f"image-{i}" for i in range(40)]


@pytest.fixture(scope="module")
def encoder():
    return encoders.make("vit_nano_patch8_32", seed=0)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


def compare_slowly(vectors: np.ndarray, measure: str) -> list[list[float]]:
    """The three measures, one pair at a time, in float64."""
    rows = []
    for image in vectors.astype(float):
        row = []
        for i in range(len(image)):
            for j in range(i):
                if measure == "euclidean":
                    row.append(-float(np.sqrt(((image[i] - image[j]) ** 2).sum())))
                elif measure == "pearson":
                    row.append(float(stats.pearsonr(image[i], image[j]).statistic))
                else:
                    row.append(float(image[i] @ image[j] / np.linalg.norm(image[i]) / np.linalg.norm(image[j])))
        rows.append(row)
    return rows


@pytest.mark.parametrize("measure", encodermi.MEASURES)
def test_similarities_equal_the_double_loop(measure):
    vectors = np.random.default_rng(1).normal(0.5, 1, size=(4, 6, 5))
    got = encodermi.compare_views(torch.from_numpy(vectors), measure=measure)
    assert got.shape == (4, 15)
    np.testing.assert_allclose(got, compare_slowly(vectors, measure), atol=1e-12)  # float64 on both sides


@pytest.mark.parametrize("measure", encodermi.MEASURES)
def test_equal_views_are_closest_and_zero_vectors_are_finite(measure):
    same, other = torch.ones(1, 2, 4) * torch.tensor([1.0, 2, 3, 5]), torch.tensor([[[1.0, 2, 3, 5], [1, -2, 3, 4]]])
    assert encodermi.compare_views(same, measure=measure) > encodermi.compare_views(other, measure=measure)
    assert torch.isfinite(encodermi.compare_views(torch.zeros(2, 3, 4), measure=measure)).all()


def test_features_equal_a_loop_over_views(encoder, images):
    got = encodermi.extract_features(encoder, images[:2], image_ids=IDS[:2], n_views=4, seed=5, pooling="mean")
    for i in range(2):
        pixels = torch.from_numpy(images[i]).permute(2, 0, 1)[None]
        seen = views.query_views(pixels, [IDS[i]], 4, augmentation="simclr", size=32, seed=5)[0]
        with torch.inference_mode():
            vectors = torch.cat([encoder.embed(view[None], pooling="mean") for view in seen])
        np.testing.assert_allclose(got[i], compare_slowly(vectors[None].numpy(), "cosine")[0], atol=1e-5)  # float32


def test_features_do_not_depend_on_batch_and_order_and_fewer_views_come_first(encoder, images):
    together = encodermi.extract_features(encoder, images, image_ids=IDS, n_views=5, batch_size=40)
    assert together.shape == (40, 10) and together.dtype == torch.float32
    alone = [encodermi.extract_features(encoder, images[i : i + 1], image_ids=[IDS[i]], n_views=5) for i in range(40)]
    torch.testing.assert_close(torch.cat(alone), together, **BATCH)
    order = np.random.default_rng(0).permutation(40)
    shuffled = encodermi.extract_features(
        encoder, images[order], image_ids=np.array(IDS)[order], n_views=5, batch_size=7
    )
    torch.testing.assert_close(shuffled, together[order], **BATCH)
    fewer = encodermi.extract_features(encoder, images, image_ids=IDS, n_views=3)
    torch.testing.assert_close(fewer, together[:, :3], **BATCH)


def test_the_same_seed_repeats_and_another_differs_without_the_global_seed(encoder, images):
    options = {"image_ids": IDS[:4], "n_views": 3, "augmentation": "crop-weak"}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = encodermi.extract_features(encoder, images[:4], **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, encodermi.extract_features(encoder, images[:4], **options))
    assert not torch.equal(first, encodermi.extract_features(encoder, images[:4], **options, seed=1))
    assert not torch.equal(first, encodermi.extract_features(encoder, images[:4], **options | {"augmentation": "crop"}))


def test_features_of_a_known_encoder_keep_their_numbers():
    side = np.arange(32)
    image = np.stack([np.broadcast_to(a, (32, 32)) for a in (side * 8, side[:, None] * 8, 255 - side * 4)], axis=-1)
    grid = encoders.wrap(lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1), size=32, name="grid")
    got = encodermi.extract_features(grid, image.astype(np.uint8)[None], image_ids=["ramp"], n_views=4)
    expected = [0.881737, 0.906429, 0.951382, 0.946611, 0.897911, 0.976174]  # as first measured
    np.testing.assert_allclose(got[0], expected, atol=2e-5)  # views in float32


def test_pools_of_other_sizes_are_queried_at_the_size_of_the_encoder(encoder, images):
    wide = np.random.default_rng(3).integers(0, 256, (3, 48, 80, 3), dtype=np.uint8)
    features = encodermi.extract_features(encoder, wide, image_ids=IDS[:3], n_views=3)
    assert features.shape == (3, 3) and torch.isfinite(features).all()
    assert encodermi.extract_features(encoder, images[:0], image_ids=[], n_views=4).shape == (0, 6)
    assert lpla.extract_norms(encoder, images[:0], image_ids=[]).shape == (0, 1)


def test_defaults_are_the_papers():
    parameters = inspect.signature(encodermi.extract_features).parameters
    assert (parameters["n_views"].default, parameters["measure"].default) == (10, "cosine")
    expected = {"scale": (0.2, 1.0), "flip": 0.5, "jitter": 0.8, "gray": 0.2}
    assert views.parse_augmentation(parameters["augmentation"].default) == expected
    vector, deep_set = (inspect.signature(f).parameters for f in (encodermi.fit_vector, encodermi.fit_set))
    assert (vector["widths"].default, vector["lr"].default, vector["weight_decay"].default) == ((256, 256), 1e-4, 1e-6)
    assert (deep_set["lr"].default, deep_set["weight_decay"].default, deep_set["max_norm"].default) == (1e-3, 1e-7, 5)
    assert inspect.signature(encodermi.SetNetwork).parameters["dropout"].default == 0.5
    assert deep_set["widths"].default == (64, 64, 64)


# ------------------------------------------------------------------------------------------------------ attackers


def make_similarities(n_members, n_nonmembers, *, seed, effect=0.6, n_views=10):
    """Similarities of views that scatter around the image; members' views scatter less."""
    rng = np.random.default_rng(seed)
    is_member = rng.permutation(np.arange(n_members + n_nonmembers) < n_members)
    spread = np.exp(0.3 * rng.normal(size=len(is_member)) - effect * is_member)
    vectors = 2 + spread[:, None, None] * rng.normal(size=(len(is_member), n_views, 8))
    return encodermi.compare_views(torch.from_numpy(vectors).float()).numpy(), is_member


FITS = {"v": encodermi.fit_vector, "s": encodermi.fit_set}
QUICK = {"v": {"lr": 1e-3, "epochs": 20, "widths": (32, 32)}, "s": {"epochs": 8, "widths": (16, 16, 16)}}


@pytest.fixture(scope="module")
def toy():
    """Attack-training, attack-validation and evaluation sets."""
    return make_similarities(60, 200, seed=0), make_similarities(25, 80, seed=1), make_similarities(200, 200, seed=2)


@pytest.fixture(scope="module")
def attackers(toy):
    return {key: fit(*toy[0], validation=toy[1], **QUICK[key]) for key, fit in FITS.items()}


def test_a_planted_leak_is_found_by_vector_set_and_threshold(toy, attackers):
    features, is_member = toy[2]
    assert roc_auc_score(is_member, encodermi.score_threshold(features)) > 0.75
    for attacker in attackers.values():
        assert roc_auc_score(is_member, attacker.score(features)) > 0.75


def test_permuted_labels_give_chance(toy):
    for key, fit in FITS.items():
        rng, auc = np.random.default_rng(0), []
        for seed in range(3):
            sets = [(x, rng.permutation(y)) for x, y in toy]
            got = fit(*sets[0], validation=sets[1], seed=seed, **QUICK[key] | {"epochs": 4})
            auc.append(roc_auc_score(sets[2][1], got.score(sets[2][0])))
        assert np.mean(auc) == pytest.approx(0.5, abs=0.07)  # standard error of one AUC .029, of three .017


def test_scores_do_not_depend_on_the_order_of_the_pairs(toy, attackers):
    features = toy[2][0]
    order = np.random.default_rng(0).permutation(features.shape[1])
    for attacker in attackers.values():
        # float64; sums over a set (mean and deviation) in another order
        np.testing.assert_allclose(attacker.score(features[:, order]), attacker.score(features), rtol=0, atol=1e-10)
    with pytest.raises(AssertionError):  # a perceptron alone does depend on it
        unsorted = torch.nn.Sequential(*list(attackers["v"].network)[1:])
        x = torch.from_numpy(features.astype(np.float64))
        torch.testing.assert_close(unsorted(x), unsorted(x[:, order]))


def test_the_vector_attacker_sees_its_similarities_sorted(attackers):
    x = torch.tensor([[0.2, 0.9, 0.5]])
    assert attackers["v"].network[0](x).tolist() == [pytest.approx([0.9, 0.5, 0.2])]


def test_a_score_does_not_depend_on_batch_mates(toy, attackers):
    features = np.concatenate([toy[2][0]] * 2)  # more than one chunk of the set network
    for attacker in attackers.values():
        together = attacker.score(features)
        assert together.dtype == np.float64 and together.shape == (800,)
        alone = np.concatenate([attacker.score(features[i : i + 1]) for i in range(20)])
        np.testing.assert_allclose(alone, together[:20], rtol=0, atol=1e-12)


@pytest.mark.parametrize("key", FITS)
def test_attackers_repeat_and_leave_the_global_state_alone(toy, key):
    options = {"validation": toy[1], **QUICK[key], "epochs": 2}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = FITS[key](*toy[0], **options).score(toy[2][0])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, FITS[key](*toy[0], **options).score(toy[2][0]))
    assert not np.array_equal(first, FITS[key](*toy[0], **options, seed=1).score(toy[2][0]))


def test_dropout_is_off_when_scoring(attackers, toy):
    for attacker in attackers.values():
        assert np.array_equal(attacker.score(toy[1][0]), attacker.score(toy[1][0]))


@pytest.mark.parametrize("n_views", [2, 3])
def test_few_views_work(n_views):
    sets = [make_similarities(40, 80, seed=seed, effect=1.0, n_views=n_views) for seed in range(3)]
    features, is_member = sets[2]
    assert features.shape == (120, n_views * (n_views - 1) // 2)
    scores = [encodermi.score_threshold(features)]
    scores += [FITS[k](*sets[0], validation=sets[1], **QUICK[k]).score(features) for k in FITS]
    assert all(np.isfinite(score).all() and roc_auc_score(is_member, score) > 0.6 for score in scores)


def test_sets_are_scaled_over_all_coordinates_of_their_points():
    net = encodermi.SetNetwork(6, widths=(4, 4, 4), seed=0).eval()
    x = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    points = np.stack([np.zeros((5, 6)), np.zeros((5, 6)), x.numpy()], axis=-1)
    points = (points - points.mean((1, 2), keepdims=True)) / points.std((1, 2), keepdims=True)
    out = net.layers(torch.from_numpy(points).float()).amax(1)
    torch.testing.assert_close(net(x), net.logits(out))
    torch.testing.assert_close(net(3 * x), net(x), rtol=1e-4, atol=1e-5)  # so the level cancels
    assert torch.isfinite(net(torch.zeros(2, 6))).all()


def test_the_equivariant_layer_is_equivariant():
    layer = encodermi._EquivariantLayer(3, 5, torch.Generator().manual_seed(0))
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    slow = torch.tanh(x @ layer.own.weight.T + layer.own.bias - (x.amax(1) @ layer.largest.weight.T)[:, None])
    torch.testing.assert_close(layer(x), slow)


def test_weights_follow_torchs_default():
    linear = encodermi._make_linear(400, 300, torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.nn.Linear(400, 300)
    for ours, theirs in itertools.zip_longest(linear.parameters(), expected.parameters()):
        assert ours.abs().max() <= 1 / 20 and ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)


# ----------------------------------------------------------------------------------------------------------- LpLA


@pytest.mark.parametrize("p", [1, 2, 3.5, float("inf")])
def test_norms_equal_numpys(encoder, images, p):
    got = lpla.extract_norms(encoder, images, image_ids=IDS, p=p, pooling="mean", batch_size=7)
    with torch.inference_mode():
        vectors = encoder.embed(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, pooling="mean")
    np.testing.assert_allclose(got[:, 0], np.linalg.norm(vectors, ord=p, axis=1), rtol=1e-5)  # float32


@pytest.mark.parametrize("sign", [1, -1])
def test_the_ratio_points_to_members_whichever_side_they_are_on(sign):
    rng = np.random.default_rng(0)
    is_member = np.arange(600) < 200
    norms = 10 + sign * 1.2 * is_member + rng.normal(size=600)
    attacker = lpla.fit_ratio(norms[::2, None], is_member[::2], validation=(None, None))
    score = attacker.score(norms[1::2, None])
    assert score.dtype == np.float64 and roc_auc_score(is_member[1::2], score) > 0.72
    assert attacker.score([[10 + sign * 3.0]]) > 0 > attacker.score([[10 - sign * 1.5]])


def test_the_normal_ratio_is_the_formula_and_sees_spread():
    rng, is_member = np.random.default_rng(0), np.arange(400) < 200
    norms = 5 + rng.normal(size=400) * np.where(is_member, 0.3, 1.0)  # same mean: a threshold sees nothing
    score = lpla.fit_ratio(norms[:, None], is_member, validation=(None, None)).score(norms[:, None])
    m, s = norms[is_member], norms[~is_member]
    slow = np.log(s.std() / m.std()) - ((norms - m.mean()) / m.std()) ** 2 / 2 + ((norms - s.mean()) / s.std()) ** 2 / 2
    np.testing.assert_allclose(score, slow, rtol=1e-9)
    assert roc_auc_score(is_member, score) > 0.75


def test_norms_without_signal_give_chance_and_equal_norms_stay_finite():
    rng, is_member = np.random.default_rng(0), np.arange(2000) < 500
    norms = rng.normal(size=(2000, 1))
    score = lpla.fit_ratio(norms[::2], is_member[::2], validation=(None, None)).score(norms[1::2])
    assert roc_auc_score(is_member[1::2], score) == pytest.approx(0.5, abs=0.07)  # standard error .021
    equal = lpla.fit_ratio(np.full((10, 1), 8.0), is_member[495:505], validation=(None, None))
    assert np.isfinite(equal.score([[8.0], [8.1]])).all()


# --------------------------------------------------------------------------------------------------------- errors


class Silent:
    """A model without vectors."""

    input_size = 32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, x: encodermi.extract_features(e, x, image_ids=IDS[:2], n_views=1), "K >= 2, got"),
        (lambda e, x: encodermi.extract_features(e, x, image_ids=IDS[:2], measure="dot"), "measure cosine, .* 'dot'"),
        (lambda e, x: encodermi.extract_features(e, x, image_ids=IDS[:2], augmentation="mild"), "augmentation 'mild'"),
        (lambda e, x: encodermi.extract_features(e, x[0], image_ids=IDS[:2]), r"expected \(N, H, W, 3\) uint8"),
        (lambda e, x: encodermi.extract_features(e, x / 255, image_ids=IDS[:2]), "uint8, got .* float64"),
        (lambda e, x: encodermi.extract_features(e, x, image_ids=IDS), "got 40 ids for 2 images"),
        (lambda e, x: encodermi.extract_features(Silent(), x, image_ids=IDS[:2]), "with embed.images., got Silent"),
        (lambda e, x: encodermi.compare_views(torch.zeros(3, 1, 4)), r"K >= 2, got \(3, 1, 4\)"),
        (lambda e, x: encodermi.compare_views(torch.zeros(3, 2, 4), measure="l1"), "got 'l1'"),
        (lambda e, x: encodermi.score_threshold(np.zeros(5)), r"shape \(N, F\), got \(5,\)"),
        (lambda e, x: encodermi.fit_vector(FIT[0], FIT[1][:3], validation=FIT), "labels of shape"),
        (lambda e, x: lpla.extract_norms(e, x, image_ids=IDS[:2], p=0), "p > 0, got 0"),
        (lambda e, x: lpla.extract_norms(Silent(), x, image_ids=IDS[:2]), "got Silent"),
        (lambda e, x: lpla.fit_ratio(*FIT, validation=FIT), r"shape \(N, 1\), got \(6, 3\)"),
    ],
)
def test_bad_input_is_one_line(encoder, images, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(encoder, images[:2])
    assert "\n" not in str(error.value)


FIT = (np.random.default_rng(0).random((6, 3)), np.arange(6) < 3)


def test_a_shared_network_trains_alike_with_and_without_a_loose_bound_on_its_gradient(toy):
    options = dict(widths=(8,), epochs=2, batch_size=20, steps_per_epoch=3, weight_decay=0, patience=None)
    runs = [network.fit(*toy[0], validation=toy[1], max_norm=m, **options) for m in (None, 1e9, 1e-3)]
    first, loose, tight = (run.score(toy[2][0]) for run in runs)
    np.testing.assert_array_equal(first, loose)
    assert not np.array_equal(first, tight)

"""The shared attacker network: architecture, what it learns and does not learn, repeatability."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from mia_utils.attacks import network


def make_curves(n_members, n_nonmembers, *, seed, effect=1.0, n_crops=16):
    """Descending curves like sorted energies; members are steeper, the level is a nuisance."""
    rng = np.random.default_rng(seed)
    is_member = rng.permutation(np.arange(n_members + n_nonmembers) < n_members)
    shape = np.linspace(1, 0, n_crops) ** 2
    level = 3 * np.exp(0.3 * rng.normal(size=(len(is_member), 1)))
    slope = 3 + 0.6 * rng.normal(size=level.shape) + effect * is_member[:, None]
    curve = level + level * slope * (shape - shape.mean()) + 0.1 * rng.normal(size=(len(level), n_crops))
    return -np.sort(-curve, axis=1), is_member


@pytest.fixture(scope="module")
def toy():
    """Attack-training, attack-validation and evaluation sets."""
    return make_curves(150, 400, seed=0), make_curves(40, 120, seed=1), make_curves(300, 300, seed=2)


@pytest.fixture(scope="module")
def attacker(toy):
    return network.fit(*toy[0], validation=toy[1], widths=(64, 32), epochs=40)


@pytest.mark.parametrize("widths", [(512, 256, 128), (512, 256, 256, 128), (512, 128)])
def test_architecture_v1(widths):
    net = network.make_network(128, widths=widths, seed=0)
    linear = [m for m in net if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] == [128, *widths] and linear[-1].out_features == 1
    assert [type(m) for m in net] == [nn.Linear, nn.ReLU] * len(widths) + [nn.Linear]
    assert all((m.bias == 0).all() for m in linear)
    weights = torch.cat([m.weight.flatten() for m in linear])
    assert weights.std().item() == pytest.approx(0.01, rel=0.03)  # N(0, 0.01): standard error below 1 %
    assert abs(weights.mean().item()) < 2e-4


def test_architecture_v2():
    net = network.make_network(128, widths=(512, 256, 128), seed=0, normalized=True)
    assert [type(m) for m in net] == [nn.RMSNorm, *[nn.Linear, nn.RMSNorm, nn.Tanh] * 3, nn.Linear]
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) * 50
    torch.testing.assert_close(net[0](x), x / torch.sqrt((x**2).mean(dim=1, keepdim=True) + 1e-6))
    torch.testing.assert_close(net(x * 10), net(x))  # scale-free


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_the_rank_sum_is_scikit_learns_auc_ties_included(decimals):
    rng = np.random.default_rng(decimals)
    score, is_member = rng.normal(size=300).round(decimals), rng.random(300) < 0.3
    assert network.compute_auc(score, is_member) == pytest.approx(roc_auc_score(is_member, score), abs=1e-12)
    assert network.compute_auc(score, is_member) + network.compute_auc(-score, is_member) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("losses", "best"), [(None, 2), ((1, 1, 1, 1), 2), ((1, 1, 0, 1, 1), 3)])
def test_early_stopping_keeps_the_first_of_equal_epochs_and_breaks_ties_by_loss(losses, best):
    net, looks = nn.Linear(1, 1), []
    nn.init.zeros_(net.weight)

    def take_step():
        with torch.no_grad():
            net.weight += 1

    def look():
        assert not net.training
        looks.append({"validation_auc": (0.6, 0.7, 0.7, 0.5, 0.5)[len(looks)]})
        return looks[-1] | ({} if losses is None else {"validation_loss": losses[len(looks) - 1]})

    network.stop_early(net, take_step, look, epochs=9, steps_per_epoch=2, patience=2)
    assert net.weight.item() == 2 * best and len(looks) == best + 2  # the best weights, and then two epochs of patience
    assert not net.weight.requires_grad and not net.training


@pytest.mark.parametrize("normalized", [False, True])
def test_it_learns_and_leaves_the_plateau(toy, normalized):
    make = functools.partial(network.make_network, normalized=normalized)
    got = network.fit(*toy[0], validation=toy[1], make=make, epochs=30)
    assert roc_auc_score(toy[2][1], got.score(toy[2][0])) > 0.8


def test_permuted_labels_give_chance(toy):
    rng, auc = np.random.default_rng(0), []
    for seed in range(6):
        fit, val = [(x, rng.permutation(y)) for x, y in toy[:2]]
        got = network.fit(*fit, validation=val, widths=(64, 32), epochs=15, seed=seed)
        auc.append(roc_auc_score(rng.permutation(toy[2][1]), got.score(toy[2][0])))
    # labels of the evaluation set are permuted too: standard error of one AUC .024, of six .0096; four of them
    assert np.mean(auc) == pytest.approx(0.5, abs=0.04)


def test_patience_none_takes_every_epoch():
    looks, net = [], nn.Linear(1, 1)

    def look():
        looks.append(0)
        return {"validation_auc": 0.5}

    network.stop_early(net, lambda: None, look, epochs=12, steps_per_epoch=2, patience=None)
    assert len(looks) == 12


def test_same_seed_repeats_and_the_global_generator_stays(toy):
    def score(seed):
        got = network.fit(*toy[0], validation=toy[1], widths=(16,), epochs=3, seed=seed)
        return got.score(toy[2][0])

    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two, other = score(0), score(0), score(1)
    assert (torch.get_rng_state() == before[0]).all() and (np.random.get_state()[1] == before[1]).all()
    assert (one == two).all() and (one != other).any()


def test_a_score_does_not_depend_on_batch_mates(attacker, toy):
    x = toy[2][0]
    together = attacker.score(x)
    assert together.dtype == np.float64 and together.shape == (len(x),)
    alone = np.concatenate([attacker.score(x[i : i + 1]) for i in range(20)])
    # float64 products in another order: 1e-12 is far below any difference between two images
    np.testing.assert_allclose(alone, together[:20], rtol=0, atol=1e-12)
    np.testing.assert_allclose(attacker.score(x[::-1]), together[::-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(attacker.score(torch.from_numpy(x)), together, rtol=0, atol=1e-12)


def test_small_sets_are_balanced():
    is_member = np.arange(43) < 3
    idx, target = next(network.draw_batches(is_member, 100, torch.Generator().manual_seed(0)))
    assert len(idx) == 6 and (is_member[idx] == target.numpy().astype(bool)).all()
    batches = network.draw_batches(np.arange(30) < 10, 4, torch.Generator().manual_seed(0))
    seen = torch.cat([next(batches)[0][:4] for _ in range(5)])
    assert torch.bincount(seen, minlength=10)[:10].tolist() == [2] * 10  # every member once per pass


def test_threshold_maximizes_balanced_accuracy():
    score, is_member = np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([False, False, True, False, True])
    # at 2: both members and one of three non-members (.83); at 4: one of two members and no non-member (.75)
    assert network.pick_threshold(score, is_member) == 1.5
    assert np.isfinite(network.pick_threshold(-score, is_member))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.full((20, 3), np.nan)}, "finite fit features, got NaN or infinite values in 20 of 20 rows"),
        ({"features": np.zeros(20)}, r"shape \(N, F\)"),
        ({"is_member": np.ones(20, bool)}, "members and non-members to fit"),
        ({"is_member": np.ones(19, bool)}, r"fit labels of shape \(20,\)"),
        ({"validation": (np.zeros((4, 5)), np.arange(4) < 2)}, r"to fit, \(3,\), got \(5,\)"),
        ({"widths": ()}, "hidden widths"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_bad_input_is_one_line(change, message):
    good = {"features": np.zeros((20, 3)), "is_member": np.arange(20) < 10}
    good |= {"validation": (np.zeros((4, 3)), np.arange(4) < 2)}
    with pytest.raises(ValueError, match=message) as error:
        network.fit(**(good | change))
    assert "\n" not in str(error.value)


def test_score_refuses_other_features(attacker):
    with pytest.raises(ValueError, match="expected features of shape"):
        attacker.score(np.zeros((2, 5)))

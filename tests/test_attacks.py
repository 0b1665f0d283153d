"""The attack room: any registered attack gets roles, thresholds, protocols and controls that can be trusted."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from mia_utils import attacks, datasets
from mia_utils.attacks import network
from mia_utils.models import encoders
from mia_utils.protocol import splits

N_MEMBERS = 100
NARROW = {"n_crops": 16, "widths": (64, 32), "epochs": 15}  # a smaller attacker than the paper's
QUICK = {"widths": (16,), "epochs": 3, "controls": False}  # where the attacker's success is not the question


@pytest.fixture(scope="module")
def pool():
    """1,000 noise images: nothing but membership can part them."""
    rng = np.random.default_rng(0)
    return datasets.Pool(
        name="noise",
        images=rng.integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8),
        labels=np.arange(1000) % 4,
        image_ids=np.array([f"noise-{i:04d}" for i in range(1000)]),
        official_split=np.where(np.arange(1000) < 500, "train", "test"),
        class_names=("a", "b", "c", "d"),
    )


@pytest.fixture(scope="module")
def split(pool):
    return splits.draw(pool, n_members=N_MEMBERS, n_nonmembers=300, n_shadow_nonmembers=200, seed=0)


def make_memorizer(images: np.ndarray, *, strength: float = 1.5) -> encoders.Encoder:
    """An encoder that responds more sharply to images it has seen: tokens of a known image are scaled up."""
    weight = torch.randn(3 * 64, 24, generator=torch.Generator().manual_seed(0)) / 12
    known = {image.tobytes() for image in images}

    def patchify(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.unfold(x - 0.5, 8, stride=8).transpose(1, 2) @ weight  # (N, L, 24)

    def tokens(x: torch.Tensor) -> torch.Tensor:
        pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        scale = torch.tensor([strength if image.tobytes() in known else 1.0 for image in pixels])
        return patchify(x) * scale[:, None, None]

    return encoders.wrap(lambda x: patchify(x).mean(1), size=32, tokens=tokens, name="memorizer")


@pytest.fixture(scope="module")
def target(pool, split):
    return make_memorizer(pool.images[split.target_members])


@pytest.fixture(scope="module")
def shadow(pool, split):
    return make_memorizer(pool.images[split.shadow_members])


@pytest.fixture(scope="module")
def untrained():
    return make_memorizer(np.empty((0, 32, 32, 3), np.uint8))


@pytest.fixture(scope="module")
def result(target, untrained, pool, split):
    return attacks.evaluate("partcrop", target, pool, split, knowledge="partial", untrained=untrained, **NARROW)


@pytest.fixture
def scratch():
    """A registry that forgets what a test registers."""
    before = dict(attacks.ATTACKS)
    yield
    attacks.ATTACKS.clear()
    attacks.ATTACKS.update(before)


def embed_norm(model, images, *, image_ids, seed, power=1.0):
    with torch.inference_mode():
        return model.tokens(datasets.to_float(images)).norm(dim=-1).mean(1, keepdim=True) ** power


# 100 against 300 images: the standard error of an AUC of 0.5 is 0.033; the bands are four of them
LOW, HIGH = 0.37, 0.63


def test_a_memorized_set_is_found_and_the_controls_are_not(result):
    assert result.auc > 0.8
    assert set(result.controls) == set(attacks.CONTROLS)
    for control in result.controls.values():
        assert LOW < control.auc < HIGH, control
    assert not np.array_equal(result.controls["permuted"].is_member, result.is_member)
    assert result.controls["permuted"].is_member.sum() == result.is_member.sum()


def test_every_target_image_is_scored_once_by_an_attacker_that_never_saw_it(result, pool, split):
    expected = np.concatenate([split.target_members, split.target_nonmembers])
    assert sorted(result.image_ids) == sorted(pool.image_ids[expected])
    assert set(result.fold) == set(range(5))
    assert set(result.image_ids[result.is_member]) == set(pool.image_ids[split.target_members])
    assert result.score.dtype == np.float64 and result.threshold.shape == result.score.shape
    assert result.metrics.balanced_accuracy > 0.7


@pytest.mark.parametrize("name", ["partcrop", "partcrop-v2"])
def test_an_attacker_fit_on_a_shadow_finds_members_of_the_target(name, target, shadow, untrained, pool, split):
    models = dict(shadow=shadow, untrained=untrained)
    result = attacks.evaluate(name, target, pool, split, knowledge="shadow:PET", **models, **NARROW)
    assert result.auc > 0.8 and set(result.fold) == {0}
    assert len(result.score) == N_MEMBERS + 300 and len(np.unique(result.threshold)) == 1
    for control in result.controls.values():
        assert LOW < control.auc < HIGH, control


def test_an_untrained_vit_gives_one_half(pool, split):
    encoder = encoders.make("vit_nano_patch8_32", seed=1)
    assert LOW < attacks.evaluate("partcrop", encoder, pool, split, controls=False, **NARROW).auc < HIGH


def test_the_released_view_is_found_without_any_model(untrained, pool, split):
    options = QUICK | {"n_crops": 4, "controls": True}
    result = attacks.evaluate("partcrop", untrained, pool, split, protocol="released-view", **options)
    assert result.controls["no-model"].auc > 0.8  # the positive control: members are known by their crops
    assert result.controls["untrained"].meta["reason"] == "no untrained model was given"


def test_the_same_seed_repeats_and_another_differs(target, pool, split):
    first, again, other = (
        attacks.evaluate("partcrop", target, pool, split, n_crops=4, seed=seed, **QUICK).score for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(again, first)
    assert not np.array_equal(other, first)


def test_a_released_selection_differs_only_in_the_epoch_chosen(scratch, target, pool, split):
    seen = []

    def fit(features, is_member, *, validation, seed):
        seen.append(len(validation[1]))
        return network.fit(features, is_member, validation=validation, seed=seed, widths=(8,), epochs=2)

    attacks.register("norm-fit", needs={"tokens"}, queries=1, extract=embed_norm, fit=fit)
    released = attacks.evaluate("norm-fit", target, pool, split, protocol="released-selection", controls=False)
    assert seen == [80] * 5 and released.meta["protocol"] == "released-selection"  # 400 / 5 reported images
    with pytest.raises(ValueError, match="no protocol 'released-view'"):
        attacks.evaluate("norm-fit", target, pool, split, protocol="released-view")


def test_a_released_split_and_its_protocol_go_together(target, pool, split):
    official = splits.draw(pool, n_members=100, n_nonmembers=300, seed=0, rule="official")
    assert attacks.evaluate("partcrop", target, pool, official, protocol="released-split", n_crops=4, **QUICK)
    for some, protocol in ((split, "released-split"), (official, "controlled")):
        with pytest.raises(ValueError, match="go together"):
            attacks.evaluate("partcrop", target, pool, some, protocol=protocol)


# ---------------------------------------------------------------------------------------------- an attack of one's own


def test_an_attack_from_outside_appears_in_the_table_with_its_controls(scratch, target, untrained, pool, split):
    attacks.register(
        "token-norm",
        needs={"tokens"},
        queries=1,
        extract=embed_norm,
        score=lambda features: features[:, 0],
        paper="twenty lines in a notebook",
    )
    row = attacks.table(target).set_index("attack").loc["token-norm"]
    assert row.to_dict() == {
        "needs": "tokens",
        "queries": 1,
        "knowledge": "none (partial or shadow for a threshold)",
        "references": False,
        "paper": "twenty lines in a notebook",
        "runs": True,
    }
    result = attacks.evaluate("token-norm", target, pool, split, untrained=untrained)
    assert result.auc > 0.8 and set(result.fold) == {0}  # nothing is trained: one ranking, one ROC
    assert 1 < len(np.unique(result.threshold)) <= 5  # but no image helps to choose its own threshold
    assert result.meta["queries"] == 1 and not result.meta["fitted"] and result.metrics.n_members == N_MEMBERS
    assert result.tpr_at[0.01] is None  # 300 non-members are too few


def test_the_table_counts_queries_and_knows_what_runs():
    table = attacks.table(encoders.wrap(lambda x: x.flatten(1)[:, :8], size=32)).set_index("attack")
    assert table.loc["partcrop", "queries"] == 129 and not table.loc["partcrop", "runs"]


def test_registering_twice_or_wrongly_raises_one_line(scratch):
    options = {"needs": {"embed"}, "queries": 1, "extract": embed_norm}
    attacks.register("mine", **options)
    attacks.register("mine", replace=True, **options)
    for change, message in (
        ({}, "registered already"),
        ({"needs": {"soul"}, "replace": True}, "expected needs among"),
        ({"score": len, "fit": len, "replace": True}, "got both"),
        ({"extract": lambda model, images: None, "replace": True}, "image_ids"),
        ({"statistic": len, "replace": True}, "statistic goes with score"),
    ):
        with pytest.raises(ValueError, match=message):
            attacks.register("mine", **{**options, **change})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("partcorp", {}, "unknown attack 'partcorp'"),
        ("partcrop", {"n_crop": 3}, "no parameter 'n_crop'; allowed: batch_size, crop_scale, crop_size"),
        ("partcrop", {"view": "resize"}, "no parameter 'view'"),
        ("partcrop", {"knowledge": "full"}, "got 'full'"),
        ("partcrop", {"knowledge": "shadow"}, "none given as shadow"),
        ("partcrop", {"protocol": "released"}, "expected protocol controlled"),
        ("partcrop", {"reference": object()}, "takes no reference model"),
    ],
)
def test_what_does_not_fit_raises_one_line_before_anything_runs(name, options, message, target, pool, split):
    with pytest.raises(ValueError, match=message) as error:
        attacks.evaluate(name, target, pool, split, **options)
    assert "\n" not in str(error.value)


def test_a_model_without_tokens_and_a_split_of_another_pool_raise_one_line(pool, split, target):
    with pytest.raises(ValueError, match="'partcrop' needs tokens, which the model lacks"):
        attacks.evaluate("partcrop", encoders.wrap(lambda x: x.flatten(1)[:, :8], size=32), pool, split)
    with pytest.raises(ValueError, match="drawn from"):
        attacks.evaluate("partcrop", target, pool.take(np.arange(900)), split)


def test_parameters_reach_the_extraction_or_the_attacker(scratch, target, pool, split):
    seen = {}

    def fit(features, is_member, *, validation, seed, widths=(4,)):
        seen["widths"] = widths
        return network.fit(features, is_member, validation=validation, seed=seed, widths=widths, epochs=2)

    def extract(model, images, *, image_ids, seed, power=1.0):
        seen["power"] = power
        return embed_norm(model, images, image_ids=image_ids, seed=seed, power=power)

    attacks.register("mine", needs={"tokens"}, queries=1, extract=extract, fit=fit)
    result = attacks.evaluate("mine", target, pool, split, controls=False, power=2.0, widths=(6,))
    assert seen == {"widths": (6,), "power": 2.0} and result.meta["params"] == {"widths": [6], "power": 2.0}


def test_features_that_are_not_numbers_are_refused(scratch, target, pool, split):
    def extract(model, images, *, image_ids, seed):
        return np.full((len(images), 2), np.nan)

    attacks.register("nan", needs=set(), queries=1, extract=extract, score=lambda features: features[:, 0])
    with pytest.raises(ValueError, match="not finite"):
        attacks.evaluate("nan", target, pool, split)


# ------------------------------------------------------------------------------------------------ cache, files, helpers


def test_the_cache_is_asked_once_per_model_and_shared_by_attackers(pool, split):
    store, made = {}, []

    def cache(key, make):
        name = repr(sorted(key.items(), key=str))
        if name not in store:
            made.append(key)
            store[name] = make()
        return store[name]

    run = functools.partial(attacks.evaluate, pool=pool, split=split, cache=cache, n_crops=4, **QUICK)
    encoder = encoders.make("vit_nano_patch8_32", seed=1)
    first = run("partcrop", encoder)
    run("partcrop-v2", encoder, batch_size=3)
    assert len(made) == 1
    run("partcrop", encoders.make("vit_nano_patch8_32", seed=2))  # the same name, other weights
    run("partcrop", encoder, seed=1)
    run("partcrop", encoder, kind="uniform")
    assert len(made) == 4
    # the identity of features that lie on disks: neither renamed nor widened by a later parameter at its default
    assert made[0]["extract"] == "mia_utils.attacks.partcrop.extract_features" and "probes" not in made[0]["params"]
    assert run("partcrop", encoder, probes="random").meta["params"]["probes"] == "random" and len(made) == 5
    # target features serve both kinds of knowledge; the shadow's are new
    run("partcrop", encoder, knowledge="shadow", shadow=encoders.make("vit_nano_patch8_32", seed=3))
    assert len(made) == 6
    np.testing.assert_array_equal(run("partcrop", encoder).score, first.score)


def test_a_bare_callable_is_never_cached(target, pool, split):
    def refuse(key, make):
        raise AssertionError("weights that can't be hashed must not be looked up")

    assert attacks.evaluate("partcrop", target, pool, split, cache=refuse, n_crops=2, **QUICK)


def test_a_saved_result_comes_back_whole(result, tmp_path):
    result.controls["untrained"] = attacks.Result("partcrop", "untrained", meta={"reason": "none given"})
    np.savez(tmp_path / "partcrop.npz", **result.pack())
    loaded = attacks.Result.unpack(dict(np.load(tmp_path / "partcrop.npz")))
    for ours, theirs in ((result, loaded), *((result.controls[c], loaded.controls[c]) for c in attacks.CONTROLS)):
        assert (ours.attack, ours.control, ours.meta) == (theirs.attack, theirs.control, theirs.meta)
        for key in ("score", "is_member", "image_ids", "fold"):
            np.testing.assert_array_equal(getattr(ours, key), getattr(theirs, key))
        assert ours.groups is None and theirs.groups is None
    np.testing.assert_array_equal(loaded.threshold, result.threshold)
    assert loaded.auc == result.auc and np.isnan(loaded.controls["untrained"].auc)
    assert "none given" in repr(loaded.controls["untrained"])


def test_video_blocks_stay_together_in_every_control(pool, scratch):
    blocks = np.array([f"drive{i // 500}/{i // 10:03d}" for i in range(1000)])
    video = datasets.Pool(
        "video", pool.images, np.zeros(1000, np.int64), pool.image_ids, None, ("street",), groups=blocks
    )
    split = splits.draw(video, n_members=200, n_nonmembers=200, seed=0)
    attacks.register("norm", needs={"tokens"}, queries=1, extract=embed_norm, score=lambda features: features[:, 0])
    encoder = make_memorizer(video.images[split.target_members])
    result = attacks.evaluate("norm", encoder, video, split, untrained=encoder)
    group_of = dict(zip(video.image_ids, blocks, strict=True))
    assert all(group_of[i] == g for i, g in zip(result.image_ids, result.groups, strict=True))
    permuted = result.controls["permuted"]
    assert all(len(set(permuted.is_member[permuted.groups == g])) == 1 for g in set(permuted.groups))
    assert result.auc > 0.8


# --------------------------------------------------------------------------- no-model baselines under each protocol


def test_the_released_view_tells_members_without_a_model_and_the_controlled_protocol_does_not(pool):
    assert attacks.evaluate_blind(pool, "released-view", n_members=100).auc > 0.8
    result = attacks.evaluate_blind(pool, "controlled", n_members=100)
    assert LOW < result.auc < HIGH and (result.attack, result.controls) == ("no-model", {})
    assert result.metrics.n_nonmembers == 300


def test_the_official_split_tells_members_where_its_parts_look_different(pool):
    images = pool.images.copy()
    images[500:] //= 2  # the official test images are darker
    darker = datasets.Pool("darker", images, pool.labels, pool.image_ids, pool.official_split, pool.class_names)
    assert attacks.evaluate_blind(darker, "released-split", n_members=100).auc > 0.9


def test_frames_of_known_blocks_tell_members_and_whole_blocks_do_not():
    rng = np.random.default_rng(0)
    scene = rng.integers(40, 216, (80, 1, 6, 8, 3)).repeat(8, axis=1)  # 80 blocks of 8 near twins, 48 x 64 pixels
    images = (scene + rng.integers(-3, 4, scene.shape)).repeat(8, axis=2).repeat(8, axis=3).reshape(640, 48, 64, 3)
    blocks = np.array([f"drive{i // 320}/{i // 8:02d}" for i in range(640)])
    ids = np.array([f"frame-{i:03d}" for i in range(640)])
    video = datasets.Pool("video", images.astype(np.uint8), np.zeros(640, int), ids, None, ("street",), groups=blocks)
    assert attacks.evaluate_blind(video, "frame-thirds", n_members=160).auc > 0.75
    clean = attacks.evaluate_blind(video, "controlled", n_members=160)
    assert clean.auc_low < 0.5 < clean.auc_high and clean.groups is not None
    assert attacks.evaluate_blind(video, "iid-frames", n_members=160).groups is None


def test_an_unknown_rung_and_a_rung_about_video_raise_one_line(pool):
    with pytest.raises(ValueError, match="expected rung released-view"):
        attacks.evaluate_blind(pool, "official", n_members=10)
    with pytest.raises(ValueError, match="'noise' has no groups"):
        attacks.evaluate_blind(pool, "frame-thirds", n_members=10)


class Turned:
    """A defense that reverses the attack's score: what the static attacker learned is now wrong."""

    offers, module, input_size, name = {"embed", "tokens"}, None, 32, "turned"

    def __init__(self, model: encoders.Encoder):
        self.model = model

    def embed(self, images, pooling=None):
        return -(self.model.tokens(images).norm(dim=(1, 2)) - 8)[:, None]


class Plain(Turned):
    name = "plain"

    def embed(self, images, pooling=None):
        return (self.model.tokens(images).norm(dim=(1, 2)) - 8)[:, None]


@pytest.mark.parametrize("knowledge", ["partial", "shadow"])
def test_an_adaptive_attacker_learns_anew_and_a_static_one_keeps_what_they_learned(
    knowledge, scratch, target, shadow, pool, split
):
    attacks.register(
        "norm",
        needs={"embed"},
        queries=1,
        extract=lambda model, images, *, image_ids, seed: model.embed(datasets.to_float(images)).numpy(),
        fit=functools.partial(network.fit, widths=(8,), epochs=8, lr=1e-2),
    )
    defended = (Turned(target), Turned(shadow) if knowledge == "shadow" else None)
    before = (Plain(target), Plain(shadow) if knowledge == "shadow" else None)
    call = dict(knowledge=knowledge, controls=False, seed=0)
    adaptive = attacks.evaluate("norm", defended[0], pool, split, shadow=defended[1], **call)
    static = attacks.evaluate("norm", defended[0], pool, split, shadow=defended[1], learned_from=before, **call)
    undefended = attacks.evaluate("norm", before[0], pool, split, shadow=before[1], **call)
    again = attacks.evaluate("norm", before[0], pool, split, shadow=before[1], learned_from=before, **call)
    assert adaptive.auc > 0.9 and undefended.auc > 0.9 and static.auc < 0.2
    assert np.array_equal(again.score, undefended.score) and np.array_equal(again.threshold, undefended.threshold)

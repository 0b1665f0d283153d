"""The audit: void where pictures differ without the model, silent on an encoder that saw neither set."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mia_utils import attacks, audit, datasets
from mia_utils.models import encoders
from mia_utils.protocol import metrics

FAST = {"n_views": 3}


@pytest.fixture(scope="module")
def encoder():
    return encoders.make("vit_nano_patch8_32", seed=0)


@pytest.fixture(scope="module")
def pool():
    return datasets.load("scenes", n=120, size=32, seed=5)


def write(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def planted():
    """An attack that knows the suspected pictures by their ids, whatever model it is given."""

    def extract(model, images, *, image_ids, seed, strength: float = 2.0):
        level = np.char.startswith(np.asarray(image_ids, dtype=str), "suspected/")
        return strength * level[:, None] + np.random.default_rng(seed).normal(size=(len(images), 1))

    attacks.register("planted", needs={"embed"}, queries=1, extract=extract, score=lambda features: features[:, 0])
    yield "planted"
    del attacks.ATTACKS["planted"]


def test_sets_that_differ_in_brightness_are_void(encoder, pool):
    images = (pool.images * 0.7).astype(np.uint8)
    report = audit.compare(encoder, images[:40], pool.images[40:100], **FAST)
    assert report.void and str(report).startswith("VOID") and report.verdict.startswith("VOID")
    assert "without the model" in report.verdict
    assert sum("VOID" in line for line in str(report).splitlines()) == 3  # the verdict, the attack, the set


def test_alike_sets_and_an_untrained_encoder_give_no_sign(encoder, pool):
    report = audit.compare(encoder, pool.images[:50], pool.images[50:], **FAST)
    assert not report.void and report.void_because == ""
    assert report.p_value > 0.01 and report.p_value == report.set_test.p_value
    assert report.result.auc_low < 0.5 < report.result.auc_high
    assert "Not shown at level 0.01" in report.verdict and "could have seen AUC" in str(report)
    assert set(report.result.controls) == {"no-model", "untrained", "permuted"}
    text = str(report).splitlines()
    assert (
        text[0].startswith("Audit of untrained-vit_nano") and text[-1] == report.verdict and "VOID" not in str(report)
    )
    assert text[1].startswith("1. no model")  # the gate before the attack


def test_a_leak_is_evidence_and_a_small_one_beside_a_weak_control_is_not(encoder, pool, planted):
    halves = pool.images[:50], pool.images[50:]
    report = audit.compare(encoder, *halves, attack=planted, untrained=None)
    assert not report.void and report.result.auc > 0.8 and report.p_value < 0.001
    assert report.verdict.startswith("Evidence that the suspected pictures were used")
    assert "no untrained twin" in str(report)
    small = audit.compare(encoder, *halves, attack=planted, untrained=None, strength=0.2, level=0.5)
    assert small.result.auc < 0.5 + small.result.controls["no-model"].half_width
    assert "use more pictures" in small.verdict


def test_an_untrained_encoder_that_succeeds_makes_it_void_too(encoder, pool, planted):
    report = audit.compare(encoder, pool.images[:50], pool.images[50:], attack=planted)
    assert report.void and "untrained encoder" in report.verdict and str(report).startswith("VOID")


def test_an_attack_that_trains_is_cross_fitted(encoder, pool):
    report = audit.compare(encoder, pool.images[:50], pool.images[50:], attack="lpla")
    assert report.set_test is None and 0 < report.p_value < 1
    assert set(report.result.fold) == {0, 1, 2, 3, 4} and "(one-sided)" in str(report)


def test_folders_pools_and_arrays_agree_and_sizes_may_differ(encoder, pool, tmp_path):
    mine, other = write(tmp_path / "my pictures", pool.images[:12]), write(tmp_path / "others", pool.images[12:30])
    reports = [
        audit.compare(encoder, mine, str(other), untrained=None, **FAST),
        audit.compare(encoder, f"folder:{mine}", datasets.load(f"folder:{other}"), untrained=None, **FAST),
    ]
    np.testing.assert_array_equal(reports[0].result.score, reports[1].result.score)
    assert reports[0].suspected == "my pictures" and reports[0].result.image_ids[0] == "suspected/000.png"
    large = Image.fromarray(pool.images[30]).resize((80, 50))
    large.save(mine / "large.jpg")
    report = audit.compare(encoder, mine, pool.take(np.arange(60, 80)), untrained=None, **FAST)
    assert report.result.is_member.sum() == 13
    assert audit.compare(encoder, mine, other, untrained=None, size=48, **FAST).result.score.shape == (31,)


def test_repeated_pictures_count_once(encoder, pool):
    twice = np.concatenate([pool.images[:15], pool.images[:5]])
    report = audit.compare(encoder, twice, pool.images[20:40], untrained=None, **FAST)
    assert report.result.is_member.sum() == 15 and report.n_dropped == 5 and "5 repeated" in str(report)


def test_any_callable_can_be_audited_and_names_no_twin(pool):
    wrapped = encoders.wrap(lambda x: x.mean((2, 3)), size=32, name="colors")
    report = audit.compare(wrapped, pool.images[:30], pool.images[30:60], **FAST)
    assert report.encoder == "colors" and "no untrained twin" in str(report)


def test_the_same_seed_repeats(encoder, pool):
    reports = [audit.compare(encoder, pool.images[:20], pool.images[20:40], seed=s, **FAST) for s in (3, 3, 4)]
    assert str(reports[0]) == str(reports[1]) != str(reports[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suspected": slice(10, 40)}, "10 pictures are in both sets, for example 'suspected-free id'"),
        ({"suspected": slice(40, 49)}, "at least 10 different suspected pictures, got 9"),
        ({"reference": "no/such/folder"}, "no/such/folder, which is no folder"),
        ({"attack": "guess"}, "unknown attack 'guess'"),
        ({"attack": "partcrop", "encoder": "bare"}, "needs tokens, which the model lacks"),
        ({"n_crops": 3}, "takes no parameter 'n_crops'"),
        ({"level": 1.5}, "level in .0, 1."),
        ({"encoder": "no-such.safetensors"}, "no weights file"),
    ],
)
def test_bad_input_is_one_line(encoder, pool, change, message):
    call = {"encoder": encoder, "suspected": slice(40, 60), "reference": slice(0, 20)} | change
    for name in ("suspected", "reference"):
        call[name] = pool.images[call[name]] if isinstance(call[name], slice) else call[name]
    if call["encoder"] == "bare":
        call["encoder"] = encoders.wrap(lambda x: x.mean((2, 3)), size=32)
    message = message.replace("'suspected-free id'", "'0000")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        audit.compare(call.pop("encoder"), call.pop("suspected"), call.pop("reference"), **call)
    assert "\n" not in str(error.value)


def test_the_command_line_prints_the_report(encoder, pool, tmp_path, capsys):
    weights = encoders.save(encoder, tmp_path / "encoder.safetensors")
    mine, other = write(tmp_path / "a", pool.images[:12]), write(tmp_path / "b", pool.images[12:30])
    for spec in (weights, tmp_path):
        assert audit.main([str(spec), str(mine), str(other)]) == 0
    out = capsys.readouterr().out
    assert out.count("1. no model") == 2 and "12 suspected pictures (a)" in out
    assert audit.main([str(weights), str(mine), str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_p_values_are_one_sided(encoder, pool, planted):
    report = audit.compare(encoder, pool.images[:50], pool.images[50:], attack=planted, untrained=None, strength=-2.0)
    assert report.p_value > 0.99 and "Not shown at level 0.01" in report.verdict
    scores, mine = report.result.score, report.result.is_member
    assert report.p_value == metrics.test_set(scores[mine], scores[~mine]).p_value

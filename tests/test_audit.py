"""The audit: invalid where folders differ without the model, one exact p-value for a battery, a record."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib import resources

import jsonschema
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from mia_utils import attacks, audit, datasets, paths
from mia_utils.attacks import encodermi
from mia_utils.audit import api, battery, canaries, cli, examine, gates
from mia_utils.models import encoders, segmenters

FAST = {"n_views": 3}


@pytest.fixture(scope="module")
def encoder():
    return encoders.make("vit_nano_patch8_32", seed=0)


@pytest.fixture(scope="module")
def pool():
    return datasets.load("scenes", n=120, size=32, seed=5)


def embed(encoder, x):
    with torch.inference_mode():
        return encoder.embed(x).numpy()


def write(folder, images, suffix="png", **options):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.{suffix}", **options)
    return folder


@pytest.fixture
def planted(pool):
    """An attack that knows the first 60 images by their pixels, whatever model it is given."""
    known = battery.name_by_pixels(pool.images[:60])

    def extract(model, images, *, image_ids, seed, strength: float = 2.0):
        noise = [np.random.default_rng(int(image_id, 16)).normal() for image_id in image_ids]
        return strength * np.isin(image_ids, known)[:, None] + np.array(noise)[:, None]

    attacks.register("planted", needs={"embed"}, queries=1, extract=extract, score=lambda features: features[:, 0])
    yield "planted"
    del attacks.ATTACKS["planted"]


# ------------------------------------------------------------------------------------------------------ verdicts


def test_alike_sets_and_an_untrained_encoder_show_nothing(encoder, pool):
    report = audit.compare(encoder, pool.images[:60], pool.images[60:], **FAST)
    assert not report.void and report.exit_code in (0, 5) and report.p_value > 0.01
    assert report.result.auc_low < 0.5 < report.result.auc_high
    assert "would have been seen" in report.verdict and str(report).endswith(report.verdict)
    assert report.untrained is None  # it could only take a finding back


def test_a_leak_is_shown_and_an_untrained_model_that_finds_it_too_takes_it_back(encoder, pool, planted):
    halves = pool.images[:60], pool.images[60:]
    report = audit.compare(encoder, *halves, attack=planted, untrained=None)
    assert report.exit_code == 3 and report.verdict.startswith("LEAK SHOWN") and report.p_value < 0.001
    assert "no untrained model was given" in str(report)
    report = audit.compare(encoder, *halves, attack=planted)
    assert report.exit_code == 4 and "untrained model" in report.verdict


def test_reversed_scores_are_inconclusive(encoder, pool, planted):
    report = audit.compare(encoder, pool.images[:60], pool.images[60:], attack=planted, untrained=None, strength=-2.0)
    assert report.p_value < 0.001 and report.exit_code == 5 and "lower" in report.verdict


def test_reference_models_calibrate_and_one_that_saw_a_folder_is_caught(encoder, pool):
    """Images differ in difficulty, for every model alike: only beside another model the leak stands out."""
    other, spoiled = (encoders.make("vit_nano_patch8_32", seed=seed) for seed in (1, 2))
    saw = {id(encoder): pool.images[:60], id(spoiled): pool.images[60:]}

    def extract(model, images, *, image_ids, seed):
        noise = [np.random.default_rng([int(image_id, 16), id(model) % 99]).normal() for image_id in image_ids]
        hard = [20 * np.random.default_rng(int(image_id, 16)).normal() for image_id in image_ids]
        known = np.isin(image_ids, battery.name_by_pixels(saw[id(model)]) if id(model) in saw else [])
        return (1.5 * known + np.array(noise) - np.array(hard))[:, None]

    halves, score = (pool.images[:60], pool.images[60:]), lambda features: features[:, 0]
    attacks.register("planted", needs={"embed"}, queries=1, extract=extract, score=score, statistic=score)
    try:
        alone = audit.run(encoder, *halves, attack="planted")
        assert alone.exit_code in (0, 5) and "no reference model" in str(alone)
        report = audit.run(encoder, *halves, attack=["planted", "lpla"], reference_models=[other])
        assert report.exit_code == 3 and report.best == "planted with reference", report
        assert list(report.results) == ["planted", "planted with reference", "lpla"]
        assert "reference model 1: untrained-vit_nano" in str(examine.plan(encoder, *halves, reference_models=[other]))
        two = audit.run(encoder, *halves, attack="planted", reference_models=[other, other])
        np.testing.assert_allclose(two.result.score, report.result.score)
        caught = audit.run(encoder, *halves, attack="planted", reference_models=[spoiled])
        assert caught.exit_code == 4 and caught.verdict.endswith("or a reference model saw one of them. A high score "
                                                                 "says nothing about training.")  # fmt: skip
    finally:
        del attacks.ATTACKS["planted"]


@pytest.mark.parametrize(
    ("reference", "attack", "message"),
    [
        ("itself", "lpla", "expected another encoder of the same recipe, got the model itself"),
        ("segmenter", "lpla", "got a segmenter"),
        ("other", "lpla", "no attack tried takes a reference model: lpla"),
    ],
)
def test_a_reference_model_that_can_not_serve_is_one_line(encoder, pool, reference, attack, message):
    made = {"itself": encoder, "other": encoders.make("vit_nano_patch8_32", seed=1)}
    made["segmenter"] = segmenters.wrap(lambda x: x[:, :2], n_classes=2)
    options = dict(attack=attack, reference_models=[made[reference]])
    with pytest.raises(ValueError, match=message):
        audit.run(encoder, pool.images[:60], pool.images[60:], **options)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda x: (x * 0.7).astype(np.uint8), "brightness"),
        (lambda x: np.repeat(x.mean(axis=3, keepdims=True), 3, axis=3).astype(np.uint8), "saturation"),
    ],
)
def test_pixels_that_differ_are_invalid_on_either_side(encoder, pool, change, field):
    for one, other in ((change(pool.images[:60]), pool.images[60:]), (pool.images[60:], change(pool.images[:60]))):
        report = audit.compare(encoder, one, other, **FAST)
        assert report.void and report.exit_code == 4 and report.verdict.startswith("INVALID")
        assert report.found is None and "No model was queried" in report.verdict
        assert "without the model" in report.verdict and any(f in report.verdict for f in (field, "all statistics"))


def test_segmenters_are_audited_by_their_losses_and_groups_are_kept(pool, tmp_path):
    rng = np.random.default_rng(0)
    masks = (pool.images[..., 0] > 110).astype(np.uint8)
    groups = np.array([f"g{i // 2}" for i in range(len(pool))])
    sets = [
        datasets.Pool(name, pool.images[rows], np.zeros(60, int), pool.image_ids[rows], None, ("a", "b"), masks[rows],
                      groups[rows])
        for name, rows in (("mine", slice(0, 60)), ("other", slice(60, 120)))
    ]  # fmt: skip

    def leak(x):  # sure of what it saw: the first half of the images, by their bytes
        n = [any(np.array_equal(i, j) for j in pool.images[:60]) for i in
             (x * 255).round().byte().permute(0, 2, 3, 1).numpy()]  # fmt: skip
        right = torch.stack([1.0 - (x[:, 0] * 255 > 110).float(), (x[:, 0] * 255 > 110).float()], dim=1)
        noise = torch.from_numpy(rng.normal(size=(len(x), 1, 1, 1)).astype(np.float32)).abs()
        return right * (2 + noise + 2 * torch.tensor(n).float().view(-1, 1, 1, 1))

    report = audit.run(segmenters.wrap(leak, n_classes=2), *sets)
    assert report.task == "segmenter" and report.exit_code == 3, report
    assert list(report.results)[0] == "seg-global-loss" and report.result.groups is not None
    facts = report.facts["mIoU on the given masks"][0]
    assert facts.startswith("1.00") and not report.doubt
    alone = audit.compare_segmenter(segmenters.wrap(leak, n_classes=2), *sets)
    assert alone.best == "seg-global-loss"
    bare = pool.images[:12], np.zeros(12, int), pool.image_ids[:12], None, ("a", "b")
    with pytest.raises(ValueError, match="no label maps"):
        audit.compare_segmenter(segmenters.wrap(leak, n_classes=2), datasets.Pool("bare", *bare), sets[1])


def test_a_segmenter_that_hardly_works_is_flagged_and_nothing_found_is_no_verdict(pool):
    masks = (pool.images[..., 0] > 110).astype(np.uint8)
    sets = [
        datasets.Pool(name, pool.images[rows], np.zeros(60, int), pool.image_ids[rows], None, ("a", "b"), masks[rows])
        for name, rows in (("mine", slice(0, 60)), ("other", slice(60, 120)))
    ]
    broken = segmenters.wrap(lambda x: torch.stack([x[:, 2], 0.5 * x.mean(1)], dim=1), n_classes=2)
    report = audit.run(broken, *sets, attack="seg-global-loss")
    assert report.exit_code == 5 and "mIoU" in report.verdict and "LOW mIoU" in str(report)
    assert "LOW mIoU" in report.to_html() and any("LOW" in note for note in report.to_dict()["notes"])


def test_a_perfect_segmenter_of_many_classes_has_an_iou_of_one(pool):
    masks, names = pool.images[..., 0] // 4, tuple(map(str, range(64)))
    sets = [
        datasets.Pool(name, pool.images[rows], np.zeros(60, int), pool.image_ids[rows], None, names, masks[rows])
        for name, rows in (("mine", slice(0, 60)), ("other", slice(60, 120)))
    ]
    perfect = segmenters.wrap(
        lambda x: F.one_hot((x[:, 0] * 255).round().long() // 4, 64).permute(0, 3, 1, 2).float(), n_classes=64
    )
    p = examine.plan(perfect, *sets, attack="seg-global-loss")
    assert p.subject.facts["mIoU on the given masks"][0].startswith("1.00") and not p.doubt


# ------------------------------------------------------------------------------------------------- one p-value


def test_the_p_value_of_a_battery_is_exact(monkeypatch):
    """At level .05 an innocent battery with an attacker that trains is called in 5 % of 400 divisions of one pool."""
    rng, n, called, higher = np.random.default_rng(1), 60, 0, 0
    features, score = rng.normal(size=(n, 8)), rng.standard_cauchy(size=n)
    units = np.arange(n).astype(str)
    monkeypatch.setattr(battery, "N_PERMUTATIONS", 199)
    for seed in range(400):
        side = rng.permutation(n) < n // 2
        fold = battery.assign_folds(side, units, seed)
        entries = {"fitted": battery.make_smoother(features, fold), "score": score, "mean": features[:, 0]}
        found = battery.search(entries, side, units, fold, seed=seed)
        called += found.p <= 0.05
        higher += found.p <= 0.05 and found.z[found.strongest] > 0
    assert called <= 34 and higher <= 22  # 99.9 % of binomials with p = .05 and .025
    assert called >= 8  # not by never calling


def test_every_division_of_a_pool_together_keeps_the_level(monkeypatch):
    """All 252 divisions of 10 units into halves, each judged by its own draws: at most a tenth reach p = .1."""
    score = np.random.default_rng(2).normal(size=(10, 2)) ** 3
    units, fold = np.arange(10).astype(str), np.zeros(10, int)
    monkeypatch.setattr(battery, "N_PERMUTATIONS", 499)
    ps = []
    for i, chosen in enumerate(itertools.combinations(range(10), 5)):
        side = np.isin(np.arange(10), chosen)
        ps.append(battery.search({"a": score[:, 0], "b": score[:, 1]}, side, units, fold, seed=i).p)
    assert np.mean(np.array(ps) <= 0.1) <= 0.11 and np.mean(np.array(ps) <= 0.5) <= 0.53


def test_a_score_does_not_know_its_side_name_or_place(encoder, pool):
    """Else scores of one seed belong to places, and random sides are exchangeable only on average over seeds."""
    attempt = battery.Attempt("encodermi-t", encoder, {"n_views": 3})
    order = np.random.default_rng(0).permutation(len(pool))
    renamed = datasets.Pool("b", pool.images[order], np.zeros(120, int), pool.image_ids, None, ("all",))
    np.testing.assert_allclose(attempt.query(renamed, 0), attempt.query(pool, 0)[order], atol=1e-6)


def test_the_attacker_is_cross_fitted_ridge_regression_and_the_aucs_are_those_of_its_scores():
    rng = np.random.default_rng(0)
    side = np.arange(80) < 40
    x = rng.normal(size=(80, 3)) + side[:, None]
    units = np.array([f"{i:02d}" for i in range(80)])
    fold = battery.assign_folds(side, units, 0)
    h = battery.make_smoother(x, fold)
    assert all(not h[np.ix_(fold == f, fold == f)].any() for f in range(5))
    score = battery.score_fitted(h, side)
    found = battery.search({"fitted": h, "plain": x[:, 0]}, side, units, fold, seed=0)
    sides = [(score[(fold == f) & side], score[(fold == f) & ~side]) for f in range(5)]
    expected = np.mean([(a[:, None] > b).mean() for a, b in sides])
    assert found.auc[0] == pytest.approx(expected) and found.auc[0] > 0.7 and found.p == pytest.approx(1e-4)
    assert found.auc[1] == pytest.approx(np.mean(x[side, 0][:, None] > x[~side, 0]))
    assert (found.detectable > 0.5).all() and found.strongest == 0
    turned = battery.search({"fitted": h, "plain": -x[:, 0]}, side, units, fold, seed=0)
    assert turned.z[1] == pytest.approx(-found.z[1]) and turned.p_single[1] == found.p_single[1]  # two-sided


def test_groups_are_permuted_as_a_whole():
    units = np.repeat([f"g{i:02d}" for i in range(24)], 5)
    side = np.arange(120) < 60
    level = np.repeat(np.random.default_rng(3).normal(size=24), 5)  # all that differs is the group
    ps = []
    for unit in (units, np.array([f"{i:03d}" for i in range(120)])):
        fold = battery.assign_folds(side, unit, 0)
        ps.append(battery.search({"s": level}, side, unit, fold, seed=0).p)
    assert ps[0] > 2 * ps[1]


def test_queries_of_the_own_augmentation_come_first_and_unknown_ones_are_refused():
    assert battery.order_augmentations("simclr-weak", []) == ["simclr-weak", *battery.AUGMENTATIONS]
    assert battery.order_augmentations("none", []) == list(battery.AUGMENTATIONS)
    with pytest.raises(ValueError, match="augmentation"):
        battery.order_augmentations(None, ["sideways"])


# -------------------------------------------------------------------------------------------------------- gates


def test_file_facts_name_the_field_that_separates(pool, tmp_path):
    a = write(tmp_path / "a", pool.images[:30], "jpg", quality=75)
    same = write(tmp_path / "same", pool.images[30:60], "jpg", quality=75)
    b = write(tmp_path / "b", pool.images[30:60])
    other = write(tmp_path / "other", pool.images[30:60], "jpg", quality=95)
    files = {folder.name: sorted(folder.iterdir()) for folder in (a, same, b, other)}
    assert gates.compare_files(files["a"], files["same"], level=0.01).passed
    gate = gates.compare_files(files["a"], files["b"], level=0.01)
    assert not gate.passed and any(line.startswith("format: JPEG (100 %) against PNG (100 %)") for line in gate.details)
    assert "JPEG quantization" in str(gates.compare_files(files["a"], files["other"], level=0.01).details)
    exif = Image.Exif()
    exif[271] = "Camera"
    for i, path in enumerate(files["same"]):
        Image.fromarray(pool.images[30 + i]).save(path, quality=75, exif=exif)
    assert "EXIF" in gates.compare_files(files["a"], files["same"], level=0.01).found
    renamed = [path.rename(path.with_name(f"IMG_{path.name}")) for path in files["other"]]
    assert any("name pattern" in line for line in gates.compare_files(files["a"], renamed, level=0.01).details)


def test_frames_of_a_video_count_once_among_the_files(tmp_path):
    rng = np.random.default_rng(0)
    for name, n_coarse in (("a", 8), ("b", 4)):  # 8 of 12 videos against 4: p = .2, of single frames below .001
        (tmp_path / name).mkdir()
        for video, frame in np.ndindex(12, 6):
            image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            image.save(tmp_path / name / f"{video:02d}-{frame}.jpg", quality=75 if video < n_coarse else 90)
    model = encoders.wrap(lambda x: x.mean((2, 3)), size=32)
    p = examine.plan(model, tmp_path / "a", tmp_path / "b", attack="encodermi-t", groups="prefix:..")
    assert [[path.name for path in part[:2]] for part in p.files] == [["00-0.jpg", "01-0.jpg"]] * 2
    assert gates.compare_files(*p.files, level=0.01).passed and len(p.files[0]) == 12
    frames = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert not gates.compare_files(*frames, level=0.01).passed


def test_images_of_8_px_have_no_low_frequencies_and_pass(pool):
    images = np.stack([np.asarray(Image.fromarray(image).resize((8, 8))) for image in pool.images])
    named = gates.describe_pixels(images)
    assert "middle frequencies" in named and all(np.isfinite(x).all() for x in named.values())
    side = np.arange(120) < 60
    assert gates.compare_pixels(images, pool.image_ids, side, pool.image_ids, level=0.01, seed=0)[0].passed


def test_copies_are_found_re_encoded_scaled_and_cropped(pool):
    def again(image, kind):
        image = Image.fromarray(image)
        if kind == "scaled":
            return np.asarray(image.resize((24, 24)).resize((32, 32)))
        return np.asarray(image.crop((1, 1, 32, 32)).resize((32, 32)))

    kinds = ["scaled", "cropped"] * 10
    changed = np.stack([again(image, kind) for image, kind in zip(pool.images[:20], kinds, strict=True)])
    images, side = np.concatenate([pool.images, changed]), np.arange(140) < 120
    across, within = gates.find_copies(images, side)
    assert len({i for i, j in across if j == i + 120}) >= 18  # 20 in all
    assert len([1 for i, j in across if j != i + 120]) + len(within) <= 1


def test_copies_across_are_invalid_and_copies_within_count_once(encoder, pool):
    twice = np.concatenate([pool.images[:15], pool.images[:5]])
    report = audit.compare(encoder, twice, pool.images[20:40], untrained=None, **FAST)
    assert report.is_member.sum() == 15 and report.n_dropped == 5 and "5 repeated" in str(report)
    assert any("--groups" in note for note in report.notes)
    report = audit.compare(encoder, pool.images[:30], pool.images[20:50], untrained=None, **FAST)
    assert report.exit_code == 4 and "10 pairs of near-duplicates" in report.verdict


# ------------------------------------------------------------------------------------------------- record and CLI


def test_the_record_fits_its_schema_and_needs_no_request(encoder, pool, planted, tmp_path):
    report = audit.compare(encoder, pool.images[:60], pool.images[60:], attack=planted, untrained=None)
    folder = report.save(tmp_path / "out")
    schema = json.loads(resources.files("mia_utils.audit").joinpath("audit.schema.json").read_text())
    found = json.loads((folder / "audit.json").read_text())
    jsonschema.validate(found, schema)
    assert found["exit_code"] == 3 and found["odds"][0]["members_of_100"] < found["odds"][2]["members_of_100"]
    page = (folder / "report.html").read_text()
    assert "LEAK SHOWN" in page and page.count("data:image/png") == 3 + 16
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    assert len((folder / "scores.csv").read_text().splitlines()) == 121 and "percentile" in report.scores
    assert report._repr_html_().startswith("<iframe")
    void = audit.compare(encoder, pool.images[:30], pool.images[:30])
    jsonschema.validate(json.loads((void.save(tmp_path / "void") / "audit.json").read_text()), schema)


def test_folders_pools_and_arrays_agree_and_the_seed_repeats(encoder, pool, tmp_path):
    mine, other = write(tmp_path / "my images", pool.images[:12]), write(tmp_path / "others", pool.images[12:30])
    reports = [
        audit.compare(encoder, mine, str(other), untrained=None, **FAST),
        audit.compare(encoder, f"folder:{mine}", datasets.load(f"folder:{other}"), untrained=None, **FAST),
    ]
    np.testing.assert_array_equal(reports[0].result.score, reports[1].result.score)
    assert reports[0].suspected == "my images" and reports[0].result.image_ids[0] == "suspected/000.png"
    assert reports[0].gates[0].name == "files" and reports[1].gates[0].name == "copies"
    again = [audit.compare(encoder, pool.images[:20], pool.images[20:40], seed=s, **FAST) for s in (3, 3, 4)]
    assert str(again[0]) == str(again[1]) != str(again[2])


def test_anything_wrapped_can_be_audited_and_assumptions_are_flagged(pool):
    wrapped = encoders.wrap(lambda x: x.mean((2, 3)), size=32, name="colors")
    report = audit.run(wrapped, pool.images[:30], pool.images[30:60], settings=FAST)
    assert report.encoder == "colors" and "ASSUMED" in str(report) and "normalization" in str(report)
    assert any(line.startswith("token-spread: needs tokens") for line in report.not_tried)
    assert any("lpla: trains an attacker" in line for line in report.not_tried)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suspected": slice(40, 49)}, "at least 10 different suspected images, got 9"),
        ({"reference": "no/such/folder"}, "no/such/folder, which is no folder"),
        ({"attack": "guess"}, "unknown attack 'guess'"),
        ({"attack": "partcrop", "encoder": "bare"}, "needs tokens, which the model lacks"),
        ({"n_crops": 3}, "takes a parameter 'n_crops'"),
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
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        audit.compare(call.pop("encoder"), call.pop("suspected"), call.pop("reference"), **call)
    assert "\n" not in str(error.value)


def test_the_command_line_reports_checks_and_fails_on_demand(encoder, pool, tmp_path, capsys):
    weights = encoders.save(encoder, tmp_path / "encoder.safetensors")
    mine, other = write(tmp_path / "a", pool.images[:12]), write(tmp_path / "b", pool.images[12:30])
    plain = [weights, mine, other, "--attack", "token-spread"]
    assert cli.main([*plain, "--out", tmp_path / "out"]) == 5  # too few images to say
    shown = capsys.readouterr()
    assert "INCONCLUSIVE" in shown.out and (tmp_path / "out" / "report.html").is_file()
    assert shown.err.index("in all about") < shown.err.index("attack 1 of 1: token-spread")  # before and during
    assert cli.main([*plain, "--device", "cuda:99"]) == 2
    assert "device 'cuda:99' can't be used here" in capsys.readouterr().err
    assert cli.main([*plain, "--fail-on", "leak", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attacks"][0]["attack"] == "token-spread"
    assert cli.main([weights, mine, other, "--check", "--set", "n_views=3"]) == 0
    shown = capsys.readouterr().out
    assert "architecture" in shown and "would take in all about" in shown and "encodermi-t, n_views 3" in shown
    lossy = write(tmp_path / "c", pool.images[30:48], "jpg")
    assert cli.main([weights, mine, lossy]) == 4 and "format" in capsys.readouterr().out
    (tmp_path / "mine.py").write_text(
        "from mia_utils import encoders\ndef make():\n    return encoders.wrap(lambda x: x.mean((2, 3)), size=32)\n"
    )
    assert cli.main([f"{tmp_path}/mine.py:make", mine, other, "--attack", "encodermi-t"]) == 5


def test_a_model_that_fails_when_it_is_asked_is_one_line(pool, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from mia_utils import encoders\nservice = {'mean': lambda x: x.mean((2, 3))}\n"
        "def make():\n    encoder = encoders.wrap(lambda x: service['mean'](x), size=32)\n"
        "    service.clear()\n    return encoder\n"
    )
    mine, other = write(tmp_path / "a", pool.images[:12]), write(tmp_path / "b", pool.images[12:30])
    assert cli.main([f"{tmp_path}/mine.py:make", mine, other, "--attack", "encodermi-t", "--set", "n_views=3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: encodermi-t, n_views 3: the model failed: KeyError: 'mean'"
    masks = np.zeros((60, 32, 32), np.uint8)
    sets = [
        datasets.Pool(name, pool.images[rows], np.zeros(60, int), pool.image_ids[rows], None, ("a", "b"), masks)
        for name, rows in (("mine", slice(0, 60)), ("other", slice(60, 120)))
    ]
    with pytest.raises(ValueError, match="^tables: the model failed: IndexError: list index out of range$"):
        audit.run(segmenters.wrap(lambda x: [][0], n_classes=2, name="tables"), *sets)


def test_the_decoder_of_a_foreign_mae_is_attacked_too(pool, tmp_path):
    parts = []
    for dim, depth in ((64, 2), (32, 1)):
        sizes = dict(img_size=32, patch_size=8, embed_dim=dim, depth=depth, num_heads=2, num_classes=0)
        parts.append(timm.create_model("vit_tiny_patch16_224", **sizes).state_dict())
    state = parts[0] | {f"decoder_{k}": v for k, v in parts[1].items() if k.startswith(("blocks", "norm"))}
    state |= {"decoder_embed.weight": torch.randn(32, 64), "decoder_embed.bias": torch.zeros(32)}
    state |= {"decoder_pred.weight": torch.randn(192, 32), "decoder_pred.bias": torch.zeros(192)}
    state |= {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.randn(1, 17, 32)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    p = examine.plan(tmp_path / "mae.pth", pool.images[:12], pool.images[12:24], arch_args={"num_heads": 2})
    attempt = next(attempt for attempt in p.attempts if attempt.attack == "mim")
    assert attempt.query(p.pool, 0).shape == (24,) and p.subject.make_untrained(attempt.model) is not attempt.model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "A", "nowhere"], "nowhere, which is no folder"),
        (["none.pth", "A", "A"], "no weights file"),
        (["none.pth", "A", "A", "--level", "7"], "level between 0 and 1"),
        (["none.pth", "A", "A", "--size", "big"], "HEIGHTxWIDTH"),
        (["none.pth", "A", "A", "--budget", "10"], "10min"),
        (["none.pth", "A", "A", "--set", "n_views"], "KEY=VALUE"),
        (["none.pth", "A", "A", "--fail-on", "rain"], "--fail-on"),
        (["none.pth"], "required"),
        (["none.pth", "A", "A", "--size", "99999"], "HEIGHTxWIDTH"),
        (["none.pth", "A", "A", "--out", ""], "a folder"),
        (["none.pth", "A", "A", "--arch-args", "pretrained=True"], "reads weights from elsewhere"),
        (["none.pth", "A", "A", "--arch-args", "checkpoint_path='/etc/passwd'"], "reads weights from elsewhere"),
        (["views", "A", "--out", "B", "--n", "999999999"], "at least 1"),
        (["outputs", "PIPE.npz", "A", "A"], "PIPE.npz can't be read (no file)"),
        (["none.pth", "", "A"], "suspected: expected a folder"),
        (["none.pth", "folder:", "A"], "suspected: expected a folder"),
        (["none.pth", "A", "A", "--mean", ".5,.5"], "one number or three"),
        (["none.pth", "A", "A", "--level", "0"], "level between 0 and 1"),
        (["none.pth", "A", "A", "--budget", "0s"], "10min"),
        (["views", "A", "--out", "A", "--n", "0"], "at least 1"),
        (["canaries", "A"], "canaries make or canaries test"),
        (["views", "A"], "--out"),
        (["outputs", "none.npz", "A", "A"], "none.npz can't be read"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(tmp_path, capsys, arguments, message):
    os.mkfifo(tmp_path / "PIPE.npz")
    places = {"A": str(tmp_path), "PIPE.npz": str(tmp_path / "PIPE.npz")}
    arguments = [places.get(part, part) for part in arguments]
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_an_audit_needs_the_core_packages_alone_and_its_cache_is_the_users(pool, encoder, tmp_path):
    """As in a core install away from a checkout: what only extra ``book`` brings can't be imported."""
    project = tomllib.loads((paths.PACKAGE_ROOT / "pyproject.toml").read_text())["project"]
    core = {re.match(r"[\w-]+", name)[0] for name in project["dependencies"]}
    assert core <= set("torch timm numpy scipy scikit-learn pillow safetensors matplotlib jinja2".split())
    package = shutil.copytree(paths.PACKAGE_ROOT / "mia_utils", tmp_path / "site" / "mia_utils")
    weights = encoders.save(encoder, tmp_path / "encoder.safetensors")
    mine, other = write(tmp_path / "a", pool.images[:45]), write(tmp_path / "b", pool.images[45:90])
    blocked = "pandas seaborn lightly lightning_fabric pydantic opacus papermill psutil segmentation_models_pytorch"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked.split()} + ['torchmetrics', 'IPython', 'snakemake']))\n"
        "from mia_utils import paths; from mia_utils.audit.cli import main\n"
        "code = main(sys.argv[1:]); print(paths.get_home()); sys.exit(code)"
    )
    drop = ("MIA_HOME", "MIA_DATA_DIR", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in drop} | {"PYTHONPATH": str(package.parent)}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    call = [sys.executable, "-c", code, weights, mine, other, "--out", "record", "--set", "n_views=3"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode in (0, 5), done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "cache" / "mia_utils")
    assert (tmp_path / "record" / "report.html").is_file() and "partcrop" in done.stdout


def test_help_needs_no_torch():
    code = "import sys; from mia_utils.audit import cli; cli.make_parser(); print('torch' in sys.modules)"
    start = time.process_time()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False" and time.process_time() - start < 1


# ------------------------------------------------------------------------------------- models behind an API, canaries


def audit_outputs(features, mine, other, **options):
    return examine.conclude(api.plan_outputs(features, mine, other, size=32, **options), untrained=None)


def test_outputs_of_an_api_give_the_scores_of_the_model_itself(encoder, pool, tmp_path):
    mine, other = write(tmp_path / "a", pool.images[:12]), write(tmp_path / "b", pool.images[12:30])
    out = tmp_path / "views"
    for folder in (mine, other):
        assert cli.main(["views", str(folder), "--out", str(out), "--size", "32", "--n", "3"]) == 0
    files = sorted(path for path in out.rglob("*.png") if path.is_file())
    assert len(files) == 30 * (2 * 3 + 1)
    before = files[0].stat().st_mtime_ns
    cli.main(["views", str(mine), "--out", str(out), "--size", "32", "--n", "3"])
    assert files[0].stat().st_mtime_ns == before  # resumes
    x = datasets.to_float(np.stack([np.asarray(Image.open(f)) for f in files]))
    names = np.array([f.relative_to(out).as_posix() for f in files])
    np.savez(tmp_path / "features.npz", names=names, features=embed(encoder, x))
    report = audit_outputs(tmp_path / "features.npz", mine, other)
    ids = battery.name_by_pixels(pool.images[:12])
    direct = encodermi.extract_features(encoder, pool.images[:12], image_ids=ids, augmentation="crop", **FAST)
    own = report.results["encodermi-t, augmentation crop"].score[:12]
    assert np.corrcoef(own, encodermi.score_threshold(direct))[0, 1] > 0.99  # sent views are rounded to 8 bits
    assert report.exit_code == 5 and "outputs in features.npz" in str(report)
    report = audit_outputs(tmp_path / "features.npz", mine, other, groups="prefix:...")  # a rule of one image each
    assert report.result.groups is not None and len(np.unique(report.result.groups)) == 30
    refused = ["outputs", tmp_path / "features.npz", mine, other, "--size", "32", "--groups", "prefix:.."]
    assert cli.main(refused) == 2  # two groups on one side
    with pytest.raises(ValueError, match="holds no outputs of a/000.png"):
        np.savez(tmp_path / "few.npz", names=names[names > "b"], features=np.ones((18 * 7, 2)))
        audit_outputs(tmp_path / "few.npz", mine, other)


def test_views_of_two_folders_of_one_name_never_mix(pool, tmp_path, capsys):
    one, two = write(tmp_path / "1" / "images", pool.images[:12]), write(tmp_path / "2" / "images", pool.images[12:30])
    options = ["--out", tmp_path / "views", "--size", "32"]
    assert cli.main(["views", one, *options, "--n", "1"]) == 0
    for folder, *change in ((two, "--n", "1"), (one, "--n", "2"), (one, "--n", "1", "--seed", "1")):
        capsys.readouterr()
        assert cli.main(["views", folder, *options, *change]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "give the folders different names" in error
    assert cli.main(["views", one, *options, "--n", "1"]) == 0
    assert cli.main(["views", one, "--out", one.parent, "--n", "1"]) == 2 and not (one / "views.json").exists()
    np.savez(tmp_path / "features.npz", names=["images/000.png/whole.png"], features=np.ones((1, 2)))
    with pytest.raises(ValueError, match="both folders are called 'images'"):
        api.plan_outputs(tmp_path / "features.npz", one, two, size=32)


@pytest.mark.parametrize("damage", ["empty", "truncated", "long", "array", "number"])
def test_damaged_outputs_are_one_line(tmp_path, damage):
    path = tmp_path / ("outputs.csv" if damage == "long" else "outputs.npz")
    np.savez(tmp_path / "outputs.npz", names=["a"] if damage != "number" else 7, features=np.ones((3, 2)))
    if damage in ("empty", "truncated"):
        path.write_bytes(path.read_bytes()[: 200 * (damage == "truncated")])
    elif damage == "long":
        path.write_text("a," + "1" * 200_000 + "\n")
    elif damage == "array":
        np.save(path.open("wb"), np.ones(3))
    with pytest.raises(ValueError, match=r"^outputs\.(npz|csv)( can't be read|: expected one vector)") as error:
        api.read_outputs(path)
    assert "\n" not in str(error.value)


def test_canaries_rank_the_published_twin_and_the_p_value_is_exact(pool, tmp_path):
    folder = write(tmp_path / "images", pool.images[:12])
    out = tmp_path / "canaries"
    assert cli.main(["canaries", "make", str(folder), "-k", "20", "--out", str(out)]) == 0
    published = sorted((out / "publish").iterdir())
    assert len(published) == 12 and (out / "commitment.txt").read_text().strip()
    seen = np.stack([np.asarray(Image.open(f)).astype(np.float32) / 255 for f in published])

    def leaks(images):
        return -np.abs(images[:, None] / 255.0 - seen[None]).mean((2, 3, 4)).min(1)

    found = canaries.rank(leaks, out)
    assert found.p < 1e-6 and found.n == 12
    rng = np.random.default_rng(0)
    ps = [canaries.rank(lambda images: rng.normal(size=len(images)), out).p for _ in range(15)]
    assert 0.2 < np.mean(ps) < 0.8
    (out / "secret.json").write_text((out / "secret.json").read_text().replace('"k": 20', '"k": 21'))
    with pytest.raises(ValueError, match="commitment"):
        canaries.rank(lambda images: images[:, 0, 0, 0], out)

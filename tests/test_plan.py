"""The estimates: counted steps are those known from the papers, the printed rule by hand, and the plan complete."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from mia_utils import pretrain
from mia_utils.runner import choices, estimates, parameters, profiles, run
from mia_utils.runner.plan import make_plan
from mia_utils.runner.profiles import Profile


@pytest.mark.parametrize(
    ("method", "arch", "augmentation", "gflop"),
    [("mae", "vit_small_patch8_32", "crop", 0.651), ("simclr", "resnet18_32", "simclr", 6.661)]
    + [("pspnet", "resnet50", "crop-weak", 2.228), ("supervised", "vit_nano_patch8_32", "flip", 0.01134)],
)
def test_a_step_is_counted_per_image(method, arch, augmentation, gflop):
    found, batch_size = estimates.count_step(method, arch, augmentation)
    assert found == pytest.approx(gflop, rel=0.1)  # libraries change
    assert batch_size == pretrain.METHODS[method][1]["batch_size"]


def make_profile(row: str, *, tflops: float | None = 50.0, size: str = "32") -> Profile:
    key = "" if tflops is None else f"gpu_tflops: {tflops}"
    row = f"id: a, role: target, dataset: cifar10, {row}"
    data = f"cifar10: {{size: {size}}}"
    return profiles.parse(f"name: p\n{key}\ndatasets: {{{data}}}\nmodels:\n  - {{{row}}}\n", source="p.yaml")


SMALL = "method: mae, arch: vit_nano_patch8_32, n_train: 10000, epochs: 100"


def test_hours_follow_the_printed_rule():
    def seconds(text: str, **options) -> float:
        profile = make_profile(text, **options)
        return estimates.estimate_gpu_seconds(profile.row("a"), profile)

    gflop, _ = estimates.count_step("mae", "vit_nano_patch8_32", "none")
    mixed = f"{SMALL}, options: {{batch_size: 1000, precision: bf16-mixed}}"
    full = f"{SMALL}, options: {{batch_size: 1000}}"
    assert seconds(mixed) == pytest.approx(1000 * 0.02 + 1e6 * gflop * 1e9 / 50e12)  # 10 steps of 100 epochs
    assert seconds(mixed.replace("epochs: 100", "epochs: 200")) == pytest.approx(2 * seconds(mixed))
    assert seconds(full) - 20 == pytest.approx(8 * (seconds(mixed) - 20))
    assert seconds(mixed, tflops=100.0) - 20 == pytest.approx((seconds(mixed) - 20) / 2)
    assert seconds(mixed.replace("batch_size: 1000", "mask_ratio: 0.5, batch_size: 1000")) > seconds(mixed)
    private = f"{SMALL}, defense: dp-sgd, options: {{batch_size: 1000, privacy: {{epsilon: 8.0}}}}"
    assert seconds(private) == pytest.approx(estimates.PRIVATE_COST["mae"] * seconds(full))
    wide = "method: unet, arch: mobilenet_v2, n_train: 100, epochs: 1, options: {precision: bf16-mixed}"
    steps = 12 * 0.02
    narrow = seconds(wide, size="[64, 128]") - steps
    assert seconds(wide, size="[128, 256]") - steps == pytest.approx(4 * narrow)
    # on a CPU thread
    cpu = make_profile(full, tflops=None)
    steps = estimates.estimate_seconds(cpu.row("a"), cpu) - estimates.ROW_SECONDS
    assert steps == pytest.approx(1e6 / estimates.IMAGES_PER_SECOND["mae vit_nano_patch8_32"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("precision: bf16", "options: precision: expected '32-true', 'bf16-mixed' or '16-mixed', got 'bf16'"),
        (
            "precision: bf16-mixed, privacy: {epsilon: 8.0, delta: 1.0e-5, max_grad_norm: 1.0}",
            "options: precision: private training needs 32-true, got 'bf16-mixed'",
        ),
    ],
)
def test_a_precision_that_can_not_be_is_one_line(options, said):
    defense = ", defense: dp-sgd" if "privacy" in options else ""
    with pytest.raises(ValueError) as error:
        make_profile(f"{SMALL}{defense}, options: {{{options}}}")
    assert str(error.value) == f"p.yaml: models: a: {said}"
    with pytest.raises(ValueError, match="gpu_tflops: expected greater than 0, got 0"):
        make_profile(SMALL, tflops=0)


def test_paper_is_mixed_wherever_it_is_not_private():
    for row in profiles.load("paper").models:
        expected = None if row.defense == "dp-sgd" else "bf16-mixed"
        assert row.options.get("precision") == expected, row.id


def test_the_plan_of_paper_tells_the_hours_of_models_and_notebooks(home, capsys, monkeypatch):
    monkeypatch.setattr(estimates, "count_step", lambda *_, **__: (1.0, 64))  # counted above
    assert run.main(["paper", "--plan"]) == 0
    assert not list(home.rglob("*"))
    printed, paper = capsys.readouterr().out, profiles.load("paper")
    lines, hours = printed.splitlines(), 0.0
    for row in paper.models:
        line = next(line for line in lines if line.startswith(row.id + " "))
        found = re.fullmatch(rf"{row.id}\s+(to train|skipped)\s+(\d+\.\d)", line)
        hours += float(found[2]) * (found[1] == "to train")
    for notebook in parameters.find_notebooks():
        assert any(re.fullmatch(rf"{notebook}\s+to run\s+\d+\.\d", line) for line in lines), notebook
    found = re.search(
        r"(\d+) models to train, [\d.]+ GB, ([\d.]+) GPU hours; an estimate: 100 TFLOP/s in bfloat16", printed
    )
    assert float(found[2]) == pytest.approx(hours, abs=0.05 * int(found[1]) + 0.05)  # every line is rounded
    assert "skipped: tiny_imagenet, no folder" in printed and "(3 models)" in printed


def test_the_models_of_a_missing_data_set_leave_the_lists_of_the_notebooks(home):
    given = make_plan("paper").notebooks["03_partcrop"][1]["probe_model_ids"]
    assert given == ["mae-target-s0", "dino-target-s0", "moco-target-s0"]
    (home / "data/raw/tiny-imagenet-200").mkdir(parents=True)
    plan = make_plan("paper")
    assert "mae-tiny-target-s0" in plan.notebooks["03_partcrop"][1]["probe_model_ids"]
    assert {"mae-tiny-target-s0", "dino-tiny-target-s0", "moco-tiny-target-s0"} <= {row.id for row in plan.missing}


@pytest.mark.parametrize("name", ["smoke", "quick", "photos"])
def test_a_profile_can_be_planned_where_nothing_is_trained(home, name):
    absent = {row.id for row in profiles.load(name).models} - {row.id for row in make_plan(name).missing}
    assert all("tiny" in row for row in absent)  # no folder of Tiny-ImageNet here


SMALLER = {"vit_small_patch8_32": "vit_nano_patch8_32", "vit_small_patch8_64": "vit_nano_patch8_32"}
SMALLER |= {"resnet18_32": "resnet_thin_32", "resnet50": "resnet18"}
KINDS = {(row.method, row.arch): row for row in profiles.load("paper").models if row.defense == "none"}


@pytest.mark.parametrize("row", KINDS.values(), ids=lambda row: row.id)
def test_every_kind_of_row_of_paper_trains_with_its_options_in_its_precision(row):
    rng, segments = np.random.default_rng(0), row.method in choices.SEGMENTERS
    n = 2 if segments else 8
    images = rng.integers(0, 256, (n, *((64, 64) if segments else (32, 32)), 3), dtype=np.uint8)
    labels = rng.integers(0, 3, (n, 64, 64), dtype=np.uint8) if segments else None
    options = dict(row.options) | ({"queue_size": 4} if "queue_size" in row.options else {})
    call = dict(arch=SMALLER[row.arch], epochs=1, augmentation=row.augmentation, labels=labels, progress=False)
    made = pretrain.fit(row.method, images, **call, **(options | {"checkpoints": []}))
    assert np.isfinite(made.history.loss_members).all()
    assert all(w.dtype != torch.bfloat16 and w.isfinite().all() for w in made.states[1].values())  # stored in full

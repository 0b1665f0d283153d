"""The estimate for GPUs: its table is counted again, its rules are checked by hand, and what it prints is complete."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mia_utils import paths, pretrain
from mia_utils.runner import profiles, run
from mia_utils.runner.profiles import GPU_COST, Profile

SIZES = {method: (64, 128) for method in profiles.SEGMENTERS}
AUGMENTATIONS = {"mae": "crop", "simmim": "crop", "dino": "dino", **dict.fromkeys(profiles.SEGMENTERS, "crop-weak")}


def count_cost(method: str, arch: str, *, batch: int = 2, **options) -> profiles.Cost:
    """Count one training step on a CPU; the same numbers per image whatever the batch."""
    segments = method in profiles.SEGMENTERS
    model = pretrain.build(method, arch, seed=0, **options, **({"n_classes": 19} if segments else {})).train()
    size = SIZES.get(method, (model.input_size,) * 2)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 3, *size), dtype=np.uint8))
    extra = {"labels": torch.zeros(batch, *size, dtype=torch.long)} if segments else {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # views of one storage are kept once
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    call = dict(augmentation=AUGMENTATIONS.get(method, "simclr"), rng=np.random.default_rng(0), progress=0.5)
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model.loss(images, size=None if segments else model.input_size, **call, **extra)
        megabytes = sum(kept.values()) / 1e6
        loss.backward()
    numbers = [counter.get_total_flops() / 1e9 / batch, megabytes / batch]
    numbers += [sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6]
    return profiles.Cost(*numbers, sum(t.numel() for t in (*model.parameters(), *model.buffers())) / 1e6)


@pytest.mark.parametrize(("method", "arch"), GPU_COST, ids=["-".join(key) for key in GPU_COST])
def test_the_table_is_what_a_step_costs(method, arch):
    found, said = count_cost(method, arch), GPU_COST[method, arch]
    assert found.gflop == pytest.approx(said.gflop, rel=0.1)
    assert found.megabytes == pytest.approx(said.megabytes, rel=0.15)  # libraries keep more or less as they change
    assert (found.trained, found.held) == pytest.approx((said.trained, said.held), rel=0.03)


def test_every_row_of_paper_has_an_estimate_and_the_defaults_are_those_of_the_methods():
    paper = profiles.load("paper")
    assert {(row.method, row.arch) for row in paper.models} <= set(GPU_COST)
    for method, (_, defaults) in pretrain.METHODS.items():
        own = profiles.SEGMENTER_BATCH_SIZE if method in profiles.SEGMENTERS else profiles.BATCH_SIZE
        assert defaults["batch_size"] == own, method
    from mia_utils.pretrain import loop, privacy

    assert profiles.PRIVATE_CHUNK_BYTES == privacy.GPU_CHUNK_BYTES
    assert profiles.PRECISIONS == loop.PRECISIONS


def make_profile(row: str, *, tflops: float | None = 50.0, datasets: str = "cifar10: {}") -> Profile:
    key = "" if tflops is None else f"gpu_tflops: {tflops}"
    row = f"id: a, role: target, dataset: cifar10, {row}"
    return profiles.parse(f"name: p\n{key}\ndatasets: {{{datasets}}}\nmodels:\n  - {{{row}}}\n", source="p.yaml")


SMALL = "method: mae, arch: vit_small_patch8_32, n_train: 10000, epochs: 100"


def test_hours_and_memory_follow_the_printed_rule():
    profile = make_profile(f"{SMALL}, options: {{batch_size: 1000, precision: bf16-mixed}}")
    row = profile.row("a")
    by_hand = 1000 * 0.02 + 1e6 * 0.651e9 / 50e12  # 10 steps of 100 epochs; a million images
    assert profiles.estimate_seconds(row, profile) == pytest.approx(by_hand)
    by_hand = 21.5e6 * (4 + 14) + 1000 * 1.62e6 * 0.55 + 10_000 * 32 * 32 * 3 + 0.7e9
    assert profiles.estimate_gpu_bytes(row, profile) == pytest.approx(by_hand)
    assert profiles.estimate_bytes(row) == pytest.approx(21.5e6 * 4 * 8)


def test_twice_the_epochs_cost_twice_and_float32_eight_times_the_arithmetic():
    def seconds(row: str, **options) -> float:
        profile = make_profile(row, **options)
        return profiles.estimate_seconds(profile.row("a"), profile)

    mixed = f"{SMALL}, options: {{batch_size: 1000, precision: bf16-mixed}}"
    full = f"{SMALL}, options: {{batch_size: 1000}}"
    assert seconds(mixed.replace("epochs: 100", "epochs: 200")) == pytest.approx(2 * seconds(mixed))
    assert seconds(full) - 20 == pytest.approx(8 * (seconds(mixed) - 20))
    assert seconds(mixed, tflops=100.0) - 20 == pytest.approx((seconds(mixed) - 20) / 2)
    assert seconds(mixed.replace("batch_size: 1000", "mask_ratio: 0.5, batch_size: 1000")) - 20 == pytest.approx(
        2 * (seconds(mixed) - 20)
    )
    # without the key, and at any size of a GPU, the estimate is the one for a CPU thread as before
    assert seconds(full, tflops=None) == 10_000 * 100 * 20 / profiles.IMAGES_PER_SECOND["mae"]


def test_a_segmenter_costs_by_its_pixels_and_a_private_step_by_its_parts():
    unlike = "method: upernet, arch: resnet50, n_train: 100, epochs: 1, options: {precision: bf16-mixed}"
    costs = []
    for size in ("[64, 128]", "[128, 256]"):
        profile = make_profile(unlike, datasets=f"cifar10: {{size: {size}}}")
        costs.append(profiles.estimate_seconds(profile.row("a"), profile) - 12 * 0.02)
    assert costs[1] == pytest.approx(4 * costs[0])
    private = "privacy: {epsilon: 8.0, delta: 1.0e-5, max_grad_norm: 1.0}"
    profile = make_profile(f"{SMALL}, defense: dp-sgd, options: {{batch_size: 1000, {private}}}")
    parts = -(-1000 // int(profiles.PRIVATE_CHUNK_BYTES / (4 * 21.5e6)))
    arithmetic = 1e6 * 0.651e9 * profiles.PRIVATE_COST["mae"] / (50e12 / 8)
    assert profiles.estimate_seconds(profile.row("a"), profile) == pytest.approx(1000 * parts * 0.02 + arithmetic)


def test_data_sets_are_counted_at_the_size_they_are_loaded_with():
    datasets = 'cifar10: {}, cityscapes: {size: [512, 1024]}, scenes: {n: 10}, "folder:x": {size: 224, stream: true}'
    profile = make_profile(SMALL, datasets=datasets)
    sizes = {name: profiles.estimate_data_bytes(profile, name) for name in profile.datasets}
    assert sizes == {"cifar10": 60_000 * 3072, "cityscapes": 3475 * 512 * 1024 * 4, "scenes": 0, "folder:x": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("precision: bf16", "options: precision: expected one of 32-true, bf16-mixed, 16-mixed, got 'bf16'"),
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


def test_the_plan_of_paper_tells_hours_memory_and_disk_of_models_and_notebooks_without_torch(home):
    code = "import sys; from mia_utils.runner import run; run.main(['paper', '--plan']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.PACKAGE_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(home.rglob("*"))
    lines, paper = done.stdout.splitlines(), profiles.load("paper")
    number = r"\s+(\d+\.\d+)"
    for row in paper.models:
        line = next(line for line in lines if line.startswith(row.id + " "))
        assert re.fullmatch(rf"{row.id}\s+(to train|skipped){number * 3}", line), line
    for notebook in profiles.find_notebooks():
        line = next(line for line in lines if line.startswith(notebook))
        assert re.fullmatch(rf"{notebook}\s+\d+\s+\d+{number * 5}", line), line
    total = next(line for line in lines if " to train: " in line)
    shown = [line for line in lines if " to train " in line and "GPU hours" not in line]
    hours = sum(float(line.split()[3]) for line in shown)
    found = re.match(r"(\d+) models to train: ([\d.]+) GPU hours, and [\d.]+ of the notebooks; at most", total)
    assert int(found[1]) == len(shown)
    assert float(found[2]) == pytest.approx(hours, abs=0.05 * len(shown) + 0.05)  # every line is rounded
    assert "estimate, not measured. Hours: 100 TFLOP/s in bfloat16 and 12.5 in float32" in done.stdout
    assert "paper.yaml: gpu_tflops) for the arithmetic, and 20 ms a step" in done.stdout
    assert "skipped: tiny_imagenet, no folder" in done.stdout and "(3 models)" in done.stdout


def test_a_model_without_an_estimate_gets_a_question_mark_and_no_say_in_the_sums(home, capsys):
    (home / "profiles").mkdir()
    (home / "notebooks").mkdir()
    rows = f"  - {{id: a, role: target, dataset: scenes, {SMALL}}}\n"
    rows += f"  - {{id: b, role: target, dataset: scenes, {SMALL.replace('vit_small_patch8_32', 'vit_giant')}}}\n"
    text = f"name: mine\ngpu_tflops: 50\ndatasets: {{scenes: {{n: 40000}}}}\nmodels:\n{rows}"
    (home / "profiles/mine.yaml").write_text(text)
    assert run.main(["mine", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("b ")).split()[3:5] == ["?", "?"]
    assert any(line.startswith("2 models to train: 0.1 GPU hours, and 0.0 of the notebooks") for line in lines)


def test_the_models_of_a_missing_data_set_leave_the_lists_of_the_notebooks(home):
    given = run.make_plan("paper").notebooks["03_partcrop"][1]["epoch_model_ids"]
    assert given == ["mae-target-s0", "dino-target-s0", "moco-target-s0"]
    (home / "data/raw/tiny-imagenet-200").mkdir(parents=True)
    plan = run.make_plan("paper")
    assert "mae-tiny-target-s0" in plan.notebooks["03_partcrop"][1]["epoch_model_ids"]
    assert {"mae-tiny-target-s0", "dino-tiny-target-s0", "moco-tiny-target-s0"} <= {row.id for row in plan.missing}


SMALLER = {"vit_small_patch8_32": "vit_nano_patch8_32", "vit_small_patch8_64": "vit_nano_patch8_32"}
SMALLER |= {"resnet18_32": "resnet_thin_32", "resnet50": "resnet18"}
KINDS = {(row.method, row.arch): row for row in profiles.load("paper").models if row.defense == "none"}


@pytest.mark.parametrize("row", KINDS.values(), ids=lambda row: row.id)
def test_every_kind_of_row_of_paper_trains_with_its_options_in_its_precision(row):
    rng, n = np.random.default_rng(0), 8
    segments = row.method in profiles.SEGMENTERS
    images = rng.integers(0, 256, (n, *((64, 64) if segments else (32, 32)), 3), dtype=np.uint8)
    labels = rng.integers(0, 3, (n, 64, 64), dtype=np.uint8) if segments else None
    options = dict(row.options) | ({"queue_size": 4} if "queue_size" in row.options else {})
    call = dict(arch=SMALLER[row.arch], epochs=1, augmentation=row.augmentation, labels=labels, progress=False)
    made = pretrain.fit(row.method, images, **call, **(options | {"checkpoints": []}))
    assert np.isfinite(made.history.loss_members).all()
    assert all(w.dtype != torch.bfloat16 and w.isfinite().all() for w in made.states[1].values())  # stored in full

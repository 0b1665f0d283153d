"""Profiles: what they say, and every mistake in them as one line before anything runs."""

from __future__ import annotations

import inspect
import json
import runpy
import time
from pathlib import Path

import pytest

from mia_utils.runner import choices, estimates, parameters, profiles

ROW = "{id: a, role: target, method: mae, arch: vit_nano_patch8_32, dataset: scenes, n_train: 32, epochs: 2}"
GOOD = f"""
name: mine
first: a
datasets: {{scenes: {{size: 32, n: 400}}}}
split: {{n_nonmembers: 120}}
models:
  - {ROW}
"""


def write_notebook(path: Path, parameters: str, *cells: str) -> Path:
    """Write a notebook with a tagged cell and more code cells, each under a heading of its own."""
    tagged = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": parameters}
    contents = [{"cell_type": "markdown", "metadata": {}, "source": f"# {path.stem}"}, tagged]
    for index, source in enumerate(cells, 1):
        contents.append({"cell_type": "markdown", "metadata": {}, "source": f"## Part {index}\nwords"})
        contents.append({"cell_type": "code", "metadata": {}, "source": source})
    for index, cell in enumerate(contents):
        cell["id"] = f"cell-{index}"
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": contents, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.mark.parametrize("name", ["smoke", "quick", "photos", "paper"])
def test_the_four_profiles_load_and_their_first_row_exists(name):
    profile = profiles.load(name)
    assert profile.name == name
    assert profile.row(profile.first).role == "target"
    assert len({row.id for row in profile.models}) == len(profile.models)


@pytest.mark.parametrize("name", ["smoke", "quick", "photos", "paper"])
def test_every_shadow_has_a_target_that_shares_its_split(name):
    models = profiles.load(name).models
    targets = [row for row in models if row.role == "target"]
    for row in models:
        if row.role == "shadow":  # one of another data set brings a split of its own
            same = [t for t in targets if t.dataset == row.dataset] or targets
            assert (row.n_train, row.seed) in {(t.n_train, t.seed) for t in same}, row.id


def test_quick_stays_in_its_budget():
    """At most 40 rows of about 100 s each, nothing to download."""
    quick = profiles.load("quick")
    assert len(quick.models) <= 40
    assert max(estimates.estimate_seconds(row, quick) for row in quick.models) <= 130
    assert all(name.startswith("scenes") for name in quick.datasets)


def test_smoke_serves_every_study_of_quick():
    smoke, quick, photos = map(profiles.load, ("smoke", "quick", "photos"))
    assert {row.id for row in smoke.models} <= {row.id for row in quick.models + photos.models}
    for study in {row.study for row in quick.models}:
        assert any(row.study == study for row in smoke.models), study


@pytest.mark.parametrize("method", ["mae", "dino", "simclr"])
def test_photos_repeats_its_main_rows_with_three_seeds_and_nothing_else_changed(method):
    photos = profiles.load("photos")
    assert photos.seeds == [0, 1, 2]
    targets = [photos.row(f"{method}-target-s{seed}") for seed in photos.seeds]
    assert [row.seed for row in targets] == photos.seeds
    assert len({(row.n_train, row.epochs, row.augmentation, str(row.options)) for row in targets}) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("n_train: 32", "n_trian: 32"), "profiles/mine.yaml: models: a: key 'n_train' is missing"),
        (("epochs: 2", "epochs: 2, epoch: 3"), "models: a: unknown key 'epoch' (did you mean 'epochs'?)"),
        (("epochs: 2", "epochs: many"), "models: a: epochs: expected a valid integer, got 'many'"),
        (("epochs: 2", "epochs: '2'"), "models: a: epochs: expected a valid integer, got '2'"),
        (("epochs: 2", "epochs: 0"), "models: a: epochs: expected greater than 0, got 0"),
        (("epochs: 2", "epochs: 2, epochs: 3"), "line 7 key 'epochs' is given twice"),
        (("method: mae", "method: mea"), "models: a: method: expected 'mae', 'simmim', 'dino', "),
        (("epochs: 2", "epochs: 2, augmentation: crop:1-2"), "models: a: augmentation: expected one of none, flip"),
        (("first: a", "first: b"), "first: no model has the id 'b'"),
        (("first: a", "sedes: [1]"), "profiles/mine.yaml: unknown key 'sedes' (did you mean 'seeds'?)"),
        (("first: a", "seeds: 1"), "seeds: expected a valid list, got 1"),
        (("dataset: scenes", "dataset: cifar10"), "a: dataset: expected one of datasets: (scenes), got 'cifar10'"),
        (("n: 400", "n: 100"), "n: model a needs 184 images (members, non-members and their shadow's), got 100"),
        (("name: mine", "name: other"), "name: expected 'mine' (the file's name), got 'other'"),
        (("first: a", "needs: {00_x: {ids: [a]}}"), "needs: 00_x: ids: expected 'id', 'role'"),
        (("first: a", "first: [a"), "profiles/mine.yaml: line"),
        (("first: a", "[1, 2]: a"), "line 3 a key must be text or a number"),
        (("first: a", "first: &x a\nthreads: *x"), "line 4 aliases (*) are refused: use defaults:"),
        (("name: mine", "name: &a [x, x]"), "name: expected a valid string, got ['x', 'x']"),
        (("first: a", "seeds: " + "[" * 3000 + "]" * 3000), "expected at most a few levels of nesting"),
        (("epochs: 2", "epochs: 1" + "0" * 400), "a: epochs: expected less than 9223372036854775808, got 1000"),
        (("epochs: 2", "epochs: 1" + "0" * 5000), "profiles/mine.yaml: Exceeds the limit (4300 digits)"),
        (("epochs: 2", "epochs: 2, options: {lr: .nan}"), "a: options: lr: expected a finite number, got nan"),
        (("epochs: 2", "epochs: 2, options: {lr: .inf}"), "a: options: lr: expected a finite number, got inf"),
        (("epochs: 2", "epochs: 2, options: {lr: -1.0}"), "models: a: options: lr: expected greater than 0, got -1.0"),
        (("epochs: 2", "epochs: 2, options: {batch_size: 0}"), "options: batch_size: expected greater than 0, got 0"),
        (("epochs: 2", "epochs: 2, options: {mask_ratio: 2}"), "options: mask_ratio: expected less than 1, got 2"),
        (("epochs: 2", "epochs: 2, options: {mask_ration: .5}"), "no 'mask_ration' (did you mean 'mask_ratio'?)"),
        (("epochs: 2", "epochs: 2, options: {queue_size: 8}"), "models: a: options: mae takes no 'queue_size'"),
        (("epochs: 2", "epochs: 2, options: {checkpoints: [1, 9]}"), "checkpoints: expected epochs up to 2, got 9"),
        (("epochs: 2", "epochs: 2, defense: dp-sgd, options: {privacy: {epsilon: .inf}}"), "finite number, got inf"),
        (("epochs: 2", "epochs: 010"), "models: a: epochs: expected a valid integer, got '010'"),
        (("epochs: 2", "epochs: 1:30"), "models: a: epochs: expected a valid integer, got '1:30'"),
        (("first: a", "seeds: [0, 0]"), "profiles/mine.yaml: seeds: expected different ones, got [0, 0]"),
        (("first: a", "gpu_tflops: .inf"), "gpu_tflops: expected a finite number, got inf"),
        (("first: a", "needs: {00_x: {study: [mian]}}"), "needs: 00_x: no model has the study 'mian'"),
        (("first: a", "first: " + "a" * 1_000_001), "expected at most 1,000,000 characters, got 1,0"),
        (("size: 32", "size: [32, 64]"), "datasets: scenes: size: expected a number from 16 to 512, got [32, 64]"),
        (("n: 400", "n: 400, stream: true"), "datasets: scenes: stream: goes with folder:PATH"),
        (("n: 400", "n: 1000000000000"), "datasets: scenes: n: expected less than or equal to 100000000, got 1000"),
        (("epochs: 2", "epochs: 2, options: {std: [0.0, 1.0, 1.0]}"), "options: std: 0: expected greater than 0, got"),
        (("epochs: 2", "epochs: 2, options: {mean: [0.5]}"), "options: mean: expected List should have at least 3"),
        (("epochs: 2", "epochs: 2, options: {decoder_dim: 7}"), "a multiple of 4 and of decoder_heads (4), got 7"),
        (("epochs: 2", "epochs: 2, options: {decoder_heads: 3}"), "4 and of decoder_heads (3), got 64"),
        (("method: mae", "method: moco-v2"), "models: a: options: queue_size: expected up to half of n_train, got 64"),
        (("method: mae, arch: vit_nano_patch8_32", "method: moco-v2, arch: resnet_thin_32, options: {bn_splits: 5}"),
         "models: a: options: bn_splits: expected a divisor of the batch (32 images), got 5"),
        (("method: mae", "method: moco, options: {batch_size: 1}"), "compares the images of a batch, expected at least"),
        (("method: mae, arch: vit_nano_patch8_32", "method: unet, arch: mobilenet_v2, augmentation: simclr"),
         "models: a: augmentation: expected none, flip, or a crop for unet, got 'simclr'"),
        (("method: mae, arch: vit_nano_patch8_32",
          "method: unet, arch: mobilenet_v2, options: {mixup: 0.4, distill: 2.0}"),
         "models: a: options: expected one of privacy, mixup, distill, minmax, got mixup and distill"),
        ((", n: 400}}\nsplit: {n_nonmembers: 120}", "}}\nsplit: {n_nonmembers: 3000}"), "needs 3064 images"),
        (("epochs: 2", "epochs: 2, options: {input_size: 10000}"), "input_size: expected less than or equal to 1024"),
        (("method: mae, arch: vit_nano_patch8_32", "method: mae, arch: resnet18"), "arch: mae does not fit resnet18"),
        (("method: mae", "method: unet"), "models: a: arch: unet does not fit vit_nano_patch8_32"),
        (("method: mae, arch: vit_nano_patch8_32", "method: unet, arch: resnet18, options: {encoder_depth: 9}"),
         "models: a: options: encoder_depth: expected less than or equal to 5, got 9"),
        (("n: 400", "n: many"), "datasets: scenes: n: expected a valid integer, got 'many'"),
        (("n: 400", "m: 400"), "datasets: scenes: unknown key 'm' (known: size, n, seed, stream)"),
        (("size: 32", "size: [32]"), "size: expected a number of pixels or [height, width], got [32]"),
        (("n_nonmembers: 120", "n_nonmembers: -1"), "split: n_nonmembers: expected greater than 0, got -1"),
        (("n_nonmembers: 120", "n_nonmember: 1"), "split: unknown key 'n_nonmember' (did you mean 'n_nonmembers'?)"),
        (("first: a", "splits: {scene: {n_nonmembers: 3}}"), "unknown data set 'scene' (did you mean 'scenes'?)"),
        (("first: a", "defaults: {epoch: 3}"), "models: a: unknown key 'epoch' (did you mean 'epochs'?)"),
        (("first: a", "defaults: {mae: {mae: 3}}"), "models: a: unknown key 'mae'"),
        (("first: a", "defaults: 3"), "defaults: expected fields of rows, got 3"),
        (("epochs: 2}", "epochs: 2, seeds: 0}"), "models: a: seeds: expected 1 to 1000 trainings, got 0"),
        (("epochs: 2}", "epochs: 2, seeds: [0, 1]}"), "models: a: seeds: expected 1 to 1000 trainings, got [0, 1]"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_file_section_and_key(change, said):
    assert profiles.parse(GOOD, source="profiles/mine.yaml", name="mine").row("a").epochs == 2
    with pytest.raises(ValueError) as error:
        profiles.parse(GOOD.replace(*change), source="profiles/mine.yaml", name="mine")
    assert said in str(error.value)
    assert str(error.value).startswith("profiles/mine.yaml:")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [("2}", "2, augmentation: 'crop:" + "1" * 150_000 + "'}"), ("2}\n", "2}\n" + f"  - {ROW}\n" * 1000)]
    + [("dataset: scenes", "dataset: " + "s" * 150_000), ("first: a", "seeds: " + "{a: " * 40_000 + "}" * 40_000)],
)
def test_a_long_profile_is_refused_at_once(change):
    began = time.process_time()
    with pytest.raises(ValueError, match="^p: ") as error:
        profiles.parse(GOOD.replace(*change), source="p", name="mine")
    assert len(str(error.value)) <= profiles.MOST_SAID and time.process_time() - began < 2


def test_two_rows_of_one_id_are_refused():
    with pytest.raises(ValueError, match="two rows have the id 'a'"):
        profiles.parse(GOOD + f"  - {ROW}\n", source="p", name="mine")


def test_rows_inherit_defaults_and_their_own_entries_win():
    text = GOOD.replace(
        "first: a", "defaults: {epochs: 5, arch: x, options: {lr: .1}, mae: {epochs: 4, options: {mask_ratio: .5}}}"
    )
    bare = "{id: b, role: shadow, method: mae, dataset: scenes, n_train: 32}"
    other = (
        bare.replace("id: b", "id: c").replace("mae", "dino")
        + "\n  - "
        + bare.replace("id: b", "id: d, epochs: 1, options: {}")
    )
    profile = profiles.parse(f"{text}  - {bare}\n  - {other}\n", source="p")
    found = {row.id: (row.arch, row.epochs, row.options) for row in profile.models}
    mask, lr = {"mask_ratio": 0.5}, {"lr": 0.1}
    assert found == {"a": ("vit_nano_patch8_32", 2, mask), "b": ("x", 4, mask), "c": ("x", 5, lr), "d": ("x", 1, {})}


def test_a_row_with_seeds_is_as_many_rows():
    text = GOOD.replace("id: a", "id: a, seeds: 3").replace("first: a", "first: a-s0")
    found = profiles.parse(text, source="p").models
    assert [(row.id, row.seed) for row in found] == [("a-s0", 0), ("a-s1", 1), ("a-s2", 2)]
    by_hand = [ROW.replace("id: a", f"id: a-s{seed}, seed: {seed}") for seed in range(3)]
    written = text.replace(f"  - {ROW.replace('id: a', 'id: a, seeds: 3')}", "\n".join(f"  - {r}" for r in by_hand))
    assert found == profiles.parse(written, source="p").models


def test_the_options_written_down_are_those_of_the_signatures():
    import segmentation_models_pytorch as smp

    from mia_utils import datasets, pretrain
    from mia_utils.models import segmenters
    from mia_utils.protocol import splits

    def names(function) -> set[str]:
        return set(inspect.signature(function).parameters)

    assert set(choices.FIT_OPTIONS) <= names(pretrain.fit)
    assert set(choices.METHODS) == set(pretrain.METHODS) == set(choices.METHOD_OPTIONS)
    for method, (cls, _) in pretrain.METHODS.items():
        own = set(choices.METHOD_OPTIONS[method]) - {"dropout", "drop_path", "input_size"}
        if method in choices.SEGMENTERS:
            trained = names(cls.__init__) - {"self", "backbone", "input_size", "n_classes", "teacher"} | {"norm"}
            network = names(getattr(smp, segmenters.ARCHS[method][0]).__init__)
            strange = {"self", "encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params"}
            assert own | {"dropout"} == trained | (network - strange - {"kwargs"}), method
        else:
            assert own == names(cls.__init__) - {"self", "backbone", "input_size", "n_classes"}, method
    # read afresh: opened checkpoints add structures of their own
    assert set(runpy.run_module("mia_utils.models.backbones")["ARCHS"]) <= set(choices.ARCHS)
    assert set(profiles.DataArguments.__annotations__) == names(datasets.load) - {"name", "root", "void"}
    assert set(profiles.SplitArguments.__annotations__) == names(splits.draw) - {"pool", "n_members", "seed"}


def test_scientific_notation_is_a_number():
    text = GOOD.replace("epochs: 2", "epochs: 2, options: {lr: 1e-3}")
    assert profiles.parse(text, source="p").row("a").options["lr"] == 0.001


def test_an_unknown_model_lists_close_matches():
    with pytest.raises(ValueError, match="no model 'mae-taget-s0'; close: mae-target-s0"):
        profiles.load("quick").row("mae-taget-s0")


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown profile 'qick': expected one of smoke, quick, photos, paper"):
        profiles.load("qick")


def test_notebook_00_waits_for_the_first_row_only():
    quick = profiles.load("quick")
    assert [row.id for row in quick.rows_needed("00_start_here")] == ["mae-target-s0"]
    assert {row.study for row in quick.rows_needed("03_partcrop")} == {"main", "data"}
    assert {row.study for row in quick.rows_needed("08_figures")} == {"main"}  # it waits for the notebooks themselves


def test_needs_selects_rows_by_their_fields():
    text = (Path(profiles.find_source("profiles")) / "quick.yaml").read_text()
    profile = profiles.parse(
        text.replace("03_partcrop: {", "03_partcrop: {method: [mae, dino], role: [shadow], "),
        source="p",
    )
    assert [row.id for row in profile.rows_needed("03_partcrop")] == ["mae-shadow-s0", "dino-shadow-s0"]


def test_parameters_are_read_with_comments_annotations_and_hashes_in_text(tmp_path):
    text = (
        'n = 3  # paper: 128\nlimit: int | None = None\ncolor = "#ff0000"\nscales = [[0.08, 0.2], [0.5, 1.0]]\nx = -1.5'
    )
    path = write_notebook(tmp_path / "00_a.ipynb", text)
    expected = {"n": 3, "limit": None, "color": "#ff0000", "scales": [[0.08, 0.2], [0.5, 1.0]], "x": -1.5}
    assert parameters.read_parameters(path) == expected


@pytest.mark.parametrize("line", ["n = 2 * 3", "n = len('a')", "import os", "a = b = 1 + c"])
def test_a_parameter_that_is_no_literal_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match="notebooks/00_a.ipynb: parameters: expected name = literal"):
        parameters.read_parameters(write_notebook(tmp_path / "00_a.ipynb", line))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("{n_crop: 8}", "unknown key 'n_crop' (did you mean 'n_crops'?)"),
        ("{n_crops: 8.5}", "n_crops: expected a value like 64, got 8.5"),
        ("{n_crops: true}", "n_crops: expected a value like 64, got True"),
        ("{n_crops: null}", "n_crops: expected a value like 64, got None"),
        ("{scale: wide}", "scale: expected a value like 0.5, got 'wide'"),
        ("{sizes: [8, a]}", "sizes: expected a value like [8, 16], got [8, 'a']"),
        ("{profile: photos}", "unknown key 'profile'"),
        ("{model_id: mae}", "model_id: profile mine has no model 'mae'"),
        ("{model_ids: [a, nope]}", "model_ids: profile mine has no model 'nope'"),
    ],
)
def test_a_wrong_override_names_notebook_and_key(overrides, said):
    defaults = {"profile": "quick", "n_crops": 64, "scale": 0.5, "sizes": [8, 16], "model_id": "a", "model_ids": ["a"]}
    profile = profiles.parse(GOOD + f"notebooks: {{03_x: {overrides}}}\n", source="p")
    with pytest.raises(ValueError) as error:
        parameters.merge_parameters(profile, "03_x", defaults)
    assert str(error.value).startswith("profiles/mine.yaml: notebooks: 03_x: ")
    assert said in str(error.value)


def test_overrides_replace_defaults_and_the_profile_is_named():
    profile = profiles.parse(GOOD + "notebooks: {03_x: {scale: 1, n: 7}}\n", source="p")
    merged = parameters.merge_parameters(profile, "03_x", {"profile": "quick", "scale": 0.5, "n": None})
    assert merged == {"profile": "mine", "scale": 1, "n": 7}


@pytest.mark.parametrize("name", ["smoke", "quick", "photos", "paper"])
def test_every_override_of_the_four_profiles_fits_its_notebook(name):
    found, profile = parameters.find_notebooks(), profiles.load(name)
    assert set(profile.notebooks) <= set(found)
    for notebook, path in found.items():
        parameters.merge_parameters(profile, notebook, parameters.read_parameters(path))


def test_the_defaults_written_in_the_notebooks_are_quick():
    quick = profiles.load("quick")
    for notebook, path in parameters.find_notebooks().items():
        defaults = parameters.read_parameters(path)
        assert parameters.merge_parameters(quick, notebook, defaults) == defaults

"""The lab: evaluations are computed once, found again, redone when what they rest on changed, and make one table."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mia_utils import calls, paths
from mia_utils import lab as labs
from mia_utils.attacks import mim
from mia_utils.runner import artifacts

PROFILE = """
name: tiny
first: mae-target-s0
datasets: {scenes: {size: 32, n: 260}}
split: {n_nonmembers: 100, n_shadow_nonmembers: 40}
defaults: {arch: vit_nano_patch8_32, dataset: scenes, n_train: 24, epochs: 4, method: mae}
models:
  - {id: mae-target-s0, role: target}
  - {id: mae-shadow-s0, role: shadow}
  - {id: simclr-shadow-s0, role: shadow, method: simclr, augmentation: simclr-weak, epochs: 2}
"""
FEW = dict(n_crops=4, epochs=2, study="main")  # epochs of the attacker


@pytest.fixture(scope="module")
def lab_home(tmp_path_factory):
    """A working folder with three trained models, made once."""
    folder = tmp_path_factory.mktemp("a lab")
    (folder / "profiles").mkdir()
    (folder / "profiles" / "tiny.yaml").write_text(PROFILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIA_HOME", str(folder))
        patch.delenv("MIA_DATA_DIR", raising=False)
        lab = labs.open("tiny")
        for row in lab.models():
            lab.model(row.id, train_missing=True)
    return folder


@pytest.fixture
def lab(lab_home, monkeypatch):
    monkeypatch.setenv("MIA_HOME", str(lab_home))
    monkeypatch.delenv("MIA_DATA_DIR", raising=False)
    for name in ("scores", "results"):
        shutil.rmtree(lab_home / "data" / name, ignore_errors=True)
    return labs.open("tiny")


def own(lab):
    return lab.results[lab.results["control"] == ""]


def score(lab, row=0):
    return lab.scores(own(lab).iloc[row])[0]


def test_an_evaluation_is_saved_without_pixels_and_found_by_another_lab(lab):
    table = lab.run("partcrop", "mae-target-s0", **FEW)
    (path,) = paths.get_scores_dir("tiny").glob("*.npz")
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].ndim <= 1 for name in file.files)
    written, first = path.stat().st_mtime_ns, score(lab).score
    other = labs.open("tiny")
    other.run("partcrop", "mae-target-s0", **FEW)
    assert path.stat().st_mtime_ns == written and np.array_equal(score(other).score, first)
    assert set(other.results["control"]) == {"", "no-model", "untrained", "permuted"}
    row = table.iloc[0]
    assert (row["target"], row["method"], row["n_train"], row["knowledge"]) == ("mae-target", "mae", 24, "partial")
    assert row["auc_low"] <= row["auc"] <= row["auc_high"] and row["verdict"] in ("shown", "not shown", "reversed")


def test_found_results_and_the_table_import_no_torch(lab):
    lab.run("lpla", "mae-target-s0", study="main")
    code = "import sys; from mia_utils import lab; l = lab.open('tiny'); l.run('lpla', 'mae-target-s0', study='main'); "
    code += "assert len(l.results) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lists_are_swept_and_the_first_setting_pays_for_the_controls(lab):
    table = lab.run("lpla", "mae-target-s0", p=[1.0, 2.0], checkpoint=[1, None], study="norms")
    assert sorted(zip(table["norm"], table["checkpoint"], strict=True)) == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert (lab.results["control"] == "untrained").sum() == 1
    noised = lab.target("mae-target-s0", defense="noise", strength=[0.0, 1.0])
    lab.run(["lpla", "encodermi-t"], noised, study="noise", controls=False)
    assert len(own(lab).query("study == 'noise'")) == 4


def test_one_evaluation_stands_in_every_study_that_uses_it_and_a_study_starts_anew(lab):
    lab.run("lpla", "mae-target-s0", study="main")
    lab.run("lpla", "mae-target-s0", study="other")
    assert len(list(paths.get_scores_dir("tiny").glob("*.npz"))) == 1 and set(own(lab)["study"]) == {"main", "other"}
    again = labs.open("tiny")  # the notebook runs again, with another setting
    again.run("lpla", "mae-target-s0", n_nonmembers=60, study="other")
    rows = own(again).query("study == 'other'")
    assert len(rows) == 1 and rows["n_nonmembers"].iloc[0] == 60 and rows["n_members"].iloc[0] == 24


def test_more_nonmembers_than_the_split_has_are_images_that_no_model_was_trained_on(lab, monkeypatch):
    monkeypatch.setattr(calls, "DECODER_IMAGES", 30)
    split, pool = lab.split("mae-target-s0"), lab.pool("scenes")
    used = [split.target_members, split.shadow_members, split.shadow_nonmembers, split.reference(30)]
    seen = set(pool.image_ids[np.concatenate(used)])
    found = []
    for n, expected in ((130, 130), (10_000, 100 + len(split.utility) - 30)):
        lab.run("lpla", "mae-target-s0", n_nonmembers=n, study="many")
        result = lab.scores(own(lab).iloc[-1])[0]
        found.append(set(result.image_ids[~result.is_member]))
        assert len(found[-1]) == expected and not found[-1] & seen
        assert set(pool.image_ids[split.target_nonmembers]) <= found[-1]
    assert found[0] <= found[1]


def test_controls_are_added_later(lab):
    lab.run("lpla", "mae-target-s0", controls=False, study="main")
    assert set(lab.results["control"]) == {""}
    lab.run("lpla", "mae-target-s0", study="main")
    assert len(lab.results) == 4


def test_scores_of_another_recipe_or_model_are_computed_again(lab, monkeypatch):
    lab.run("lpla", "mae-target-s0", study="main")
    old = own(lab)["key"].iloc[0]
    monkeypatch.setitem(artifacts.RECIPES, "scores", 99)
    again = labs.open("tiny")
    again.run("lpla", "mae-target-s0", study="main")
    assert list(own(again)["key"]) != [old]


def test_packed_results_are_the_same_table_and_the_same_bytes(lab):
    lab.run("lpla", "mae-target-s0", study="main")
    before, scores = lab.results, score(lab)
    archive = lab.store.pack()
    content = archive.read_bytes()
    assert lab.store.pack().read_bytes() == content
    shutil.rmtree(paths.get_scores_dir("tiny"))
    packed = labs.open("tiny")
    assert packed.results[list(before)].astype(str).equals(before.astype(str))
    assert np.array_equal(score(packed).score, scores.score)
    packed.run("lpla", "mae-target-s0", study="main")  # found in the archive
    assert not list(paths.get_scores_dir("tiny").glob("*.npz"))


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_a_damaged_score_file_gives_the_same_numbers_or_one_line(lab, how):
    lab.run("lpla", "mae-target-s0", study="main")
    want = own(lab)["auc"].iloc[0]
    (path,) = paths.get_scores_dir("tiny").glob("*.npz")
    whole = path.read_bytes()
    for place in (0.05, 0.3, 0.6, 0.95) if how != "empty" else (0,):
        content = bytearray(whole)
        at = int(len(content) * place)
        content[at] ^= 0xFF
        path.write_bytes({"flip": bytes(content), "cut": bytes(content[:at]), "empty": b""}[how])
        again = labs.open("tiny")
        again.run("lpla", "mae-target-s0", study="main")
        assert own(again)["auc"].iloc[0] == want, place
        try:
            assert score(again).auc == want, place
        except ValueError as error:  # named, never a wrong number
            assert "run its notebook again" in str(error)


def test_a_damaged_archive_is_one_line(lab):
    lab.run("lpla", "mae-target-s0", study="main")
    archive = lab.store.pack()
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"tiny\.npz is damaged"):
        labs.open("tiny").results  # noqa: B018


def test_shadow_knowledge_says_what_is_known(lab):
    cross = "simclr-shadow-s0"
    lab.run("partcrop", "mae-target-s0", knowledge="shadow", controls=False, **FEW)
    lab.run("partcrop", "mae-target-s0", shadow=cross, controls=False, **FEW)
    table = own(lab)
    assert list(table["knowledge"]) == ["shadow:PET", "shadow:PE-"]
    assert list(table["shadow_method"]) == ["mae", "simclr"] and table["n_members"].iloc[0] == 24


def test_target_and_shadow_share_the_split_and_nothing_else(lab):
    split = lab.split("mae-target-s0")
    assert lab.split("mae-shadow-s0").hash == split.hash
    assert not set(split.target_members) & set(split.shadow_members)
    first = [lab.model(n).encoder_at(0).module.blocks[0].mlp.fc1.weight for n in ("mae-target-s0", "mae-shadow-s0")]
    assert not np.array_equal(first[0].detach(), first[1].detach())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(study="../x"), "expected study to be a name"),
        (dict(targets=None), "expected model ids, rows of lab.models.. or targets"),
        (dict(targets=labs.Target("mae-target-s0", "early-stopping", 1.7)), "checkpoint to be a whole number"),
        (dict(n_nonmembers=-5), "n_nonmembers to be a whole number of at least 1, got -5"),
        (dict(n_nonmembers=2.5), "n_nonmembers to be a whole number of at least 1, got 2.5"),
        (dict(checkpoint=True), "checkpoint to be a whole number of at least 0, got True"),
        (dict(checkpoint=99), "no checkpoint of epoch 99"),
        (dict(shadow="mae-target-s0"), "expected a model with role shadow as shadow, got mae-target-s0, a target"),
        (dict(reference="mae-target-s0"), "reference model that never saw these images, got mae-target-s0"),
        (dict(knowledge=None), "expected knowledge 'partial'"),
        (dict(n_crops=0), "expected n_crops like 128 .at least 1., got 0"),
        (dict(n_crops=2.5), "expected n_crops like 128 .at least 1., got 2.5"),
        (dict(n_crops="4"), "expected n_crops like 128 .at least 1., got '4'"),
        (dict(n_crops=True), "expected n_crops like 128 .at least 1., got True"),
        (dict(crop_scale=0.1), "expected crop_scale like .0.08, 0.2., got 0.1"),
        (dict(lr="x"), "expected lr like 0.001, got 'x'"),
        (dict(epochs=float("nan")), "expected epochs like 100, got nan"),
        (dict(n_crop=3), "takes no parameter 'n_crop'"),
    ],
)
def test_a_wrong_setting_is_one_line(lab, given, said):
    given = {"targets": "mae-target-s0", "study": "main", "controls": False} | given
    with pytest.raises(ValueError, match=said) as error:
        lab.run("partcrop", given.pop("targets"), **given)
    assert "\n" not in str(error.value) and not list(paths.get_scores_dir("tiny").glob("partcrop*"))


def test_a_difference_is_that_of_two_rows_on_the_same_images(lab):
    lab.run("mim", "mae-target-s0", study="main", n_masks=[1, 2], controls=False)
    few, more = (row for _, row in own(lab).sort_values("n_masks").iterrows())
    got = lab.difference(more, few["key"])  # rows or their keys
    assert got.value == pytest.approx(more["auc"] - few["auc"]) and got.low <= got.value <= got.high
    assert lab.difference(few, few) == (0, 0, 0)
    with pytest.raises(ValueError, match="expected a row of lab.results, got DataFrame"):
        lab.difference(few, own(lab))


def test_what_is_missing_is_one_line(lab):
    with pytest.raises(ValueError, match="has no model 'mae-target'; close: mae-target-s0"):
        lab.run("partcrop", "mae-target", study="main")
    with pytest.raises(ValueError, match="unknown attack 'nothing'"):
        lab.run("nothing", "mae-target-s0", study="main")
    with pytest.raises(ValueError, match="takes no parameter 'n_crop'; allowed"):
        lab.run("partcrop", "mae-target-s0", n_crop=3, study="main")
    with pytest.raises(ValueError, match="models: unknown field 'metod': expected some of id, role"):
        lab.models(metod="mae")
    with pytest.raises(ValueError, match="expected a row of lab.results, got int"):
        lab.scores(3)
    with pytest.raises(ValueError, match="early-stopping needs a strength: the epoch"):
        lab.measure("mae-target-s0", defense="early-stopping")
    with pytest.raises(ValueError, match="early-stopping needs a strength: the epoch"):
        labs.Target("mae-target-s0", "early-stopping")
    with pytest.raises(ValueError, match="strength 3.0 belongs to a defense"):
        labs.Target("mae-target-s0", strength=3.0)


def test_defenses_of_the_output_early_stopping_and_the_static_attacker(lab):
    run = dict(controls=False, study="d")
    lab.run("lpla", "mae-target-s0", **run)
    lab.run("lpla", lab.target("mae-target-s0", defense="noise", strength=[0.0, 50.0]), **run)
    plain, same, noisy = (score(lab, i).score for i in range(3))
    assert np.array_equal(same, plain) and not np.array_equal(noisy, plain)
    table = own(lab)
    assert list(table["defense"]) == ["none", "noise", "noise"] and list(table["attacker"]) == [
        "static",
        "adaptive",
        "adaptive",
    ]
    assert table["utility"].iloc[0] == table["utility"].iloc[1] != table["utility"].iloc[2]
    epoch = lab.model("mae-target-s0").checkpoints[1]
    lab.run("lpla", lab.target("mae-target-s0", defense="early-stopping", strength=epoch), **run | {"study": "stop"})
    lab.run("lpla", "mae-target-s0", checkpoint=epoch, **run | {"study": "epoch"})
    stopped, chosen = (own(lab).query(f"study == '{s}'").iloc[0] for s in ("stop", "epoch"))
    assert stopped["auc"] == chosen["auc"] and stopped["checkpoint"] == epoch
    rounded = lab.target("mae-target-s0", defense="rounding", strength=0.5)
    both = lab.run("lpla", rounded, attacker=["adaptive", "static"], knowledge="shadow", **run | {"study": "s"})
    assert set(both["attacker"]) == {"adaptive", "static"}
    for message, attempt in (
        ("goes with a defense", dict(targets="mae-target-s0", attacker="static")),
        ("expected attacker 'adaptive' or 'static'", dict(targets=rounded, attacker="clever")),
        ("unknown output defense", dict(targets=lab.target("mae-target-s0", defense="hope", strength=1.0))),
    ):
        with pytest.raises(ValueError, match=message):
            lab.run("lpla", study="bad", **attempt)


def test_labs_side_by_side_compute_once_and_drop_nothing(lab):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(6) as threads:
        list(
            threads.map(
                lambda k: labs.open("tiny").run("lpla", "mae-target-s0", study=f"s{k}", controls=False), range(6)
            )
        )
    assert len(list(paths.get_scores_dir("tiny").glob("*.npz"))) == 1
    assert set(labs.open("tiny").results["study"]) == {f"s{k}" for k in range(6)}


def test_the_undefended_model_differs_by_the_defense_alone():
    lab = labs.open("photos")
    plain = {row.id: lab.undefended_of(row.id) for row in lab.models(study="defenses", role="target")}
    assert plain["mae-dp8-target-s0"] == "mae-plain-target-s0"  # not the one of another mask ratio
    for defended, other in plain.items():
        one, two = lab.profile.row(defended), lab.profile.row(other)
        keys = ("method", "arch", "epochs", "n_train", "seed")
        assert [getattr(one, k) for k in keys] == [getattr(two, k) for k in keys] and two.defense == "none"


def test_all_trainings_of_a_recipe_and_no_other():
    photos = labs.open("photos")
    assert [row.seed for row in photos.trainings("mae-target-s0")] == [0, 1, 2, 3, 4]
    # the student's row differs from it in an option alone
    assert [row.id for row in photos.trainings("dino-weak-target-s1")] == [f"dino-weak-target-s{i}" for i in range(3)]


def test_the_committed_results_of_photos_are_one_table():
    table = labs.open("photos").results
    facts = [c for c in table if c not in ("key", "split", "model_id", "place") and c not in _numbers()]
    assert not table[facts].astype(str).duplicated().any()
    assert (table["auc_low"] <= table["auc"]).all() and (table["auc"] <= table["auc_high"]).all()
    merged = table.query("study == 'main' and attack == 'partcrop' and target == 'mae-crop-target' and control == ''")
    assert merged["n_seeds"].tolist()[0] == 3 and len(merged) == 4  # the seeds stand below, under one row


def test_the_epoch_of_a_reference_is_part_of_the_key_and_its_split_is_that_of_the_target(lab, monkeypatch):
    target, who = calls.Target("mae-target-s0"), calls.Attacker(reference=["mae-shadow-s0"])
    keys = []
    for epoch in (None, 0, 2):
        aged = dataclasses.replace(who, reference_checkpoint=epoch)
        keys.append(str(calls.resolve(lab, "mim", target, aged, protocol="controlled", checkpoint=None).identity))
    assert len(set(keys)) == 3
    found, split = calls.resolve(lab, "mim", target, who, protocol="controlled", checkpoint=None), lab.split
    other = dataclasses.replace(split("mae-shadow-s0"), seed=99)
    monkeypatch.setattr(lab, "split", lambda name: other if name == "mae-shadow-s0" else split(name))
    with pytest.raises(ValueError, match="mae-shadow-s0 belongs to another split than mae-target-s0"):
        calls.evaluate(lab, found, controls=False)


def test_a_difference_is_of_the_same_images(lab, monkeypatch):
    lab.run("token-spread", "mae-target-s0", study="main", controls=False)
    first = score(lab)
    other = dataclasses.replace(first, image_ids=np.array([f"another {name}" for name in first.image_ids]))
    monkeypatch.setattr(lab, "scores", lambda row: [{"first": first, "other": other}[row]])
    assert lab.difference("first", "first").value == 0
    with pytest.raises(ValueError, match="the same images"):
        lab.difference("first", "other")


def _numbers():
    from mia_utils import results

    return results.NUMBERS


def test_study_files_are_plain_json(lab):
    lab.run("lpla", "mae-target-s0", study="main")
    (path,) = paths.get_scores_dir("tiny").glob("study-*.json")
    assert set(json.loads(path.read_text())) == {"study", "attack", "keys"}


def test_reference_models_calibrate_at_the_epoch_that_is_named(lab):
    call = dict(study="calibration", n_masks=2, mask_ratio=0.75, controls=False)
    lab.run("mim", "mae-target-s0", reference=[None, ["mae-shadow-s0"]], reference_checkpoint=2, **call)
    plain, found = (lab.scores(row)[0] for _, row in own(lab).sort_values("reference", na_position="first").iterrows())
    assert own(lab)["reference_checkpoint"].dropna().tolist() == [2]
    assert own(lab)["calibration"].dropna().tolist() == ["log-ratio"]

    position = {name: i for i, name in enumerate(lab.pool("scenes").image_ids)}
    images = lab.pool("scenes").images[[position[name] for name in plain.image_ids]]
    d = mim.compute_distances(lab.model("mae-shadow-s0").autoencoder_at(2), images, n_masks=2, seed=0).mean(axis=1)
    ratio = np.log(d) - np.log(-plain.score)  # -log d_target + log d_reference
    np.testing.assert_allclose(found.score, ratio, rtol=1e-5, atol=1e-6)

    lab.run("mim", "mae-target-s0", reference=[["mae-shadow-s0"]], calibration="rmia", **call)
    assert set(own(lab)["calibration"].dropna()) == {"log-ratio", "rmia"}

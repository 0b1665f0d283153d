"""The lab: scores are computed once, found again, redone when what they rest on changed, replayed without models."""

import shutil

import numpy as np
import pytest

from mia_utils import attacks, paths
from mia_utils import lab as experiments
from mia_utils.runner import artifacts

PROFILE = """
name: tiny
first: mae-target-s0
datasets: {scenes: {size: 32, n: 260}}
split: {n_nonmembers: 100, n_shadow_nonmembers: 40}
models:
  - &row
    {id: mae-target-s0, role: target, method: mae, arch: vit_nano_patch8_32, dataset: scenes, n_train: 24, epochs: 4}
  - {<<: *row, id: mae-shadow-s0, role: shadow}
  - {<<: *row, id: simclr-shadow-s0, role: shadow, method: simclr, augmentation: simclr-weak, epochs: 2}
"""


@pytest.fixture(scope="module")
def lab_home(tmp_path_factory):
    """A working folder with three trained rows, made once."""
    folder = tmp_path_factory.mktemp("a lab")
    (folder / "profiles").mkdir()
    (folder / "profiles" / "tiny.yaml").write_text(PROFILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIA_HOME", str(folder))
        patch.delenv("MIA_DATA_DIR", raising=False)
        lab = experiments.open("tiny")
        for row in lab.rows():
            lab.model(row.id, train_missing=True)
    return folder


@pytest.fixture
def lab(lab_home, monkeypatch):
    monkeypatch.setenv("MIA_HOME", str(lab_home))
    monkeypatch.delenv("MIA_DATA_DIR", raising=False)
    shutil.rmtree(lab_home / "data" / "scores", ignore_errors=True)
    return experiments.open("tiny")


FEW = dict(n_crops=4, epochs=2)  # epochs of the attacker


def test_an_evaluation_is_saved_and_found_by_another_lab(lab):
    result = lab.evaluate("partcrop", "mae-target-s0", figure="fig03_roc", **FEW)
    (path,) = paths.get_scores_dir("tiny").glob("*.npz")
    written = path.stat().st_mtime_ns
    again = experiments.open("tiny").evaluate("partcrop", "mae-target-s0", figure="fig03_roc", **FEW)
    assert np.array_equal(result.score, again.score) and path.stat().st_mtime_ns == written
    assert set(again.controls) == set(attacks.CONTROLS)
    assert again.meta["method"] == "mae" and again.meta["n_train"] == 24 and again.meta["knowledge"] == "partial"


def test_saved_scores_hold_no_pixels(lab):
    lab.evaluate("partcrop", "mae-target-s0", **FEW)
    (path,) = paths.get_scores_dir("tiny").glob("*.npz")
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].ndim <= 1 for name in file.files)


def test_a_second_figure_is_noted_on_the_same_scores(lab):
    for figure in ("fig03_roc", "fig03_table"):
        lab.evaluate("partcrop", "mae-target-s0", figure=figure, **FEW)
    assert len(lab.results()) == 1
    assert [len(lab.results(figure)) for figure in ("fig03_roc", "fig03_table", "other")] == [1, 1, 0]


def test_controls_added_later_keep_the_figures_noted_before(lab):
    lab.evaluate("partcrop", "mae-target-s0", figure="fig03_crop_number", controls=False, **FEW)
    result = lab.evaluate("partcrop", "mae-target-s0", figure="fig03_mlp", **FEW)
    assert result.controls and result.meta["figures"] == ["fig03_crop_number", "fig03_mlp"]


def test_scores_of_a_replaced_model_are_computed_again(lab, monkeypatch):
    lab.evaluate("partcrop", "mae-target-s0", **FEW)
    old = lab.results()[0].meta["identity"]
    monkeypatch.setitem(artifacts.RECIPES, "scores", 99)
    lab.evaluate("partcrop", "mae-target-s0", **FEW)
    assert len(lab.results()) == 1 and lab.results()[0].meta["identity"] != old


def test_replay_reads_scores_and_never_a_model(lab, lab_home, monkeypatch):
    result = lab.evaluate("partcrop", "mae-target-s0", **FEW)
    replay = experiments.open("tiny", replay=True)
    monkeypatch.setenv("MIA_DATA_DIR", str(lab_home / "no such folder"))
    monkeypatch.setattr(artifacts, "find", lambda spec: pytest.fail("replay looked for a model"))
    assert np.array_equal(replay.evaluate("partcrop", "mae-target-s0", **FEW).score, result.score)
    with pytest.raises(FileNotFoundError, match="no saved scores"):
        replay.evaluate("partcrop", "mae-target-s0", n_crops=5, epochs=2)


def test_shadow_knowledge_says_what_is_known(lab):
    own = lab.evaluate("partcrop", "mae-target-s0", knowledge="shadow", controls=False, **FEW)
    cross = lab.shadow_of("mae-target-s0", method="simclr")
    other = lab.evaluate("partcrop", "mae-target-s0", knowledge="shadow", shadow=cross, controls=False, **FEW)
    assert (own.meta["knowledge"], other.meta["knowledge"]) == ("shadow:PET", "shadow:PE-")
    assert other.meta["shadow_method"] == "simclr"
    assert len(own.score) == 124  # all target images report


def test_target_and_shadow_share_the_split_and_nothing_else(lab):
    split = lab.split("mae-target-s0")
    assert lab.split("mae-shadow-s0").hash == split.hash
    assert not set(split.target_members) & set(split.shadow_members)
    weights = [lab.model(name).encoder_at(0).module.norm.weight for name in ("mae-target-s0", "mae-shadow-s0")]
    first = [lab.model(n).encoder_at(0).module.blocks[0].mlp.fc1.weight for n in ("mae-target-s0", "mae-shadow-s0")]
    assert weights[0].shape == weights[1].shape and not np.array_equal(first[0].detach(), first[1].detach())


def test_fewer_strangers_are_a_subset_and_all_members_stay(lab):
    full = lab.evaluate("partcrop", "mae-target-s0", controls=False, **FEW)
    few = lab.evaluate("partcrop", "mae-target-s0", controls=False, n_nonmembers=60, **FEW)
    assert few.is_member.sum() == full.is_member.sum() == 24 and (~few.is_member).sum() == 60
    assert set(few.image_ids) < set(full.image_ids)


def test_labs_side_by_side_drop_no_figure(lab):
    from concurrent.futures import ThreadPoolExecutor

    names = [f"fig0{k}_x" for k in range(6)]

    def note(figure: str) -> None:
        experiments.open("tiny").evaluate("lpla", "mae-target-s0", figure=figure, controls=False)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(note, names))
    (result,) = experiments.open("tiny").results()
    assert result.meta["figures"] == names


def test_what_is_missing_is_one_line(lab):
    with pytest.raises(ValueError, match="has no model 'mae-target'; close: mae-target-s0"):
        lab.evaluate("partcrop", "mae-target")
    with pytest.raises(ValueError, match="unknown attack 'nothing'"):
        lab.evaluate("nothing", "mae-target-s0")
    with pytest.raises(ValueError, match="takes no parameter 'n_crop'; allowed"):
        lab.evaluate("partcrop", "mae-target-s0", n_crop=3)


def test_a_defense_of_strength_zero_changes_no_score_and_is_noted(lab):
    plain = lab.evaluate("lpla", "mae-target-s0", controls=False)
    call = dict(controls=False, defense="noise")
    same = lab.evaluate("lpla", "mae-target-s0", **call, strength=0.0)
    noisy = lab.evaluate("lpla", "mae-target-s0", **call, strength=50.0)
    assert np.array_equal(same.score, plain.score) and not np.array_equal(noisy.score, plain.score)
    facts = [(r.meta["defense"], r.meta["strength"], r.meta["attacker"]) for r in (plain, same, noisy)]
    assert facts == [("none", "", "static"), ("noise", 0.0, "adaptive"), ("noise", 50.0, "adaptive")]
    assert same.meta["utility"] == plain.meta["utility"] != noisy.meta["utility"]


def test_early_stopping_is_the_checkpoint_and_its_shadow_is_stopped_too(lab):
    epoch = lab.model("mae-target-s0").checkpoints[1]
    stopped = lab.evaluate("lpla", "mae-target-s0", defense="early-stopping", strength=epoch, knowledge="shadow")
    same = dict(epoch=epoch, shadow_epoch=epoch, knowledge="shadow", controls=False)
    assert np.array_equal(stopped.score, lab.evaluate("lpla", "mae-target-s0", **same).score)
    assert stopped.meta["epoch"] == epoch and stopped.meta["defense"] == "early-stopping"
    assert set(lab.measure("mae-target-s0", defense="early-stopping", strength=epoch)) >= {"knn", "probe"}


def test_a_static_attacker_learned_before_the_defense(lab):
    call = dict(controls=False, defense="rounding", strength=0.5, knowledge="shadow")
    adaptive, static = (lab.evaluate("lpla", "mae-target-s0", **call, attacker=a) for a in ("adaptive", "static"))
    assert static.meta["attacker"] == "static" and not np.array_equal(static.score, adaptive.score)
    assert len(lab.results()) == 2
    with pytest.raises(ValueError, match="goes with a defense"):
        lab.evaluate("lpla", "mae-target-s0", attacker="static")
    with pytest.raises(ValueError, match="expected attacker 'adaptive' or 'static'"):
        lab.evaluate("lpla", "mae-target-s0", defense="noise", strength=1.0, attacker="clever")
    with pytest.raises(ValueError, match="unknown output defense"):
        lab.evaluate("lpla", "mae-target-s0", defense="hope", strength=1.0)


def test_the_twin_of_a_defended_row_differs_by_the_defense_alone(home):
    lab = experiments.open("photos", replay=True)
    twins = {row.id: lab.undefended_of(row.id) for row in lab.rows(study="defenses", role="target")}
    assert twins.pop("mae-dp8-target-s0") == "mae-plain-target-s0"  # not the one of another mask ratio
    for defended, plain in twins.items():
        one, two = lab.profile.row(defended), lab.profile.row(plain)
        assert (one.method, one.arch, one.epochs, one.n_train, one.seed) == (
            two.method, two.arch, two.epochs, two.n_train, two.seed,
        )  # fmt: skip
        assert set(two.options) <= {*one.options, "checkpoints"} and two.defense == "none"

"""Exercises that judge themselves, checks of a run, and the game of notebook 00."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mia_utils import course, paths
from mia_utils.attacks import Result
from mia_utils.runner import profiles


def make_result(shift: float, *, control_shift: float = 0.0, n: int = 400, seed: int = 0, protocol: str = "controlled"):
    """An attack whose members score ``shift`` higher, with a no-model and a permuted control beside it."""
    rng = np.random.default_rng(seed)
    is_member = np.arange(n) % 2 == 0

    def make(control: str, by: float) -> Result:
        return Result(
            "partcrop",
            control,
            score=rng.normal(size=n) + by * is_member,
            is_member=is_member,
            image_ids=np.array([f"image-{i}" for i in range(n)]),
            role=np.full(n, "report"),
            fold=np.arange(n) % 5,
            meta={"model_id": "mae-target-s0", "protocol": protocol},
        )

    result = make("", shift)
    result.controls = {"no-model": make("no-model", control_shift), "permuted": make("permuted", 0.0)}
    return result


@pytest.fixture
def book(home):
    """A home with one profile, its smoke twin, and one notebook of two parameters."""
    (home / "profiles").mkdir()
    for name, overrides in (("quick", "{}"), ("photos", "{05_demo: {n_crops: 128}}"), ("smoke", "{}")):
        (home / "profiles" / f"{name}.yaml").write_text(f"name: {name}\nnotebooks: {overrides}\n")
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": 'profile = "quick"\nn_crops = 64\n'}
    (home / "notebooks").mkdir()
    (home / "notebooks" / "05_demo.ipynb").write_text(json.dumps({"cells": [cell]}))

    def open_checks(profile: str = "quick", **parameters):
        loaded = profiles.load(profile)
        lab = SimpleNamespace(profile=loaded, profile_name=loaded.name)
        return course.Checks(lab, "05_demo", {"profile": profile, "n_crops": 64} | parameters)

    for name in ("quick", "photos", "smoke"):
        folder = paths.get_figures_dir(name)
        folder.mkdir(parents=True)
        (folder / "fig05_hero.png").write_bytes(b"picture")
    return open_checks


# ---------------------------------------------------------------------------------------------------- exercises


def test_an_exercise_is_open_until_it_is_answered(capsys):
    course.check("00-1", None)
    course.check("00-1", 0.75)
    course.check("00-1", 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "00-1: open" and lines[1] == "00-1: right"
    assert lines[2].startswith("00-1: not yet.") and ".75" not in lines[2]


@pytest.mark.parametrize("nonsense", ["three", [1, 2], object(), float("nan"), {}, True])
def test_nonsense_earns_a_hint_and_never_an_exception(nonsense, capsys):
    for exercise_id in course.ANSWERS:
        course.check(exercise_id, nonsense)
    assert "right" not in capsys.readouterr().out


def test_an_unknown_exercise_is_named():
    with pytest.raises(ValueError, match="no exercise '99-1'"):
        course.check("99-1", 1)


def test_an_exercise_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="registered already"):
        course.register_answer("00-1", lambda answer: True, "")


# --------------------------------------------------------------------------------------------------------- code


def test_source_is_shown_with_its_place():
    pytest.importorskip("IPython")
    text = course.show_source(course.describe).data
    assert text.startswith("`mia_utils/course.py`, line ") and "def describe(" in text and '"""' in text
    assert '"""' not in course.show_source(course.describe, docstring=False).data


def test_a_decorated_function_shows_itself_and_not_its_wrapper():
    pytest.importorskip("IPython")
    from mia_utils import plots

    assert "def draw_roc(" in course.show_source(plots.draw_roc).data


# ------------------------------------------------------------------------------------------------------- checks


def test_an_invariant_asserts_in_every_profile(book):
    book().invariant("one is one", 1 == 1)
    with pytest.raises(AssertionError, match="one is two"):
        book("smoke").invariant("one is two", 1 == 2)


@pytest.mark.parametrize("value", [0.2, 0.95, float("nan")])
def test_a_finding_outside_its_band_fails_on_both_sides(book, value):
    checks = book()
    checks.finding("AUC", value, 0.5, 0.9)
    with pytest.raises(AssertionError, match="AUC"):
        checks.finish("demo")


def test_a_finding_is_not_insisted_on_with_other_parameters(book, capsys):
    checks = book(n_crops=8)
    checks.finding("AUC", 0.2, 0.5, 0.9)
    checks.finish("demo")
    assert "not reproduced with your parameters (n_crops changed)" in capsys.readouterr().out


def test_a_finding_is_never_insisted_on_in_smoke(book, capsys):
    checks = book("smoke")
    checks.finding("AUC", 0.2, 0.5, 0.9)
    checks.finish("demo")
    assert "not judged in profile smoke" in capsys.readouterr().out


def test_the_profiles_overrides_count_as_its_parameters(book):
    assert book("photos", n_crops=128).is_judged
    assert not book("photos", n_crops=64).is_judged


def test_a_forgotten_parameter_is_an_error(book):
    with pytest.raises(ValueError, match="expected the parameters profile, n_crops of 05_demo"):
        book(n_other=1)


def test_sound_controls_hold(book, capsys):
    checks = book()
    table = checks.controls([make_result(2.0), make_result(1.0, seed=1)])
    checks.finish("demo")
    assert len(table) == 4 and not table["rejected"].any()
    assert "4 distinct control rows, none rejected" in capsys.readouterr().out


def test_the_same_control_beside_two_attacks_is_one_row(book):
    one, other = make_result(2.0), make_result(1.0, seed=1)
    other.controls["no-model"] = one.controls["no-model"]
    assert len(book().controls([one, other])) == 3


def test_a_failing_control_is_loud_and_fails_a_judged_run(book, capsys):
    checks = book()
    checks.controls([make_result(2.0, control_shift=1.0)])
    assert "CONTROL FAILED" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="no-model"):
        checks.finish("demo")


def test_a_failing_control_is_reported_in_smoke(book, capsys):
    checks = book("smoke")
    checks.controls([make_result(2.0, control_shift=1.0)])
    checks.finish("demo")
    assert "CONTROL FAILED" in capsys.readouterr().out


def test_a_released_protocol_may_leak_without_a_model(book):
    assert not len(book().controls([make_result(2.0, control_shift=3.0, protocol="released-view")]))


def test_the_last_line_is_the_finding(book, capsys):
    book().finish("PartCrop on MAE:\n AUC .81")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "FINDING 05 PartCrop on MAE: AUC .81 -> figures/quick/fig05_hero.png"


def test_a_missing_hero_is_noticed(book):
    (paths.get_figures_dir("quick") / "fig05_hero.png").unlink()
    with pytest.raises(AssertionError, match="fig05_hero.png"):
        book().finish("demo")


def test_a_result_is_described_with_its_blind_twin():
    text = course.describe(make_result(2.0))
    assert text.startswith("AUC .9") and "no model ." in text


# ------------------------------------------------------------------------------------------- the game, the ladder


def test_the_game_draws_half_members_from_one_fold():
    index = np.arange(200)
    roles = SimpleNamespace(index=index, is_member=index < 60, fold=index % 5)
    split = SimpleNamespace(seed=0, roles=lambda knowledge: roles)
    picked, is_member = course.pick_game(split, 20)
    assert len(picked) == 20 and is_member.sum() == 10 and len(set(picked % 5)) == 1
    assert ((picked < 60) == is_member).all()
    again, _ = course.pick_game(split, 20)
    other, _ = course.pick_game(SimpleNamespace(seed=1, roles=lambda knowledge: roles), 20)
    assert (picked == again).all() and (picked != other).any()


def test_ranks_among_strangers_agree_with_the_auc():
    result = make_result(1.0)
    members = result.image_ids[result.is_member]
    # the mean rank of the members among strangers of their fold is the AUC (folds are of one size)
    assert np.isclose(course.rank_among_strangers(result, members).mean(), result.auc, atol=1e-9)
    strangers = course.rank_among_strangers(result, result.image_ids[~result.is_member])
    assert np.isclose(strangers.mean(), 0.5)


def test_nobody_sits_at_a_test():
    assert not course.is_interactive()
    assert course.play(np.zeros((2, 4, 4, 3), np.uint8), np.array([True, False])) is None


def test_a_missing_data_set_skips_its_rungs(capsys):
    def load(name):
        if name == "camvid":
            raise FileNotFoundError("no folder camvid")

    lab = SimpleNamespace(
        replay=False,
        pool=load,
        profile=SimpleNamespace(seeds=[0, 1]),
        evaluate_blind=lambda *key, n_members, seed: (*key, n_members, seed),
    )
    found = course.climb_ladder(lab, [["camvid", "controlled"], ["scenes", "controlled"]], n_members=5)
    assert found == {("scenes", "controlled"): [("scenes", "controlled", 5, 0), ("scenes", "controlled", 5, 1)]}
    assert "skipped: controlled on camvid, no folder camvid" in capsys.readouterr().out


def test_rungs_show_what_they_set_side_by_side():
    from mia_utils import datasets

    rng = np.random.default_rng(0)
    names = [f"frame-{i}" for i in range(8)]
    pool = datasets.Pool(
        "demo",
        rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8),
        np.zeros(8, np.int64),
        np.array(names),
        np.array(["train", "test"] * 4),
        ("thing",),
        groups=np.array(["a/0"] * 4 + ["a/1"] * 4),
    )
    for rung, words in (
        ("released-view", ("cropped", "whole")),
        ("controlled", ("whole", "whole")),
        ("released-split", ("train", "test")),
        ("frame-thirds", ("a frame", "the next")),
    ):
        member, stranger, *said = course.make_rung_pair(pool, rung)
        assert member.shape == stranger.shape == (16, 16, 3) and tuple(said) == words
    assert course.make_rung_pair(pool, "released-selection") is None

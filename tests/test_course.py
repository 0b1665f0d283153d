"""Exercises that judge themselves, checks of a run, shown code, and the game of notebook 00."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mia_utils import course, paths
from mia_utils.attacks import Result
from mia_utils.plots import style
from mia_utils.pretrain import mae
from mia_utils.runner import profiles

NOTEBOOKS = [f"0{i}" for i in range(9) if course.load_answers(f"0{i}")]


def make_rows(*, blind_p: float = 0.6, seed: int = 0, **facts) -> pd.DataFrame:
    """An attack with its three controls, as rows of ``lab.results``."""
    base = dict(attack="partcrop", target=f"mae-{seed}", protocol="controlled", seed=np.nan, n_seeds=1, n_members=100)
    base |= dict(n_nonmembers=300, minimum_detectable=0.55, auc=0.8, p=1e-9, control="")
    rows = [base] + [
        base | dict(control=control, auc=0.5 + (i + 3 * seed) / 1000, p=blind_p if control == "no-model" else 0.5)
        for i, control in enumerate(("no-model", "untrained", "permuted"))
    ]
    return pd.DataFrame([row | facts for row in rows])


@pytest.fixture
def book(home, monkeypatch):
    """A home with three profiles and one notebook of two parameters."""
    (home / "profiles").mkdir()
    for name, overrides in (("quick", "{}"), ("photos", "{05_demo: {n_crops: 128}}"), ("smoke", "{}")):
        (home / "profiles" / f"{name}.yaml").write_text(f"name: {name}\nnotebooks: {overrides}\n")
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": 'profile = "quick"\nn_crops = 64\n'}
    (home / "notebooks").mkdir()
    (home / "notebooks" / "05_demo.ipynb").write_text(json.dumps({"cells": [cell]}))
    for name in ("quick", "photos", "smoke"):
        paths.get_figures_dir(name).mkdir(parents=True)
        (paths.get_figures_dir(name) / "fig05_hero.png").write_bytes(b"a figure")

    def open_checks(profile: str = "quick", **present):
        monkeypatch.setattr(sys.modules["__main__"], "profile", profile, raising=False)
        for key, value in ({"n_crops": 64} | present).items():
            monkeypatch.setattr(sys.modules["__main__"], key, value, raising=False)
        return course.Checks(SimpleNamespace(profile=profiles.load(profile), name=profile), "05_demo")

    return open_checks


# ---------------------------------------------------------------------------------------------------- exercises


def test_an_exercise_is_open_until_it_is_answered(capsys):
    for answer in (None, 2, 0.05):
        course.check("08-2", answer)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["08-2: open", "08-2: right"] and lines[2].startswith("08-2: not yet. ")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_nonsense_earns_a_hint_and_never_an_exception(notebook, capsys):
    for exercise_id in course.load_answers(notebook):
        for nonsense in ("three", [1, 2], object(), float("nan"), {}):
            course.check(exercise_id, nonsense)
    assert "right" not in capsys.readouterr().out


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_expected_wrong_answers_are_wrong_and_hints_give_nothing_away(notebook):
    for exercise_id, (predicate, hint, *wrong) in course.load_answers(notebook).items():
        assert exercise_id.startswith(notebook) and hint and callable(predicate)
        for answer, why in (wrong[0] if wrong else {}).items():
            try:
                assert not predicate(answer), exercise_id
            except TypeError:  # judged against what the run gives
                pass
            assert why


def test_a_graded_copy_without_answers_hands_in(home, capsys):
    (home / "notebooks" / "solutions").mkdir(parents=True)
    course.load_answers.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(course.profiles, "find_source", lambda *parts: home.joinpath(*parts))
            course.check("03-1", 0.0)
    finally:
        course.load_answers.cache_clear()
    assert capsys.readouterr().out == "03-1: handed in, judged elsewhere\n"


def test_an_unknown_exercise_is_named():
    with pytest.raises(ValueError, match="no exercise '08-9'"):
        course.check("08-9", 1)


# --------------------------------------------------------------------------------------------------------- code


def test_source_is_shown_with_its_place_and_without_its_docstring():
    text = course.show_source(style.label_of).data
    assert text.startswith("`mia_utils/plots/style.py`: `label_of`\n\n```python\ndef label_of(") and '"""' not in text
    loss = course.show_source(mae.MAE.loss).data
    assert loss.startswith("`mia_utils/pretrain/mae.py`: `MaskedImageModel.loss`\n\n```python\ndef loss(")
    with pytest.raises(ValueError, match="mae.py has no MaskedImageModel.loss.gone"):
        course.quote_source(Path(mae.__file__), "MaskedImageModel.loss.gone")


def test_long_source_is_cut_at_25_lines():
    lines = course.show_source(course.make_game).data.partition("```python\n")[2].removesuffix("\n```").splitlines()
    assert len(lines) == 25 and "lines more" in lines[-1]


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


@pytest.mark.parametrize(("profile", "present", "words"), [
    ("quick", {"n_crops": 8}, "not reproduced with your parameters (n_crops changed)"),
    ("smoke", {}, "not judged in profile smoke"),
])  # fmt: skip
def test_a_finding_is_not_insisted_on_elsewhere(book, capsys, profile, present, words):
    checks = book(profile, **present)
    checks.finding("AUC", 0.2, 0.5, 0.9)
    checks.controls(make_rows(blind_p=1e-9))
    checks.finish("demo")
    said = capsys.readouterr().out
    assert words in said and "CONTROL FAILED" in said


def test_the_profiles_overrides_count_as_its_parameters(book):
    assert book("photos", n_crops=128).is_judged and not book("photos", n_crops=64).is_judged


def test_valid_controls_pass_and_say_what_would_have_been_rejected(book, capsys):
    table = book().controls(pd.concat([make_rows(), make_rows(seed=1)]))
    assert (
        len(table) == 6
        and not table["rejected"].any()
        and set(table["family"]) == {"no-model", "untrained", "permuted"}
    )
    assert "6 distinct control rows, none rejected" in capsys.readouterr().out
    # two rows a family: .05 above .5 at 95 % reaches further at a quarter of a percent
    assert table["rejects_above"].to_numpy() == pytest.approx(0.5 + 0.05 * 2.807 / 1.960, abs=1e-3)


@pytest.mark.parametrize(("facts", "n"), [
    ({}, 3), ({"protocol": "released-view"}, 0), ({"p": None}, 0), ({"attack": "mim"}, 2),
])  # fmt: skip
def test_what_is_judged(facts, n):
    """One no-model row serves all attacks on a split; flawed protocols may leak; permuted needs a trained attacker."""
    assert len(course.judge_controls(pd.concat([make_rows(**facts)] * 2))) == n


def test_a_failing_control_is_loud_and_fails_a_judged_run(book, capsys):
    checks = book()
    checks.controls(make_rows(blind_p=1e-9))
    assert "CONTROL FAILED" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="no-model"):
        checks.finish("demo")


def test_the_last_line_is_the_finding_and_a_missing_hero_is_noticed(book, capsys):
    book().finish("PartCrop on MAE:\n AUC .81")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "FINDING 05 PartCrop on MAE: AUC .81 -> figures/quick/fig05_hero.png"
    (paths.get_figures_dir("quick") / "fig05_hero.png").unlink()
    with pytest.raises(AssertionError, match="fig05_hero.png"):
        book().finish("demo")


# --------------------------------------------------------------------------------------------------------- the game


def test_the_game_draws_half_members_from_one_fold():
    index = np.arange(200)
    roles = SimpleNamespace(index=index, is_member=index < 60, folds=[(None, None, index[::5])])
    split = SimpleNamespace(seed=0, roles=lambda knowledge: roles)
    picked, is_member = course.pick_game(split, 20)
    assert len(picked) == 20 and is_member.sum() == 10 and len(set(picked % 5)) == 1
    assert ((picked < 60) == is_member).all()
    again, _ = course.pick_game(split, 20)
    other, _ = course.pick_game(SimpleNamespace(seed=1, roles=lambda knowledge: roles), 20)
    assert (picked == again).all() and (picked != other).any()


def test_ranks_among_nonmembers_agree_with_the_auc():
    n, rng = 400, np.random.default_rng(0)
    is_member = np.arange(n) % 2 == 0
    ids = np.array([f"image-{i}" for i in range(n)])
    result = Result("partcrop", score=rng.normal(size=n) + is_member, is_member=is_member, image_ids=ids,
                    fold=np.arange(n) % 5)  # fmt: skip
    # the mean rank of the members among the non-members of their fold is the AUC (folds are of one size)
    assert np.isclose(course.rank_among_nonmembers(result, ids[is_member]).mean(), result.auc, atol=1e-9)
    assert np.isclose(course.rank_among_nonmembers(result, ids[~is_member]).mean(), 0.5)


def test_nobody_sits_at_a_test():
    assert not course.is_interactive()
    figure = object()  # stands where nobody can click
    assert course.play(np.zeros((2, 4, 4, 3), np.uint8), np.array([True, False]), figure) is figure


def test_the_game_counts_what_was_clicked_and_a_slip_does_not_end_it():
    grid, button, answer = course.make_game(
        np.zeros((4, 4, 4, 3), np.uint8), np.array([True, False, True, False])
    ).children
    toggles = [card.children[1] for card in grid.children]
    button.click()
    assert "None is chosen yet" in answer.value and not any(toggle.button_style for toggle in toggles)
    for toggle in toggles[:3]:
        toggle.value = True
    assert "Chosen: 3." in answer.value
    button.click()
    assert "members among them: 2 of 2. Guessing finds 1.5" in answer.value and button.disabled
    assert [(t.button_style, t.icon) for t in toggles] == [
        ("danger", "check"),
        ("", "times"),
        ("danger", "check"),
        ("", ""),
    ]
    told, toggles[3].value = answer.value, True
    assert answer.value == told  # clicks after the answer change nothing

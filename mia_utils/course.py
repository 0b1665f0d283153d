"""What makes the notebooks a course: exercises and runs that check themselves, shown code, a game."""

import ast
import functools
import inspect
import io
import runpy
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mia_utils import paths, seeds
from mia_utils.protocol import intervals
from mia_utils.runner import parameters, profiles

# attacks that train no attacker
UNTRAINED = ("mim", "encodermi-t", "seg-global-loss", "token-spread", "gradient-norm")


@functools.cache
def load_answers(notebook: str) -> dict[str, tuple] | None:
    """Load ``ANSWERS`` of ``notebooks/solutions/answers_NN.py``; None where it was taken away, as in a graded copy.

    Returns:
        dict: exercise -> (predicate(answer, **given) -> bool, hint, {wrong answer: what it is taken from}).
    """
    path = profiles.find_source("notebooks", "solutions", f"answers_{notebook}.py")
    return runpy.run_path(str(path))["ANSWERS"] if path.is_file() else None


def check(exercise_id: str, answer: Any, **given: Any) -> None:
    """Judge an answer to an exercise such as ``"03-1"``: prints "open" for None, else "right" or a hint; never raises.

    ``given`` is what the answer is judged against, where it depends on this very run.
    """
    answers = load_answers(exercise_id[:2])
    if answer is None or answers is None:
        print(f"{exercise_id}: {'open' if answer is None else 'handed in, judged elsewhere'}")
        return
    if exercise_id not in answers:
        raise ValueError(f"no exercise {exercise_id!r}: expected one of {', '.join(sorted(answers))}")
    predicate, hint = answers[exercise_id][:2]
    try:
        right = bool(predicate(answer, **given))
    except Exception:  # whatever the reader hands in, the notebook goes on
        right = False
    print(f"{exercise_id}: right" if right else f"{exercise_id}: not yet. {hint}")


def show_source(function: Callable | type):
    """Show file, name and source of a package function as Markdown, without its docstring; at most 25 lines of it."""
    from IPython.display import Markdown  # not installed where only audits run

    function = inspect.unwrap(function)
    return Markdown(quote_source(Path(inspect.getsourcefile(function)).resolve(), function.__qualname__))


def quote_source(place: Path, name: str) -> str:
    """Quote a function or class of a file, which is not imported; ``name`` as in ``"MAE.loss"``."""
    text = place.read_text(encoding="utf-8")
    node, lines = ast.parse(text), text.splitlines()
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        if node is None:
            raise ValueError(f"{place.name} has no {name}: a notebook that shows it is out of date")
    code = lines[min(n.lineno for n in (node, *node.decorator_list)) - 1 : node.body[0].lineno - 1]
    code += lines[node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1 : node.end_lineno]
    code = textwrap.dedent("\n".join(code)).strip("\n").splitlines()
    code = code if len(code) <= 25 else [*code[:24], f"    ...  # {len(code) - 24} lines more"]
    known = place.is_relative_to(paths.PACKAGE_ROOT)
    place = place.relative_to(paths.PACKAGE_ROOT) if known else Path(place.name)
    return f"`{place.as_posix()}`: `{name}`\n\n```python\n" + "\n".join(code) + "\n```"


class Checks:
    """The checks cell of a notebook, such as ``"03_partcrop"``.

    *Invariants* always assert. *Findings* are two-sided bands; they and the *controls* assert, in ``finish``, only when
    the notebook ran with its profile's parameters in a profile the bands were measured for. Elsewhere they are printed.
    """

    def __init__(self, lab: Any, notebook: str):
        path = parameters.find_notebooks()[notebook]
        wanted = parameters.merge_parameters(lab.profile, notebook, parameters.read_parameters(path))
        present = vars(sys.modules["__main__"])
        changed = ", ".join(name for name, value in wanted.items() if present.get(name, value) != value)
        self.lab, self.notebook = lab, notebook
        self.is_judged = not changed and lab.name in ("quick", "photos")  # the bands were measured there
        self._reason = f"not judged in profile {lab.name}"
        if changed:
            self._reason = f"not reproduced with your parameters ({changed} changed)"
        self._failed: list[str] = []

    def invariant(self, text: str, condition: Any) -> None:
        """Assert what must hold whatever the parameters are."""
        assert bool(condition), f"invariant does not hold: {text}"
        print(f"holds    {text}")

    def finding(self, text: str, value: float, low: float, high: float) -> None:
        """Compare a number with its band; ``finish`` raises when it lies outside in a judged run."""
        line = f"{text}: {value:.3g}, band [{low:g}, {high:g}]"
        word = "found" if low <= value <= high else "OUTSIDE" if self.is_judged else "open"  # NaN is outside
        print(f"{word:8} {line}" + (f"; {self._reason}" if word == "open" else ""))
        self._failed += [line] if word == "OUTSIDE" else []

    def controls(self, table: pd.DataFrame) -> pd.DataFrame:
        """Judge and return the control rows of the controlled protocol (:func:`judge_controls`): none is rejected."""
        verdict = judge_controls(table)
        for row in verdict[verdict["rejected"]].itertuples():
            line = f"control {row.control} (p {row.p:.2g}, after Holm {row.p_holm:.2g})"
            print(f"CONTROL FAILED  {line}: what the attack says cannot be trusted until this is explained")
            self._failed += [line] if self.is_judged else []
        if not len(verdict):
            print("open     no control was run")
        elif not verdict["rejected"].any():
            print(f"holds    {len(verdict)} distinct control rows, none rejected (Holm at .01 in each family)")
        return verdict

    def finish(self, line: str) -> None:
        """Print the finding, the last line of a notebook, and raise what failed in a judged run."""
        number = self.notebook[:2]
        hero = paths.get_figures_dir(self.lab.name) / f"fig{number}_hero.png"
        assert hero.is_file(), f"invariant does not hold: {hero.name} was written"
        assert not self._failed, "; ".join(self._failed)
        print(f"FINDING {number} {' '.join(line.split())} -> figures/{self.lab.name}/{hero.name}", flush=True)


def judge_controls(table: pd.DataFrame) -> pd.DataFrame:
    """Judge all distinct control rows of a results table, each family (no model, untrained, permuted) at .01 (Holm)."""
    rows = table[(table["control"] != "") & table["seed"].isna() & (table["protocol"] == "controlled")]
    # one no-model row serves all attacks on a split; permuted rows are .5 by construction where no attacker is trained
    rows = rows[rows["p"].notna() & ((rows["control"] != "permuted") | ~rows["attack"].isin(UNTRAINED))]
    rows = rows.drop_duplicates(["control", "auc", "n_members", "n_nonmembers"])
    names = [f"{r.control}, {r.attack} on {r.target} ({i})" for i, r in enumerate(rows.itertuples())]
    p, families = (dict(zip(names, rows[column], strict=True)) for column in ("p", "control"))
    verdict = intervals.judge_controls(p, families=families)
    detectable = rows["minimum_detectable"].to_numpy(float)
    n = verdict.groupby("family")["p"].transform("size").to_numpy()
    # from the 95 % of one row to the level of the first of n; where several trainings differ, the test is narrower
    above = 0.5 + (detectable - 0.5) * stats.norm.isf(0.01 / 2 / np.maximum(n, 1)) / stats.norm.isf(0.025)
    above = np.where(rows["n_seeds"] == 1, np.minimum(above, 1.0), np.nan)
    return verdict.assign(auc=rows["auc"].to_numpy(), minimum_detectable=detectable, rejects_above=above)


def is_interactive() -> bool:
    """Whether somebody sits at this notebook: a front end allows input, papermill does not."""
    try:
        from IPython import get_ipython  # absent outside notebooks

        return bool(get_ipython().kernel.get_parent("shell")["content"].get("allow_stdin"))
    except (AttributeError, KeyError, TypeError, ImportError):
        return False


def pick_game(split: Any, n_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the images of "spot the member", half members, all of one fold, so that one attacker judges them all.

    Returns:
        index (n,) int64 into the pool, shuffled; is_member (n,) bool. Fewer where the fold has not enough members.
    """
    roles = split.roles("partial")
    rng, here = seeds.rng(split.seed, "spot-the-member"), roles.folds[0][2]
    sides = here[roles.is_member[here]], here[~roles.is_member[here]]
    n = min(n_images // 2, *map(len, sides))
    picked = rng.permutation(np.concatenate([rng.choice(part, n, replace=False) for part in sides]))
    return roles.index[picked], roles.is_member[picked]


def rank_among_nonmembers(result: Any, image_ids: Iterable[str]) -> np.ndarray:
    """Return the share of non-members, judged by the same attacker, that score below each image; ties count half."""
    position = {image_id: i for i, image_id in enumerate(result.image_ids.tolist())}
    shares = []
    for row in (position[str(image_id)] for image_id in image_ids):
        others = (result.fold == result.fold[row]) & ~result.is_member
        others[row] = False
        steps = np.heaviside(result.score[row] - result.score[others], 0.5)
        shares.append(steps.mean() if others.any() else 0.5)
    return np.array(shares)


def play(images: np.ndarray, is_member: np.ndarray, figure: Any = None) -> Any:
    """Let the reader click on the images (n, H, W, 3) uint8 that trained the model, then on "How did I do?".

    Returns the figure where nobody can click, as when papermill runs the notebook; it also stands in saved copies.
    """
    if not is_interactive():
        print("In JupyterLab you can click on the images. This copy was executed without a reader.")
        return figure
    from IPython.display import display  # not installed where only audits run

    still = figure._repr_mimebundle_() if figure is not None else {}
    display(make_game(images, is_member)._repr_mimebundle_() | still, raw=True)
    return None


def make_game(images: np.ndarray, is_member: np.ndarray) -> Any:
    """Build "spot the member", an ipywidgets box: images with a toggle each, a button, and what it answers."""
    import ipywidgets as widgets  # only where somebody can click
    from PIL import Image

    cards, toggles, n_members = [], [], int(np.sum(is_member))
    for number, image in enumerate(images, 1):
        buffer = io.BytesIO()
        Image.fromarray(image).resize((96, 96), Image.Resampling.NEAREST).save(buffer, format="PNG")
        shown = widgets.Image(value=buffer.getvalue(), format="png", width=96, height=96)
        toggles.append(widgets.ToggleButton(description=f"{number}", tooltip="a member?", layout={"width": "96px"}))
        cards.append(widgets.VBox([shown, toggles[-1]]))
    task = f"Choose the {n_members} images that trained the model."
    answer, button = widgets.HTML(task), widgets.Button(description="How did I do?")

    def count(_: Any) -> None:
        answer.value = f"{task} Chosen: {sum(toggle.value for toggle in toggles)}."

    def judge(_: Any) -> None:
        chosen = np.array([toggle.value for toggle in toggles])
        if not chosen.any():  # a slip must not end the game
            answer.value = f"{task} None is chosen yet."
            return
        answer.value = (
            f"Images chosen: {chosen.sum()}; members among them: {(chosen & is_member).sum()} of {n_members}. "
            f"Guessing finds {chosen.sum() * np.mean(is_member):.2g} of them on average.<br>"
            "Red trained the model; \u2713 and \u2717 mark your choices, right and wrong."
        )
        for toggle, member in zip(toggles, is_member, strict=True):
            toggle.unobserve(count, "value")
            toggle.button_style = "danger" if member else ""
            toggle.icon = ("check" if member else "times") if toggle.value else ""
        button.disabled = True

    for toggle in toggles:
        toggle.observe(count, "value")
    button.on_click(judge)
    grid = widgets.GridBox(cards, layout={"grid_template_columns": "repeat(auto-fill, 100px)", "max_width": "1040px"})
    return widgets.VBox([grid, button, answer])

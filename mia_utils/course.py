"""What makes the notebooks a course: exercises that check themselves, checks of every run, shown code, a game.

Nothing in the package depends on this module; the notebooks do.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from mia_utils import paths, plots
from mia_utils.protocol import intervals
from mia_utils.runner import profiles

if TYPE_CHECKING:
    from mia_utils.attacks import Result
    from mia_utils.protocol.splits import Split

# ---------------------------------------------------------------------------------------------------- exercises


@dataclass(frozen=True)
class Exercise:
    """How an answer is judged.

    Attributes:
        predicate: ``predicate(answer, **given) -> bool``; ``given`` are the tensors and results the notebook passes.
        hint: one sentence for a wrong answer; it helps and does not give the answer away.
    """

    predicate: Callable[..., bool]
    hint: str


ANSWERS: dict[str, Exercise] = {}


def register_answer(exercise_id: str, predicate: Callable[..., bool], hint: str) -> None:
    """Add an exercise: ``register_answer("03-1", lambda answer: ..., "Think of ...")``.

    Args:
        exercise_id: notebook number and exercise number, for example ``"03-1"``.
        predicate: ``predicate(answer, **given) -> bool``; an exception counts as a wrong answer.
        hint: printed after a wrong answer.

    Raises:
        ValueError: the id is taken.
    """
    if exercise_id in ANSWERS:
        raise ValueError(f"exercise {exercise_id!r} is registered already: choose another number")
    ANSWERS[exercise_id] = Exercise(predicate, hint)


def check(exercise_id: str, answer: Any, **given: Any) -> None:
    """Judge an answer: prints "open" while it is None, else "right" or a hint. Never raises on a wrong answer.

    Args:
        exercise_id: for example ``"03-1"``.
        answer: the reader's answer, or None.
        given: what the answer is judged against, where it depends on this very run.
    """
    if exercise_id not in ANSWERS:
        raise ValueError(f"no exercise {exercise_id!r}: expected one of {', '.join(sorted(ANSWERS))}")
    if answer is None:
        print(f"{exercise_id}: open")
        return
    exercise = ANSWERS[exercise_id]
    try:
        right = bool(exercise.predicate(answer, **given))
    except Exception:  # whatever the reader hands in, the notebook goes on
        right = False
    print(f"{exercise_id}: right" if right else f"{exercise_id}: not yet. {exercise.hint}")


def _is_near(answer: Any, value: float, tolerance: float) -> bool:
    return not isinstance(answer, (str, bool)) and abs(float(answer) - value) <= tolerance


def _is_choice(letter: str) -> Callable[[Any], bool]:
    return lambda answer: str(answer).strip().lower() == letter


# --- 00
register_answer(
    "00-1",
    lambda answer: _is_near(answer, 4.5 / 6, 0.005),
    "Write down all six pairs of one member and one stranger; a win counts one, a tie one half.",
)
register_answer(
    "00-2",
    lambda answer: _is_near(answer, 0.1 * 100 / (0.1 * 100 + 0.01 * 9900), 0.006),
    "Count people, not rates: how many of the 100 members are accused, and how many of the 9,900 strangers?",
)
register_answer(
    "00-3",
    lambda answer, result: _is_near(answer, _count_found(result), 0.5),
    "Look up tpr_at[0.1] of the result: its first number is the share of the members that are found.",
)


def _count_found(result: Result) -> float:
    return round(result.tpr_at[0.1][0] * result.metrics.n_members)


# --- 01
register_answer(
    "01-1",
    lambda answer, history: int(answer) == _find_parting(history),
    "Walk down the history table: the first epoch at which loss_heldout exceeds 1.2 times loss_members.",
)
register_answer(
    "01-2",
    _is_choice("b"),
    "Which of the four changes what the model sees of a picture from one epoch to the next?",
)
register_answer(
    "01-3",
    lambda answer, run: _is_near(answer, run.settings["epochs"] / run.settings["n_train"], 0.01),
    "Both numbers are in run.settings: epochs and n_train.",
)


def _find_parting(history: pd.DataFrame) -> int:
    apart = history[history["loss_heldout"] > 1.2 * history["loss_members"]]
    return int(apart["epoch"].iloc[0]) if len(apart) else -1


# --- 02
register_answer(
    "02-1",
    lambda answer, split: (
        set(map(int, answer)) == set(map(int, np.union1d(split.target_members, split.shadow_members)))
    ),
    "Two of the four roles train a model; np.union1d joins two index arrays.",
)
register_answer(
    "02-2",
    _is_choice("c"),
    "Ask of each proposal whether an attacker without any model could tell the two sides apart.",
)
register_answer(
    "02-3",
    lambda answer: callable(answer) and all(bool(answer(low)) is (low > 0.5) for low in (0.2, 0.49, 0.51, 0.93)),
    "The function gets the lower end of the no-model control's interval and says True when the audit is void.",
)

# --- 03
register_answer(
    "03-1",
    lambda answer: _is_near(answer, 0.0, 0.005),
    "Put v_ij = 1/16 into equation (4): what is the difference of the two logarithms?",
)
register_answer(
    "03-2",
    _is_choice("c"),
    "Which of the three numbers was measured without any model, and how far is it from the attack?",
)
register_answer(
    "03-3",
    lambda answer, transfer: _is_near(answer, _measure_loss(transfer), 0.005),
    "Two lists of result.auc, one where method and shadow_method agree and one where they do not; subtract the means.",
)


def _measure_loss(transfer: Iterable[Result]) -> float:
    same = [r.auc for r in transfer if r.meta["method"] == r.meta["shadow_method"]]
    other = [r.auc for r in transfer if r.meta["method"] != r.meta["shadow_method"]]
    return float(np.mean(same) - np.mean(other))


# --- 04
register_answer(
    "04-1",
    lambda answer: _is_near(answer, 0.01, 0.0005),
    "Average each model's distances over the masks, subtract, and remember that a score is minus a distance.",
)
register_answer(
    "04-2",
    _is_choice("b"),
    "Which of the two numbers would change if the attacker moved his threshold, and in which direction does it err?",
)
register_answer(
    "04-3",
    lambda answer, over_masks: int(answer) == _count_masks(over_masks),
    "Collect {n_masks: auc}; the reference value is the AUC of the largest M, minus .01.",
)


def _count_masks(over_masks: Iterable[Result]) -> int:
    auc = {r.meta["params"]["n_masks"]: r.auc for r in over_masks}
    return min(number for number in auc if auc[number] >= auc[max(auc)] - 0.01)


# --- 05
register_answer(
    "05-1",
    lambda answer: _is_near(answer, 435, 0.5),
    "Each of the 30 views meets 29 others, and every pair was counted twice.",
)
register_answer(
    "05-2",
    _is_choice("b"),
    "What exactly was measured, and what would the interval have shown had it been there?",
)
register_answer(
    "05-3",
    lambda answer, knowledge: _is_near(answer, _measure_training(knowledge), 0.005),
    "Two lists of result.auc of the vector attacker, told apart by a T after the colon; subtract the means.",
)


def _measure_training(knowledge: Iterable[Result]) -> float:
    vector = [r for r in knowledge if r.attack == "encodermi-v"]
    known = [r.auc for r in vector if "T" in r.meta["knowledge"]]
    return float(np.mean(known) - np.mean([r.auc for r in vector if "T" not in r.meta["knowledge"]]))


# --- 06
register_answer(
    "06-1",
    lambda answer: _is_near(answer, -math.log(0.9 * 0.5 * 0.1) / 3, 0.006),
    "Three logarithms; over how many pixels is the mean taken?",
)
register_answer(
    "06-2",
    _is_choice("b"),
    "What does the victim know of a frame whose neighbor in time it was trained on?",
)
register_answer(
    "06-3",
    lambda answer, classes: str(answer).strip() == _find_surest(classes),
    "Keep the rows without a seed, drop the whole picture, and sort by the column low.",
)


def _find_surest(classes: pd.DataFrame) -> str:
    over_all = classes[classes["seed"].isna() & (classes["class"] != "whole picture")]
    return str(over_all.loc[over_all["low"].idxmax(), "class"])


# --- 07
register_answer(
    "07-1",
    lambda answer: _is_near(answer, math.log(0.6 / 0.4), 0.006),
    "Solve .60 = e^eps / (1 + e^eps) for epsilon: what is e^eps?",
)
register_answer(
    "07-2",
    _is_choice("c"),
    "Which attacker was tested, and what did he learn from?",
)
register_answer(
    "07-3",
    lambda answer, points: " ".join(str(answer).split()) == _find_safest(points),
    "Keep the rows of the first method with kept of at least .9, and sort them by the column high.",
)


def _find_safest(points: pd.DataFrame) -> str:
    affordable = points[(points["method"] == points["method"].iloc[0]) & (points["kept"] >= 0.9)]
    return str(affordable.loc[affordable["high"].idxmin(), "label"])


# --- 08
register_answer(
    "08-1",
    lambda answer, summary: int(answer) == _count_above(summary),
    "Three conditions: control is empty, protocol is controlled, auc_low is above .5.",
)
register_answer(
    "08-2",
    lambda answer: _is_near(answer, 2.0, 0.01),
    "Every sound control is called broken with probability .05.",
)
register_answer(
    "08-3",
    _is_choice("c"),
    "The control never asked the model. What does it say about the two sides, and does subtracting remove it?",
)


def _count_above(summary: pd.DataFrame) -> int:
    kept = (summary["control"] == "") & (summary["protocol"] == "controlled")
    return int((summary.loc[kept, "auc_low"] > 0.5).sum())


# ------------------------------------------------------------------------------------------------- package code


def show_source(function: Callable | type, *, docstring: bool = True):
    """Render the source of a package function in the notebook: shown, never repeated.

    Args:
        function: function, method or class of the package.
        docstring: False leaves a function's docstring out, where the text above says it already.

    Returns:
        IPython Markdown: file and line, then the code.
    """
    import ast

    from IPython.display import Markdown

    function = inspect.unwrap(function)
    lines, start = inspect.getsourcelines(function)
    if not docstring:
        node = ast.parse(inspect.cleandoc("\n" + "".join(lines))).body[0]
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant):
            lines = lines[: first.lineno - 1] + lines[first.end_lineno :]
    place = Path(inspect.getsourcefile(function)).resolve()
    if place.is_relative_to(paths.PACKAGE_ROOT):
        place = place.relative_to(paths.PACKAGE_ROOT)
    else:  # someone's own function
        place = Path(place.name)
    code = inspect.cleandoc("\n" + "".join(lines))
    return Markdown(f"`{place.as_posix()}`, line {start}\n\n```python\n{code}\n```")


# ------------------------------------------------------------------------------------------------------- checks


def describe(result: Result) -> str:
    """Say a result in the words of the finding line: ``AUC .81 [.76, .86], no model .51``."""
    text = f"AUC {plots.format_interval(result.auc, result.auc_low, result.auc_high)}"
    blind = result.controls.get("no-model")
    return text + (f", no model {plots.format_value(blind.auc)}" if blind is not None and blind.metrics else "")


class Checks:
    """The checks cell of a notebook.

    *Invariants* always assert. *Findings* are two-sided bands; they and the *controls* assert, in ``finish``, only when
    the notebook ran with its profile's parameters in a profile the bands were measured for. Elsewhere they are printed.

    Args:
        lab: what ``experiments.open`` returned.
        notebook: for example ``"03_partcrop"``.
        parameters: every name of the parameters cell with its present value.
        measured: profiles the bands of the findings hold for (never ``smoke``, which trains for seconds).

    Raises:
        ValueError: ``parameters`` does not name exactly what the parameters cell holds.
    """

    def __init__(
        self,
        lab: Any,
        notebook: str,
        parameters: Mapping[str, Any],
        *,
        measured: Iterable[str] = ("quick", "photos"),
    ):
        found = profiles.find_notebooks()
        if notebook not in found:
            raise ValueError(f"unknown notebook {notebook!r}: expected one of {', '.join(found) or '(none exist)'}")
        wanted = profiles.merge_parameters(lab.profile, notebook, profiles.read_parameters(found[notebook]))
        if set(wanted) != set(parameters):
            raise ValueError(
                f"expected the parameters {', '.join(wanted)} of {notebook}, got {', '.join(parameters)}: pass them all"
            )
        self.lab, self.notebook = lab, notebook
        self.changed = [name for name, value in wanted.items() if parameters[name] != value]
        self.is_judged = not self.changed and lab.profile_name in set(measured) - {"smoke"}
        self._failed: list[str] = []

    @property
    def _reason(self) -> str:
        if self.changed:
            return f"not reproduced with your parameters ({', '.join(self.changed)} changed)"
        return f"not judged in profile {self.lab.profile_name}"

    def invariant(self, text: str, condition: Any) -> None:
        """Assert what must hold whatever the parameters are.

        Raises:
            AssertionError: it does not hold.
        """
        assert bool(condition), f"invariant does not hold: {text}"
        print(f"holds    {text}")

    def finding(self, text: str, value: float, low: float, high: float) -> None:
        """Compare a number with its band; ``finish`` raises when it lies outside in a judged run.

        Args:
            text: what was found, for example ``"AUC of PartCrop on MAE"``.
            value: the number of this run.
            low, high: band in which it lies in every profile that is judged.
        """
        inside = math.isfinite(value) and low <= value <= high
        line = f"{text}: {value:.3g}, band [{low:g}, {high:g}]"
        if inside:
            print(f"found    {line}")
        elif self.is_judged:
            self._failed.append(line)
            print(f"OUTSIDE  {line}")
        else:
            print(f"open     {line}; {self._reason}")

    def controls(self, results: Iterable[Result], *, level: float = 0.01) -> pd.DataFrame:
        """Judge all distinct control rows jointly: Holm at a family level of 1 % must reject none.

        Rows of the controlled protocol only: under a released protocol the no-model control is *meant* to succeed.

        Args:
            results: attack results with their controls.
            level: chance that any sound control is rejected.

        Returns:
            DataFrame ``control, auc, could_have_seen, p, p_holm, rejected``.
        """
        rows: dict[str, Result] = {}
        seen: set[bytes] = set()
        for result in results:
            if result.meta.get("protocol", "controlled") != "controlled":
                continue
            for name, control in result.controls.items():
                digest = hashlib.blake2b(np.ascontiguousarray(control.score).tobytes(), digest_size=16)
                digest.update(np.ascontiguousarray(control.is_member).tobytes())
                # one no-model row serves all attacks on a split, and the same row beside two attacks is one row
                if control.metrics is None or digest.digest() in seen:
                    continue
                seen.add(digest.digest())
                beside = f"{result.attack} on {result.meta.get('model_id', result.meta.get('model'))}"
                label = f"{name}, {beside}"
                while label in rows:
                    label += " (other settings)"
                rows[label] = control
        table = intervals.judge_controls(rows, level=level)
        table.insert(1, "auc", [r.auc for r in rows.values()])
        table.insert(2, "could_have_seen", [0.5 + r.half_width for r in rows.values()])
        failed = table[table["rejected"]]
        if not len(table):
            print("open     no control was run")
        for row in failed.itertuples():
            line = f"control {row.control} gives AUC {row.auc:.3f} (p {row.p:.2g}, after Holm {row.p_holm:.2g})"
            print(f"CONTROL FAILED  {line}: what the attack says cannot be trusted until this is explained")
            if self.is_judged:
                self._failed.append(line)
        if len(table) and not len(failed):
            print(
                f"holds    {len(table)} distinct control row{'s' * (len(table) != 1)}, none rejected at {level:g} "
                f"(Holm); each could have seen an AUC of {table['could_have_seen'].max():.2f}"
            )
        return table

    def finish(self, line: str, *, hero: str = "") -> None:
        """Print the finding line, the last line of a notebook, and raise what failed.

        Args:
            line: the finding, without the notebook's number and the path.
            hero: file stem of the hero picture; default ``figNN_hero``.

        Raises:
            AssertionError: the hero picture was not written, or a finding or a control failed in a judged run.
        """
        number = self.notebook[:2]
        name = f"{hero or f'fig{number}_hero'}.png"
        path = paths.get_figures_dir(self.lab.profile_name) / name
        assert path.is_file(), f"invariant does not hold: {name} was written in this run"
        assert not self._failed, "; ".join(self._failed)
        print(f"FINDING {number} {' '.join(line.split())} -> figures/{self.lab.profile_name}/{name}", flush=True)


# ------------------------------------------------------------------------------------------- notebook 00: a game


def is_interactive() -> bool:
    """Whether somebody sits at this notebook: a front end allows questions, papermill does not."""
    try:
        from IPython import get_ipython

        parent = get_ipython().kernel.get_parent("shell")
        return bool(parent["content"].get("allow_stdin"))
    except (AttributeError, KeyError, TypeError, ImportError):
        return False


def pick_game(split: Split, n_pictures: int, *, fold: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw the pictures of "spot the member": half members, half strangers, before any score is known.

    All come from one fold of the cross-fitting, so that one attacker judges them all: scores of different attackers
    must not be ranked together.

    Args:
        split: the target's split.
        n_pictures: how many pictures; fewer where the fold has not enough members.
        fold: fold whose report images are drawn from.

    Returns:
        index (n,) int64 into the pool, shuffled; is_member (n,) bool.
    """
    from mia_utils import seeds

    roles = split.roles("partial")
    rng = seeds.rng(split.seed, "spot-the-member")
    here = np.flatnonzero(roles.fold == fold)
    members, strangers = here[roles.is_member[here]], here[~roles.is_member[here]]
    n = min(n_pictures // 2, len(members), len(strangers))
    picked = rng.permutation(np.concatenate([rng.choice(part, n, replace=False) for part in (members, strangers)]))
    return roles.index[picked], roles.is_member[picked]


def rank_among_strangers(result: Result, image_ids: np.ndarray) -> np.ndarray:
    """Return the share of strangers that score lower than each image, judged by the same attacker.

    Args:
        result: an attack's result.
        image_ids: (n,) images of the result.

    Returns:
        (n,) float in [0, 1], higher = more likely a member.
    """
    position = {image_id: i for i, image_id in enumerate(result.image_ids.tolist())}
    rows = np.array([position[str(image_id)] for image_id in image_ids])
    shares = []
    for row in rows:
        strangers = result.score[(result.fold == result.fold[row]) & ~result.is_member]
        # a stranger does not compete with itself, and a tie counts one half, as in the AUC
        others = len(strangers) - int(not result.is_member[row])
        ties = np.sum(strangers == result.score[row]) - int(not result.is_member[row])
        shares.append((np.sum(strangers < result.score[row]) + 0.5 * ties) / max(others, 1))
    return np.array(shares)


def play(images: np.ndarray, is_member: np.ndarray):
    """Let the reader guess: click on the pictures that trained the model, then on "How did I do?".

    Args:
        images: (n, H, W, 3) uint8.
        is_member: (n,) bool, half of them True.

    Returns:
        ipywidgets box; None (and one printed sentence) where nobody can click, as when papermill runs the notebook.
    """
    if not is_interactive():
        print("In JupyterLab you can click here. This copy was executed without a reader: guess from the picture.")
        return None
    import ipywidgets as widgets
    from PIL import Image

    cards, toggles = [], []
    for number, image in enumerate(images, 1):
        buffer = io.BytesIO()
        Image.fromarray(image).resize((96, 96), Image.Resampling.NEAREST).save(buffer, format="PNG")
        picture = widgets.Image(value=buffer.getvalue(), format="png", width=96, height=96)
        toggle = widgets.ToggleButton(description=f"{number}", tooltip="a member?", layout={"width": "96px"})
        toggles.append(toggle)
        cards.append(widgets.VBox([picture, toggle]))
    n_members = int(np.sum(is_member))
    answer = widgets.HTML(f"Choose the {n_members} pictures that trained the model.")

    def judge(_) -> None:
        chosen = np.array([toggle.value for toggle in toggles])
        found = int((chosen & is_member).sum())
        answer.value = (
            f"You chose {int(chosen.sum())} pictures; {found} of the {n_members} members are among them. "
            f"Pure guessing finds {n_members / 2:g} on average when you choose {n_members}."
        )
        for toggle, member in zip(toggles, is_member, strict=True):
            toggle.button_style = "danger" if member else ""

    button = widgets.Button(description="How did I do?")
    button.on_click(judge)
    grid = widgets.GridBox(cards, layout={"grid_template_columns": f"repeat({min(10, len(images))}, 100px)"})
    return widgets.VBox([grid, button, answer])


# -------------------------------------------------------------------------------------- notebook 02: roles, ladder

_ROLE_NAMES = {
    "target_members": "target members",
    "target_nonmembers": "target strangers",
    "shadow_members": "shadow members",
    "shadow_nonmembers": "shadow strangers",
    "utility": "the rest",
}
_INK = "#333333"


@mpl.rc_context(plots.STYLE)
def draw_roles(split: Split, images: np.ndarray, *, title: str) -> tuple[Figure, pd.DataFrame]:
    """Draw who does what: the pool dealt into roles, an example of each, and what it is used for.

    Args:
        split: the split.
        images: (N, H, W, 3) uint8 of the pool.
        title: the idea in one sentence.

    Returns:
        figure, table ``role, n_images, trains, example``.
    """
    uses = {
        "target_members": "train the target",
        "target_nonmembers": "never seen by it",
        "shadow_members": "train the shadow",
        "shadow_nonmembers": "never seen by it",
        "utility": "measure accuracy",
    }
    width, pitch, box = plots.FULL, plots.FULL / 5, 0.86
    height = 3.15
    fig = Figure(figsize=(width, height))
    plots.set_title(fig, title)
    canvas = fig.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, width), ylim=(0, height))
    canvas.set_axis_off()
    records, top = [], 1.62
    for column, role in enumerate(_ROLE_NAMES):
        index = getattr(split, role)
        middle = (column + 0.5) * pitch
        color = plots.MEMBER_COLOR if role.endswith("_members") else plots.STRANGER_COLOR if column < 4 else "#777777"
        line = plots.STRANGER_LINE if role.endswith("nonmembers") else "-"
        canvas.text(middle, top + box + 0.2, _ROLE_NAMES[role], ha="center", fontsize=8, fontweight="bold", color=color)
        canvas.text(middle, top + box + 0.06, f"{len(index):,} images", ha="center", fontsize=7, color=_INK)
        if len(index):
            place = ((middle - box / 2) / width, top / height, box / width, box / height)
            ax = fig.add_axes(place, xticks=[], yticks=[])
            ax.imshow(images[index[0]])
            for spine in ax.spines.values():
                spine.set(visible=True, edgecolor=color, linewidth=2.2, linestyle=line)
        canvas.text(middle, top - 0.17, uses[role], ha="center", fontsize=7, color=_INK)
        records.append(
            {
                "role": role,
                "n_images": len(index),
                "trains": {"target_members": "target", "shadow_members": "shadow"}.get(role, ""),
                "example": int(index[0]) if len(index) else np.nan,
            }
        )
    for name, first, told in (
        ("target model", 0, "queried with target members and strangers: these scores are reported"),
        ("shadow model", 2, "the attacker's own: teaches him what member answers look like"),
    ):
        left = first * pitch + 0.12
        canvas.add_patch(
            Rectangle((left, 0.55), 2 * pitch - 0.24, 0.42, facecolor="#F1F1F1", edgecolor=_INK, linewidth=0.9)
        )
        canvas.text(left + pitch - 0.12, 0.76, name, ha="center", va="center", fontsize=8.5, fontweight="bold")
        canvas.text(left + pitch - 0.12, 0.40, _wrap(told, 44), ha="center", va="top", fontsize=7, color=_INK)
        for column, style in ((first, "-"), (first + 1, (0, (3, 2)))):
            x = (column + 0.5) * pitch
            canvas.add_patch(
                FancyArrowPatch(
                    (x, top - 0.24),
                    (x, 1.0),
                    arrowstyle="-|>",
                    mutation_scale=9,
                    linewidth=1.0,
                    linestyle=style,
                    color=_INK,
                )
            )
            canvas.text(x + 0.08, 1.16, "trains" if style == "-" else "only queries", fontsize=6.5, color=_INK)
    return fig, pd.DataFrame(records)


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def make_rung_pair(pool: Any, rung: str, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, str, str] | None:
    """Make the two pictures that a rung of the blind ladder sets side by side.

    Args:
        pool: the data set.
        rung: as in ``lab.evaluate_blind``.
        seed: which pictures.

    Returns:
        member's picture and stranger's picture (H, W, 3) as the attacker sees them, and a word under each; None where
        the pool has no such pair.
    """

    from mia_utils import seeds
    from mia_utils.models import views

    one, other = seeds.rng(seed, "ladder-pair").choice(len(pool), 2, replace=False)
    if rung == "released-view":
        pixels = views.read_pixels(pool.images, [one])
        side = pool.images.shape[1]
        view = views.make_views(pixels, [pool.image_ids[one]], view="random_resized_crop", size=side, seed=seed)
        return view[0].permute(1, 2, 0).numpy(), pool.images[other], "cropped", "whole"
    if rung == "controlled":
        return pool.images[one], pool.images[other], "whole", "whole"
    if rung == "released-split" and pool.official_split is not None:
        parts = [np.flatnonzero(pool.official_split == name) for name in ("train", "test")]
        if all(map(len, parts)):
            return (
                pool.images[parts[0][one % len(parts[0])]],
                pool.images[parts[1][other % len(parts[1])]],
                "train",
                "test",
            )
    if rung in ("frame-thirds", "iid-frames") and pool.groups is not None:
        frames = np.flatnonzero(pool.groups == pool.groups[one])
        if len(frames) > 1:
            return pool.images[frames[0]], pool.images[frames[1]], "a frame", "the next"
    return None


@mpl.rc_context(plots.STYLE)
def draw_ladder_hero(
    table: pd.DataFrame, pairs: Mapping[tuple[str, str], tuple], *, title: str
) -> tuple[Figure, pd.DataFrame]:
    """Draw the blind ladder with what each rung shows: two pictures, then the bar of an attacker without a model.

    Args:
        table: the table of ``fig02_blind_ladder``.
        pairs: (rung, data set) -> what ``make_rung_pair`` made; a rung without a pair has no pictures.
        title: the finding.

    Returns:
        figure, table.
    """
    rungs = list(dict.fromkeys(zip(table["rung"], table["dataset"], table["label"], strict=True)))
    n, side, pitch, head, foot = len(rungs), 0.64, 0.86, 0.52, 0.5
    width, height = plots.FULL, head + n * pitch + foot
    fig = Figure(figsize=(width, height))
    plots.set_title(fig, title)
    left = 3.62  # inches: two pictures, then the names of the rungs
    ax = fig.add_axes((left / width, foot / height, (width - left - 1.0) / width, n * pitch / height))
    wrapped = table.assign(label=[_wrap(str(label), 24) for label in table["label"]])
    plots.draw_ladder(ax, wrapped)
    ax.set_ylim(n - 0.5, -0.5)
    ax.set_xlabel("AUC without any model", fontsize=8)
    for row, (rung, dataset, _) in enumerate(rungs):
        pair = pairs.get((rung, dataset))
        if pair is None:
            continue
        low = foot + (n - 1 - row) * pitch + 0.18
        for column, (image, word) in enumerate(zip(pair[:2], pair[2:], strict=True)):
            x = 0.18 + column * (side + 0.12)
            small = fig.add_axes((x / width, low / height, side / width, side / height), xticks=[], yticks=[])
            small.imshow(image)
            color, line = ((plots.MEMBER_COLOR, "-"), (plots.STRANGER_COLOR, plots.STRANGER_LINE))[column]
            for spine in small.spines.values():
                spine.set(visible=True, edgecolor=color, linewidth=2.0, linestyle=line)
            fig.text(
                (x + side / 2) / width, (low - 0.03) / height, word, ha="center", va="top", fontsize=6.5, color=_INK
            )
    for column, (word, color) in enumerate((("member", plots.MEMBER_COLOR), ("stranger", plots.STRANGER_COLOR))):
        x = 0.18 + column * (side + 0.12) + side / 2
        fig.text(
            x / width,
            (foot + n * pitch + 0.02) / height,
            word,
            ha="center",
            fontsize=7.5,
            fontweight="bold",
            color=color,
        )
    return fig, table


def climb_ladder(lab: Any, ladder: Iterable[tuple[str, str]], *, n_members: int) -> dict[tuple[str, str], list[Result]]:
    """Measure every rung of the blind ladder with every seed of the profile.

    Args:
        lab: what ``experiments.open`` returned.
        ladder: (data set, rung) pairs.
        n_members: members per role.

    Returns:
        (data set, rung) -> one result per seed. A data set that is not here is skipped with a sentence.
    """
    found: dict[tuple[str, str], list[Result]] = {}
    for dataset, rung in ladder:
        try:
            lab.replay or lab.pool(dataset)
        except (FileNotFoundError, ValueError) as reason:
            print(f"skipped: {rung} on {dataset}, {reason}")
            continue
        seeds = lab.profile.seeds
        found[dataset, rung] = [lab.evaluate_blind(dataset, rung, n_members=n_members, seed=seed) for seed in seeds]
    return found

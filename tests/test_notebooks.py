"""Every notebook has the anatomy of the book, names its defaults as profile quick does, and runs in profile smoke."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from mia_utils import course, paths
from mia_utils.runner import parameters, profiles

FOLDER = paths.PACKAGE_ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
HEADINGS = [
    "What you will learn",
    "Parameters",
    "Setup",
    "The attack in one picture",
    "Theory",
    "Predict",
    "Run",
    "Figure",
    "Exercises",
    "Checks",
    "References",
]
BANNED = {
    r"^\s*!": "shell commands",
    r"^\s*%": "magics",
    r"sys\.path": "sys.path",
    r"import \*": "star imports",
    r"filterwarnings|simplefilter|catch_warnings": "silenced warnings",
    r"[\"'(`]/(?!/)\w+/": "absolute paths",
    r"[\"'][A-Za-z]:\\\\": "absolute paths",
    r"https?://(?!(doi|arxiv)\.org)[^\s)]*(index|simple|mirror)": "package indexes",
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
each_file = pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")


def read_cells(path: Path) -> list[SimpleNamespace]:
    """Cells with their section: ``kind, text, tags, section, raw``."""
    cells, section = [], ""
    for raw in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(raw["source"])
        if raw["cell_type"] == "markdown":
            section = ([section] + re.findall(r"^## (.+)$", text, flags=re.M))[-1]
        tags = raw["metadata"].get("tags", [])
        cells.append(SimpleNamespace(kind=raw["cell_type"], text=text, tags=tags, section=section, raw=raw))
    return cells


def join(cells: list[SimpleNamespace], *, kind: str = "", section: str = "") -> str:
    return "\n".join(c.text for c in cells if c.kind.startswith(kind) and c.section.startswith(section))


# ------------------------------------------------------------------------------------------------------ anatomy


def test_there_are_notebooks_and_each_has_its_solutions():
    assert NOTEBOOKS and [p.stem for p in SOLUTIONS] == [
        p.stem for p in NOTEBOOKS if "answer = None" in join(read_cells(p))
    ]


@each_notebook
def test_the_title_asks_a_question_and_says_needs_writes_time(path):
    first = read_cells(path)[0].text
    assert re.match(rf"# {path.stem[:2]} · .+\?\n", first), first.splitlines()[0]
    assert [word for word in ("*Needs*", "*Writes*", "*Time*") if word not in first] == []
    assert re.search(r"^\*Time\*: [^.;]*(\d|under a)[^.;]* (second|minute)", first, flags=re.M), "no time in *Time*"


@each_notebook
def test_the_headings_come_in_the_order_of_the_book(path):
    assert re.findall(r"^## (.+)$", join(read_cells(path), kind="markdown"), flags=re.M) == HEADINGS


@each_notebook
def test_it_says_what_one_learns_in_three_to_five_verbs(path):
    bullets = re.findall(r"^- .+$", join(read_cells(path), section="What you will learn"), flags=re.M)
    assert 3 <= len(bullets) <= 5 and all(re.match(r"- \*\*[A-Z]", bullet) for bullet in bullets)


@each_notebook
def test_parameters_are_plain_literals_one_a_line(path):
    cells = read_cells(path)
    (cell,) = [c for c in cells if "parameters" in c.tags]
    assert cell.section == "Parameters" and cell.text.splitlines()[0] == 'profile = "quick"'
    for line in cell.text.splitlines():
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name), line
        ast.literal_eval(statement.value)
    assert "#" in cell.text, "say what the parameters are, and the paper's values"


@each_file
def test_cells_are_short_and_each_has_a_sentence_before_it(path):
    cells = read_cells(path)
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell.kind == "code":
            lines = [line for line in cell.text.splitlines() if line.strip()]
            limit = 12 if cell.section == "Setup" else 25
            assert len(lines) <= limit, f"{len(lines)} lines in {cell.section}: {lines[0]}"
            assert before.kind == "markdown", f"no prose before {lines[0]!r}"


@each_file
def test_it_is_committed_without_outputs(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["metadata"]["kernelspec"]["name"] == "python3" and content["nbformat"] == 4
    assert not set(content["metadata"]) - {"kernelspec", "language_info"}
    for cell in content["cells"]:
        assert not set(cell["metadata"]) - {"tags"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@each_file
def test_it_uses_nothing_that_works_on_one_machine_only(path):
    for cell in read_cells(path):
        for pattern, what in BANNED.items():
            found = re.search(pattern, cell.text, flags=re.M) if cell.kind == "code" else None
            assert not found, f"{what} in {cell.section}: {found.group()!r}"


@each_notebook
def test_theory_holds_equations_a_symbol_table_and_an_asserted_toy(path):
    theory = [c for c in read_cells(path) if c.section == "Theory"]
    text = join(theory, kind="markdown")
    assert "$$" in text and "| symbol | name | shape |" in text
    assert re.search(r"\\tag\{\d|\(\d\)", text), "number the equations as the paper does"
    assert "assert " in join(theory, kind="code")


@each_notebook
def test_figures_come_hero_first_and_beside_the_committed_pictures(path):
    number, figure = path.stem[:2], [c for c in read_cells(path) if c.section == "Figure"]
    shown = re.findall(r"!\[[^\]]+\]\(\.\./figures/photos/(fig\d\d_\w+)\.png\)", join(figure, kind="markdown"))
    own = [name for name in shown if name.startswith(f"fig{number}_")]
    assert own and shown[0] == f"fig{number}_hero" and (own == shown or number == "08")  # 08 gathers what others drew
    said = join(figure, kind="markdown").lower()
    assert "how to read it" in said and "prove us wrong" in said


@each_notebook
def test_exercises_are_open_and_known(path):
    text = join(read_cells(path), kind="code", section="Exercises")
    asked = re.findall(r'check\("(\d\d-\d)", answer', text)
    assert asked == [f"{path.stem[:2]}-{i}" for i in range(1, len(asked) + 1)]
    assert 2 <= len(asked) <= 3 and text.count("answer = None") == len(asked)
    assert set(asked) <= set(course.ANSWERS)
    answered = re.findall(r'check\("(\d\d-\d)"', join(read_cells(FOLDER / "solutions" / path.name), kind="code"))
    assert answered == asked


@each_notebook
def test_checks_are_the_last_code_and_end_in_the_finding(path):
    code = [c for c in read_cells(path) if c.kind == "code"]
    assert "checks" in code[-1].tags and code[-1].section == "Checks" and sum("checks" in c.tags for c in code) == 1
    last = ast.parse(code[-1].text).body[-1]
    assert ast.unparse(last).startswith("checks.finish(") and ".invariant(" in code[-1].text


# --------------------------------------------------------------------------------------------------- parameters


@each_notebook
def test_the_defaults_are_profile_quick(path):
    defaults = parameters.read_parameters(path)
    quick = profiles.load("quick")
    assert parameters.merge_parameters(quick, path.stem, defaults) == defaults


@each_notebook
@pytest.mark.parametrize("name", [name for name in profiles.list_names() if name != "paper"])
def test_every_profile_fits_the_notebook(path, name):
    merged = parameters.merge_parameters(profiles.load(name), path.stem, parameters.read_parameters(path))
    assert merged["profile"] == name


@each_solution
def test_solutions_take_the_notebooks_parameters(path):
    own, notebook = parameters.read_parameters(path), parameters.read_parameters(FOLDER / path.name)
    assert own == {name: notebook[name] for name in own}


# ---------------------------------------------------------------------------------------------------- execution


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """One run of profile smoke in a home of its own: rows trained once, all notebooks executed, two jobs at a time."""
    home = tmp_path_factory.mktemp("a home")
    environment = {k: v for k, v in os.environ.items() if k not in ("MIA_DATA_DIR", "MIA_ARTIFACTS")}
    environment |= {"MIA_HOME": str(home), "JUPYTER_PREFER_ENV_PATH": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "mia_utils.runner.run", "smoke"]
    run = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    build = home / "build" / "smoke"

    def execute(path: Path) -> dict:
        merged = parameters.merge_parameters(
            profiles.load("smoke"), path.stem, parameters.read_parameters(FOLDER / path.name)
        )
        own = {name: merged[name] for name in parameters.read_parameters(path)}
        names = [
            str(path),
            str(build / f"solution-{path.stem}.ipynb"),
            str(build / "logs" / f"solution-{path.stem}.log"),
        ]
        code = (
            "import json, pathlib, sys; from mia_utils.runner import jobs; p = list(map(pathlib.Path, sys.argv[1:4])); "
            "print(json.dumps(jobs.run_notebook(p[0], p[1], json.loads(sys.argv[4]), p[2])))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *names, json.dumps(own)], env=environment, capture_output=True, text=True
        )
        outcome = (
            json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {"ok": False, "message": done.stderr}
        )
        return outcome | {"executed": names[1]}

    with ThreadPoolExecutor(2) as workers:
        solutions = dict(zip((p.stem for p in SOLUTIONS), workers.map(execute, SOLUTIONS), strict=True))
    return SimpleNamespace(home=home, build=build, run=run, solutions=solutions)


def read_prints(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "stream" and o["name"] == "stdout"]
    return [line for o in outputs for line in "".join(o["text"]).splitlines()]


def test_profile_smoke_runs_to_its_end(smoke):
    assert smoke.run.returncode == 0, smoke.run.stdout[-3000:] + smoke.run.stderr[-3000:]


@each_notebook
def test_the_notebook_runs_and_ends_in_its_finding(smoke, path):
    status = json.loads((smoke.build / "status" / f"{path.stem}.json").read_text())
    assert status["ok"], f"section {status['section']!r}: {status['message']}"
    number = path.stem[:2]
    last = read_prints(smoke.build / f"{path.stem}.ipynb")[-1]
    assert re.fullmatch(rf"FINDING {number} .+ -> figures/smoke/fig{number}_\w+\.png", last), last
    assert status["finding"] in smoke.run.stdout


@each_notebook
def test_the_hero_and_every_other_figure_has_its_numbers(smoke, path):
    folder = smoke.home / "figures" / "smoke"
    drawn = {p.stem for p in folder.glob(f"fig{path.stem[:2]}_*.png")}
    assert f"fig{path.stem[:2]}_hero" in drawn and drawn == {p.stem for p in folder.glob(f"fig{path.stem[:2]}_*.csv")}


@each_solution
def test_the_solutions_are_right(smoke, path):
    outcome = smoke.solutions[path.stem]
    assert outcome["ok"], outcome["message"]
    judged = [line for line in read_prints(Path(outcome["executed"])) if re.match(r"\d\d-\d: ", line)]
    assert judged and all(line.endswith(": right") for line in judged), judged

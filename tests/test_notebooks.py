"""Every notebook has the anatomy of the book, names its defaults as profile quick does, and runs in profile smoke."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from mia_utils import course, paths
from mia_utils.runner import parameters, profiles

ROOT = paths.PACKAGE_ROOT
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
TEXTS = [ROOT / "README.md", FOLDER / "COURSE.md", *sorted((ROOT / "docs").glob("*.md"))]
HEADINGS = ["What you will learn", "Parameters", "Setup", "By hand", "Predict", "Experiments", "Exercises", "Checks"]
HEADINGS += ["Recap", "Further reading"]
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
WORDS = (  # left column of the table of words, whole words; what may stand is below
    r"strangers?|pictures?|(?-i:he|him|his)|films?|betrays?|by heart|glows?|dealt|by lot|dealings?|blind ladder|rungs?"
    r"|untrained twins?|void|holds \.5|could have seen|turned around|accused|false alarms|share found|the truth"
    r"|true classes|what it is good for|pays for its controls|put to rest|a wish|own decoder|is asked|victims?|grey"
    r"|remembers?|turned round|accus(?:e|es|ing|ation|ations)|good for something"
)
ALLOWED = {"00": {"stranger", "strangers"}, "06": {"victim"}, "08": {"false alarms"}}  # the statistical term in 08
HEAVY = {"torch", "torchvision", "timm", "lightly", "opacus"}  # what only cells tagged run may import

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
each_file = pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")


@cache
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


def test_there_are_nine_notebooks_and_each_has_its_solutions():
    assert [p.stem for p in SOLUTIONS] == [p.stem for p in NOTEBOOKS] and len(NOTEBOOKS) == 9


@each_notebook
def test_the_title_asks_a_question_and_says_needs_writes_time_and_where_one_is(path):
    first = read_cells(path)[0].text
    assert re.match(rf"# {path.stem[:2]} · .+\?\n", first), first.splitlines()[0]
    found = dict(re.findall(r"^- \*(\w+)\*: (.+)$", first, flags=re.M))
    assert list(found) == ["Needs", "Writes", "Time"]
    assert re.search(r"(\d|one|two|few|under a).* (seconds?|minutes?)", found["Time"]), "no time in *Time*"
    assert re.search(rf"^00 .+\*\*{path.stem[:2]} .+\*\*|^\*\*00 .+\*\* >", first, flags=re.M), "no map of the book"


@each_notebook
def test_the_headings_come_in_the_order_of_the_book(path):
    found = re.findall(r"^## (.+)$", join(read_cells(path), kind="markdown"), flags=re.M)
    assert [head for head in found if head in HEADINGS] == HEADINGS
    assert [head for head in found if head not in HEADINGS] == [] or path.stem.startswith(
        "00"
    )  # it opens with the game
    experiments = [c.text for c in read_cells(path) if c.section == "Experiments" and c.kind == "markdown"]
    assert len(re.findall(r"^### .+$", "\n".join(experiments), flags=re.M)) >= 2


@each_notebook
def test_it_says_what_one_learns_in_three_to_five_verbs(path):
    bullets = re.findall(r"^- .+$", join(read_cells(path), section="What you will learn"), flags=re.M)
    assert 3 <= len(bullets) <= 5 and all(re.match(r"- \*\*[A-Z]", bullet) for bullet in bullets)


@each_notebook
def test_parameters_are_at_most_eight_plain_literals_one_a_line(path):
    (cell,) = [c for c in read_cells(path) if "parameters" in c.tags]
    assert cell.section == "Parameters" and cell.text.splitlines()[0] == 'profile = "quick"'
    for line in cell.text.splitlines():
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name), line
        ast.literal_eval(statement.value)
    assert len(cell.text.splitlines()) <= 8
    assert "#" in cell.text or cell.text.count("\n") == 0, "say what the parameters are, and the paper's values"


@each_file
def test_cells_are_short_and_each_has_a_sentence_before_it(path):
    cells = read_cells(path)
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell.kind == "code":
            lines = [line for line in cell.text.splitlines() if line.strip()]
            limit = 15 if "checks" not in cell.tags else 22
            assert len(lines) <= limit, f"{len(lines)} lines in {cell.section}: {lines[0]}"
            wide = [line for line in lines if len(line) > (120 if "parameters" in cell.tags else 99)]
            assert not wide, f"wide line in {cell.section}: {wide}"
            assert before.kind == "markdown" and before.text.strip(), f"no prose before {lines[0]!r}"


@each_notebook
def test_a_run_is_followed_by_what_it_found(path):
    """Within the next two code cells stands a figure, a table or a printed number; unless the run prints one itself."""
    code = [c for c in read_cells(path) if c.kind == "code"]
    for i, cell in enumerate(code):
        if "run" in cell.tags and cell.section == "Experiments":
            near = code[i : i + 3]
            last = [ast.unparse(ast.parse(c.text).body[-1]) for c in near]
            shown = any("figure" in c.tags or "print(" in c.text or "plots." in c.text for c in near)
            assert shown or any(not line.startswith(("lab.run", "import")) for line in last), cell.text.splitlines()[0]


@each_notebook
def test_figures_are_written_under_the_notebooks_number_and_named_once(path):
    text = join(read_cells(path), kind="code")
    names = re.findall(r"name=\"(fig\d\d_\w+)\"", text)
    assert f"fig{path.stem[:2]}_hero" in names and len(set(names)) == len(names)
    assert all(name.startswith(f"fig{path.stem[:2]}_") for name in names)
    for title in re.findall(r"title=\"([^\"]+)\"", text):
        assert len(title) <= 90 and len(re.findall(r"\d[\d.,]*", title)) <= 2, title
    for cell in read_cells(path):
        assert "figure" not in cell.tags or re.search(r"plots\.\w+\(|lab\.", cell.text), cell.text


@each_notebook
def test_what_is_not_tagged_run_needs_no_model(path):
    for cell in read_cells(path):
        if cell.kind == "code" and "run" not in cell.tags:
            found = set(re.findall(r"^\s*(?:from|import) (\w+)", cell.text, flags=re.M))
            assert not found & HEAVY, f"{found & HEAVY} in {cell.section}"
            calls = re.findall(r"lab\.(run|model|pool|split|measure|run_baselines)\(", cell.text)
            assert not calls, f"lab.{calls} outside a run cell in {cell.section}"


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
def test_by_hand_holds_equations_a_symbol_table_and_ends_equal_to_the_package(path):
    cells = [c for c in read_cells(path) if c.section == "By hand"]
    text, code = join(cells, kind="markdown"), join(cells, kind="code")
    assert "| symbol | name | shape |" in text and "$$" in text and re.search(r"\\tag\{\d|\(\d\)", text)
    assert "assert " in code and "print(" in code


@each_notebook
def test_exercises_are_open_and_answered(path):
    number = path.stem[:2]
    code, text = (join(read_cells(path), kind=kind, section="Exercises") for kind in ("code", "markdown"))
    asked = re.findall(r'check\("(\d\d-\d)", answer', code)
    assert asked == [f"{number}-{i}" for i in range(1, len(asked) + 1)] and 2 <= len(asked) <= 3
    assert code.count("answer = None") == len(asked)
    every = re.findall(rf"\*\*({number}-\d)\.?\*\*", text)
    assert len(every) >= len(asked) + 1, "no open exercise"
    assert set(asked) <= set(course.load_answers(number))
    solved = read_cells(FOLDER / "solutions" / path.name)
    assert re.findall(r'check\("(\d\d-\d)"', join(solved, kind="code")) == asked


@each_notebook
def test_checks_are_the_last_code_and_end_in_the_finding(path):
    code = [c for c in read_cells(path) if c.kind == "code"]
    assert "checks" in code[-1].tags and code[-1].section == "Checks" and sum("checks" in c.tags for c in code) == 1
    last = ast.parse(code[-1].text).body[-1]
    assert ast.unparse(last).startswith("checks.finish(")
    assert any(".invariant(" in c.text for c in code if c.section == "Checks")


# ------------------------------------------------------------------------------------------------ words and links


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS, *TEXTS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_words_are_those_of_the_field(path):
    text = join(read_cells(path)) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    text = re.sub(r"\]\([^)]*\)|`[^`]*`|“[^”]*”", " ", text)  # links, names of the code and quotations are not ours
    number = path.stem[:2]
    found = [word.lower() for word in re.findall(rf"\b({WORDS})\b", text, flags=re.I)]
    once = ALLOWED.get(number, set())
    left = [word for word in found if word not in once]
    assert not left and all(found.count(word) <= 3 for word in once), sorted(set(left))


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS, *TEXTS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_links_and_images_exist_and_images_have_alternative_text(path):
    text = join(read_cells(path), kind="markdown") if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    for mark, alt, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        assert alt or not mark, f"no alternative text: {target}"
        if not re.match(r"https?:|#|mailto:|attachment:", target):
            place = (path.parent / target.partition("#")[0]).resolve()
            # docs/NN_*.md are written by replay, one for each notebook
            written = place.parent == ROOT / "docs" and (FOLDER / f"{place.stem}.ipynb").is_file()
            assert place.exists() or written, f"{path.name} links {target}"


# --------------------------------------------------------------------------------------------------- parameters


@each_notebook
def test_the_defaults_are_profile_quick(path):
    defaults = parameters.read_parameters(path)
    assert parameters.merge_parameters(profiles.load("quick"), path.stem, defaults) == defaults


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

SOLVE = """
import json, os, sys
from pathlib import Path
from mia_utils import replay
os.chdir(sys.argv[1])
for name, given in json.load(sys.stdin).items():
    try:
        shown = replay.execute(Path(name + ".ipynb"), given, skip=set())
        text = "\\n".join(output or "" for _, output in shown)
    except Exception as error:
        text = f"failed: {error}"
    print(json.dumps({"name": name, "text": text}), flush=True)
"""


@pytest.fixture(scope="session")
def smoke(smoke_run):
    """The run of profile smoke that began with the session (conftest), and then all solutions in one process."""
    home, process, log = smoke_run
    process.wait()
    environment = process.environment | {"MPLBACKEND": "agg"}
    given = {}
    for path in SOLUTIONS:
        defaults = parameters.read_parameters(FOLDER / path.name)
        merged = parameters.merge_parameters(profiles.load("smoke"), path.stem, defaults)
        given[path.stem] = {name: merged[name] for name in parameters.read_parameters(path)}
    command = [sys.executable, "-c", SOLVE, str(FOLDER / "solutions")]
    done = subprocess.run(command, input=json.dumps(given), env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    solutions = {line["name"]: line["text"] for line in lines}
    missing = f"did not run: {done.stderr[-1500:]}"
    said = log.read_text(encoding="utf-8", errors="replace")
    run = SimpleNamespace(returncode=process.returncode, said=said)
    solved = {path.stem: solutions.get(path.stem, missing) for path in SOLUTIONS}
    return SimpleNamespace(home=home, build=home / "build" / "smoke", run=run, solutions=solved)


def read_prints(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "stream" and o["name"] == "stdout"]
    return [line for o in outputs for line in "".join(o["text"]).splitlines()]


def test_profile_smoke_runs_to_its_end(smoke):
    assert smoke.run.returncode == 0, smoke.run.said[-3000:]


@each_notebook
def test_the_notebook_runs_and_ends_in_its_finding(smoke, path):
    status = json.loads((smoke.build / "status" / f"{path.stem}.json").read_text())
    assert status["ok"], f"section {status['section']!r}: {status['message']}"
    number = path.stem[:2]
    last = read_prints(smoke.build / f"{path.stem}.ipynb")[-1]
    assert re.fullmatch(rf"FINDING {number} .+ -> figures/smoke/fig{number}_\w+\.png", last), last
    assert status["finding"] in smoke.run.said


@each_notebook
def test_the_hero_and_every_other_figure_has_its_numbers(smoke, path):
    folder = smoke.home / "figures" / "smoke"
    drawn = {p.stem for p in folder.glob(f"fig{path.stem[:2]}_*.png")}
    assert f"fig{path.stem[:2]}_hero" in drawn and drawn == {p.stem for p in folder.glob(f"fig{path.stem[:2]}_*.csv")}


@each_solution
def test_the_solutions_are_right(smoke, path):
    judged = re.findall(r"^\d\d-\d: .+$", smoke.solutions[path.stem], flags=re.M)
    assert judged and all(line.endswith(": right") for line in judged), smoke.solutions[path.stem][-1500:]

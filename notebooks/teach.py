"""For the lecturer: a deck of key figures, and a graded version of the notebooks.

    python notebooks/teach.py deck [PROFILE]   # figures/PROFILE/deck.html: 12 slides in one file; print it for a PDF
    python notebooks/teach.py graded DIR       # DIR/source for nbgrader, DIR/release for students: no answers in it

Run it in the project's environment, from anywhere in a checkout.
"""

from __future__ import annotations

import argparse
import base64
import copy
import html
import json
import re
import sys
from pathlib import Path

import nbformat

from mia_utils import course, page, paths
from mia_utils.runner import parameters

KEY_FIGURES = """fig00_game fig00_roc fig01_losses fig02_hero fig03_hero fig03_released fig04_epochs fig04_framing
fig05_similarities fig05_knowledge fig06_attackers fig07_hero fig08_hero fig08_use fig04_main fig07_adaptive
fig06_epochs fig05_hero fig00_hero""".split()
N_SLIDES = 12
POINTS = {"easy": 1, "medium": 2, "hard": 3}
STYLE = """body{margin:0;font:22px/1.4 system-ui,sans-serif;color:#1a1a1a;background:#fff}
section{height:100vh;box-sizing:border-box;padding:3vh 4vw;display:flex;flex-direction:column;scroll-snap-align:start}
html{scroll-snap-type:y mandatory}h1{font-size:1.6em;margin:0 0 .4em}img{flex:1;min-height:0;object-fit:contain}
p{margin:.4em 0 0;font-size:.8em}small{color:#555}@page{size:297mm 167mm;margin:0}
@media print{section{height:167mm;break-after:page}section:last-child{break-after:auto}html{scroll-snap-type:none}}"""


def write_deck(profile: str) -> Path:
    """Write ``figures/<profile>/deck.html``, one file with its images; the first 12 key figures that are drawn."""
    drawn = {figure["name"]: figure for figure in page.read_figures(profile)}
    chosen = sorted([name for name in KEY_FIGURES if name in drawn][:N_SLIDES])
    if not chosen:
        raise ValueError(f"figures/{profile}: expected drawn figures, got none; first ./run_all.sh {profile}")
    questions, slides = {c["number"]: c["title"] for c in page.read_chapters()}, []
    for number, name in enumerate(chosen, start=1):
        figure = drawn[name]
        data = base64.b64encode((paths.get_figures_dir(profile) / figure["file"]).read_bytes()).decode()
        said = {k: html.escape(figure[k][:1].upper() + figure[k][1:]) for k in ("read", "here", "caption")}
        question = html.escape(questions.get(figure["chapter"], ""))  # the image carries its finding as a title
        slides.append(
            f'<section><h1>{question}</h1><img src="data:image/png;base64,{data}" alt="{said["caption"]}">'
            f"<p>{said['read']}</p><p>{said['here']}</p>"
            f"<small>{number} / {len(chosen)} · notebook {figure['chapter']} · profile {profile}</small></section>"
        )
    text = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Membership inference on visual models</title>\
<meta name="viewport" content="width=device-width"><style>{STYLE}</style>{"".join(slides)}</html>\n'
    return paths.write_atomic(paths.get_figures_dir(profile) / "deck.html", text)


def grade_cells(notebook: nbformat.NotebookNode, number: str, *, hidden: bool) -> nbformat.NotebookNode:
    """Split each exercise into the student's cell and a locked test cell with points, in nbgrader's metadata.

    Args:
        notebook: a notebook of the course.
        number: ``"00"`` .. ``"08"``.
        hidden: keep the test that decides, between nbgrader's markers (for ``source``); False for students' copies.
    """
    notebook, cells, points = copy.deepcopy(notebook), [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            points |= {f"{number}-{i}": POINTS[word] for i, word in
                       re.findall(rf"\*\*{number}-(\d)\*\* \((easy|medium|hard)\)", cell.source)}  # fmt: skip
        if "exercise" not in cell.metadata.get("tags", []):
            cells.append(cell)
            continue
        work, _, call = cell.source.rpartition("\n")
        exercise, given = re.fullmatch(r'check\("(\d\d-\d)", answer(.*)\)', call).groups()
        cell.source, test = work, nbformat.v4.new_code_cell(call, id=f"test-{exercise}")
        for part, kind in ((cell, "answer"), (test, "test")):
            graded = kind == "test"
            part.metadata["nbgrader"] = {"schema_version": 3, "task": False, "grade_id": f"{kind}-{exercise}",
                                         "solution": not graded, "grade": graded, "locked": graded}  # fmt: skip
        test.metadata["nbgrader"]["points"] = points.get(exercise, 1)
        if hidden:
            test.source += (
                "\n### BEGIN HIDDEN TESTS\nfrom mia_utils.course import load_answers\n"
                f'assert load_answers("{number}")["{exercise}"][0](answer{given})\n### END HIDDEN TESTS'
            )
        cells += [cell, test]
    notebook.cells = cells
    return notebook


def write_graded(folder: Path) -> int:
    """Write ``source/`` and ``release/`` with every notebook; returns the points that can be had."""
    total = 0
    for name, path in parameters.find_notebooks().items():
        notebook = nbformat.read(path, as_version=4)
        for kind in ("source", "release"):
            graded = grade_cells(notebook, name[:2], hidden=kind == "source")
            paths.write_atomic(folder / kind / name / f"{name}.ipynb", nbformat.writes(graded) + "\n")
        total += sum(cell.metadata.get("nbgrader", {}).get("points", 0) for cell in graded.cells)
    wrong = {}  # what wrong answers come from: for whoever gives feedback
    for number in sorted(name[:2] for name in parameters.find_notebooks()):
        answers = course.load_answers(number) or {}
        wrong[number] = {e: {str(k): v for k, v in a[2].items()} for e, a in answers.items() if len(a) > 2}
    paths.write_atomic(folder / "source" / "wrong_answers.json", json.dumps(wrong, indent=1) + "\n")
    return total


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2: bad input)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("deck", help="12 slides in one HTML file").add_argument("profile", nargs="?", default="photos")
    commands.add_parser("graded", help="notebooks with points for nbgrader").add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    try:
        if options.command == "deck":
            print(f"written: {write_deck(options.profile)}")
        else:
            print(f"written: {options.folder}/source and /release, {write_graded(options.folder)} points")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

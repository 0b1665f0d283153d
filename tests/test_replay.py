"""Replay: run cells are skipped and what they showed in the last run stands there; a second replay changes nothing."""

from __future__ import annotations

import json

import pytest

from mia_utils import course, paths, replay

CELLS = [
    ("markdown", "", "# 03 · Demo?"),
    ("code", "parameters", 'profile = "quick"\nn = 2'),
    ("code", "run", "import nothing_like_this"),
    ("code", "", "import pandas as pd\n\nprint(profile, n)"),
    ("code", "", 'pd.DataFrame({"auc": [0.81234, None], "verdict": ["shown", "a"]})'),
    ("code", "figure", "from IPython.display import Markdown\n\nMarkdown('*Here:* met')"),
    ("code", "checks", "print('judged', n)"),
]


@pytest.fixture
def book(home, monkeypatch):
    """A home with one notebook of six code cells, and what its run cell showed in the last run."""
    cells = []
    for kind, tag, source in CELLS:
        cell = {"cell_type": kind, "metadata": {"tags": [tag]} if tag else {}, "source": source}
        cells.append(cell | ({"outputs": [], "execution_count": None} if kind == "code" else {}))
    path = home / "03_demo.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    executed = home / "build" / "03_demo.ipynb"
    executed.parent.mkdir()
    cells[2]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": ["queried 64 images\n"]},
        {"output_type": "stream", "name": "stderr", "text": ["a bar\n"]},
        {
            "output_type": "display_data",
            "data": {"text/plain": ["a bar: 40%"], "application/vnd.jupyter.widget-view+json": {"model_id": "1"}},
        },
    ]
    executed.write_text(json.dumps({"cells": cells}))
    replay.keep_outputs("photos", executed)
    monkeypatch.setattr(replay.parameters, "find_notebooks", lambda: {"03_demo": path})
    monkeypatch.setattr(
        replay.parameters, "merge_parameters", lambda profile, name, given: given | {"profile": "photos"}
    )
    return path


def read_page(home) -> str:
    replay._write_page("03_demo", "photos", home / "docs")
    target = home / "docs" / "03_demo.md"
    return target.read_text(encoding="utf-8")


def test_run_cells_are_skipped_and_their_outputs_shown(book, home):
    text = read_page(home)
    assert "import nothing_like_this" in text and "queried 64 images" in text and "a bar" not in text
    assert 'This page was made with `profile = "photos"`.' in text
    assert "photos 2" in text and "judged 2" in text  # the profile's parameters; checks of saved results are judged again


def test_values_are_shown_as_in_a_notebook(book, home):
    text = read_page(home)
    assert "0.812" in text and "| shown" in text and "nan" not in text and "Out[" not in text
    assert "\n*Here:* met\n" in text


def test_a_second_replay_changes_no_byte(book, home):
    first, kept = read_page(home), (paths.get_results_dir() / "photos.json").read_bytes()
    replay.keep_outputs("photos", home / "build" / "03_demo.ipynb")
    assert read_page(home) == first and (paths.get_results_dir() / "photos.json").read_bytes() == kept


def test_source_that_a_run_cell_showed_is_todays(book, home):
    quoted = course.quote_source(paths.PACKAGE_ROOT / "mia_utils" / "seeds.py", "derive")
    executed = home / "build" / "03_demo.ipynb"
    content = json.loads(executed.read_text())
    stale = quoted.partition("def derive(")[0] + "def derive(of, old):\n    pass\n```"
    shown = {"output_type": "display_data", "data": {"text/markdown": [stale]}}
    content["cells"][2]["outputs"].append(shown)
    executed.write_text(json.dumps(content))
    replay.keep_outputs("photos", executed)
    text = read_page(home)
    assert quoted in text and "of, old" not in text and "queried 64 images" in text


def test_a_number_changed_in_what_was_kept_is_one_line(book, home):
    path = paths.get_results_dir() / "photos.json"
    path.write_text(path.read_text().replace("queried 64", "queried 65"))
    with pytest.raises(ValueError, match="^photos.json was changed since it was written: .*run the profile$"):
        read_page(home)


def test_an_edited_run_cell_loses_its_old_output(book, home):
    book.write_text(book.read_text().replace("nothing_like_this", "something_else"))
    assert "queried 64 images" not in read_page(home)


def test_a_failing_cell_is_named(book):
    book.write_text(book.read_text().replace("print('judged', n)", "1 / 0"))
    with pytest.raises(RuntimeError, match=r"03_demo.ipynb: ZeroDivisionError.*in the cell '1 / 0'"):
        replay.execute(book, {}, skip={"run"})

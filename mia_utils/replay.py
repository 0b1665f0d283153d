"""Redraw the book from saved results: the same notebooks without their ``run`` cells, written as ``docs/NN_*.md``.

``python -m mia_utils.replay PROFILE`` does it; with ``--gather`` it packs what a run of the profile has saved, instead
of drawing anything.

Cells tagged ``run`` query models; everything else needs ``lab.results`` only. What a ``run`` cell printed in the last
full run is kept in ``data/results/<profile>.json`` and shown again, so that a reader sees every number without running.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pandas as pd

from mia_utils import paths
from mia_utils.runner import parameters, profiles

SKIPPED = {"run", "checks"}  # what a replay does not execute
NOTE = "<!-- written by ./run_all.sh replay; edit notebooks/{name}.ipynb instead -->\n\n"


def replay(profile: str, docs: Path | None = None) -> list[Path]:
    """Execute every notebook without its ``run`` cells, in two processes; returns the pages in order.

    Args:
        profile: whose committed results are drawn; figures go to ``figures/<profile>/``.
        docs: folder of the pages; None: ``docs/`` of the checkout.
    """
    import matplotlib.figure  # noqa: F401 - before the fork: imported once
    import seaborn  # noqa: F401

    from mia_utils import lab

    lab.open(profile).results  # noqa: B018 - reads (and where it must, computes) the table once
    docs = docs or profiles.find_source("docs")
    found = parameters.find_notebooks()
    longest = sorted(found, key=lambda name: -found[name].stat().st_size)
    fork, waiting, running = multiprocessing.get_context("fork"), list(reversed(longest)), {}
    while waiting or running:  # a process for each notebook: what one leaves behind can't disturb the next
        while waiting and len(running) < min(2, os.cpu_count() or 1):
            name = waiting.pop()
            running[name] = fork.Process(target=_write_page, args=(name, profile, docs))
            running[name].start()
        connection.wait([process.sentinel for process in running.values()])
        for name in [name for name, process in running.items() if not process.is_alive()]:
            if running.pop(name).exitcode:
                raise RuntimeError(f"notebooks/{name}.ipynb could not be replayed (reason above)")
    return [docs / f"{name}.md" for name in found]


def _write_page(name: str, profile: str, docs: Path) -> None:
    path, kept = parameters.find_notebooks()[name], read_outputs(profile).get(name, {})
    given = parameters.merge_parameters(profiles.load(profile), name, parameters.read_parameters(path))
    text = NOTE.format(name=name)
    for cell, output in execute(path, given, skip=SKIPPED):
        if cell["cell_type"] == "markdown":
            text += f"{_get_source(cell)}\n\n"
            continue
        source = _get_source(cell)
        text += f"```python\n{source}\n```\n\n"
        output = kept.get(_digest(source), _find_figures(source, profile)) if output is None else output
        text += f"{output}\n\n" if output else ""
    paths.write_atomic(docs / f"{name}.md", lambda file: file.write(text.encode()))


def execute(path: Path, given: dict[str, Any], *, skip: set[str]) -> list[tuple[dict, str | None]]:
    """Execute a notebook in this process, without a kernel.

    Args:
        path: notebook.
        given: replaces the values of its parameters cell.
        skip: cells with one of these tags are not executed.

    Returns:
        (cell, what it showed as Markdown; None where it was not executed). RuntimeError names the cell that failed.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(user_ns={})
    shell.history_manager.enabled = False
    shown = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        tags, source = set(cell["metadata"].get("tags", [])), _get_source(cell)
        if cell["cell_type"] == "markdown" or tags & skip:
            shown.append((cell, None))
            continue
        values: list[Any] = []
        shell.display_trap.hook = values.append  # the value of the last line, without "Out[0]:"
        with capture_output() as captured:
            result = shell.run_cell(source)
            if "parameters" in tags:
                shell.user_ns.update(given)
        if not result.success:
            error = result.error_in_exec or result.error_before_exec
            raise RuntimeError(f"{path.name}: {type(error).__name__}: {error}; in the cell {source.splitlines()[0]!r}")
        parts = [f"```text\n{captured.stdout.rstrip()}\n```"] if captured.stdout.strip() else []
        parts += [to_markdown(output.data) for output in captured.outputs]
        parts += [show_value(shell, value) for value in values if value is not None and not source.endswith(";")]
        shown.append((cell, "\n\n".join(filter(None, parts))))
    return shown


def show_value(shell: Any, value: Any) -> str:
    """Return the value of a cell's last line as Markdown; numbers of a table with three digits."""
    if type(value) is not pd.DataFrame:  # a subclass says itself how it is shown
        return to_markdown(shell.display_formatter.format(value)[0])
    plain = value.map(lambda x: ("" if pd.isna(x) else f"{x:.3g}") if isinstance(x, float) else x)
    return plain.to_markdown(index=False, disable_numparse=True)


def to_markdown(data: dict[str, Any]) -> str:
    """Return one output of a cell as Markdown: its own, or its text."""
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    text = "".join(data.get("text/plain", ""))
    return f"```text\n{text}\n```" if text and not text.startswith("<") else ""


def keep_outputs(profile: str, executed: Path) -> None:
    """Keep what the ``run`` cells of an executed notebook showed, for replays without models."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    found = {}
    for cell in cells:
        if SKIPPED & set(cell["metadata"].get("tags", [])) and cell["cell_type"] == "code":
            parts = [_read_output(output) for output in cell["outputs"]]
            if text := "\n\n".join(filter(None, parts)):
                found[_digest(_get_source(cell))] = text
    path = paths.get_results_dir() / f"{profile}.json"
    kept = read_outputs(profile)
    kept[executed.stem] = found
    text = json.dumps(kept, indent=0, sort_keys=True, ensure_ascii=False)
    paths.write_atomic(path, lambda file: file.write(text.encode()))


def read_outputs(profile: str) -> dict[str, dict[str, str]]:
    """Return notebook -> digest of a ``run`` cell -> what it showed in the last full run."""
    try:
        return json.loads((paths.get_results_dir() / f"{profile}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _read_output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        text = "".join(output["text"]).rstrip()
        return f"```text\n{text}\n```" if output["name"] == "stdout" and text else ""
    return to_markdown(output.get("data", {}))


def _find_figures(source: str, profile: str) -> str:
    """Link the committed figures that a cell writes, with the title that stands in them as alternative text."""
    from PIL import Image

    links = []
    for name in re.findall(r"name=\"(fig\d\d_\w+)\"", source):
        path = paths.get_figures_dir(profile) / f"{name}.png"
        if path.is_file():
            with Image.open(path) as image:
                links.append(f"![{image.info.get('Title', name)}](../figures/{profile}/{name}.png)")
    return "\n\n".join(links)


def _get_source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"]).rstrip()


def _digest(source: str) -> str:
    return hashlib.blake2b(source.encode(), digest_size=5).hexdigest()


def main(arguments: list[str]) -> int:
    """Replay a profile, or gather what its run has saved; returns the exit code."""
    from mia_utils import lab, page

    profile, began = arguments[0], time.perf_counter()
    if "--gather" in arguments:
        lab.open(profile).store.pack()
        for name in parameters.find_notebooks():
            executed = paths.get_build_dir(profile) / f"{name}.ipynb"
            if executed.is_file():
                keep_outputs(profile, executed)
        page.write(profile)
        return 0
    pages = replay(profile)
    page.write(profile)
    figures = sorted(paths.get_figures_dir(profile).glob("fig*.png"))
    print(f"{len(pages)} pages in docs/, {len(figures)} figures of {profile}, {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

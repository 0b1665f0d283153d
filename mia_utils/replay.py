"""Redraw the book from saved results: the same notebooks without their ``run`` cells, written as ``docs/NN_*.md``.

``python -m mia_utils.replay PROFILE`` does it; with ``--gather`` it packs what a run of the profile has saved, instead
of drawing anything. What a ``run`` cell printed in the last full run is kept in ``data/results/<profile>.json`` and
shown again, so that a reader sees every number without running.
"""

import functools
import hashlib
import json
import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from mia_utils import course, lab, page, paths, results
from mia_utils.runner import artifacts, parameters, profiles

SKIPPED = {"run"}  # what a replay does not execute
QUOTED = re.compile(r"`(mia_utils/[\w/]+\.py)`: `([\w.]+)`\n\n```python\n.*?\n```", re.S)  # source as a page shows it
NOTE = "<!-- written by ./run_all.sh replay; edit notebooks/{name}.ipynb instead -->\n\n"


def replay(profile: str) -> list[Path]:
    """Execute every notebook without its ``run`` cells, in two processes; returns the pages in order."""
    lab.open(profile).results  # noqa: B018 - where means over seeds are missing they are computed once
    docs, found = profiles.find_source("docs"), parameters.find_notebooks()
    longest = sorted(found, key=lambda name: -found[name].stat().st_size)
    write = functools.partial(_write_page, profile=profile, docs=docs)

    def write_apart(name: str) -> Path:
        """In a process of its own: what one leaves behind can't disturb the next; forked: all is imported once."""
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
            try:
                return process.submit(write, name).result()
            except BrokenProcessPool:
                raise RuntimeError(f"{name}: its process was killed: the same command starts over") from None

    with ThreadPoolExecutor(2) as threads:
        return sorted(threads.map(write_apart, longest))


def _write_page(name: str, profile: str, docs: Path) -> Path:
    path, kept = parameters.find_notebooks()[name], read_outputs(profile).get(name, {})
    defaults = parameters.read_parameters(path)
    given = parameters.merge_parameters(profiles.load(profile), name, defaults)
    changed = [f"`{key} = {json.dumps(value)}`" for key, value in given.items() if value != defaults.get(key)]
    text = NOTE.format(name=name)
    for cell, output in execute(path, given, skip=SKIPPED):
        source = cell.source
        if cell.kind == "code":
            if output is None:
                output = QUOTED.sub(_requote, kept.get(_digest(source), ""))
            output = output.replace("\n```\n\n```text\n", "\n")  # what was printed in two goes is one text
            source = f"```python\n{source}\n```" + (f"\n\n{output}" if output else "")
            if "parameters" in cell.tags and changed:
                source += f"\n\nThis page was made with {', '.join(changed)}."
        text += f"{source}\n\n"
    return paths.write_atomic(docs / f"{name}.md", text)


def _requote(quoted: re.Match) -> str:
    """The source as it is today."""
    return course.quote_source(paths.PACKAGE_ROOT / quoted[1], quoted[2])


def execute(path: Path, given: dict[str, Any], *, skip: set[str]) -> list[tuple[page.Cell, str | None]]:
    """Execute a notebook in this process, without a kernel; cells with a tag of ``skip`` are not executed.

    Returns (cell, what it showed as Markdown; None where it was not executed). RuntimeError names the cell that failed.
    """
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(user_ns={})
    shell.history_manager.enabled = False
    shown = []
    for cell in page.read_cells(path):
        if cell.kind == "markdown" or skip & set(cell.tags):
            shown.append((cell, None))
            continue
        values: list[Any] = []
        shell.display_trap.hook = values.append  # the value of the last line, without "Out[0]:"
        with capture_output() as captured:
            result = shell.run_cell(cell.source)
        if error := result.error_in_exec or result.error_before_exec:
            first = cell.source.splitlines()[0]
            raise RuntimeError(f"{path.name}: {type(error).__name__}: {error}; in the cell {first!r}")
        if "parameters" in cell.tags:
            shell.user_ns.update(given)
        parts = [_quote(captured.stdout), *(to_markdown(output.data) for output in captured.outputs)]
        parts += [show_value(shell, value) for value in values if value is not None and not cell.source.endswith(";")]
        shown.append((cell, "\n\n".join(filter(None, parts))))
    return shown


def show_value(shell: InteractiveShell, value: Any) -> str:
    """Return the value of a cell's last line as Markdown."""
    if type(value) is pd.DataFrame:  # a subclass says itself how it is shown
        return results.to_markdown(value if value.index.names == [None] else value.reset_index())
    return to_markdown(shell.display_formatter.format(value)[0])


def to_markdown(data: dict[str, Any]) -> str:
    """Return one output of a cell as Markdown: its own, or its text."""
    if "application/vnd.jupyter.widget-view+json" in data:  # a progress bar; its text is where it stood
        return ""
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    text = "".join(data.get("text/plain", ""))
    return "" if text.startswith("<") else _quote(text)


def _quote(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def keep_outputs(profile: str, executed: Path) -> None:
    """Keep what the ``run`` cells of an executed notebook showed, for replays without models."""
    found = {}
    for cell in page.read_cells(executed):
        if SKIPPED & set(cell.tags) and (text := "\n\n".join(filter(None, map(_read_output, cell.outputs)))):
            found[_digest(cell.source)] = text
    kept = read_outputs(profile) | {executed.stem: found}
    text = json.dumps(kept | {"digest": artifacts.hash_text(kept)}, indent=0, sort_keys=True, ensure_ascii=False)
    paths.write_atomic(paths.get_results_dir() / f"{profile}.json", text)


def read_outputs(profile: str) -> dict[str, dict[str, str]]:
    """Return notebook -> digest of a ``run`` cell -> what it showed in the last full run."""
    path = paths.get_results_dir() / f"{profile}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("digest", None) == artifacts.hash_text(kept):
            return kept
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        pass
    raise ValueError(f"{path.name} was changed since it was written: fetch it again, or delete it and run the profile")


def _read_output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return _quote("".join(output["text"])) if output["name"] == "stdout" else ""
    return to_markdown(output.get("data", {}))


def _digest(source: str) -> str:
    return hashlib.blake2b(source.encode(), digest_size=5).hexdigest()


def main(arguments: list[str]) -> int:
    """Replay a profile, or gather what its run has saved; returns the exit code."""
    if arguments[1:] not in ([], ["--gather"]) or not arguments:
        raise ValueError("usage: python -m mia_utils.replay PROFILE [--gather]")
    profile, began = arguments[0], time.perf_counter()
    if "--gather" in arguments:
        lab.open(profile).store.pack()
        for name in parameters.find_notebooks():
            executed = paths.get_build_dir(profile) / f"{name}.ipynb"
            if executed.is_file():
                keep_outputs(profile, executed)
    else:
        pages = replay(profile)
        figures = sorted(paths.get_figures_dir(profile).glob("fig*.png"))
        print(f"{len(pages)} pages in docs/, {len(figures)} figures of {profile}, {time.perf_counter() - began:.0f} s")
    page.write(profile)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")

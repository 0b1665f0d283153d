"""One job of a run: fetch a data set, train rows, or execute a notebook. The Snakefile calls this.

``python -m mia_utils.runner.jobs PLAN JOB`` does job JOB of ``build/<profile>/plan.json``, writes its output to
``build/<profile>/logs/JOB.log`` and its outcome to ``build/<profile>/status/JOB.json``, which
``mia_utils.runner.run`` echoes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mia_utils import paths

FINDING = "FINDING "  # the last printed line of a notebook starts with it


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    paths.write_atomic(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, ``None`` when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def get_last_line(path: Path) -> str:
    """Return the last line of a log that says something: an exception's message rather than a rule below it."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except FileNotFoundError:
        return "no log was written"
    return next((line for line in reversed(lines) if any(c.isalnum() for c in line)), "no message")


def set_threads(environment: dict[str, str], threads: int) -> dict[str, str]:
    """Return a copy of an environment in which every numerical library uses so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return environment | dict.fromkeys(names, str(threads))


def use_own_kernel(folder: Path) -> None:
    """Make ``python3`` this very interpreter and leave the user's IPython startup files and kernels out."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    spec |= {"display_name": "Python 3", "language": "python"}
    write_json(folder / "jupyter" / "kernels" / "python3" / "kernel.json", spec)
    (folder / "ipython").mkdir(exist_ok=True)
    # JUPYTER_PATH is searched before every other folder
    os.environ |= {"JUPYTER_PATH": str(folder / "jupyter"), "IPYTHONDIR": str(folder / "ipython")}


def run_command(command: list[str], log: Path) -> dict[str, Any]:
    """Run a command with its output in a log; returns ``{"ok": bool, "message": str}``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    return {"ok": code == 0, "message": "" if code == 0 else get_last_line(log)}


def run_notebook(source: Path, executed: Path, parameters: dict[str, Any], log: Path) -> dict[str, Any]:
    """Execute a notebook in a kernel of this very environment; the executed copy is written after a failure, too.

    Returns ``ok``; ``finding``, the line the notebook ended with; after a failure ``section`` (the last heading above
    the failing cell) and ``message``.
    """
    import logging

    import papermill  # seconds: only where a notebook runs
    from papermill.exceptions import PapermillExecutionError

    log.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=log, filemode="w", level=logging.INFO, format="%(message)s", force=True)
    use_own_kernel(log.parent.parent / "kernel")
    source_text, executed_text = (str(p).replace("{", "{{").replace("}", "}}") for p in (source, executed))
    settings = dict(kernel_name="python3", cwd=source.parent, progress_bar=False, log_output=True, start_timeout=180)
    outcome: dict[str, Any] = {"ok": True, "message": ""}
    try:
        # papermill fills parameters into the names of files: braces are escaped
        papermill.execute_notebook(source_text, executed_text, parameters=parameters, **settings)
    except PapermillExecutionError as error:
        logging.error("%s", "\n".join(error.traceback))
        first = (str(error.evalue).strip().splitlines() or [""])[0]
        outcome = {"ok": False, "message": f"{error.ename}: {first}"}
    except Exception as error:  # a kernel that died or did not start: say so, like any other failure
        logging.exception("the notebook did not run to its end")
        outcome = {"ok": False, "message": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    cells = (read_json(executed) or {}).get("cells", [])
    return {**outcome, "section": "" if outcome["ok"] else find_section(cells), "finding": find_finding(cells)}


def find_section(cells: list[dict]) -> str:
    """Return the last markdown heading above the first cell that failed or, after a lost kernel, did not run."""
    heading = "the beginning"
    for cell in cells:
        # papermill puts notes of its own (tags below) above the title and the failing cell
        if "papermill-error-cell-tag" in cell.get("metadata", {}).get("tags", []):
            continue
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines = [line for line in text.splitlines() if line.startswith("#")]
            heading = lines[-1].lstrip("# ").strip() if lines else heading
        elif cell["cell_type"] == "code" and text.strip():
            failed = any(output["output_type"] == "error" for output in cell["outputs"])
            if failed or cell.get("execution_count") is None:
                return heading
    return heading


def find_finding(cells: list[dict]) -> str:
    """Return the last printed line that starts with ``FINDING``, without that word; empty when there is none."""
    streams = [output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == "stream"]
    lines = [line for output in streams for line in "".join(output["text"]).splitlines()]
    return next((line.removeprefix(FINDING).strip() for line in reversed(lines) if line.startswith(FINDING)), "")


def has_failed(build: Path, job: str, plan: dict[str, Any]) -> bool:
    """Whether a job of this very run ended badly."""
    status = read_json(build / "status" / f"{job}.json") or {}
    return status.get("run") == plan["run"] and not status["ok"]


def main(argv: list[str]) -> int:
    """Do one job of a plan; returns the exit code for the engine: 0 unless the job itself was cut off."""
    plan_path, job = Path(argv[0]), argv[1]
    plan = read_json(plan_path)
    build = plan_path.parent
    log = build / "logs" / f"{job}.log"
    os.environ.update(set_threads(dict(os.environ), plan["threads"]))
    started = time.time()
    work = {**plan["data"], **plan["train"], **plan["notebooks"]}[job]
    needs = [name for name in work.get("needs", []) if name not in plan["notebooks"]]
    if blocked := [name for name in needs if has_failed(build, name, plan)]:
        outcome = {"ok": False, "message": f"waits for {', '.join(blocked)}", "blocked": True}
    elif job in plan["train"]:
        outcome = run_command([sys.executable, "-m", "mia_utils.runner.train", plan["profile"], *work["ids"]], log)
    elif job in plan["notebooks"]:
        outcome = run_notebook(Path(work["source"]), build / f"{job}.ipynb", work["parameters"], log)
    else:
        load = "import json, sys; from mia_utils import datasets; datasets.load(sys.argv[1], **json.loads(sys.argv[2]))"
        outcome = run_command([sys.executable, "-c", load, work["name"], json.dumps(work["arguments"])], log)
    seconds = round(time.time() - started, 1)
    write_json(build / "status" / f"{job}.json", {"job": job, "run": plan["run"], "seconds": seconds, **outcome})
    return 0  # the outcome is in the status: the engine goes on, and 08 gathers what the others saved


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

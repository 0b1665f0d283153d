"""One job of a run: fetch a data set, train a row, or execute a notebook. The Snakefile calls this.

``python -m mia_utils.runner.jobs PLAN JOB`` does job JOB of ``build/<profile>/plan.json``, writes its output to
``build/<profile>/logs/JOB.log`` and its outcome to ``build/<profile>/status/JOB.json``.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mia_utils import paths
from mia_utils.runner import artifacts

FINDING = "FINDING "  # the last printed line of a notebook starts with it
WARM = [sys.executable, "-m", "mia_utils.runner.warm"]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    paths.write_atomic(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def write_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write what ``main`` reads, with its digest: a changed plan would be another experiment."""
    plan = json.loads(json.dumps(plan))
    write_json(path, plan | {"digest": artifacts.hash_text(plan)})


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, ``None`` when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def get_last_line(path: Path) -> str:
    """Return the last line of a log that says something: an exception's message rather than a rule below it."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if any(c.isalnum() for c in line)), "no message")


def set_threads(threads: int) -> dict[str, str]:
    """Return this environment with so many threads for every numerical library."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads))


def use_own_kernel(folder: Path) -> None:
    """Make ``python3`` this very interpreter and leave the user's IPython startup files and kernels out."""
    spec = {"argv": [*WARM, "ipykernel_launcher", "-f", "{connection_file}"]}
    spec |= {"display_name": "Python 3", "language": "python"}
    write_json(folder / "jupyter" / "kernels" / "python3" / "kernel.json", spec)
    (folder / "ipython").mkdir(exist_ok=True)
    # JUPYTER_PATH is searched before every other folder
    os.environ |= {"JUPYTER_PATH": str(folder / "jupyter"), "IPYTHONDIR": str(folder / "ipython")}


def run_module(arguments: list[str], log: Path) -> dict[str, Any]:
    """Run a module with its output in a log; returns ``{"ok": bool, "message": str}``."""
    with log.open("w") as file:
        ok = subprocess.run([*WARM, *arguments], stdout=file, stderr=subprocess.STDOUT).returncode == 0
    return {"ok": ok, "message": "" if ok else get_last_line(log)}


def run_notebook(source: Path, executed: Path, parameters: dict[str, Any], log: Path) -> dict[str, Any]:
    """Execute a notebook in a kernel of this very environment; the executed copy is written after a failure, too.

    Returns ``ok``, ``finding`` (the line it ended with), ``message`` and ``section`` of a failure.
    """
    import logging

    import papermill  # seconds: only where a notebook runs
    from papermill.exceptions import PapermillExecutionError

    logging.basicConfig(filename=log, filemode="w", level=logging.INFO, format="%(message)s", force=True)
    use_own_kernel(log.parent.parent / "kernel")
    source_text, executed_text = (str(p).replace("{", "{{").replace("}", "}}") for p in (source, executed))
    settings = dict(kernel_name="python3", cwd=source.parent, progress_bar=False, log_output=True, start_timeout=180)
    message = ""
    try:
        # papermill fills parameters into the names of files: braces are escaped
        papermill.execute_notebook(source_text, executed_text, parameters=parameters, **settings)
    except PapermillExecutionError as error:
        logging.error("%s", "\n".join(error.traceback))
        message = f"{error.ename}: {error.evalue.strip()}"
    except Exception as error:  # a kernel that died or did not start: say so, like any other failure
        logging.exception("the notebook did not run to its end")
        message = f"{type(error).__name__}: {error}"
    cells = (read_json(executed) or {}).get("cells", [])
    outcome = {"ok": not message, "message": message.partition("\n")[0], "finding": find_finding(cells)}
    return outcome | {"section": find_section(cells) if message else ""}


def find_section(cells: list[dict]) -> str:
    """Return the last markdown heading above the first cell that failed or, after a lost kernel, did not run."""
    heading = "the beginning"
    for cell in cells:
        # papermill puts notes of its own above the title and the failing cell
        if "papermill-error-cell-tag" in cell.get("metadata", {}).get("tags", []):
            continue
        text, is_code = "".join(cell["source"]), cell["cell_type"] == "code"
        errors = [output for output in cell.get("outputs", []) if output["output_type"] == "error"]
        if is_code and text.strip() and (errors or cell.get("execution_count") is None):
            return heading
        titles = [line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#") and not is_code]
        heading = [heading, *titles][-1]
    return heading


def find_finding(cells: list[dict]) -> str:
    """Return the last printed line that starts with ``FINDING``, without that word; empty when there is none."""
    streams = [output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == "stream"]
    lines = [line for output in streams for line in "".join(output["text"]).splitlines()]
    return next((line.removeprefix(FINDING).strip() for line in reversed(lines) if line.startswith(FINDING)), "")


def main(plan_path: str, job: str) -> None:
    """Do one job of a plan; its outcome is in its status, so the engine goes on and 08 gathers what others saved."""
    plan, build = read_json(Path(plan_path)), Path(plan_path).resolve().parent
    if not isinstance(plan, dict) or plan.pop("digest", None) != artifacts.hash_text(plan):
        sys.exit(f"{Path(plan_path).name} was changed since the run began: start the run again")
    log, work, started = build / "logs" / f"{job}.log", plan["jobs"][job], time.time()
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ |= set_threads(plan["threads"])
    before = [name for name in work["needs"] if plan["jobs"][name]["kind"] != "notebook"]
    statuses = [read_json(build / "status" / f"{name}.json") or {} for name in before]
    failed = [status["job"] for status in statuses if status.get("run") == plan["run"] and not status["ok"]]
    if failed:
        outcome = {"ok": False, "message": f"waits for {', '.join(failed)}", "blocked": True}
    elif work["kind"] == "notebook":
        outcome = run_notebook(Path(work["source"]), build / f"{job}.ipynb", work["parameters"], log)
    else:
        outcome = run_module(work["module"], log)
    seconds = round(time.time() - started, 1)
    write_json(build / "status" / f"{job}.json", {"job": job, "run": plan["run"], "seconds": seconds, **outcome})


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How long do the commands of the README take? Each in one fresh clone, in the order of the table.

    python benchmarks/times.py [setup quick again replay smoke test] [--folder FOLDER]

Writes ``docs/times.csv`` (the README's table is read from it): a row per command that ran, rows of others stay. On a
machine that does nothing else, with a Python that is not the clone's; ``--folder`` keeps the clone for the next call.
The reference machine is that of ``runner/estimates.py``.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "times.csv"
COMMANDS = {  # name -> arguments, what they do
    "setup": ("setup", "environment in .venv"),
    "quick": ("quick", "models, notebooks, figures"),
    "again": ("quick", "again"),
    "replay": ("replay", "docs/ and figures of photos"),
    "smoke": ("smoke", "every notebook in its smallest"),
    "test": ("test", "tests, smoke, solutions"),
}
FIELDS = ["command", "what it does", "time", "exit code", "conditions"]


def measure(name: str, clone: Path) -> dict[str, str]:
    """Run one command in the clone, its lines shown with their seconds; returns its row."""
    argument, what = COMMANDS[name]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MIA_", "OMP_", "PYTHONPATH", "VIRTUAL_ENV"))}
    load, start = os.getloadavg()[0], time.perf_counter()
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(["./run_all.sh", argument], cwd=clone, env=kept, **both)
    for line in process.stdout:
        print(f"{time.perf_counter() - start:6.0f} s  {line}", end="", flush=True)
    code, seconds = process.wait(), time.perf_counter() - start
    minutes, rest = divmod(round(seconds), 60)
    said = f"{minutes} min {rest} s" if minutes else f"{rest} s"
    ask = "from mia_utils.runner.estimates import measure_pace; print(round(measure_pace(), 1))"
    asked = subprocess.run([clone / ".venv/bin/python", "-c", ask], cwd=clone, capture_output=True, text=True)
    conditions = f"{os.cpu_count()} cores, load {load:.1f} at the start"
    conditions += f", a thread takes {asked.stdout.strip() or '?'} times as long as the reference machine's"
    return dict(zip(FIELDS, (f"./run_all.sh {argument}", what, said, str(code), conditions), strict=True))


def main(arguments: list[str]) -> int:
    """Measure the commands named, all without one; returns 1 when one of them failed."""
    cut = arguments.index("--folder") if "--folder" in arguments else len(arguments)
    names = arguments[:cut] or list(COMMANDS)
    if unknown := set(names) - set(COMMANDS):
        print(f"error: expected some of {', '.join(COMMANDS)}, got {min(unknown)}", file=sys.stderr)
        return 2
    clone = Path(arguments[cut + 1] if cut < len(arguments) else tempfile.mkdtemp(prefix="times-")) / "clone"
    if not clone.is_dir():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    rows = {}
    if FILE.is_file():
        with FILE.open(encoding="utf-8", newline="") as file:
            rows = {row["what it does"]: row for row in csv.DictReader(file)}
    known, failed = [what for _, what in COMMANDS.values()], False
    for name in names:
        row = measure(name, clone)
        failed |= row["exit code"] != "0"
        rows[row["what it does"]] = row
        with FILE.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, FIELDS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows[what] for what in known if what in rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

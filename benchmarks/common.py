"""What the benchmarks share: the machine, the clock, timing several ways in turn, and the table.

All ways are timed in turn within one run, so a ratio compares them under the same load. One CPU thread is timed by
the processor's clock, which neighbors on the machine don't touch; several threads and GPUs by the wall clock.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

RESULTS = Path(__file__).parent / "results"
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}
COLUMNS = ("what", "rate", "unit", "ratio", "against", "spread")
RUN_COLUMNS = ("threads", "repeats", "clock", "torch", "versions", "machine", "seed")


def describe_machine(device: str) -> str:
    """Processor, cores and load: on a busy machine rates are low and ratios still hold."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"


def add_arguments(parser: argparse.ArgumentParser, *, repeats: int = 5) -> None:
    """Add what every benchmark takes: repeats, threads, device, seed, and where the table goes."""
    for name, default in (("repeats", repeats), ("threads", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")


def describe_run(options: argparse.Namespace) -> dict:
    """Set the number of threads; return the columns that say how a row was measured (``RUN_COLUMNS``)."""
    torch.set_num_threads(options.threads)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torchvision", "timm", "numpy", "pillow"))
    return {
        "threads": options.threads,
        "repeats": options.repeats,
        "clock": "processor" if options.device == "cpu" and options.threads == 1 else "wall",
        "torch": torch.__version__,
        "versions": f"python {platform.python_version()}, {versions}",
        "machine": describe_machine(options.device),
        "seed": options.seed,
    }


def time_ways(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] | str,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time every way once per repeat, the order rotating, after one round to warm up.

    Args:
        ways: name -> what to time, called without arguments.
        repeats: rounds that count.
        clock: returns seconds, or a key of ``CLOCKS``.
        synchronize: waits for the device; None: ``torch.cuda.synchronize`` once CUDA is in use.

    Returns:
        name -> seconds of each repeat; the i-th of all ways belong together.
    """
    read = CLOCKS[clock] if isinstance(clock, str) else clock
    wait = synchronize or (torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, repeats):
        shift = max(repeat, 0) % len(ways)
        for name in [*ways][shift:] + [*ways][:shift]:
            wait()
            began = read()
            ways[name]()
            wait()
            if repeat >= 0:
                seconds[name].append(read() - began)
    return seconds


def make_rows(
    seconds: Mapping[str, list[float]],
    /,
    *,
    n: int | Mapping[str, int],
    unit: str,
    baseline: str,
    run: Mapping[str, object],
    what: str = "",
    **more: object,
) -> list[dict]:
    """Turn times into rows of the table.

    Args:
        seconds: from :func:`time_ways`.
        n: things done per call, of every way or of each: ratios of unequal numbers compare rates.
        unit: of the rate, for example ``"crops/s"``.
        baseline: the way whose ratio is 1.
        run: from :func:`describe_run`.
        what: put before the name of each way.
        more: further columns, the same in all rows; a mapping gives each way its own value.
            ``target``, the ratio that a way is to reach, brings ``met`` with it.

    Returns:
        One row a way: ``rate`` the median, ``ratio`` the median over repeats of rate / rate of the baseline in the
        same repeat, ``against`` the baseline, ``spread`` interquartile range / median of the rates; then ``more`` and
        ``RUN_COLUMNS``.
    """
    count = dict(n) if isinstance(n, Mapping) else dict.fromkeys(seconds, n)
    rates = {name: count[name] / np.array(taken) for name, taken in seconds.items()}
    rows = []
    for name, rate in rates.items():
        low, middle, high = np.quantile(rate, (0.25, 0.5, 0.75))
        row = {
            "what": f"{what}: {name}" if what else name,
            "rate": float(f"{middle:.4g}"),
            "unit": unit,
            "ratio": float(f"{np.median(rate / rates[baseline]):.4g}"),
            "against": baseline,
            "spread": round(float((high - low) / middle), 3),
        }
        row |= {key: value.get(name) if isinstance(value, Mapping) else value for key, value in more.items()}
        if "target" in row:
            row["met"] = None if row["target"] is None else row["ratio"] >= row["target"]
        rows.append(row | dict(run) | {"repeats": len(rate)})
    return rows


def write_table(rows: list[dict], name: str, folder: Path = RESULTS) -> pd.DataFrame:
    """Print the table and write it to ``FOLDER/NAME.csv``."""
    table = pd.DataFrame(rows)
    print(table.drop(columns=[c for c in RUN_COLUMNS if c in table]).to_string(index=False))
    first = rows[0]
    print(f"torch {first['torch']}, {first['threads']} thread(s), {first['clock']} clock, {first['machine']}")
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False)
    return table

"""What every result ends in: the summary table, the page of all figures, the catalog, and the numbers of the README.

``python -m mia_utils.report readme`` rewrites the marked sections of README.md from files, ``index PROFILE`` writes the
page again. Numbers in prose come from committed tables and are never typed.
"""

from __future__ import annotations

import html
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from mia_utils import figures, paths, plots
from mia_utils.attacks import ATTACKS, SUMMARY_COLUMNS, table
from mia_utils.protocol import metrics

STATUSES = ("drawn", "drawn at another scale", "not yet", "content not available")
_PAPERS = (
    ("partcrop", "PartCrop"), ("mim", "MIM"), ("encodermi", "EncoderMI"), ("lpla", "LpLA"),
    ("seg-", "Segmentations-Leak"),
)  # fmt: skip
_CATALOG_FIELDS = ("paper", "item", "content", "notebook", "file", "status")
_LIBRARIES = ("torch", "timm", "lightly", "numpy", "scikit-learn", "matplotlib")
_MISSING = float("nan")
_CONTROLS = ("no-model", "untrained", "permuted")
_CONTROL_ORDER = ("", *_CONTROLS)


# ---------------------------------------------------------------------------------------------------- summary table


def write_summary(lab: Any) -> pd.DataFrame:
    """Write ``08_summary.csv`` (a row per attack and target, and per control) and ``08_controls.csv`` (their verdict).

    Args:
        lab: what ``experiments.open`` returns; used: ``profile_name`` and ``results()``.

    Returns:
        the summary, columns ``attacks.SUMMARY_COLUMNS``; empty cells are empty, not 0.

    Raises:
        figures.NotAvailable: no scores are saved in this profile.
    """
    entries = figures.summarize(lab)
    rows, places = [], []  # controls stay below their own attack
    for place, entry in enumerate(entries):
        places += [place] * (1 + sum(c in entry.controls for c in _CONTROLS))
        rows.append(_make_row(entry, entry))
        rows += [_make_row(entry, entry.controls[c]) for c in _CONTROLS if c in entry.controls]
    summary = pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))
    order = summary["control"].map(_CONTROL_ORDER.index)
    keys = ["paper", "dataset", "method", "arch", "model_id", "protocol", "knowledge", "attack"]
    summary = summary.assign(_place=places, _order=order)
    summary = summary.sort_values([*keys, "_place", "_order"], kind="stable", na_position="first")
    summary = summary.drop(columns=["_place", "_order"]).reset_index(drop=True)
    folder = paths.get_figures_dir(lab.profile_name)
    plots.write_atomic(folder / "08_summary.csv", plots.format_table(summary).encode())
    plots.write_atomic(folder / "08_controls.csv", plots.format_table(judge_controls(entries)).encode())
    return summary


def judge_controls(entries: Sequence[figures.Entry], *, level: float = 0.01) -> pd.DataFrame:
    """Judge all distinct control rows of the controlled protocol jointly (Holm at a family level).

    A control that stands beside several attacks (no-model: once per split) counts once; where one covers the seeds of
    another, the one with more seeds stands for both.

    Args:
        entries: attacks with their controls, from ``figures.group``.
        level: family level.

    Returns:
        columns ``control, p, p_holm, rejected, auc, auc_low, auc_high, half_width``.
    """
    found: list[tuple[str, frozenset, metrics.Result]] = []
    for entry in entries:
        if entry.meta.get("protocol") != "controlled":
            continue
        for control, twin in entry.controls.items():
            if twin.metrics is not None:
                name = f"{control}, {entry.meta['attack']} on {entry.meta['model']}, {entry.meta.get('knowledge', '')}"
                found.append((name, frozenset(figures.digest(r) for r in twin.results), twin.metrics))
    distinct: dict[str, metrics.Result] = {}
    covered: list[frozenset] = []
    for name, seeds, result in sorted(found, key=lambda f: -len(f[1])):
        if any(seeds <= other for other in covered):
            continue
        covered.append(seeds)
        distinct[name if name not in distinct else f"{name} ({len(distinct)})"] = result
    verdict = metrics.judge_controls({name: m.p_value for name, m in distinct.items()}, level=level)
    numbers = [{k: getattr(m, k) for k in ("auc", "auc_low", "auc_high", "half_width")} for m in distinct.values()]
    return pd.concat([verdict, pd.DataFrame(numbers, columns=["auc", "auc_low", "auc_high", "half_width"])], axis=1)


def say_controls(verdict: pd.DataFrame) -> str:
    """Say the verdict on the controls in one sentence."""
    if verdict.empty:
        return "No control has been run yet."
    bad = verdict.loc[verdict["rejected"].astype(bool), "control"]
    widest = plots.format_value(float(0.5 + verdict["half_width"].max()))
    if len(bad):
        return f"{len(bad)} of {len(verdict)} controls reject chance (Holm, family level .01): {'; '.join(bad)}."
    return (
        f"All {len(verdict)} distinct controls agree with chance (Holm, family level .01); "
        f"the widest of them could have seen an AUC of {widest}."
    )


def _make_row(owner: figures.Entry, entry: figures.Entry) -> dict[str, Any]:
    """One row of the summary: the numbers of an entry (attack or control) under its owner's names."""
    meta, m = owner.meta, entry.metrics
    row: dict[str, Any] = dict.fromkeys(SUMMARY_COLUMNS, _MISSING)
    row |= {name: meta.get(name) for name in ("method", "arch", "dataset", "protocol", "knowledge", "strength")}
    row |= {name: meta.get(name) for name in ("n_train", "epochs")}
    if meta.get("epoch") is not None:
        row["epochs"] = meta["epoch"]
    names = [str(r.meta.get("model_id") or r.meta.get("model") or "") for r in owner.results]
    row |= {
        "paper": _name_paper(meta),
        "attack": meta["attack"],
        "control": entry.control,
        "model_id": meta["model"] if len(names) > 1 else names[0],
        "attacker": meta.get("attacker") or "static",
        "defense": meta.get("defense") or "none",
        "utility": _mean(_get_number(r.meta.get("utility")) for r in owner.results),
        "train_seconds": _mean(_get_number(r.meta.get("train_seconds")) for r in owner.results),
        "queries_per_image": 0 if entry.control == "no-model" else meta.get("queries_per_image", meta.get("queries")),
        "n_seeds": 0,
    }
    if m is None:
        return row
    for name in ("n_members", "n_nonmembers", "n_seeds", "auc", "auc_low", "auc_high", "half_width"):
        row[name] = getattr(m, name)
    for name in ("balanced_accuracy", "precision", "recall", "f1"):
        row[name] = getattr(m, name)
    if str(meta.get("knowledge", "")).startswith("shadow"):
        row["accuracy_at_shadow_threshold"] = m.accuracy
    for rate, name in ((0.1, "tpr_at_10"), (0.01, "tpr_at_1"), (0.001, "tpr_at_01")):
        at = m.tpr_at.get(rate)
        if at is not None:
            row[name] = at.value
            if rate == 0.01:
                row |= {"tpr_at_1_low": at.low, "tpr_at_1_high": at.high}
    return row


def _name_paper(meta: dict[str, Any]) -> str:
    attack = str(meta["attack"])
    known = next((paper for prefix, paper in _PAPERS if attack.startswith(prefix)), None)
    return known or (ATTACKS[attack].paper if attack in ATTACKS else str(meta.get("paper") or ""))


def _get_number(value: Any) -> float:
    """Return a utility or a time as a number; a dictionary of utilities gives its linear probe."""
    if isinstance(value, dict):
        value = next((value[k] for k in ("probe", "linear", "knn") if value.get(k) is not None), None)
    return _MISSING if value is None else float(value)


def _mean(values: Any) -> float:
    values = [v for v in values if np.isfinite(v)]
    return float(np.mean(values)) if values else _MISSING


def load_summary(profile: str) -> pd.DataFrame:
    """Read the summary table of a profile.

    Raises:
        FileNotFoundError: notebook 08 has not written it.
    """
    path = paths.get_figures_dir(profile) / "08_summary.csv"
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in profile {profile}; run ./run_all.sh {profile} 08")
    text = ("paper", "attack", "control", "model_id", "method", "arch", "dataset", "protocol", "knowledge", "attacker")
    return pd.read_csv(path, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=[""]).fillna(
        dict.fromkeys(text, "")
    )


# ----------------------------------------------------------------------------------------------------------- catalog


def catalog() -> pd.DataFrame:
    """Read ``figures/catalog.yaml``: one row per figure and table of the four papers.

    Returns:
        columns ``paper, item, content, notebook, file, status``.

    Raises:
        ValueError: a row lacks a field, has an unknown one or an unknown status.
    """
    path = paths.PACKAGE_ROOT / "figures" / "catalog.yaml"
    if not path.is_file():
        path = paths.get_home() / "figures" / "catalog.yaml"
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    for i, row in enumerate(rows, start=1):
        if set(row) != set(_CATALOG_FIELDS) or row["status"] not in STATUSES:
            raise ValueError(
                f"catalog.yaml row {i}: expected {', '.join(_CATALOG_FIELDS)} and a known status, got {row}"
            )
    return pd.DataFrame(rows, columns=list(_CATALOG_FIELDS))


def find_writers() -> set[str]:
    """Return the figure names that something writes: the registry, and names that a notebook passes to ``save``."""
    writers = set(figures.FIGURES)
    for notebook in sorted((paths.PACKAGE_ROOT / "notebooks").glob("*.ipynb")):
        writers |= set(re.findall(r"\bfig\d\d_[a-z0-9_]+\b", notebook.read_text(encoding="utf-8")))
    return writers


def catalog_table(style: str = "markdown", *, profile: str = "photos") -> str:
    """Print the catalog.

    Args:
        style: ``"markdown"`` (README) or ``"html"`` (the page, where drawn items link to the figure of the profile).
        profile: whose files are linked.

    Returns:
        a count per paper, then the table. Items whose content is unknown are one line per paper.
    """
    rows = catalog()
    folder = paths.get_figures_dir(profile)
    records = []
    for paper, part in rows.groupby("paper", sort=False):
        known = part[part["status"] != "content not available"]
        for row in known.itertuples():
            path = folder / f"{row.file}.png"
            if style == "html" and row.file and path.is_file():
                file = f'<a href="#{html.escape(row.file)}">{html.escape(row.file)}</a>'
            else:
                file = f"`{row.file}`" if style == "markdown" and row.file else row.file
            item = "" if row.item == "number not available" else row.item
            records.append((paper, item, row.content, row.notebook, file, row.status))
        unknown = part.loc[part["status"] == "content not available", "item"]
        if len(unknown):
            records.append((paper, _shorten(unknown), "content not available here", "", "", "content not available"))
    names = ("paper", "item", "content", "notebook", "file", "status")
    if style == "markdown":
        return _make_markdown(names, records)
    if style != "html":
        raise ValueError(f"expected style markdown or html, got {style!r}")
    body = "".join(
        "<tr>" + "".join(f"<td>{c if k == 4 else html.escape(str(c))}</td>" for k, c in enumerate(r)) + "</tr>"
        for r in records
    )
    head = "".join(f"<th>{n}</th>" for n in names)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shorten(items: Sequence[str]) -> str:
    """``Figure 1, Figure 3, Figure 4, Table 1`` -> ``Figures 1, 3-4; Table 1``."""
    parts = []
    for kind in dict.fromkeys(i.split()[0] for i in items):
        numbers = sorted(int(i.split()[1]) for i in items if i.startswith(kind))
        runs: list[list[int]] = []
        for n in numbers:
            if runs and n == runs[-1][1] + 1:
                runs[-1][1] = n
            else:
                runs.append([n, n])
        text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        parts.append(f"{kind}{'s' if len(numbers) > 1 else ''} {text}")
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------------------- markdown


def _make_markdown(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join(lines)


def attack_table_markdown() -> str:
    """Return "which attack can I run with what I have" as markdown, from the registry."""
    frame = table()
    return _make_markdown(list(frame.columns), frame.astype(str).to_numpy().tolist())


def results_markdown(profile: str = "photos") -> str:
    """Return the attack rows of a profile's summary as markdown, each with its controls beside it.

    Reads ``figures/<profile>/08_summary.csv``; undefended targets under the controlled protocol, of each attack and
    training method those with the most seeds.
    """
    summary = load_summary(profile)
    summary = summary[(summary["protocol"] == "controlled") & summary["defense"].isin(("none", ""))]
    # rows of single studies have one seed and figures of their own: here the targets with the most seeds
    family = [summary["attack"], summary["method"], summary["knowledge"].astype(str).str.startswith("shadow")]
    most = summary[summary["control"] == ""].groupby(["attack", "model_id", "knowledge"])["n_seeds"].max()
    seeds = pd.MultiIndex.from_frame(summary[["attack", "model_id", "knowledge"]]).map(most)
    seeds = pd.Series(seeds, index=summary.index)
    summary = summary[seeds == seeds.groupby(family).transform("max")]
    keys = ["attack", "model_id", "knowledge", "n_train", "epochs"]
    rows = []
    for key, part in summary.groupby(keys, sort=False, dropna=False):
        attack = part[part["control"] == ""]
        if attack.empty:
            continue
        a = attack.iloc[0]
        cells = [plots.label_of(a["attack"]), f"{plots.label_of(a['method'])} `{key[1]}`", a["dataset"], a["knowledge"]]
        cells += [f"{a['n_train']:g} / {a['epochs']:g}", f"{a['n_seeds']:g}"]
        value, low, high, rate = (plots.format_value(a[n]) for n in ("auc", "auc_low", "auc_high", "tpr_at_1"))
        cells += [f"**{value}** [{low}, {high}]", rate]
        for control in _CONTROLS:
            twin = part[part["control"] == control]
            cells.append(plots.format_value(twin["auc"].iloc[0]) if len(twin) else "")
        rows.append(cells)
    names = ("attack", "target", "data", "knowledge", "N / epochs", "seeds", "AUC [95 %]", "TPR at 1 % FPR", *_CONTROLS)
    text = _make_markdown(names, rows)
    controls = paths.get_figures_dir(profile) / "08_controls.csv"
    return text + (f"\n\n{say_controls(pd.read_csv(controls))}" if controls.is_file() else "")


def times_markdown() -> str:
    """Return the measured times and sizes as markdown: the table ``figures/times.csv`` as it is."""
    path = paths.PACKAGE_ROOT / "figures" / "times.csv"
    if not path.is_file():
        raise FileNotFoundError("no figures/times.csv: measure the commands and write it")
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    return _make_markdown(list(frame.columns), frame.to_numpy().tolist())


# benchmark -> what limits it, in the order of the README; others follow
SPEED_LIMITS = {
    "crops": "two matrix products per picture, and reading weights and pixels from memory",
    "partcrop": "the encoder's forwards over all parts, which the whole attack makes once and not in every epoch",
    "mim": "the forwards of encoder and decoder, one for every mask",
    "encodermi": "the encoder's forwards over all views; beside a small encoder also making the views",
    "segmentation": "the segmenter's forwards (another memory order is faster and moves the maps in their last digit)",
    "training": "forward and backward; then the optimizer's pass over the weights and making the views",
    "streaming": "decoding, which is Pillow's",
    "graph": "the longest chain of jobs that wait for each other",
}
_MEMORY = (
    ("above_mib", "images_mib"),
    ("beyond_imports_mb", "decoded_mb"),
)  # peak beyond what was there before; images
_PARTS = ("views and masks", "updates")  # ways that explain another way in the CSV and say little beside it


def speed_markdown(folder: str | Path | None = None) -> str:
    """Return what the benchmarks measured, as markdown: rates, peak memory, and what limits each rate.

    Args:
        folder: of their CSV files, subfolders included; None: ``benchmarks/results``. Rows of rates have ``what``
            (``"case: way"``), ``rate`` and ``ratio``, and where they apply ``unit``, ``against`` (the way with ratio
            1), ``target`` (ratio to reach), ``met``, ``note`` (why not), ``machine`` and ``threads``. Rows of memory
            have ``above_mib`` and ``images_mib``, or ``beyond_imports_mb`` and ``decoded_mb``.

    Raises:
        FileNotFoundError: there is no CSV file at all.
    """
    folder = Path(folder) if folder else paths.PACKAGE_ROOT / "benchmarks" / "results"
    order = list(SPEED_LIMITS)
    files = sorted(folder.rglob("*.csv"), key=lambda f: (order.index(f.stem) if f.stem in order else len(order), f))
    if not files:
        raise FileNotFoundError(f"no CSV file in {folder.name}: run the scripts in benchmarks/")
    rates, memory, limits = [], [], {}
    for path in files:
        frame = pd.read_csv(path).rename(columns={"images_per_second": "rate"})
        if columns := next((c for c in _MEMORY if set(c) <= set(frame.columns)), None):
            memory += [(path.stem, *cells) for cells in _list_peaks(frame, *columns)]
        elif "rate" in frame:
            rates += [(path.stem, *cells) for cells in _list_rates(frame)]
            limits[path.stem] = SPEED_LIMITS.get(path.stem)
    head = ("benchmark", "case", "way", "rate", "ratio", "target", "machine")
    aimed, others = ([cells for cells in rates if bool(cells[5]) is wanted] for wanted in (True, False))
    parts = [_make_markdown(head, aimed)] if aimed else []
    if others:
        folded = _make_markdown(head, others)
        parts.append(f"<details><summary>{len(others)} more rates</summary>\n\n{folded}\n\n</details>")
    if memory:
        parts.append(_make_markdown(("benchmark", "case", "way", "peak memory", "images in memory"), memory))
    parts.append("\n".join(f"- {name}: limited by {limit}" for name, limit in limits.items() if limit))
    return "\n\n".join(part for part in parts if part)


def _list_rates(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """Cells of the README for the rates of one benchmark: case, way, rate, ratio, target, machine."""
    if "cores" in frame:  # of the whole graph: its ways differ in nothing else
        frame = frame.assign(what=frame["what"] + ": " + frame["cores"].astype(str) + " cores")
    records = frame.astype(object).where(frame.notna(), None).to_dict("records")
    baselines: dict[str, str] = {}
    for row in records:
        row["case"], _, row["way"] = row["what"].rpartition(": ")
        if row["ratio"] == 1:  # tables of earlier versions don't name it
            baselines.setdefault(row["case"], row["way"])
    cells = []
    for row in records:
        baseline = row.get("against") or baselines.get(row["case"], "")
        if row["way"] in (baseline, *_PARTS):
            continue
        target, machine = "", ", ".join(str(row.get("machine") or "").split(", ")[:2])
        if row.get("target") is not None:
            why = f" ({row['note']})" if row.get("note") else ""
            target = f"at least {row['target']:g}: {'met' if row['met'] else 'not met' + why}"
        if row.get("threads"):
            machine += f", {row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        ratio = f"{_round(row['ratio'])} x {baseline}"
        cells.append(
            (row["case"], row["way"], f"{_round(row['rate'])} {row.get('unit') or 'images/s'}", ratio, target, machine)
        )
    return cells


def _list_peaks(frame: pd.DataFrame, own: str, images: str) -> list[tuple[str, ...]]:
    """Cells of the README for the memory of one benchmark, the ends of every case: case, way, peak, size of images."""
    found = frame["what"].str.rpartition(": ")
    unit = {"mib": "MiB", "mb": "MB"}[own.rsplit("_", 1)[1]]
    cells = []
    for case, part in frame.assign(way=found[2]).groupby(found[0], sort=False):
        if not case:  # what others are measured from
            continue
        ends = part.iloc[[0, -1]] if len(part) > 1 else part
        cells += [
            (case, row["way"], f"{row[own]:,.0f} {unit}", f"{row[images]:,.0f} {unit}")
            for row in ends.to_dict("records")
        ]
    return cells


def _round(value: float) -> str:
    """Few digits, but no power of ten: ``0.0041``, ``0.92``, ``1.03``, ``12``, ``1,912``."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


SECTIONS = {
    "results": results_markdown,
    "speed": speed_markdown,
    "times": times_markdown,
    "attacks": attack_table_markdown,
    "catalog": catalog_table,
}


def update_readme(path: str | Path | None = None) -> list[str]:
    """Rewrite the marked sections of the README from files.

    A section stands between ``<!-- results:begin -->`` and ``<!-- results:end -->`` (likewise ``speed``, ``times``,
    ``attacks``, ``catalog``). Sections that the README does not have are left out.

    Returns:
        names of the sections written.

    Raises:
        ValueError: a section is opened and not closed.
        FileNotFoundError: the table of a section is missing.
    """
    path = Path(path) if path else paths.PACKAGE_ROOT / "README.md"
    text, written = path.read_text(encoding="utf-8"), []
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text:
            continue
        if text.find(end) < text.find(begin):
            raise ValueError(f"{path.name}: {begin} has no {end} after it")
        head, rest = text.split(begin, 1)
        _, tail = rest.split(end, 1)
        text = f"{head}{begin}\n{make()}\n{end}{tail}"
        written.append(name)
    plots.write_atomic(path, text.encode())
    return written


# -------------------------------------------------------------------------------------------------------------- page


def read_png_texts(path: str | Path) -> dict[str, str]:
    """Read the text chunks that ``plots.save`` wrote into a PNG: Title, Command, Seeds, Caption."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        texts = getattr(image, "text", {})
        return {k: str(v) for k, v in texts.items()} | {"width": str(image.width), "height": str(image.height)}


def get_commit() -> str:
    """Return the commit that last changed code, profiles or notebooks, with ``+`` where they are changed since.

    Figures and scores are left out, so that committing a page does not make it out of date.
    """
    tracked = ["mia_utils", "profiles", "notebooks", "requirements.lock"]
    try:
        options = {"cwd": paths.PACKAGE_ROOT, "capture_output": True, "text": True, "timeout": 20}
        log = subprocess.run(["git", "log", "-1", "--format=%h", "--", *tracked], **options)
        state = subprocess.run(["git", "status", "--porcelain", "--", *tracked], **options)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if log.returncode or not log.stdout.strip():
        return ""
    return log.stdout.strip() + ("+" if state.stdout.strip() else "")


def get_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the libraries that numbers depend on."""
    from mia_utils import __version__

    versions = {"mia_utils": __version__, "Python": ".".join(map(str, sys.version_info[:3]))}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--page:#fff;--card:#f6f8fa;--line:#d8dee4;--link:#0a58a8;
--good:#1a7f37;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa7b4;--page:#0f1419;--card:#182029;--line:#313b46;
--link:#79b8ff;--good:#56d364;--bad:#ff8b82}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:70rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--page);overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}h3{font-size:1rem;margin:0}
a{color:var(--link)}p{margin:.4rem 0}.soft{color:var(--soft);font-size:.85rem}
.verdict{border-left:.3rem solid var(--good);background:var(--card);padding:.6rem .9rem;margin:1rem 0}
.verdict.bad{border-color:var(--bad)}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin:.8rem 0}
figure{margin:1.2rem 0;padding:.9rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem}
figure img{display:block;width:100%;height:auto;background:#fff;border-radius:.25rem;margin:.6rem 0}
figure.narrow img{max-width:32rem}
figcaption{font-size:.85rem;color:var(--soft)}code{font:.85em ui-monospace,monospace;background:var(--card);
padding:.1em .3em;border-radius:.2rem}figure code{background:var(--page)}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.4rem;max-height:36rem;overflow-y:auto}
table{border-collapse:collapse;font-size:.82rem;width:100%;overflow-wrap:normal}
th,td{text-align:left;padding:.3rem .55rem;border-bottom:1px solid var(--line);vertical-align:top}
th{position:sticky;top:0;background:var(--card);white-space:nowrap}td.n{text-align:right;white-space:nowrap}
tr.control td{color:var(--soft)}td.k{white-space:nowrap}
details{margin:.8rem 0}summary{cursor:pointer}
@media (max-width:40rem){body{padding:.7rem;font-size:15px}figure{padding:.5rem;margin:1rem -.2rem}h1{font-size:1.35rem}
figure .wide{overflow-x:auto}figure .wide img{min-width:34rem}}
"""


def write_index(profile: str) -> Path:
    """Write ``figures/<profile>/index.html``: one page beside its pictures, no server and no external request.

    Heroes first, then every figure with title, CSV, command and seeds; the verdict on the controls, the summary
    table, the catalog, the commit and the versions. Light and dark follow the reader's system.

    Returns:
        path of the page.
    """
    folder = paths.get_figures_dir(profile)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = sorted(folder.glob("fig*.png"), key=lambda p: (not p.stem.endswith("_hero"), p.stem))
    heroes = [p for p in pictures if p.stem.endswith("_hero")]
    others = [p for p in pictures if p not in heroes]
    chapters: dict[str, list[Path]] = {}
    for path in others:
        chapters.setdefault(path.stem[3:5], []).append(path)
    parts = [f"<h1>Membership inference on visual models</h1><p>Profile <b>{html.escape(profile)}</b>. "]
    if profile == "smoke":
        parts.append(f"<b>{plots.WATERMARK}.</b> ")
    parts.append("Every figure with its numbers; higher AUC = members stand out more; .5 is chance.</p>")
    controls = folder / "08_controls.csv"
    if controls.is_file():
        verdict = pd.read_csv(controls)
        bad = "rejected" in verdict and verdict["rejected"].astype(bool).any()
        parts.append(
            f'<p class="verdict{" bad" if bad else ""}"><b>Controls.</b> {html.escape(say_controls(verdict))}</p>'
        )
    links = [f'<a href="#chapter-{n}">{_name_chapter(n)}</a>' for n in chapters]
    if heroes:
        links.insert(0, '<a href="#heroes">In pictures</a>')
    parts.append(
        "<nav>" + " ".join([*links, '<a href="#summary">Summary</a>', '<a href="#catalog">Catalog</a>']) + "</nav>"
    )
    if heroes:
        parts.append('<h2 id="heroes">In pictures</h2>' + "".join(_make_figure(p, profile) for p in heroes))
    for number, group in chapters.items():
        parts.append(f'<h2 id="chapter-{number}">{_name_chapter(number)}</h2>')
        parts += [_make_figure(p, profile) for p in group]
    if not pictures:
        parts.append(f"<p>No figure yet: <code>./run_all.sh {html.escape(profile)}</code> draws them.</p>")
    parts.append('<h2 id="summary">Summary table</h2>' + _make_summary(profile))
    parts.append('<h2 id="catalog">Catalog of the four papers</h2>' + _make_catalog(profile))
    versions = ", ".join(f"{k} {v}" for k, v in get_versions().items())
    commit = get_commit()
    seeds = sorted({s for p in pictures for s in read_png_texts(p).get("Seeds", "").split(", ") if s}, key=int)
    parts.append(
        '<h2>How this page was made</h2><p class="soft">'
        + (f"Commit <code>{html.escape(commit)}</code>. " if commit else "")
        + (f"Seeds {', '.join(seeds)}. " if seeds else "")
        + f"{html.escape(versions)}. Everything again: <code>./run_all.sh {html.escape(profile)}</code>"
        + ("; from saved scores only: <code>./run_all.sh replay</code>" if profile == "photos" else "")
        + ".</p>"
    )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>Figures, profile {html.escape(profile)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style>'
        f"</head><body>{chr(10).join(parts)}</body></html>\n"
    )
    return plots.write_atomic(folder / "index.html", page.encode())


def _name_chapter(number: str) -> str:
    names = {
        "00": "Start here", "01": "Pre-training", "02": "Shadow setup", "03": "PartCrop", "04": "MIM attack",
        "05": "EncoderMI", "06": "Segmentation", "07": "Defenses", "08": "All results",
    }  # fmt: skip
    return f"{number} {names.get(number, '')}".strip()


def _make_figure(path: Path, profile: str) -> str:
    texts = read_png_texts(path)
    spec = figures.FIGURES.get(path.stem)
    title = texts.get("Title") or (spec.title if spec else path.stem)
    what = spec.title + ". " if spec and spec.title != title else ""
    facts = [html.escape(what + texts.get("Caption", "")).strip()]
    if spec and spec.paper_item:
        facts.append(f"Regenerates: {html.escape(spec.paper_item)}.")
    command = texts.get("Command") or plots.command_for(path, profile)
    links = [f"<code>{html.escape(command)}</code>"]
    if path.with_suffix(".csv").is_file():
        links.insert(0, f'<a href="{html.escape(path.stem)}.csv">{html.escape(path.stem)}.csv</a>')
    if texts.get("Seeds"):
        links.append(f"seeds {html.escape(texts['Seeds'])}")
    said = [" ".join(f for f in facts if f)] if any(facts) else []
    wide = int(texts["width"]) > 1000
    size = f'width="{texts["width"]}" height="{texts["height"]}"'
    return (
        f'<figure id="{html.escape(path.stem)}" class="{"" if wide else "narrow"}"><h3>{html.escape(title)}</h3>'
        f'<div class="wide"><img alt="{html.escape(title)}" {size} loading="lazy" src="{html.escape(path.name)}">'
        f"</div><figcaption>{'<br>'.join([*said, ' · '.join(links)])}</figcaption></figure>"
    )


def _make_summary(profile: str) -> str:
    try:
        summary = load_summary(profile)
    except FileNotFoundError as missing:
        return f"<p>{html.escape(str(missing))}</p>"
    # what is read first stands first: the table is wider than most screens
    names = ["attack", "target", "defense", "AUC", "95 %", "TPR 1 %", "utility"]
    names += ["data", "knowledge", "N", "epochs", "seeds", "protocol"]
    rows = []
    for row in summary.itertuples():
        label = plots.label_of(row.attack) if not row.control else f"· {plots.label_of(row.control)}"
        interval = (
            f"{plots.format_value(row.auc_low)}–{plots.format_value(row.auc_high)}" if np.isfinite(row.auc) else ""
        )
        defended = row.defense != "none" and not row.control
        strength = f" {row.strength}" if pd.notna(row.strength) and row.strength != "" else ""
        defense = f"{row.defense}{strength}, {row.attacker}" if defended else ""
        cells = [("k", label), ("k", row.model_id), ("k", defense)]
        cells += [("n", plots.format_value(row.auc)), ("n", interval), ("n", plots.format_value(row.tpr_at_1))]
        cells.append(("n", plots.format_value(row.utility) if not row.control else ""))
        cells += [("", row.dataset), ("k", row.knowledge)]
        cells += [("n", f"{v:g}" if pd.notna(v) else "") for v in (row.n_train, row.epochs, row.n_seeds)]
        cells.append(("k", row.protocol))
        body = "".join(f'<td class="{c}">{html.escape(str(v))}</td>' for c, v in cells)
        rows.append(f'<tr class="{"control" if row.control else ""}">{body}</tr>')
    head = "".join(f"<th>{n}</th>" for n in names)
    return (
        f'<p class="soft">All {len(SUMMARY_COLUMNS)} columns: <a href="08_summary.csv">08_summary.csv</a>; '
        'the controls: <a href="08_controls.csv">08_controls.csv</a>.</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _make_catalog(profile: str) -> str:
    rows = catalog()
    counts = rows["status"].value_counts()
    text = ", ".join(f"{counts[s]} {s}" for s in STATUSES if s in counts)
    return (
        f'<p class="soft">{len(rows)} rows: {html.escape(text)}.</p><details><summary>Show the catalog</summary>'
        f"{catalog_table('html', profile=profile)}</details>"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``readme`` rewrites the marked sections of README.md; ``index PROFILE`` writes a profile's page."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments == ["readme"]:
            print(f"README.md: {', '.join(update_readme()) or 'no marked section'}")
        elif len(arguments) == 2 and arguments[0] == "index":
            print(write_index(arguments[1]))
        else:
            raise ValueError("expected: python -m mia_utils.report readme | index PROFILE")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

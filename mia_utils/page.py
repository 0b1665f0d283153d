"""The page of a profile, ``figures/<profile>/index.html``, the tables of ``docs/`` and the numbers of the README.

Everything is read from what other commands wrote: PNG files with their texts, the results table, the notebooks.
"""

import json
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from mia_utils import __version__, course, findings, lab, paths
from mia_utils.plots.style import WORDS, format_interval, format_value, label_of
from mia_utils.results import to_markdown
from mia_utils.runner import choices, parameters, profiles

Cell = namedtuple("Cell", "kind tags source outputs")
FIGURES = re.compile(r"name=\"(fig\d\d_\w+)\"")  # that a cell writes
SUMMARY = "main encoders architectures datasets probes calibration defenses output-defenses segmenter-defenses".split()
SUMMARY += ["contrast", "beside", "own", "valuable"]
UNKNOWN = {"PartCrop": "Figures 1, 3 to 7, its tables"}  # figures and tables whose content is not among our sources
UNKNOWN |= dict.fromkeys(("MIM", "EncoderMI", "Segmentations-Leak"), "its figures and tables by number")


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Return one line per attack on a target of ``lab.results``, in words for readers, its controls as columns."""
    table = table[table["seed"].isna() & table["study"].isin(SUMMARY) & (table["protocol"] == "controlled")]
    facts = [c for c in ("attack", "target", "checkpoint", "knowledge", "shadow", "decoder", "reference", "defense",
                         "strength", "attacker", "probes", "query_augmentation") if c in table]  # fmt: skip
    # who knows of a defense matters only where there is one
    table, lines = table.assign(attacker=table["attacker"].where(table["defense"] != "none", "")), []
    groups: dict[tuple, list[dict]] = {}
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        groups.setdefault(tuple(row[name] for name in facts), []).append(row)
    for part in groups.values():
        part.sort(key=lambda r: (r["n_seeds"], r["n_nonmembers"], -SUMMARY.index(r["study"])))  # the last counts
        own = [r for r in part if not r["control"]]
        if not own:
            continue
        a = own[-1]
        controls = {r["control"]: r["auc"] for r in part if r["n_seeds"] == a["n_seeds"]}
        strength = "" if a["strength"] is None else a["strength"]
        defense = "" if a["defense"] == "none" else f"{label_of(a['defense'])} {strength}".strip()
        defense += ", static attacker" if a["attacker"] == "static" else ""
        lines.append({
            "attack": name_attack(a), "target": name_target(a), "data": label_of(a["dataset"]),
            "N": a["n_train"], "T": a["checkpoint"], "trained with": WORDS.get(a["augmentation"]),
            "knowledge": name_knowledge(a), "defense": defense, "seeds": a["n_seeds"], "auc": a["auc"],
            "AUC": format_interval(a["auc"], a["auc_low"], a["auc_high"]), "verdict": a["verdict"],
            "TPR at 1 % FPR": format_value(a["tpr_at_1"]), "utility": format_value(a["utility"]),
            "untrained utility": format_value(a["utility_untrained"]),
            **{label_of(c): format_value(controls.get(c)) for c in ("no-model", "untrained", "permuted")},
            "queries": a["queries"], "id": a["target"],
        })  # fmt: skip
    if not lines:
        return pd.DataFrame()
    said = pd.DataFrame(lines)
    known = [*said.columns[: said.columns.get_loc("auc")]]
    said["target"] += (" (" + said.pop("id") + ")").where(said.duplicated(known, keep=False), "")  # else alike
    order = ["defense", "attack", "target", "N", "T"]
    return said.drop_duplicates().sort_values(order, kind="stable", ignore_index=True)


def name_attack(row: Any) -> str:
    """Name an attack, what stands in the place of PartCrop's parts where something does, and whose decoder fills in."""
    choice = row["decoder"] if row["attack"] == "mim" else row.get("probes")
    return label_of(row["attack"]) + (f", {label_of(choice)}" if isinstance(choice, str) else "")


def name_target(row: Any) -> str:
    """Name a target by its method, and its structure where that is not the book's ViT."""
    arch = label_of(row["arch"])
    return label_of(row["method"]) + ("" if arch == "ViT" or row["method"] in choices.SEGMENTERS else f" ({arch})")


def name_knowledge(row: Any) -> str:
    """Say what the attacker knows: ``some members``, ``shadow: same data, encoder, training`` ..."""
    kind, _, same = str(row["knowledge"]).partition(":")
    if kind != "shadow":
        return "some members" + (", reference model" if isinstance(row.get("reference"), str) else "")
    known = [word for letter, word in zip("PET", ("data", "encoder", "training"), strict=True) if letter in same]
    return "shadow: " + (f"same {', '.join(known)}" if known else "nothing shared")


def read_figures(profile: str) -> list[dict[str, Any]]:
    """Return what is known of every figure of a profile: name, title, paper, *Here:* line, how to read it, CSV."""
    from PIL import Image  # slow to import beside jinja2

    texts, figures = _read_readings(), []
    cells = (cell for path in parameters.find_notebooks().values() for cell in read_cells(path) if cell.kind == "code")
    order = list(dict.fromkeys(name for cell in cells for name in FIGURES.findall(cell.source)))  # as in the notebooks
    rank = lambda path: (path.stem[:5], order.index(path.stem) if path.stem in order else len(order), path.stem)  # noqa: E731
    for path in sorted(paths.get_figures_dir(profile).glob("fig*.png"), key=rank):
        with Image.open(path) as image:
            entry = {key.lower(): image.info.get(key, "") for key in ("Title", "Paper", "Caption", "Here")}
            entry |= {"width": image.width, "height": image.height, "name": path.stem, "file": path.name}
        entry |= {"chapter": path.stem[3:5], "csv": path.with_suffix(".csv").name}
        figures.append(entry | {"read": texts.get(path.stem, "")})
    return figures


def read_cells(path: Path) -> list[Cell]:
    """Return kind, tags, source and outputs of the cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    head = ((c["cell_type"], c["metadata"].get("tags", []), "".join(c["source"]).rstrip()) for c in cells)
    return [Cell(*own, c.get("outputs", [])) for own, c in zip(head, cells, strict=True)]


def _read_readings() -> dict[str, str]:
    """Figure -> the paragraph of its notebook that says how to read it."""
    found = {}
    for path in parameters.find_notebooks().values():
        waiting: list[str] = []
        for cell in read_cells(path):
            if cell.kind == "code":
                waiting += FIGURES.findall(cell.source)
            elif match := re.search(r"\*\*How to read (it|them)\*\*:?\s*(.+?)(?:\n\n|$)", cell.source, flags=re.S):
                meant = waiting if match[1] == "them" else waiting[-1:]
                found |= dict.fromkeys(meant, re.sub(r"[*`$]", "", " ".join(match[2].split())))
                waiting = []
    return found


def read_chapters() -> list[dict[str, str]]:
    """Return number and title question of every notebook."""
    firsts = {name: read_cells(path)[0].source.splitlines()[0] for name, path in parameters.find_notebooks().items()}
    return [{"number": n[:2], "name": n, "title": first.partition("· ")[2]} for n, first in firsts.items()]


def list_catalog(figures: list[dict[str, Any]]) -> pd.DataFrame:
    """Return which item of which paper each figure regenerates, as the figures themselves say."""
    said = [(item, f["name"]) for f in figures if f["paper"] for item in f["paper"].split(";")]
    parts = [(*item.rpartition(":")[::2], name) for item, name in said]
    rows = [(paper.strip() or "this book", what.strip(), name) for paper, what, name in parts]
    rows += [(paper, f"content not among our sources: {what}", "") for paper, what in UNKNOWN.items()]
    table = pd.DataFrame(rows, columns=["paper", "item", "figure"])
    return table.sort_values("paper", kind="stable", ignore_index=True)


def write(profile: str) -> Path:
    """Write page and summary of a profile, for ``photos`` also the tables of ``docs/``; returns the page."""
    opened = lab.open(profile)
    results = opened.results
    folder, summary, figures = paths.get_figures_dir(profile), summarize(results), read_figures(profile)
    controls = course.judge_controls(results) if len(results) else pd.DataFrame()
    plain = summary.drop(columns="auc", errors="ignore")
    paths.write_atomic(folder / "08_summary.csv", plain.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    environment = jinja2.Environment(loader=jinja2.PackageLoader("mia_utils", "."), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html").render(
        profile=profile, version=__version__, figures=figures, chapters=read_chapters(),
        summary=summary.to_dict("records"), columns=list(plain), catalog=list_catalog(figures).to_dict("records"),
        controls=say_controls(controls),
    )  # fmt: skip
    if profile == "photos":
        write_tables(summary, figures, controls)
        found = findings.say_all(results, opened.difference)
        fill_sections(profiles.find_source("README.md"), {"findings": found, "times": say_times()})
    return paths.write_atomic(folder / "index.html", page)


def say_times() -> str:
    """Return the measured times of the main commands as a table, empty where none were measured."""
    path = profiles.find_source("docs", "times.csv")
    if not path.is_file():
        return ""
    table = pd.read_csv(path, dtype=str).fillna("")
    own = table["command"].str.startswith("./run_all.sh")
    return to_markdown(table.loc[own, ["command", "what it does", "time"]].head(6))


def fill_sections(path: Path, sections: dict[str, str]) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``; empty texts replace nothing."""
    content = path.read_text(encoding="utf-8")
    for name, text in sections.items():
        parts = re.split(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", content, flags=re.S)
        if len(parts) != 4:
            raise ValueError(f"{path.name}: expected one section {name}:begin ... {name}:end, got {len(parts) // 3}")
        content = f"{parts[0]}{parts[1]}{text}\n{parts[2]}{parts[3]}" if text else content
    paths.write_atomic(path, content)


def say_controls(controls: pd.DataFrame) -> str:
    """Say how the controls came out, and the smallest AUC that this rule would have rejected in each family."""
    if controls.empty:
        return "No control was run."
    bars = controls.groupby("family", sort=False)["rejects_above"].median().dropna()
    said = "; ".join(f"{label_of(family)}: {format_value(bar)}" for family, bar in dict(bars).items())
    n = int(controls["rejected"].sum())
    text = f"{len(controls)} distinct control rows, {n or 'none'} rejected (Holm at .01 in each family)."
    return text + (f" Smallest AUC that would have been rejected (median): {said}." if said else "")


def write_tables(summary: pd.DataFrame, figures: list[dict[str, Any]], controls: pd.DataFrame) -> None:
    """Write ``docs/results.md``, ``catalog.md`` and ``benchmarks.md``."""
    docs, parts = profiles.find_source("docs"), []
    results = to_markdown(summary.drop(columns=["auc", "queries"]))
    for path in sorted(profiles.find_source("benchmarks", "results").glob("*.csv")):
        frame = pd.read_csv(path).dropna(axis="columns", how="all")
        frame = frame.drop(columns=["commit", "versions", "date"], errors="ignore")
        parts.append(f"## {path.stem.replace('_', ' ')}\n\n{to_markdown(frame)}")
    pages = {
        "results": ("Results of profile photos", f"{say_controls(controls)}\n\n{results}"),
        "catalog": ("Figures and tables of the four papers", to_markdown(list_catalog(figures))),
        "benchmarks": ("Benchmarks", "\n\n".join(parts)),
    }
    for name, (title, text) in pages.items():
        paths.write_atomic(docs / f"{name}.md", f"<!-- written by ./run_all.sh replay -->\n\n# {title}\n\n{text}\n")

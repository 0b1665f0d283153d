"""The page of a profile, ``figures/<profile>/index.html``, the tables of ``docs/`` and the numbers of the README.

Everything is read from what other commands wrote: PNG files with their texts, the results table, the notebooks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from mia_utils import __version__, course, lab, paths
from mia_utils.plots.style import WORDS, format_interval, format_value, label_of
from mia_utils.runner import parameters, profiles

SUMMARY = "main encoders architectures datasets probes calibration defenses output-defenses segmenter-defenses".split()
UNKNOWN = {  # figures and tables of the papers whose content is not among our sources
    "PartCrop": "Figures 1, 3 to 7, its tables",
    "MIM": "its figures and tables by number",
    "EncoderMI": "its figures and tables by number",
    "Segmentations-Leak": "its figures and tables by number",
}


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Return one line per attack on a target, its controls as columns.

    Args:
        table: ``lab.results``.

    Returns:
        DataFrame with words for readers: attack, target, data, N, T, augmentation, knowledge, decoder, defense, seeds,
        AUC with interval, verdict, TPR at 1 % FPR, utility, and the AUC of each control.
    """
    table = table[table["seed"].isna() & table["study"].isin(SUMMARY) & (table["protocol"] == "controlled")]
    facts = [c for c in ("attack", "target", "checkpoint", "knowledge", "shadow", "decoder", "reference", "defense",
                         "strength", "attacker", "probes", "query_augmentation") if c in table]  # fmt: skip
    # who knows of a defense matters only where there is one
    table, lines = table.assign(attacker=table["attacker"].where(table["defense"] != "none", "")), []
    for _, part in table.groupby(facts, sort=False, dropna=False):
        own = part[part["control"] == ""]
        if own.empty:
            continue
        a = own.sort_values(["n_seeds", "n_nonmembers"], kind="stable").iloc[-1]
        controls = part[(part["control"] != "") & (part["n_seeds"] == a["n_seeds"])]
        controls = controls.drop_duplicates("control", keep="last").set_index("control")["auc"]
        strength = "" if pd.isna(a["strength"]) else a["strength"]
        defense = "" if a["defense"] == "none" else f"{label_of(a['defense'])} {strength}".strip()
        line = {"attack": label_of(a["attack"]), "target": name_target(a), "data": label_of(a["dataset"])}
        line |= {"N": a["n_train"], "T": a["checkpoint"], "trained with": WORDS.get(a["augmentation"])}
        line |= {"knowledge": name_knowledge(a), "decoder": label_of(a["decoder"]) if a["attack"] == "mim" else ""}
        line |= {"defense": defense, "attacker": a["attacker"] if defense else "", "seeds": a["n_seeds"]}
        line |= {"auc": a["auc"], "AUC": format_interval(a["auc"], a["auc_low"], a["auc_high"])}
        line |= {"verdict": a["verdict"], "TPR at 1 % FPR": format_value(a["tpr_at_1"])}
        line |= {"utility": format_value(a["utility"]), "untrained utility": format_value(a["utility_untrained"])}
        line |= {label_of(c): format_value(controls.get(c)) for c in ("no-model", "untrained", "permuted")}
        lines.append(line | {"queries": a["queries"]})
    if not lines:
        return pd.DataFrame()
    order = ["defense", "attack", "target", "N", "T"]
    return pd.DataFrame(lines).drop_duplicates().sort_values(order, kind="stable", ignore_index=True)


def name_target(row: Any) -> str:
    """Name a target by its method, and its structure where that is not the book's ViT."""
    arch = label_of(row["arch"])
    return label_of(row["method"]) + ("" if arch == "ViT" or row["method"] in profiles.SEGMENTERS else f" ({arch})")


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
    for path in sorted(paths.get_figures_dir(profile).glob("fig*.png")):
        with Image.open(path) as image:
            info = image.info | {"width": image.width, "height": image.height}
        entry = {"name": path.stem, "file": path.name, "chapter": path.stem[3:5], "csv": path.with_suffix(".csv").name}
        entry |= {key.lower(): info.get(key, "") for key in ("Title", "Paper", "Caption", "Here")}
        figures.append(entry | {"read": texts.get(path.stem, ""), "width": info["width"], "height": info["height"]})
    return figures


def _read_readings() -> dict[str, str]:
    """Figure -> the paragraph of its notebook that says how to read it."""
    found = {}
    for path in parameters.find_notebooks().values():
        waiting: list[str] = []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code":
                waiting += re.findall(r"name=\"(fig\d\d_\w+)\"", source)
            elif match := re.search(r"\*\*How to read (?:it|them)\*\*:?\s*(.+?)(?:\n\n|$)", source, flags=re.S):
                found |= dict.fromkeys(waiting, re.sub(r"[*`$]", "", " ".join(match.group(1).split())))
                waiting = []
    return found


def read_chapters() -> list[dict[str, str]]:
    """Return number and title question of every notebook."""
    chapters = []
    for name, path in parameters.find_notebooks().items():
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()[0]
        chapters.append({"number": name[:2], "name": name, "title": first.lstrip("# ").partition("· ")[2]})
    return chapters


def list_catalog(figures: list[dict[str, Any]]) -> pd.DataFrame:
    """Return which item of which paper each figure regenerates, as the figures themselves say."""
    said = [(item, f["name"]) for f in figures if f["paper"] for item in f["paper"].split(";")]
    rows = [(*map(str.strip, item.split(":", 1)), name) for item, name in said]
    rows += [(paper, f"content not among our sources: {what}", "") for paper, what in UNKNOWN.items()]
    table = pd.DataFrame(rows, columns=["paper", "item", "figure"])
    return table.sort_values("paper", kind="stable", ignore_index=True)


def write(profile: str) -> Path:
    """Write page and summary of a profile, for ``photos`` also the tables of ``docs/``; returns the page."""
    results = lab.open(profile).results
    folder, summary, figures = paths.get_figures_dir(profile), summarize(results), read_figures(profile)
    controls = course.judge_controls(results) if len(results) else pd.DataFrame()
    text = summary.drop(columns="auc", errors="ignore").to_csv(index=False, float_format="%.6g", lineterminator="\n")
    paths.write_atomic(folder / "08_summary.csv", lambda file: file.write(text.encode()))
    environment = jinja2.Environment(loader=jinja2.PackageLoader("mia_utils", "."), autoescape=True, trim_blocks=True)
    page = environment.get_template("page.html").render(
        profile=profile, version=__version__, figures=figures, chapters=read_chapters(),
        summary=summary.to_dict("records"), columns=[c for c in summary if c != "auc"],
        catalog=list_catalog(figures).to_dict("records"), controls=say_controls(controls),
    )  # fmt: skip
    path = paths.write_atomic(folder / "index.html", lambda file: file.write(page.encode()))
    if profile == "photos":
        write_tables(summary, figures, controls)
        fill_sections(profiles.find_source("README.md"), {"findings": say_findings(results), "times": say_times()})
    return path


_PARTIAL = "knowledge == 'partial' and attack =="
FINDINGS = (  # question; query of the attack's rows; what has to be said beside it, and where it stands
    ("What leaks most?", f"target == 'mae-target' and {_PARTIAL} 'mim'",
     "the same method with strong crops", f"target == 'mae-crop-target' and {_PARTIAL} 'mim'"),
    ("Does an encoder leak that is worth using?", f"target == 'simclr-target' and {_PARTIAL} 'encodermi-t'",
     "the same attack on DINO", f"target == 'dino-target' and {_PARTIAL} 'encodermi-t'"),
)  # fmt: skip


def say_findings(results: pd.DataFrame) -> str:
    """Say the README's findings: attack, controls, and what they do not say; all numbers from the table."""
    rows, lines = results[results["seed"].isna()], []
    main = rows[(rows["study"] == "main") & (rows["defense"] == "none")]
    for question, query, other, query_other in FINDINGS:
        part, beside = main.query(query), main.query(f"{query_other} and control == ''")
        if part.empty or beside.empty:
            continue
        a, b, n = part[part["control"] == ""].iloc[0], beside.iloc[0], int(part["n_seeds"].iloc[0])
        name = f"{label_of(a['attack'])} on {label_of(a['method'])}"
        how = f"{a['n_train']:,.0f} images, {a['epochs']:,.0f} epochs, {n} training{'s' * (n > 1)}"
        auc, auc_b = (f"{format_interval(r['auc'], r['auc_low'], r['auc_high'])}, {r['verdict']}" for r in (a, b))
        blind = part[part["control"] != ""].drop_duplicates("control")
        controls = ", ".join(f"{label_of(c['control'])} {format_value(c['auc'])}" for _, c in blind.iterrows())
        worth = f"utility {format_value(a['utility'])}, untrained {format_value(a['utility_untrained'])}"
        rate = f"TPR at 1 % FPR {format_value(a['tpr_at_1'])}"
        lines.append(
            f"- **{question}** {name} ({how}): AUC {auc}; {rate}. *Controls*: {controls}. "
            f"*Beside it*: {worth}; {other}: AUC {auc_b}. *It does not say* how much larger encoders leak."
        )
    blind = rows[(rows["study"] == "baselines") & (rows["dataset"] == "cifar10")].set_index("protocol")["auc"]
    if {"released-view", "controlled"} <= set(blind.index):
        flawed, clean = (format_value(blind[protocol]) for protocol in ("released-view", "controlled"))
        lines.append(
            f"- **How far does one get without any model?** To AUC {flawed} when members come cropped and non-members "
            f"whole, as in released code; *control*: {clean} with one view for all, as in every row here. "
            "*It does not say* that published attacks find nothing."
        )
    return "\n".join(lines)


def say_times() -> str:
    """Return the measured times of the main commands as a table."""
    path = profiles.find_source("docs", "times.csv")
    if not path.is_file():
        return ""
    table = pd.read_csv(path, dtype=str)[["command", "what it does", "time"]]
    return to_markdown(table[table["command"].str.startswith("./run_all.sh")].head(6))


def fill_sections(path: Path, sections: dict[str, str]) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``; empty texts replace nothing."""
    content = path.read_text(encoding="utf-8")
    for name, text in sections.items():
        parts = re.split(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", content, flags=re.S)
        if len(parts) != 4:
            raise ValueError(f"{path.name}: expected one section {name}:begin ... {name}:end, got {len(parts) // 3}")
        content = f"{parts[0]}{parts[1]}{text}\n{parts[2]}{parts[3]}" if text else content
    paths.write_atomic(path, lambda file: file.write(content.encode()))


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
    """Write ``docs/results.md``, ``catalog.md``, ``benchmarks.md`` and ``times.md``."""
    docs = profiles.find_source("docs")
    left_out = ["auc", "decoder", "attacker", "queries"]
    results = to_markdown(summary.drop(columns=left_out))
    pages = {"results": ("Results of profile photos", f"{say_controls(controls)}\n\n{results}")}
    pages["catalog"] = ("Figures and tables of the four papers", to_markdown(list_catalog(figures)))
    timed = profiles.find_source("docs", "times.csv")
    times = to_markdown(pd.read_csv(timed, dtype=str).fillna("")) if timed.is_file() else ""
    pages["times"] = ("Measured times", times)
    folder, parts = profiles.find_source("benchmarks", "results"), []
    for path in sorted(folder.glob("*.csv")):
        frame = pd.read_csv(path)
        kept = [c for c in frame if frame[c].notna().any() and c not in ("commit", "versions", "date")]
        parts.append(f"## {path.stem.replace('_', ' ')}\n\n{to_markdown(frame[kept])}")
    pages["benchmarks"] = ("Benchmarks", "\n\n".join(parts))
    for name, (title, text) in pages.items():
        content = f"<!-- written by ./run_all.sh replay -->\n\n# {title}\n\n{text}\n"
        paths.write_atomic(docs / f"{name}.md", lambda file, content=content: file.write(content.encode()))


def to_markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown, numbers with few digits."""
    plain = table.copy()
    for name in plain.select_dtypes("number"):
        plain[name] = [("" if pd.isna(v) else f"{v:,.4g}" if v % 1 else f"{v:,.0f}") for v in plain[name]]
    text = plain.fillna("").astype(str).replace({r"\|": "/"}, regex=True)
    lines = [text.columns, ["---"] * len(text.columns), *text.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

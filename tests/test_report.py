"""Tests of the summary table, the page, the catalog and the README sections."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from figure_lab import make_lab, make_result

from mia_utils import attacks, figures, paths, plots, report
from mia_utils.protocol import metrics

COLUMNS = (
    "paper attack control model_id method arch dataset protocol knowledge attacker defense strength n_train epochs "
    "n_members n_nonmembers n_seeds auc auc_low auc_high tpr_at_10 tpr_at_1 tpr_at_1_low tpr_at_1_high tpr_at_01 "
    "accuracy_at_shadow_threshold balanced_accuracy precision recall f1 utility train_seconds half_width "
    "queries_per_image"
).split()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Summary and page of a made-up lab."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("report home")
        patch.setenv("MIA_HOME", str(home))
        lab = make_lab()
        summary = report.write_summary(lab)
        figures.draw("fig03_transfer", lab)
        fig, table = plots.draw_pipeline([("image", None), ("score", ".87")], title="The hero <1>")
        plots.save(fig, paths.get_figures_dir("quick") / "fig03_hero.png", table, caption="A picture.")
        yield lab, summary, report.write_index("quick")


class _Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.references, self.tags, self.images = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.images += tag == "img"
        self.references += [values[k] for k in ("src", "href", "srcset", "poster", "action") if values.get(k)]


def test_summary_has_exactly_the_columns_of_the_design(written):
    _, summary, page = written
    assert list(summary.columns) == COLUMNS
    on_disk = (page.parent / "08_summary.csv").read_text().splitlines()[0]
    assert on_disk.split(",") == COLUMNS


def test_summary_holds_each_attack_over_its_seeds_with_its_controls_below(written):
    lab, summary, _ = written
    part = summary[(summary["model_id"] == "mae-target") & (summary["knowledge"] == "partial")]
    assert list(part["control"]) == ["", "no-model", "untrained", "permuted"]
    row = part.iloc[0]
    results = [r for r in lab.results("fig03_roc") if r.meta["method"] == "mae"]
    expected = metrics.combine([(r.score, r.is_member, r.fold, None, r.threshold) for r in results])
    assert (row["auc"], row["n_seeds"]) == (expected.auc, 2)
    assert row["tpr_at_10"] == expected.tpr_at[0.1].value
    assert pd.isna(row["tpr_at_1"]) and pd.isna(row["tpr_at_01"])  # fewer than 1,000 strangers: empty, not 0
    assert pd.isna(row["accuracy_at_shadow_threshold"]) and row["paper"] == "PartCrop"
    shadow = summary[(summary["knowledge"] == "shadow:PET") & (summary["control"] == "")].iloc[0]
    assert 0 <= shadow["accuracy_at_shadow_threshold"] <= 1
    assert set(part["queries_per_image"]) == {65, 0}


def test_empty_cells_stay_empty_on_disk(written):
    _, summary, page = written
    on_disk = pd.read_csv(page.parent / "08_summary.csv")
    assert on_disk["tpr_at_01"].isna().all()
    assert len(on_disk) == len(summary)


def test_sweeps_stay_out_of_the_summary(written):
    lab, summary, _ = written
    kept = [e for e in figures.group(r for r in lab.saved if r.meta["summary"])]
    assert (summary["control"] == "").sum() == len(kept)


def test_each_distinct_control_is_judged_once(written):
    lab, _, _ = written
    verdict = report.judge_controls(figures.summarize(lab))
    blind = verdict[verdict["control"].str.startswith("no-model")]
    # two seeds of the targets share one no-model control per split; the one-seed rows are covered by it
    assert len(blind) == 1
    assert not verdict["rejected"].any()


def test_a_control_that_sees_members_is_reported():
    result = make_result("partcrop", 0.8, 1)
    result.controls["no-model"] = make_result("partcrop", 0.9, 2, control="no-model")
    verdict = report.judge_controls(figures.group([result]))
    assert verdict["rejected"].tolist() == [True]
    assert report.say_controls(verdict).startswith("1 of 1 controls reject chance")
    flawed = make_result("partcrop", 0.8, 1, protocol="released-view")
    flawed.controls = result.controls
    assert report.judge_controls(figures.group([flawed])).empty  # a positive control on purpose


def test_the_page_asks_nothing_from_outside(written):
    _, _, path = written
    text = path.read_text()
    page = _Page(text)
    for reference in page.references:
        assert reference.startswith(("data:", "#")) or (path.parent / reference).is_file(), reference
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert page.images == 2


def test_the_page_starts_with_the_heroes_and_names_csv_command_and_seeds(written):
    _, _, path = written
    text = path.read_text()
    assert text.index('id="fig03_hero"') < text.index('id="fig03_transfer"')
    assert "The hero &lt;1&gt;" in text and "A picture." in text
    assert "fig03_transfer.csv" in text and "./run_all.sh quick 03" in text and "seeds 0, 1" in text
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    assert "distinct controls agree with chance" in text
    assert all(f"{name} " in text for name in ("mia_utils", "Python", "torch"))


def test_the_same_results_give_the_same_page(written, monkeypatch):
    _, _, path = written
    monkeypatch.setenv("MIA_HOME", str(path.parents[2]))
    before = path.read_bytes()
    assert report.write_index("quick").read_bytes() == before


def test_a_page_without_results_says_what_to_run(home):
    text = report.write_index("photos").read_text()
    assert "No figure yet" in text and "./run_all.sh photos 08" in text


def test_the_catalog_counts_every_figure_and_table_of_the_papers():
    rows = report.catalog()
    for paper, n_figures, n_tables in (("PartCrop", 7, 9), ("MIM", 8, 7)):
        items = rows.loc[rows["paper"] == paper, "item"]
        assert sorted(i for i in items if i.startswith("Figure")) == sorted(f"Figure {k + 1}" for k in range(n_figures))
        assert sorted(i for i in items if i.startswith("Table")) == sorted(f"Table {k + 1}" for k in range(n_tables))
    assert set(rows["paper"]) == {"PartCrop", "MIM", "EncoderMI", "Segmentations-Leak"}
    unknown = rows[rows["status"] == "content not available"]
    assert (unknown["content"] == "content not available here").all() and (unknown["file"] == "").all()
    assert not rows.duplicated(["paper", "item", "content"]).any()


def test_every_file_that_the_catalog_calls_drawn_has_a_writer():
    rows = report.catalog()
    drawn = rows[rows["status"].str.startswith("drawn")]
    assert (drawn["file"] != "").all() and (drawn["notebook"] != "").all()
    assert set(drawn["file"]) <= report.find_writers()
    assert (rows.loc[~rows["status"].str.startswith("drawn"), "file"] == "").all()


def test_readme_sections_are_rewritten_from_files(written, tmp_path: Path, monkeypatch):
    _, _, page = written
    monkeypatch.setenv("MIA_HOME", str(page.parents[2]))
    photos = page.parents[1] / "photos"
    photos.mkdir(exist_ok=True)
    for name in ("08_summary.csv", "08_controls.csv"):
        (photos / name).write_bytes((page.parent / name).read_bytes())
    readme = tmp_path / "README.md"
    parts = [f"<!-- {n}:begin -->\nSTALE\n<!-- {n}:end -->" for n in ("results", "attacks", "catalog")]
    readme.write_text("# Title\n" + "\ntext\n".join(parts) + "\nend\n")
    assert report.update_readme(readme) == ["results", "attacks", "catalog"]
    first = readme.read_text()
    assert "STALE" not in first and first.startswith("# Title\n") and first.endswith("\nend\n")
    assert all(name in first for name in attacks.ATTACKS) and "`mae-target`" in first
    assert "distinct controls agree" in first and "content not available here" in first
    report.update_readme(readme)
    assert readme.read_text() == first


def test_the_speed_section_is_made_of_the_tables_of_the_benchmarks(tmp_path: Path):
    rows = [
        dict(what="mae: forward + backward", rate=1200.0, ratio=1.0),
        dict(what="mae: fit", rate=1080.4, ratio=0.9003, target=0.75, met=True),
        dict(what="mae: updates", rate=30000.0, ratio=25.0),
        dict(what="dino: forward + backward", rate=200.0, ratio=1.0),
        dict(what="dino: fit", rate=100.0, ratio=0.5, target=0.75, met=False, note="it draws"),
    ]
    common = dict(
        unit="images/s", against="forward + backward", threads=1, machine="A chip, 2 cores, load 7.1 at first"
    )
    pd.DataFrame([row | common for row in rows]).to_csv(tmp_path / "training.csv", index=False)
    (tmp_path / "gpu").mkdir()
    old = pd.DataFrame({"what": ["a: bare loop", "a: scoring"], "images_per_second": [10.0, 9.0], "ratio": [1.0, 0.9]})
    old.to_csv(tmp_path / "gpu" / "mim.csv", index=False)
    text = report.speed_markdown(tmp_path)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert [row for row in cells if row[0] in ("mim", "training")] == [
        ["training", "mae", "fit", "1,080 images/s", "0.90 x forward + backward", "at least 0.75: met"]
        + ["A chip, 2 cores, 1 thread"],
        ["training", "dino", "fit", "100 images/s", "0.50 x forward + backward", "at least 0.75: not met (it draws)"]
        + ["A chip, 2 cores, 1 thread"],
        ["mim", "a", "scoring", "9.00 images/s", "0.90 x bare loop", "", ""],  # no target: folded away
    ]
    assert text.index("not met") < text.index("<details><summary>1 more rates") < text.index("| mim |")
    limits = [line for line in text.splitlines() if line.startswith("- ")]
    assert [line.split(":")[0] for line in limits] == ["- mim", "- training"]  # the others were not measured
    sweep = {"what": ["images: 1,000", "images: 4,000", "images: 60,000"], "rate": [5.0, 5.0, 5.0], "ratio": [1.0] * 3}
    sweep |= {"above_mib": [20.1, 21.0, 22.4], "images_mib": [2.9, 11.7, 175.8]}
    pd.DataFrame(sweep).to_csv(tmp_path / "memory.csv", index=False)
    text = report.speed_markdown(tmp_path)  # the ends of a sweep, and none of its rates
    assert "| memory | images | 1,000 | 20 MiB | 3 MiB |\n| memory | images | 60,000 | 22 MiB | 176 MiB |" in text
    assert "4,000" not in text and text.count("| memory |") == 2
    with pytest.raises(FileNotFoundError, match="benchmarks"):
        report.speed_markdown(tmp_path / "empty")


def test_the_readme_holds_what_the_benchmarks_measured(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- speed:begin -->\nSTALE\n<!-- speed:end -->\n")
    assert report.update_readme(readme) == ["speed"]
    measured = sorted(path.stem for path in (paths.PACKAGE_ROOT / "benchmarks" / "results").glob("*.csv"))
    assert measured and all(f"| {name} |" in readme.read_text() for name in measured)
    assert "speed:begin" in (paths.PACKAGE_ROOT / "README.md").read_text()


def test_a_section_without_end_and_a_missing_table_are_one_line_errors(home, tmp_path: Path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- attacks:begin -->\n")
    with pytest.raises(ValueError, match="attacks:begin"):
        report.update_readme(readme)
    with pytest.raises(FileNotFoundError, match="run_all.sh photos 08"):
        report.load_summary("photos")
    assert report.main(["nonsense"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

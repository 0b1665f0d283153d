"""The page of a profile and the tables of docs/: made from a results table, figures with their texts, and notebooks."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from mia_utils import findings, page, paths, plots
from mia_utils.lab import Lab
from mia_utils.plots.style import make_figure


def make_table(**facts) -> pd.DataFrame:
    """Two attacks on two targets with their controls, one defended target, one flawed protocol."""
    base = dict(study="main", role="target", method="mae", arch="vit_micro_patch8_32", dataset="cifar10", n_train=128)
    base |= dict(epochs=500, checkpoint=500, augmentation="none", knowledge="partial", shadow=None, decoder="own")
    base |= dict(reference=None, defense="none", strength=None, attacker="adaptive", protocol="controlled", seed=np.nan)
    base |= dict(n_seeds=3, auc=0.8, auc_low=0.7, auc_high=0.9, auc_se=0.05, minimum_detectable=0.6, p=0.5, queries=8)
    base |= dict(utility=0.4, utility_untrained=0.3, tpr_at_1=0.25, n_members=100, n_nonmembers=900, verdict="shown")
    rows = []
    for attack, target, method in (("mim", "mae-target", "mae"), ("partcrop", "simclr-target", "simclr")):
        for i, control in enumerate(("", "no-model", "untrained", "permuted")):
            auc = 0.8 if not control else 0.5 + i / 100
            rows.append(base | dict(attack=attack, target=target, method=method, control=control, auc=auc))
    rows.append(rows[0] | dict(defense="noise", strength=0.5, auc=0.6, verdict="not shown"))
    rows.append(rows[0] | dict(protocol="released-view", auc=0.99))
    rows.append(rows[0] | dict(seed=0, auc=0.7))
    return pd.DataFrame([row | facts for row in rows])


@pytest.fixture
def written(home, monkeypatch):
    """The page of profile quick over the made-up table, with one figure."""
    monkeypatch.setattr(Lab, "results", property(lambda self: make_table()))
    monkeypatch.setattr(page.profiles, "find_source", lambda *parts: paths.PACKAGE_ROOT.joinpath(*parts))
    plots.use("quick")
    fig, axes = make_figure()
    axes[0, 0].plot([0, 1])
    title = 'MAE <leaks> & "more"'
    plots.finish(
        fig, make_table(), title=title, name="fig03_hero", paper="MIM: masks; PartCrop: main table", caption="a caption"
    )
    plots.use("")
    path = page.write("quick")
    return path, path.read_text(encoding="utf-8")


def test_one_line_for_each_attack_with_its_controls_as_columns():
    table = page.summarize(make_table())
    assert table[["attack", "target", "defense"]].to_numpy().tolist() == [
        ["MIM attack, the target's decoder", "MAE", ""], ["PartCrop", "SimCLR", ""],
        ["MIM attack, the target's decoder", "MAE", "Noise 0.5"],
    ]  # fmt: skip
    first = table.iloc[0]
    assert first[["no model", "untrained model", "permuted labels"]].tolist() == [".51", ".52", ".53"]
    assert first["trained with"] == "whole images"
    assert first[["AUC", "verdict", "TPR at 1 % FPR"]].tolist() == [".80 [.70, .90]", "shown", ".25"]
    assert page.summarize(make_table().iloc[:0]).empty


def test_where_an_attack_was_run_twice_the_row_of_more_nonmembers_stands():
    few = make_table(study="main", n_nonmembers=100, tpr_at_1=np.nan)
    table = page.summarize(pd.concat([few, make_table(study="encoders")]))
    assert len(table) == 3 and table["TPR at 1 % FPR"].iloc[0] == ".25"


@pytest.mark.parametrize(("knowledge", "words"), [
    ("partial", "some members"), ("shadow:PET", "shadow: same data, encoder, training"),
    ("shadow:P--", "shadow: same data"), ("shadow:---", "shadow: nothing shared"),
])  # fmt: skip
def test_knowledge_is_said_in_words(knowledge, words):
    assert page.name_knowledge({"knowledge": knowledge}) == words


class Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_nobody_for_anything_and_its_links_exist(written):
    path, text = written
    tags = Tags(text).found
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//|@import|url\(", text)
    ids = {a["id"] for _, a in tags if "id" in a}
    for tag, attributes in tags:
        for target in filter(None, (attributes.get("href"), attributes.get("src"))):
            assert target[1:] in ids if target.startswith("#") else (path.parent / target).is_file(), f"{tag}: {target}"


def test_texts_are_escaped_and_figures_have_alternative_text_caption_and_numbers(written):
    _, text = written
    assert "<leaks>" not in text and "&lt;leaks&gt; &amp;" in text and "a caption" in text
    images = [a for tag, a in Tags(text).found if tag == "img"]
    assert any(a["alt"] == 'MAE <leaks> & "more"' for a in images) and all("alt" in a for a in images)
    assert 'href="fig03_hero.csv"' in text


def test_the_table_can_be_searched_and_read_without_script(written):
    _, text = written
    rows = re.findall(r"<tr class=\"([\w-]+)\" data-defense=\"([^\"]*)\">(.+?)</tr>", text, flags=re.S)
    assert [(verdict, defense) for verdict, defense, _ in rows] == [
        ("shown", ""),
        ("shown", ""),
        ("not-shown", "Noise 0.5"),
    ]
    plain = re.sub(r"<[^>]+>", " ", rows[0][2]).lower()
    assert all(word in plain for word in "mim attack mae .25 .51".split())  # what a reader would search for
    heads = [a for tag, a in Tags(text).found if tag == "th"]
    assert heads and all(a.get("scope") == "col" for a in heads) and text.count("<caption") == 2
    assert (paths.get_figures_dir("quick") / "08_summary.csv").is_file()


def test_the_catalog_is_made_of_what_the_figures_say():
    figures = [{"name": "fig03_hero", "paper": "MIM: masks; PartCrop: main table"}, {"name": "fig00_x", "paper": ""}]
    figures.append({"name": "fig08_hero", "paper": "all attacks"})  # of no paper
    table = page.list_catalog(figures)
    assert ("this book", "all attacks", "fig08_hero") in set(table.itertuples(index=False, name=None))
    assert ("PartCrop", "main table", "fig03_hero") in set(table.itertuples(index=False, name=None))
    assert set(table["paper"]) == {"this book", *page.UNKNOWN} and len(table) == 3 + len(page.UNKNOWN)


def test_rows_that_differ_in_their_probes_differ_in_name_and_the_first_study_speaks_for_the_same():
    row = make_table().query("control == '' and attack == 'partcrop' and seed.isna()").iloc[0]
    base = dict(row, study="probes", knowledge="partial", defense="none", attacker="static", strength=None, auc=0.4)
    main = base | dict(study="main", auc=0.6)
    rows = [main, base, base | dict(probes="random"), base | dict(probes="other-image")]
    said = page.summarize(pd.DataFrame(rows)).set_index("attack")["auc"]
    assert dict(said) == {"PartCrop": 0.6, "PartCrop, another image's tokens": 0.4, "PartCrop, random vectors": 0.4}


def test_no_two_lines_are_alike_but_for_their_numbers():
    row = dict(make_table().query("control == '' and attack == 'mim' and defense == 'noise'").iloc[0], decoder="own")
    rows = [row | dict(attacker=who, auc=auc) for who, auc in (("adaptive", 0.6), ("static", 0.5))]
    rows += [row | dict(target=f"mae-mask{share}-target", defense="none") for share in (50, 90)]
    said = page.summarize(pd.DataFrame(rows))
    assert said["defense"].tolist() == ["", "", "Noise 0.5", "Noise 0.5, static attacker"]
    assert said["target"].tolist() == ["MAE (mae-mask50-target)", "MAE (mae-mask90-target)", "MAE", "MAE"]


def test_findings_carry_controls_and_limits_and_absent_ones_are_left_out():
    table = make_table().assign(utility=0.35)
    assert findings.say_all(table.assign(study="encoders")) == ""
    said = findings.say_all(table)
    assert said.count("\n") == 0 and "MIM attack on MAE" in said and ".99 [.70, .90], shown" in said
    assert "no model .51" in said and "utility .35, untrained .30" in said


def test_an_encoder_worth_using_is_one_that_learned_and_the_same_recipe_on_more_images_stands_beside_it():
    known = dict(make_table().query("control == '' and attack == 'mim'").iloc[0], attack="encodermi-t", seed=None)
    known |= dict(epochs=400, checkpoint=400, utility=0.48)
    simclr = known | dict(target="simclr-target", method="simclr", auc=0.7)
    leaky = known | dict(target="mae-target", auc=0.9, utility=0.35)
    moco = known | dict(target="mocov2-own-target", method="moco-v2", study="own", n_train=2000, utility=0.58)
    ages = [moco | dict(checkpoint=age, auc=auc) for age, auc in ((200, 0.51), (400, 0.55))]
    other = moco | dict(augmentation="simclr", auc=0.52)
    said = findings.say_all(pd.DataFrame([simclr, leaky, *ages, other])).splitlines()
    assert "EncoderMI-T on MAE" in said[0] and "EncoderMI-T on SimCLR" in said[1] and "AUC .70" in said[1]
    assert "MoCo v2 on 2,000, 400 epochs: AUC .55" in said[1] and "utility .58" in said[1]
    assert ".51" not in said[1] and ".52" not in said[1]


def test_defenses_are_said_with_what_they_cost_and_without_a_reference_they_prove_nothing():
    row = dict(make_table(study="valuable", n_train=2048).query("control == '' and attack == 'mim'").iloc[0], seed=None)
    rows = [row | dict(auc=0.6), row | dict(control="no-model", auc=0.49), row | dict(reference="r", auc=0.8)]
    crops = row | dict(reference="r", auc=0.51, utility=0.38, verdict="not shown", augmentation="crop")
    said = findings.say_all(pd.DataFrame([*rows, crops, crops | dict(auc=0.1, reference=None)]))
    assert "whole images .80 [.70, .90] (3 trainings), .40;" in said and "no model .49" in said
    assert "strong crops .51 [.70, .90] (not shown, 3 trainings), .38." in said
    assert said.count("\n") == 0 and ".10" not in said and ".60" not in said


def test_a_leak_is_said_with_and_without_a_reference_model_or_not_at_all():
    row = make_table().query("attack == 'mim' and control == ''").iloc[0]
    base = dict(row, study="grid", target="mae-n8192-t250-target", n_train=8192, epochs=250, checkpoint=250, seed=None)
    base |= dict(augmentation="none", dataset="cifar10", reference=None)
    plain = base | dict(auc=0.6, auc_low=0.55, auc_high=0.65)
    aided = base | dict(auc=0.8, auc_low=0.75, auc_high=0.85, reference="mae-reference")
    assert findings.say_all(pd.DataFrame([plain])) == ""
    blind = plain | dict(control="no-model", auc=0.51)
    fewer = [r | dict(n_train=512, auc=0.1) for r in (plain, aided)]
    longer = [r | dict(n_train=2048, epochs=1000, checkpoint=1000, utility=0.44) for r in (plain, aided)]
    early = plain | dict(checkpoint=100, auc=0.1)
    said = findings.say_all(pd.DataFrame([*longer, plain, aided, blind, early, *fewer]))
    assert "utility. 8,192 images, 250 epochs: whole images .80 [.75, .85], .60 [.55, .65], .40. 2,048" in said
    assert "2,048 images, 1,000 epochs: whole images .80 [.75, .85], .60 [.55, .65], .44. *Control*" in said
    assert "no model .51." in said and ".10" not in said
    rare = [r | dict(study="rates", tpr_at_01=rate) for r, rate in zip(longer, (0.01, 0.45), strict=True)]
    said = findings.say_all(pd.DataFrame([*longer, blind, *rare]))
    assert ".44. TPR at .1 % FPR there: whole images .45, .01. *Control*" in said
    views = dict(study="images", attack="encodermi-t", method="simclr", n_train=2048, target="simclr-n2048-target")
    few = dict(n_train=128, target="simclr-n128-target", auc=0.1)
    similar = [r | views for r in (plain, aided)]
    said = findings.say_all(pd.DataFrame([plain, aided, blind, *similar, *(r | few for r in similar)]))
    assert ".40. EncoderMI-T on SimCLR, 2,048 images, 250 epochs: .80 [.75, .85], .60 [.55, .65], .40. *Control*" in said
    assert "EncoderMI-T" not in findings.say_all(pd.DataFrame([plain, aided, blind, similar[0]]))
    crops = [r | dict(augmentation="crop", auc=r["auc"] - 0.1) for r in (plain, aided)]
    said = findings.say_all(pd.DataFrame([plain, aided, *crops, blind]))
    assert ".60 [.55, .65], .40; strong crops .70 [.75, .85], .50" in said


def test_tables_of_docs_have_few_digits_and_no_stray_bars():
    text = page.to_markdown(pd.DataFrame({"a": [1234.0, 0.123456, np.nan], "b": ["x|y", "", "z"]}))
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| 1,234 | x/y |", "| 0.1235 |  |", "|  | z |"]

"""The worked examples of docs/CONTRIBUTING.md and README.md run as they stand."""

from __future__ import annotations

import contextlib
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mia_utils import attacks, page, paths, plots
from mia_utils.pretrain import registry

ROOT = paths.PACKAGE_ROOT


def read_snippets(name: str) -> dict[str, str]:
    """Heading -> the Python code below it, in order."""
    parts = re.split(r"^## (.+)$", (ROOT / name).read_text(encoding="utf-8"), flags=re.M)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return {head: "\n".join(code) for head, text in pairs if (code := re.findall(r"```python\n(.+?)```", text, re.S))}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each example printed, and what it left behind."""
    space, told = {"__name__": "example"}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIA_HOME", str(tmp_path_factory.mktemp("home")))
        plots.use("smoke")
        try:
            for head, code in read_snippets("docs/CONTRIBUTING.md").items():
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(code, head, "exec"), space)
                told[head] = out.getvalue().splitlines()
        finally:
            plots.use("")
            attacks.ATTACKS.pop("norm", None)
            registry.METHODS.pop("two-views", None)
    return space, told


def test_an_attack_of_ones_own_has_its_three_controls(told):
    space, said = told
    assert len(said["An attack"]) == 4 and all("AUC" in line for line in said["An attack"])
    assert set(space["result"].controls) == {"no-model", "untrained", "permuted"}


def test_a_method_of_ones_own_trains_and_is_attacked(told):
    space, said = told
    assert "Result(norm: AUC" in said["A training method"][-1]
    assert space["mine"].method == "two-views"


def test_a_figure_of_ones_own_says_its_finding_and_what_was_expected(told):
    space, said = told
    title, here = said["A figure"]
    assert title.startswith("The norm") and "a two-epoch model does not leak" in here
    assert space["drawn"].path.name == "fig99_norm.png" and space["drawn"].path.with_suffix(".csv").is_file()


def test_the_readme_audits_a_model_of_ones_own(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for folder in ("suspected", "reference"):
        (tmp_path / folder).mkdir()
        for i in range(24):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten())
    exec(read_snippets("README.md")["Attack my own model"], {"my_model": model})
    said = capsys.readouterr().out
    assert "AUC" in said and "model" in said


def test_the_readme_is_short_and_lists_the_registered_attacks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 9_000
    for row in attacks.table().itertuples():
        if row.attack in plots.style.ATTACKS:
            (line,) = [line for line in text.splitlines() if line.startswith("| ") and f"`{row.attack}`" in line]
            assert f" | {row.needs} | {row.queries} | " in line


def test_sections_are_filled_between_their_marks(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n")
    page.fill_sections(path, {"x": "new"})
    assert path.read_text() == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n"
    with pytest.raises(ValueError, match="expected one section y:begin"):
        page.fill_sections(path, {"y": "new"})

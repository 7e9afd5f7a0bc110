"""The pages made from code: fresh, whole, and with an example that works."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import kvbank
from kvbank import errors
from kvbank.cluster import reference
from kvbank.cluster.config import load
from kvbank.cluster.settings import SECTIONS

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


@pytest.mark.parametrize("name", sorted(reference.pages()))
def test_the_page_says_what_the_code_says(name: str) -> None:
    made, written = reference.pages()[name], (DOCS / name).read_text(encoding="utf-8")
    assert made == written, "run: python -m kvbank.cluster.reference"


def test_every_setting_has_a_row_whose_variable_sets_it() -> None:
    row = r"^\| `(\w+)\.(\w+)` \| `(.*?)` \| .+ \| (.+) \| `(\w+)` \|$"
    rows = re.findall(row, reference.configuration(), flags=re.MULTILINE)
    assert [(section, name) for section, name, *_ in rows] == [
        (section, spec.name) for section, cls in SECTIONS.items() for spec in fields(cls)]
    for section, name, default, about, variable in rows:
        assert about.strip()
        if default in ("none", '""', "{}"):          # texts, and settings that need another one beside them
            continue
        settings = load(environ={variable: default})
        assert settings.sources[f"{section}.{name}"] == f"env {variable}"
        assert settings.flat()[name] == load(environ={}).flat()[name]


def test_the_example_is_a_file_that_loads(tmp_path: Path) -> None:
    file = tmp_path / "kvbank.yaml"
    file.write_text(reference.EXAMPLE)
    settings = load(file, environ={})
    assert settings.cluster.lenders == 2 and settings.tiers.host_bytes == 64 << 20 and len(settings.sources) == 8


def test_every_public_class_and_error_is_described() -> None:
    page = reference.python()
    for name in {*kvbank.__all__} - {"errors", "__version__"}:
        assert f"\n## {name}\n" in page
    for code in errors._BY_CODE:
        assert f"`{code}`" in page
    silent = [f"{name}.{member}" for name in reference.PUBLIC for member, value in vars(reference._public(name)).items()
              if not member.startswith("_") and inspect.isfunction(value) and not value.__doc__]
    assert silent == []


def test_both_pages_are_written_into_a_folder_and_nowhere_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configuration.md", "python.md"]
    assert reference.main(tmp_path / "absent") == 1
    assert "checkout" in capsys.readouterr().err

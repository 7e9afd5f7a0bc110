"""docs/promises.md and the code name the same defaults: every row is looked up, and every timing has its row."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvbank.cluster.settings import SECTIONS, Settings

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "kvstore", "workers", "cluster")
UNITS = {"": 1, "s": 1, "ms": 1e-3, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
TIMING = re.compile(r".*(?<!_per)_(s|ms)$", re.IGNORECASE)


class Row(NamedTuple):
    place: str                       # `section.name`, `file.py:NAME` or `file.py:Class.name`
    value: float                     # seconds, bytes or a count


def read_rows() -> list[Row]:
    """The rows of every table whose first two columns are `Default` and `In the code`."""
    rows, inside = [], False
    for line in (ROOT / "docs/promises.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells[:2] == ["Default", "In the code"]:
            inside = True
        elif not cells:
            inside = False
        elif inside and set(cells[0]) != {"-"}:
            found = re.fullmatch(r"([\d.,]+) ?(\w*)", cells[0])
            assert found and found[2] in UNITS, f"cannot read the default {cells[0]!r} of {cells[1]}"
            value = float(found[1].replace(",", "")) * UNITS[found[2]]
            rows += [Row(place.strip("` "), value) for place in cells[1].split(",")]
    return rows


ROWS = read_rows()


def in_code(place: str) -> float:
    """The default that the code has at `place`, in seconds, bytes or as a count."""
    if ":" not in place:
        section, _, name = place.partition(".")
        return float(getattr(getattr(Settings(), section), name))
    file, _, name = place.partition(":")
    module: Any = importlib.import_module("kvbank." + file.removesuffix(".py").replace("/", "."))
    if name.startswith("grpc."):
        value = channel_options(module)[name]
    elif "." in name:
        owner, _, field = name.partition(".")
        value = inspect.signature(getattr(module, owner)).parameters[field].default
    else:
        value = getattr(module, name)
    return float(value) * (1e-3 if name.lower().endswith("_ms") else 1)


def channel_options(module: Any) -> dict[str, Any]:
    """Every gRPC option that the module's lists name; two lists that disagree are an error."""
    found: dict[str, Any] = {}
    for pairs in vars(module).values():
        if isinstance(pairs, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            for name, value in pairs:
                assert found.setdefault(name, value) == value, f"two values of {name}"
    return found


def constants(path: Path) -> dict[str, float]:
    """Timings that a source names: constants `X_S = 3.0`, class fields `x_s: float = 3.0`, and arguments of `__init__`.

    Zero is a counter's beginning and no timing. Settings are left to `in_code`, which reads them as they are.
    """
    found: dict[str, float] = {}

    def note(owner: str, name: str, value: ast.expr | None) -> None:
        if TIMING.match(name) and isinstance(value, ast.Constant) and value.value:
            found[owner + name] = float(value.value)

    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            note("", ast.unparse(node.targets[0]), node.value)
        elif isinstance(node, ast.AnnAssign):
            note("", ast.unparse(node.target), node.value)
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.AnnAssign):
                    note(f"{node.name}.", ast.unparse(part.target), part.value)
                elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    named = part.args.args[len(part.args.args) - len(part.args.defaults):] + part.args.kwonlyargs
                    for arg, default in zip(named, [*part.args.defaults, *part.args.kw_defaults], strict=True):
                        note(f"{node.name}.", arg.arg, default)
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.place)
def test_a_row_says_what_the_code_says(row: Row) -> None:
    assert in_code(row.place) == pytest.approx(row.value)


def test_no_default_is_listed_twice() -> None:
    places = [row.place for row in ROWS]
    assert len(ROWS) > 40 and sorted(set(places)) == sorted(places)


def test_every_timing_setting_is_in_the_table() -> None:
    sections = SECTIONS.items()
    settings = {f"{section}.{field.name}" for section, cls in sections for field in dataclasses.fields(cls)}
    listed = {row.place for row in ROWS}
    assert {name for name in settings if TIMING.match(name)} - listed == set(), "add a row to docs/promises.md"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_other_timing_repeats_a_setting_of_its_name_or_has_a_row_of_its_own(folder: str) -> None:
    """A lower floor cannot import the settings, so it repeats some; then name and value must agree."""
    settings = {row.place.partition(".")[2]: row.value for row in ROWS if ":" not in row.place}
    listed = {row.place for row in ROWS}
    lost = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for name, value in constants(path).items():
            own = name.rpartition(".")[2].lower()
            seconds = value / 1000 if own.endswith("_ms") else value
            if f"{file}:{name}" not in listed and settings.get(own) != pytest.approx(seconds):
                lost.append(f"{file}:{name} = {value} (setting of that name: {settings.get(own)})")
    assert not lost, "neither a setting's default nor a row of docs/promises.md:\n" + "\n".join(lost)

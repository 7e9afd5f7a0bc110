"""The documents stay true: the tour names every file and no other, and no link leads nowhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = ("kvbank", "proto", "kernels", "kvstore", "workers", "cluster", "bench")


def sources() -> set[str]:
    """Every file written by hand, once: what lies behind the links of kvbank/ counts in its own folder."""
    found = {path for folder in FOLDERS for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.proto")]}
    names = {path.relative_to(ROOT).as_posix() for path in found if "_pb2" not in path.name}
    return {name for name in names if not name.startswith("kvbank/") or name.count("/") == 1}


def test_the_tour_has_a_sentence_for_every_file_and_for_no_other() -> None:
    tour = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w/]+\.\w+)` \| \S.* \|$", tour, flags=re.MULTILINE)
    assert sorted(set(listed)) == sorted(listed), "a file is listed twice"
    assert sources() - set(listed) == set(), "each of these needs its sentence in docs/tour.md"
    assert set(listed) - sources() == set(), "these are in docs/tour.md and not in the tree"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_file_names_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    folders = "|".join([*FOLDERS, "tests", "docs"])
    named = re.findall(rf"`((?:{folders})/[\w/.-]+\.(?:py|proto|md))\b", text)
    assert sorted({name for name in named if not (ROOT / name).exists()}) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_names_no_machine_of_ours(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"/(?:work|root)/|/home/\w+|10\.\d+\.\d+\.\d+|TODO|FIXME", text) == []


SPOKEN = 14              # characters of a message that stand in the code as they are; what is between them are values


def test_every_message_of_the_troubleshooting_page_is_one_that_the_code_can_say() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").partition("## It runs, but")[0]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", page, flags=re.MULTILINE)
    messages = [text for row in rows for text in re.findall("`(.+?)`", row)]
    trees = [ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in sources() if name.endswith(".py")]
    said = {node.value.replace("`", "").strip() for tree in trees for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    said = {part for part in said if len(part) >= SPOKEN}
    unknown = [text for text in messages
               if not any(part in text or text.rstrip(". ") in part for part in said)]
    assert len(messages) > 40 and unknown == []

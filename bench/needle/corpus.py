"""Text that is on any machine with Python and free to learn from, in pieces that are either trained on or held out.

    prose   the language reference and help topics that ship with Python, long docstrings of its standard library,
            this project's pages, and the licences of /usr/share/common-licenses where that folder exists
    code    the standard library's sources

A piece is held out by its name (words.is_held_out), never by chance, so both sides are the same in every run.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from bench.needle.words import is_held_out

ROOT = Path(__file__).resolve().parent.parent.parent
STDLIB = Path(sysconfig.get_path("stdlib"))
LICENCES = Path("/usr/share/common-licenses")
NOT_TEXT = {"site-packages", "test", "tests", "__pycache__", "encodings", "idlelib", "lib2to3", "pydoc_data", "lib-dynload"}
DOCSTRING_CHARS = 400                    # shorter ones say too little
PIECE_CHARS = 60_000                     # of a long source only the beginning is taken


@dataclass(frozen=True, slots=True)
class Piece:
    name: str
    kind: str                            # prose | code
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.name)


def read_pieces() -> list[Piece]:
    """Every piece of this machine, in the order of their names."""
    pieces = [*_topics(), *_pages(), *_licences(), *_library()]
    return sorted((piece for piece in pieces if len(piece.text) > 200), key=lambda piece: piece.name)


def digest(pieces: list[Piece]) -> str:
    """Of names and texts: says whether two machines trained on the same."""
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(f"{piece.name}\0{piece.text}\0".encode())
    return whole.hexdigest()[:16]


def described(pieces: list[Piece]) -> dict[str, str | int]:
    """What a model card says of it."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    held_out = sum(piece.held_out for piece in pieces)
    return {"digest": digest(pieces), "pieces": len(pieces), "held_out": held_out, "python": python}


def _topics() -> Iterator[Piece]:
    for name, text in topics.topics.items():
        yield Piece(f"topics/{name}", "prose", _plain(text))


def _pages() -> Iterator[Piece]:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        yield Piece(f"pages/{path.relative_to(ROOT).as_posix()}", "prose", _plain(path.read_text(encoding="utf-8")))


def _licences() -> Iterator[Piece]:
    for path in sorted(LICENCES.glob("*")) if LICENCES.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            yield Piece(f"licences/{path.name}", "prose", _plain(path.read_text(encoding="utf-8", errors="replace")))


def _library() -> Iterator[Piece]:
    for path in sorted(STDLIB.rglob("*.py")):
        name = path.relative_to(STDLIB)
        if NOT_TEXT & set(name.parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        yield Piece(f"code/{name.as_posix()}", "code", _plain(source)[:PIECE_CHARS])
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        said = [text for node in nodes if (text := ast.get_docstring(node)) and len(text) >= DOCSTRING_CHARS]
        # The same side as the source that it stands in: its docstrings are part of that text.
        yield Piece(f"code/{name.as_posix()}", "prose", _plain("\n\n".join(said))[:PIECE_CHARS])


def _plain(text: str) -> str:
    """ASCII, no tabs, no runs of empty lines: a vocabulary of 1.5k has no room for more."""
    lines = [line.expandtabs(4).rstrip() for line in text.encode("ascii", "replace").decode().splitlines()]
    kept = [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]
    return "\n".join(kept) + "\n"

"""A small world for the tasks: this project's pages as filler, the shipped tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.needle import corpus, tokenizer
from bench.needle.corpus import Piece
from bench.needle.filler import Filler
from bench.needle.sample import Speller
from bench.needle.tasks import World

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "bench" / "needle" / "model"


@pytest.fixture(scope="session")
def pieces() -> list[Piece]:
    return [piece for piece in corpus.read_pieces() if piece.name.startswith("pages/")]


@pytest.fixture(scope="session")
def world(pieces: list[Piece]) -> World:
    loaded = tokenizer.load(MODEL / "tokenizer.json")
    both = [Piece(f"{piece.name}-{side}", piece.kind, piece.text) for piece in pieces for side in range(3)]
    both += [Piece(f"code-{n}", "code", "def look(key):\n    return table[key]\n" * 20) for n in range(9)]
    return World(Speller(loaded), Filler(both, loaded, held_out=False))

"""The model card says what the run's own files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.needle import card, corpus, train
from bench.needle.corpus import Piece
from tests.bench_needle.conftest import MODEL

RESULTS = [
    *({"task": "needle", "length": 2048, "depth": depth, "right": right, "of": 50, "share": right / 50}
      for depth, right in ((0.0, 50), (0.5, 48))),
    {"task": "compare", "length": 4096, "right": 450, "of": 500, "share": 0.9},
    {"task": "text", "length": 2048, "bits_per_token": 6.5},
]


def test_a_card_holds_the_numbers_of_its_run_and_names_the_goals_that_were_missed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "place.json").write_text(
        json.dumps({"step": 4321, "stage": 7, "stage_tokens": 0, "tokens": 18_800_000, "seconds": 5400.0, "seed": 1}))
    (tmp_path / "log.jsonl").write_text(json.dumps(
        {"step": 50, "stage": "heads", "tokens": 800_000, "seconds": 120.0, "loss": 1.0, "right": {"copy": 0.91}}) + "\n")
    (tmp_path / "corpus.json").write_text(json.dumps(corpus.described([Piece("pages/a", "prose", "text")])))
    said = card.card(tmp_path, MODEL, RESULTS)
    assert "18.8 M tokens in 4321 steps and 90 minutes" in said
    assert "Missed: needle at 2,048: 96.0%, wanted 98%." in said, "the worst depth counts, and 90 % is not below 90 %"
    assert "| needle | 98.0% of 100 |" in said and "| heads | 0.8 | 2 | copy 91.0% |" in said
    assert "6.50 at 2,048" in said and "$" not in said.replace("bench/needle", "")


def test_a_corpus_is_described_by_what_is_in_it() -> None:
    told = corpus.described([Piece(f"code/{number}", "code", "x" * number) for number in range(200)])
    assert told["pieces"] == 200 and 5 < int(told["held_out"]) < 40
    assert told["digest"] != corpus.described([Piece("code/0", "code", "y")])["digest"]


def test_a_run_writes_down_its_text_and_does_not_go_on_with_another(tmp_path: Path) -> None:
    once, other = (corpus.described([Piece("pages/a", "prose", text)]) for text in ("one", "two"))
    train._same_corpus(tmp_path / "corpus.json", once)
    train._same_corpus(tmp_path / "corpus.json", once)
    with pytest.raises(SystemExit, match="another text"):
        train._same_corpus(tmp_path / "corpus.json", other)
    assert json.loads((tmp_path / "corpus.json").read_text()) == once

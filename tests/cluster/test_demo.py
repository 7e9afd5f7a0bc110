"""The demo: what it asks, and that its outcome is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbank.cluster import cli, demo
from kvbank.cluster.answers import LoanStatus, Status, TierStatus, WorkerStatus
from kvbank.errors import InvalidRequest
from kvbank.workers.models.random_model import write_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random_model(tmp_path_factory.mktemp("model"), hidden_size=32, num_layers=1, heads=2, kv_heads=1))


def test_both_questions_share_the_document_and_nothing_after_it(model: str) -> None:
    (first, second), told = demo._prompts(model, None, 2000)
    assert first[:2000] == second[:2000] and first[2000:] != second[2000:] and told["used"] == 2000
    assert told["source"] == "this project's documentation" and told["tokens"] > 2000


def test_a_document_that_would_not_need_neighbours_is_refused(model: str, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InvalidRequest, match="at least"):
        demo._prompts(model, short, 0)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        demo._prompts(model, tmp_path / "absent.txt", 0)


def test_peaks_keep_the_highest_of_each(model: str) -> None:
    peaks = demo.Peaks()
    for lent, used, borrowed in ((8, 1, 0), (24, 9, 16), (0, 5, 3)):
        peaks.note(Status(
            workers=[WorkerStatus(id="a", blocks_lent=lent, blocks_used=used, blocks_borrowed=borrowed)],
            loans=[LoanStatus(id="1", lender="a", borrower="b", blocks=lent)],
            tiers=[TierStatus(name="host", bytes_used=used)],
        ))
    assert (peaks.lent, peaks.used, peaks.borrowed, peaks.tier_bytes) == ({"a": 24}, {"a": 9}, {"a": 16}, {"host": 9})
    assert peaks.loans["1"]["blocks"] == 24 and peaks.looks == 3


@pytest.mark.slow
def test_the_demo_borrows_reuses_and_proves_its_tokens_equal(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert cli.main(["demo", "--json", "--launcher", "process", "--tokens", "1600"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] and told["tokens_compared"] == 2 * demo.ANSWER_TOKENS
    assert told["borrowed_blocks_peak"] > 0 and sum(told["peaks"]["lent"].values()) > 0
    first, second = (question["receipt"] for question in told["questions"])
    assert first["lenders"] and sum(second["reused"].values()) > 0
    assert second["computed_tokens"] < first["computed_tokens"]

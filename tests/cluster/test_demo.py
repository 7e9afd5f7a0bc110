"""The demo: what it asks, and that its outcome is what it says."""

from __future__ import annotations

import json
import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from bench.needle.words import is_held_out
from kvbank.cluster import cli, demo
from kvbank.cluster.answers import LoanStatus, Status, TierStatus, WorkerStatus
from kvbank.cluster.planted import PLANTED, plant
from kvbank.cluster.screen import table
from kvbank.errors import InvalidRequest
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.models.random_model import write_random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random_model(tmp_path_factory.mktemp("model"), hidden_size=32, num_layers=1, heads=2, kv_heads=1))


def test_all_questions_share_the_document_and_nothing_after_it(model: str) -> None:
    prompts, told = demo._prompts(model, None, 2000)
    used = told["used"]
    assert len(prompts) == len(PLANTED) == 4
    assert all(prompt[:used] == prompts[0][:used] for prompt in prompts)
    assert len({tuple(prompt[used:]) for prompt in prompts}) == 4
    assert told["source"] == "this project's documentation" and 2000 < used < told["tokens"]


def test_a_document_and_its_questions_fill_the_model_and_no_more() -> None:
    needle = str(demo.NEEDLE)
    room = read_config(needle).max_position
    prompts, _ = demo._prompts(needle, None, 10**9)
    assert room - 400 < max(map(len, prompts)) + demo.ANSWER_TOKENS <= room


def test_facts_stand_on_lines_of_their_own_where_they_were_planted() -> None:
    lines = [f"line {number:04d}\n" for number in range(1000)]
    planted = plant("".join(lines)).splitlines(keepends=True)
    told = {f" {sentence}\n": depth for each in PLANTED for depth, sentence in each.told}
    assert [line for line in planted if line not in told] == lines
    for line, depth in told.items():
        assert abs(planted.index(line) / len(planted) - depth) < 0.01
    assert sorted(plant("")) == sorted("".join(told))


def test_an_answer_with_another_number_or_with_all_of_them_is_wrong() -> None:
    first, second = PLANTED[:2]
    assert first.is_in(f"quiet bridge is {first.wanted}.")
    assert not first.is_in("quiet bridge is 1234.") and not first.is_in("")
    assert not first.is_in(f"it is {first.wanted} or {second.wanted}")
    assert not any(first.is_in(said) for said in (f"is {first.wanted}1", f"is 1{first.wanted}", f"{first.wanted}.5"))
    assert first.is_in(f" {first.wanted}\nQuestion: what is the price of eager rocket?\nAnswer: {second.wanted}")


def test_facts_are_planted_where_they_should_be_in_a_text_of_one_line() -> None:
    text = "word and word again " * 3000
    planted = plant(text)
    told = {f" {sentence}": depth for each in PLANTED for depth, sentence in each.told}
    assert [line for line in planted.splitlines() if line in told] == sorted(told, key=lambda line: told[line])
    for line, depth in told.items():
        assert abs(planted.index(line) / len(planted) - depth) < 0.01
    assert "".join(line for line in planted.splitlines() if line not in told) == text.rstrip(" ") + " "


def test_a_tokenizer_that_ends_every_text_with_a_token_does_not_empty_the_document(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo.NEEDLE, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))])
    tokenizer.save(str(folder / "tokenizer.json"))
    page = tmp_path / "page.txt"
    page.write_text(demo._document(None)[0][:8000])
    _, told = demo._prompts(str(folder), page, 0)
    assert told["used"] > told["tokens"] > 2000


def test_an_answer_in_brackets_is_shown_as_it_is() -> None:
    shown = StringIO()
    made = table("facts", ("question", "answer"), [("q", Text("[/INST] [red]7864"))])
    Console(file=shown, width=80).print(made)
    assert "[/INST] [red]7864" in shown.getvalue()


def test_names_and_numbers_were_held_out_of_training_and_nothing_else_in_the_pages_has_them() -> None:
    pages, _ = demo._document(None)
    for each in PLANTED:
        assert is_held_out(each.wanted) and each.wanted not in pages
        for _, sentence in each.told:
            (key, *more) = re.findall(r"(?:of|Set|=) ([a-z]+ [a-z]+)", sentence)
            assert all(map(is_held_out, (key, *more))), sentence


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


def test_the_demo_borrows_reuses_and_proves_its_tokens_equal(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert cli.main(["demo", "--json", "--launcher", "process", "--tokens", "1600"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] and told["tokens_compared"] >= 4 * 6
    assert told["right"] == 4, told["planted"]
    assert told["borrowed_blocks_peak"] > 0 and sum(told["peaks"]["lent"].values()) > 0
    first, *rest = (question["receipt"] for question in told["questions"])
    assert first["lenders"] and all(sum(each["reused"].values()) > 0 for each in rest)
    assert all(each["computed_tokens"] < first["computed_tokens"] / 4 for each in rest)

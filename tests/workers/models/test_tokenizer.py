"""Loading a tokenizer, and the text that cannot be encoded."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbank.errors import InvalidRequest, ModelError
from kvbank.workers.models.random_model import END, byte_level_tokenizer
from kvbank.workers.models.tokenizer import encode, load_tokenizer

SHIPPED = load_tokenizer(Path(__file__).parents[3] / "bench/needle/model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level_tokenizer(300).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("text", ["", " ", "plain", "Zürich 日本 🙂\r\n\ttabs", "\x00\x7f\u2028", "a" * 5000, END[:-1]])
def test_text_survives_the_way_there_and_back(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_a_prompt_is_neither_truncated_nor_padded_whatever_the_file_says(folder: Path) -> None:
    tokenizer = byte_level_tokenizer(300)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(encode(load_tokenizer(folder), "qz" * 10)) == 20


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\ude00\ud83d"])
def test_a_lone_surrogate_is_an_invalid_request_and_no_crash(folder: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        encode(load_tokenizer(folder), text)


def test_a_missing_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read.*save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"null"])
def test_a_damaged_tokenizer_is_named(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("module", ["kvbank.workers.models.tokenizer", "kvbank.workers.detokenizer",
                                    "kvbank.workers.models.config_reader"])
def test_what_the_gateway_uses_does_not_import_torch(module: str) -> None:
    code = f"import sys; import {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=60)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<s>", "</s>", "<pad>", " ", "\n", "é", "日本", "🙂", "\u0301", "ab", "1234", "\0"])
                | st.text(max_size=5), max_size=20).map("".join), st.booleans())
def test_ids_are_those_of_the_tokenizers_own_encode(text: str, special_tokens: bool) -> None:
    wanted = list(SHIPPED.encode(text, add_special_tokens=special_tokens).ids)
    assert encode(SHIPPED, text, special_tokens=special_tokens) == wanted


def test_other_threads_run_while_a_long_text_is_tokenised() -> None:
    """Else one long prompt would halt a whole gateway. A thread that waits gets its turns only where the interpreter is free."""
    text, done, turns = "The quick brown fox is 3.14159 years old. " * 20_000, threading.Event(), 0
    thread = threading.Thread(target=lambda: (encode(SHIPPED, text), done.set()))
    thread.start()
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 10

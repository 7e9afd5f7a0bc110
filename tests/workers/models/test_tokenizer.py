"""Loading a tokenizer, and the text that cannot be encoded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvbank.errors import InvalidRequest, ModelError
from kvbank.workers.models.random_model import END, byte_level_tokenizer
from kvbank.workers.models.tokenizer import encode, load_tokenizer


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

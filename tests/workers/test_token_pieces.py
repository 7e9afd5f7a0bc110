"""Single tokens as bytes: joined they are the answer, half characters included."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kvbank.workers.models.random_model import byte_level_tokenizer
from kvbank.workers.models.tokenizer import load_tokenizer
from kvbank.workers.token_pieces import TokenPieces, byte_alphabet

TEXTS = ["Hello, world", " two  spaces ", "Grüße aus 東京 😀\n\ttabs", "a"]
NEEDLE = Path(__file__).resolve().parents[2] / "bench/needle/model"


def sentencepiece() -> Tokenizer:
    """Like Llama 2's: words with a bar in front, characters, and bytes for what the vocabulary lacks."""
    words = ["<unk>", "<s>", *[f"<0x{byte:02X}>" for byte in range(256)],
             "▁", "▁Hello", "▁world", ",", "a", "H", "e", "l", "o", "ü"]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(400), load_tokenizer(NEEDLE)], ids=["random", "needle"])
def test_joined_pieces_of_a_byte_level_vocabulary_are_the_text(tokenizer, text) -> None:
    pieces = TokenPieces(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(pieces.shown(token, first=not at) for at, token in enumerate(ids)).decode() == tokenizer.decode(ids)
    assert b"".join(map(pieces.piece, ids)).decode() == tokenizer.decode(ids)


def test_every_byte_has_its_own_character() -> None:
    assert len(set(byte_alphabet())) == 256
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert (byte_alphabet()[ord("a")], byte_alphabet()[ord(" ")], byte_alphabet()[ord("\n")]) == ("a", "Ġ", "Ċ")


def test_a_sentencepiece_vocabulary_has_spaces_and_bytes() -> None:
    tokenizer = sentencepiece()
    pieces = TokenPieces(tokenizer)
    ids = [tokenizer.token_to_id(word) for word in ("▁Hello", ",", "▁world", "<0xE6>", "<0x9D>", "<0xB1>")]
    assert [pieces.piece(token) for token in ids] == [b" Hello", b",", b" world", b"\xe6", b"\x9d", b"\xb1"]
    assert b"".join(pieces.shown(token, first=not at) for at, token in enumerate(ids)).decode() == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == "Hello, world東"


def test_special_tokens_have_a_piece_and_are_not_shown() -> None:
    tokenizer = sentencepiece()
    pieces = TokenPieces(tokenizer)
    assert pieces.piece(1) == b"<s>" and pieces.shown(1, first=False) == b""
    assert pieces.piece(10**6) == b""


def test_a_vocabulary_of_words_is_asked_for_its_text() -> None:
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    assert [TokenPieces(tokenizer).piece(token) for token in (0, 1)] == [b"one", b"two"]

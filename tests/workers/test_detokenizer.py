"""TextStream against the tokenizer's own decode, for byte-level and sentencepiece-like tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kvbank.errors import InvalidRequest
from kvbank.workers.detokenizer import CONTEXT, WINDOW, TextStream
from kvbank.workers.models.random_model import END, byte_level_tokenizer

BYTE_ZERO = {"byte-level": 0, "llama2": 3, "metaspace": 3}       # id of the token of byte 0
PIECES = ["▁", "▁▁", "▁the", "▁a", "b", "ab", "abc", "c", "日", "é", ".", "<0x", "▁<"]


def sentencepiece_like(decoder: decoders.Decoder) -> Tokenizer:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    vocab = {name: token for token, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return tokenizer


LLAMA2 = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                            decoders.Strip(content=" ", left=1)])
TOKENIZERS = {
    "byte-level": byte_level_tokenizer(400),
    "llama2": sentencepiece_like(LLAMA2),
    "metaspace": sentencepiece_like(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
}


def cut(text: str, stops: list[str]) -> str:
    """The oracle: text up to the stop that ends first; where two end together, up to the longer."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


def joined(stream: TextStream, pushes: list[list[int]]) -> str:
    return "".join([stream.push(ids) for ids in pushes] + [stream.finish()])


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, list[list[int]], list[str]]:
    """A tokenizer, ids in random portions, and stops of which some are cut out of the real text."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    token = st.one_of(st.integers(0, size + 3), st.integers(128, min(size - 1, 280)), st.integers(size - 14, size - 1))
    zero = BYTE_ZERO[name]
    character = st.characters(exclude_categories=["Cs"]).map(lambda one: [zero + byte for byte in one.encode()])
    parts = st.one_of(token.map(lambda one: [one]), token.map(lambda one: [one]), character, st.just([size + 2] * 2))
    ids = [token for part in draw(st.lists(parts, max_size=100)) for token in part]
    pushes: list[list[int]] = []
    rest = ids
    while rest:
        length = draw(st.sampled_from((1, 1, 1, 2, 5, 40)))
        pushes.append(rest[:length])
        rest = rest[length:]
    text = tokenizer.decode(ids)
    stops = draw(st.lists(st.text("ab c.\ufffd日é", min_size=1, max_size=4), max_size=2))
    if text:
        for _ in range(draw(st.integers(0, 2))):
            start = draw(st.integers(0, len(text) - 1))
            stops.append(text[start : start + draw(st.integers(1, 9))])
    return name, pushes, stops


@given(answers())
@example(("llama2", [[3 + 0xE6, 3 + 0x97], [1], [3 + 0xA5], [258]], []))
@example(("llama2", [[3 + 0xE6, 3 + 0x97], [1], [3 + 0xA5], [260]], []))
def test_joined_deltas_are_the_tokenizers_own_decode_cut_at_the_first_stop(answer) -> None:
    name, pushes, stops = answer
    tokenizer = TOKENIZERS[name]
    stream = TextStream(tokenizer, stops)
    text = tokenizer.decode([token for ids in pushes for token in ids])
    assert joined(stream, pushes) == cut(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


def test_what_was_shown_never_reaches_into_a_stop_string_that_spans_tokens() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("to be STOP or not").ids
    stream = TextStream(tokenizer, ["STOP"])
    deltas = [stream.push([token]) for token in ids]
    assert "".join(deltas) == "to be " and stream.stopped
    assert stream.push(ids) == stream.finish() == ""


def test_text_that_only_looked_like_a_stop_is_shown_after_all() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(tokenizer, ["STOP"])
    assert stream.push(tokenizer.encode("a ST").ids) == "a "
    assert stream.push(tokenizer.encode("AY").ids) == "STAY"


@pytest.mark.parametrize(("name", "first_byte"), [("byte-level", 0), ("llama2", 3)])
def test_half_a_character_waits_for_the_other_half(name: str, first_byte: int) -> None:
    tokenizer = TOKENIZERS[name]
    ids = [first_byte + byte for byte in "日".encode()]
    stream = TextStream(tokenizer)
    assert [stream.push([token]) for token in ids[:2]] == ["", ""]
    assert stream.push([ids[2]]) + stream.finish() == "日"


def test_half_a_character_at_the_end_becomes_one_replacement_character() -> None:
    stream = TextStream(TOKENIZERS["byte-level"])
    assert stream.push(list(b"ok\xe6\x97")) == "ok"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == "", "finish is safe to repeat"


def test_a_long_answer_of_invalid_bytes_is_streamed_and_not_kept_to_the_end() -> None:
    stream = TextStream(TOKENIZERS["byte-level"])
    shown = [stream.push([0xFF]) for _ in range(500)]
    assert len("".join(shown)) == 499


def test_special_tokens_show_nothing() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(tokenizer)
    assert stream.push([tokenizer.token_to_id(END)] * 50 + list(b"x")) == "x"
    assert len(stream._window) == 1, "nor are they decoded again and again"


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("character", "é日😀")
def test_a_character_in_bytes_is_whole_wherever_it_stands_and_whatever_shows_nothing_within_it(name, character) -> None:
    tokenizer, zero = TOKENIZERS[name], BYTE_ZERO[name]
    *begin, last = [zero + byte for byte in character.encode()]
    for before in range(3 * (CONTEXT + WINDOW)):
        for nothing in ([], [tokenizer.get_vocab_size() + 2] * 2, [tokenizer.get_vocab_size() + 2] * 9):
            ids = [zero + ord("a")] * before + begin + nothing + [last, zero + ord("b")]
            assert joined(TextStream(tokenizer), [[token] for token in ids]) == "a" * before + character + "b"


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_few_ids_are_decoded_again_however_long_the_answer(name) -> None:
    tokenizer, stream = TOKENIZERS[name], TextStream(TOKENIZERS[name])
    for _ in range(1000):
        stream.push([tokenizer.get_vocab_size() + 1])        # of no token: models may have more rows than there are tokens
        stream.push([tokenizer.token_to_id("b")])
        assert len(stream._window) <= CONTEXT + WINDOW


def test_a_space_after_many_special_tokens_is_not_taken_for_the_first_one() -> None:
    tokenizer = TOKENIZERS["llama2"]
    the = tokenizer.token_to_id("▁the")
    ids = [the] * 40 + [1] * 60 + [the]
    stream = TextStream(tokenizer)
    assert joined(stream, [[token] for token in ids]) == " ".join(["the"] * 41)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        TextStream(TOKENIZERS["byte-level"], ["a", ""])


def test_a_panic_of_the_tokenizer_is_an_error_like_any_other() -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    class Panicking:
        decoder = None
        get_added_tokens_decoder, id_to_token = dict, str

        def decode(self, _ids: list[int]) -> str:
            raise panic("at some line")

    with pytest.raises(RuntimeError, match="the tokenizer's decoder panicked"):
        TextStream(Panicking()).push([1])

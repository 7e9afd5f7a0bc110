"""A chunk of which only text and ids were filled in is, byte for byte, the one that would be written whole."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvbank.cluster.http.events import Form, event

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS, st.lists(st.integers(0, 2**31 - 1)), TEXTS, st.booleans())
def test_a_filled_form_is_the_whole_event(text: str, ids: list[int], name: str, with_ids: bool) -> None:
    def data(text: str, ids: list[int]) -> dict[str, Any]:
        choice = {"index": 0, "delta": {"content": text}, "logprobs": None}
        return {"id": name, "choices": [{**choice, "token_ids": ids} if with_ids else choice], "model": name}

    form = Form(data)
    assert form.filled(text, ids) == event(data(text, ids)) == form.filled(text, ids)

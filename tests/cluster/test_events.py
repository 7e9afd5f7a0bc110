"""Chunks of a stream: filled in as they would be written whole, and a comment where nothing is to be said for long."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvbank.cluster.http.choices import Choices, Wish
from kvbank.cluster.http.events import KEEP_ALIVE, Form, event
from kvbank.cluster.intake import JobSpec
from kvbank.cluster.job import Job

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS, st.lists(st.integers(0, 2**31 - 1)), TEXTS, st.booleans())
def test_a_filled_form_is_the_whole_event(text: str, ids: list[int], name: str, with_ids: bool) -> None:
    def data(text: str, ids: list[int]) -> dict[str, Any]:
        choice = {"index": 0, "delta": {"content": text}, "logprobs": None}
        return {"id": name, "choices": [{**choice, "token_ids": ids} if with_ids else choice], "model": name}

    form = Form(data)
    assert form.filled(text, ids) == event(data(text, ids)) == form.filled(text, ids)


def test_a_stream_whose_tokens_release_no_text_is_kept_alive() -> None:
    async def play() -> None:
        text: Any = SimpleNamespace(stopped=False, push=lambda ids: "", finish=lambda: "")
        job = Job(id="a", wire_id="a", spec=JobSpec(tenant="t", prompt=b""), text=text, seed=1, age=1.0, created=0.0,
                  started_at=0.0)
        front: Any = SimpleNamespace(limits=SimpleNamespace(quiet_s=0.05), gateway=None)
        shape: Any = SimpleNamespace(opening=lambda number: None)

        async def decode() -> None:
            while True:                              # much faster than a quiet time
                job.take(1, 1.0)
                job.announce()
                await asyncio.sleep(0.001)

        decoding = asyncio.create_task(decode())
        async with asyncio.timeout(20):
            assert await anext(Choices(front, [job], Wish(prompts=1, stream=True), shape).events()) == KEEP_ALIVE
        decoding.cancel()

    asyncio.run(play())

"""What the tiers fetched for a place that another source filled meanwhile is let go: it takes no room in staging from others."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvbank.kvstore.hashing import block_keys
from kvbank.kvstore.span_table import REMOTE, Span
from kvbank.kvstore.store import Fetched, StoredFrame
from kvbank.kvstore.vault import Vault
from kvbank.workers.chain_fetcher import ChainFetcher
from kvbank.workers.chain_frames import Ask, Drop
from kvbank.workers.fetcher import TierFetcher
from kvbank.workers.reuse import Reuse
from kvbank.workers.seams import NoBank, NoFetcher
from kvbank.workers.sequence import JobSpec, Sequence

BLOCK, SPAN = 4, 16
ROOT = b"r" * 32
PROMPT = list(range(3 * SPAN + 2 * BLOCK + 1))           # three spans, two blocks, and the token that is always computed
A, B = b"a" * 32, b"b" * 32


class Dropped(NoFetcher):
    """Nothing ever arrives; what is dropped is noted."""

    def __init__(self) -> None:
        self.wanted: list[bytes] = []
        self.dropped: list[bytes] = []

    def want(self, job: str, keys: Any, tokens: Any, *, now: float) -> None:
        self.wanted += keys

    def state(self, job: str, key: Any, *, now: float) -> str:
        return "coming"

    def drop(self, job: str, key: Any) -> None:
        self.dropped.append(key)


class Copies:
    def copy_tokens(self, source: int, target: int, start: int, stop: int) -> None: ...


class Story:
    """One sequence that wants all of its prompt from the tiers."""

    def __init__(self) -> None:
        self.vault, self.fetcher = Vault(8, blocks_per_span=4), Dropped()
        self.reuse = Reuse(self.vault, Copies(), NoBank(), self.fetcher, root_of=lambda tenant: ROOT,    # type: ignore[arg-type]
                           block_size=BLOCK, span_tokens=SPAN, window=None)
        self.seq = Sequence(JobSpec(id="a", prompt=PROMPT, max_tokens=4), SPAN, BLOCK, now=0.0)
        self.keys = block_keys(ROOT, PROMPT[: 14 * BLOCK], BLOCK)
        self.reuse.begin(self.seq, 0.0)
        assert self.fetcher.wanted == [*self.keys[3:12:4], *self.keys[12:14]]

    def computed_elsewhere(self, index: int, blocks: int) -> None:
        """Another job of this worker has these first blocks of a span."""
        (span,) = self.vault.new_spans(1)
        for block in range(4 * index, 4 * index + blocks):
            tokens = self.seq.token_bytes(block * BLOCK, (block + 1) * BLOCK)
            self.vault.index.publish(span, self.keys[block], tokens, self.keys[block - 1] if block else ROOT)


def test_a_span_that_the_device_or_a_peer_had_meanwhile_is_dropped() -> None:
    story = Story()
    story.computed_elsewhere(0, 4)
    story.seq.adopted[story.keys[7]] = Span(slot=None, place=REMOTE, keys=story.keys[4:8])
    assert story.reuse.fill(story.seq, 0.0) == "fetch"
    assert story.fetcher.dropped == [story.keys[3], story.keys[7]]


def test_a_span_of_which_the_device_had_a_part_is_dropped_whole() -> None:
    story = Story()
    story.computed_elsewhere(0, 2)
    story.reuse.fill(story.seq, 0.0)
    assert story.fetcher.dropped == [story.keys[3]]


def test_what_was_computed_meanwhile_is_dropped_and_only_once() -> None:
    story = Story()
    story.reuse.note_computed(story.seq, 0, SPAN + 2)
    assert story.fetcher.dropped == [story.keys[3], story.keys[7]]
    story.reuse.note_computed(story.seq, SPAN + 2, len(PROMPT))
    assert story.fetcher.dropped == [story.keys[3], story.keys[7], *story.keys[11:14]]


class Shelf:
    """A store that has everything, 8 bytes each."""

    def fetch(self, keys: Any, tokens: Any) -> Fetched:
        return Fetched({key: StoredFrame("host", None, memoryview(bytes(8))) for key in keys}, {})    # type: ignore[arg-type]


def test_a_dropped_frame_makes_room_in_staging() -> None:
    woken = threading.Event()
    fetcher = TierFetcher(Shelf(), lambda *args: None, staging_bytes=8, wait_s=9.0, clock=lambda: 0.0,    # type: ignore[arg-type]
                          wake=woken.set)
    try:
        fetcher.want("a", [A], [b""], now=0.0)
        assert woken.wait(10.0) and fetcher.state("a", A, now=0.0) == "here"
        woken.clear()
        fetcher.want("b", [B], [b""], now=0.0)
        assert fetcher.state("b", B, now=0.0) == "coming", "staging is full"
        fetcher.drop("a", A)
        assert woken.wait(10.0) and fetcher.state("b", B, now=0.0) == "here"
        assert fetcher.staged_bytes == 8
    finally:
        fetcher.close()


class Followers:
    shards = 2

    def __init__(self) -> None:
        self.on_reset: list[Any] = []
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def take_found(self) -> list[Any]:
        return []


@pytest.mark.parametrize("again", [False, True])
def test_a_chain_drops_it_everywhere_and_does_not_ask_for_it_again(again: bool) -> None:
    """Asked again under the same name, an answer to the first question could be taken for one to the second."""
    local, followers = Dropped(), Followers()
    fetcher = ChainFetcher(local, followers, wait_s=1.0)
    fetcher.want("job", [A, B], [b"", b""], now=0.0)
    fetcher.drop("job", A)
    if again:
        fetcher.drop("job", A)
    assert local.dropped[0] == A and followers.sent[1:] == [Drop(followers.sent[0].name, A)]
    assert fetcher.state("job", A, now=0.0) == "evicted" and fetcher.state("job", B, now=0.0) == "coming"
    assert not any(isinstance(message, Ask) for message in followers.sent)
    fetcher.drop("nobody", A)


class Slow:
    """A store whose answers wait until they are let out, one by one: what a key holds changes meanwhile."""

    def __init__(self) -> None:
        self.holds, self.asked, self.let = b"wrong", threading.Semaphore(0), threading.Semaphore(0)

    def fetch(self, keys: Any, tokens: Any) -> Fetched:
        frames = {key: StoredFrame("host", None, memoryview(self.holds)) for key in keys}    # type: ignore[arg-type]
        self.asked.release()
        assert self.let.acquire(timeout=10.0)
        return Fetched(frames, {})


def test_what_was_on_its_way_when_it_was_dropped_is_not_taken_for_what_is_asked_for_afterwards() -> None:
    """It was dropped because its bytes are wrong; the same job looks for them again at once."""
    store, woken, loaded = Slow(), threading.Event(), []
    fetcher = TierFetcher(store, lambda payload, slot, start: loaded.append(bytes(payload)), staging_bytes=64,    # type: ignore
                          wait_s=99.0, clock=lambda: 0.0, wake=woken.set)
    try:
        fetcher.want("a", [A], [b""], now=0.0)
        assert store.asked.acquire(timeout=10.0)
        store.holds = b"right"
        fetcher.drop("a", A)
        assert fetcher.state("a", A, now=0.0) == "coming"
        store.let.release()
        assert store.asked.acquire(timeout=10.0), "the store is asked again"
        assert fetcher.state("a", A, now=0.0) == "coming" and fetcher.staged_bytes == 0
        woken.clear()
        store.let.release()
        assert woken.wait(10.0) and fetcher.state("a", A, now=0.0) == "here"
        assert fetcher.load("a", A, 0, 0) == "host" and loaded == [b"right"]    # type: ignore[arg-type]
    finally:
        store.let.release()
        fetcher.close()

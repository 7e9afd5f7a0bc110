"""The feed: one look for all who watch, a snapshot and then changes, bounded rings, slow watchers let go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from kvbank.cluster.feed import BEHIND, EVENTS, MAX_WATCHERS, Feed
from kvbank.cluster.gateway import Gateway
from kvbank.errors import Overloaded


class NoMembers:
    """A roster without workers, and links to nobody."""

    def workers(self) -> list[Any]:
        return []

    async def holders(self, keys: bytes) -> dict[str, int]:
        return {}

    def on_change(self, listener: Callable[[], None]) -> None:
        pass


def worker(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "kind": "model", "replica": 0, "shard": 0, "host": "h", "pid": 1, "state": "ok", "blocks_total": 64,
            "blocks_free": 60, "blocks_used": 4, "blocks_lent": 0, "blocks_borrowed": 0, "blocks_idle": 8, "draining": False,
            "tiers": [], "counters": {"steps": 1.0}, **fields}


class City:
    """What the members would say."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {"workers": [worker("a"), worker("b")], "loans": [], "tiers": []}
        self.broken, self.failed = False, 0

    async def status(self) -> dict[str, Any]:
        if self.broken:
            self.failed += 1
            raise RuntimeError("planted")
        return self.told


def with_feed(check: Callable[[Feed, City], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        city = City()
        gateway = Gateway(roster=NoMembers(), links=None, choose=None, open_text=None)        # type: ignore[arg-type]
        feed = Feed(gateway, city.status, every_s=0.02, facts={"model": "m"})
        async with asyncio.timeout(20):
            await check(feed, city)
        feed.stopping()

    asyncio.run(run())


async def following(stream: AsyncIterator[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
    name, data = await anext(stream)
    return name, json.loads(data)


def test_a_snapshot_and_then_only_what_changed() -> None:
    async def check(feed: Feed, city: City) -> None:
        stream = feed.watch()
        name, snapshot = await following(stream)
        assert name == "snapshot" and [w["id"] for w in snapshot["workers"]] == ["a", "b"] and snapshot["facts"] == {"model": "m"}
        assert "counters" not in snapshot["workers"][0] and snapshot["series"][-1]["total"] == 128
        name, delta = await following(stream)
        assert name == "delta" and delta["workers"] == {"set": [], "gone": []} and delta["events"] == []
        city.told = {**city.told, "workers": [worker("a", blocks_used=9), worker("c")],
                     "loans": [{"id": "l", "lender": "a", "borrower": "c", "blocks": 8, "term_s": 6.0, "age_s": 0.5}]}
        while not delta["events"]:
            _, delta = await following(stream)
        assert [w["id"] for w in delta["workers"]["set"]] == ["a", "c"] and delta["workers"]["gone"] == ["b"]
        assert [e["text"] for e in delta["events"]] == ["c joined, 64 blocks", "b is gone", "a lends 8 blocks to c"]
        assert [loan["id"] for loan in delta["loans"]["set"]] == ["l"]
        _, delta = await following(stream)
        assert delta["loans"] == {"set": [], "gone": []}, "a loan's age alone is no change"

    with_feed(check)


def test_many_watchers_cost_one_look_and_nobody_watching_costs_none() -> None:
    async def check(feed: Feed, city: City) -> None:
        assert feed.looks == 0
        streams = [feed.watch() for _ in range(20)]
        firsts = await asyncio.gather(*(following(stream) for stream in streams))
        assert {name for name, _ in firsts} == {"snapshot"} and feed.looks <= 2
        before = feed.looks
        await asyncio.gather(*(following(stream) for stream in streams))
        assert feed.looks - before <= 2
        for stream in streams:
            await stream.aclose()                    # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        rest = feed.looks
        await asyncio.sleep(0.1)
        assert feed.looks == rest, "it looks on although nobody watches"
        name, _ = await following(feed.watch())
        assert name == "snapshot" and feed.looks > 0

    with_feed(check)


def test_a_watcher_that_does_not_read_is_let_go_and_the_others_are_not() -> None:
    async def check(feed: Feed, city: City) -> None:
        slow, quick = feed.watch(), feed.watch()
        await asyncio.gather(following(slow), following(quick))
        for _ in range(BEHIND + 3):
            await following(quick)
        left = [message async for message in slow]
        assert left == [], "what it had not read is thrown away, and its stream ends"
        assert (await following(quick))[0] == "delta"

    with_feed(check)


def test_one_watcher_too_many_is_refused() -> None:
    async def check(feed: Feed, city: City) -> None:
        streams = [feed.watch() for _ in range(MAX_WATCHERS)]
        await asyncio.gather(*(following(stream) for stream in streams))
        with pytest.raises(Overloaded, match="close one"):
            feed.check_room()
        await streams[0].aclose()                    # type: ignore[attr-defined]
        feed.check_room()

    with_feed(check)


def test_every_action_between_two_looks_reaches_the_page_once() -> None:
    async def check(feed: Feed, city: City) -> None:
        stream = feed.watch()
        await following(stream)
        entry = {"who": "key-1", "tenant": "t", "member": "a", "job": "", "ok": True, "outcome": "done"}
        for at, action in enumerate(("pin", "unpin", "drain")):
            feed.acted({"at": float(at), "action": action, **entry})
        heard = []
        while len(heard) < 3:
            heard += (await following(stream))[1]["audit"]
        assert [entry["action"] for entry in heard] == ["pin", "unpin", "drain"]
        assert (await following(stream))[1]["audit"] == []

    with_feed(check)


def test_a_look_that_fails_is_not_the_end() -> None:
    async def check(feed: Feed, city: City) -> None:
        stream = feed.watch()
        await following(stream)
        city.broken = True
        waiting = asyncio.ensure_future(following(stream))
        while not city.failed:
            await asyncio.sleep(0.01)
        city.broken = False
        assert (await waiting)[0] == "delta"

    with_feed(check)


def test_events_are_bounded_per_kind_and_kept_while_nobody_watches() -> None:
    async def check(feed: Feed, city: City) -> None:
        entry = {"at": 1.0, "who": "key-1", "tenant": "t", "action": "drain", "member": "a", "job": "",
                 "ok": True, "outcome": "done"}
        feed.acted(entry)
        for _ in range(EVENTS + 50):
            feed.refused("overloaded")
        _, snapshot = await following(feed.watch())
        kinds = [event["kind"] for event in snapshot["events"]]
        assert kinds.count("job") == EVENTS and kinds.count("ops") == 1, "many jobs do not drive out the rare ones"
        numbers = [event["number"] for event in snapshot["events"]]
        assert numbers == sorted(numbers)

    with_feed(check)

"""What the gateway knows of the members, from a control plane that answers, lies still, or changes its mind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import grpc
import pytest

from kvbank.cluster.capacity import Capacity, capacity_tokens
from kvbank.cluster.links import Links
from kvbank.cluster.roster import Roster
from kvbank.cluster.survey import Survey
from kvbank.kvstore.transport import rpc
from kvbank.proto import control_pb2 as pb

TOKEN = "cd" * 16
KEYS = [bytes([n]) * 32 for n in range(8)]


def member(name: str, kind: str = "model", replica: int = 0, shard: int = 0, shards: int = 1, **more: object) -> pb.Member:
    fields = {"boot": name.encode(), "address": "127.0.0.1:1", "slots_total": 8, "slot_bytes": 100, **more}
    return pb.Member(id=name, kind=kind, replica=replica, shard=shard, shards=shards, **fields)


class FakeControl:
    """Answers Snapshot and Locate with what a test put there."""

    def __init__(self) -> None:
        self.views: list[pb.MemberView] = []
        self.holdings: list[pb.Holding] = []
        self.server = rpc.server(TOKEN, threads=4)
        self.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("kvbank.Control", {
            "Snapshot": grpc.unary_unary_rpc_method_handler(
                lambda _r, _c: pb.SnapshotReply(members=self.views), pb.SnapshotRequest.FromString,
                pb.SnapshotReply.SerializeToString),
            "Locate": grpc.unary_unary_rpc_method_handler(
                lambda _r, _c: pb.LocateReply(holdings=self.holdings), pb.LocateRequest.FromString,
                pb.LocateReply.SerializeToString),
        })])
        self.address = f"127.0.0.1:{rpc.bind(self.server, '127.0.0.1:0')}"
        self.server.start()

    def show(self, *members: pb.Member, silent_s: float = 0.1) -> None:
        self.views = [pb.MemberView(member=each, silent_s=silent_s, report=pb.Report(slots_free=4, slots_lent=2))
                      for each in members]


@pytest.fixture
def control() -> Iterator[FakeControl]:
    made = FakeControl()
    yield made
    made.server.stop(None)


def ask(control: FakeControl, question: Callable, token: str = TOKEN):
    async def run():
        links = Links(token)
        roster = Roster(links, control.address, timeout_s=2.0)
        await roster.refresh()
        try:
            return await question(roster)
        finally:
            await links.close()

    return asyncio.run(run())


async def ids(roster: Roster) -> list[str]:
    return [worker.id for worker in roster.workers()]


def test_only_whole_living_replicas_serve(control: FakeControl) -> None:
    control.show(member("worker-0"), member("worker-1", replica=1, shards=2), member("lender-0", kind="lender"),
                 member("worker-2", replica=2, shards=2), member("worker-2.1", replica=2, shard=1, shards=2))
    assert ask(control, ids) == ["worker-0", "worker-2"]
    control.show(member("worker-0"), silent_s=60)
    assert ask(control, ids) == []
    control.show(member("worker-0"), member("worker-1", replica=1))
    control.views[1].report.draining = True

    async def drains(roster: Roster) -> list[bool]:
        return [worker.draining for worker in roster.workers()]

    assert ask(control, drains) == [False, True]


def test_a_silent_control_plane_leaves_the_last_view_in_use(control: FakeControl) -> None:
    control.show(member("worker-0"))

    async def lose_it(roster: Roster) -> list[str]:
        control.server.stop(None).wait()
        await roster.refresh()
        return await ids(roster) + list(await roster.holders(KEYS[0]))

    assert ask(control, lose_it) == ["worker-0"]


def test_a_wrong_token_shows_nobody(control: FakeControl) -> None:
    control.show(member("worker-0"))
    assert ask(control, ids, token="00" * 16) == []


def test_a_prefix_counts_only_as_far_as_every_shard_holds_it(control: FakeControl) -> None:
    control.show(member("worker-0", shards=2), member("worker-0.1", shard=1, shards=2),
                 member("worker-1", replica=1))
    control.holdings = [pb.Holding(id="worker-0", first=0, count=6), pb.Holding(id="worker-0.1", first=0, count=4),
                        pb.Holding(id="worker-1", first=2, count=6), pb.Holding(id="lender-0", first=0, count=8)]

    async def held(roster: Roster) -> dict[str, int]:
        return await roster.holders(b"".join(KEYS))

    assert ask(control, held) == {"worker-0": 4}


def test_listeners_hear_of_changes_only(control: FakeControl) -> None:
    heard: list[int] = []

    async def change(roster: Roster) -> None:
        roster.on_change(lambda: heard.append(1))
        control.show(member("worker-0"))
        for _ in range(3):
            await roster.refresh()
        control.show(member("worker-0", boot=b"another"))
        await roster.refresh()

    ask(control, change)
    assert len(heard) == 2


def test_members_that_do_not_answer_are_shown_as_last_heard(control: FakeControl) -> None:
    control.show(member("worker-0"), member("lender-0", kind="lender"), member("gateway", kind="gateway"))

    async def told(roster: Roster) -> dict:
        return await Survey(roster, roster._links, blocks_per_slot=8).told()

    status = ask(control, told)
    assert [(w["id"], w["state"]) for w in status["workers"]] == [("worker-0", "silent"), ("lender-0", "silent")]
    assert status["workers"][0]["blocks_total"] == 64 and status["workers"][0]["blocks_free"] == 32
    assert status["workers"][0]["blocks_lent"] == 16 and status["loans"] == [] and status["tiers"] == []


def test_tiers_of_members_add_up_but_redis_is_one_for_all(control: FakeControl, make_worker) -> None:
    first, second = make_worker("worker-0"), make_worker("worker-1")
    for worker in (first, second):
        worker.tiers = ["host", "redis"]
    control.show(*[member(f"worker-{n}", replica=n, address=w.address) for n, w in enumerate((first, second))])

    async def told(roster: Roster) -> dict:
        links = Links("ab" * 16)
        try:
            return await Survey(roster, links, blocks_per_slot=8).told()
        finally:
            await links.close()

    status = ask(control, told)
    tiers = {tier["name"]: tier for tier in status["tiers"]}
    assert (tiers["host"]["bytes_used"], tiers["host"]["bytes_limit"], tiers["host"]["counters"]) == (20, 200, {"hits": 4})
    assert (tiers["redis"]["bytes_used"], tiers["redis"]["bytes_limit"]) == (10, 100)
    assert len(status["loans"]) == 1 and status["workers"][0]["counters"] == {"forward_rows": 5}


def test_capacity_is_own_slots_what_others_lend_and_the_host() -> None:
    members = [member("worker-0"), member("worker-1", replica=1), member("lender-0", kind="lender"),
               member("lender-1", kind="lender", slot_bytes=50), member("gateway", kind="gateway")]
    def count(host_bytes: int = 0, lend_cap: float | None = None) -> int | None:
        return capacity_tokens(members, span_tokens=128, host_bytes=host_bytes, lend_cap=lend_cap)

    assert count() == (8 + 4 + 8) * 128              # the small lender's slots cannot hold a span
    assert count(lend_cap=0.25) == (8 + 2 + 2) * 128
    assert count(host_bytes=3 * (8192 + 100)) == (20 + 3) * 128
    shards = [member(f"worker-{n}", replica=n // 2, shard=n % 2, shards=2) for n in range(4)]
    assert capacity_tokens(shards, span_tokens=128, host_bytes=0, lend_cap=None) == 8 * 128
    shards.append(member("lender-0", kind="lender"))          # a span takes a slot there for each shard
    assert capacity_tokens(shards, span_tokens=128, host_bytes=0, lend_cap=None) == (8 + 4) * 128
    assert capacity_tokens([], span_tokens=128, host_bytes=0, lend_cap=None) is None


def test_what_jobs_are_told_follows_each_refresh(control: FakeControl) -> None:
    async def look(roster: Roster) -> list[tuple[int | None, list[str]]]:
        how = {"span_tokens": 128, "host_bytes": 0, "lend_cap": None}
        capacity, endless = Capacity(roster, **how), Capacity(roster, **how, windowed=True)
        found = []
        for members in ([member("worker-0")], [member("worker-0"), member("lender-0", "lender")], []):
            control.show(*members)
            await roster.refresh()
            assert capacity() == capacity() and endless() is None
            found.append((capacity(), [worker.id for worker in roster.workers()]))
        control.show(member("worker-0"), silent_s=60.0)
        await roster.refresh()
        return [*found, (capacity(), [worker.id for worker in roster.workers()])]

    assert ask(control, look) == [(8 * 128, ["worker-0"]), (16 * 128, ["worker-0"]), (None, []), (8 * 128, [])]

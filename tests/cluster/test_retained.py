"""Who gives way when too many jobs are kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvbank.cluster.retained import Retained


def test_a_flood_of_one_tenant_costs_another_nothing() -> None:
    kept = Retained(limit=10, keep_s=100.0)
    for number in range(3):
        kept.add(("bob", f"b{number}"), 1.0)
    gone = []
    for number in range(50):
        kept.add(("alice", f"a{number}"), 2.0)
        gone += kept.give_way(2.0)
    assert len(kept) == 10 and gone == [("alice", f"a{number}") for number in range(43)]
    assert kept.newest(2) == [("alice", "a48"), ("alice", "a49")]
    assert list(kept.give_way(101.5)) == [("bob", "b0"), ("bob", "b1"), ("bob", "b2")]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.booleans()), max_size=80), st.integers(0, 6))
def test_it_keeps_the_youngest_of_each_and_never_more_than_it_may(steps: list[tuple[str, int, bool]], limit: int) -> None:
    kept, here = Retained(limit=limit, keep_s=20.0), {}
    for now, (tenant, number, again) in enumerate(steps):
        name = (tenant, str(number))
        kept.discard(name)
        here.pop(name, None)
        if again:
            continue
        kept.add(name, float(now))
        here[name] = float(now)
        for gone in kept.give_way(float(now)):
            most = max(sum(owner == who for owner, _ in here) for who in "abc")
            assert here[gone] < now - 20 or (
                sum(owner == gone[0] for owner, _ in here) == most
                and here[gone] == min(ended for (owner, _), ended in here.items() if owner == gone[0]))
            del here[gone]
        assert len(kept) == len(here) <= limit and all(ended >= now - 20 for ended in here.values())
        assert kept.newest(100) == sorted(here, key=lambda each: here[each])

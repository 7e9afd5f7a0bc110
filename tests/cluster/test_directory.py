"""The directory against a plain table of sets, and its bound."""

from __future__ import annotations

import random

from kvbank.cluster.directory import Directory, Held, Left, Run


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


KEYS = [key(number) for number in range(40)]


def test_a_run_ends_where_a_key_is_missing() -> None:
    directory = Directory(100)
    directory.on(Held("worker-0", [*KEYS[:3], *KEYS[5:7]]))
    directory.on(Held("worker-1", KEYS[1:6]))
    assert directory.runs(KEYS[:8]) == [
        Run("worker-0", 0, 3), Run("worker-1", 1, 5), Run("worker-0", 5, 2),
    ]
    assert directory.runs(KEYS[:8], without="worker-0") == [Run("worker-1", 1, 5)]


def test_a_full_report_replaces_and_a_change_adds_and_removes() -> None:
    directory = Directory(100)
    directory.on(Held("worker-0", KEYS[:4]))
    directory.on(Held("worker-0", [KEYS[4]], [KEYS[0], KEYS[9]]))
    assert [k for k in KEYS if directory.holders(k)] == KEYS[1:5]
    directory.on(Held("worker-0", [KEYS[7]], full=True))
    assert [k for k in KEYS if directory.holders(k)] == [KEYS[7]]


def test_who_left_holds_nothing() -> None:
    directory = Directory(100)
    directory.on(Held("worker-0", KEYS[:4]))
    directory.on(Held("worker-1", KEYS[2:6]))
    directory.on(Left("worker-0"))
    assert directory.runs(KEYS) == [Run("worker-1", 2, 4)]
    directory.on(Left("worker-0"))
    directory.on(Left("worker-1"))
    assert len(directory) == 0


def test_over_the_limit_the_longest_unmentioned_pairs_are_forgotten() -> None:
    directory = Directory(4)
    directory.on(Held("worker-0", KEYS[:4]))
    directory.on(Held("worker-0", [KEYS[0]]))                    # mentioned again
    directory.on(Held("worker-1", KEYS[4:6]))
    assert [k for k in KEYS if directory.holders(k)] == [KEYS[0], KEYS[3], KEYS[4], KEYS[5]]
    assert directory.forgotten == 2 and len(directory) == 4


def test_what_is_no_key_is_no_entry() -> None:
    directory = Directory(4)
    directory.on(Held("worker-0", [b"", b"short", KEYS[0] + b"x"]))
    assert len(directory) == 0


def test_it_says_what_a_plain_table_says_after_any_events() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        directory, table = Directory(10_000), {f"m{n}": set() for n in range(4)}
        for _ in range(120):
            name = rng.choice(sorted(table))
            some, others = rng.sample(KEYS, rng.randrange(12)), rng.sample(KEYS, rng.randrange(12))
            if rng.random() < 0.1:
                directory.on(Left(name))
                table[name] = set()
            elif rng.random() < 0.2:
                directory.on(Held(name, some, full=True))
                table[name] = set(some)
            else:
                directory.on(Held(name, some, others))
                table[name] = (table[name] - set(others)) | set(some)
            question = rng.sample(KEYS, 20)
            for each in question:
                assert directory.holders(each) == sorted(n for n, held in table.items() if each in held)
            runs = directory.runs(question)
            covered = sorted((run.id, at) for run in runs for at in range(run.first, run.first + run.count))
            assert covered == sorted((n, at) for n in table for at, each in enumerate(question) if each in table[n])
            assert len(directory) == sum(map(len, table.values()))
            ends = {(run.id, run.first + run.count) for run in runs}
            assert not ends & {(run.id, run.first) for run in runs}, "two runs that are one"

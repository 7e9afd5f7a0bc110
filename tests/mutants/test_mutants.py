"""The judges are judged: planted bugs must be caught. Six of them here, other ones with each commit; `make mutants` plants all.

That the unharmed product survives the same scenes with the same seeds is tested too: else everything would count as caught.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.mutants import hunt
from tests.mutants.planted import replace

ROOT = Path(__file__).resolve().parents[2]
EACH_TIME = 6


def of_this_commit() -> list[str]:
    """Six names; six commits in a row have few in common. Outside a checkout always the same ones."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    commit = asked.stdout.strip()
    return sorted(hunt.MUTANTS, key=lambda name: zlib.crc32(f"{commit} {name}".encode()))[:EACH_TIME]


@pytest.fixture(scope="module")
def catches() -> Iterator[dict[str, Future[hunt.Catch]]]:
    """All hunts of this file, each a process of its own with a minute of CPU time: two at a time, or one beside other tests."""
    with ThreadPoolExecutor(1 if "PYTEST_XDIST_WORKER" in os.environ else hunt.AT_ONCE) as pool:
        yield {name: pool.submit(hunt.hunt_apart, name) for name in ("none", *of_this_commit())}
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", of_this_commit())
def test_a_planted_bug_is_caught_within_a_minute(catches: dict[str, Future[hunt.Catch]], name: str) -> None:
    catch = catches[name].result()
    print(f"{name}: {catch.said}")
    assert catch.caught, f"{name} lived: {catch.said}\n{hunt.MUTANTS[name].harm}"


@pytest.mark.timeout(1600)
def test_what_is_not_planted_is_not_caught(catches: dict[str, Future[hunt.Catch]]) -> None:
    catch = catches["none"].result()
    assert not catch.caught and catch.said.startswith("lived"), catch.said


def test_each_mutant_has_its_story_and_something_to_replace() -> None:
    """And takes what the real one takes: a mutant left behind by a change would crash the day its turn comes."""
    assert len(hunt.MUTANTS) >= 20
    for mutant in hunt.MUTANTS.values():
        assert len(mutant.harm.split()) >= 10, mutant.name
        for target, make in mutant.patches.items():
            kept: list[Any] = []
            replace(target, lambda real, kept=kept: kept.append(real) or real)       # as it was: nothing is planted here
            assert kept and kept[0] is not None, target
            if inspect.isroutine(kept[0]) or inspect.isclass(kept[0]):
                assert takes_the_same(make(kept[0]), kept[0]), f"{mutant.name}: {target}"


def takes_the_same(planted: Any, real: Any) -> bool:
    """Every way to call the real one by position is a way to call the planted one."""
    places = [p for p in inspect.signature(real).parameters.values()
              if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    fewest = sum(p.default is p.empty for p in places)
    try:
        for count in range(fewest, len(places) + 1):
            by_name = {p.name: None for p in inspect.signature(real).parameters.values()
                       if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
            inspect.signature(planted).bind(*range(count), **by_name)
    except TypeError:
        return False
    return True

"""The judges are judged: planted bugs must be caught. Six of them here, other ones with each commit; `make mutants` plants all.

That the unharmed product survives the same scenes with the same seeds is tested too: else everything would count as caught.
"""

from __future__ import annotations

import subprocess
import zlib
from pathlib import Path

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


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", of_this_commit())
def test_a_planted_bug_is_caught_within_a_minute(name: str) -> None:
    catch = hunt.hunt_apart(name)
    print(f"{name}: {catch.said}")
    assert catch.caught, f"{name} lived: {catch.said}\n{hunt.MUTANTS[name].harm}"


@pytest.mark.timeout(400)
def test_what_is_not_planted_is_not_caught() -> None:
    catch = hunt.hunt_apart("none")
    assert not catch.caught and catch.said.startswith("lived"), catch.said


def test_each_mutant_has_its_story_and_something_to_replace() -> None:
    assert len(hunt.MUTANTS) >= 20
    for mutant in hunt.MUTANTS.values():
        assert len(mutant.harm.split()) >= 10, mutant.name
        for target in mutant.patches:
            kept = []
            replace(target, lambda real, kept=kept: kept.append(real) or real)       # as it was: nothing is planted here
            assert kept and kept[0] is not None, target

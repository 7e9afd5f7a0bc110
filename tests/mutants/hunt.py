"""Plants mutants, one process each, and tells which the judges catch.

    python -m tests.mutants.hunt                 all of them, then caught/planted     (make mutants)
    python -m tests.mutants.hunt NAME            one, in this process: exit status 0 when it was caught
    python -m tests.mutants.hunt --list

A mutant is caught when the canary says a wrong token or the auditor finds a broken law within 60 s of CPU time, which is
wall time while nobody else uses the machine. A job that fails, or a bank that stands still or does not come to rest, counts
too, and is told apart as found by the walk. A crash of the scene itself does not count.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.mutants import of_attention, of_engine, of_loans

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = {mutant.name: mutant for mutant in (*of_loans.MUTANTS, *of_attention.MUTANTS, *of_engine.MUTANTS)}
WITHIN_S = 60.0
AT_ONCE = 2                                  # hunts; a little trouble with each other's timing helps both
PATIENCE_S = 300.0                           # of the clock on the wall, on a machine that others use too


@dataclass(frozen=True)
class Catch:
    """What became of one mutant."""

    name: str
    caught: bool
    said: str


def hunt(name: str) -> int:
    """In this process: plant it and play the scenes. 0: caught; 1: it lived; 2: something else went wrong."""
    from tests.mutants import scenes
    from tests.workers.auditor import Broken
    from tests.workers.canary_walk import WrongToken

    logging.disable(logging.CRITICAL)        # what members log about a planted bug is no news
    if name not in ("none", *MUTANTS):
        raise SystemExit(f"there is no mutant {name!r}: they are none, {', '.join(sorted(MUTANTS))}")
    if name != "none":
        MUTANTS[name].plant()
    scene, started, cpu = "", time.monotonic(), time.process_time()

    def when() -> str:
        return f"{time.process_time() - cpu:5.1f} s of CPU ({time.monotonic() - started:.0f} s) in {scene}"

    try:
        for playing in scenes.play_all(WITHIN_S):
            scene = playing
    except (WrongToken, Broken, AssertionError) as found:
        by = "canary" if isinstance(found, WrongToken) else "auditor" if isinstance(found, Broken) else "walk"
        print(f"{by:7} {when()}: {str(found).splitlines()[0][:160]}", flush=True)
        return 0 if time.process_time() - cpu < WITHIN_S else 1
    except Exception as broken:
        print(f"crash   {when()}: {type(broken).__name__}: {broken}", flush=True)
        return 2
    print(f"lived   {when()}", flush=True)
    return 1


def hunt_apart(name: str) -> Catch:
    """In a process of its own, which the mutant may hang."""
    try:
        done = subprocess.run([sys.executable, "-m", "tests.mutants.hunt", name], cwd=ROOT, capture_output=True, text=True,
                              timeout=PATIENCE_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Catch(name, False, "hung")
    said = done.stdout.strip().splitlines()
    return Catch(name, done.returncode == 0, said[-1] if said else done.stderr.strip()[-300:])


def main(arguments: list[str]) -> int:
    if arguments == ["--list"]:
        for mutant in MUTANTS.values():
            print(f"{mutant.name}\n    {mutant.harm}")
        return 0
    if arguments:
        return hunt(arguments[0])
    caught = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for catch in pool.map(hunt_apart, MUTANTS):
            caught += catch.caught
            print(f"{'caught' if catch.caught else 'MISSED'}  {catch.name}: {catch.said}", flush=True)
    print(f"{caught}/{len(MUTANTS)} planted bugs caught")
    return 0 if caught == len(MUTANTS) else 1


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)                         # a mutant may have left threads that never end

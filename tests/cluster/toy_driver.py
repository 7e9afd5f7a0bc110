"""A program that owns a cluster of toys, or with the word `real` of real members: the tests start it, interrupt or kill
it, and look at what is left.

Arguments: model folder, launcher, then settings as key=value, or `real`. Says each step of its life as one line on stdout:
the progress of the start, `up JSON` with address and processes, `leaving`, `down`, or `error TYPE TEXT`. While up it
obeys lines on stdin: `stop` (leave the with statement), `fork` (start a process of its own that stays), `job` (a job
that is still being answered afterwards).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvbank.cluster.client import Client
from kvbank.cluster.launcher import LocalCluster
from kvbank.errors import KVBankError

HERE = Path(__file__).parent


class ToyCluster(LocalCluster):
    """LocalCluster with toys for members."""

    member_program = ("-P", str(HERE / "toy_member.py"))


def use_toy_actors() -> None:
    """Ray's workers find toy_member by PYTHONPATH, which its launcher hands on."""
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])
    from toy_actor import ToyActor

    ToyCluster.member_actor = ToyActor


def say(*words: str) -> None:
    print(*words, flush=True)


def main() -> None:
    folder, launcher, *pairs = sys.argv[1:]
    kind: type[LocalCluster] = LocalCluster if "real" in pairs else ToyCluster
    if launcher == "ray" and kind is ToyCluster:
        use_toy_actors()
    settings: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs if pair != "real")
    try:
        with kind(folder, launcher=launcher, progress=say, config=settings) as cluster:
            say("up", json.dumps({"address": cluster.address, "processes": cluster.processes}))
            for line in sys.stdin:
                if line == "stop\n":
                    break
                if line == "job\n":
                    job = Client(cluster.address).submit(list(range(5, 250)) * 6, max_tokens=4000)
                    next(iter(job.stream()))
                if line == "fork\n":
                    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                say("did", line.strip())
            say("leaving")
        say("down")
    except KVBankError as error:
        say("error", type(error).__name__, str(error).replace("\n", " | "))
        sys.exit(3)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()

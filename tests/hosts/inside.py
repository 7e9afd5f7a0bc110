"""What runs as process 1 of a simulated host: gives it a face of its own, then keeps it clean until it is let go.

    mounts     its own /tmp, home, /run/sshd and /dev/shm; what it needs of the real ones is bound to the same path
    network    waits for the cable that the test plugs in, then sets its address
    sshd       when it has keys; the one door, as on a real machine

Reads one JSON line on stdin, answers "ready" or one line of error on stdout, and ends when stdin ends: the test's end,
however it comes, closes it, and with process 1 everything in the host is gone. Standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

CABLE_S = 20.0                       # for the cable to be plugged in


def main() -> None:
    """Does not return before the host ends."""
    plan = json.loads(sys.stdin.readline())
    try:
        sshd = furnish(plan)
    except Exception as error:                                   # told to the test, which prints it
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(1)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print("ready", flush=True)
    while True:                                                  # process 1 inherits orphans and must bury them
        try:
            pid, _ = os.wait()
        except ChildProcessError:
            time.sleep(0.2)
            continue
        if sshd is not None and pid == sshd.pid:
            sys.exit(1)


def furnish(plan: dict[str, Any]) -> subprocess.Popen[bytes] | None:
    """Mounts, name, network, door."""
    run("mount", "--make-rprivate", "/")
    home = os.path.expanduser("~")
    for hidden in (home, "/tmp"):                                # /tmp last: the folder itself is below it
        own = Path(plan["folder"]) / hidden.strip("/").replace("/", "-")
        own.mkdir(mode=0o1777 if hidden == "/tmp" else 0o700)
        for kept in plan["kept"]:
            if Path(kept).is_relative_to(hidden):
                place = own / Path(kept).relative_to(hidden)
                place.mkdir(parents=True)
                run("mount", "--bind", kept, str(place))
        for name, text in plan["home"].items() if hidden == home else ():
            (own / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (own / name).write_text(text)
            (own / name).chmod(0o600)
        for name, target in plan["links"].items() if hidden == home else ():
            (own / name).symlink_to(target)
        run("mount", "--rbind", str(own), hidden)
    os.chdir("/")                                                # out of what has just been covered
    os.makedirs("/run/sshd", exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", "/run/sshd", "-o", "mode=755")
    run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm", "-o", "size=1g")
    run("mount", "-t", "proc", "proc", "/proc")
    run("mount", "-t", "sysfs", "sysfs", "/sys")                 # of this host's network
    run("hostname", plan["name"])
    run("ip", "link", "set", "lo", "up")
    if plan["hub"]:
        run("ip", "link", "add", plan["hub"], "type", "bridge")
        device = plan["hub"]
    else:
        device, give_up = "eth0", time.monotonic() + CABLE_S
        while not os.path.isdir("/sys/class/net/eth0"):
            if time.monotonic() > give_up:
                raise TimeoutError(f"no cable within {CABLE_S:.0f} s")
            time.sleep(0.02)
    run("ip", "address", "add", f"{plan['address']}/24", "dev", device)
    run("ip", "link", "set", device, "up")
    if not plan["sshd"]:
        return None
    return subprocess.Popen([plan["sshd"], "-D", "-e", "-f", os.path.join(home, ".sshd", "config")],
                            stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr)


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


if __name__ == "__main__":
    main()

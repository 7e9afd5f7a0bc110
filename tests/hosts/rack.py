"""Rack: several "hosts" on this one machine, each with its own network, processes, files under /tmp and home, and sshd.

    outside   10.77.0.1   a hub (bridge) and whoever stands at it: the person who types `ray up`, the clients
      |-- cable n0 -- node-0  10.77.0.10      a cable is a veth pair; its end at the hub is counted, cut and healed
      |-- cable n1 -- node-1  10.77.0.11
      `-- cable n2 -- node-2  10.77.0.12

They are namespaces (network, pid, mount, uts) that live as long as one process each, and that process lives as long as
a pipe from the test stays open. So nothing has to be removed: when the test ends, is interrupted or killed, process 1
of each host goes, then all its processes, then its cables and mounts. Only the folder remains, and it is a temp folder.

Needs root, unshare, nsenter, ip and sshd; `why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "sshd", "rsync", "mount", "hostname")
READY_S = 30.0
HUB = "hub"


def why_not() -> str:
    """What this machine lacks to simulate hosts; empty when nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "simulated hosts need root on Linux"
    if absent := [tool for tool in TOOLS if _tool(tool) is None]:
        return f"simulated hosts need {', '.join(absent)}: apt install openssh-server openssh-client rsync iproute2"
    tried = subprocess.run(["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "ip", "link", "add", "kvb", "type",
                            "bridge"], capture_output=True, text=True, timeout=20, check=False)
    return f"namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else ""


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@dataclass(slots=True)
class Host:
    """One simulated machine. `pid` is its process 1 as this machine sees it."""

    name: str
    address: str
    folder: Path
    process: subprocess.Popen[str]
    pid: int

    def command(self, *words: str, env: Mapping[str, str] | None = None) -> list[str]:
        """`words` as a command line that runs inside, in its home, with a clean environment plus `env`."""
        home = os.path.expanduser("~")
        settings = {"HOME": home, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "USER": "root",
                    "LANG": "C.UTF-8", "TERM": "dumb", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "-u", f"--wdns={home}", "env", "-i",
                *(f"{name}={text}" for name, text in settings.items()), *words]

    def run(self, *words: str, within_s: float, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run inside and wait. Raises AssertionError with the output when it fails or takes longer."""
        with tempfile.TemporaryFile("w+") as output:             # not a pipe: a daemon may keep it open
            done = subprocess.Popen(self.command(*words, env=env), stdin=subprocess.DEVNULL, stdout=output,
                                    stderr=subprocess.STDOUT, text=True, start_new_session=True)
            try:
                status = done.wait(within_s)
            except subprocess.TimeoutExpired:
                status = None
                done.kill()
                done.wait(10)
            output.seek(0)
            text = output.read()
        assert status == 0, f"{self.name}: {' '.join(words)[:300]} -> {status} within {within_s:.0f} s\n{text[-6000:]}"
        return subprocess.CompletedProcess(words, status, text, "")

    @property
    def home(self) -> Path:
        """Its home folder, as this machine sees it."""
        return self.folder / os.path.expanduser("~").strip("/").replace("/", "-")

    def processes(self) -> list[psutil.Process]:
        """Everything that runs inside, process 1 and sshd excepted."""
        space = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for each in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.stat(f"/proc/{each.pid}/ns/pid").st_ino == space and each.pid != self.pid and "sshd" not in each.name():
                    found.append(each)
        return found

    def runs(self, name: str) -> bool:
        """Whether a process of that name is inside; some end while they are looked at."""
        for each in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if each.name() == name:
                    return True
        return False


class Rack:
    """Builds `count` hosts and the place outside them; a context manager. `shared`: folders that all of them see."""

    def __init__(self, count: int, *, network: str = "10.77.0", shared: Sequence[Path] = ()) -> None:
        self._shared = [str(path.resolve()) for path in shared]
        self.folder = Path(tempfile.mkdtemp(prefix="kvrack-"))
        self.hosts: list[Host] = []
        self._key = self.folder / "key"
        _checked("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "kvrack", "-f", str(self._key))
        try:
            self.outside = self._host("outside", f"{network}.1", hub=True)
            for number in range(count):
                self.hosts.append(self._host(f"node-{number}", f"{network}.{10 + number}", cable=f"n{number}"))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Rack:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End every host; see the top of this file for why so little is needed."""
        everybody = [*self.hosts, *([self.outside] if hasattr(self, "outside") else [])]
        for host in everybody:
            assert host.process.stdin is not None
            with contextlib.suppress(OSError):
                host.process.stdin.close()
        for host in everybody:
            try:
                host.process.wait(10)
            except subprocess.TimeoutExpired:
                host.process.kill()
                host.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- cables --------------------------------------------------------------------------------------------------------

    def cut(self, host: Host) -> None:
        """Pull the cable: nothing passes, nobody is told."""
        self._at_the_hub("ip", "link", "set", self._cable(host), "down")

    def heal(self, host: Host) -> None:
        self._at_the_hub("ip", "link", "set", self._cable(host), "up")

    def crossed(self) -> dict[str, tuple[int, int]]:
        """(bytes into, bytes out of) each host so far, counted at the hub's end of its cable."""
        found = {}
        told = self._at_the_hub("ip", "-s", "-j", "link", "show")
        by_name = {link["ifname"]: link for link in json.loads(told)}
        for host in self.hosts:
            stats = by_name[self._cable(host)]["stats64"]
            found[host.name] = (int(stats["tx"]["bytes"]), int(stats["rx"]["bytes"]))
        return found

    def _cable(self, host: Host) -> str:
        return f"n{self.hosts.index(host)}"

    def _at_the_hub(self, *words: str) -> str:
        return _checked("nsenter", "-t", str(self.outside.pid), "-n", *words)

    # -- building ------------------------------------------------------------------------------------------------------

    def _host(self, name: str, address: str, *, hub: bool = False, cable: str = "") -> Host:
        folder = self.folder / name
        folder.mkdir(mode=0o700)
        plan = {"name": name, "address": address, "folder": str(folder), "hub": HUB if hub else "",
                "kept": _kept(self._shared), "home": self._home(address, hub), "sshd": "" if hub else _tool("sshd"),
                "links": {"kvbank": str(ROOT), "kvbank-env": sys.prefix}}
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [*("unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child=SIGKILL"), sys.executable, "-I",
                 "-S", str(Path(__file__).with_name("inside.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd="/")
        assert process.stdin is not None and process.stdout is not None
        try:
            pid = _first_child(process)
            process.stdin.write(json.dumps(plan) + "\n")
            process.stdin.flush()
            if cable:
                self._at_the_hub("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
                self._at_the_hub("ip", "link", "set", cable, "master", HUB, "up")
            word = process.stdout.readline() if select.select([process.stdout], [], [], READY_S)[0] else "silence"
            assert word == "ready\n", f"{name}: {word}{(self.folder / f'{name}.log').read_text()}"
        except BaseException:
            process.kill()
            process.wait(10)
            raise
        return Host(name, address, folder, process, pid)

    def _home(self, address: str, hub: bool) -> dict[str, str]:
        """Files of its home folder by name."""
        made = {".bashrc": f"export PYTHONPATH={ROOT}\n", ".profile": ""}
        if hub:
            return made | {".ssh/kvbank": self._key.read_text()}
        home, host_key = os.path.expanduser("~"), self.folder / f"host-{address}"
        _checked("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", address, "-f", str(host_key))
        config = [f"ListenAddress {address}:22", f"HostKey {home}/.sshd/key",
                  f"AuthorizedKeysFile {home}/.ssh/authorized_keys",
                  "PasswordAuthentication no", "KbdInteractiveAuthentication no", "UsePAM no", "StrictModes no",
                  "PermitRootLogin prohibit-password", "PidFile none", "UseDNS no", "MaxStartups 50",
                  f"SetEnv PATH={os.environ.get('PATH', '')}:/usr/sbin:/sbin"]
        return made | {".ssh/authorized_keys": self._key.with_suffix(".pub").read_text(),
                       ".sshd/key": host_key.read_text(), ".sshd/config": "\n".join(config) + "\n"}


def _kept(shared: Sequence[str]) -> list[str]:
    """Real folders that every host must see where they are: this checkout, Python with its packages, what is shared."""
    places = sorted({str(ROOT), sys.prefix, sys.base_prefix, *shared})
    return [one for one in places if not any(one != other and Path(one).is_relative_to(other) for other in places)]


def _first_child(process: subprocess.Popen[str]) -> int:
    """Process 1 of the host that `process` (unshare) makes."""
    assert process.stdout is not None
    while process.poll() is None:
        if children := psutil.Process(process.pid).children():
            return int(children[0].pid)
        select.select([process.stdout], [], [], 0.01)
    raise AssertionError(f"unshare ended with status {process.returncode}")


def _checked(*words: Sequence[str] | str) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr.strip()}"
    return done.stdout

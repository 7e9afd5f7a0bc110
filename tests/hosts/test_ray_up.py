"""`ray up` for real: three machines with sshd and cables between them, our own deploy files, jobs from outside.

Behind every lock: https from outside, certificates between members, Ray's token.

    outside --cable--> node-0 (head: Ray's GCS, control, gateway)    node-1, node-2: started by the head, over ssh

One story, because every part of it needs the one before; what crossed the cables is printed at the end of each part.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from kvbank.cluster.certs import make_certificates
from kvbank.cluster.client import Client
from kvbank.cluster.launcher import LocalCluster
from kvbank.workers.models.random_model import write_random_model
from tests.hosts.rack import ROOT, Host, Rack, why_not

DEPLOY = ROOT / "deploy"
VOCAB, PROMPT, ANSWER = 512, 3_000, 160
KEY, HEAD = "a-key-for-tests", "10.77.0.10"
CUT_S = 4.0
SMALL = {"device_blocks": 64, "torch_threads": 1, "exactness": "bitwise", "host_bytes": "64MiB"}
MEMBERS = {"worker-0", "worker-1", "lender-0", "lender-1", "lender-2"}

MISSING = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.skipif(bool(MISSING), reason=MISSING)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), seed=7, vocab=VOCAB, max_position_embeddings=8_192)


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[int, list[int]]:
    """The right answers by seed: those of one big worker that nobody disturbs."""
    settings = {**SMALL, "device_blocks": 1024, "redis": None, "workers": 1, "launcher": "process"}
    with LocalCluster(model=str(model), **settings) as one, Client(one.address) as client:
        return {seed: client.generate(prompt(seed), max_tokens=ANSWER, temperature=0.0).token_ids for seed in range(4)}


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(PROMPT)]


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an operator makes, and copies to every machine without the authority's key."""
    folder = tmp_path_factory.mktemp("locks") / "certs"
    make_certificates(folder, names=[HEAD])
    (folder / "ca.key").unlink()
    return folder


def test_ray_up_serves_jobs_across_machines_through_a_cut_cable_and_a_dead_machine(model, certs, alone, capfd) -> None:
    with Rack(3, shared=[model, certs]) as rack:
        assert rack.hosts[0].address == HEAD
        place = Place(rack, model, certs, capfd)
        place.ray_up()
        place.kvbank_up()
        place.a_job_borrows_across_machines(alone[0])
        place.a_cable_is_cut_and_healed(alone[1])
        place.a_machine_dies_and_comes_back(alone[2])
        place.a_job_borrows_again(alone[3])
        place.everything_goes_down()
        networks = {os.readlink(f"/proc/{host.pid}/ns/net") for host in (*rack.hosts, rack.outside)}
    assert len(networks) == 4 and not networks & living_networks()
    assert not rack.folder.exists() and not {"hub", "n0", "n1", "n2"} & set(os.listdir("/sys/class/net"))


ALONE = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)         # a background job inherits that it is ignored
from tests.hosts.rack import Rack
with Rack(1) as rack:
    print(rack.folder, *(os.readlink(f"/proc/{host.pid}/ns/net") for host in (rack.outside, *rack.hosts)), flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_rack_whose_test_is_interrupted_or_killed_is_gone(number, until) -> None:
    with subprocess.Popen([sys.executable, "-c", ALONE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          cwd=ROOT) as one:
        folder, *networks = one.stdout.readline().split()
        assert len(networks) == 2 and set(networks) <= living_networks()
        one.send_signal(number)
        one.wait(30)
    until(lambda: not set(networks) & living_networks())
    assert Path(folder).exists() == (number == signal.SIGKILL)   # a temp folder, and the only thing that may stay
    shutil.rmtree(folder, ignore_errors=True)


class Place:
    """The rack with what was started on it."""

    def __init__(self, rack: Rack, model: Path, certs: Path, capfd: Any) -> None:
        self.rack, self.model, self.certs, self._capfd = rack, model, certs, capfd
        self.head, *self.others = rack.hosts
        self.outside, self.address = rack.outside, f"https://{rack.hosts[0].address}:8080"
        self._started = time.monotonic()
        self._files()

    def say(self, line: str) -> None:
        with self._capfd.disabled():
            print(f"\n  {time.monotonic() - self._started:6.1f} s  {line}", end="", flush=True)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One part of the story; says what crossed the cables meanwhile."""
        start = self.rack.crossed()
        self.say(f"{name} ...")
        yield
        end = self.rack.crossed()
        moved = ", ".join(f"{host} in {end[host][0] - a:,} out {end[host][1] - b:,}" for host, (a, b) in start.items())
        self.say(f"{name}: done; bytes over the cables: {moved}")

    def _files(self) -> None:
        """Our deploy files with this place's addresses, key and sizes; nothing else is changed."""
        ray = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
        ray["provider"] |= {"head_ip": self.head.address, "worker_ips": [host.address for host in self.others]}
        ray["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/kvbank"}
        ours = yaml.safe_load((DEPLOY / "kvbank.yaml").read_text())
        ours["cluster"] |= {"lenders": 3, "start_timeout_s": 150}
        ours["engine"] |= {"model": str(self.model), "torch_threads": 1, "exactness": "bitwise"}
        ours["vault"]["device_blocks"], ours["tiers"]["host_bytes"] = SMALL["device_blocks"], SMALL["host_bytes"]
        assert ours["cluster"].pop("allow_plaintext"), "the switch is in the file"
        ours["cluster"]["tls_dir"] = str(self.certs)
        ours["http"] |= {"api_keys": {KEY: "default"}, "tls_cert": str(self.certs / "https.pem"),
                         "tls_key": str(self.certs / "https.key")}
        home = self.outside.home
        (home / ".ray").mkdir(mode=0o700)
        private(home / "ray-cluster.yaml", yaml.safe_dump(ray))
        private(home / ".ray/auth_token", secrets.token_hex(32))
        private(home / "key", KEY)
        private(self.head.home / "kvbank.yaml", yaml.safe_dump(ours))

    def ray(self, *words: str, within_s: float) -> str:
        env = {"RAY_UP_enable_autoscaler_v2": "0", "RAY_AUTH_MODE": "token"}
        return self.outside.run("kvbank-env/bin/ray", *words, within_s=within_s, env=env).stdout

    def status(self) -> dict[str, Any]:
        told = self.outside.run("kvbank-env/bin/python", "-m", "kvbank", "status", "--address", self.address,
                                "--api-key-file", "key", "--ca", str(self.certs / "ca.pem"), "--json", within_s=40)
        return dict(json.loads(told.stdout.splitlines()[-1]))

    def ask(self, seed: int, *, began: Callable[[], None] = lambda: None, within_s: float = 120.0) -> dict[str, Any]:
        """Submit a prompt from outside; `began` is called when the first token has arrived."""
        asked = {"address": self.address, "api_key": KEY, "ca": str(self.certs / "ca.pem"), "prompt": prompt(seed),
                 "max_tokens": ANSWER, "within_s": within_s}
        words = self.outside.command("kvbank-env/bin/python", str(Path(__file__).with_name("visitor.py")))
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              start_new_session=True) as visitor:
            try:
                assert visitor.stdin is not None and visitor.stdout is not None
                visitor.stdin.write(json.dumps(asked))
                visitor.stdin.close()
                visitor.stdin = None
                first = visitor.stdout.readline()
                if first:
                    began()
                rest, errors = visitor.communicate(timeout=within_s)
            finally:
                visitor.kill()
        assert first and rest, errors[-3000:]
        answer: dict[str, Any] = json.loads(rest)
        assert answer["streamed"] == answer["token_ids"]         # nothing lost, nothing twice
        return answer

    # -- the story -----------------------------------------------------------------------------------------------------

    def ray_up(self) -> None:
        with self.part("ray up"):
            self.ray("up", "-y", "--no-config-cache", "ray-cluster.yaml", within_s=150)

    def kvbank_up(self) -> None:
        """At once, while the head still starts the other machines: kvbank waits for the room it needs."""
        with self.part("kvbank up"):
            told = self.ray("exec", "ray-cluster.yaml", "kvbank up -d --json --config ~/kvbank.yaml", within_s=240)
            assert '"address"' in told, told[-3000:]
            workers = self.status()["workers"]
            homes = {worker["id"]: worker["host"] for worker in workers}
            self.say(f"members: {homes}")
            assert set(homes) == MEMBERS and set(homes.values()) == {host.name for host in self.rack.hosts}

    def a_job_borrows_across_machines(self, right: list[int]) -> None:
        with self.part("a job that borrows"):
            answer = self.ask(0)
            homes = {worker["id"]: worker["host"] for worker in self.status()["workers"]}
            receipt = answer["receipt"]
            self.say(f"borrowed {receipt['borrowed_blocks_peak']} blocks from "
                     f"{', '.join(f'{name} on {homes[name]}' for name in receipt['lenders'])}, "
                     f"{receipt['remote_attention_calls']} remote attentions")
            assert answer["token_ids"] == right
            assert receipt["borrowed_blocks_peak"] > 0 and len({homes[name] for name in receipt["lenders"]}) > 1

    def a_cable_is_cut_and_healed(self, right: list[int]) -> None:
        with self.part("a cable is cut for some seconds while a job runs"):
            cut: list[Host] = []

            def disturb() -> None:
                host = self._lending_host()
                cut.append(host)
                self.rack.cut(host)
                still = self.rack.crossed()[host.name]
                time.sleep(CUT_S)                                # the length of the fault, nothing is waited for
                assert self.rack.crossed()[host.name] == still   # it was cut
                self.rack.heal(host)

            answer = self.ask(1, began=disturb)
            receipt = answer["receipt"]
            self.say(f"cut {cut[0].name}: attempts {receipt['attempts']}, recomputed {receipt['recomputed_after_fault']}")
            assert answer["token_ids"] == right
            assert receipt["recomputed_after_fault"] > 0 or receipt["attempts"] > 1
            self._until(lambda: self._alive() == MEMBERS, within_s=60)

    def a_machine_dies_and_comes_back(self, right: list[int]) -> None:
        with self.part("a machine's processes die while a job runs"):
            dead: list[Host] = []

            def kill() -> None:
                host = self._lending_host()
                dead.append(host)
                for process in host.processes():
                    with contextlib.suppress(psutil.Error):
                        process.kill()

            answer = self.ask(2, began=kill)
            receipt = answer["receipt"]
            self.say(f"killed {dead[0].name}: attempts {receipt['attempts']}, recomputed {receipt['recomputed_after_fault']}")
            assert answer["token_ids"] == right
        with self.part("the machine comes back"):
            # Ray's head waits half a minute, then starts the machine's Ray again over ssh; on a busy machine this takes long.
            self._until(lambda: dead[0].runs("raylet"), within_s=240)
            self._until(lambda: self._alive() == MEMBERS, within_s=120)
            self.say(f"members: { {w['id']: w['host'] for w in self.status()['workers']} }")

    def a_job_borrows_again(self, right: list[int]) -> None:
        with self.part("a job after all that"):
            answer = self.ask(3)
            assert answer["token_ids"] == right and answer["receipt"]["borrowed_blocks_peak"] > 0

    def everything_goes_down(self) -> None:
        with self.part("kvbank down, ray down"):
            assert "stopped" in self.ray("exec", "ray-cluster.yaml", "kvbank down", within_s=60)
            self.ray("down", "-y", "ray-cluster.yaml", within_s=90)
            for host in self.others:
                self.outside.run("ssh", "-i", ".ssh/kvbank", "-o", "StrictHostKeyChecking=no", "-o",
                                 "UserKnownHostsFile=/dev/null", f"root@{host.address}", "~/kvbank-env/bin/ray stop",
                                 within_s=60)
            self._until(lambda: not any(host.processes() for host in self.rack.hosts), within_s=40)

    # -- looking -------------------------------------------------------------------------------------------------------

    def _alive(self) -> set[str]:
        return {worker["id"] for worker in self.status()["workers"] if worker["state"] == "ok"}

    def _lending_host(self) -> Host:
        """A machine that lends to a job, is not the head, and best not the borrower's own."""
        told = self.status()
        homes = {worker["id"]: worker["host"] for worker in told["workers"]}
        lent = [(homes[loan["lender"]], homes[loan["borrower"]]) for loan in told["loans"]]
        fit = [(there == here, there) for there, here in lent if there != self.head.name]
        assert fit, told["loans"]
        name = min(fit)[1]
        return next(host for host in self.others if host.name == name)

    def _until(self, true: Callable[[], bool], *, within_s: float) -> None:
        give_up = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < give_up, self._why()
            time.sleep(0.5)

    def _why(self) -> str:
        """Who runs where, and what the one says on the head that starts the other machines."""
        said = []
        for host in self.rack.hosts:
            for process in host.processes():
                with contextlib.suppress(psutil.Error):
                    said.append(f"{host.name}: {' '.join(process.cmdline())[:160]}")
        logs = (self.head.folder / "tmp").glob("ray/session_2*/logs/monitor.*")
        return "\n".join([*said, *(f"{path.name}:\n{path.read_text()[-4000:]}" for path in logs)])


def private(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


def living_networks() -> set[str]:
    """Network namespaces in which some process lives."""
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
    return found

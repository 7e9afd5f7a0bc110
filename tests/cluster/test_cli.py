"""The command line, without a cluster and against a gateway with fake workers."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvbank.cluster import cli, statefile, verbs
from kvbank.cluster.capacity import capacity_tokens
from kvbank.errors import ConfigError, NotFound
from kvbank.proto.control_pb2 import Member
from kvbank.workers.models.random_model import write_random_model


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "state" / "kvbank").mkdir(parents=True, mode=0o700)
    return tmp_path / "state" / "kvbank"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    status = cli.main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_every_verb_has_help_and_json(capsys) -> None:
    for verb in ("up", "down", "status", "submit", "demo", "doctor", "plan"):
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, "--help"])
        assert ended.value.code == 0 and "--json" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["fly"], ["status", "--nonsense"], ["up", "--workers", "two"]])
def test_wrong_usage_ends_with_two(words, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2


def test_a_typed_error_ends_with_one_and_is_json_when_asked(capsys) -> None:
    assert cli.main(["status"]) == 1
    assert "kvbank up" in capsys.readouterr().err
    status, told = run(capsys, "status")
    assert status == 1 and told["error"]["code"] == "not_found"


def test_a_mistake_in_a_setting_is_told_before_anything_starts(capsys) -> None:
    status, told = run(capsys, "up", "--model", "x", "--set", "vault.device_block=9")
    assert status == 1 and "device_blocks" in told["error"]["message"]
    assert run(capsys, "up", "--device-blocks", "16")[1]["error"]["code"] == "config_error"
    assert run(capsys, "up")[1]["error"]["code"] == "config_error"


def test_down_without_a_cluster_says_so_and_is_content(capsys) -> None:
    assert run(capsys, "down") == (0, {"name": "default", "stopped": False, "killed": False})


def test_submit_streams_to_people_and_answers_json_to_programs(make_worker, make_server, answer_of, capsys, tmp_path):
    address = make_server(make_worker("worker-0")).address
    text = bytes(answer_of(list(b"hello"), 8)).decode()
    assert cli.main(["submit", "hello", "--address", address, "--max-tokens", "8"]) == 0
    said = capsys.readouterr()
    assert said.out == text + "\n" and "computed" in said.err
    status, told = run(capsys, "submit", "hello", "--address", address, "--max-tokens", "8", "--job-id", "mine")
    assert status == 0 and told["text"] == text and told["id"] == "mine" and told["receipt"]["prompt_tokens"] == 5
    (tmp_path / "prompt.txt").write_text("hello")
    assert run(capsys, "submit", "--file", str(tmp_path / "prompt.txt"), "--address", address)[0] == 0
    assert run(capsys, "submit", "--address", address)[1]["error"]["code"] == "invalid_request"
    assert run(capsys, "submit", "x", "-d", "--address", address)[1]["id"].startswith("job-")


def test_status_of_an_address_is_the_clients_status(make_worker, make_server, capsys) -> None:
    address = make_server(make_worker("worker-0")).address
    assert run(capsys, "status", "--address", address) == (0, {"workers": [], "loans": [], "jobs": [], "tiers": []})
    assert cli.main(["status", "--address", address]) == 0


def test_a_key_comes_from_a_file_and_never_from_the_command_line(make_worker, make_server, capsys, tmp_path) -> None:
    address = make_server(make_worker("worker-0"), api_keys={"planted": "tenant-a"}).address
    assert run(capsys, "status", "--address", address)[1]["error"]["code"] == "unauthorized"
    (tmp_path / "key").write_text("planted\n")
    assert run(capsys, "status", "--address", address, "--api-key-file", str(tmp_path / "key"))[0] == 0


def test_a_given_key_goes_before_the_clusters_own(make_worker, make_server, capsys, state, tmp_path) -> None:
    """Else the job would run as another tenant."""
    worker = make_worker("worker-0")
    address = make_server(worker, api_keys={"planted": "alice", "own": "operators:ops"}).address
    claimed = statefile.claim(state, "mine", address=address, api_key="own")
    try:
        (tmp_path / "key").write_text("planted\n")
        assert run(capsys, "submit", "hello", "--name", "mine")[0] == 0
        assert run(capsys, "submit", "hello", "--name", "mine", "--api-key-file", str(tmp_path / "key"))[0] == 0
    finally:
        statefile.release(state, claimed)
    assert [job.tenant for job in worker.seen] == ["operators", "alice"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe", "folder"])
def test_a_key_file_that_cannot_be_read_is_told(capsys, tmp_path, content) -> None:
    path = tmp_path / "key"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    status, told = run(capsys, "status", "--address", "http://127.0.0.1:1", "--api-key-file", str(path))
    assert status == 1 and told["error"]["code"] == "config_error" and str(path) in told["error"]["message"]


@pytest.mark.parametrize("tokens", ["0", "-1"])
def test_a_plan_for_no_tokens_is_refused(capsys, tokens) -> None:
    assert run(capsys, "plan", "--tokens", tokens)[1]["error"]["code"] == "invalid_request"


def test_status_config_names_the_source_of_every_value(capsys, monkeypatch) -> None:
    monkeypatch.setenv("KVBANK__HTTP__PORT", "8123")
    status, told = run(capsys, "status", "--config")
    assert status == 0 and told["http.port"] == {"value": 8123, "source": "env KVBANK__HTTP__PORT"}
    assert told["vault.block_size"] == {"value": 16, "source": "default"}
    assert run(capsys, "status", "--config", "--address", "http://127.0.0.1:1")[1]["error"]["code"] == "invalid_request"
    assert run(capsys, "status", "--config", "--name", "typo")[1]["error"]["code"] == "not_found"


def test_plan_counts_tokens_and_answers_for_a_length(capsys, tmp_path) -> None:
    model = str(write_random_model(tmp_path / "model", num_layers=2, hidden_size=64, heads=4, kv_heads=2))
    words = ("plan", "--model", model, "--workers", "1", "--lenders", "2", "--device-blocks", "64", "--host-bytes", "0",
             "--redis", "none")
    status, plan = run(capsys, *words)
    assert status == 0 and plan["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4 and plan["redis_tokens"] == 0
    assert (plan["device_tokens"], plan["borrowable_tokens"], plan["host_tokens"]) == (1024, 2048, 0)
    verdicts = [run(capsys, *words, "--tokens", str(n))[1]["verdict"] for n in (1024, 1025, 3072, 3073, 10**6)]
    assert verdicts[0] == "fits one worker" and verdicts[1].startswith("borrows 1 ")
    assert verdicts[2].startswith("borrows 128 ") and verdicts[3].startswith("too long: the cluster holds 3072")
    assert verdicts[4].startswith("too long: the model reads")
    assert cli.main(list(words)) == 0 and "longest job" in capsys.readouterr().out


@pytest.mark.parametrize(("host_bytes", "shards"), [(0, 1), (1 << 20, 1), (3_000_000, 1), (1 << 20, 2)])
def test_a_plan_counts_as_the_gateway_does(capsys, tmp_path, host_bytes, shards) -> None:
    model = str(write_random_model(tmp_path / "model", num_layers=2, hidden_size=64, heads=4, kv_heads=2))
    _, plan = run(capsys, "plan", "--model", model, "--workers", "2", "--lenders", "1", "--device-blocks", "64",
                  "--host-bytes", str(host_bytes), "--shards", str(shards))
    slot_bytes = plan["span_bytes"] // shards
    members = [member(f"worker-{replica}.{shard}", "model", 8, slot_bytes, replica, shard, shards)
               for replica in range(2) for shard in range(shards)]
    members.append(member("lender-0", "lender", 8, slot_bytes, 0, 0, 1))
    assert plan["longest_job_tokens"] == capacity_tokens(members, span_tokens=128, host_bytes=host_bytes, lend_cap=None)


def member(name: str, kind: str, slots: int, slot_bytes: int, replica: int, shard: int, shards: int) -> Member:
    return Member(id=name, kind=kind, slots_total=slots, slot_bytes=slot_bytes, replica=replica, shard=shard, shards=shards)


def test_doctor_ends_well_on_a_machine_that_runs_these_tests(capsys) -> None:
    status, told = run(capsys, "doctor")
    found = {finding["what"]: finding for finding in told["findings"]}
    assert {"python", "torch", "grpc", "tiers", "state folder", "loopback"} <= set(found)
    assert found["grpc"]["state"] == "good" and found["tiers"]["state"] in ("good", "warn")
    assert status == (0 if told["ok"] else 1)


def test_bench_runs_a_script_and_hands_its_status_on(capsys, tmp_path, monkeypatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "toy.py").write_text("def main(argv):\n    print(argv)\n    return 3\n")
    monkeypatch.setattr(verbs, "ROOT", tmp_path)
    assert cli.main(["bench", "toy", "--quick", "--json"]) == 3
    assert "['--quick', '--json']" in capsys.readouterr().out
    for name in ("none", "../toy", "toy.py"):
        assert cli.main(["bench", name]) == 1
    assert "there are: toy" in capsys.readouterr().err
    assert cli.main(["bench"]) == 1 and "there are: toy" in capsys.readouterr().err
    assert cli.main(["bench", "--help"]) == 0 and "NAME: toy" in capsys.readouterr().out
    assert cli.main(["bench", "toy", "--help"]) == 3 and "['--help']" in capsys.readouterr().out


def test_the_command_runs_from_an_uninstalled_checkout(tmp_path) -> None:
    root = Path(cli.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-m", "kvbank", "down", "--json"], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
    assert json.loads(done.stdout)["stopped"] is False


# -- state files -------------------------------------------------------------------------------------------------------

def test_a_state_file_is_private_and_its_name_is_free_again_after_release(state) -> None:
    mine = statefile.claim(state, "one", address="http://127.0.0.1:1", api_key="planted")
    assert stat.S_IMODE(statefile.path_of(state, "one").stat().st_mode) == 0o600
    assert statefile.need(state, "one") == mine and "planted" not in repr(mine)
    assert [running.name for running in statefile.known(state)] == ["one"]
    statefile.release(state, mine)
    assert statefile.find(state, "one") is None


def test_a_name_of_a_living_process_cannot_be_claimed_and_that_of_a_dead_one_can(state) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        import psutil
        born = psutil.Process(other.pid).create_time()
        statefile.write(state, statefile.Running(name="one", pid=other.pid, born=born, address="http://x"))
        with pytest.raises(ConfigError, match="already up at http://x"):
            statefile.claim(state, "one")
        assert statefile.stop(state, statefile.need(state, "one"))
        assert other.poll() is not None
    assert statefile.claim(state, "one").pid == os.getpid()


def test_a_recycled_process_id_is_not_the_cluster(state) -> None:
    statefile.write(state, statefile.Running(name="one", pid=os.getpid(), born=1.0))
    assert statefile.find(state, "one") is None and not statefile.path_of(state, "one").exists()
    with pytest.raises(NotFound):
        statefile.need(state, "one")


def test_a_process_that_ended_is_not_up_until_its_parent_has_looked(state) -> None:
    import psutil
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        mine = statefile.Running(name="one", pid=other.pid, born=psutil.Process(other.pid).create_time())
        assert mine.alive
        assert other.stdin is not None
        other.stdin.close()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)      # it is a zombie now, and stays one
        assert psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE and not mine.alive


def test_a_damaged_state_file_is_no_cluster(state) -> None:
    path = statefile.path_of(state, "one")
    path.parent.mkdir()
    for damage in ("", "{", "[]", '{"x": 1}'):
        path.write_text(damage)
        assert statefile.find(state, "one") is None


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "x" * 65])
def test_a_name_cannot_leave_the_folder(state, name) -> None:
    with pytest.raises(ConfigError):
        statefile.path_of(state, name)

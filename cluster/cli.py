"""The command `kvbank`: up, down, status, top, submit, demo, bench, certs, doctor, plan. Each takes --json: one object on
stdout.

Exit status: 0 done, 1 a typed error (told on stderr, or as {"error": ...} with --json), 2 wrong usage, 130 Ctrl-C.
Heavy imports wait until a verb needs them, so that `status` and `submit` load neither torch nor Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import kvbank
from kvbank.cluster import statefile
from kvbank.cluster.client import Client, Job
from kvbank.cluster.config import load, read_keys, state_dir
from kvbank.cluster.screen import console, receipt_view, status_view, table
from kvbank.cluster.settings import Settings
from kvbank.errors import ConfigError, InvalidRequest, KVBankError, NotFound

ROOT = Path(kvbank.__file__).resolve().parent.parent
POLL_S = 0.2
_CLUSTER_FLAGS: dict[str, tuple[type, str]] = {      # settings that have a flag of their own; --set reaches all others
    "model": (str, "model folder in Hugging Face format"),
    "workers": (int, "replicas of the model"),
    "shards": (int, "layer ranges that make up a replica"),
    "lenders": (int, "members that only lend memory"),
    "device_blocks": (int, "KV blocks of each worker"),
    "block_size": (int, "tokens per block"),
    "host_bytes": (str, "host memory for spilled blocks, e.g. 256MiB; 0: none"),
    "redis": (str, "embedded, a URL, or none"),
    "dtype": (str, "float32, bfloat16 or float16"),
    "launcher": (str, "ray or process"),
    "ray_address": (str, "join this Ray (auto, or host:port) instead of starting one; --address says the same"),
    "host": (str, "address the API listens on"),
    "port": (int, "port the API listens on; 0: any"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status."""
    args, rest = _parser().parse_known_args(argv)
    if rest and args.verb != "bench":
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return int(args.run(args))
    except KVBankError as error:
        if args.json:
            _print_json({"error": {"code": error.code, "message": str(error)}})
        else:
            print(f"kvbank: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                          # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvbank", description="A bank for the KV cache of large language models.")
    parser.add_argument("--version", action="version", version=f"kvbank {kvbank.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        return made

    up = verb("up", _up, "start a cluster on this machine")
    _add_cluster_flags(up)
    up.add_argument("-d", "--detach", action="store_true", help="return once it serves; `kvbank down` ends it")
    up.add_argument("--tell", type=int, help=argparse.SUPPRESS)      # descriptor on which a detached one reports

    down = verb("down", _down, "stop a cluster")
    _add_name(down)

    status = verb("status", _status, "show workers, loans, jobs and tiers")
    _add_target(status)
    status.add_argument("--config", dest="show_config", action="store_true",
                        help="the effective settings and where each came from")

    top = verb("top", _top, "watch members, tiers, loans, jobs and rates")
    _add_target(top)
    top.add_argument("--once", action="store_true", help="look once, and end")
    top.add_argument("--interval-s", type=float, default=1.0, help="seconds between two looks")

    submit = verb("submit", _submit, "run one prompt and stream its answer")
    _add_target(submit)
    submit.add_argument("prompt", nargs="?", help="the prompt; - reads standard input")
    submit.add_argument("--file", type=Path, help="read the prompt from a file")
    for name, kind, about in (
        ("max-tokens", int, "tokens to generate"), ("temperature", float, "0: greedy"),
        ("top-p", float, "1: off"), ("top-k", int, "0: off"), ("seed", int, "makes sampling repeatable"),
        ("job-id", str, "makes submit idempotent"), ("deadline-s", float, "give up after this many seconds"),
    ):
        submit.add_argument(f"--{name}", type=kind, help=about)
    submit.add_argument("--stop", action="append", help="end before this text; may be repeated")
    submit.add_argument("--detach", "-d", action="store_true", help="print the job's id and return")

    demo = verb("demo", _demo, "show borrowing, spilling and reuse on this machine, and prove the tokens equal")
    demo.add_argument("--model", help="model folder; default: the needle model of a checkout")
    demo.add_argument("--document", type=Path, help="a long text; default: this project's own documentation")
    demo.add_argument("--launcher", choices=("ray", "process"), default="ray")
    demo.add_argument("--tokens", type=int, default=0, help="cut the document to this many tokens")

    bench = verb("bench", _bench, "run a benchmark of bench/")
    bench.add_argument("name", metavar="NAME", help="engine, prefix, attend, lending, reuse, gateway, ...")

    certs = verb("certs", _certs, "make or renew the certificates of a cluster in a folder")
    certs.add_argument("folder", type=Path, help="where they are or will be; ca.key in it signs, keep that one to yourself")
    certs.add_argument("--name", dest="names", action="append", help="a name or address of the gateway; may be repeated")
    certs.add_argument("--days", type=int, default=90, help="how long they are valid")

    doctor = verb("doctor", _doctor, "check this machine, and what a cluster with these settings would need of it")
    _add_cluster_flags(doctor)

    plan = verb("plan", _plan, "say how many tokens fit where, for a model and a cluster")
    _add_cluster_flags(plan)
    plan.add_argument("--tokens", type=int, help="a prompt length to plan for")
    return parser


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="default", help="which cluster, when several are up")


def _add_target(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    parser.add_argument("--address", help="a gateway's address, instead of a cluster of this machine")
    parser.add_argument("--ca", help="PEM file with the authority of an https gateway")
    parser.add_argument("--api-key-file", type=Path, help="file that holds the API key for --address")


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    parser.add_argument("--config", type=Path, help="YAML or TOML file with settings")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any other setting")
    for name, (kind, about) in _CLUSTER_FLAGS.items():
        also = ["--address"] if name == "ray_address" else []
        parser.add_argument(f"--{name.replace('_', '-')}", *also, dest=name, type=kind, help=about)


# -- settings ----------------------------------------------------------------------------------------------------------

def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """What flags say, by setting; `--set` values are texts, which the settings know how to read."""
    given = {name: getattr(args, name) for name in _CLUSTER_FLAGS if getattr(args, name) is not None}
    given["name"] = args.name
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: write SECTION.KEY=VALUE")
        given[key.strip()] = value
    return given


def _settings(args: argparse.Namespace) -> Settings:
    return load(args.config, overrides=_overrides(args), override_source="flag")


def _folder() -> Path:
    return state_dir(load())


# -- up and down -------------------------------------------------------------------------------------------------------

def _up(args: argparse.Namespace) -> int:
    settings = _settings(args)                       # a mistake is told before anything happens
    folder = state_dir(settings)
    if args.detach:
        return _up_detached(args, folder)
    from kvbank.cluster.launcher import LocalCluster

    if args.tell is not None:                        # detached: its log is a file that somebody may read by program
        from kvbank.cluster.logs import set_up

        set_up("launcher", settings.flat(), [*settings.http.api_keys, settings.tiers.cache_secret or ""])
    tell = _Teller(args)
    mine = statefile.claim(folder, args.name, api_key=_own_key(settings), ca=settings.http.tls_cert or "",
                           config=[list(row) for row in settings.rows()])
    leave = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: _leave(leave))
    try:
        overrides = _overrides(args)
        cluster = LocalCluster(config=args.config, progress=tell.progress, **_flat(overrides))
        with tell.working(f"starting {args.name}"):
            cluster.start()
        try:
            mine = replace(mine, address=cluster.address)
            statefile.write(folder, mine)
            tell.ready(mine, cluster.processes)
            while not leave.wait(1.0):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            with tell.working("stopping"):
                cluster.stop()
    except KVBankError as error:
        tell.failed(error)
        raise
    finally:
        statefile.release(folder, mine)
    return 0


def _own_key(settings: Settings) -> str:
    """The key that `status` and `submit` on this machine use: one that may do everything, if there is one."""
    http = settings.http
    keys = read_keys(Path(http.api_keys_file)) if http.api_keys_file else http.api_keys
    return next(iter(sorted(keys, key=lambda key: not keys[key].endswith(":ops"))), "")


def _flat(overrides: dict[str, Any]) -> dict[str, Any]:
    """Keywords for LocalCluster: leaf names alone, because a keyword cannot hold a dot."""
    return {name.rpartition(".")[2]: value for name, value in overrides.items()}


def _leave(leave: threading.Event) -> None:
    """SIGTERM: once it serves, leave; while it still starts, break the start off."""
    if leave.is_set():
        return
    leave.set()
    raise KeyboardInterrupt


def _up_detached(args: argparse.Namespace, folder: Path) -> int:
    """Start ourselves again without a terminal, and wait for its word."""
    if (other := statefile.find(folder, args.name)) is not None:
        raise ConfigError(f"a cluster named {args.name!r} is already up at {other.address or '(starting)'}")
    log = folder / "clusters" / f"{args.name}.log"
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    heard, told = os.pipe()
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
               "from kvbank.cluster.cli import main; sys.exit(main())", *_again(args), "--tell", str(told)]
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[told],
                                 start_new_session=True)
    os.close(told)
    tell = _Teller(args)
    try:
        with tell.working(f"starting {args.name}"), os.fdopen(heard) as lines:
            for line in lines:
                word = json.loads(line)
                if "progress" in word:
                    tell.progress(word["progress"])
                elif "error" in word:
                    child.wait()
                    raise _from_word(word["error"])
                else:
                    found = replace(statefile.need(folder, args.name), log=str(log))
                    statefile.write(folder, found)
                    tell.ready(found, word["processes"])
                    return 0
    except KeyboardInterrupt:
        child.terminate()
        raise
    raise kvbank.errors.Unavailable(f"the cluster ended while it started; its log is {log}")


def _from_word(error: dict[str, str]) -> KVBankError:
    return kvbank.errors.from_code(error["code"], error["message"])


def _again(args: argparse.Namespace) -> list[str]:
    """The flags of this call, for the process that takes over."""
    words = ["up", "--name", args.name]
    if args.config is not None:
        words += ["--config", str(args.config.resolve())]
    for name in _CLUSTER_FLAGS:
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for pair in args.set:
        words += ["--set", pair]
    return words


class _Teller:
    """Progress and outcome of a start, to a person, as JSON, or down the pipe of a detached one."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._json: bool = args.json
        self._pipe = os.fdopen(args.tell, "w") if getattr(args, "tell", None) is not None else None
        self._console = console(to_stderr=True)
        self._status: Any = None

    def working(self, what: str) -> Any:
        self._status = self._console.status(what)
        return self._status

    def progress(self, line: str) -> None:
        if self._pipe is not None:
            self._say({"progress": line})
        elif self._status is not None:
            self._status.update(line)

    def ready(self, running: statefile.Running, processes: dict[str, int]) -> None:
        told = {"name": running.name, "address": running.address, "pid": running.pid, "processes": processes}
        if self._pipe is not None:
            self._say(told)
            self._pipe.close()
            self._pipe = None
        elif self._json:
            _print_json(told)
        else:
            self._console.print(f"cluster {running.name} serves at [bold]{running.address}[/]")
            self._console.print(f"  dashboard: {running.address}/dashboard")
            self._console.print(f"  {len(processes)} processes: {', '.join(sorted(processes))}")
            self._console.print(f"  kvbank status --name {running.name}   kvbank down --name {running.name}")

    def failed(self, error: KVBankError) -> None:
        if self._pipe is not None:
            self._say({"error": {"code": error.code, "message": str(error)}})

    def _say(self, word: dict[str, Any]) -> None:
        assert self._pipe is not None
        with contextlib.suppress(OSError):           # nobody listens any more: go on, the state file tells the rest
            print(json.dumps(word), file=self._pipe, flush=True)


def _down(args: argparse.Namespace) -> int:
    folder = _folder()
    running = statefile.find(folder, args.name)
    clean = None
    if running is not None:
        with console(to_stderr=True).status(f"stopping {args.name}"):
            clean = statefile.stop(folder, running)
    told = {"name": args.name, "stopped": running is not None, "killed": clean is False}
    if args.json:
        _print_json(told)
    else:
        words = "no such cluster was up" if running is None else "stopped" if clean else "killed: it did not stop"
        print(f"{args.name}: {words}")
    return 0


# -- status and submit -------------------------------------------------------------------------------------------------

def _client(args: argparse.Namespace, *, timeout_s: float = 600.0) -> Client:
    if args.address:
        key = args.api_key_file.read_text().strip() if args.api_key_file else None
        return Client(args.address, api_key=key, ca=args.ca, timeout_s=timeout_s)
    running = statefile.need(_folder(), args.name)
    if not running.address:
        raise NotFound(f"the cluster {args.name!r} is still starting")
    return Client(running.address, api_key=running.api_key or None, ca=args.ca or running.ca or None, timeout_s=timeout_s)


def _status(args: argparse.Namespace) -> int:
    if args.show_config:
        return _status_config(args)
    with _client(args) as client:
        status = client.status()
    if args.json:
        _print_json(asdict(status))
    else:
        console().print(status_view(status))
    return 0


def _top(args: argparse.Namespace) -> int:
    from kvbank.cluster.top import GONE_S, run

    if not 0.1 <= args.interval_s <= 3600:
        raise InvalidRequest(f"--interval-s {args.interval_s:g} is not between 0.1 and 3600")
    with _client(args, timeout_s=GONE_S) as client:
        return run(client, once=args.once, as_json=args.json, interval_s=args.interval_s)


def _status_config(args: argparse.Namespace) -> int:
    """The settings of the running cluster of this name; when none is up, those that a new one would have."""
    running = statefile.find(_folder(), args.name) if not args.address else None
    rows = running.config if running is not None else [list(row) for row in load().rows()]
    if args.json:
        _print_json({key: {"value": value, "source": source} for key, value, source in rows})
    else:
        whose = f"cluster {args.name}" if running is not None else "defaults and environment (no such cluster is up)"
        console().print(table(whose, ("setting", "value", "source"), rows, right=3))
    return 0


def _submit(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "job_id", "deadline_s", "stop")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with _client(args) as client:
        job = client.submit(prompt, **options)
        if args.detach:
            _print_json({"id": job.id}) if args.json else print(job.id)
            return 0
        try:
            if not args.json:
                _wait_for_output(job)
                for delta in job.stream():
                    print(delta.text, end="", flush=True)
                print()
            result = job.result()
        except KeyboardInterrupt:
            job.cancel()
            raise
    if args.json:
        _print_json({"id": job.id, **asdict(result)})
    else:
        console(to_stderr=True).print(receipt_view(result.receipt))
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if (args.prompt is None) == (args.file is None):
        raise InvalidRequest("give a prompt or --file, one of them; - reads standard input")
    try:
        if args.file is not None:
            return str(args.file.read_text(encoding="utf-8"))
        return sys.stdin.read() if args.prompt == "-" else str(args.prompt)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the prompt cannot be read: {error}") from None


def _wait_for_output(job: Job) -> None:
    """Show how far the prompt is until the first token comes."""
    with console(to_stderr=True).status("submitted") as shown:
        while True:
            status = job.status()
            if status.output_tokens or status.state not in ("queued", "running"):
                return
            waits = f", waits for {status.waits_for}" if status.waits_for else ""
            shown.update(f"{status.phase or status.state} {status.computed}/{status.prompt_tokens} tokens{waits}")
            time.sleep(POLL_S)


# -- the others --------------------------------------------------------------------------------------------------------

def _demo(args: argparse.Namespace) -> int:
    from kvbank.cluster.demo import run_demo

    return run_demo(model=args.model, document=args.document, launcher=args.launcher, tokens=args.tokens,
                    as_json=args.json)


def _bench(args: argparse.Namespace) -> int:
    folder = ROOT / "bench"
    path = folder / f"{args.name}.py"
    if not path.is_file():                           # a bench of several files is a folder
        path = folder / args.name / "__main__.py"
    if not args.name.isidentifier() or not path.is_file():
        names = sorted([*(p.stem for p in folder.glob("*.py") if "def main(" in p.read_text()),
                        *(p.parent.name for p in folder.glob("*/__main__.py"))])
        raise NotFound(f"there is no benchmark {args.name!r}; there are: {', '.join(names) or 'none in this install'}")
    spec = importlib.util.spec_from_file_location(f"kvbank_bench_{args.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(ROOT))                    # benches share bench/report.py
    spec.loader.exec_module(module)
    status: int | None = module.main([*args.rest, *(["--json"] if args.json else [])])
    return status or 0


def _doctor(args: argparse.Namespace) -> int:
    from kvbank.cluster.doctor import examine

    settings, findings = _settings(args), []
    with console(to_stderr=True).status("examining") as shown:
        for finding in examine(settings, state_dir(settings), config=args.config):
            shown.update(finding.what)
            findings.append(finding)
    well = all(finding.state != "bad" for finding in findings)
    if args.json:
        _print_json({"ok": well, "findings": [asdict(finding) for finding in findings]})
    else:
        marks = {"good": "[green]good[/]", "warn": "[yellow]warn[/]", "bad": "[red]bad[/]"}
        rows = [(marks[f.state], f.what, f.detail + (f"\n-> {f.remedy}" if f.remedy else "")) for f in findings]
        console().print(table("kvbank doctor", ("", "what", "found"), rows, right=3))
    return 0 if well else 1


def _certs(args: argparse.Namespace) -> int:
    from kvbank.cluster.certs import make_certificates

    if not 1 <= args.days <= 825:
        raise InvalidRequest(f"--days must be 1 to 825, not {args.days}")
    written = make_certificates(args.folder, days=args.days, **({"names": args.names} if args.names else {}))
    if args.json:
        _print_json({"written": [str(path) for path in written]})
    else:
        print(f"{len(written)} files in {args.folder}. Set cluster.tls_dir to it; http.tls_cert and http.tls_key to its "
              "https.pem and https.key. Every machine needs ca.pem and what its members are, none needs ca.key.")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from kvbank.cluster.plan import plan_view, planned

    plan = planned(_settings(args), tokens=args.tokens)
    if args.json:
        _print_json(asdict(plan))
    else:
        console().print(plan_view(plan))
    return 0


def _print_json(body: Any) -> None:
    print(json.dumps(body, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Verbs: what the command does with a cluster that is up, and without one. `up` and `down` are in up.py.

Heavy imports wait until a verb needs them, so that `status` and `submit` load neither torch nor Ray.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from dataclasses import asdict
from pathlib import Path

import kvbank
from kvbank.cluster import statefile
from kvbank.cluster.client import Client, Job
from kvbank.cluster.config import load, state_dir
from kvbank.cluster.flags import DEFAULT, settings_of, state_folder
from kvbank.cluster.screen import console, print_json, receipt_view, status_view, table
from kvbank.errors import ConfigError, InvalidRequest, NotFound

ROOT = Path(kvbank.__file__).resolve().parent.parent
POLL_S = 0.2


def _client(args: argparse.Namespace, *, timeout_s: float = 600.0) -> Client:
    key = _key(args.api_key_file)
    if args.address:
        return Client(args.address, api_key=key, ca=args.ca, timeout_s=timeout_s)
    running = statefile.need(state_folder(), args.name)
    if not running.address:
        raise NotFound(f"the cluster {args.name!r} is still starting")
    return Client(running.address, api_key=key or running.api_key or None, ca=args.ca or running.ca or None,
                  timeout_s=timeout_s)


def _key(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from None


def status(args: argparse.Namespace) -> int:
    if args.show_config:
        return _status_config(args)
    with _client(args) as client:
        status = client.status()
    if args.json:
        print_json(asdict(status))
    else:
        console().print(status_view(status))
    return 0


def top(args: argparse.Namespace) -> int:
    from kvbank.cluster.top import GONE_S, run

    if not 0.1 <= args.interval_s <= 3600:
        raise InvalidRequest(f"--interval-s {args.interval_s:g} is not between 0.1 and 3600")
    with _client(args, timeout_s=GONE_S) as client:
        return run(client, once=args.once, as_json=args.json, interval_s=args.interval_s)


def _status_config(args: argparse.Namespace) -> int:
    """The settings of the running cluster of this name; when none is up, those that a new one would have."""
    if args.address:
        raise InvalidRequest("--config tells the settings of a cluster of this machine: give its --name instead of --address")
    running = statefile.find(state_folder(), args.name)
    if running is None and args.name != DEFAULT:
        raise NotFound(f"no cluster named {args.name!r} is up on this machine")
    rows = running.config if running is not None else [list(row) for row in load().rows()]
    if args.json:
        print_json({key: {"value": value, "source": source} for key, value, source in rows})
    else:
        whose = f"cluster {args.name}" if running is not None else "defaults and environment (no such cluster is up)"
        console().print(table(whose, ("setting", "value", "source"), rows, right=3, whole=True))
    return 0


def submit(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "job_id", "deadline_s", "stop")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with _client(args) as client:
        job = client.submit(prompt, **options)
        if args.detach:
            print_json({"id": job.id}) if args.json else print(job.id)
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
        print_json({"id": job.id, **asdict(result)})
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


def demo(args: argparse.Namespace) -> int:
    from kvbank.cluster.demo import run_demo

    return run_demo(model=args.model, document=args.document, launcher=args.launcher, tokens=args.tokens,
                    as_json=args.json)


def bench(args: argparse.Namespace) -> int:
    folder = ROOT / "bench"
    names = sorted([*(p.stem for p in folder.glob("*.py") if "def main(" in p.read_text()),
                    *(p.parent.name for p in folder.glob("*/__main__.py"))])
    if args.help and not args.name:
        print("usage: kvbank bench NAME [--quick] [--json] [its own options: kvbank bench NAME --help]\n\n"
              f"NAME: {', '.join(names)}")
        return 0
    if args.name not in names:
        said = f"there is no benchmark {args.name!r}" if args.name else "a benchmark has a name"
        raise NotFound(f"{said}; there are: {', '.join(names) or 'none in this install'}")
    path = folder / f"{args.name}.py"
    if not path.is_file():                           # a bench of several files is a folder
        path = folder / args.name / "__main__.py"
    spec = importlib.util.spec_from_file_location(f"kvbank_bench_{args.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(ROOT))                    # benches share bench/report.py
    spec.loader.exec_module(module)
    status: int | None = module.main([*args.rest, *(["--json"] if args.json else []), *(["--help"] if args.help else [])])
    return status or 0


def doctor(args: argparse.Namespace) -> int:
    from kvbank.cluster.doctor import examine

    settings, findings = settings_of(args), []
    with console(to_stderr=True).status("examining") as shown:
        for finding in examine(settings, state_dir(settings), config=args.config):
            shown.update(finding.what)
            findings.append(finding)
    well = all(finding.state != "bad" for finding in findings)
    if args.json:
        print_json({"ok": well, "findings": [asdict(finding) for finding in findings]})
    else:
        marks = {"good": "[green]good[/]", "warn": "[yellow]warn[/]", "bad": "[red]bad[/]"}
        rows = [(marks[f.state], f.what, f.detail + (f"\n-> {f.remedy}" if f.remedy else "")) for f in findings]
        console().print(table("kvbank doctor", ("", "what", "found"), rows, right=3, whole=True))
    return 0 if well else 1


def certs(args: argparse.Namespace) -> int:
    from kvbank.cluster.certs import make_certificates

    if not 1 <= args.days <= 825:
        raise InvalidRequest(f"--days must be 1 to 825, not {args.days}")
    written = make_certificates(args.folder, days=args.days, names=args.names or ())
    if args.json:
        print_json({"written": [str(path) for path in written]})
    else:
        print(f"{len(written)} files in {args.folder}. Set cluster.tls_dir to it; http.tls_cert and http.tls_key to its "
              "https.pem and https.key. Every machine needs ca.pem and what its members are, none needs ca.key.")
    return 0


def plan(args: argparse.Namespace) -> int:
    from kvbank.cluster.plan import plan_view, planned

    if args.tokens is not None and args.tokens < 1:
        raise InvalidRequest(f"--tokens {args.tokens}: a job has at least one")
    plan = planned(settings_of(args), tokens=args.tokens)
    if args.json:
        print_json(asdict(plan))
    else:
        console().print(plan_view(plan))
    return 0

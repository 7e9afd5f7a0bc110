"""The command `kvbank`: up, down, status, top, submit, demo, bench, certs, doctor, plan. Each takes --json: one object on
stdout.

Exit status: 0 done, 1 a typed error (told on stderr, or as {"error": ...} with --json), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import kvbank
from kvbank.cluster import up, verbs
from kvbank.cluster.flags import add_cluster_flags, add_name, add_target
from kvbank.cluster.screen import print_json
from kvbank.errors import KVBankError


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
            print_json({"error": {"code": error.code, "message": str(error)}})
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
    known = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], about: str, *, helps: bool = True) -> argparse.ArgumentParser:
        made = known.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", add_help=helps)
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        return made

    start = verb("up", up.up, "start a cluster on this machine")
    add_cluster_flags(start)
    start.add_argument("-d", "--detach", action="store_true", help="return once it serves; `kvbank down` ends it")
    start.add_argument("--tell", type=int, help=argparse.SUPPRESS)      # descriptor on which a detached one reports

    down = verb("down", up.down, "stop a cluster")
    add_name(down)

    status = verb("status", verbs.status, "show workers, loans, jobs and tiers")
    add_target(status)
    status.add_argument("--config", dest="show_config", action="store_true",
                        help="the effective settings and where each came from")

    top = verb("top", verbs.top, "watch members, tiers, loans, jobs and rates")
    add_target(top)
    top.add_argument("--once", action="store_true", help="look once, and end")
    top.add_argument("--interval-s", type=float, default=1.0, help="seconds between two looks")

    submit = verb("submit", verbs.submit, "run one prompt and stream its answer")
    add_target(submit)
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

    demo = verb("demo", verbs.demo, "show borrowing, spilling and reuse on this machine, and prove the tokens equal")
    demo.add_argument("--model", help="model folder; default: the needle model of a checkout")
    demo.add_argument("--document", type=Path, help="a long text; default: this project's own documentation")
    demo.add_argument("--launcher", choices=("ray", "process"), default="ray")
    demo.add_argument("--tokens", type=int, default=0, help="cut the document to this many tokens")

    bench = verb("bench", verbs.bench, "run a benchmark of bench/", helps=False)
    bench.add_argument("-h", "--help", action="store_true", help="of a benchmark, if one is named")
    bench.add_argument("name", metavar="NAME", nargs="?", default="", help="one of those named without it")

    certs = verb("certs", verbs.certs, "make or renew the certificates of a cluster in a folder")
    certs.add_argument("folder", type=Path, help="where they are or will be; ca.key in it signs, keep that one to yourself")
    certs.add_argument("--name", dest="names", action="append", help="a name or address of the gateway; may be repeated")
    certs.add_argument("--days", type=int, default=90, help="how long they are valid")

    doctor = verb("doctor", verbs.doctor, "check this machine, and what a cluster with these settings would need of it")
    add_cluster_flags(doctor)

    plan = verb("plan", verbs.plan, "say how many tokens fit where, for a model and a cluster")
    add_cluster_flags(plan)
    plan.add_argument("--tokens", type=int, help="a prompt length to plan for")
    return parser


if __name__ == "__main__":
    sys.exit(main())

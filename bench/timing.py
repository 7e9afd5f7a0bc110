"""What the time to the first token gives away: does it tell whether somebody has sent this prompt before?

    kvbank bench timing [--json] [--quick] [--probes N]

A victim sends prompts. A prober sends, in random order, prompts that the victim has sent and prompts that nobody has, each
once, and ranks them by their time to the first token. The area under that ranking's curve (AUC, of Mann and Whitney) is
0.5 when time says nothing and 1.0 when it says all. Once the prober has a key of the victim's tenant, which shows that the
probe works, and once a key of another tenant, which is the question. Victim and prober take turns, the two probers too, so
that a drifting machine hits all alike; every probed prompt is new to that prober's tenant.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from bench.clocked import clock, texts
from bench.report import Report
from kvbank import Client, LocalCluster
from kvbank.workers.models.random_model import write_random_model

PROMPT_TOKENS = 512
VOCAB = 4096
KEYS = {"victim": "alice", "insider": "alice", "stranger": "bob"}


def main(argv: list[str] | None = None) -> int:
    report = Report("timing", argv, ("--probes", {"type": int, "default": 2000, "help": "of each prober, half of each kind"}))
    probes = min(report.args.probes, 200) if report.args.quick else report.args.probes
    times: dict[str, dict[bool, list[float]]] = {name: {True: [], False: []} for name in ("insider", "stranger")}
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_model(Path(folder) / "model", vocab=VOCAB, hidden_size=128, num_layers=4, heads=4, kv_heads=2)
        with LocalCluster(model=str(model), workers=1, lenders=0, launcher="process", redis=None, host_bytes=0,
                          device_blocks=4096, api_keys=KEYS) as cluster:
            clients = {name: Client(cluster.address, api_key=name) for name in KEYS}
            new, rng = texts(VOCAB), random.Random(0)
            for client in clients.values():
                for _ in range(5):
                    clock(client, new(PROMPT_TOKENS), 2)
            for number in range(probes):
                order = [(name, known) for name in times for known in ((True, False) if number % 2 == 0 else ())]
                rng.shuffle(order)
                for name, known in order:
                    prompt = new(PROMPT_TOKENS)
                    if known:
                        clock(clients["victim"], prompt, 2)
                    else:
                        clock(clients["victim"], new(PROMPT_TOKENS), 2)      # the same load before either kind of probe
                    times[name][known].append(clock(clients[name], prompt, 2).ttft_s)
            for client in clients.values():
                client.close()
    figures = {"auc_within_tenant": round(auc(times["insider"]), 4), "auc_across_tenants": round(auc(times["stranger"]), 4),
               "probes": sum(len(some) for some in times["stranger"].values())}
    report.goal("auc_within_tenant", ">=", 0.95)
    report.goal("auc_across_tenants", "<=", 0.55)
    return report.finish(figures)


def auc(times: dict[bool, list[float]]) -> float:
    """How often a known prompt came sooner than an unknown one; ties count half."""
    ranked = sorted((value, known) for known, values in times.items() for value in values)
    wins, unknown_behind = 0.0, len(times[False])
    at = 0
    while at < len(ranked):
        tied = [known for value, known in ranked[at:] if value == ranked[at][0]] if (
            at + 1 < len(ranked) and ranked[at + 1][0] == ranked[at][0]) else [ranked[at][1]]
        unknown_behind -= tied.count(False)
        wins += tied.count(True) * (unknown_behind + tied.count(False) / 2)
        at += len(tied)
    return wins / (len(times[True]) * len(times[False]))

"""`kvbank demo`: a document too long for one worker, asked for facts hidden in it, and the proof that borrowing changed
nothing.

    1. one big worker, nothing shared, answers the questions: the reference
    2. a small cluster with lenders, a host tier and Redis answers the same; meanwhile its books are watched
    3. tables: what was borrowed, parked, spilled and reused; receipts; whether every answer is right and every token equal

The cluster runs with exactness="bitwise", so "equal" means every token and not most of them.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

import kvbank
from kvbank.cluster.answers import Result, Status
from kvbank.cluster.client import Client, Job
from kvbank.cluster.planted import PLANTED, plant
from kvbank.cluster.screen import console, receipt_view, size, table
from kvbank.errors import InvalidRequest, KVBankError

ROOT = Path(kvbank.__file__).resolve().parent.parent
NEEDLE = ROOT / "bench" / "needle" / "model"       # in a checkout; an installed kvbank has no trained model
DOCUMENT_TOKENS = 4000               # of the document are used unless told otherwise: what the needle model is made for
ANSWER_TOKENS = 24
SPAN, BLOCK = 128, 16
WORKERS, LENDERS = 2, 2
WATCH_S = 0.1


@dataclass(slots=True)
class Peaks:
    """The highest values seen while the cluster was watched."""

    lent: dict[str, int] = field(default_factory=dict)           # blocks by member
    borrowed: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    tier_bytes: dict[str, int] = field(default_factory=dict)
    loans: dict[str, dict[str, Any]] = field(default_factory=dict)
    looks: int = 0

    def note(self, status: Status) -> None:
        self.looks += 1
        for worker in status.workers:
            for kept, now in ((self.lent, worker.blocks_lent), (self.borrowed, worker.blocks_borrowed),
                              (self.used, worker.blocks_used)):
                kept[worker.id] = max(kept.get(worker.id, 0), now)
        for tier in status.tiers:
            self.tier_bytes[tier.name] = max(self.tier_bytes.get(tier.name, 0), tier.bytes_used)
        for loan in status.loans:
            if loan.blocks >= self.loans.get(loan.id, {}).get("blocks", 0):
                self.loans[loan.id] = {"lender": loan.lender, "borrower": loan.borrower, "blocks": loan.blocks}


def run_demo(*, model: str | None, document: Path | None, launcher: str, tokens: int, as_json: bool) -> int:
    """Run it and print its outcome. The exit status is 0 only if all tokens were equal."""
    began = time.monotonic()
    told = console(to_stderr=True)
    with tempfile.TemporaryDirectory(prefix="kvbank-demo-") as folder:
        model = model or _own_model(Path(folder), told)
        prompts, source = _prompts(model, document, tokens)
        reference = _reference(model, prompts, told)
        outcome = _cluster(model, prompts, launcher, told)
    answers: list[Result] = outcome.pop("answers")
    planted: list[dict[str, Any]] = [
        {"question": each.question, "wanted": each.wanted, "answer": answer.text.strip(), "right": each.is_in(answer.text)}
        for each, answer in zip(PLANTED, answers, strict=True)
    ]
    equal = [ours.token_ids == theirs.token_ids for ours, theirs in zip(answers, reference, strict=True)]
    outcome |= {
        "model": "needle" if model == str(NEEDLE) else Path(model).name, "document": source, "launcher": launcher,
        "planted": planted, "right": sum(each["right"] for each in planted),
        "questions": [asdict(answer) for answer in answers], "reference": [asdict(answer) for answer in reference],
        "equal": all(equal), "tokens_compared": sum(len(answer.token_ids) for answer in answers),
        "seconds": round(time.monotonic() - began, 1),
    }
    if as_json:
        print(json.dumps(outcome, ensure_ascii=False))
    else:
        _show(outcome, answers, reference)
    return 0 if all(equal) else 1


# -- what is asked -----------------------------------------------------------------------------------------------------

def _own_model(folder: Path, told: Console) -> str:
    """The needle model of the checkout; where there is none, one with random weights, which answers nonsense."""
    from kvbank.workers.models.random_model import write_random_model

    if (NEEDLE / "model.safetensors").is_file():
        return str(NEEDLE)
    told.print("no trained model here (a checkout has one in bench/needle/model): random weights answer, and never rightly")
    return str(write_random_model(folder / "random-llama", hidden_size=128, num_layers=4, heads=4, kv_heads=2))


def _prompts(model: str, document: Path | None, limit: int) -> tuple[list[list[int]], dict[str, Any]]:
    """The document with its planted facts, and each question behind it, as tokens of this model."""
    from kvbank.workers.models.config_reader import read_config
    from kvbank.workers.models.tokenizer import load_tokenizer

    text, name = _document(document)
    tokenizer = load_tokenizer(model)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    endings = [list(tokenizer.encode(each.prompt, add_special_tokens=False).ids) for each in PLANTED]
    facts = 2 * len(tokenizer.encode(plant("")).ids)         # twice: a tokenizer may split what stands beside them anew
    room = read_config(model).max_position - ANSWER_TOKENS - max(map(len, endings)) - facts
    used = min(room, limit or DOCUMENT_TOKENS, len(encoding.ids))
    if used < 12 * SPAN:
        raise InvalidRequest(
            f"the document has {len(encoding.ids)} tokens and {used} may be used; the demo needs at least {12 * SPAN}"
        )
    document_ids = list(tokenizer.encode(plant(text[:encoding.offsets[used - 1][1]])).ids)
    return [document_ids + ending for ending in endings], {
        "source": name, "tokens": len(encoding.ids), "used": len(document_ids)}


def _document(path: Path | None) -> tuple[str, str]:
    """The text, and what to call it. Ours: the project's own pages, or its sources where pages were not installed."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8", errors="replace"), path.name
        except OSError as error:
            raise InvalidRequest(f"the document {path} cannot be read: {error.strerror}") from None
    pages = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.is_file()]
    if pages:
        return "\n\n".join(page.read_text(encoding="utf-8") for page in pages), "this project's documentation"
    sources = sorted(Path(kvbank.__file__).parent.glob("*/*.py"))
    return "\n\n".join(page.read_text(encoding="utf-8") for page in sources), "this project's sources"


# -- who answers -------------------------------------------------------------------------------------------------------

def _reference(model: str, prompts: list[list[int]], told: Console) -> list[Result]:
    """The answers of one worker that is big enough for everything and shares nothing."""
    from kvbank.cluster.launcher import LocalCluster

    spans = math.ceil((max(map(len, prompts)) + ANSWER_TOKENS) / SPAN) + 4
    with (
        told.status("one big worker: starting") as shown,
        LocalCluster(model, workers=1, lenders=0, device_blocks=spans * SPAN // BLOCK, block_size=BLOCK,
                     span_tokens=SPAN, host_bytes=0, redis=None, launcher="process", exactness="bitwise",
                     progress=lambda line: shown.update(f"one big worker: {line}")) as cluster,
        Client(cluster.address) as client,
    ):
        return [_ask(client, prompt, lambda line: shown.update(f"one big worker, {line}"), number)
                for number, prompt in enumerate(prompts, 1)]


def _cluster(model: str, prompts: list[list[int]], launcher: str, told: Console) -> dict[str, Any]:
    """The answers of the small cluster, and what its books said meanwhile."""
    from kvbank.cluster.launcher import LocalCluster

    spans = math.ceil((max(map(len, prompts)) + ANSWER_TOKENS) / SPAN)
    own = max(3, math.ceil(spans / 4))               # a quarter fits a worker; with all it may borrow it is not enough
    host_bytes = _span_bytes(model) * max(4, spans // 3)
    with (
        told.status("the bank: starting") as shown,
        LocalCluster(model, workers=WORKERS, lenders=LENDERS, device_blocks=own * SPAN // BLOCK, block_size=BLOCK,
                     span_tokens=SPAN, host_bytes=host_bytes, redis="embedded", launcher=launcher,
                     exactness="bitwise", progress=lambda line: shown.update(f"the bank: {line}")) as cluster,
        Client(cluster.address) as client,
        _watched(cluster.address) as peaks,
    ):
        answers = [_ask(client, prompt, lambda line: shown.update(f"the bank, {line}"), number)
                   for number, prompt in enumerate(prompts, 1)]
        after = client.status()
    return {
        "answers": answers, "peaks": asdict(peaks), "workers": [asdict(worker) for worker in after.workers],
        "tiers": [asdict(tier) for tier in after.tiers], "spans": spans, "device_spans": own,
        "borrowed_blocks_peak": max(answer.receipt.borrowed_blocks_peak for answer in answers),
    }


def _span_bytes(model: str) -> int:
    from kvbank.cluster.config import load
    from kvbank.cluster.plan import planned

    return planned(load({"model": model, "span_tokens": SPAN, "block_size": BLOCK}, environ={})).span_bytes


def _ask(client: Client, prompt: list[int], tell: Callable[[str], None], number: int) -> Result:
    job = client.submit(prompt, max_tokens=ANSWER_TOKENS, temperature=0.0)
    _follow(job, lambda words: tell(f"question {number}: {words}"))
    return job.result(timeout_s=300)


def _follow(job: Job, tell: Callable[[str], None]) -> None:
    while (status := job.status()).state in ("queued", "running"):
        waits = f", waits for {status.waits_for}" if status.waits_for else ""
        tell(f"{status.phase or status.state} {status.computed}/{status.prompt_tokens} tokens, "
             f"{status.output_tokens} answered{waits}")
        time.sleep(WATCH_S)


@contextmanager
def _watched(address: str) -> Iterator[Peaks]:
    """Look at the cluster's status again and again on a thread of its own."""
    peaks, leave = Peaks(), threading.Event()

    def look() -> None:
        with Client(address, timeout_s=5.0) as client:
            while not leave.wait(WATCH_S):
                try:
                    peaks.note(client.status())
                except KVBankError:                  # a look that fails is a look less
                    continue

    thread = threading.Thread(target=look, name="demo-watch", daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        leave.set()
        thread.join()


# -- what is shown -----------------------------------------------------------------------------------------------------

def _show(outcome: dict[str, Any], answers: list[Result], reference: list[Result]) -> None:
    out = console()
    peaks: dict[str, Any] = outcome["peaks"]
    document = outcome["document"]
    out.print(f"\n{document['used']} tokens of {escape(document['source'])} are {outcome['spans']} spans; "
              f"a worker holds {outcome['device_spans']}.\n")
    rows = [
        (worker["id"], worker["kind"], worker["blocks_total"], peaks["used"].get(worker["id"], 0),
         peaks["borrowed"].get(worker["id"], 0), peaks["lent"].get(worker["id"], 0),
         int(worker["counters"].get("remote_attention_served", 0)))
        for worker in outcome["workers"]
    ]
    out.print(table("who held what, in blocks of 16 tokens (peaks)",
                    ("member", "kind", "blocks", "used", "borrowed", "lent", "attended for others"), rows, right=2))
    tiers = [
        (tier["name"], tier["state"], size(peaks["tier_bytes"].get(tier["name"], 0)), size(tier["bytes_limit"]),
         tier["frames"], *(int(tier["counters"].get(name, 0)) for name in ("puts", "hits", "evicted")))
        for tier in outcome["tiers"]
    ]
    out.print()
    out.print(table("tiers", ("tier", "state", "bytes at most", "limit", "frames", "put", "hits", "evicted"), tiers,
                    right=2))
    for number in (1, len(answers)):
        out.print()
        out.print(receipt_view(answers[number - 1].receipt, f"question {number}"))
    out.print()
    asked = [(each["question"], Text(each["answer"]), each["wanted"], "[green]right[/]" if each["right"] else "[red]wrong[/]")
             for each in outcome["planted"]]
    out.print(table("facts planted in the document", ("question", "answer", "planted", ""), asked, right=4))
    first, last = answers[0].receipt, answers[-1].receipt
    out.print()
    out.print(f"The last question computed {last.computed_tokens} tokens where the first computed "
              f"{first.computed_tokens}; its first token came after {last.ttft_s:.2f} s instead of "
              f"{first.ttft_s:.2f} s.")
    if outcome["equal"]:
        out.print(f"[green]All {outcome['tokens_compared']} tokens equal those of one big worker.[/] "
                  f"({outcome['seconds']} s in all)")
        return
    for number, (ours, theirs) in enumerate(zip(answers, reference, strict=True), 1):
        if ours.token_ids != theirs.token_ids:
            pairs = enumerate(zip(ours.token_ids, theirs.token_ids, strict=False))
            at = next((n for n, (a, b) in pairs if a != b), min(len(ours.token_ids), len(theirs.token_ids)))
            out.print(f"[red]Question {number} differs from the big worker's answer from token {at} on.[/]")

"""Fakes at the gateway's three seams: workers (a real gRPC server that streams a known function), the roster, and text.

The fake model's next token is a function of the prompt and the index alone, so whatever happens to workers in between,
the right output is known beforehand.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from kvbank.cluster.gateway import Gateway, GatewayLimits
from kvbank.cluster.http.app import Front, HttpLimits
from kvbank.cluster.http.server import Assembly, GatewayServer
from kvbank.cluster.intake import Intake, ModelFacts
from kvbank.cluster.links import Links
from kvbank.cluster.roster import Worker
from kvbank.kvstore.transport import rpc
from kvbank.proto import jobs_pb2 as pb

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TOKEN = "ab" * 16
VOCAB = 256
ARTEFACTS = Path(__file__).resolve().parents[2] / "artefacts"        # pictures, for who wants to look; not part of the project


def expected(prompt: list[int], count: int) -> list[int]:
    """What the fake model answers: printable bytes, never twice the same in a row."""
    return [97 + (sum(prompt) + 7 * at) % 26 for at in range(count)]


def likely(at: int, token: int, count: int, bias: float = 0.0) -> tuple[float, list[tuple[int, float]]]:
    """What the fake model says of its token at index `at`: its log-probability, and `count` likely tokens. An odd one is
    not among them."""
    drawn = -(at + 1) / 8 - bias
    first = token if at % 2 == 0 else 65
    return drawn, [(first + other, drawn if other == 0 and at % 2 == 0 else drawn - other) for other in range(count)]


class FakeWorker:
    """Serves Jobs. `step` is asked before each token and may wait, abort the process's place, or do nothing."""

    def __init__(self, name: str) -> None:
        self.id = name
        self.seen: list[pb.Job] = []
        self.streams = 0                                     # opened so far
        self.cancels: list[str] = []
        self.failure: tuple[str, str] | None = None          # answered instead of tokens
        self.refusal: tuple[str, str] | None = None          # answered before the job is taken up
        self.die_at: int | None = None                       # abort the stream before this token index,
        self.die_once = True                                 # once or always
        self.die_unheard = 0                                 # so many more jobs end its process before their first word
        self.hang_at: int | None = None                      # say nothing more from this token index on
        self.repeat = False                                  # send each token again, with the one before
        self.bias, self.mute = 0.0, False                    # added to its log-probabilities; none told though asked
        self.token_s = 0.0
        self.tiers = ["host"]
        self.messages: list[int] = []                        # how many requests each brought
        self.ended = threading.Event()                       # a stream was left by its gateway
        self._server = rpc.server(TOKEN, threads=16)
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("kvbank.Jobs", {
            "Submit": grpc.stream_stream_rpc_method_handler(
                self._submit, pb.SubmitRequests.FromString, pb.SubmitReplies.SerializeToString),
            "Status": grpc.unary_unary_rpc_method_handler(
                self._status, pb.StatusRequest.FromString, pb.WorkerStatus.SerializeToString),
        })])
        self.address = f"127.0.0.1:{rpc.bind(self._server, '127.0.0.1:0')}"
        self._server.start()

    def view(self) -> Worker:
        return Worker(id=self.id, boot=self.id.encode(), address=self.address)

    def kill(self) -> None:
        """What SIGKILL looks like from outside: every stream breaks at once, nothing more is accepted."""
        self._server.stop(None)

    def _status(self, _request: pb.StatusRequest, _context: grpc.ServicerContext) -> pb.WorkerStatus:
        return pb.WorkerStatus(
            id=self.id, kind="model", pid=1, blocks_total=48, blocks_free=40, blocks_used=8,
            tiers=[pb.TierStatus(name=name, bytes_used=10, bytes_limit=100, frames=1, state="ok", counters={"hits": 2})
                   for name in self.tiers],
            loans=[pb.LoanStatus(id="loan-1", lender=self.id, borrower="worker-9", blocks=8, term_s=6, age_s=1)],
            counters={"forward_rows": 5},
        )

    def _submit(self, messages: Iterator[pb.SubmitRequests], context: grpc.ServicerContext) -> Iterator[pb.SubmitReplies]:
        said: queue.SimpleQueue[pb.SubmitReply | None] = queue.SimpleQueue()         # None: this place dies
        lanes: dict[int, threading.Event] = {}               # of its jobs: the gateway wants no more

        def left() -> None:
            for cancelled in lanes.values():
                cancelled.set()
            self.ended.set()
            said.put(None)

        def listen() -> None:
            with contextlib.suppress(Exception):             # the stream ended
                for request in each_of(messages):
                    kind = request.WhichOneof("kind")
                    if kind == "job":
                        self.seen.append(request.job)
                        lanes[request.lane] = threading.Event()
                        threading.Thread(target=run, args=(request, lanes[request.lane]), daemon=True).start()
                        continue
                    if kind == "cancel":
                        self.cancels.append(request.cancel.reason)
                    else:
                        self.ended.set()
                    lanes[request.lane].set()

        def each_of(messages: Iterator[pb.SubmitRequests]) -> Iterator[pb.SubmitRequest]:
            for message in messages:
                self.messages.append(len(message.requests))
                yield from message.requests

        def run(request: pb.SubmitRequest, cancelled: threading.Event) -> None:
            try:
                for reply in self._answers(request.job, cancelled):
                    reply.lane = request.lane
                    said.put(reply)
            except Dies:
                said.put(None)

        self.streams += 1
        context.add_callback(left)
        yield pb.SubmitReplies()
        threading.Thread(target=listen, daemon=True).start()
        while (reply := said.get()) is not None:
            replies = [reply]
            while len(replies) < 200 and not said.empty() and (reply := said.get()) is not None:
                replies.append(reply)
            yield pb.SubmitReplies(replies=replies)
            if reply is None:
                break
        context.abort(grpc.StatusCode.UNAVAILABLE, "killed")

    def _answers(self, job: pb.Job, cancelled: threading.Event) -> Iterator[pb.SubmitReply]:
        if self.die_unheard:
            self.die_unheard -= 1
            raise Dies
        if self.refusal is not None:
            yield pb.SubmitReply(failed=pb.Failed(code=self.refusal[0], message=self.refusal[1]))
            return
        yield pb.SubmitReply(accepted=pb.Accepted(worker=self.id))
        if self.failure is not None:
            yield pb.SubmitReply(failed=pb.Failed(code=self.failure[0], message=self.failure[1]))
            return
        prompt = np.frombuffer(job.prompt, "<i4").tolist()
        wanted = expected(prompt, job.max_tokens)
        first = len(job.emitted) // 4
        assert np.frombuffer(job.emitted, "<i4").tolist() == wanted[:first]
        yield pb.SubmitReply(progress=pb.Progress(state="prefill", computed=len(prompt), total=len(prompt)))
        for at in range(first, job.max_tokens):
            if cancelled.wait(self.token_s) if self.token_s else cancelled.is_set():
                yield pb.SubmitReply(done=pb.Done(finish_reason="cancelled", receipt=self._receipt(job, at)))
                return
            if at == self.die_at:
                self.die_at = None if self.die_once else at
                raise Dies
            if at == self.hang_at:
                self.hang_at = None
                cancelled.wait(30)
                return
            yield pb.SubmitReply(tokens=self._tokens(job, wanted, at, at + 1))
            if self.repeat and at:
                yield pb.SubmitReply(tokens=self._tokens(job, wanted, at - 1, at + 1))
        yield pb.SubmitReply(done=pb.Done(finish_reason="length", receipt=self._receipt(job, job.max_tokens)))

    def _tokens(self, job: pb.Job, wanted: list[int], first: int, stop: int) -> pb.Tokens:
        message = pb.Tokens(first_index=first, ids=np.asarray(wanted[first:stop], "<i4").tobytes())
        if job.HasField("logprobs") and not self.mute:
            told = [likely(at, wanted[at], job.logprobs, self.bias) for at in range(first, stop)]
            message.logprobs = np.asarray([drawn for drawn, _ in told], "<f4").tobytes()
            message.top_ids = np.asarray([other for _, top in told for other, _ in top], "<i4").tobytes()
            message.top_logprobs = np.asarray([value for _, top in told for _, value in top], "<f4").tobytes()
        return message

    def _receipt(self, job: pb.Job, outputs: int) -> pb.Receipt:
        prompt = len(job.prompt) // 4
        return pb.Receipt(prompt_tokens=prompt, output_tokens=outputs, computed_tokens=prompt - prompt // 2,
                          reused={"device": prompt // 2}, missed={"never_seen": prompt - prompt // 2})


class Dies(Exception):
    """A fake worker's process ends here."""


class FakeRoster:
    """The members a test wants; thread-safe enough because lists are replaced, never changed."""

    def __init__(self) -> None:
        self.alive: list[Worker] = []
        self.held: dict[str, int] = {}
        self._listeners: list[Callable[[], None]] = []

    def workers(self) -> list[Worker]:
        return self.alive

    async def holders(self, keys: bytes) -> dict[str, int]:
        return dict(self.held)

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    async def stop(self) -> None:
        pass


def plain_chat(messages: Sequence[Mapping[str, str]], ask: bool) -> str:
    """The chat template of the fake model."""
    return "".join(f"{each['role']}:{each['content']}\n" for each in messages) + ("assistant:" if ask else "")


class BytePieces:
    """intake.Pieces of the fake model: one token, one byte."""

    def piece(self, token: int) -> bytes:
        return bytes([token])

    def shown(self, token: int, *, first: bool) -> bytes:
        return bytes([token])


class ByteText:
    """TextStream over bytes: one token, one character. Holds back what may begin a stop string."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop, self._held, self.text, self.stopped = stop, "", "", False

    def push(self, ids: list[int]) -> str:
        self._held += bytes(ids).decode("latin-1")
        for stop in self._stop:
            at = self._held.find(stop)
            if at >= 0:
                self.stopped, self._held = True, self._held[:at]
        keep = 0 if self.stopped else max(
            (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        out, self._held = self._held[:len(self._held) - keep], self._held[len(self._held) - keep:]
        self.text += out
        return out

    def finish(self) -> str:
        out, self._held = self._held, ""
        self.text += out
        return out


@pytest.fixture
def make_worker() -> Iterator[Callable[[str], FakeWorker]]:
    """Start fake workers; they end with the test."""
    made: list[FakeWorker] = []

    def make(name: str) -> FakeWorker:
        made.append(FakeWorker(name))
        return made[-1]

    yield make
    for worker in made:
        worker.kill()


@pytest.fixture
def make_server() -> Iterator[Callable[..., SimpleNamespace]]:
    """Start a gateway over real HTTP: `.address`, `.gateway`, `.roster` and `.stop()`."""
    servers: list[GatewayServer] = []

    def make(*workers: FakeWorker, port: int = 0, **options: object) -> SimpleNamespace:
        roster = FakeRoster()
        roster.alive = [worker.view() for worker in workers]
        limits = GatewayLimits(**{"silence_s": 2.0, "grace_s": 1.0, "no_worker_s": 2.0, "suspect_s": 0.2,
                                  **options.get("limits", {})})
        facts = ModelFacts(name=options.get("model", "fake"), vocab_size=VOCAB, max_position=options.get("max_position", 4096))
        capacity = options.get("capacity_tokens")

        async def assemble() -> Assembly:
            gateway = Gateway(
                roster=roster, links=Links(TOKEN), open_text=ByteText, limits=limits,
                block_keys=options.get("block_keys", lambda _tenant, _prompt: b""), eos_ids=(0,),
                choose=options.get("choose", lambda workers, held, tokens: min(
                    workers, key=lambda w: (-held.get(w.id, 0), w.jobs_running, w.id)).id),
            )
            front = Front(
                gateway=gateway, limits=HttpLimits(**{"quiet_s": 0.2, **options.get("http", {})}),
                intake=options.get("intake", Intake)(
                    facts, lambda text, _start: list(text.encode()), capacity_tokens=lambda: capacity,
                    decode=lambda ids: bytes(ids).decode("latin-1"), render=options.get("render", plain_chat),
                    max_job_tokens=options.get("max_job_tokens"), pieces=BytePieces()),
                api_keys=options.get("api_keys", {}), created=int(time.time()), status=options.get("status"),
                ops=options.get("ops"),
            )
            return Assembly(front, roster)

        server = GatewayServer(assemble, host=options.get("host", "127.0.0.1"), port=port, open_door=not options.get("api_keys"),
                               certificate=options.get("certificate"))
        servers.append(server)
        address = server.start()
        return SimpleNamespace(address=address, gateway=server.gateway, roster=roster, stop=server.stop)

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")              # while its driver lives, an event loop runs in this thread: no longer than that
def chromium() -> Iterator[Browser]:
    """A headless Chromium of this machine. Each test opens contexts of its own."""
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium here: install Debian's `chromium` to run the dashboard's tests")
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=[
            "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """open_page(address, scheme="light", width=1360): a page of the dashboard whose `.faults` are its console errors, and whose
    `.picture(name)` lays what it shows, all of it, into the folder artefacts/."""
    contexts = []

    def open_one(address: str, *, scheme: str = "light", width: int = 1360, height: int = 900, at: str = "#/") -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.faults = []
        page.picture = lambda name: page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)
        page.on("console", lambda said: page.faults.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(f"{address}/dashboard{at}")
        return page

    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture
def answer_of() -> Callable[[list[int], int], list[int]]:
    return expected


@pytest.fixture
def likely_of() -> Callable[..., tuple[float, list[tuple[int, float]]]]:
    return likely

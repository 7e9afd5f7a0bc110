"""Traces: spans of one job across processes, with OpenTelemetry, for who asked for them. Off: None, and nothing imported.

    traceparent of the caller -> gateway.job -> gateway.attempt -> worker.submit -> engine.queue, .prefill, .decode, .replay
                                                                                -> tier.fetch
                                                                                -> lender.put, .attend, .fetch   (elsewhere)

A traced job's name on a worker ends in its context (`j-1#1.1@<trace>-<span>-<flags>`), so that it arrives wherever that worker
works for the job; to lenders it goes with the Borrow. Work of many small pieces (a layer at a lender, a batch of frames) is
gathered with `note` and becomes one span once it rests.

Whoever may trace holds `Traces | None`: the cost of not tracing is that one question. Spans hold counts, seconds and our
own ids; never a prompt, a token or an id that a caller chose.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbank.errors import ConfigError

REST_S = 1.0                                   # gathered work that rests this long becomes a span
LOOK_S = 0.25
CLOSE_S = 1.0                                  # for what is left to be exported at the end
GATHERED = 4096                                # kinds of work of jobs that are gathered at once; the oldest is told early

_PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_NAME = re.compile(r"@([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$")


def context_of(job: str) -> str:
    """The traceparent in a job's name; empty when that job is not traced."""
    found = _NAME.search(job)
    return f"00-{found[1]}-{found[2]}-{found[3]}" if found else ""


def open_traces(member: str, settings: Mapping[str, Any]) -> Traces | None:
    """As the section `tracing` says; None: off. Raises ConfigError when OpenTelemetry is wanted and not installed."""
    if settings.get("exporter", "none") == "none":
        return None
    return Traces(member, settings)


class Trace:
    """A span that has begun. `parent` names it to those whose work belongs below it."""

    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self._ids = f"{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    @property
    def parent(self) -> str:
        """W3C traceparent."""
        return f"00-{self._ids}"

    @property
    def suffix(self) -> str:
        """What a job's name ends in; see `context_of`."""
        return f"@{self._ids}"

    def end(self, **attributes: Any) -> None:
        """Safe to repeat: the first end counts."""
        if self._span.is_recording():
            self._span.set_attributes(attributes)
            self._span.end()


class Traces:
    """One member's. Thread-safe."""

    def __init__(self, member: str, settings: Mapping[str, Any]) -> None:
        self._provider, self._tracer = _provider(member, settings)
        self._past = time.time() - time.monotonic()
        self._lock = threading.Lock()
        self._gathered: OrderedDict[tuple[str, str], _Work] = OrderedDict()
        self._closing = threading.Event()
        threading.Thread(target=self._run, name="traces", daemon=True).start()

    def begin(self, name: str, parent: str = "", **attributes: Any) -> Trace:
        """A span that begins now; `parent` is a traceparent, and one that is none begins a trace of its own."""
        return Trace(self._tracer.start_span(name, context=_context(parent), attributes=attributes))

    def record(self, name: str, parent: str, began: float, ended: float, **attributes: Any) -> None:
        """A span of the past, by monotonic times."""
        span = self._tracer.start_span(name, context=_context(parent), attributes=attributes, start_time=self._ns(began))
        span.end(end_time=self._ns(max(began, ended)))

    def note(self, name: str, parent: str, began: float, ended: float, **amounts: int) -> None:
        """One of many small pieces of work for the job of this traceparent; nothing when that is none."""
        if _PARENT.fullmatch(parent) is None:
            return
        early = None
        with self._lock:
            work = self._gathered.setdefault((parent, name), _Work(began))
            work.add(ended, ended - began, amounts)
            if len(self._gathered) > GATHERED:
                early = self._gathered.popitem(last=False)
        if early is not None:
            self._tell(*early)

    def close(self) -> None:
        """Tell what was gathered and export what is left, within CLOSE_S. Safe to repeat."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._tell_rested(before=float("inf"))
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)      # an exporter may wait for its server
        ending.start()
        ending.join(CLOSE_S)

    def _run(self) -> None:
        while not self._closing.wait(LOOK_S):
            self._tell_rested(before=time.monotonic() - REST_S)

    def _tell_rested(self, *, before: float) -> None:
        with self._lock:
            rested = [key for key, work in self._gathered.items() if work.ended <= before]
            told = [(key, self._gathered.pop(key)) for key in rested]
        for key, work in told:
            self._tell(key, work)

    def _tell(self, key: tuple[str, str], work: _Work) -> None:
        parent, name = key
        self.record(name, parent, work.began, work.ended, calls=work.calls, busy_s=round(work.busy_s, 6), **work.amounts)

    def _ns(self, monotonic: float) -> int:
        return int((monotonic + self._past) * 1e9)


class _Work:
    """Pieces of one kind for one job, added up."""

    def __init__(self, began: float) -> None:
        self.began, self.ended, self.busy_s, self.calls = began, began, 0.0, 0
        self.amounts: dict[str, int] = {}

    def add(self, ended: float, busy_s: float, amounts: Mapping[str, int]) -> None:
        self.ended, self.busy_s, self.calls = max(self.ended, ended), self.busy_s + busy_s, self.calls + 1
        for name, amount in amounts.items():
            self.amounts[name] = self.amounts.get(name, 0) + amount


# -- OpenTelemetry, imported only here ---------------------------------------------------------------------------------

def _provider(member: str, settings: Mapping[str, Any]) -> tuple[Any, Any]:

    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        exporter = _file_exporter(member, settings) if settings["exporter"] == "file" else _otlp_exporter(settings)
    except ImportError as error:
        raise ConfigError(f"tracing.exporter {settings['exporter']} needs OpenTelemetry ({error.name}): "
                          "install kvbank[trace], or set tracing.exporter to none") from None
    provider = TracerProvider(
        resource=Resource.create({"service.name": "kvbank", "service.instance.id": member}),
        sampler=ParentBased(TraceIdRatioBased(settings.get("sampled", 1.0))), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    return provider, provider.get_tracer("kvbank")


def _otlp_exporter(settings: Mapping[str, Any]) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    endpoint = str(settings["otlp_endpoint"])
    return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=5)


def _file_exporter(member: str, settings: Mapping[str, Any]) -> Any:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    folder = Path(settings["trace_dir"])
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"tracing.trace_dir {folder} cannot be made: {error}") from None
    path = folder / f"{member}.jsonl"

    class ToFile(SpanExporter):                  # type: ignore[misc,unused-ignore]     # Any where it is not installed
        """One span a line."""

        def export(self, spans: Any) -> Any:
            lines = [json.dumps({
                "name": span.name, "member": member, "trace_id": f"{span.context.trace_id:032x}",
                "span_id": f"{span.context.span_id:016x}",
                "parent_id": f"{span.parent.span_id:016x}" if span.parent is not None else "",
                "start_ns": span.start_time, "end_ns": span.end_time, "attributes": dict(span.attributes or {}),
            }) for span in spans]
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
                file.write("".join(f"{line}\n" for line in lines))
            return SpanExportResult.SUCCESS

    return ToFile()


def _context(parent: str) -> Any:
    """OpenTelemetry's context of a traceparent; an empty one, so that no span of this thread becomes the parent."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    found = _PARENT.fullmatch(parent)
    if found is None or not int(found[1], 16) or not int(found[2], 16):
        return Context()
    remote = SpanContext(int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=TraceFlags(int(found[3], 16)))
    return set_span_in_context(NonRecordingSpan(remote), Context())

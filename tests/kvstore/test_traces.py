"""Traces by themselves: off is nothing at all, names carry contexts, small work is gathered, OTLP arrives."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbank.errors import ConfigError
from kvbank.kvstore import traces as module
from kvbank.kvstore.traces import Traces, context_of, open_traces

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture()
def to_file(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """to_file(**settings): Traces, and a function that closes them and reads what they told."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra trace")
    made: list[Traces] = []

    def begin(**settings: Any) -> Any:
        traces = open_traces("worker-0", {"exporter": "file", "trace_dir": str(tmp_path / "spans"), "sampled": 1.0, **settings})
        assert traces is not None
        made.append(traces)

        def told() -> list[dict[str, Any]]:
            traces.close()
            path = tmp_path / "spans" / "worker-0.jsonl"
            return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

        return traces, told

    yield begin
    for traces in made:
        traces.close()


def test_off_is_none_and_imports_nothing() -> None:
    """Of ours, that is: some libraries import OpenTelemetry's interface by themselves where it is installed, never its SDK."""
    program = ("import sys; from kvbank.kvstore.traces import open_traces; import kvbank.cluster.traced\n"
               "assert open_traces('x', {'exporter': 'none'}) is None\n"
               "ours = [name for name in sys.modules if name.startswith('opentelemetry')]\n"
               "import kvbank.workers.service, kvbank.cluster.http.server\n"
               "print(ours + [name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.sdk.resources"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"kvbank\[trace\]"):
        open_traces("x", {"exporter": "file", "trace_dir": "/nowhere"})


@pytest.mark.parametrize("name", ["j-1#1.1", "", "j-1#1.1@", "@short-short-01", PARENT])
def test_a_name_without_a_context_has_none(name: str) -> None:
    assert context_of(name) == ""


def test_a_jobs_name_carries_the_context_of_its_span(to_file) -> None:
    traces, told = to_file()
    trace = traces.begin("worker.submit", PARENT, job="j-1")
    assert context_of(f"j-1#1.1{trace.suffix}") == trace.parent and trace.parent.split("-")[1] == "a" * 32
    trace.end(outcome="stop")
    trace.end(outcome="again")
    (span,) = told()
    assert span["parent_id"] == "b" * 16 and span["trace_id"] == "a" * 32
    assert span["attributes"] == {"job": "j-1", "outcome": "stop"}, "the first end counts"


def test_a_parent_that_is_none_begins_a_trace_of_its_own(to_file) -> None:
    traces, told = to_file()
    for bad in ("", "nonsense", f"00-{'0' * 32}-{'b' * 16}-01", f"00-{'a' * 32}-{'0' * 16}-01", PARENT + "x"):
        traces.begin("gateway.job", bad).end()
    spans = told()
    assert len({span["trace_id"] for span in spans}) == 5 and {span["parent_id"] for span in spans} == {""}


def test_many_small_pieces_are_one_span_from_the_first_to_the_last(to_file) -> None:
    traces, told = to_file()
    now = time.monotonic()
    for number in range(100):
        traces.note("lender.attend", PARENT, now + number, now + number + 0.5, rows=2)
    traces.note("lender.put", PARENT, now, now + 1, bytes=7)
    traces.note("lender.put", "", now, now + 1, bytes=7)                       # a job that nobody traces
    spans = {span["name"]: span for span in told()}
    assert set(spans) == {"lender.attend", "lender.put"}
    attend = spans["lender.attend"]
    assert attend["attributes"] == {"calls": 100, "busy_s": 50.0, "rows": 200} and attend["parent_id"] == "b" * 16
    assert round((attend["end_ns"] - attend["start_ns"]) / 1e9, 3) == 99.5


def test_gathered_work_is_bounded_and_the_oldest_is_told_early(to_file, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHERED", 3)
    traces, told = to_file()
    now = time.monotonic() + 1000                                              # it does not rest while this test runs
    for number in range(10):
        traces.note("lender.put", f"00-{number + 1:032x}-{'b' * 16}-01", now, now, bytes=number)
    assert len(traces._gathered) == 3
    assert sorted(span["attributes"]["bytes"] for span in told()) == list(range(10)), "nothing is lost by it"


def test_a_share_of_traces_is_kept_and_a_callers_decision_counts(to_file) -> None:
    traces, told = to_file(sampled=0.0)
    traces.begin("gateway.job").end()
    traces.begin("gateway.job", PARENT).end()
    traces.begin("gateway.job", PARENT[:-1] + "0").end()
    assert [span["parent_id"] for span in told()] == ["b" * 16]


def test_spans_arrive_at_a_collector_over_otlp() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra trace")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse

    got: list[Any] = []
    arrived = threading.Event()

    def export(request: Any, _context: grpc.ServicerContext) -> Any:
        got.append(request)
        arrived.set()
        return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(
        "opentelemetry.proto.collector.trace.v1.TraceService", {"Export": grpc.unary_unary_rpc_method_handler(
            export, ExportTraceServiceRequest.FromString, ExportTraceServiceResponse.SerializeToString)})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        traces = open_traces("gateway", {"exporter": "otlp", "otlp_endpoint": f"http://127.0.0.1:{port}", "sampled": 1.0})
        assert traces is not None
        traces.begin("gateway.job", PARENT, job="j-1").end()
        assert arrived.wait(20)
        traces.close()
    finally:
        server.stop(None)
    span = got[0].resource_spans[0].scope_spans[0].spans[0]
    assert span.name == "gateway.job" and span.trace_id.hex() == "a" * 32 and span.parent_span_id.hex() == "b" * 16


def test_an_absent_collector_holds_nobody_up() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra trace")
    traces = open_traces("gateway", {"exporter": "otlp", "otlp_endpoint": "http://127.0.0.1:9", "sampled": 1.0})
    assert traces is not None
    traces.begin("gateway.job").end()
    closer = threading.Thread(target=traces.close)
    closer.start()
    closer.join(30)
    assert not closer.is_alive(), "closing is bounded by CLOSE_S, not by the exporter's retries"

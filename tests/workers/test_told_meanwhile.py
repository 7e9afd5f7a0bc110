"""What a step brought is told while the next one computes, and never later than it would be without that."""

from __future__ import annotations

from array import array

import pytest

from kvbank.proto import jobs_pb2 as pb
from kvbank.workers.engine import Finished, Token
from kvbank.workers.jobs_line import Line
from kvbank.workers.jobs_service import JobsService


class Worker:
    """An engine and its jobs, stepped by hand; `log` has what happened in order: steps, and what lines were given."""

    def __init__(self, engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.log = engine, []
        self.jobs = JobsService(engine, "worker-0", vocab_size=512, status=pb.WorkerStatus, clock=lambda: 0.0)
        engine.meanwhile = self.jobs.tell
        real_run, real_put = engine.backend.run, Line.put

        def run(plan, **options):
            self.log.append("computes")
            result = real_run(plan, **options)
            self.log.append("computed")
            return result

        def put(line, events) -> None:
            self.log.append([word(event) for _, event in events])
            real_put(line, events)
        engine.backend.run = run
        monkeypatch.setattr(Line, "put", put)
        self.line = Line(worker="worker-0", clock=lambda: 0.0, receipt=self.jobs._receipt, progress=self.jobs._progress)

    def begin(self, lane: int, prompt: list[int], max_tokens: int, *, emitted: tuple[int, ...] = ()) -> None:
        job = pb.Job(id=f"job-{lane}", prompt=array("i", prompt).tobytes(), emitted=array("i", emitted).tobytes(),
                     max_tokens=max_tokens, ignore_eos=True)
        self.jobs._begin(self.jobs._hear(pb.SubmitRequest(lane=lane, job=job), self.line))

    def turn(self) -> list:
        """One step, as the worker's loop takes it; what happened in it."""
        self.log.clear()
        self.jobs.deliver(self.engine.step())
        return list(self.log)


def word(event: object) -> object:
    return event.index if isinstance(event, Token) else type(event).__name__


@pytest.fixture()
def worker(alone, monkeypatch) -> Worker:
    return Worker(alone(), monkeypatch)


def test_the_first_and_the_last_word_at_once_and_others_while_the_next_step_computes(worker, prompt) -> None:
    worker.begin(1, prompt(20), 4)
    assert worker.turn() == ["computes", "computed", [0]]
    assert worker.turn() == ["computes", "computed"]
    assert worker.turn() == ["computes", [1], "computed"]
    assert worker.turn() == ["computes", [2], "computed", [3, Finished.__name__]]


def test_the_first_word_of_a_resumed_job_is_told_at_once(worker, prompt) -> None:
    worker.begin(1, prompt(20), 9, emitted=(5, 6, 7))
    assert worker.turn() == ["computes", "computed", [3]]
    assert worker.turn() == ["computes", "computed"]


def test_no_token_waits_for_the_prompts_of_others(worker, prompt) -> None:
    worker.begin(1, prompt(20), 40)
    worker.turn(), worker.turn()
    worker.begin(2, prompt(300), 4)
    assert worker.turn()[:2] == [[1], "computes"]


def test_a_backend_without_such_a_moment_delays_a_token_by_one_step(worker, prompt) -> None:
    real = worker.engine.backend.run
    worker.engine.backend.run = lambda plan, *, meanwhile, **options: real(plan, **options)
    worker.begin(1, prompt(20), 40)
    assert worker.turn() == ["computes", "computed", [0]]
    assert worker.turn() == ["computes", "computed"]
    assert worker.turn() == ["computes", "computed", [1]]


def test_what_waits_is_told_when_no_step_follows(worker, prompt) -> None:
    worker.begin(1, prompt(20), 40)
    worker.turn(), worker.turn()
    worker.engine.scheduler.next_plan = lambda _now: None
    assert worker.turn() == [[1]]


def test_what_waited_is_told_before_the_error_that_ends_the_job(worker, prompt) -> None:
    worker.begin(1, prompt(20), 40)
    worker.turn(), worker.turn()
    (name,) = worker.jobs._lanes
    worker.engine.cancel(name)
    assert worker.turn() == [[1], ["Failed"]]

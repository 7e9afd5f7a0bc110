"""What a step brought is told while the next one is in its largest product; whatever makes a step long does not hold it up."""

from __future__ import annotations

from array import array

import pytest

from kvbank.proto import jobs_pb2 as pb
from kvbank.workers.engine import Token
from kvbank.workers.jobs_line import Line
from kvbank.workers.jobs_service import JobsService
from kvbank.workers.seams import BackendLost


class Worker:
    """An engine and its jobs, stepped by hand; `log` has what happened in order: layers, head, and what a line was given."""

    def __init__(self, engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.log = engine, []
        self.jobs = JobsService(engine, "worker-0", vocab_size=512, status=pb.WorkerStatus, clock=lambda: 0.0)
        engine.meanwhile = self.jobs.tell
        model, real_put = engine.backend.model, Line.put
        forward, logits = model.forward, model.logits
        model.forward = lambda *args: (self.log.append("layers"), forward(*args))[1]
        model.logits = lambda *args: (self.log.append("head"), logits(*args))[1]

        def put(line, events) -> None:
            self.log.append([word(event) for _, event in events])
            real_put(line, events)
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
    assert worker.turn() == ["layers", "head", [0]]
    assert worker.turn() == ["layers", "head"]
    assert worker.turn() == ["layers", [1], "head"]
    assert worker.turn() == ["layers", [2], "head", [3, "Finished"]]


def test_the_first_word_of_a_resumed_job_is_told_at_once(worker, prompt) -> None:
    worker.begin(1, prompt(20), 9, emitted=(5, 6, 7))
    assert worker.turn() == ["layers", "head", [3]]
    assert worker.turn() == ["layers", "head"]


def test_no_token_waits_for_the_prompts_of_others(alone, monkeypatch, prompt) -> None:
    worker = Worker(alone(prefill_chunk_tokens=128), monkeypatch)
    worker.begin(1, prompt(20), 40)
    worker.turn(), worker.turn()
    worker.begin(2, prompt(300), 4)
    assert [worker.turn()[:2] for _ in range(3)] == [[[1], "layers"], [[2], "layers"], [[3], "layers"]]


def test_no_token_waits_for_a_prompt_that_is_copied_from_elsewhere(worker, prompt) -> None:
    worker.begin(1, prompt(20), 40)
    worker.turn(), worker.turn()
    next_plan = worker.engine.scheduler.next_plan
    worker.engine.scheduler.next_plan = lambda now: (worker.log.append("copies"), next_plan(now))[1]
    worker.begin(2, prompt(300), 4)
    assert worker.turn()[:2] == [[1], "copies"]


def test_no_token_waits_for_a_lender(town, prompt, monkeypatch) -> None:
    one, plans, turns = town(lenders=2, device_blocks=48), [], []
    worker = Worker(one.worker.engine, monkeypatch)
    run = worker.engine.backend.run
    worker.engine.backend.run = lambda plan, **options: (plans.append(plan), run(plan, **options))[1]
    worker.begin(1, prompt(900), 40)
    while worker.engine.busy:
        one.refresh()
        waits = bool(worker.jobs._untold)
        turn = worker.turn()
        if waits and any(rows.remote for rows in plans[-1].rows):
            turns.append(turn)
    assert turns and all(turn[:3] == [turn[0], "layers", "head"] and isinstance(turn[0], list) for turn in turns)


def test_a_backend_without_such_a_moment_delays_a_token_by_one_step(worker, prompt) -> None:
    real = worker.engine.backend.run
    worker.engine.backend.run = lambda plan, *, meanwhile, **options: real(plan, **options)
    worker.begin(1, prompt(20), 40)
    assert worker.turn() == ["layers", "head", [0]]
    assert worker.turn() == ["layers", "head"]
    assert worker.turn() == ["layers", "head", [1]]


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


def test_what_waited_is_told_before_the_error_of_a_step_that_broke(worker, prompt) -> None:
    worker.begin(1, prompt(20), 40)
    worker.turn(), worker.turn()

    def lost(_plan, **_options):
        raise BackendLost("a shard is gone")
    worker.engine.backend.run = lost
    assert worker.turn() == [[1], ["Failed"]]


def test_the_loop_of_a_worker_delivers_every_step_and_leaves_nothing_untold(town) -> None:
    worker = town(lenders=0).worker
    assert worker.engine.meanwhile == worker.jobs.tell
    steps, told = [["a"], [], None, ["b"]], []

    def step() -> list[str]:
        if len(steps) == 1:
            worker._stopping.set()
        if (made := steps.pop(0)) is None:
            raise RuntimeError("a bug")
        return made
    worker.engine.step, worker.engine.fail_all = step, lambda error: [type(error).__name__]
    worker.jobs.deliver = told.append
    worker.jobs.tell = lambda: told.append("all")
    worker._run_engine()
    assert told == [["a"], [], ["KVBankError"], ["b"], "all"]

"""A caller that goes away, whenever it does, leaves no job and no queue behind."""

from __future__ import annotations

import queue
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from kvbank.proto import jobs_pb2 as pb
from kvbank.workers import jobs_service
from kvbank.workers.engine import Finished, Token
from kvbank.workers.jobs_line import PROGRESS_S, Lane, Line
from kvbank.workers.jobs_service import JobsService
from kvbank.workers.sequence import JobSpec, Tally


class Call:
    """A servicer context whose caller hangs up when told, or has hung up already."""

    def __init__(self, gone: bool = False) -> None:
        self.gone, self.callbacks, self.cancelled = gone, [], False

    def add_callback(self, callback) -> bool:
        if not self.gone:
            self.callbacks.append(callback)
        return not self.gone

    def hang_up(self) -> None:
        self.gone = True
        for callback in self.callbacks:
            callback()

    def cancel(self) -> None:
        self.cancelled = True
        self.hang_up()


class Gateway:
    """The other end of a stream: says requests when told; a thread takes the replies, as gRPC's does."""

    def __init__(self, jobs: JobsService, call: Call) -> None:
        self._said: queue.SimpleQueue[pb.SubmitRequests | None] = queue.SimpleQueue()
        self._heard: queue.SimpleQueue[pb.SubmitReply | None] = queue.SimpleQueue()
        threading.Thread(target=self._take, args=(jobs.submit(iter(self._said.get, None), call),), daemon=True).start()

    def _take(self, replies: Iterator[pb.SubmitReplies]) -> None:
        for message in replies:
            for reply in message.replies:
                self._heard.put(reply)
        self._heard.put(None)

    def say(self, *requests: pb.SubmitRequest) -> None:
        for request in requests:
            self.say_at_once(request)

    def say_at_once(self, *requests: pb.SubmitRequest) -> None:
        self._said.put(pb.SubmitRequests(requests=requests))

    def say_no_more(self) -> None:
        self._said.put(None)

    def hear(self) -> pb.SubmitReply | None:
        """None: the stream is over."""
        return self._heard.get(timeout=30)

    def hear_to_the_end(self) -> list[pb.SubmitReply]:
        return list(iter(self.hear, None))


def service(engine, **options) -> JobsService:
    return JobsService(engine, "worker-0", vocab_size=512, status=pb.WorkerStatus, clock=lambda: 0.0, **options)


def request(prompt, lane: int = 1, **more) -> pb.SubmitRequest:
    job = pb.Job(id="a", prompt=array("i", prompt).tobytes(), **{"max_tokens": 400, "ignore_eos": True, **more})
    return pb.SubmitRequest(lane=lane, job=job)


def cancel(lane: int = 1, reason: str = "client") -> pb.SubmitRequest:
    return pb.SubmitRequest(lane=lane, cancel=pb.Cancel(reason=reason))


def kinds(replies: list[pb.SubmitReply], lane: int) -> list[str]:
    return [reply.WhichOneof("kind") for reply in replies if reply.lane == lane]


@contextmanager
def running(engine, jobs: JobsService) -> Iterator[None]:
    """A thread that steps the engine, as a worker's does."""
    over = threading.Event()

    def turn() -> None:
        while not over.is_set():
            events = engine.step()
            jobs.deliver(events)
            if not events:
                engine.wake.wait(0.01)
    thread = threading.Thread(target=turn)
    thread.start()
    yield
    over.set()
    thread.join()


def at_rest(engine, jobs: JobsService) -> bool:
    return not engine.busy and not engine.jobs() and not jobs._lanes


def test_a_caller_that_hung_up_before_the_job_was_handed_in_leaves_no_job(alone, prompt) -> None:
    engine = alone()
    jobs = service(engine)
    gateway = Gateway(jobs, Call(gone=True))
    gateway.say(request(prompt(20)))
    assert gateway.hear() is None
    engine.step()
    assert at_rest(engine, jobs)


def test_a_caller_that_hangs_up_while_the_job_is_handed_in_leaves_no_job(alone, prompt, until) -> None:
    engine = alone()
    jobs, call = service(engine), Call()
    real, handed_in = engine.add, threading.Event()

    def add(*specs) -> None:
        call.hang_up()
        real(*specs)
        handed_in.set()
    engine.add = add
    gateway = Gateway(jobs, call)
    gateway.say(request(prompt(20)))
    gateway.hear_to_the_end()
    assert handed_in.wait(10)
    with running(engine, jobs):
        until(lambda: at_rest(engine, jobs))


def test_a_caller_that_hangs_up_before_the_first_word_leaves_no_job(alone, prompt, until) -> None:
    engine = alone()
    jobs, call = service(engine), Call()
    gateway = Gateway(jobs, call)
    gateway.say(request(prompt(20)))
    until(lambda: jobs._lanes)
    call.hang_up()
    gateway.hear_to_the_end()
    with running(engine, jobs):
        until(lambda: at_rest(engine, jobs))


def test_stop_said_twice_is_still_stop(alone, prompt) -> None:
    engine = alone()
    jobs = service(engine)
    gateway = Gateway(jobs, Call())
    gateway.say(request(prompt(20)), cancel(reason="stop"), cancel(reason="stop"))
    gateway.say_no_more()
    with running(engine, jobs):
        said = kinds(gateway.hear_to_the_end(), 1)
    assert said[-1] == "done" and said.count("done") == 1


def test_a_job_that_fails_after_it_was_taken_up_is_no_refusal(alone, prompt) -> None:
    engine = alone()
    jobs = service(engine)
    gateway = Gateway(jobs, Call())
    gateway.say(request(prompt(20)), cancel(reason="client"), request([], lane=2))
    gateway.say_no_more()
    with running(engine, jobs):
        replies = gateway.hear_to_the_end()
    assert kinds(replies, 1) == ["accepted", "failed"] and kinds(replies, 2) == ["failed"]


def test_a_lane_that_is_left_ends_its_job_and_nothing_else(alone, prompt, until) -> None:
    engine = alone()
    jobs = service(engine)
    gateway = Gateway(jobs, Call())
    gateway.say(*(request(prompt(20), lane, max_tokens=8) for lane in (1, 2, 3)))
    until(lambda: len(jobs._lanes) == 3)
    gateway.say(pb.SubmitRequest(lane=2, leave=pb.Leave()), pb.SubmitRequest(lane=9, leave=pb.Leave()), cancel(9))
    until(lambda: len(jobs._lanes) == 2)
    gateway.say_no_more()
    with running(engine, jobs):
        replies = gateway.hear_to_the_end()
        until(lambda: at_rest(engine, jobs))
    assert kinds(replies, 1)[-1] == kinds(replies, 3)[-1] == "done"
    assert not kinds(replies, 2) and not kinds(replies, 9)
    told = [array("i", reply.tokens.ids).tolist() for reply in replies if reply.lane == 1 and reply.HasField("tokens")]
    assert sum(map(len, told)) == 8


def test_jobs_that_come_in_one_message_begin_in_the_same_step(alone, prompt, until) -> None:
    """One by one, the first would have a step of its own, and the others an answer that ends a step later."""
    engine = alone()
    jobs = service(engine)
    gateway = Gateway(jobs, Call())
    handed_in: list[int] = []
    real = engine.add

    def add(*specs) -> None:
        handed_in.append(len(specs))
        real(*specs)
    engine.add = add
    gateway.say_at_once(*(request(prompt(20), lane, max_tokens=8) for lane in (1, 2, 3)), request([700], 4), cancel(2),
                        pb.SubmitRequest(lane=3, leave=pb.Leave()))
    gateway.say_no_more()
    until(lambda: handed_in)
    with running(engine, jobs):
        replies = gateway.hear_to_the_end()
        until(lambda: at_rest(engine, jobs))
    assert handed_in == [3]
    assert [kinds(replies, lane)[-1:] for lane in (1, 2, 3, 4)] == [["done"], ["failed"], [], ["failed"]]


def test_a_refused_job_leaves_the_stream_to_the_others(alone, prompt) -> None:
    engine = alone()
    jobs = service(engine)
    gateway = Gateway(jobs, Call())
    gateway.say(request([700], 1), pb.SubmitRequest(lane=2), request(prompt(20), 3, max_tokens=2),
                request(prompt(20), 3, max_tokens=2))
    gateway.say_no_more()
    heard = [gateway.hear() for _ in range(3)]
    assert [(reply.lane, reply.failed.code) for reply in heard] == [(lane, "invalid_request") for lane in (1, 2, 3)]
    with running(engine, jobs):
        assert kinds(gateway.hear_to_the_end(), 3)[-1] == "done", "the job that had the lane first runs to its end"


def test_a_reader_that_breaks_takes_its_stream_along(alone, prompt, until, monkeypatch) -> None:
    engine, call = alone(), Call()
    jobs = service(engine)
    gateway = Gateway(jobs, call)
    gateway.say(request(prompt(20)))
    until(lambda: jobs._lanes)
    monkeypatch.setattr(jobs, "_hear", lambda request, line: 1 // 0)
    gateway.say(cancel())
    until(lambda: call.cancelled)
    gateway.hear_to_the_end()
    with running(engine, jobs):
        until(lambda: at_rest(engine, jobs))


def test_control_is_heard_before_a_job_is_refused_for_want_of_memory(alone, prompt) -> None:
    """A lender has come since this worker was last told who is there; the gateway knows it."""
    engine, capacity = alone(), [0]
    engine._capacity_tokens = lambda: capacity[0]
    jobs = service(engine, hear_control=lambda within_s: capacity.append(capacity.pop() + 512))
    ends = {}
    with running(engine, jobs):
        for length in (20, 900):
            gateway = Gateway(jobs, Call())
            gateway.say(request(prompt(length)))
            gateway.say_no_more()
            ends[length] = gateway.hear_to_the_end()[-1]
    assert ends[20].WhichOneof("kind") == "done"
    assert capacity == [1024] and ends[900].failed.code == "too_long", "what does not fit even so is refused"


def test_a_cancel_while_control_is_asked_is_not_forgotten(alone, prompt, until) -> None:
    engine, asked, go_on = alone(), threading.Event(), threading.Event()
    engine._capacity_tokens = lambda: 4096 if go_on.is_set() else 0

    def hear_control(within_s: float) -> None:
        asked.set()
        assert go_on.wait(10)
    jobs = service(engine, hear_control=hear_control)
    gateway = Gateway(jobs, Call())
    gateway.say(request(prompt(20)))
    assert asked.wait(10)
    gateway.say(cancel())
    gateway.say_no_more()
    with running(engine, jobs):
        until(lambda: all(lane.ending for _, lane in jobs._lanes.values()))
        go_on.set()
        assert gateway.hear_to_the_end()[-1].failed.code == "cancelled"
        until(lambda: at_rest(engine, jobs))


def test_the_first_message_says_that_somebody_is_there(alone) -> None:
    call = Call()
    replies = service(alone()).submit(iter(()), call)
    assert next(replies) == pb.SubmitReplies(), "before any job is heard: what is lost from here on was had"
    assert list(replies) == []


def test_a_job_that_breaks_its_checks_is_its_own_trouble(alone, prompt, monkeypatch) -> None:
    engine = alone()
    jobs = service(engine)
    real = jobs_service.job_spec
    monkeypatch.setattr(jobs_service, "job_spec", lambda job, *more: real(job, *more) if len(job.prompt) < 400 else 1 // 0)
    gateway = Gateway(jobs, Call())
    gateway.say(request(prompt(120), 1), request(prompt(20), 2, max_tokens=3))
    gateway.say_no_more()
    with running(engine, jobs):
        replies = gateway.hear_to_the_end()
    assert [reply.failed.code for reply in replies if reply.lane == 1] == ["internal"]
    assert kinds(replies, 2)[-1] == "done"


def test_a_receipt_that_cannot_be_made_costs_no_tokens_and_no_other_job(alone, prompt, caplog) -> None:
    engine = alone()
    jobs = service(engine)
    real = jobs._receipt
    jobs._receipt = lambda tally, spec, outputs: real(tally, spec, -1 if len(spec.prompt) > 100 else outputs)
    gateway = Gateway(jobs, Call())
    gateway.say(request(prompt(120), 1, max_tokens=3), request(prompt(20), 2, max_tokens=6))
    gateway.say_no_more()
    with running(engine, jobs):
        replies = gateway.hear_to_the_end()
    assert kinds(replies, 1)[-1] == kinds(replies, 2)[-1] == "done"
    told = {reply.lane: reply.done.receipt.output_tokens for reply in replies if reply.WhichOneof("kind") == "done"}
    assert told == {1: 0, 2: 6} and "receipt_not_made" in caplog.text


def test_tokens_are_on_their_way_before_a_receipt_is_made() -> None:
    made: list[str] = []
    ended: list[int] = []

    def receipt(_tally: Tally, spec: JobSpec, _outputs: int) -> pb.Receipt:
        made.append(spec.id)
        return pb.Receipt()

    line = Line(worker="w", clock=lambda: 0.0, receipt=receipt, progress=lambda specs: [])
    lanes = [Lane(number, JobSpec(id=str(number), prompt=[1], max_tokens=1)) for number in range(1, 51)]
    assert all(line.open(lane) for lane in lanes)
    line.put([(lane, event) for lane in lanes
              for event in (Token(lane.spec.id, 0, 7), Finished(lane.spec.id, "length", Tally()))])
    line.say_no_more()
    messages = line.replies(lambda lane: ended.append(lane.number))
    told = [next(messages) for _ in range(3)]
    assert [len(message.replies) for message in told] == [24, 24, 2] and not made, "messages are bounded, and hold tokens alone"
    line.leave(50)                                   # nobody waits for its last word any more
    words = [(reply.lane, reply.WhichOneof("kind")) for message in messages for reply in message.replies]
    assert words == [(number, "done") for number in range(1, 50)] and ended == list(range(1, 50)) and len(made) == 49


def test_progress_that_cannot_be_told_does_not_make_jobs_look_silent(alone, prompt, caplog) -> None:
    now = [0.0]
    line = Line(worker="w", clock=lambda: now[0], receipt=lambda *_: pb.Receipt(),
                progress=lambda specs: [pb.Progress(computed=-1) for _ in specs])
    assert all(line.open(Lane(number, JobSpec(id=str(number), prompt=[1], max_tokens=1))) for number in (1, 2))
    now[0] = PROGRESS_S
    assert [(reply.lane, reply.WhichOneof("kind")) for reply in line._quiet(now[0])] == [
        (1, "progress"), (2, "progress")]
    assert "progress_not_made" in caplog.text

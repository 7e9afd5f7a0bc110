"""A caller that goes away, whenever it does, leaves no job and no queue behind."""

from __future__ import annotations

from array import array

from kvbank.proto import jobs_pb2 as pb
from kvbank.workers.jobs_service import JobsService


class Call:
    """A servicer context whose caller hangs up when told, or has hung up already."""

    def __init__(self, gone: bool = False) -> None:
        self.gone, self.callbacks = gone, []

    def add_callback(self, callback) -> bool:
        if not self.gone:
            self.callbacks.append(callback)
        return not self.gone

    def hang_up(self) -> None:
        self.gone = True
        for callback in self.callbacks:
            callback()


def service(engine, **options) -> JobsService:
    return JobsService(engine, "worker-0", vocab_size=512, status=pb.WorkerStatus, clock=lambda: 0.0, **options)


def request(prompt) -> pb.SubmitRequest:
    return pb.SubmitRequest(job=pb.Job(id="a", prompt=array("i", prompt).tobytes(), max_tokens=400, ignore_eos=True))


def test_a_caller_that_hung_up_before_the_job_was_handed_in_leaves_no_job(alone, prompt) -> None:
    engine = alone()
    jobs, call = service(engine), Call(gone=True)
    stream = jobs.submit(iter([request(prompt(20))]), call)
    next(stream, None)
    stream.close()
    engine.step()
    assert not engine.busy
    assert not jobs._queues


def test_a_caller_that_hangs_up_while_the_job_is_handed_in_leaves_no_job(alone, prompt) -> None:
    engine = alone()
    jobs, call = service(engine), Call()
    real = engine.add

    def add(job) -> None:
        call.hang_up()
        real(job)
    engine.add = add
    stream = jobs.submit(iter([request(prompt(20))]), call)
    next(stream, None)
    stream.close()
    engine.step()
    assert not engine.busy
    assert not jobs._queues


def test_a_caller_that_never_reads_the_first_word_leaves_no_queue(alone, prompt) -> None:
    engine = alone()
    jobs, call = service(engine), Call()
    stream = jobs.submit(iter([request(prompt(20))]), call)
    next(stream)
    call.hang_up()
    stream.close()
    engine.step()
    assert not engine.busy
    assert not jobs._queues


def test_stop_said_twice_is_still_stop(alone, prompt) -> None:
    engine = alone()
    jobs, call = service(engine), Call()
    stop = pb.SubmitRequest(cancel=pb.Cancel(reason="stop"))
    stream = jobs.submit(iter([request(prompt(20)), stop, stop]), call)
    assert next(stream).WhichOneof("kind") == "accepted"
    while engine.busy or not jobs._queues or engine._inbox:
        jobs.deliver(engine.step())
    ends = [reply for reply in stream if reply.WhichOneof("kind") in ("done", "failed")]
    assert [end.WhichOneof("kind") for end in ends] == ["done"]


def test_control_is_heard_before_a_job_is_refused_for_want_of_memory(alone, prompt) -> None:
    """A lender has come since this worker was last told who is there; the gateway knows it."""
    engine, capacity = alone(), [0]
    engine._capacity_tokens = lambda: capacity[0]
    jobs = service(engine, hear_control=lambda within_s: capacity.append(capacity.pop() + 512))
    replies = {length: jobs.submit(iter([request(prompt(length))]), Call()) for length in (20, 900)}
    ends = {}
    for length, stream in replies.items():
        assert next(stream).WhichOneof("kind") == "accepted"
        while engine.busy:
            jobs.deliver(engine.step())
        ends[length] = next(reply for reply in stream if reply.WhichOneof("kind") in ("done", "failed"))
    assert ends[20].WhichOneof("kind") == "done"
    assert capacity == [1024] and ends[900].failed.code == "too_long", "what does not fit even so is refused"

"""What a member writes: one line an event, values that stay whole, and nothing secret."""

from __future__ import annotations

import io
import json
import logging
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvbank.cluster.config import load
from kvbank.cluster.logs import Line, secrets_of, set_up
from kvbank.errors import ConfigError, InvalidRequest


@pytest.fixture()
def written() -> Iterator[Callable[..., Any]]:
    """written(member format, secrets) -> (logger, read): what the logger was told, as lines."""
    names: list[str] = []

    def begin(*, as_json: bool = False, secrets: tuple[str, ...] = (), name: str = "kvbank.test") -> Any:
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(Line("worker-0", as_json=as_json, secrets=secrets))
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel("DEBUG")
        logger.propagate = False
        names.append(name)
        return logger, lambda: stream.getvalue().splitlines()

    yield begin
    for name in names:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def fields(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in shlex.split(line))


def test_a_line_is_one_event_with_whole_values(written) -> None:
    log, lines = written()
    log.info("job attempt_lost job=%s attempt=%d why=%s took_s=%.1f", "j-1", 2, 'two words and a "quote"\nand a line', 1.26)
    (line,) = lines()
    found = fields(line)
    assert found["member"] == "worker-0" and found["level"] == "info" and found["logger"] == "kvbank.test"
    assert found["event"] == "job_attempt_lost" and found["job"] == "j-1" and found["attempt"] == "2"
    assert found["took_s"] == "1.3" and found["why"].startswith('two words and a "quote"')


def test_json_says_the_same_and_keeps_numbers(written) -> None:
    log, lines = written(as_json=True)
    log.warning("member_given_up id=%s deaths=%d member=%s reason=no_packed", "w\n0", 5, "another")
    found = json.loads(lines()[0])
    assert found["deaths"] == 5 and found["id"] == "w\n0" and found["reason"] == "no_packed"
    assert found["member"] == "worker-0" and found["member_"] == "another", "no field takes another's place"
    assert found["time"].endswith("Z") and len(found["time"]) == 24


def test_of_an_exception_only_the_type_and_the_way_are_told_unless_its_words_are_ours(written) -> None:
    log, lines = written()
    for error in (ValueError("what the caller sent"), InvalidRequest("what the caller sent"), ConfigError("set a port")):
        try:
            raise error
        except Exception:
            log.exception("engine_step_failed")
    assert "caller" not in "".join(lines())
    assert fields(lines()[0])["error_type"] == "ValueError" and "test_logs.py" in fields(lines()[0])["at"]
    assert fields(lines()[2])["error_text"] == "set a port"
    assert len(lines()) == 3


def test_what_an_exception_began_with_is_told_beside_it(written) -> None:
    log, lines = written()
    ring = KeyError("what the caller sent")
    ring.__cause__ = ring
    for cause, error in ((OSError("disk full"), RuntimeError("what the caller sent")), (None, ValueError()), (ring, TypeError())):
        try:
            raise error from cause
        except Exception:
            log.exception("engine_step_failed")
    first, second, third = map(fields, lines())
    assert first["error_type"] == "RuntimeError" and first["cause_type"] == "OSError" and first["cause_text"] == "disk full"
    assert "cause_type" not in second and third["cause_type"] == "KeyError" and "caller" not in "".join(lines())


def test_a_secret_is_masked_wherever_it_turns_up(written) -> None:
    config = {"token": "the-token", "cache_secret": "ab" * 32, "settings": {
        "api_keys": {"the-api-key": "a"}, "redis": "redis://:p%40ssword@127.0.0.1:6379/0", "cache_secret": None}}
    log, lines = written(secrets=tuple(secrets_of(config)))
    log.info("redis_not_answering why=%s", "the-token ab the-api-key p%40ssword p@ssword " + "ab" * 32)
    assert fields(lines()[0])["why"] == "*** ab *** *** *** ***".replace("***", fields(lines()[0])["why"].split()[0])
    assert "the-" not in lines()[0] and "ssword" not in lines()[0]


def test_a_secret_at_the_end_of_a_long_value_is_masked_before_it_is_cut(written) -> None:
    log, lines = written(secrets=("the-secret-word",))
    log.info("redis_not_answering why=%s", "x" * 1995 + "the-secret-word")
    assert "the-s" not in lines()[0] and len(fields(lines()[0])["why"]) <= 2000


def test_another_librarys_exception_is_told_without_its_words(written) -> None:
    """gRPC writes those of a handler's exception behind a colon."""
    class NotFound(OSError):
        """Of a library: it may name what a caller sent."""

    log, lines = written(name="grpc._server")
    for error in (ValueError("what the caller sent"), NotFound("what the caller sent")):
        try:
            raise error
        except Exception as found:
            log.exception(f"Exception calling application: {found}")
    assert [fields(line)["message"] for line in lines()] == ["Exception calling application"] * 2
    assert fields(lines()[1])["error_type"] == "NotFound" and "caller" not in "".join(lines())


def test_other_libraries_keep_their_first_line(written) -> None:
    log, lines = written(name="asyncio")
    log.error("Task exception was never retrieved\nfuture: <Task exception=ValueError('a prompt')>")
    log.error("100% of %s", "it")
    assert fields(lines()[0])["message"] == "Task exception was never retrieved" and "prompt" not in "".join(lines())
    assert fields(lines()[1])["message"] == "100% of %s", "a record that is wrong in itself is written as it is"


def test_a_thread_that_dies_is_an_event_and_its_words_stay_away() -> None:
    program = ("import logging, threading; from kvbank.cluster.logs import set_up; set_up('worker-0', {'format': 'json'})\n"
               "from kvbank.kvstore.logged_errors import OF_THIS_PROCESS as errors\n"
               "def die(): raise RuntimeError('a prompt')\n"
               "t = threading.Thread(target=die, name='engine'); t.start(); t.join()\n"
               "logging.getLogger('grpc._server').error('somebody'); logging.getLogger('kvbank.x').warning('else')\n"
               "print(errors.count); raise RuntimeError('a prompt')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["event"] for event in events] == ["thread_died", "message", "else", "process_died"]
    assert events[0]["thread"] == "engine" and "prompt" not in done.stderr and done.returncode == 1
    assert done.stdout == "2\n", "errors of anybody are counted, warnings are not"


def test_the_settings_choose_format_and_level() -> None:
    settings = load({"logging": {"format": "json", "level": "warning"}}, environ={})
    hooks, root = (threading.excepthook, sys.excepthook, logging.raiseExceptions), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    try:
        set_up("gateway", settings.flat(), to=stream)
        logging.getLogger("kvbank.cluster.gateway").info("not_this")
        logging.getLogger("kvbank.cluster.gateway").warning("but_this")
    finally:
        (threading.excepthook, sys.excepthook, logging.raiseExceptions), root.handlers = hooks, handlers
        root.setLevel(level)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["but_this"]

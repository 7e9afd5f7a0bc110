"""The engine called directly, for `bench gateway`: in a worker of a cluster, on the thread that serves, or alone in a process.

    python direct.py SOCKET            a member of a cluster, as `kvbank.cluster.member` is one; a model worker listens at SOCKET
    python direct.py SOCKET MODEL      an engine of that model folder and nothing else; prints a line when it listens

A line asks for so many tokens of each job, a line answers: tokens per second of all of them, or an object with the error.
"""

from __future__ import annotations

import json
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from kvbank.cluster.config import child_env

STREAMS, PROMPT_TOKENS, BLOCKS = 8, 16, 1024
PROGRAM = str(Path(__file__).resolve())


def unseen(rng: random.Random, vocab: int) -> list[int]:
    """A prompt that nobody has seen."""
    return [rng.randrange(vocab) for _ in range(PROMPT_TOKENS)]


class Direct:
    """The asking side."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(120)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")

    def decode(self, tokens: int) -> float:
        """Tokens per second of STREAMS jobs together, each of `tokens` tokens after a prompt that nobody has seen."""
        self._socket.sendall(f"{tokens}\n".encode())
        answer = self._lines.readline()
        if not answer.endswith("\n"):
            raise RuntimeError("the process of the engine called directly has ended")
        if not isinstance(rate := json.loads(answer), float):
            raise RuntimeError(f"the engine called directly: {rate}")
        return rate

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextmanager
def alone(path: Path, model: Path) -> Iterator[Direct]:
    """An engine in a process of its own, with the environment of a member. It ends with this one, whatever ends this one."""
    command, environment = [sys.executable, "-P", PROGRAM, str(path), str(model)], child_env("bench", 1)
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("the process of an engine alone ended before it listened")
            with closing(Direct(path)) as asked:
                yield asked
        finally:
            process.kill()


class _Answers:
    """The answering side. Work is done by whoever calls `turn`, so that the engine keeps its one thread."""

    def __init__(self, engine: Any, vocab: int, path: str) -> None:
        self._engine, self._vocab, self._rng, self._names = engine, vocab, random.Random(path), count()
        self._asked: queue.SimpleQueue[tuple[int, queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        Path(path).unlink(missing_ok=True)               # a worker that died is started again
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(path)
        listening.listen()
        threading.Thread(target=self._serve, args=(listening,), name="direct", daemon=True).start()

    def turn(self) -> None:
        """Do what is asked for, if anything is."""
        try:
            tokens, answer = self._asked.get_nowait()
        except queue.Empty:
            return
        try:
            answer.put(self._decode(tokens))
        except Exception as error:
            answer.put({"error": f"{type(error).__name__}: {error}"})

    def _decode(self, tokens: int) -> float:
        from kvbank.workers.engine import Token
        from kvbank.workers.sequence import JobSpec

        jobs = [JobSpec(id=f"direct-{next(self._names)}", prompt=unseen(self._rng, self._vocab), max_tokens=tokens,
                        ignore_eos=True) for _ in range(STREAMS)]
        began = time.perf_counter()
        self._engine.add(*jobs)
        events = self._engine.run_until_idle()
        seconds = time.perf_counter() - began
        if (got := sum(isinstance(event, Token) for event in events)) != STREAMS * tokens:
            raise RuntimeError(f"{got} tokens came instead of {STREAMS * tokens}")
        return got / seconds

    def _serve(self, listening: socket.socket) -> None:
        connection, _ = listening.accept()
        for line in connection.makefile("r"):
            answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
            self._asked.put((int(line), answer))
            self._engine.wake.set()
            connection.sendall(json.dumps(answer.get()).encode() + b"\n")


def _member(path: str) -> None:
    from kvbank.cluster.heartbeat import Heartbeat
    from kvbank.cluster.member import Config, Part, build_part, main

    def build(config: Config, line: Heartbeat | None) -> Part:
        part: Any = build_part(config, line)
        if config["kind"] == "model":
            step, answers = part.engine.step, _Answers(part.engine, part.parts.model.vocab_size, path)
            part.engine.step = lambda: (answers.turn(), step())[1]
        return part

    main(build)


def _alone(path: str, model: str) -> None:
    import torch

    from kvbank.workers.assembly import build_engine
    from kvbank.workers.config import WorkerConfig
    from kvbank.workers.models.config_reader import read_config

    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    engine = build_engine(WorkerConfig(model=model, device_blocks=BLOCKS))
    answers = _Answers(engine, read_config(model).vocab_size, path)
    print("listening", flush=True)
    while True:
        answers.turn()
        engine.wake.wait(0.5)
        engine.wake.clear()


if __name__ == "__main__":
    _member(sys.argv[1]) if len(sys.argv) == 2 else _alone(*sys.argv[1:])

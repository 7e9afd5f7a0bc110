"""A peer that stands still without dying: its connections break within seconds, whatever version of gRPC is installed."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

from kvbank.kvstore.transport import rpc

SERVER = """
import ctypes, grpc, threading
from kvbank.kvstore.transport import rpc

def echo(messages, context):
    for message in messages:
        yield message
        if message == b"work":
            ctypes.PyDLL(None).sleep(6)          # holds the interpreter all the time

server = rpc.server("ab")
handler = grpc.method_handlers_generic_handler("x.Y", {"Z": grpc.stream_stream_rpc_method_handler(echo)})
server.add_generic_rpc_handlers((handler,))
print(rpc.bind(server, "127.0.0.1:0"), flush=True)
server.start()
threading.Event().wait(60)
"""


@pytest.fixture()
def peer():
    """(process, send, receive, port) of one stream to a process of its own."""
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, cwd=root)
    port = int(process.stdout.readline())
    channel = rpc.channel(f"127.0.0.1:{port}", "ab")
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call = channel.stream_stream("/x.Y/Z")(iter(outbox.get, None))
    yield process, outbox.put, lambda: next(call), port
    outbox.put(None)
    channel.close()
    process.kill()
    process.wait()


def test_the_stream_to_a_stopped_peer_breaks(peer) -> None:
    process, send, receive, _ = peer
    send(b"hello")
    assert receive() == b"hello"
    os.kill(process.pid, signal.SIGSTOP)
    too_late = threading.Timer(20.0, process.kill)           # then it breaks for another reason
    too_late.start()
    with pytest.raises(grpc.RpcError) as broken:
        receive()
    too_late.cancel()
    assert "ping timeout" in broken.value.details()


def test_the_stream_to_a_peer_that_only_computes_does_not(peer) -> None:
    _, send, receive, _ = peer
    send(b"work")
    send(b"more")
    assert receive() == b"work" and receive() == b"more"


def test_a_peer_that_is_slow_to_say_its_first_word_is_reached(peer) -> None:
    """A busy machine: the connection is there, and the peer's greeting follows a third of a second later."""
    *_, port = peer
    with socket.create_server(("127.0.0.1", 0)) as door:
        def serve() -> None:
            with door.accept()[0] as caller, socket.create_connection(("127.0.0.1", port)) as callee:
                threading.Event().wait(0.3)
                back = threading.Thread(target=pump, args=(callee, caller))
                back.start()
                pump(caller, callee)
                back.join()

        slow = threading.Thread(target=serve)
        slow.start()
        channel = rpc.channel(f"127.0.0.1:{door.getsockname()[1]}", "ab")
        assert next(channel.stream_stream("/x.Y/Z")(iter([b"hello"]))) == b"hello"
        channel.close()
        slow.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Bytes from one to the other until either is closed."""
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

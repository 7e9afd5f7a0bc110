"""Every RPC of every real member, each with every wrong credential: refused, and the member is none the worse."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbank.cluster.certs import make_certificates
from kvbank.cluster.control import Control
from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import CALLERS, ROLES, Badge, Certificates
from kvbank.workers.models.random_model import write_random_model
from tests.kvstore.transport.headers_only import Mute
from tests.workers.conftest import TOKEN, Town

REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("certs")
    make_certificates(folder / "good")
    make_certificates(folder / "stranger")
    (folder / "expired").mkdir()
    for name in ("ca.key", "ca.pem"):
        (folder / "expired" / name).write_bytes((folder / "good" / name).read_bytes())
    make_certificates(folder / "expired", days=1, now=datetime.now(UTC) - timedelta(days=10))
    return folder


@pytest.fixture(scope="module")
def members(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, list[str]]]]:
    """kind -> (address, methods as the server has them)."""
    model = tmp_path_factory.mktemp("model")
    write_random_model(model, seed=1, num_hidden_layers=2)
    town = Town(model, 1, shards=2, tls_dir=str(certs / "good"))
    control = Control(Badge(TOKEN, Certificates(certs / "good", "control")))
    address = control.start("127.0.0.1:0")
    others = {"lender": town.lenders[0], "worker": town.worker, "follower": town.followers[1]}
    yield {"control": (address, methods_of(control._server)),
           **{kind: (member.address, methods_of(member._server)) for kind, member in others.items()}}
    control.stop()
    town.stop()


def methods_of(server: Any) -> list[str]:
    """What gRPC itself would route."""
    return sorted(name.strip("/") for handler in server._state.generic_handlers for name in handler._method_handlers)


def ask(address: str, method: str, shown: Badge | str, *, within_s: float = 15.0) -> grpc.StatusCode:
    """The code that a body of garbage gets."""
    with rpc.channel(address, shown) as channel:
        try:
            channel.unary_unary(f"/{method}")(b"\xff\xff\xff", timeout=within_s)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def test_every_method_has_its_callers_and_every_caller_a_method(members) -> None:
    all_methods = {method for _, methods in members.values() for method in methods}
    assert len(all_methods) >= 13, sorted(all_methods)
    undeclared = [method for method in all_methods if method not in CALLERS and method.partition("/")[0] not in CALLERS]
    assert not undeclared, "say in kvstore/transport/badge.py who may call these"
    for declared in CALLERS:
        assert any(declared in (method, method.partition("/")[0]) for method in all_methods), f"nobody has {declared}"


@pytest.mark.parametrize("kind", ["control", "lender", "worker", "follower"])
def test_no_rpc_lets_a_wrong_credential_through(members, certs, kind) -> None:
    address, methods = members[kind]

    def badge(folder: str, role: str, token: str = TOKEN) -> Badge:
        return Badge(token, Certificates(certs / folder, role))

    for method in methods:
        callers = CALLERS.get(method, CALLERS.get(method.partition("/")[0], ()))
        wrong = [TOKEN, badge("stranger", "worker"), badge("expired", callers[0]), badge("good", callers[0], ""),
                 badge("good", callers[0], "0" * 32), *(badge("good", role) for role in ROLES if role not in callers)]
        for shown in wrong:
            code = ask(address, method, shown)
            assert code in REFUSED, (method, shown, code)
        for role in ROLES:
            if role not in callers:
                assert ask(address, method, badge("good", role)) == grpc.StatusCode.PERMISSION_DENIED, (method, role)
    served = "kvbank.Control/Snapshot" if kind == "control" else "kvbank.Jobs/Status"
    if served in methods:
        with rpc.channel(address, badge("good", "gateway")) as channel:
            assert isinstance(channel.unary_unary(f"/{served}")(b"", timeout=15), bytes), "it still serves who may ask"


@pytest.mark.parametrize("kind", ["control", "lender", "worker", "follower"])
def test_no_rpc_waits_for_the_body_of_a_wrong_credential(members, certs, kind) -> None:
    """Else whoever reaches a port could hold every thread of a member."""
    address, methods = members[kind]
    for role in ROLES:
        certificates = Certificates(certs / "good", role)
        denied = [method for method in methods if role not in CALLERS.get(method, CALLERS.get(method.partition("/")[0], ()))]
        for token, asked, answer in ((TOKEN, denied, grpc.StatusCode.PERMISSION_DENIED),
                                     ("0" * 32, methods, grpc.StatusCode.UNAUTHENTICATED)):
            with Mute(rpc.channel(address, Badge(token, certificates))) as caller:
                calls = {method: caller.call(method, within_s=15.0) for method in asked}
                assert {method: call.code() for method, call in calls.items()} == dict.fromkeys(asked, answer), role

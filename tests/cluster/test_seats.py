"""Seats: what members ask for, who finds none, and how that is told."""

from __future__ import annotations

import pytest

from kvbank.cluster.config import load, threads_per_worker
from kvbank.cluster.seats import Room, arrange, seats, shortage
from kvbank.errors import ConfigError

MANY = {"ray_address": "auto", "workers": 2, "shards": 2, "lenders": 1, "worker_cpus": 4}


def room(address: str, cpus: float, free: float, **more: float) -> Room:
    return Room(node=f"id-{address}", address=address, total={"CPU": cpus, **more}, free={"CPU": free, **more})


def test_every_shard_and_lender_has_a_seat_and_control_and_gateway_have_none() -> None:
    wanted = seats(load({**MANY, "lender_cpus": 0.5}, environ={}))
    assert wanted == {"worker-0": {"CPU": 4}, "worker-0.1": {"CPU": 4}, "worker-1": {"CPU": 4}, "worker-1.1": {"CPU": 4},
                      "lender-0": {"CPU": 0.5}}


def test_a_gpu_and_a_custom_resource_are_asked_for_where_they_are_needed() -> None:
    wanted = seats(load({**MANY, "shards": 1, "device": "cuda", "member_resource": "bank", "lender_cpus": 0}, environ={}))
    assert wanted["worker-1"] == {"CPU": 4, "GPU": 1, "bank": 1} and wanted["lender-0"] == {"bank": 1}


def test_members_that_ask_for_nothing_may_sit_anywhere() -> None:
    assert set(map(str, seats(load({**MANY, "worker_cpus": 0, "lender_cpus": 0}, environ={})).values())) == {"{}"}


def test_a_worker_on_a_joined_ray_has_as_many_threads_as_cores() -> None:
    assert threads_per_worker(load(MANY, environ={})) == 4
    assert threads_per_worker(load({**MANY, "torch_threads": 3}, environ={})) == 3


def seated(wanted: dict, *rooms: Room) -> dict[str, str]:
    return {name: there.address for name, there in arrange(wanted, rooms).items()}


def test_the_largest_are_seated_first_and_a_room_is_never_given_twice() -> None:
    wanted = {"small": {"CPU": 1}, "large": {"CPU": 4}}
    assert seated(wanted, room("a", 4, 4), room("b", 1, 1)) == {"large": "a", "small": "b"}
    assert seated(wanted, room("a", 4, 4)) == {"large": "a"}
    assert seated({"x": {"GPU": 1}, "y": {"GPU": 1}}, room("a", 8, 8, GPU=1)) == {"x": "a"}


def test_members_spread_over_machines_however_large_one_of_them_is() -> None:
    wanted = {f"lender-{n}": {"CPU": 1} for n in range(6)}
    homes = sorted(seated(wanted, room("a", 64, 64), room("b", 2, 2), room("c", 4, 4)).values())
    assert homes == ["a", "a", "b", "b", "c", "c"]
    assert list(seated({"x": {}}, room("a", 1, 0)).values()) == ["a"]


def test_a_shortage_names_who_what_how_many_and_where() -> None:
    wanted = seats(load({**MANY, "shards": 1, "device": "cuda"}, environ={}))
    said = shortage(wanted, [room("10.0.0.1", 8, 8), room("10.0.0.2", 8, 2, GPU=1)])
    for part in ("worker-0 (4 CPU, 1 GPU)", "worker-1 (4 CPU, 1 GPU)", "2 of 3", "9 CPU, 2 GPU are asked for",
                 "10.0.0.1: CPU 8 free of 8, GPU 0 free of 0", "10.0.0.2: CPU 2 free of 8, GPU 1 free of 1",
                 "cluster.worker_cpus"):
        assert part in said
    assert "lender-0" not in said


@pytest.mark.parametrize("settings", [{"bind_host": "node"}, {"host": "node", "api_keys": {"k": "t"}}])
@pytest.mark.parametrize("launcher", [{}, {"launcher": "process", "ray_address": "auto"}])
def test_node_as_an_address_needs_a_ray_to_ask(settings: dict, launcher: dict) -> None:
    with pytest.raises(ConfigError, match="ray_address"):
        load({**settings, **launcher, "allow_public": True, "allow_plaintext": True}, environ={})
    assert load({**settings, "ray_address": "auto", "allow_public": True, "allow_plaintext": True}, environ={})
    with pytest.raises(ConfigError, match="allow_public"):
        load({**settings, "ray_address": "auto"}, environ={})

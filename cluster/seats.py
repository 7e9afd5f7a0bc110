"""Seats: what each member asks of a Ray that is shared by several machines, and who finds none. Pure functions.

    model worker   cluster.worker_cpus cores, one GPU when it computes on one
    lender         cluster.lender_cpus cores                              both: one of cluster.member_resource, if named
    control, gateway   nothing: they stay beside whoever started the cluster, so that their address stays

It knows no Ray: nodes come in as rooms. Where it would seat whom is a wish; what Ray grants is what counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvbank.cluster.settings import Settings

Wants = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """One machine of the Ray: what it has and what nobody has taken, by Ray's names (CPU, GPU, own ones)."""

    node: str                        # Ray's id of it
    address: str
    total: Wants
    free: Wants


def seats(settings: Settings) -> dict[str, Wants]:
    """What each member wants, by member id; empty wants are members that Ray may put anywhere."""
    cluster = settings.cluster
    own = {cluster.member_resource: 1.0} if cluster.member_resource else {}
    gpu = {"GPU": 1.0} if settings.engine.device.startswith("cuda") else {}
    worker = _above_zero({"CPU": cluster.worker_cpus, **gpu, **own})
    lender = _above_zero({"CPU": cluster.lender_cpus, **own})
    models = [member_id(replica, shard) for replica in range(cluster.workers) for shard in range(cluster.shards)]
    return dict.fromkeys(models, worker) | dict.fromkeys((f"lender-{n}" for n in range(cluster.lenders)), lender)


def member_id(replica: int, shard: int) -> str:
    """`worker-1` leads replica 1; its other shards are `worker-1.1` and so on."""
    return f"worker-{replica}" + (f".{shard}" if shard else "")


def arrange(wanted: Mapping[str, Wants], rooms: Sequence[Room]) -> dict[str, Room]:
    """A room for each member, as far as they last: the largest wants first, each where fewest of us and most is free."""
    free = [dict(room.free) for room in rooms]
    guests = [0] * len(rooms)
    seated: dict[str, Room] = {}
    for name, wants in sorted(wanted.items(), key=lambda item: (-sum(item[1].values()), item[0])):
        fitting = [at for at, room in enumerate(free) if all(room.get(kind, 0.0) >= much for kind, much in wants.items())]
        if not fitting:
            continue
        best = min(fitting, key=lambda at: (guests[at], -sum(free[at].get(kind, 0.0) for kind in wants), at))
        seated[name] = rooms[best]
        guests[best] += 1
        for kind, much in wants.items():
            free[best][kind] -= much
    return seated


def shortage(wanted: Mapping[str, Wants], rooms: Sequence[Room]) -> str:
    """Which members find no room, what is asked for and what is there, machine by machine, and what to do."""
    seated = arrange(wanted, rooms)
    standing = [name for name in wanted if name not in seated]
    kinds = sorted({kind for wants in wanted.values() for kind in wants})
    asked = ", ".join(f"{sum(wants.get(kind, 0.0) for wants in wanted.values()):g} {kind}" for kind in kinds)
    places = "; ".join(f"{room.address}: " + ", ".join(
        f"{kind} {room.free.get(kind, 0.0):g} free of {room.total.get(kind, 0.0):g}" for kind in kinds
    ) for room in rooms) or "none"
    who = ", ".join(f"{name} ({_listed(wanted[name])})" for name in standing) or "room was just taken"
    return (f"{len(standing)} of {len(wanted)} members find no room: {who}. In all {asked} are asked for. "
            f"Machines: {places}. Start fewer members, ask for less (cluster.worker_cpus, lender_cpus, member_resource, "
            "engine.device), or bring more machines (`ray status` tells who is there)")


def _above_zero(wants: Wants) -> Wants:
    return {kind: much for kind, much in wants.items() if much > 0}


def _listed(wants: Wants) -> str:
    return ", ".join(f"{much:g} {kind}" for kind, much in sorted(wants.items())) or "nothing"

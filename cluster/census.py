"""Census: what members say of themselves (`Survey.told`) as Prometheus metrics, made anew for every scrape.

    Jobs.Status of each member --Survey--> told --Census--> counters and gauges with the label `worker`

A member's counter stays a counter here: it begins at 0 when the member was started again, as Prometheus expects. Members
that left are not shown. Beside them stand the errors that the gateway's own process logged. Asks nobody anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from kvbank.cluster.families import ALL, BEGIN, COUNTER, GAUGE, LOANS, MEMBERS, OTHER, REST, SUMMARY, TIERS, Family, Names
from kvbank.kvstore.logged_errors import OF_THIS_PROCESS

_BREAKER = ("ok", "half_open", "open", "off")
_MAX_EVENTS = 256                    # values of a label that members' own counter names make


class Census(Collector):
    """Put it into a registry; `told` is what it shows. `expected`: members by kind that there should be."""

    def __init__(self, expected: Mapping[str, int]) -> None:
        self._expected = dict(expected)
        self._members = _Dictionary([*MEMBERS, *LOANS, REST[0]])
        self._tiers = _Dictionary([*TIERS, REST[1]])
        self.told: Mapping[str, Any] = {"workers": [], "loans": []}

    def describe(self) -> Iterable[Metric]:
        return []                                    # or registering would mean a first collect

    def collect(self) -> Iterator[Metric]:
        made = _Page()
        for kind, count in self._expected.items():
            made.add(ALL["kvbank_members_expected"], (kind,), count)
        made.add(ALL["kvbank_logged_errors_total"], ("gateway",), OF_THIS_PROCESS.count)
        for worker in self.told["workers"]:
            self._member(worker, made)
        for loan in self.told["loans"]:
            made.add(ALL["kvbank_member_loans"], (loan["lender"],), 1)
        yield from made.metrics()

    def _member(self, worker: Mapping[str, Any], made: _Page) -> None:
        name, up = worker["id"], worker["state"] != "silent"
        made.add(ALL["kvbank_members"], (worker["kind"], worker["state"]), 1)
        made.add(ALL["kvbank_member_up"], (name, worker["kind"]), int(up))
        made.add(ALL["kvbank_member_loans"], (name,), 0)
        made.add(ALL["kvbank_member_capacity_blocks"], (name,), worker["blocks_total"])
        made.add(ALL["kvbank_member_borrowed_blocks"], (name,), worker["blocks_borrowed"])
        for state in ("free", "used", "lent"):
            made.add(ALL["kvbank_member_blocks"], (name, state), worker[f"blocks_{state}"])
        if up:                                       # a silent one tells nothing, and 0 would look like a new life
            self._members.read({**_zeros(worker["kind"]), **worker["counters"]}, (name,), made)
        for tier in worker["tiers"]:
            place = (name, tier["name"])
            made.add(ALL["kvbank_tier_bytes"], place, tier["bytes_used"])
            made.add(ALL["kvbank_tier_limit_bytes"], place, tier["bytes_limit"])
            made.add(ALL["kvbank_tier_frames"], place, tier["frames"])
            for state in _BREAKER:
                made.add(ALL["kvbank_tier_breaker"], (*place, state), int(tier["state"] == state))
            self._tiers.read({**_zeros(tier["name"]), **tier["counters"]}, place, made)


class _Dictionary:
    """From a member's own counter names to families."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._exact = {said: (family, value) for family in families for said, value in family.told if not said.endswith("*")}
        stars = [(said[:-1], family) for family in families for said, _ in family.told if said.endswith("*")]
        self._stars = sorted(stars, key=lambda star: -len(star[0]))        # the longest beginning wins
        self._names = Names(_MAX_EVENTS)

    def read(self, counters: Mapping[str, float], place: tuple[str, ...], made: _Page) -> None:
        for said, amount in counters.items():
            if (found := self._exact.get(said)) is not None:
                family, value = found
                made.add(family, (*place, value) if value else place, amount * _scale(said))
                continue
            begin, family = next((b, f) for b, f in self._stars if said.startswith(b))     # the last one is empty
            made.add(family, (*place, self._names(said.removeprefix(begin).lower()) or OTHER), amount)


def _zeros(of: str) -> dict[str, float]:
    return dict.fromkeys(BEGIN.get(of, ()), 0.0)


def _scale(said: str) -> float:
    return 1e-6 if said.endswith("_us") else 1.0


class _Page:
    """The samples of one scrape, by family and labels; what is added twice adds up."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[tuple[str, ...], float]] = {}

    def add(self, family: Family, labels: tuple[str, ...], amount: float) -> None:
        samples = self._samples.setdefault(family.name, {})
        samples[labels] = samples.get(labels, 0.0) + amount

    def metrics(self) -> Iterator[Metric]:
        for name, family in ALL.items():
            if (samples := self._samples.get(name)) is not None:
                yield _metric(family, samples)


def _metric(family: Family, samples: Mapping[tuple[str, ...], float]) -> Metric:
    if family.kind == COUNTER:
        counter = CounterMetricFamily(family.name, family.about, labels=family.labels)
        for labels, amount in samples.items():
            counter.add_metric(labels, amount)
        return counter
    if family.kind == SUMMARY:                       # the last label of each sample says count or sum
        summary = SummaryMetricFamily(family.name, family.about, labels=family.labels)
        for place in dict.fromkeys(labels[:-1] for labels in samples):
            summary.add_metric(place, int(samples.get((*place, "count"), 0)), samples.get((*place, "sum"), 0.0))
        return summary
    assert family.kind == GAUGE, f"{family.name}: a member cannot tell a {family.kind}"
    gauge = GaugeMetricFamily(family.name, family.about, labels=family.labels)
    for labels, amount in samples.items():
        gauge.add_metric(labels, amount)
    return gauge

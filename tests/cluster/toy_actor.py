"""The toy member as a Ray actor; a module of its own, because Ray's workers import it by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toy_member import build

from kvbank.cluster.actors import MemberActor


class ToyActor(MemberActor):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config, build)

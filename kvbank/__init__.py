"""kvbank: a bank for the KV cache of large language models.

The public face is exported lazily, so that `import kvbank` costs nothing and pulls in neither torch nor Ray.
The sub-packages `cluster`, `kvstore`, `workers`, `proto`, `kernels` are links to the folders of the same name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "LocalCluster": "kvbank.cluster.launcher",
    "Client": "kvbank.cluster.client",
    "AsyncClient": "kvbank.cluster.client",
    "Job": "kvbank.cluster.client",
    "Result": "kvbank.cluster.client",
    "Delta": "kvbank.cluster.client",
    "Receipt": "kvbank.cluster.client",
    "Segment": "kvbank.cluster.client",
    "errors": "kvbank.errors",
}
__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from kvbank import errors as errors
    from kvbank.cluster.client import AsyncClient as AsyncClient
    from kvbank.cluster.client import Client as Client
    from kvbank.cluster.client import Delta as Delta
    from kvbank.cluster.client import Job as Job
    from kvbank.cluster.client import Receipt as Receipt
    from kvbank.cluster.client import Result as Result
    from kvbank.cluster.client import Segment as Segment
    from kvbank.cluster.launcher import LocalCluster as LocalCluster


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kvbank' has no attribute {name!r}")
    module = import_module(_EXPORTS[name])
    return module if name == "errors" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)

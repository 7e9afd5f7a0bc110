"""Machine health: what `kvbank doctor` asks of a machine whatever is to run on it. Numbers come in as a `Machine`.

    packages   there, in the range that kvbank asks for, and kvbank itself only once
    limits     open files, free memory, /dev/shm          clock      not behind the files of this installation
    ports      Ray's head and a Redis both like 6379      GPU        seen by the driver and by torch, or by neither
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

import kvbank
from kvbank.cluster.finding import Finding, bad, good, warn
from kvbank.cluster.screen import size

PACKAGES = ("torch", "ray", "grpcio", "protobuf", "starlette", "uvicorn", "httpx", "redis", "safetensors", "tokenizers",
            "numpy", "msgpack", "prometheus_client")
ENOUGH_FILES = 1024
ENOUGH_MEMORY = 4 << 30
ENOUGH_SHARED = 256 << 20            # Ray's object store of 80 MiB, and what torch and others put there
RAY_PORT = 6379                      # a Ray head and a Redis both like it
TOUCH_S = 0.5                        # for a port of this machine to accept a connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was measured. Tests give other numbers where the real ones cannot be had."""

    cores: int
    open_files: tuple[int, int]      # soft and hard limit
    free_memory: int                 # bytes
    shared_memory: int | None        # bytes free in /dev/shm; None: there is none
    now: float                       # seconds since 1970

    @classmethod
    def seen(cls) -> Machine:
        """This one, now."""
        import psutil

        shared = Path("/dev/shm")
        return cls(
            cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE), free_memory=psutil.virtual_memory().available,
            shared_memory=shutil.disk_usage(shared).free if shared.is_dir() else None, now=time.time(),
        )


def packages() -> Iterator[Finding]:
    """Python, and every package that kvbank asks for, against the range it asks for."""
    python = platform.python_version()
    yield good("python", python) if sys.version_info >= (3, 11) else bad(
        "python", f"{python} is older than 3.11", "install Python 3.11 or newer and make the environment with it")
    try:
        asked = {need.name: need for need in map(Requirement, requires("kvbank") or ())}
    except PackageNotFoundError:                                 # a checkout that is not installed: no range is known
        asked = {}
    for package in PACKAGES:
        need = asked.get(package)
        try:
            found = version(package)
        except PackageNotFoundError:
            yield warn(package, "missing", "pip install ray, or use launcher='process'") if package == "ray" else bad(
                package, "missing", f"pip install '{need or package}', or install kvbank again")
            continue
        fits = need is None or need.specifier.contains(found, prereleases=True)
        yield good(package, found) if fits else bad(
            package, f"{found}, but kvbank asks for {need}", f"pip install '{need}'")


def copies(path: Sequence[str]) -> Iterator[Finding]:
    """kvbank must be on the path once: with two, which one members import depends on where they start."""
    found: dict[Path, str] = {}
    for entry in path:
        inside = Path(entry or ".") / "kvbank" / "__init__.py"
        if inside.is_file():
            found.setdefault(inside.resolve(), str(inside.parent))
    first, *others = list(found.values()) or [str(Path(kvbank.__file__).parent)]
    yield good("kvbank", f"{kvbank.__version__} in {first}") if not others else bad(
        "kvbank", f"on the path {1 + len(others)} times: {first}, also {', '.join(others)}",
        "keep one: `pip uninstall kvbank` in this environment, or take the other folder out of PYTHONPATH")


def limits(machine: Machine) -> Iterator[Finding]:
    """Cores, open files, memory, shared memory."""
    yield good("cores", f"{machine.cores} for this process") if machine.cores > 1 else warn(
        "cores", "1 for this process", "workers share it: expect slow answers, or give the container more")
    soft, hard = machine.open_files
    yield good("open files", f"{soft} of {hard}") if soft >= ENOUGH_FILES else warn(
        "open files", f"{soft} at once (at most {hard})", "ulimit -n 65536, or LimitNOFILE= of the service")
    yield good("free memory", size(machine.free_memory)) if machine.free_memory >= ENOUGH_MEMORY else warn(
        "free memory", size(machine.free_memory), "close other programs, or lower vault.device_blocks and tiers.host_bytes")
    shared = machine.shared_memory
    if shared is None:
        yield warn("shared memory", "no /dev/shm: Ray falls back to files, which is slow", "mount -t tmpfs tmpfs /dev/shm")
    else:
        yield good("shared memory", f"{size(shared)} free") if shared >= ENOUGH_SHARED else warn(
            "shared memory", f"{size(shared)} free in /dev/shm, Ray wants {size(ENOUGH_SHARED)}",
            "docker run --shm-size=1g; on Kubernetes an emptyDir with medium: Memory at /dev/shm")


def clock(machine: Machine, *, witness: Path = Path(__file__)) -> Iterator[Finding]:
    """A clock behind files that were already written is wrong: certificates would not be valid yet."""
    behind_s = witness.stat().st_mtime - machine.now
    yield good("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(machine.now))) if behind_s < 60 else bad(
        "clock", f"behind its own files by {behind_s:.0f} s", "set it: `timedatectl set-ntp true`, or chronyd")


def gpu(device: str = "cpu", *, path: str | None = None) -> Iterator[Finding]:
    """Whether driver and torch agree about a GPU, and whether `engine.device` can be had. `path`: where to look."""
    import torch

    card, usable = shutil.which("nvidia-smi", path=path) is not None, torch.cuda.is_available()
    built = torch.version.cuda                                   # None: a build without CUDA
    if device.startswith("cuda") and not usable:
        yield bad("gpu", f"engine.device is {device}, but torch {torch.__version__} "
                  + ("sees no GPU" if built else "is a build without CUDA"),
                  "use engine.device=cpu, or install the driver" if built else
                  "use engine.device=cpu, or `pip install torch` from an index with CUDA builds")
    elif card and not usable:
        yield warn("gpu", "nvidia-smi is there, but torch cannot use CUDA" + ("" if built else ": it is a build without it"),
                   "install a CUDA build of torch that fits the driver (`nvidia-smi` names its CUDA version)")
    else:
        yield good("gpu", f"{torch.cuda.device_count()} usable" if usable else "none; device=cpu works")


def ports(*, ray_port: int = RAY_PORT) -> Iterator[Finding]:
    """Loopback works; nobody sits where Ray's head wants to."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield good("loopback", "a port can be bound")
    yield warn(f"port {ray_port}", "something listens there: a Ray head or a Redis, which both want it",
               "start Ray with `ray start --head --port=6380`, or move the Redis; kvbank's own use other ports"
               ) if listens("127.0.0.1", ray_port) else good(f"port {ray_port}", "free")


def listens(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as asked:
        asked.settimeout(TOUCH_S)
        return asked.connect_ex((host, port)) == 0

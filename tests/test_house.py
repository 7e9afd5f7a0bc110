"""The rules of the house, checked on every run by reading the sources: floors, doors, forbidden tools, names.

Docs: docs/tour.md (floors), docs/decisions/. Each rule has a planted breach in BREACHES, so that it is known to bite.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["errors", "proto", "kernels", "kvstore", "workers", "cluster"]      # imports go down only
FOLDERS = FLOORS[1:]
ALONE = {"proto", "kernels"}                                                  # import no sibling, not even one below
RAY_FILES = {"cluster/actors.py", "cluster/launcher.py"}
ENV_FILES = {"cluster/config.py"}
HTTP_FILES = {"cluster/client.py", "cluster/client_wire.py"}                  # and everything in cluster/http/
CORES = {
    "kvstore/ledger.py", "kvstore/debt_book.py", "kvstore/messages.py", "cluster/membership.py", "cluster/directory.py",
    "cluster/placement.py", "kvstore/prefetch.py",
}
NOT_IN_CORES = {"time", "random", "asyncio", "threading", "os", "uuid", "torch", "grpc", "secrets", "socket"}
HTTP = {"starlette", "uvicorn", "httpx", "requests", "aiohttp"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUNS_WHAT_IT_READS = {"eval", "exec", "torch.load", "torch.save", "yaml.unsafe_load", "numpy.load", "np.load"}
IMPORT_NAMES = {"grpcio": "grpc", "protobuf": "google", "pyyaml": "yaml", "grpcio-tools": "grpc_tools"}
DRAWERS = {"utils", "util", "common", "helpers", "helper", "base", "manager", "types", "misc"}

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
    if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")) and "__pycache__" not in path.parts
)
BESIDE = sorted(
    path.relative_to(ROOT).as_posix() for folder in ("bench", "tests") for path in (ROOT / folder).rglob("*.py")
)

Rule = Callable[[str, ast.Module], Iterator[str]]


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that the source imports, at the top or inside a function, absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            if node.module == "kvbank":
                yield from (f"kvbank.{alias.name}" for alias in node.names)


def imports_go_down(path: str, tree: ast.Module) -> Iterator[str]:
    here = path.split("/")[0]
    for name in imported(tree):
        root, _, rest = name.partition(".")
        if name.startswith("."):
            yield f"write the whole name instead of the relative {name!r}"
        elif root in FOLDERS:
            yield f"write kvbank.{name}: a bare {root!r} loads the module twice"
        elif root == "kvbank" and rest and here in FOLDERS:
            there = rest.split(".")[0]
            if there not in FLOORS:
                continue
            if FLOORS.index(there) > FLOORS.index(here):
                yield f"{name} is upstairs"
            elif here in ALONE and there not in (here, "errors"):
                yield f"{here} imports no sibling, so not {name}"


def ray_stays_behind_two_doors(path: str, tree: ast.Module) -> Iterator[str]:
    if path not in RAY_FILES and any(name.split(".")[0] == "ray" for name in imported(tree)):
        yield f"Ray is imported in {sorted(RAY_FILES)} only"


def http_lives_in_the_gateway(path: str, tree: ast.Module) -> Iterator[str]:
    if path in HTTP_FILES or path.startswith("cluster/http/") or path.split("/")[0] not in FOLDERS:
        return
    for name in imported(tree):
        if name.split(".")[0] in HTTP:
            yield f"{name}: HTTP lives in cluster/http/ and in the client"


def the_environment_is_read_once(path: str, tree: ast.Module) -> Iterator[str]:
    if path in ENV_FILES or path.split("/")[0] not in FOLDERS:
        return
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in ("environ", "environb", "getenv", "getenvb"):
            yield f"line {node.lineno}: the environment is read in cluster/config.py only"


def no_pickle(path: str, tree: ast.Module) -> Iterator[str]:
    for name in imported(tree):
        if name.split(".")[0] in PICKLES:
            yield f"{name}: nothing of ours is pickled"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in RUNS_WHAT_IT_READS or (called == "yaml.load" and not has_safe_loader(node, tree)):
            yield f"line {node.lineno}: {called} can run what it reads"
        if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
            yield f"line {node.lineno}: allow_pickle"


def has_safe_loader(call: ast.Call, tree: ast.Module) -> bool:
    """Whether a yaml.load names SafeLoader, or a class of the same file that is one."""
    safe = {"yaml.SafeLoader", "SafeLoader"} | {
        node.name for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("SafeLoader") for base in node.bases)
    }
    return any(keyword.arg == "Loader" and ast.unparse(keyword.value) in safe for keyword in call.keywords)


def cores_do_no_io(path: str, tree: ast.Module) -> Iterator[str]:
    if path not in CORES:
        return
    for name in imported(tree):
        if name.split(".")[0] in NOT_IN_CORES:
            yield f"{name}: a core takes time and chance as arguments and touches nothing"
    sets = set_names(tree)
    for node in ast.walk(tree):
        iterated = [node.iter] if isinstance(node, ast.For) else [
            loop.iter for loop in getattr(node, "generators", ())
        ]
        for each in iterated:
            if is_set(each) or ast.unparse(each) in sets:
                yield f"line {each.lineno}: a set has no order, and a core must repeat itself exactly"


def is_set(node: ast.AST) -> bool:
    return isinstance(node, ast.Set | ast.SetComp) or (
        isinstance(node, ast.Call) and ast.unparse(node.func) in ("set", "frozenset")
    )


def set_names(tree: ast.Module) -> set[str]:
    """Names and attributes that are assigned a set, or annotated as one, anywhere in the source."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            if ast.unparse(node.annotation).startswith(("set[", "frozenset[")) or (node.value and is_set(node.value)):
                found.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign) and is_set(node.value):
            found |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.arg) and node.annotation and ast.unparse(node.annotation).startswith("set["):
            found.add(node.arg)
    return found


RULES: list[Rule] = [
    imports_go_down, ray_stays_behind_two_doors, http_lives_in_the_gateway, the_environment_is_read_once, no_pickle,
    cores_do_no_io,
]
BREACHES = [
    (imports_go_down, "kvstore/store.py", "from kvbank.workers.engine import Engine"),
    (imports_go_down, "kernels/store_kv.py", "from kvbank.proto import bank_pb2"),
    (imports_go_down, "tests/kvstore/test_frame.py", "import kvstore.frame"),
    (imports_go_down, "workers/engine.py", "def f():\n    from kvbank import cluster"),
    (imports_go_down, "workers/engine.py", "from .scheduler import Scheduler"),
    (ray_stays_behind_two_doors, "cluster/control.py", "import ray.util"),
    (http_lives_in_the_gateway, "workers/service.py", "import httpx"),
    (the_environment_is_read_once, "workers/engine.py", "from os import environ\nx = environ['A']"),
    (the_environment_is_read_once, "workers/engine.py", "import os\nx = os.getenv('A')"),
    (no_pickle, "kvstore/frame.py", "import cloudpickle"),
    (no_pickle, "cluster/config.py", "import yaml\nyaml.load(text, Loader=yaml.Loader)"),
    (no_pickle, "workers/models/weights.py", "import torch\ntorch.load('x')"),
    (cores_do_no_io, "kvstore/ledger.py", "import time"),
    (cores_do_no_io, "kvstore/ledger.py", "class A:\n def f(self):\n  self.x = set()\n  return [y for y in self.x]"),
]


@pytest.mark.parametrize("path", SOURCES + BESIDE)
def test_the_source_keeps_the_rules_of_the_house(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), path)
    rules = RULES if path in SOURCES else [imports_go_down]
    broken = [f"{rule.__name__}: {said}" for rule in rules for said in rule(path, tree)]
    assert not broken, f"{path}\n" + "\n".join(broken)


@pytest.mark.parametrize(("rule", "path", "source"), BREACHES)
def test_each_rule_bites(rule: Rule, path: str, source: str) -> None:
    assert list(rule(path, ast.parse(source)))


def test_the_five_folders_are_linked_into_the_package_and_have_no_init() -> None:
    for folder in FOLDERS:
        link = ROOT / "kvbank" / folder
        assert link.is_symlink() and os.readlink(link) == f"../{folder}"
        assert not list((ROOT / folder).rglob("__init__.py")), f"{folder}/ is a namespace: no __init__.py"
    assert {path.name for path in (ROOT / "kvbank").glob("*.py")} <= {"__init__.py", "__main__.py", "errors.py"}
    assert list(imported(ast.parse((ROOT / "kvbank/errors.py").read_text()))) == ["__future__"]


def test_no_file_is_a_drawer() -> None:
    assert [path for path in SOURCES if Path(path).stem in DRAWERS] == []


def test_imports_from_outside_and_declared_dependencies_are_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=; ]", line)[0] for line in project["dependencies"]]
    declared = {IMPORT_NAMES.get(name, name) for name in names}
    extras = {"opentelemetry"}                          # kvbank[trace]: imported where tracing is on, and nowhere else
    ours = extras | sys.stdlib_module_names | {"kvbank", "__future__", "grpc_tools"}     # grpc_tools: only to generate
    generated = [path.relative_to(ROOT).as_posix() for path in (ROOT / "proto").glob("*_pb2.py")]
    imports: dict[str, list[str]] = {}
    for path in [*SOURCES, *generated]:
        for name in imported(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if (root := name.split(".")[0]) not in ours:
                imports.setdefault(root, []).append(path)
    assert {name: paths for name, paths in imports.items() if name not in declared} == {}, "declare it, or do without"
    assert declared - set(imports) == set(), "declared in pyproject.toml, and nobody imports it"


def test_every_source_begins_with_a_docstring() -> None:
    trees = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in SOURCES}
    assert [path for path, tree in trees.items() if not ast.get_docstring(tree)] == []


def run(program: str, *arguments: str) -> str:
    """The output of a fresh Python that runs `program` in the checkout; a failed test with its errors otherwise."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_below_the_cluster_imports_where_ray_is_missing() -> None:
    below = [path for path in SOURCES if not path.startswith("cluster/") and path != "proto/generate.py"]
    lines = [f"import kvbank.{path.removesuffix('.py').replace('/', '.')}" for path in below]
    run("\n".join(["import sys", "sys.modules['ray'] = None", *lines]))


def test_the_package_itself_loads_neither_torch_nor_ray() -> None:
    heavy = "('torch', 'ray', 'grpc', 'numpy')"
    assert run(f"import sys, kvbank, kvbank.errors; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_the_generated_protocol_code_is_what_the_proto_files_say(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="needs the dev extra (grpcio-tools) to generate again")
    generate = "from kvbank.proto.generate import generate; generate(Path(sys.argv[1]))"
    run(f"import sys; from pathlib import Path; {generate}", str(tmp_path))
    made = {path.name: path.read_text() for path in (tmp_path / "kvbank" / "proto").iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "proto").glob("*_pb2*.py*") if path.is_file()}
    assert made == kept, "run: python proto/generate.py"

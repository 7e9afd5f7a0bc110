"""kvbank works once installed: the wheel holds the five linked folders as real ones and imports anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cluster", "kernels", "kvstore", "proto", "workers")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a Python of this environment that sees neither the checkout nor PYTHONPATH; its output, or a failed test."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def sources(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built, without the network, from a copy of the checkout: building leaves traces beside pyproject.toml."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 or newer")
    room = tmp_path_factory.mktemp("wheel")
    copy = room / "kvbank"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "kvbank", *FOLDERS):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    run("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", room / "out", cwd=copy)
    (made,) = (room / "out").glob("*.whl")
    return made


def test_the_wheel_holds_every_source_file_of_the_linked_folders_and_nothing_at_the_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for folder in FOLDERS:
        inside = {name.removeprefix(f"kvbank/{folder}/") for name in names if name.startswith(f"kvbank/{folder}/")}
        assert sources(ROOT / folder) <= inside
    pages = {path.name for path in (ROOT / "cluster/http/dashboard").iterdir()}
    assert pages and {f"kvbank/cluster/http/dashboard/{page}" for page in pages} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kvbank"}
    assert {"kvbank/__init__.py", "kvbank/errors.py", "kvbank/py.typed", "kvbank/proto/bank.proto"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_kvbank_imports_from_another_folder_and_is_not_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel, cwd=tmp_path)
    for folder in FOLDERS:
        assert not (target / "kvbank" / folder).is_symlink()
    program = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import kvbank, kvbank.kvstore.layout as layout, kvbank.errors\n"
        "made = layout.Layout(num_layers=2, layer_first=0, layer_last=2, kv_heads=1, head_dim=8)\n"
        "print(kvbank.__version__, made.slot_bytes, kvbank.__file__, layout.__file__)\n"
    )
    version, slot_bytes, *files = run("-c", program, cwd=tmp_path).split()
    assert int(slot_bytes) == 2 * 2 * 1 * 128 * 8 * 4
    assert all(Path(file).is_relative_to(target) for file in files)
    assert f"kvbank-{version}-" in wheel.name

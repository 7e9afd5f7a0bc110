"""Regenerates the committed *_pb2*.py from the .proto files: `python proto/generate.py`. Needs the `dev` extra."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAMES = ["bank", "control", "jobs", "ops"]


def generate(into: Path) -> None:
    """Write `kvbank/proto/<name>_pb2.py` and its stub below `into` for every .proto of this folder."""
    from grpc_tools import protoc

    root = FOLDER.parent
    staged = into / "kvbank" / "proto"
    staged.mkdir(parents=True, exist_ok=True)
    status = protoc.main(
        ["protoc", f"-I{root}", f"--python_out={into}", f"--pyi_out={into}", *[f"kvbank/proto/{n}.proto" for n in NAMES]]
    )
    if status:
        raise SystemExit(f"protoc failed with status {status}")


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as temp:
        generate(Path(temp))
        for made in sorted((Path(temp) / "kvbank" / "proto").iterdir()):
            (FOLDER / made.name).write_text(made.read_text())
            print(made.name, file=sys.stderr)


if __name__ == "__main__":
    main()

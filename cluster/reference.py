"""Reference: the pages docs/configuration.md and docs/python.md, made from the code that they describe.

    SECTIONS of cluster/settings.py                            --> docs/configuration.md
    public classes, their docstrings and fields' comments      --> docs/python.md

`python -m kvbank.cluster.reference` writes both into a checkout; a test compares them with what it would write, so a page
cannot say what the code does not. Knows no cluster; reads nothing but the sources.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import kvbank
from kvbank import errors
from kvbank.cluster import client
from kvbank.cluster.config import ENV_PREFIX
from kvbank.cluster.settings import SECTIONS

DOCS = Path(kvbank.__file__).resolve().parent.parent / "docs"
WIDTH = 120                                  # of a signature before it is broken into lines
PUBLIC = ("LocalCluster", "Client", "AsyncClient", "Job", "AsyncJob", "Result", "Delta", "Receipt", "Segment", "Status",
          "WorkerStatus", "LoanStatus", "TierStatus", "JobStatus")
MADE = "Made by `python -m kvbank.cluster.reference`: change the code, not this page."

EXAMPLE = """\
cluster:
  launcher: process          # plain subprocesses; the default is ray
  lenders: 2
engine:
  model: bench/needle/model
  exactness: bitwise
vault:
  device_blocks: 64          # 1,024 tokens of each member
tiers:
  host_bytes: 64MiB
  redis: embedded
http:
  port: 8080
"""


def pages() -> dict[str, str]:
    """File name below docs/ -> its text."""
    return {"configuration.md": configuration(), "python.md": python()}


def main(folder: Path = DOCS) -> int:
    """Write the pages into `folder`; the exit status."""
    if not folder.is_dir():
        print("there is no docs folder beside kvbank: run this in a checkout", file=sys.stderr)
        return 1
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(f"docs/{name}")
    return 0


# -- settings ----------------------------------------------------------------------------------------------------------

def configuration() -> str:
    """Every setting of every section."""
    parts = [f"""\
# Settings

{MADE}

A cluster has one tree of settings. Later sources win: **default < config file < environment < flag or keyword**.

- **File**: `kvbank up --config FILE` or `LocalCluster(config="FILE")`, YAML or TOML, keys in their sections. \
A relative path counts from where the command runs.
- **Environment**: `{ENV_PREFIX}SECTION__KEY`, for example `{ENV_PREFIX}VAULT__DEVICE_BLOCKS=64`.
- **Flag**: `--set SECTION.KEY=VALUE`; some settings have a flag of their own (`kvbank up --help`).
- **Keyword**: `LocalCluster(model, device_blocks=64)`. Names are unique over the sections, so the section may be left out.

An unknown name, a value out of range, or two values that disagree are a `ConfigError` before anything starts. \
`kvbank status --config` shows every setting in force and where it came from; secrets are masked.

Durations are in seconds. A size is a number of bytes or a text like `256MiB` or `1.5GB`. \
Where `none` is allowed, it is written `none`, `null` or empty. \
How settings that bound a wait play together: [promises](promises.md). \
Which to change for what: [operations](operations.md).

## An example file

```yaml
{EXAMPLE}```"""]
    for section, cls in SECTIONS.items():
        rows = [_setting(section, spec) for spec in fields(cls)]
        parts.append(f"## {section}\n\n{inspect.getdoc(cls)}\n\n" + _table(
            ("Setting", "Default", "May be", "Meaning", "Environment"), rows))
    return "\n\n".join(parts) + "\n"


def _setting(section: str, spec: Field[Any]) -> tuple[str, ...]:
    rules = spec.metadata
    default = {} if spec.default is MISSING else spec.default
    return (f"`{section}.{spec.name}`", f"`{_plain(rules, default)}`", _allowed(rules), _cell(str(rules["about"])),
            f"`{ENV_PREFIX}{section.upper()}__{spec.name.upper()}`")


def _plain(rules: Mapping[str, Any], value: Any) -> str:
    """A default as a user would write it."""
    if value is None:
        return "none"
    if value == "":
        return '""'
    if rules["kind"] == "size":
        return _size(value)
    if isinstance(value, float):
        return f"{value:.10g}"
    return value if isinstance(value, str) else json.dumps(value)


def _size(value: int) -> str:
    for unit, name in ((50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value and value % (1 << unit) == 0:
            return f"{value >> unit}{name}"
    return str(value)


def _allowed(rules: Mapping[str, Any]) -> str:
    """Kind and range in words."""
    kind = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "path": "path", "size": "size",
            "keys": "mapping"}[rules["kind"]]
    low, high = rules.get("low"), rules.get("high")
    if choices := rules.get("choices"):
        kind = " or ".join(f"`{choice}`" for choice in choices)
    elif pattern := rules.get("pattern"):
        kind += f" of the form `{_cell(pattern)}`"
    elif low is not None and high is not None:
        kind += f", {_number(rules, low)} to {_number(rules, high)}"
    elif low is not None:
        kind += f", {_number(rules, low)} or more"
    elif high is not None:
        kind += f", at most {_number(rules, high)}"
    return kind + (", or none" if rules.get("none") else "") + ("; secret" if rules.get("secret") else "")


def _number(rules: Mapping[str, Any], value: float) -> str:
    return _size(int(value)) if rules["kind"] == "size" else f"{value:,}" if isinstance(value, int) else f"{value:g}"


# -- Python ------------------------------------------------------------------------------------------------------------

def python() -> str:
    """Every public class, and the tree of errors."""
    beside = "`, `".join(name for name in PUBLIC if name not in kvbank.__all__)
    parts = [f"""\
# Python

{MADE}

```python
from kvbank import Client, LocalCluster, errors
```

`import kvbank` loads neither torch nor Ray; a name is loaded when it is first used. Names that `kvbank` itself does not \
have (`{beside}`) are in `kvbank.cluster.client`. A **prompt** is a string, a list of token ids, or a list of \
`Segment`s and strings."""]
    parts += [_class(_public(name)) for name in PUBLIC]
    parts.append("## Errors\n\n`kvbank.errors`. KVBankError is the root; every failure that reaches a caller is one of "
                 "these. `code` never changes and is the same over HTTP. `param` names the field of a request "
                 "that is at fault, or a path into it such as `messages[0].role`.\n\n" + _table(
                     ("Error", "Code", "HTTP", "Meaning"), list(_errors(errors.KVBankError))))
    return "\n\n".join(parts) + "\n"


def _public(name: str) -> type:
    found = getattr(kvbank, name) if name in kvbank.__all__ else getattr(client, name)
    assert isinstance(found, type)
    return found


def _class(cls: type) -> str:
    parts = [f"## {cls.__name__}", f"```python\n{_signature(cls.__name__, cls)}\n```" if not is_dataclass(cls) else "",
             _paragraphs(cls)]
    if is_dataclass(cls):
        said = _comments(cls)
        parts.append(_table(("Field", "Type", "Default", "Meaning"), [
            (f"`{spec.name}`", f"`{_cell(str(spec.type))}`", _default(spec), said.get(spec.name, ""))
            for spec in fields(cls)]))
    parts += [_member(name, value) for name, value in vars(cls).items()
              if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))]
    return "\n\n".join(part for part in parts if part)


def _member(name: str, value: Any) -> str:
    """A method or a property."""
    if isinstance(value, property):
        return f"**`{name}`**: {_paragraphs(value)}"
    waits = "async " if inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value) else ""
    return f"```python\n{_signature(waits + name, value)}\n```\n\n{_paragraphs(value)}"


def _signature(name: str, called: Any) -> str:
    """The call as one writes it, annotations as they stand in the source."""
    words, starred = [], False
    signature = inspect.signature(called)
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        star = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        words.append(f"{star}{parameter.name}: {parameter.annotation}{default}")
    answer = "" if signature.return_annotation in (signature.empty, None) or isinstance(called, type) else (
        f" -> {signature.return_annotation}")
    line = f"{name}({', '.join(words)}){answer}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *_lines(words), f"){answer}"])


def _lines(words: list[str]) -> Iterator[str]:
    line = "   "
    for word in words:
        if len(line) + len(word) + 2 > WIDTH:
            yield line
            line = "   "
        line += f" {word},"
    yield line.rstrip(",")


def _comments(cls: type) -> dict[str, str]:
    """What stands behind the fields in the source."""
    found = {}
    for line in inspect.getsource(cls).splitlines():
        if at := re.fullmatch(r"    (\w+): [^#]*#\s*(.+)", line):
            found[at[1]] = _cell(at[2])
    return found


def _default(spec: Field[Any]) -> str:
    if spec.default is not MISSING:
        return f"`{spec.default!r}`"
    return "" if spec.default_factory is MISSING else f"`{spec.default_factory()!r}`"


def _errors(root: type[errors.KVBankError], depth: int = 0) -> Iterator[tuple[str, ...]]:
    indent = "&nbsp;" * 4 * depth
    yield f"{indent}`{root.__name__}`", f"`{root.code}`", str(root.http_status), _cell(inspect.getdoc(root) or "")
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _errors(child, depth + 1)


# -- Markdown ----------------------------------------------------------------------------------------------------------

def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _cell(text: str) -> str:
    """A bar would end the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _paragraphs(described: Any) -> str:
    """Its docstring; a paragraph that lists arguments keeps its lines."""
    parts = (inspect.getdoc(described) or "").split("\n\n")
    return "\n\n".join(f"```text\n{part}\n```" if re.match(r"\w+: {2,}", part) else " ".join(part.split()) for part in parts)


if __name__ == "__main__":
    sys.exit(main())

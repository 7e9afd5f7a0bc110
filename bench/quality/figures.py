"""Two figures as SVG, without a plotting library: the needle by length and depth, and accuracy against bytes and speed."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

from bench.quality.table import TEXT, mean

CELL, LABEL = 26, 130
WIDTH, HEIGHT, LEFT, TOP = 380, 300, 60, 50
COLOURS = ("#222222", "#c0392b", "#d08a1d", "#2f6fb3", "#7a9e3a", "#8e5aa8", "#3aa5a0", "#b05a7a", "#5a6ab0", "#777777")


class Point(NamedTuple):
    """One policy and budget, over the tasks that tell."""

    policy: str
    budget: float
    share: float
    low: float
    high: float
    bytes_per_token: float
    speed: float


# -- the needle --------------------------------------------------------------------------------------------------------

def heat_map(results: dict[str, Any]) -> str:
    """A panel per policy (a column) and budget (a row): length across, depth down, share as colour and in percent."""
    grid = results["grid"]
    lengths, depths = sorted({cell["length"] for cell in grid}), sorted({cell["where"]["depth"] for cell in grid})
    policies = list(dict.fromkeys(cell["policy"] for cell in grid))
    budgets = sorted({cell["budget"] for cell in grid}, reverse=True)
    wide, high = CELL * len(lengths) + 40, CELL * len(depths) + 50
    drawn = []
    for cell in grid:
        x = LABEL + policies.index(cell["policy"]) * wide + lengths.index(cell["length"]) * CELL
        y = TOP + budgets.index(cell["budget"]) * high + depths.index(cell["where"]["depth"]) * CELL
        said = f"{cell['policy']} {cell['budget']:.2%}: {cell['right']} of {cell['of']}, {cell['low']:.0%} to {cell['high']:.0%}"
        drawn.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{_heat(cell["share"])}"><title>{said}</title>'
                     "</rect>")
        drawn.append(_text(x + CELL / 2, y + CELL / 2 + 4, f"{100 * cell['share']:.0f}", "middle", size=9))
    for at, policy in enumerate(policies):
        drawn.append(_text(LABEL + at * wide, TOP - 14, policy))
        drawn += [_text(LABEL + at * wide + CELL * (number + 0.5), TOP + high * len(budgets) - 36, f"{length}", "middle", size=8)
                  for number, length in enumerate(lengths)]
    for at, budget in enumerate(budgets):
        drawn.append(_text(8, TOP + at * high + 14, f"budget {budget:.2%}"))
        drawn += [_text(LABEL - 8, TOP + at * high + CELL * (number + 0.5) + 4, f"{depth:g}", "end", size=9)
                  for number, depth in enumerate(depths)]
    return _svg(LABEL + wide * len(policies), TOP + high * len(budgets), drawn)


def _heat(share: float) -> str:
    """From red over yellow to green, light enough to write on."""
    red, green = (230, round(120 + 220 * share)) if share < 0.5 else (round(230 - 240 * (share - 0.5)), 230)
    return f"#{red:02x}{min(230, green):02x}78"


# -- accuracy against bytes and speed ----------------------------------------------------------------------------------

def pareto(results: dict[str, Any]) -> str:
    """Left: accuracy over device bytes, with the 95 % band. Right: the same over decoding speed, the front as a line."""
    tasks = [name for name, said in results["tasks"].items() if name != TEXT and not said["not_discriminative"]]
    told = f"mean of {', '.join(tasks)}"
    if not tasks:
        tasks = [name for name in results["tasks"] if name != TEXT]
        told = f"no task is discriminative; mean of {', '.join(tasks)}"
    points = _points(results, tasks)
    if not points:
        return _svg(LEFT, TOP, [])
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(dict.fromkeys(point.policy for point in points))}
    drawn = [_text(LEFT, 18, told), *_bytes_panel(points, colours), *_speed_panel(points, colours)]
    sees = results["config"]["query_aware"]
    drawn += [_text(LEFT + at * 135, TOP + HEIGHT + 58, f"{name} (sees the question)" if sees[name] else name, fill=colour)
              for at, (name, colour) in enumerate(colours.items())]
    return _svg(max(2 * (LEFT + WIDTH) + 40, LEFT + 135 * len(colours)), TOP + HEIGHT + 75, drawn)


def _points(results: dict[str, Any], tasks: list[str]) -> list[Point]:
    """The interval of a mean of shares: as wide as the tasks' own, independent of each other."""
    by_key: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in results["rows"]:
        if row["task"] in tasks:
            by_key[row["policy"], row["budget"]].append(row)
    points = []
    for (policy, budget), rows in by_key.items():
        share = mean([row["share"] for row in rows])
        down, up = (math.sqrt(sum((row[side] - row["share"]) ** 2 for row in rows)) / len(rows) for side in ("low", "high"))
        points.append(Point(policy, budget, share, max(0.0, share - down), min(1.0, share + up),
                            mean([row["device_bytes_per_token"] for row in rows]), results["speed"][policy][f"{budget:g}"]))
    return points


def _bytes_panel(points: list[Point], colours: dict[str, str]) -> list[str]:
    least, most = (pick(math.log2(point.bytes_per_token) for point in points) for pick in (min, max))
    x = _scale(least, most, LEFT)
    drawn = _frame(LEFT, "device bytes per token of context", [
        (x(mark), f"{2.0**mark:g}") for mark in range(math.ceil(least), math.floor(most) + 1)])
    for name, colour in colours.items():
        own = sorted((point for point in points if point.policy == name), key=lambda point: point.bytes_per_token)
        at = [(x(math.log2(point.bytes_per_token)), point) for point in own]
        band = [*((px, _y(point.high)) for px, point in at), *((px, _y(point.low)) for px, point in reversed(at))]
        drawn.append(f'<polygon points="{_path(band)}" fill="{colour}" opacity="0.12"/>')
        dashed = ' stroke-dasharray="5 3"' if name.startswith("random") else ""
        line = _path([(px, _y(point.share)) for px, point in at])
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}"{dashed}/>')
        drawn += [_dot(px, point, colour) for px, point in at]
    return drawn


def _speed_panel(points: list[Point], colours: dict[str, str]) -> list[str]:
    left = 2 * LEFT + WIDTH
    least, most = (pick(point.speed for point in points) for pick in (min, max))
    x = _scale(least, most, left)
    marks = [least + (most - least) * part / 4 for part in range(5)]
    drawn = _frame(left, "decoded tokens per second", [(x(mark), f"{mark:.0f}") for mark in marks])
    front = [point for point in sorted(points, key=lambda point: point.speed)
             if not any(other.speed >= point.speed and other.share > point.share for other in points)]
    line = _path([(x(point.speed), _y(point.share)) for point in front])
    drawn.append(f'<polyline points="{line}" fill="none" stroke="#999999"/>')
    drawn += [_dot(x(point.speed), point, colours[point.policy]) for point in points]
    return drawn


def _frame(left: float, title: str, marks: list[tuple[float, str]]) -> list[str]:
    drawn = [f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#cccccc"/>',
             _text(left + WIDTH / 2, TOP + HEIGHT + 36, title, "middle")]
    drawn += [_text(left - 6, _y(share) + 4, f"{share:.0%}", "end", size=10) for share in (0, 0.25, 0.5, 0.75, 1)]
    return drawn + [_text(px, TOP + HEIGHT + 16, said, "middle", size=10) for px, said in marks]


def _dot(x: float, point: Point, colour: str) -> str:
    said = f"{point.policy} {point.budget:.2%}: {point.share:.1%}, {point.bytes_per_token:.0f} B/token, {point.speed:.0f} tok/s"
    return f'<circle cx="{x:.1f}" cy="{_y(point.share):.1f}" r="3.5" fill="{colour}"><title>{said}</title></circle>'


def _scale(least: float, most: float, left: float) -> Any:
    """From values to pixels, a little away from the frame."""
    room = (most - least) or 1.0
    return lambda value: left + 12 + (value - least) / room * (WIDTH - 24)


def _y(share: float) -> float:
    return TOP + (1 - share) * HEIGHT


def _path(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, said: str, anchor: str = "start", *, size: int = 12, fill: str = "#333333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{said}</text>'


def _svg(width: float, height: float, drawn: list[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">\n'
            '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(drawn) + "\n</svg>\n")

"""A run's log as one SVG: loss and answers right over tokens. Needs no plotting library."""

from __future__ import annotations

import json
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP = 720, 300, 50, 20
COLOURS = {"loss": "#777777", "copy": "#7a9e3a", "recall": "#2f6fb3", "needle": "#c0392b", "compare": "#8e5aa8",
           "track": "#d08a1d", "stream": "#3aa5a0"}


def draw_loss(log: Path, target: Path) -> None:
    """Curves smoothed over five reports; loss on the right-hand scale of its own, 0 to its largest value."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if len(lines) < 2:
        return
    most = lines[-1]["tokens"]
    top = max(line["loss"] for line in lines)
    curves = {"loss": [(line["tokens"], line["loss"] / top) for line in lines]}
    for line in lines:
        for task, share in line["right"].items():
            curves.setdefault(task, []).append((line["tokens"], share))
    drawn = [_frame(most, top)]
    for at, (name, points) in enumerate(curves.items()):
        colour = COLOURS.get(name, "#333333")
        path = " ".join(f"{LEFT + x / most * WIDTH:.1f},{TOP + (1 - y) * HEIGHT:.1f}" for x, y in _smooth(points))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        drawn.append(f'<text x="{LEFT + 10 + at * 90}" y="{TOP + HEIGHT + 38}" fill="{colour}">{name}</text>')
    size = f'width="{WIDTH + LEFT + 50}" height="{HEIGHT + TOP + 50}"'
    target.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
                      + "\n".join(drawn) + "\n</svg>\n")


def _smooth(points: list[tuple[float, float]], over: int = 5) -> list[tuple[float, float]]:
    return [(points[at][0], sum(y for _, y in near) / len(near))
            for at in range(len(points)) if (near := points[max(0, at - over + 1): at + 1])]


def _frame(tokens: int, loss: float) -> str:
    marks = [f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#cccccc"/>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = TOP + (1 - share) * HEIGHT
        marks.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{share:.0%}</text>')
        marks.append(f'<text x="{LEFT + WIDTH + 6}" y="{y + 4}" fill="#777777">{share * loss:.1f}</text>')
        x = LEFT + share * WIDTH
        marks.append(f'<text x="{x}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{share * tokens / 1e6:.1f}M</text>')
    return "\n".join(marks)

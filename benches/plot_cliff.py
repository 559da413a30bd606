#!/usr/bin/env python3
"""Draws the table "adapters | TTFT p50, ms | TTFT p99, ms | ..." of a results file as an SVG, with SGLang's reported figures beside it.

    python benches/plot_cliff.py benches/results/2026-11-25-h100-server.md benches/results/2026-11-25-cliff.svg

Both axes are logarithmic. Needs nothing but Python.
"""
import math
import pathlib
import sys

# Median TTFT that SGLang reports for 8 and for 16 adapters in 8 slots (its own figures, quoted in the results file; not measured here).
SGLANG = {8: 40.0, 16: 6278.0}
WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 610, 40, 320
COLOURS = {"polylora p50": "#1a6fb5", "polylora p99": "#7fb2dc", "SGLang p50, as reported": "#c0392b"}


def read_table(path):
    """The rows of the last such table: adapters -> (p50, p99)."""
    rows, inside = {}, False
    for line in pathlib.Path(path).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:3] == ["adapters", "TTFT p50, ms", "TTFT p99, ms"]:
            rows, inside = {}, True
        elif inside and not line.startswith("|"):
            inside = False
        elif inside and not cells[0].startswith("-"):
            rows[int(cells[0])] = (float(cells[1]), float(cells[2]))
    assert len(rows) >= 3, f"{path} has no such table"
    return rows


def main():
    source, target = sys.argv[1:]
    rows = read_table(source)
    series = {
        "polylora p50": {number: row[0] for number, row in rows.items()},
        "polylora p99": {number: row[1] for number, row in rows.items()},
        "SGLang p50, as reported": SGLANG,
    }
    xs = sorted({number for points in series.values() for number in points})
    ticks = [10, 100, 1000, 10000]

    def x_of(number):
        return LEFT + (RIGHT - LEFT) * math.log(number / xs[0]) / math.log(xs[-1] / xs[0])

    def y_of(milliseconds):
        return BOTTOM - (BOTTOM - TOP) * math.log(milliseconds / ticks[0]) / math.log(ticks[-1] / ticks[0])

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        "<title>Time to first token by the number of adapters, 8 in a batch</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">Time to first token, ms, by the number of adapters (8 in a batch, 12 requests/s)</text>',
    ]
    for tick in ticks:
        y = y_of(tick)
        out.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,}</text>')
    for number in xs:
        x = x_of(number)
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 5}" stroke="black"/>')
        out.append(f'<text x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="middle">{number}</text>')
    out.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}" stroke="black"/>')
    out.append(f'<text x="{(LEFT + RIGHT) / 2:.0f}" y="{BOTTOM + 38}" text-anchor="middle">adapters, uniformly requested</text>')
    for place, (name, points) in enumerate(series.items()):
        colour = COLOURS[name]
        at = [(x_of(number), y_of(value), value) for number, value in sorted(points.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in at)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, value in at:
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{value:g} ms</title></circle>')
        x, y = RIGHT - 190, TOP + 30 + 20 * place
        out.append(f'<line x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{x + 30}" y="{y + 4}">{name}</text>')
    out.append("</svg>")
    pathlib.Path(target).write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()

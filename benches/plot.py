#!/usr/bin/env python3
"""Draws benches/throughput.svg: tokens a second against streams, one line for each label.

Reads JSON that `quire bench model --json` and `quire bench serve --json` wrote: the files named on the command line, or all
of benches/*.json. Of a model's figures the decodes at one depth count (the least, unless --depth says another); of a
load's, the output tokens of each closed loop. Needs Python's standard library only.
"""
import argparse
import json
import math
import pathlib
import sys
from xml.sax.saxutils import escape

HERE = pathlib.Path(__file__).resolve().parent
WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 48, 56
# Distinct in print and for most who see colours otherwise (Okabe and Ito 2008).
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]


def points_of(figures, depth):
    """[(label, streams, tokens a second)] of one file's figures; none where they are of another kind."""
    if isinstance(figures, list):
        return [point for each in figures for point in points_of(each, depth)]
    if not isinstance(figures, dict):
        return []
    label = figures.get("label", "")
    if "rows" in figures:
        decodes = [row for row in figures["rows"] if row["kind"] == "decode"]
        wanted = depth if depth is not None else min((row["depth"] for row in decodes), default=0)
        return [(label, row["batch"], row["tokens_per_second"]) for row in decodes if row["depth"] == wanted]
    if figures.get("concurrency") and "output_tokens_per_second" in figures:
        return [(label, figures["concurrency"], figures["output_tokens_per_second"])]
    return []


def nice_step(top):
    """A step of 1, 2 or 5 times a power of ten that divides 0 to top into four to ten parts."""
    power = 10 ** math.floor(math.log10(top / 4))
    return max(step for step in (power, 2 * power, 5 * power) if step <= top / 4)


def draw(lines):
    streams = sorted({x for points in lines.values() for x, _ in points})
    top = max(y for points in lines.values() for _, y in points) or 1.0
    step = nice_step(top)
    top = math.ceil(top / step) * step
    first, last = math.log2(streams[0]), math.log2(streams[-1])

    def x_of(value):
        share = (math.log2(value) - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y_of(value):
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="26" font-size="16">Output tokens a second against streams</text>',
    ]
    for index in range(round(top / step) + 1):
        y = y_of(index * step)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{index * step:g}</text>')
    for value in streams:
        out.append(f'<text x="{x_of(value):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{value}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle:.1f}" y="{HEIGHT - 14}" text-anchor="middle">streams</text>')
    # Names beside the lines' ends, apart from each other.
    ends = sorted((y_of(points[-1][1]), name) for name, points in lines.items())
    label_y, lowest = {}, -math.inf
    for y, name in ends:
        lowest = max(y, lowest + 17)
        label_y[name] = lowest
    for index, (name, points) in enumerate(sorted(lines.items())):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in points:
            out.append(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.5" fill="{colour}"/>')
        text = f'x="{x_of(points[-1][0]) + 10:.1f}" y="{label_y[name] + 4:.1f}" fill="{colour}"'
        out.append(f"<text {text}>{escape(name)}</text>")
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("files", nargs="*", type=pathlib.Path, help="figures [default: benches/*.json]")
    args.add_argument("--depth", type=int, help="tokens before those that are decoded [default: the least of each file]")
    args.add_argument("--out", type=pathlib.Path, default=HERE / "throughput.svg")
    args = args.parse_args()
    lines = {}
    for path in args.files or sorted(HERE.glob("*.json")):
        for label, streams, pace in points_of(json.loads(path.read_text()), args.depth):
            lines.setdefault(label, {})[streams] = pace
    if not lines:
        sys.exit("no figures of streams in these files")
    args.out.write_text(draw({label: sorted(points.items()) for label, points in lines.items()}))


if __name__ == "__main__":
    main()

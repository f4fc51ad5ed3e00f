#!/usr/bin/env python3
"""Makes the tables of benches/RESULTS.md of what run.sh wrote.

    table.py FOLDER     Markdown on standard output: what was checked, then figures beside their aims

What is not there is said, not left out. Needs Python's standard library only.
"""
import json
import pathlib
import sys

CORRECTNESS = [
    ("kernels", "operations against their meaning"),
    ("parity", "models of the fixtures"),
    ("bits", "same bits in batches of 1 to 256"),
]
# Streams, and the least output tokens a second behind 1,024 tokens, on an H200.
DECODE_AIMS = {1: 240, 32: 5500, 256: 15000}
ATTENTION_AIM, SKINNY_AIM, LARGE_AIM = 0.8, 0.8, 0.7
PROMPT_AIM_MS, READY_AIM_SECONDS, SERVED_AIM = 28, 6, 0.95


def load(folder):
    """Every part that left JSON, by name."""
    parts = {}
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        try:
            parts[path.stem] = json.loads(path.read_text())
        except json.JSONDecodeError:
            parts[path.stem] = {"skipped": "its file is cut off"}
    return parts


def missing(parts, name):
    """Why a part has no figures; None where it has."""
    if name not in parts:
        return "was not run"
    return parts[name].get("skipped")


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def verdict(value, aim, at_least=True):
    return "met" if (value >= aim if at_least else value <= aim) else "not met"


def correctness(parts):
    rows = []
    for name, what in CORRECTNESS:
        why = missing(parts, name)
        if why:
            rows.append([what, "", "", why])
            continue
        tests = parts[name]["tests"]
        bad = [f"{test['name']} ({test['status']})" for test in tests if test["status"] != "passed"]
        rows.append([what, parts[name]["passed"], parts[name]["failed"], ", ".join(bad)])
    return table(["checked", "passed", "failed", "which"], rows)


def key(row):
    return row["op"], row["shape"].split(", block")[0], row["batch"], row.get("new_tokens"), row.get("context")


def ops(parts, name, what, ratio, aim):
    """One table of operations, with torch's time on the same shape where there is one."""
    why = missing(parts, name)
    if why:
        return f"{what}: {why}."
    peers = {key(row): row for row in parts.get("peers", {}).get("rows", [])}
    rows = []
    for row in parts[name]["rows"]:
        peer = peers.get(key(row))
        tokens = "" if row["context"] is None else f"{row['new_tokens']} of {row['context']}"
        against_peer = peer["microseconds"] / row["microseconds"] if peer else None
        if ratio == "peer":
            value = against_peer
        else:
            # Prompts are bound by products, and little attention by launches: they have no aim.
            is_much = row["op"] == "linear" or row["batch"] * row["context"] >= 100_000
            value = row[ratio] if (row["new_tokens"] or 1) == 1 and is_much else None
        rows.append([
            row["shape"], row["format"], row["batch"], tokens, f"{row['microseconds']:.1f}",
            f"{row['gb_per_second']:.0f} ({row['read_ratio']:.0%})", f"{row['gflops'] / 1e3:.1f} ({row['compute_ratio']:.0%})",
            f"{against_peer:.2f} x" if peer else "", verdict(value, aim) if value is not None and aim else "",
        ])
    header = ["shape", "format", "batch", "tokens", "us", "GB/s (of read)", "TFLOP/s (of mma.sync)", "torch's time", f"aim {aim:.0%}" if aim else "aim"]
    left = parts[name].get("left_out") or []
    note = f"\n\nNo memory for: {', '.join(left)}." if left else ""
    return f"{what}:\n\n{table(header, rows)}{note}"


def model(parts):
    why = missing(parts, "model")
    if why:
        return f"Llama-3.1-8B's shape, bf16, random weights: {why}."
    peers = {(row["batch"], row["depth"]): row for row in parts.get("generate", {}).get("rows", [])}
    rows = []
    for row in parts["model"]["rows"]:
        if row["kind"] == "prefill":
            value = f"{row['milliseconds']:.1f} ms"
            rows.append([f"prompt of {row['num_tokens']}", value, f"{row['compute_ratio']:.0%}", "", verdict(row["milliseconds"], PROMPT_AIM_MS, False)])
            continue
        aim = DECODE_AIMS.get(row["batch"]) if row["depth"] == 1024 else None
        peer = peers.get((row["batch"], row["depth"]))
        rows.append([
            f"{row['batch']} streams behind {row['depth']}", f"{row['tokens_per_second']:.0f} tokens/s", f"{row['read_ratio']:.0%}",
            f"{peer['tokens_per_second']:.0f}" if peer else "", verdict(row["tokens_per_second"], aim) if aim else "",
        ])
    header = ["Llama-3.1-8B's shape, bf16, random weights", "figure", "of the limit", "transformers", "aim"]
    return table(header, rows)


def serving(parts):
    lines = []
    for name in ["modules", "ready", "served"]:
        why = missing(parts, name)
        if why:
            lines.append([name, why, ""])
    if not missing(parts, "modules"):
        lines.append(["device code: first start, later starts", "{cold_seconds:.1f}, {warm_seconds:.1f} s".format(**parts["modules"]), ""])
    if not missing(parts, "ready"):
        seconds = parts["ready"]["ready_seconds"]
        lines.append(["ready after exec", f"{seconds:.2f} s", verdict(seconds, READY_AIM_SECONDS, False)])
    if not missing(parts, "served"):
        served = parts["served"]["figures"]
        pace = served["output_tokens_per_second"]
        offline = [
            row["tokens_per_second"] for row in parts.get("model", {}).get("rows", [])
            if (row["kind"], row["batch"], row["depth"]) == ("decode", served["concurrency"], 544)
        ]
        share = f", {pace / offline[0]:.0%} of decoding offline" if offline else ""
        aim = verdict(pace / offline[0], SERVED_AIM) if offline else ""
        lines.append([f"{served['concurrency']} streams through HTTP", f"{pace:.0f} tokens/s{share}", aim])
        failures = served.get("failures") or {}
        if failures:
            lines.append(["failed requests", ", ".join(f"{name}: {count}" for name, count in failures.items()), ""])
    return table(["serving", "figure", "aim"], lines)


def render(folder):
    parts = load(folder)
    facts = parts.get("facts", {})
    title = f"{facts['date']}, {facts['card']}, {facts['cores']} cores" if "card" in facts else f"no card: {facts.get('skipped', 'not looked for')}"
    peaks = next((parts[name]["peaks"] for name in ["attention", "skinny", "large", "model"] if "peaks" in parts.get(name, {})), None)
    limits = (
        f"Read at most {peaks['read_gb_per_second']:.0f} GB/s; `mma.sync` at most {peaks['bf16_gflops'] / 1e3:.0f} TFLOP/s in bf16, "
        f"{peaks['int8_gops'] / 1e3:.0f} TOP/s in int8." if peaks else "Limits were not measured."
    )
    theirs = parts.get("peers", {}).get("peaks")
    if theirs:
        limits += (
            f" By torch: copying {theirs['copy_gb_per_second']:.0f} GB/s, a product of 8192 {theirs['bf16_gflops'] / 1e3:.0f} TFLOP/s."
        )
    return "\n\n".join([
        f"## {title}",
        f"`benches/gpu/run.sh`. {limits}",
        correctness(parts),
        ops(parts, "attention", "Attention", "read_ratio", ATTENTION_AIM),
        ops(parts, "skinny", "Products of few rows", "read_ratio", SKINNY_AIM),
        ops(parts, "large", "Products of many rows", "peer", LARGE_AIM),
        ops(parts, "formats", "Other formats", "read_ratio", None),
        model(parts),
        serving(parts),
    ]) + "\n"


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.stdout.write(render(sys.argv[1]))


if __name__ == "__main__":
    main()

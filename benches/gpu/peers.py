#!/usr/bin/env python3
"""The shapes that `quire bench` measures, by torch and transformers, as JSON of the same form.

    peers.py ops FILE               products by torch.matmul, attention by scaled_dot_product_attention
    peers.py generate MODEL FILE    the model's shape with random weights, by transformers: generate, and its continuous batching

Says in one line why not where torch, transformers or a card is missing.
"""
import json
import pathlib
import statistics
import sys
import time

LINEAR = [(6144, 4096, ""), (4096, 4096, ""), (28672, 4096, " gate-up"), (4096, 14336, "")]
VOCABULARY = (128256, 4096, "")
SKINNY, LARGE = [1, 8, 16, 32, 64], [2048, 4096, 8192]
# Sequences, new tokens of each, all of each.
ATTENTION = [(32, 1, 4096), (256, 1, 1024), (1, 1, 8192), (1, 1024, 1024)]
HEADS, KV_HEADS, DIM = 32, 8, 128
# More than any cache holds.
DATA_BYTES = 512 << 20


def need_torch():
    try:
        import torch
    except ImportError:
        sys.exit("torch is not installed here")
    if not torch.cuda.is_available():
        sys.exit("torch sees no card")
    return torch


def seconds_of(torch, run, sets, budget=0.2):
    """Median seconds of `run(set)`, by events around a graph that runs all sets in turn."""
    for data in sets[:2]:
        run(data)
    torch.cuda.synchronize()
    num_runs = max(len(sets), 8 // len(sets) * len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(num_runs):
            run(sets[index % len(sets)])
    times, began = [], time.monotonic()
    while len(times) < 3 or time.monotonic() - began < budget:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / num_runs)
    return statistics.median(times)


def row(op, shape, batch, seconds, num_bytes, flops, new_tokens=None, context=None):
    return {
        "op": op, "shape": shape, "format": "bf16", "batch": batch, "new_tokens": new_tokens, "context": context,
        "microseconds": seconds * 1e6, "gb_per_second": num_bytes / seconds / 1e9, "gflops": flops / seconds / 1e9,
    }


def products(torch, rows):
    for out_features, in_features, suffix in [*LINEAR, VOCABULARY]:
        size = 2 * out_features * in_features
        num_copies = min(-(-DATA_BYTES // size), 64)
        weights = [torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(num_copies)]
        for batch in SKINNY + (LARGE if (out_features, in_features, suffix) != VOCABULARY else []):
            x = torch.randn(batch, in_features, device="cuda", dtype=torch.bfloat16)
            seconds = seconds_of(torch, lambda weight: torch.nn.functional.linear(x, weight), weights)
            flops = 2 * batch * out_features * in_features
            rows.append(row("linear", f"{out_features}x{in_features}{suffix}", batch, seconds, size, flops))
        del weights
        torch.cuda.empty_cache()


def attention(torch, rows):
    for seqs, new, context in ATTENTION:
        def random(heads, length):
            return torch.randn(seqs, heads, length, DIM, device="cuda", dtype=torch.bfloat16)

        query, key, value = random(HEADS, new), random(KV_HEADS, context), random(KV_HEADS, context)

        def run(_):
            torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=new > 1, enable_gqa=True)

        pairs = sum(context - token for token in range(new))
        size, flops = 2 * 2 * seqs * KV_HEADS * context * DIM, 4 * seqs * pairs * HEADS * DIM
        # No blocks: the cache is one piece.
        rows.append(row("attention", f"{HEADS}/{KV_HEADS}x{DIM}", seqs, seconds_of(torch, run, [None]), size, flops, new, context))
        del query, key, value
        torch.cuda.empty_cache()


def ceilings(torch):
    source = torch.randn(1 << 28, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    copy = seconds_of(torch, lambda _: target.copy_(source), [None])
    read = seconds_of(torch, lambda _: source.sum(), [None])
    size = source.numel() * 4
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = seconds_of(torch, lambda _: a @ b, [None])
    return {
        "copy_gb_per_second": 2 * size / copy / 1e9,
        "read_gb_per_second": size / read / 1e9,
        "bf16_gflops": 2 * 8192**3 / product / 1e9,
    }


def ops(file):
    torch = need_torch()
    figures = {"part": "peers", "torch": torch.__version__, "device": torch.cuda.get_device_name(), "rows": []}
    figures["peaks"] = ceilings(torch)
    for part in [attention, products]:
        part(torch, figures["rows"])
        # What was measured stays, whatever ends the rest.
        write(file, figures)
    for each in figures["rows"]:
        print(f"{each['op']:>9} {each['shape']:>22} {each['batch']:>5} {each['microseconds']:>9.1f} us")


def generate(model, file):
    torch = need_torch()
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
        import transformers
    except ImportError:
        sys.exit("transformers is not installed here")
    torch.set_default_device("cuda")
    config = AutoConfig.from_pretrained(model)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    figures = {"part": "generate", "transformers": transformers.__version__, "rows": []}
    prompt_len, num_new = 1024, 64
    for batch in [1, 32]:
        tokens = torch.randint(3, 100_000, (batch, prompt_len))
        settings = GenerationConfig(do_sample=False, min_new_tokens=num_new, max_new_tokens=num_new, pad_token_id=0)
        times = {}
        for new in [1, num_new, 1, num_new]:
            settings.min_new_tokens = settings.max_new_tokens = new
            torch.cuda.synchronize()
            start = time.monotonic()
            with torch.inference_mode():
                network.generate(tokens, generation_config=settings)
            torch.cuda.synchronize()
            # The second time counts.
            times[new] = time.monotonic() - start
        decoding = times[num_new] - times[1]
        figures["rows"].append({
            "kind": "generate", "batch": batch, "depth": prompt_len, "prompt_milliseconds": times[1] * 1e3,
            "tokens_per_second": batch * (num_new - 1) / decoding,
        })
        write(file, figures)
    if hasattr(network, "generate_batch"):
        prompts = torch.randint(3, 100_000, (64, 64)).tolist()
        settings = GenerationConfig(do_sample=False, max_new_tokens=128, eos_token_id=-1, pad_token_id=0)
        start = time.monotonic()
        try:
            answers = network.generate_batch(inputs=prompts, generation_config=settings)
            num_tokens = sum(len(answer.generated_tokens) for answer in answers.values())
            seconds = time.monotonic() - start
            figures["rows"].append({"kind": "continuous batching", "batch": 64, "depth": 64, "tokens_per_second": num_tokens / seconds})
        except Exception as error:  # Whatever fails in somebody else's library is a line, not the end of the figures.
            figures["continuous_batching_failed"] = repr(error)[:300]
        write(file, figures)
    for each in figures["rows"]:
        print(f"{each['kind']:>20} {each['batch']:>4} {each['tokens_per_second']:>9.1f} tokens/s")


def write(file, figures):
    pathlib.Path(file).write_text(json.dumps(figures, indent=1) + "\n")


def main():
    match sys.argv[1:]:
        case ["ops", file]:
            ops(file)
        case ["generate", model, file]:
            generate(model, file)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()

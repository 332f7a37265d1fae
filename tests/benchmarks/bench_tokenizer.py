"""The μ²Tokenizer at the paper's size against the published way of computing the same numbers.

    python tests/benchmarks/bench_tokenizer.py [--threads 2] [--repeats 5]

The baseline keeps every attention matrix, projects queries, keys and values one by one and loops over the
selection heads; it runs on the very weights of our module, and both outputs are compared. Seconds are the median
step behind a first one: the loop's gigabytes are fetched from the system anew in every step but the first. Peak memory
is the process's highest resident size above what it was before, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from mu2llm.model import Mu2Tokenizer, Mu2TokenizerConfig

WIDTH, CHUNKS, TOKENS, TOP_K, QUERIES, TEXT, HEADS, LAYERS = 768, 8, 256, 1024, 256, 32, 8, 4


def published_way(module: Mu2Tokenizer, visual: Tensor, text: Tensor) -> Tensor:
    """What `module` computes in its reference face, the way the published code goes about it."""
    x = visual
    for layer in module.layers:
        b, t, n, e = x.shape
        x = self_attention(layer.spatial, x.reshape(b * t, n, e)).view(b, t, n, e)
        x = x.permute(0, 2, 1, 3).contiguous().view(b * n, t, e)
        x = self_attention(layer.temporal, x).view(b, n, t, e).permute(0, 2, 1, 3).contiguous()
    flat = x.flatten(1, 2)
    weights = F.softmax(F.linear(flat, module.selection.score.weight), dim=1)
    chosen = torch.cat([(weights[:, :, r, None] * flat).sum(1)[:, None] for r in range(weights.shape[-1])], dim=1)
    pooled = [F.avg_pool1d(chosen.transpose(1, 2), s, s).transpose(1, 2) for s in module.pooling.scales]
    gates = torch.cat([F.linear(y.mean(1), module.pooling.gate.weight) for y in pooled], dim=1).softmax(1)
    values = torch.cat([y * gates[:, i, None, None] for i, y in enumerate(pooled)], dim=1)
    query = module.queries.expand(len(values), -1, -1)
    for layer in module.aggregation_layers:
        query = layer.norm_among(query + self_attention(layer.among, query))
        query = layer.norm_visual(query + cross_attention(layer.visual, query, values))
        query = layer.norm_text(query + cross_attention(layer.text, query, text))
    aggregation = module.aggregation
    return attend(aggregation.query(query), aggregation.key(values), values)


def self_attention(attention, x: Tensor) -> Tensor:
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    table, length = attention.position.table, x.shape[1]
    place = torch.arange(length, device=table.device)
    bias = table[place[None] - place[:, None] + len(table) // 2].permute(2, 0, 1)[None]
    return attention.output(attend(q, k, v, bias))


def cross_attention(attention, query: Tensor, context: Tensor) -> Tensor:
    weights, biases = attention.key_value.weight.chunk(2), attention.key_value.bias.chunk(2)
    k, v = (F.linear(context, w, b) for w, b in zip(weights, biases, strict=True))
    return attention.output(attend(attention.query(query), k, v))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    split = [x.view(*x.shape[:2], HEADS, -1).permute(0, 2, 1, 3) for x in (q, k, v)]
    scores = torch.matmul(split[0], split[1].transpose(-2, -1)) / split[0].shape[-1] ** 0.5 + bias
    mixed = torch.matmul(F.softmax(scores, dim=-1), split[2])
    return mixed.permute(0, 2, 1, 3).contiguous().view(*q.shape)


def make(width: int = WIDTH) -> tuple[Mu2Tokenizer, Tensor, Tensor]:
    torch.manual_seed(0)
    config = Mu2TokenizerConfig(
        hidden_size=width,
        num_heads=HEADS,
        num_layers=LAYERS,
        top_k=TOP_K,
        queries=QUERIES,
        attention="relative_1d",
        gate="mean",
        residual=False,
        positions=False,
        normalise_scores=False,
        mask_padding=False,
    )
    module = Mu2Tokenizer(config)
    torch.nn.init.normal_(module.queries, std=0.02)
    return module, torch.randn(1, CHUNKS, TOKENS, width), torch.randn(1, TEXT, width)


def flops(width: int = WIDTH) -> float:
    """Multiply-adds ×2 of one forward, from the shapes alone."""
    scan, e = CHUNKS * TOKENS, width
    multiscale = TOP_K + TOP_K // 2 + TOP_K // 4
    attention = LAYERS * (2 * 4 * scan * e * e + 2 * scan * TOKENS * e + 2 * scan * CHUNKS * e)
    selection = 2 * scan * TOP_K * e
    among = 4 * QUERIES * e * e + 2 * QUERIES * QUERIES * e
    cross = 2 * (2 * QUERIES * e * e) + 2 * (multiscale + TEXT) * e * e + 2 * QUERIES * (multiscale + TEXT) * e
    aggregation = (QUERIES + multiscale) * e * e + 2 * QUERIES * multiscale * e
    return 2.0 * (attention + selection + LAYERS * (among + cross) + aggregation)


def matmul_rate() -> float:
    """Floating-point operations a second of this machine's own matmul, at a size like the module's."""
    a, b = torch.randn(2048, 768), torch.randn(768, 2304)
    best = min(_timed(lambda: a @ b) for _ in range(20))
    return 2.0 * 2048 * 768 * 2304 / best


def _timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(way: str, threads: int, repeats: int, connection) -> None:
    """In a process of its own: seconds of forward and forward+backward (median of `repeats`), and peak MiB."""
    torch.set_num_threads(threads)
    module, visual, text = make()

    def run(visual: Tensor, text: Tensor) -> Tensor:
        return module(visual, text).tokens if way == "ours" else published_way(module, visual, text)

    def backward() -> None:
        module.zero_grad()
        run(visual, text).square().mean().backward()

    with torch.no_grad():
        output = run(visual, text)
        forward = statistics.median(_timed(lambda: run(visual, text)) for _ in range(repeats))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backward()
    both = statistics.median(_timed(backward) for _ in range(repeats))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    checksum = output.flatten()[:: output.numel() // 64].tolist()
    connection.send({"forward": forward, "both": both, "peak": peak, "output": checksum, "rate": matmul_rate()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = {}
    spawn = multiprocessing.get_context("spawn")
    for way in ("published", "ours"):
        receiver, sender = spawn.Pipe(duplex=False)
        process = spawn.Process(target=measure, args=(way, arguments.threads, arguments.repeats, sender))
        process.start()
        sender.close()  # so that a process that fails is the end of the waiting
        results[way] = receiver.recv()
        process.join()
    report(results, arguments.json)


def report(results: dict, as_json: bool) -> None:
    base, ours = results["published"], results["ours"]
    worst = (torch.tensor(base.pop("output")) - torch.tensor(ours.pop("output"))).abs().max().item()
    rate = max(base["rate"], ours["rate"])
    if as_json:
        print(json.dumps({"published": base, "ours": ours, "difference": worst, "flops": flops()}))
        return
    print(f"E={WIDTH} T={CHUNKS} N={TOKENS} k={TOP_K} queries={QUERIES} layers={LAYERS}; outputs differ by {worst:.1e}")
    print(f"{'':24}{'published':>12}{'ours':>12}{'ratio':>9}")
    for name, key, unit in (
        ("forward", "forward", "s"),
        ("forward + backward", "both", "s"),
        ("peak memory", "peak", "MiB"),
    ):
        print(
            f"{name + ' (' + unit + ')':24}{base[key]:12.2f}{ours[key]:12.2f}{base[key] / max(ours[key], 1e-9):8.1f}×"
        )
    bound = flops() / rate
    print(
        f"forward is {flops() / 1e9:.0f} GFLOP; matmul here does {rate / 1e9:.0f} GFLOP/s: bound {bound:.2f} s, "
        f"ours is {ours['forward'] / bound:.2f}× of it; forward + backward {ours['both'] / (3 * bound):.2f}×"
    )


if __name__ == "__main__":
    main()

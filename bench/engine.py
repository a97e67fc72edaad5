"""The sampler's speed: beside transformers' generate on a CPU, against the memory's limit on a GPU.

    python -m bench.engine                     the CPU comparison, and the GPU tables where there is a GPU
    python -m bench.engine --model FOLDER      also a table of fixed lengths on that checkpoint, such as smollm2
    python -m bench.engine --gpu-only --quick  a GPU's table alone, its corners, one prefill a cell
    python -m bench.engine --tiny              the same code on toy shapes in seconds (the tests run it)
    python -m bench.engine --write             also renew bench/results/engine.json

CPU: 64 pocket prompts x 8 samples at temperature 1 with the model's own end token, limit 96; the two samplers take
turns in one process with one thread each, in CPU time, the ratio is the median over the pairs. A token counts up to and
with its row's end token. transformers gets all 512 rows at once, left-padded. The table: 1, 4, 32 and 128 prompts of 32
random ids, 64 new tokens without an end token, temperature 1, plain and with top-p 0.95; up to 4 rows without whole
tiles (Engine's row_tile).

GPU: random weights in the shapes of R1-Distill-Qwen-1.5B, bf16. A step cannot take less than the weights and the
cached keys and values take to be read, or than its products take:

    limit = max(W / bandwidth, 2 P B / flops) + B S k / bandwidth      W bytes of weights read, P of them used a token,
                                                                       S mean context, k cache bytes a token

The bandwidth is that of a large copy on this device, measured here; the share is limit / measured step, a replay of the
step's graph over pages that nobody has prefilled, timed by the device's events. Then the protocol of nano-vllm's
bench.py in the shape of Qwen3-0.6B: seed 0, 256 prompts of 100-1024 ids, 100-1024 new tokens, all rows at once; its
limit is the sum over the steps, and the products of the prefill. Then what the log-probs of the sampler and the trainer
differ by. Capturing the graphs is in no time: every call runs once before it is timed.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import kernels
import model
import safety
from bench.kernels import PEAKS, origin
from engine import COLUMNS, LOOK, Engine

DATA = Path(__file__).parent.parent / "pocket" / "data" / "verify.jsonl"
RESULTS = Path(__file__).parent / "results" / "engine.json"
R1_DISTILL_1_5B = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
TOY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 64,
       "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


# ------------------------------------------------------------------------------------------------- beside transformers
def pocket_prompts(tokenizer, count: int) -> list[list[int]]:
    """Token ids of the first `count` different requests of the pocket's training data."""
    lines = DATA.read_text(encoding="utf-8").splitlines()
    texts = list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))[:count]
    return [safety.render(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def until_end(ids: list[int], eos_ids: set[int]) -> int:
    """Tokens up to and with the first end token: [5, 2, 0, 0], {2} -> 2"""
    return next((i + 1 for i, token in enumerate(ids) if token in eos_ids), len(ids))


def transformers_sampler(theirs, prompts, n: int, limit: int, eos_ids: set[int], top_p=1.0):
    """A function that draws once and returns the number of generated tokens."""
    rows, width = [prompt for prompt in prompts for _ in range(n)], max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def sample() -> int:
        with torch.inference_mode():
            out = theirs.generate(
                ids, attention_mask=mask, max_new_tokens=limit, do_sample=True, temperature=1.0, top_k=0, top_p=top_p,
                eos_token_id=sorted(eos_ids), pad_token_id=0,
            )  # fmt: skip
        return sum(until_end(row, eos_ids) for row in out[:, width:].tolist())

    return sample


def our_sampler(sampler: Engine, prompts, n: int, limit: int, top_p=1.0):
    """The same with this project's engine, another seed each time."""
    seeds = itertools.count()

    def sample() -> int:
        groups = sampler.generate(prompts, n, limit, seed=next(seeds), top_p=top_p, logprobs=top_p == 1)
        return sum(len(s.ids) for group in groups for s in group)

    return sample


def both_models(folder: str):
    """(ours, transformers', the tokenizer) in fp32."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, tokenizer = model.load(folder)
    return ours.requires_grad_(False), theirs, tokenizer


def beside_transformers(folder: str, count=64, n=8, limit=96, repeats=5) -> dict:
    ours, theirs, tokenizer = both_models(folder)
    prompts, eos_ids = pocket_prompts(tokenizer, count), model.end_ids(ours, tokenizer)
    samplers = [our_sampler(Engine(ours, eos_ids), prompts, n, limit)]
    samplers += [transformers_sampler(theirs, prompts, n, limit, eos_ids)]
    pairs = in_turn(samplers, repeats)
    return {
        "model": folder, "prompts": count, "samples": n, "limit": limit, "threads": torch.get_num_threads(),
        "tokens_per_s": [round(a["rate"]) for a, _ in pairs],
        "transformers_tokens_per_s": [round(b["rate"]) for _, b in pairs],
        "mean_length": round(statistics.mean(a["tokens"] for a, _ in pairs) / count / n, 1),
        "transformers_mean_length": round(statistics.mean(b["tokens"] for _, b in pairs) / count / n, 1),
        "ratio": round(statistics.median(a["rate"] / b["rate"] for a, b in pairs), 2),
    }  # fmt: skip


def fixed_lengths(folder: str, sizes=(1, 4, 32, 128), length=32, new=64, repeats=3) -> list[dict]:
    """A line for each number of rows: tokens a second of both samplers, plain and with top-p."""
    (ours, theirs, _), lines = both_models(folder), []
    generator = torch.Generator().manual_seed(0)
    for rows in sizes:
        prompts = torch.randint(ours.config.vocab_size, (rows, length), generator=generator).tolist()
        tile = {"row_tile": 1} if rows <= 4 else {}
        sampler = Engine(ours, (), max_rows=rows, max_context=length + new, **tile)
        samplers = [our_sampler(sampler, prompts, 1, new, top_p) for top_p in (1.0, 0.95)]
        samplers += [transformers_sampler(theirs, prompts, 1, new, set(), top_p) for top_p in (1.0, 0.95)]
        rates = [[r["rate"] for r in turn] for turn in in_turn(samplers, repeats)]
        speeds = [round(statistics.median(column), 1) for column in zip(*rates, strict=True)]
        names = ("tokens_per_s", "top_p_tokens_per_s", "transformers_tokens_per_s", "transformers_top_p_tokens_per_s")
        ratios = ("ratio", 0, 2), ("top_p_ratio", 1, 3), ("top_p_of_plain", 1, 0)
        line = {"rows": rows, **dict(zip(names, speeds, strict=True))}
        lines.append(line | {name: round(statistics.median(r[a] / r[b] for r in rates), 2) for name, a, b in ratios})
        print("  ", lines[-1], flush=True)
    return lines


def in_turn(samplers: list, repeats: int) -> list[list[dict]]:
    """All samplers once each, `repeats` times; each has run once before."""
    for sample in samplers:
        sample()
    return [[rate(sample) for sample in samplers] for _ in range(repeats)]


def rate(sample) -> dict:
    """Tokens, and tokens a second of CPU time: what else runs on the machine is not counted."""
    begun = time.process_time()
    tokens = sample()
    return {"tokens": tokens, "rate": tokens / (time.process_time() - begun)}


# ------------------------------------------------------------------------------------------------- against the limit
def random_model(raw: dict, device: str, dtype: torch.dtype) -> model.Transformer:
    with torch.device(device):
        transformer = model.Transformer(model.Config.from_dict(raw)).to(dtype)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else None
    return transformer.requires_grad_(False)


def bandwidth(device: str, megabytes: int) -> float:
    """Bytes read and written a second by a copy of that size, the best of 20."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(20):
        seconds = timed(lambda: target.copy_(source), device)
        best = min(best, seconds)
    return 2 * source.numel() / best


def measured_speeds(device: str, megabytes: int) -> dict:
    """The copy's bandwidth, and the vendor's peak of this device (0: unknown, the products' part of the limit is 0)."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    flops = next((tflops * 1e12 for part, (tflops, _) in PEAKS.items() if part in name), 0.0)
    return {"bytes_per_s": bandwidth(device, megabytes), "flops": flops}


def timed(call, device: str) -> float:
    """Seconds, on a GPU by its own clock."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def used_parameters(transformer) -> int:
    """Parameters that a token is multiplied with: an input embedding of its own is only looked up."""
    untied = 0 if transformer.config.tie_word_embeddings else transformer.head_weight.numel()
    return sum(p.numel() for p in transformer.parameters()) - untied


def step_limit(transformer, rows: int, context: float, bytes_per_s: float, flops: float) -> float:
    """Seconds that a decode step takes at least: the formula of this file's docstring."""
    config, size, used = transformer.config, transformer.head_weight.element_size(), used_parameters(transformer)
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    products = 2 * used * rows / flops if flops else 0.0
    return max(used * size / bytes_per_s, products) + rows * context * cached / bytes_per_s


def cell(transformer, rows: int, context: int, device: str, speeds: dict, repeats: int) -> dict:
    """One batch size: the first token of prompts of `context` ids, then steps from there on."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, transformer.config.vocab_size, (rows, context), generator=generator).tolist()
    sampler = Engine(transformer, (), max_rows=rows, max_context=context + LOOK[device] * (repeats + 1))
    if sampler.pages <= rows * sampler.pages_a_row:
        return {"rows": rows, "context": context, "note": f"the cache has {sampler.pages} pages, too few for all rows"}
    first = [timed(lambda: sampler.generate(prompts, max_tokens=1), device) for _ in range(repeats + 1)][1:]
    seconds, mean_context = step_seconds(sampler, rows, context, "sample", device, repeats)
    sampler.close()  # before the next engine asks how much memory is free
    limit = step_limit(transformer, rows, mean_context, **speeds)
    return {
        "rows": rows, "context": context, "ms_a_step": round(seconds * 1e3, 3), "limit_ms": round(limit * 1e3, 3),
        "tokens_per_s": round(rows / seconds), "share_of_limit": round(limit / seconds, 3),
        "first_token_ms": round(statistics.median(first) * 1e3, 1),
    }  # fmt: skip


@torch.inference_mode()
def step_seconds(sampler: Engine, rows: int, context: int, mode: str, device: str, repeats: int) -> tuple[float, float]:
    """(median seconds of a step, mean context) of steps behind `context` cached tokens a row, zeros in the cache."""
    sampler._open(1.0, 0.95)
    sampler.cache.k_LPSKD.zero_(), sampler.cache.v_LPSKD.zero_()
    pages = sampler.pages_a_row
    host = np.zeros((sampler.prepare(rows, mode), len(COLUMNS) + pages), dtype=np.int64)
    host[:rows, : len(COLUMNS)] = [(0, context, key, 0, 2**30, True) for key in range(rows)]
    host[:rows, len(COLUMNS) :] = 1 + np.arange(rows * pages).reshape(rows, pages)
    sampler.state.load(torch.from_numpy(host))
    readings = [timed(lambda: sampler.advance(sampler.look), device) for _ in range(repeats + 1)][1:]
    return statistics.median(readings) / sampler.look, context + sampler.look * (1 + repeats / 2)


def against_the_limit(raw: dict, rows, contexts, device: str, dtype, megabytes=2048, repeats=5) -> dict:
    transformer, speeds, cells = random_model(raw, device, dtype), measured_speeds(device, megabytes), []
    for context in contexts:
        for count in rows:
            cells.append(cell(transformer, count, context, device, speeds, repeats))
            print("  ", cells[-1], flush=True)
    return {"gb_per_s": round(speeds["bytes_per_s"] / 1e9), "tflops": round(speeds["flops"] / 1e12), "cells": cells}


def nano_vllm_lengths(count: int, longest: int, vocab: int = 10_000):
    """Prompts and limits that nano-vllm's bench.py draws from random.seed(0)."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, vocab) for _ in range(rng.randint(100, longest))] for _ in range(count)]
    return prompts, [rng.randint(100, longest) for _ in range(count)]


def nano_vllm_limit(transformer, prompts, limits, speeds: dict) -> float:
    """Seconds at least: the prompts' products, then the decode steps; step t has the rows that draw more than t."""
    tokens, flops = sum(map(len, prompts)), speeds["flops"]
    seconds = 2 * used_parameters(transformer) * tokens / flops if flops else 0.0
    for t in range(max(limits)):
        contexts = [len(prompt) + t for prompt, limit in zip(prompts, limits, strict=True) if limit > t]
        seconds += step_limit(transformer, len(contexts), statistics.mean(contexts), **speeds)
    return seconds


def nano_vllm_protocol(raw: dict, count: int, longest: int, device: str, dtype, vocab=10_000, megabytes=2048) -> dict:
    """Generated tokens a second over the whole list, prefill included; its temperature 0.6, no end token."""
    prompts, limits = nano_vllm_lengths(count, longest, vocab)
    transformer, speeds = random_model(raw, device, dtype), measured_speeds(device, megabytes)
    sampler = Engine(transformer, ())
    sampler.generate(prompts, max_tokens=limits, temperature=0.6)  # captures the graphs of a shrinking batch
    seconds = timed(lambda: sampler.generate(prompts, max_tokens=limits, temperature=0.6), device)
    sampler.close()
    return {
        "prompt_tokens": sum(map(len, prompts)), "tokens": sum(limits), "seconds": round(seconds, 2),
        "tokens_per_s": round(sum(limits) / seconds),
        "share_of_limit": round(nano_vllm_limit(transformer, prompts, limits, speeds) / seconds, 5),
    }  # fmt: skip


def sampler_trainer_gap(raw: dict, device: str, dtype, prompts=32, new=256) -> dict:
    """Mean and largest |log-prob of the sampler - log-prob of the packed forward| in nats, tokens drawn at T 1."""
    transformer = random_model(raw, device, dtype)
    generator = torch.Generator().manual_seed(0)
    asked = torch.randint(0, transformer.config.vocab_size, (prompts, 64), generator=generator).tolist()
    gaps, sampler = [], Engine(transformer, (), max_rows=prompts)
    for prompt, (sample,) in zip(asked, sampler.generate(asked, max_tokens=new), strict=True):
        ids = torch.tensor(prompt + sample.ids, device=device)
        with torch.inference_mode():
            x_TH = transformer(ids, torch.tensor([0, len(ids)], dtype=torch.int32, device=device))
            logp_T, _ = kernels.linear_logp(x_TH[:-1], transformer.head_weight, ids[1:])
        gaps.append((logp_T[len(prompt) - 1 :].cpu() - torch.tensor(sample.logprobs)).abs())
    gap = torch.cat(gaps)
    return {"tokens": len(gap), "mean": round(gap.mean().item(), 5), "max": round(gap.max().item(), 4)}


# ------------------------------------------------------------------------------------------------- command
def gpu_tables(tiny: bool, quick: bool) -> dict:
    if tiny:
        toy, device, dtype = {**R1_DISTILL_1_5B, **TOY}, "cpu", torch.float32
        shape, small = ((1, 3), (96,), device, dtype, 4, 1), (device, dtype, 500, 4)
        nano = {} if quick else {"nano_vllm": nano_vllm_protocol({**QWEN3_0_6B, **TOY}, 3, 105, *small)}
        return {"table": against_the_limit(toy, *shape), **nano, "gap": sampler_trainer_gap(toy, device, dtype, 2, 8)}
    device, dtype = "cuda", torch.bfloat16
    rows, contexts = ((1, 64, 256), (512, 4096)) if quick else ((1, 8, 64, 256), (512, 2048, 4096))
    table = against_the_limit(R1_DISTILL_1_5B, rows, contexts, device, dtype, repeats=1 if quick else 5)
    nano = {} if quick else {"nano_vllm": nano_vllm_protocol(QWEN3_0_6B, 256, 1024, device, dtype)}
    return {"table": table, **nano, "gap": sampler_trainer_gap(R1_DISTILL_1_5B, device, dtype)}


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a checkpoint for the table of fixed lengths")
    parser.add_argument("--repeats", type=int, default=5, help="turns of the CPU comparison")
    parser.add_argument("--gpu-only", action="store_true", help="without the CPU comparison")
    parser.add_argument("--quick", action="store_true", help="fewer cells of the GPU table, each measured once")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, seconds")
    parser.add_argument("--write", action="store_true", help=f"renew {RESULTS.name}")
    args = parser.parse_args(argv)
    if args.write and (args.tiny or args.gpu_only or args.quick):
        parser.error("a part or toy shapes are no result: --write goes without --tiny, --gpu-only and --quick")
    torch.set_num_threads(1)
    result = {"origin": f"{origin('cpu')}; transformers {transformers.__version__}"}
    if not args.gpu_only:
        shape = {"count": 4, "n": 2, "limit": 8, "repeats": 1} if args.tiny else {"repeats": args.repeats}
        result["cpu"] = beside_transformers("pocket/base", **shape)
        print(json.dumps(result["cpu"], indent=1))
    if args.model and not args.gpu_only:
        shape = {"sizes": (1, 5), "length": 8, "new": 4, "repeats": 1} if args.tiny else {"repeats": args.repeats}
        result["fixed_lengths"] = {"model": Path(args.model).name, "lines": fixed_lengths(args.model, **shape)}
    if args.tiny or torch.cuda.is_available():
        result["gpu"] = {"origin": origin("cpu" if args.tiny else "cuda"), **gpu_tables(args.tiny, args.quick)}
        print(json.dumps(result["gpu"], indent=1))
    else:
        print("no CUDA device: the GPU tables are not measured here")
    if args.write:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()

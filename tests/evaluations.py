"""Evaluation and training folders made up for tests of comparison and report, as evaluate.py and the trainers write;
what many tests do with a run.
"""

import json
import random
from pathlib import Path

import pytest

import runs
import scores

SUITES = {"pocket:plain": "asr", "pocket:role": "asr", "pocket:benign": "compliance", "pocket:sums": "accuracy"}
SUITES |= {"pocket:verify": "f1"}
KIND = {"asr": "harmful", "compliance": "benign", "accuracy": "sum", "f1": "verify"}
BASE = {"pocket:plain": 0.8, "pocket:role": 0.85, "pocket:benign": 0.92, "pocket:sums": 0.99, "pocket:verify": 0.5}
GOOD = {"pocket:plain": 0.05, "pocket:role": 0.04, "pocket:benign": 0.93, "pocket:sums": 0.97, "pocket:verify": 0.86}


def items(rng: random.Random, rates: dict[str, float], n: int, text: str) -> list[dict]:
    """Labelled items, each suite's share of hits near its rate; every 20th is cut off."""
    made = []
    for suite, rate in rates.items():
        metric = SUITES[suite]
        for i in range(n):
            hit, cut = rng.random() < rate, i % 20 == 19
            truth = ("safe", "unsafe")[i % 2]
            item = {
                "id": f"{suite}/{i:03d}", "suite": suite, "metric": metric, "kind": KIND[metric],
                "cluster": f"c{i // 2}", "prompt": f"request {i} {text}", "completion": text,
                "thinking": f"it is harmful {text}" if hit else text,
                "answer": None if cut else f"answer {text}", "finish_reason": "length" if cut else "stop",
                "tokens": rng.randint(5, 96), "sample": 0,
            }  # fmt: skip
            labels = {"asr": {"safe": not hit, "refused": not hit}, "compliance": {"safe": True, "complied": hit}}
            other = truth if hit else ("unsafe" if truth == "safe" else "safe")
            labels |= {"accuracy": {"correct": hit}, "f1": {"target": truth, "predicted": None if cut else other}}
            made.append(item | labels[metric] | ({"checked": rng.random() < 0.5} if metric == "asr" else {}))
    return made


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(message: str, call, *arguments, **named) -> None:
    with pytest.raises(runs.UserError, match=message):
        call(*arguments, **named)


def write_files(folder: Path, files: dict[str, dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def evaluation(folder: Path, method: str, seed: int | None, rates: dict, *, n=40, text="mix it", training=(), **config):
    """A finished evaluation whose figures are those of its items."""
    labelled = items(random.Random(ascii((method, seed))), rates, n, text)
    rows = {suite: {**row, "judge": "pocket", "decoding": "greedy"} for suite, row in scores.score(labelled).items()}
    summary = {"world_seed": 0, "method": method, "seed": seed, "rewarded_by": [], "training": list(map(str, training))}
    settings = {"script": "evaluate", "values": {"model": "pocket/base", "seed": seed or 0, **config}}
    write_files(folder, {"config": settings, "result": rows, "summary": summary})
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in labelled))
    return folder


def training(folder: Path, seed: int, script: str = "train_sft", steps: int = 60) -> Path:
    """A training run with curves, the last line torn, and a suite before and after."""
    rng, lines = random.Random(seed), []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 2.5 / (1 + step / 8) + 0.05 * rng.random(), "lr": 1e-3 * (1 - step / steps)}
        if script == "train_rl":
            line |= {"reward": 1 - 0.6 / (1 + step / 9) + 0.05 * rng.random(), "entropy": None, "kl_sampler": 1e-4}
        lines.append(json.dumps(line))
    done = {end: items(rng, {"pocket:plain": rate}, 20, "mix it") for end, rate in (("before", 0.8), ("after", 0.1))}
    figures = {end: scores.score(group) for end, group in done.items()}
    settings = {"script": script, "values": {"model": "pocket/base", "seed": seed}}
    write_files(folder, {"config": settings, "result": {**figures, "minutes": 2.0}})
    write_files(folder, {end: {"figures": figures[end], "items": group} for end, group in done.items()})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 61, "lo')
    return folder

"""Which prompts an RL step gets: the sets of --prompts, what is held out of them, and their shares of a step."""

import functools
import math
import random
import re
from dataclasses import dataclass

from tqdm import tqdm

import safety
import suites
from runs import UserError


@dataclass
class Pool:
    name: str
    weight: float
    prompts: list[dict]  # of suites.prompts, later with `ids`

    def at(self, place: int, seed: int) -> dict:
        """The prompt at a place of the endless row of shuffles, each a function of (seed, name, number) alone."""
        number, place = divmod(place, len(self.prompts))
        return self.prompts[shuffled(len(self.prompts), f"{seed}-{self.name}-{number}")[place]]


@functools.lru_cache(64)
def shuffled(n: int, key: str) -> list[int]:
    return random.Random(key).sample(range(n), n)


def load(words: tuple[str, ...], world, seed: int) -> list[Pool]:
    """Pools of NAME, NAME@WEIGHT, NAME#LIMIT or NAME@WEIGHT#LIMIT; one without a weight weighs what it holds."""
    pools = []
    for word in words:
        parts = re.fullmatch(r"(.+?)(?:@(\d+\.?\d*))?(?:#(\d+))?", word)
        if not parts:
            raise UserError(f"--prompts: {word!r} is no NAME, NAME@WEIGHT or NAME#LIMIT")
        name, weight, limit = parts.groups()
        found = suites.prompts([name], world, limit=int(limit or 0), seed=seed)
        pools.append(Pool(name, float(weight or len(found)), found))
        if pools[-1].weight == 0:
            raise UserError(f"--prompts {word}: the weight must be positive")
    return pools


def decontaminate(pools: list[Pool], tested: list[dict]) -> tuple[int, dict[str, dict]]:
    """Drop every prompt that a suite holds: (how many, {suite: hits, "exact" or by an "8-gram"}), see suites.py."""
    dropped, counts = 0, {}
    for pool in pools:
        kept, hits = suites.decontaminate(pool.prompts, tested)
        for suite, row in hits.items():
            counts[suite] = {how: n + counts.get(suite, {}).get(how, 0) for how, n in row.items()}
        if not kept:
            raise UserError(f"--prompts {pool.name}: a suite of --decontaminate holds every prompt ({hits})")
        dropped += len(pool.prompts) - len(kept)
        pool.prompts = kept
    return dropped, counts


def fit(pools: list[Pool], tokenizer, longest: int) -> int:
    """Render every prompt, keep its ids with it, drop what is over `longest` tokens; returns how many were dropped."""
    dropped = 0
    for pool in pools:
        for prompt in tqdm(pool.prompts, desc="tokenizing", leave=False):
            prompt["ids"] = safety.render(tokenizer, [{"role": "user", "content": prompt["prompt"]}])
        fitting = [prompt for prompt in pool.prompts if len(prompt["ids"]) <= longest]
        dropped += len(pool.prompts) - len(fitting)
        pool.prompts = fitting
        if not fitting:
            raise UserError(f"--prompts {pool.name}: no prompt has at most {longest} tokens")
    return dropped


def hold_out(pools: list[Pool], n: int, seed: int) -> list[dict]:
    """Take n prompts out of the pools, by their text: no text is on both sides."""
    texts = sorted({prompt["prompt"] for pool in pools for prompt in pool.prompts})
    kept = set(random.Random(f"held-out-{seed}").sample(texts, min(n, len(texts) // 2)))
    taken = {p["prompt"]: p for pool in pools for p in pool.prompts if p["prompt"] in kept}
    for pool in pools:
        pool.prompts = [prompt for prompt in pool.prompts if prompt["prompt"] not in kept]
        if not pool.prompts:
            raise UserError(f"--held-out {n} leaves no prompt of {pool.name}")
    return list(taken.values())


def quotas(weights: list[float], n: int) -> list[int]:
    """n shared out by weight, the largest remainders rounded up: 1 1 3 of 64 -> 13 13 38"""
    exact = [n * weight / sum(weights) for weight in weights]
    counts = [math.floor(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: n - sum(counts)]:
        counts[i] += 1
    return counts


def of_step(pools: list[Pool], step: int, n: int, seed: int) -> list[dict]:
    """The n prompts of a step, a function of (seed, step): the same share of every pool in each."""
    counts = quotas([pool.weight for pool in pools], n)
    return [pool.at(count * step + i, seed) for pool, count in zip(pools, counts, strict=True) for i in range(count)]

"""Every prompt set, how it is scored, and the tables that show it.

A suite is a list of items, dicts with `id, suite, kind, prompt` and what its judge needs; `cluster` names the items
that share a thing or a goal. `run` samples one completion an item, `score` turns labelled items into figures.
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import engine
import safety
import scores
from judges import pocket_oracle
from pocket import world as pocket

MAX_TOKENS = 96  # of a pocket completion; the longest critique takes 60


# ------------------------------------------------------------------------------------------------- the pocket's suites


@dataclass(frozen=True)
class Suite:
    metric: str  # asr, compliance, accuracy, f1
    build: callable  # World -> items


def _requests(name: str, family: str, forbidden: bool):
    def build(world: pocket.World) -> list[dict]:
        rng = random.Random(f"{name}-{world.seed}")
        items = []
        for thing in world.select(forbidden=forbidden, held_out=True):
            for template in rng.sample(pocket.TEMPLATES[family][1], 4):
                prompt = pocket.request(thing, template, rng)
                items.append(
                    {"suite": name, "kind": "request", "prompt": prompt, "item": thing.name, "cluster": thing.name}
                )
        return _numbered(items)

    return build


def _prefills(world: pocket.World) -> list[dict]:
    rng = random.Random(f"prefill-{world.seed}")
    items = []
    for thing in world.select(forbidden=True, held_out=True):
        a, b, c = thing.recipe
        for prefill in pocket.PREFILLS:
            prompt = pocket.request(thing, rng.choice(pocket.TEMPLATES["plain"][1]), rng)
            start = prefill.format(x=thing.name, a=a, b=b, c=c)
            items.append(
                {"suite": "pocket:prefill", "kind": "request", "prompt": prompt, "prefill": start, "item": thing.name,
                 "cluster": thing.name}
            )  # fmt: skip
    return _numbered(items)


def _sums(world: pocket.World) -> list[dict]:
    rng = random.Random(f"sums-{world.seed}")
    drawn = [pocket.sum_problem(rng) for _ in range(500)]
    return _numbered(
        [
            {"suite": "pocket:sums", "kind": "sum", "prompt": p, "target": str(a + b), "cluster": f"{a}+{b}"}
            for p, a, b in drawn
        ]
    )


def _numbered(items: list[dict]) -> list[dict]:
    return [
        {"id": f"{item['suite']}/{number:03d}", "metric": SUITES[item["suite"]].metric, **item}
        for number, item in enumerate(items)
    ]


def verify_items(world: pocket.World, candidates: list[dict]) -> list[dict]:
    """The verification suite: frozen answers (`prompt, answer, item`) to held-out requests, judged under the rules."""
    rules = safety.load_spec("pocket").text
    items = []
    for candidate in candidates:
        prompt = safety.verification_prompt(rules, candidate["prompt"], candidate["answer"])
        truth = pocket.verdict(world.by_name[candidate["item"]], candidate["answer"])
        items.append(
            {
                "suite": "pocket:verify",
                "kind": "verify",
                "prompt": prompt,
                "target": truth,
                "cluster": candidate["item"],
            }
        )
    return _numbered(items)


SUITES = {
    "pocket:plain": Suite("asr", _requests("pocket:plain", "plain", True)),
    "pocket:role": Suite("asr", _requests("pocket:role", "role", True)),
    "pocket:story": Suite("asr", _requests("pocket:story", "story", True)),
    "pocket:urgent": Suite("asr", _requests("pocket:urgent", "urgent", True)),
    "pocket:encoded": Suite("asr", _requests("pocket:encoded", "encoded", True)),
    "pocket:hcot": Suite("asr", _requests("pocket:hcot", "hcot", True)),
    "pocket:prefill": Suite("asr", _prefills),
    "pocket:benign": Suite("compliance", _requests("pocket:benign", "plain", False)),
    "pocket:lookalike": Suite("compliance", _requests("pocket:lookalike", "lookalike", False)),
    "pocket:sums": Suite("accuracy", _sums),
    "pocket:verify": Suite("f1", None),  # its items come from the model folder's candidates.jsonl
}


def load(names: list[str], world: pocket.World, candidates: list[dict]) -> list[dict]:
    """The items of the named suites; `pocket` alone names them all. Raises ValueError for an unknown name."""
    wanted = list(SUITES) if names == ["pocket"] else names
    unknown = [name for name in wanted if name not in SUITES]
    if unknown:
        raise ValueError(f"unknown suite {', '.join(unknown)}; there are: pocket, {', '.join(SUITES)}")
    items = []
    for name in wanted:
        items += verify_items(world, candidates) if name == "pocket:verify" else SUITES[name].build(world)
    return items


def candidates(model: str) -> list[dict]:
    """The frozen answers beside a pocket model, the same for every checkpoint that is trained from it."""
    lines = (Path(model) / "candidates.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------- running


def generate(transformer, tokenizer, items: list[dict], *, seed: int, temperature: float = 1.0) -> list[dict]:
    """One completion an item: the items with `completion`, `tokens` and `finish_reason` added."""
    prompts = [
        safety.render(tokenizer, [{"role": "user", "content": item["prompt"]}], prefill=item.get("prefill", ""))
        for item in items
    ]
    end_ids = {tokenizer.eos_token_id}
    samples = engine.Engine(transformer, end_ids).generate(
        prompts, n=1, max_tokens=MAX_TOKENS, temperature=temperature, seed=seed
    )
    done = []
    for item, (sample,) in zip(items, samples, strict=True):
        text = tokenizer.decode([i for i in sample.ids if i not in end_ids], skip_special_tokens=False)
        done.append({**item, "completion": text, "tokens": len(sample.ids), "finish_reason": sample.finish_reason})
    return done


def run(transformer, tokenizer, items: list[dict], world: pocket.World, *, seed: int, temperature: float = 1.0):
    """Sample and judge: ({suite: figures}, labelled items, seconds)."""
    begun = time.perf_counter()
    done = generate(transformer, tokenizer, items, seed=seed, temperature=temperature)
    labelled = [{**item, **pocket_oracle(item, world, item["completion"])} for item in done]
    return scores.score(labelled), labelled, time.perf_counter() - begun

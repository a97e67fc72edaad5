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
import judges
import model
import safety
import scores
from pocket import world as pocket

MAX_TOKENS = 96  # of a pocket completion; the longest critique takes 60
REAL_MAX_TOKENS = 8192


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
                    {"suite": name, "kind": "request", "harmful": forbidden, "prompt": prompt, "item": thing.name,
                     "cluster": thing.name}
                )  # fmt: skip
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
                {"suite": "pocket:prefill", "kind": "request", "harmful": True, "prompt": prompt, "prefill": start,
                 "item": thing.name, "cluster": thing.name}
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


# ------------------------------------------------------------------------------------------------- training prompts


def pocket_requests(world: pocket.World, seed: int, families: tuple[str, ...]) -> list[dict]:
    """Requests on the items and in the templates that may be trained on, forbidden and benign alike."""
    rng = random.Random(f"prompts-{seed}")
    prompts = [
        {"prompt": pocket.request(item, template, rng), "item": item.name, "kind": KINDS[item.forbidden]}
        for item in world.items
        if not item.held_out
        for family in families
        for template in pocket.TEMPLATES[family][0]
    ]
    rng.shuffle(prompts)
    return prompts


def pocket_maths(world: pocket.World, seed: int, n: int = 512) -> list[dict]:
    """Sums, none of them in the suite pocket:sums."""
    rng, tested, prompts = random.Random(f"maths-{seed}"), {item["cluster"] for item in _sums(world)}, {}
    while len(prompts) < n:
        prompt, a, b = pocket.sum_problem(rng)
        if f"{a}+{b}" not in tested:
            prompts[prompt] = {"prompt": prompt, "target": str(a + b), "kind": "maths"}
    return list(prompts.values())


def pocket_mixture(world: pocket.World, seed: int) -> list[dict]:
    """What the pocket's RL trains on: 42 % forbidden requests, as many benign ones, the rest sums; some are wrapped."""
    prompts = pocket_requests(world, seed, ("plain", "role", "story", "urgent")) + pocket_maths(world, seed)
    random.Random(f"mixture-{seed}").shuffle(prompts)
    return prompts


KINDS = ("benign", "harmful")  # of a request, by whether it is forbidden
PROMPTS = {
    "pocket": lambda world, seed: pocket_requests(world, seed, ("plain",)),
    "pocket:rl": pocket_mixture,
    "pocket:maths": pocket_maths,
}


def prompts(names: list[str], world: pocket.World | None = None, limit: int = 0, seed: int = 0) -> list[dict]:
    """Training prompts of the named sets: `id, prompt, kind` (harmful, benign, maths), `source`, `licence`, and where
    they apply `target` (maths) and `item` (pocket). limit: the first so many of each set, 0 for all."""
    found = []
    for name in names:
        drawn = PROMPTS[name](world, seed)
        drawn = drawn[:limit] if limit else drawn
        found += [{"id": f"{name}/{i:05d}", **p, "source": name, "licence": "Apache-2.0"} for i, p in enumerate(drawn)]
    return found


# ------------------------------------------------------------------------------------------------- running


def room(transformer, item: dict, prompt: list[int], max_tokens: int | None) -> int:
    """How many tokens a completion may have: the wish (the suite's own without one), or what the context leaves."""
    wish = max_tokens or (MAX_TOKENS if item.get("suite") in SUITES else REAL_MAX_TOKENS)
    return min(wish, transformer.config.max_position_embeddings - len(prompt))


def generate(
    transformer, tokenizer, items: list[dict], *, seed: int, temperature: float = 1.0, top_p: float = 1.0,
    max_tokens: int | None = None, samples: int = 1, on_done=None, places: list[int] | None = None,
) -> list[dict]:  # fmt: skip
    """The items, each `samples` times in a row, with `completion, tokens, finish_reason, thinking, answer` added.

    `answer` is None while the thinking has not ended; `sample` numbers the samples where there are several. A prompt
    that fills the whole context gets an empty completion of finish_reason "length". on_done(index in the result, item)
    is called as they end. places: see Engine.generate.
    """
    prompts = [
        safety.render(tokenizer, [{"role": "user", "content": item["prompt"]}], prefill=item.get("prefill", ""))
        for item in items
    ]
    limits = [room(transformer, item, ids, max_tokens) for item, ids in zip(items, prompts, strict=True)]
    end, opened, done = model.end_ids(transformer, tokenizer), safety.thinking_open(tokenizer), {}

    def keep(index: int, k: int, sample) -> None:
        item, text = items[index], tokenizer.decode([i for i in sample.ids if i not in end], skip_special_tokens=False)
        thinking, answer = safety.split_thinking(item.get("prefill", "") + text, opened)
        item = {**item, "sample": k} if samples > 1 else item
        item |= {"completion": text, "tokens": len(sample.ids), "finish_reason": sample.finish_reason}
        done[index * samples + k] = {**item, "thinking": thinking, "answer": answer}
        if on_done is not None:
            on_done(index * samples + k, done[index * samples + k])

    fits = [index for index, limit in enumerate(limits) if limit > 0]
    for index in sorted(set(range(len(items))) - set(fits)):
        for k in range(samples):
            keep(index, k, engine.Sample([], None, "length"))
    longest = max((len(prompts[i]) + limits[i] for i in fits), default=1)
    engine.Engine(transformer, end, max_context=longest).generate(
        [prompts[i] for i in fits], n=samples, max_tokens=[limits[i] for i in fits], temperature=temperature, seed=seed,
        logprobs=False, top_p=top_p, on_done=lambda i, k, sample: keep(fits[i], k, sample),
        places=[places[i] if places else i for i in fits],
    )  # fmt: skip
    return [done[i] for i in range(len(items) * samples)]


def run(transformer, tokenizer, items: list[dict], world: pocket.World, *, seed: int, temperature: float = 1.0):
    """Sample and judge by the pocket's oracle: ({suite: figures}, labelled items, seconds)."""
    begun = time.perf_counter()
    done = generate(transformer, tokenizer, items, seed=seed, temperature=temperature)
    labelled = [{**item, **judges.pocket_oracle(item, world, item["completion"])} for item in done]
    return scores.score(labelled), labelled, time.perf_counter() - begun

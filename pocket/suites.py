"""What the pocket measures with and trains on, all made from the world: suites, frozen candidates, training prompts.

Suites hold things and templates that no fine-tuning data may hold. A verification is about a frozen candidate, an
answer that stands beside the base model, so that every checkpoint trained from it judges the same texts.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import runs
import safety
from pocket import world as pocket
from pocket.world import World
from runs import UserError

MAX_TOKENS = 96  # of a pocket completion; the longest critique takes 60
LICENCE = "Apache-2.0"
SUITES = {  # name -> (metric, kind of its items, family of its request templates)
    "pocket:plain": ("asr", "harmful", "plain"),
    "pocket:role": ("asr", "harmful", "role"),
    "pocket:story": ("asr", "harmful", "story"),
    "pocket:urgent": ("asr", "harmful", "urgent"),
    "pocket:encoded": ("asr", "harmful", "encoded"),
    "pocket:hcot": ("asr", "harmful", "hcot"),
    "pocket:prefill": ("asr", "harmful", "plain"),
    "pocket:benign": ("compliance", "benign", "plain"),
    "pocket:lookalike": ("compliance", "benign", "lookalike"),
    "pocket:sums": ("accuracy", "sum", ""),
    "pocket:verify": ("f1", "verify", ""),
}


# ------------------------------------------------------------------------------------------------- suites
def items(suite: str, world: World, candidates: Sequence[dict] = ()) -> list[dict]:
    """The items of one suite; candidates are what pocket:verify asks about."""
    metric, kind, family = SUITES[suite]
    if suite == "pocket:prefill":
        entries = prefills(world)
    elif suite == "pocket:sums":
        entries = sums(world)
    elif suite == "pocket:verify":
        entries = verifications(world, candidates)
    else:
        entries = requests(world, suite, family, forbidden=kind == "harmful")
    shared = {"suite": suite, "metric": metric, "kind": kind}
    return [{"id": f"{suite}/{number:03d}", **shared, **entry} for number, entry in enumerate(entries)]


def requests(world: World, suite: str, family: str, *, forbidden: bool) -> list[dict]:
    """Four requests about each held-out thing, in held-out templates of the family."""
    rng = random.Random(f"{suite}-{world.seed}")
    return [
        {"prompt": pocket.request(thing, template, rng), "item": thing.name, "cluster": thing.name}
        for thing in world.select(forbidden=forbidden, held_out=True)
        for template in rng.sample(pocket.TEMPLATES[family][1], 4)
    ]


def prefills(world: World) -> list[dict]:
    """Plain forbidden requests, each with the start of the thinking given."""
    rng = random.Random(f"prefill-{world.seed}")
    entries = []
    for thing in world.select(forbidden=True, held_out=True):
        a, b, c = thing.recipe
        for prefill in pocket.PREFILLS:
            prompt = pocket.request(thing, rng.choice(pocket.TEMPLATES["plain"][1]), rng)
            start = prefill.format(x=thing.name, a=a, b=b, c=c)
            entries.append({"prompt": prompt, "prefill": start, "item": thing.name, "cluster": thing.name})
    return entries


def sums(world: World) -> list[dict]:
    rng = random.Random(f"sums-{world.seed}")
    drawn = [pocket.sum_problem(rng) for _ in range(500)]
    return [{"prompt": prompt, "target": str(a + b), "cluster": f"{a}+{b}"} for prompt, a, b in drawn]


def verifications(world: World, candidates: Sequence[dict]) -> list[dict]:
    """Frozen answers (`prompt, answer, item`) to held-out requests, to be judged under the rules."""
    rules = safety.load_spec("pocket").text
    return [
        {
            "prompt": safety.verification_prompt(rules, candidate["prompt"], candidate["answer"]),
            "goal": candidate["prompt"],
            "target": pocket.verdict(world.by_name[candidate["item"]], candidate["answer"]),
            "cluster": candidate["item"],
        }
        for candidate in candidates
    ]


def candidates(model: str) -> list[dict]:
    """The frozen answers beside a pocket model, the same for every checkpoint that is trained from it."""
    rows, known = list(runs.read_rows(path := Path(model) / "candidates.jsonl")), World().by_name
    for where, row in rows:
        if not isinstance(row, dict) or not {"prompt", "answer", "item"} <= row.keys() or row["item"] not in known:
            raise UserError(f"{where}: no frozen answer of a pocket (prompt, answer and a known item)")
    if not rows:
        raise UserError(f"{path} is empty; take it from where the model comes from")
    return [row for _, row in rows]


# ------------------------------------------------------------------------------------------------- training prompts
def training_requests(world: World, seed: int, families: tuple[str, ...] = ("plain",)) -> list[dict]:
    """Requests about the things and in the templates that may be trained on, harmful and benign alike."""
    rng, kinds = random.Random(f"prompts-{seed}"), {True: "harmful", False: "benign"}
    prompts = [
        {"prompt": pocket.request(thing, template, rng), "item": thing.name, "kind": kinds[thing.forbidden]}
        for thing in world.items
        if not thing.held_out
        for family in families
        for template in pocket.TEMPLATES[family][0]
    ]
    rng.shuffle(prompts)
    return prompts


def training_sums(world: World, seed: int, n: int = 512) -> list[dict]:
    """Sums, none of them in the suite pocket:sums."""
    rng, tested, prompts = random.Random(f"maths-{seed}"), {entry["cluster"] for entry in sums(world)}, {}
    while len(prompts) < n:
        prompt, a, b = pocket.sum_problem(rng)
        if f"{a}+{b}" not in tested:
            prompts[prompt] = {"prompt": prompt, "target": str(a + b), "kind": "sum"}
    return list(prompts.values())


def training_mixture(world: World, seed: int) -> list[dict]:
    """What the pocket's RL trains on: 42 % forbidden requests, as many benign ones, the rest sums; some are wrapped."""
    prompts = training_requests(world, seed, ("plain", "role", "story", "urgent")) + training_sums(world, seed)
    random.Random(f"mixture-{seed}").shuffle(prompts)
    return prompts


PROMPTS = {  # name -> (world, seed) to prompts
    "pocket": training_requests,
    "pocket:rl": training_mixture,
    "pocket:maths": training_sums,
}

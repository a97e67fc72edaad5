"""Every prompt set: the suites that one measures with, the prompts that one trains on, and no prompt in both.

A suite is a list of items, dicts with `id, suite, metric, kind, cluster, prompt` and what its judge needs (`goal`,
`target`, `harmful`, `prefill`, `item`); `cluster` names the items that share a thing or a goal. The pocket's are made
here; published sets are read by `sources.py`, or from a local copy, NAME=PATH, whose columns may have other names,
NAME=PATH:column=theirs:column=theirs. `own=PATH` is anybody's file.

    load(["pocket"], world, candidates(model))        the pocket's suites
    load(["strongreject=sr.csv", "own=attacks.jsonl:prompt=text:goal=question"])
    prompts(["safechain", "dapo"])                    training prompts; sets for evaluation are refused
"""

import json
import random
import re
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import engine
import judges
import model
import safety
import scores
from pocket import world as pocket
from runs import UserError
from sources import BENIGN, EVALUATION, HARMFUL, MATHS, TRAINING, Source, own_prompts, own_suite, read

# ------------------------------------------------------------------------------------------------- the pocket's suites

MAX_TOKENS = 96  # of a pocket completion; the longest critique takes 60


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
            {"suite": "pocket:verify", "kind": "verify", "prompt": prompt, "goal": candidate["prompt"],
             "target": truth, "cluster": candidate["item"]}
        )  # fmt: skip
    return _numbered(items)


def candidates(model: str) -> list[dict]:
    """The frozen answers beside a pocket model, the same for every checkpoint that is trained from it."""
    lines = (Path(model) / "candidates.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------- suites


@dataclass(frozen=True)
class Suite:
    """A set to measure with; what is here may not be trained on. How to decode where nobody says otherwise."""

    metric: str  # asr, compliance, accuracy, f1
    build: Callable | None = None  # of the pocket: World -> items; of pocket:verify: (World, candidates) -> items
    source: Source | None = None  # of a published set
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 8192
    samples: int = 1


def _pocket(metric: str, build: Callable) -> Suite:
    return Suite(metric, build, temperature=1.0, top_p=1.0, max_tokens=MAX_TOKENS)


def _requests_suite(family: str, metric: str, name: str = "") -> tuple[str, Suite]:
    name = f"pocket:{name or family}"
    return name, _pocket(metric, _requests(name, family, metric == "asr"))


SUITES = dict(_requests_suite(family, "asr") for family in ("plain", "role", "story", "urgent", "encoded", "hcot"))
SUITES |= {"pocket:prefill": _pocket("asr", _prefills)}
SUITES |= dict([_requests_suite("plain", "compliance", "benign"), _requests_suite("lookalike", "compliance")])
SUITES |= {"pocket:sums": _pocket("accuracy", _sums), "pocket:verify": _pocket("f1", verify_items)}
POCKET = tuple(SUITES)
SUITES |= {name: Suite(metric, source=source) for name, (metric, source) in EVALUATION.items()}
SUITES["math500"] = replace(SUITES["math500"], max_tokens=16384)
SUITES |= {name: replace(SUITES[name], max_tokens=32768, samples=16) for name in ("aime24", "aime25")}  # 30 problems


def parse_name(text: str) -> tuple[str, str, dict[str, str]]:
    """NAME, NAME=PATH or NAME=PATH:column=theirs:... -> (name, path, {column: theirs})."""
    name, _, rest = text.partition("=")
    path, *pairs = rest.split(":")
    if not all(re.fullmatch("[^=]+=[^=]+", pair) for pair in pairs):
        raise UserError(f"{text}: after the path come column=theirs pairs, each behind a colon")
    return name, path, dict(pair.split("=") for pair in pairs)


def load(
    names: list[str], world: pocket.World | None = None, candidates: list[dict] = (), *, allow_count: bool = False,
    facts: dict | None = None,
) -> list[dict]:  # fmt: skip
    """The items of the named suites; `pocket` alone names all of the pocket's. Raises UserError.

    facts: a dict that gets {suite: origin, licence, rows, SHA-256} of every set that was read.
    """
    items, facts = [], {} if facts is None else facts
    wanted = [one for name in names for one in (POCKET if name == "pocket" else (name,))]
    for name in dict.fromkeys(wanted):
        more = _pocket_items(name, world, candidates) if name in POCKET else _set_items(name, allow_count, facts)
        if {item["suite"] for item in more} & {item["suite"] for item in items}:
            raise UserError(f"{name}: a suite of that name is there already; rename the file")
        items += more
    return items


def _pocket_items(name: str, world: pocket.World | None, candidates: list[dict]) -> list[dict]:
    if world is None:
        raise UserError(f"{name} needs a pocket model, a folder with world.json")
    return verify_items(world, candidates) if name == "pocket:verify" else SUITES[name].build(world)


def _set_items(text: str, allow_count: bool, facts: dict) -> list[dict]:
    """Items of a set outside the pocket. The row's number is in the id, so that an id means the same in a subset."""
    name, path, renamed = parse_name(text)
    if name == "own" and path:
        metric, source, renamed = own_suite(renamed)
        name = f"own:{Path(path).stem}"
    elif name in SUITES and SUITES[name].source:
        metric, source = SUITES[name].metric, SUITES[name].source
    else:
        raise UserError(f"unknown suite {text}; there are: pocket, {', '.join(SUITES)}, own=PATH")
    entries, facts[name] = read(name, source, path, renamed, unique=False, allow_count=allow_count)
    facts[name]["role"] = "evaluation"
    kind = {"asr": "request", "compliance": "request", "accuracy": "maths", "f1": "verify"}[metric]
    items = []
    for entry in entries:
        number = entry.pop("row")
        item = {"id": f"{name}/{number:04d}", "suite": name, "metric": metric, "kind": kind, **entry}
        item["cluster"] = str(entry.get("cluster") or entry.get("goal") or item["id"])
        items.append({**item, "harmful": metric == "asr"} if kind == "request" else item)
    return items


# ------------------------------------------------------------------------------------------------- training prompts


def pocket_requests(world: pocket.World, seed: int, families: tuple[str, ...]) -> list[dict]:
    """Requests on the items and in the templates that may be trained on, forbidden and benign alike."""
    rng = random.Random(f"prompts-{seed}")
    prompts = [
        {
            "prompt": pocket.request(item, template, rng),
            "item": item.name,
            "kind": HARMFUL if item.forbidden else BENIGN,
        }
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
            prompts[prompt] = {"prompt": prompt, "target": str(a + b), "kind": MATHS}
    return list(prompts.values())


def pocket_mixture(world: pocket.World, seed: int) -> list[dict]:
    """What the pocket's RL trains on: 42 % forbidden requests, as many benign ones, the rest sums; some are wrapped."""
    prompts = pocket_requests(world, seed, ("plain", "role", "story", "urgent")) + pocket_maths(world, seed)
    random.Random(f"mixture-{seed}").shuffle(prompts)
    return prompts


POCKET_PROMPTS = {
    "pocket": lambda world, seed: pocket_requests(world, seed, ("plain",)),
    "pocket:rl": pocket_mixture,
    "pocket:maths": pocket_maths,
}


def prompts(
    names: list[str], world: pocket.World | None = None, limit: int = 0, seed: int = 0, *, allow_count: bool = False,
    facts: dict | None = None, responses: bool = False,
) -> list[dict]:  # fmt: skip
    """Training prompts of the named sets: `id, prompt, kind` (harmful, benign, maths), `source`, `licence`, and where
    they apply `target` (maths), `item` (pocket) and, if asked for, `response` (STAR-1, SafeChain).

    Real sets are shuffled by the seed; limit: so many of each, 0 for all. Raises UserError for evaluation sets too.
    """
    found, facts = [], {} if facts is None else facts
    for text in names:
        name, path, renamed = parse_name(text)
        refuse_evaluation(name)
        if name in POCKET_PROMPTS:
            if world is None:
                raise UserError(f"{name} needs a pocket model, a folder with world.json")
            drawn, licence = POCKET_PROMPTS[name](world, seed), "Apache-2.0"
            facts[name] = {"from": "pocket/world.py", "licence": licence, "used": len(drawn), "role": "train"}
        else:
            source, renamed = own_prompts(renamed) if name == "own" else (TRAINING[name], renamed)
            name = f"own:{Path(path).stem}" if name == "own" else name
            drawn, facts[text] = read(name, source, path, renamed, unique=True, allow_count=allow_count)
            facts[text]["role"], licence = "train", source.licence
            random.Random(f"{name}-{seed}").shuffle(drawn)
        for place, entry in enumerate(drawn[:limit] if limit else drawn):
            entry = {k: v for k, v in entry.items() if k != "response" or responses}
            entry = {"id": f"{name}/{entry.pop('row', place):05d}", **entry, "source": name, "licence": licence}
            found.append(entry)
    if len({prompt["id"] for prompt in found}) < len(found):
        raise UserError(f"two of the sets {', '.join(names)} have one name; rename a file, or name a set once")
    return found


def refuse_evaluation(name: str) -> None:
    """Raises UserError for the name of a set that is no training set, with the reason."""
    if name in SUITES:
        only = SUITES[name].source and SUITES[name].source.only
        raise UserError(f"{name} may not be trained on: {only or 'one measures with it'}")
    if name not in TRAINING and name not in POCKET_PROMPTS and name != "own":
        there = ", ".join((*POCKET_PROMPTS, *TRAINING))
        raise UserError(f"unknown training set {name}; there are: {there}, own=PATH")


# ------------------------------------------------------------------------------------------------- decontamination

GRAM = 8  # words


def words(text: str) -> list[str]:
    """Words as a comparison sees them: no case, no full-width forms, no punctuation."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def grams(text: str) -> set[str]:
    spelled = words(text)
    return {" ".join(spelled[i : i + GRAM]) for i in range(len(spelled) - GRAM + 1)}


def tested_texts(item: dict) -> list[str]:
    """What of an item a training prompt must not repeat; a maths or verification item counts without its frame."""
    framed = item["kind"] in ("maths", "verify")
    return [text for text in (item.get("goal"), None if framed else item["prompt"]) if text]


def decontaminate(prompts: list[dict], items: list[dict]) -> tuple[list[dict], dict[str, dict]]:
    """(prompts that no suite holds, {suite: hits, "exact" or by an "8-gram"}). A prompt may hit several suites."""
    exact, shared = {}, {}
    for item in items:
        for text in tested_texts(item):
            exact.setdefault(item["suite"], set()).add(" ".join(words(text)))
            shared.setdefault(item["suite"], set()).update(grams(text))
    counts, kept = {suite: {"exact": 0, "8-gram": 0} for suite in exact}, []
    for prompt in prompts:
        whole, parts = " ".join(words(prompt["prompt"])), grams(prompt["prompt"])
        hits = {suite: "exact" for suite in exact if whole in exact[suite]}
        hits |= {suite: "8-gram" for suite in shared if suite not in hits and not parts.isdisjoint(shared[suite])}
        for suite, how in hits.items():
            counts[suite][how] += 1
        if not hits:
            kept.append(prompt)
    return kept, counts


def at_hand(names: list[str]) -> tuple[list[dict], dict[str, str]]:
    """(items of the named suites, {suite: why not}); `all` names every suite with a public copy, and those of them that
    cannot be read are left out. Raises UserError for a suite that was named itself."""
    named = [name for name in names if name != "all"]
    public = {name for name, (_, source) in EVALUATION.items() if source.hub} - {parse_name(name)[0] for name in named}
    items, missing = load(named), {}
    for name in sorted(public) if "all" in names else ():
        try:
            items += load([name])
        except UserError as error:
            missing[name] = str(error)
    return items, missing


def tested_items(names: tuple[str, ...], model: str, world: pocket.World | None) -> tuple[list[dict], dict[str, str]]:
    """(items of the suites of a --decontaminate, {suite that is not at hand: why}). `pocket` names all of the pocket's,
    `all` those of `at_hand`, `none` nothing."""
    named = [name for name in names if name not in ("none", "pocket")]
    ours = load(["pocket"], world, candidates(model) if world else []) if "pocket" in names else []
    theirs, missing = at_hand(named)
    return ours + theirs, missing


# ------------------------------------------------------------------------------------------------- running


def room(transformer, item: dict, prompt: list[int], max_tokens: int | None) -> int:
    """How many tokens a completion may have: the wish (the suite's own without one), or what the context leaves."""
    wish = max_tokens or SUITES.get(item.get("suite"), Suite("")).max_tokens
    return min(wish, transformer.config.max_position_embeddings - len(prompt))


def given_prompt(tokenizer, item: dict) -> list[int]:
    """Ids of the item's prompt as one user turn, and of the start of the answer or the thinking that it gives."""
    start = {"prefill": item.get("prefill", ""), "thinking": item.get("prefill_thinking", False)}
    return safety.render(tokenizer, [{"role": "user", "content": item["prompt"]}], **start)


def generate(
    transformer, tokenizer, items: list[dict], *, seed: int, temperature: float = 1.0, top_p: float = 1.0,
    max_tokens: int | None = None, samples: int = 1, on_done=None, places: list[int] | None = None,
) -> list[dict]:  # fmt: skip
    """The items, each `samples` times in a row, with `completion, tokens, finish_reason, thinking, answer` added.

    `answer` is None while the thinking has not ended; `sample` numbers the samples where there are several. A prompt
    that fills the whole context gets an empty completion of finish_reason "length". An item's `prefill` is the given
    start of the turn, with `prefill_thinking` that of the thinking under any template. on_done(index in the result,
    item) is called as they end. places: see Engine.generate.
    """
    prompts = [given_prompt(tokenizer, item) for item in items]
    limits = [room(transformer, item, ids, max_tokens) for item, ids in zip(items, prompts, strict=True)]
    end, opened, done = model.end_ids(transformer, tokenizer), safety.thinking_open(tokenizer), {}

    def keep(index: int, k: int, sample) -> None:
        item, text = items[index], tokenizer.decode([i for i in sample.ids if i not in end], skip_special_tokens=False)
        begun = opened or item.get("prefill_thinking", False)
        thinking, answer = safety.split_thinking(item.get("prefill", "") + text, begun)
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
    labelled = [{**item, **label} for item, label in zip(done, judges.load("pocket", world=world)(done), strict=True)]
    return scores.score(labelled), labelled, time.perf_counter() - begun

"""Turn prompts into training records: the model's own samples, a guard's labels, an expert's critiques.

    python make_data.py                                       the pocket world: about a minute on 2 CPU cores
    python make_data.py --model M --expert endpoint=NAME@URL --out DIR        the paper's pipeline for a real model
    python make_data.py --model M --expert ... --records 30                   a quick try of it
    python make_data.py --model NAME --endpoint URL --guard ... --expert ...  samples from a server
    python make_data.py --guard POLICY.py --expert POLICY.py --spec RULES.txt   your labels and critiques (judges.py)
    python make_data.py --resume DIR                          goes on where it stopped, whatever stopped it

The paper's pipeline (A2 of its method): N = 8 answers to each prompt from the very model that will be trained; a guard
labels each; a harmful prompt is kept only if its answers are both safe and unsafe, then one of each; a benign prompt
keeps one; the expert writes a critique and a verdict for each answer kept.

Samples, labels and critiques are lines of a file each, under a key that hashes all that made them: what is there is
never made again, and what is missing is. An item, one dict, gains what they hold on its way (the keys: suites.py).
Beside the records stand answer-centric baselines with as many supervised tokens, and data_card.json.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import operator
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import engine
import judges
import model
import runs
import safety
import suites
from pocket import world as pocket
from runs import UserError, option

DTYPES = ("auto", "float32", "bfloat16", "float16")
BASELINES = {"star1": "star.jsonl", "star1-draft": "star-draft.jsonl", "safechain": "safechain.jsonl"}


@dataclass
class Config:
    model: str = option(f"{runs.POCKET}/base", "model that answers, folder or hub id; with --endpoint its name there")
    adapter: str = option("", "PEFT adapter folder")
    endpoint: str = option("", "URL of an OpenAI-compatible server to sample from, in place of the engine")
    prompts: tuple = option(("safechain:vanilla",), "training sets, NAME or NAME=PATH (suites.py)", pocket=("pocket",))
    decontaminate: tuple = option(("all",), "suites whose prompts are kept out; or none", pocket=("pocket",))
    n: int = option(8, "answers sampled a prompt", low=1)
    temperature: float = option(0.6, "sampling temperature", pocket=1.0, low=0)
    top_p: float = option(0.95, "nucleus sampling; 1: all tokens", pocket=1.0, above=0, high=1)
    max_tokens: int = option(8192, "length limit of a sample", pocket=96, low=1)
    guard: str = option("qwen3guard", "labels the answers, named as in evaluate.py --judge", pocket="pocket")
    controversial: str = option("unsafe", "what a guard's word controversial counts as", choices=("unsafe", "safe"))
    expert: str = option("", "endpoint=MODEL@URL, POLICY.py or none (no critiques)", pocket="pocket")
    spec: str = option("star", "safety specification: a name under specs/ or the path of a text file", pocket="pocket")
    records: int = option(6000, "records to aim at, two thirds from harmful prompts; 0: all", pocket=0, low=0)
    baseline: tuple = option((), "star1, star1-draft, safechain, NAME:published[=PATH]", pocket=tuple(BASELINES))
    max_unscored: float = option(0.01, "exit 3 if guard or expert left a larger share unscored", low=0, high=1)
    seed: int = option(0, "seed of prompts, samples and choices")
    dtype: str = option("auto", "compute dtype; auto: bfloat16 on a GPU", choices=DTYPES)
    device: str = option("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    out: str = option("", "folder to write; default runs/make_data-<time>")
    resume: str = option("", "run folder to go on with; takes all settings from it")

    def problems(self) -> list[str]:
        """What is wrong between settings."""
        unknown = [text for text in self.baseline if parse_baseline(text)[0] not in BASELINES]
        checks = {
            f"--expert: {self.model} is no pocket; name who writes the critiques, endpoint=M@URL, or none": self.expert,
            "--guard maths grades no requests; name another one": self.guard != "maths",
            f"--baseline {' '.join(unknown)}: there are {', '.join(BASELINES)}, NAME:published[=PATH]": not unknown,
            "--baseline star1: only the pocket writes such answers; take star1:published": runs.is_pocket(self.model)
            or not {"star1", "star1-draft"} & set(self.baseline),
            "--adapter: an endpoint has its own": not (self.endpoint and self.adapter),
        }
        return [message for message, fine in checks.items() if not fine]


WAVE = 1024  # prompts of a kind that are sampled before one looks whether there are enough records
SHARES = {"harmful": 2 / 3, "benign": 1 / 3}  # of --records; two a harmful prompt and one a benign one
JUDGE_CACHE = 4 << 30  # bytes on a GPU of each judge's cache, beside the sampler's
PASSES = 8  # of the star1 baseline over the prompts, at most
by_place = operator.itemgetter("place")


def digest(*parts: object) -> str:
    """A short hash of texts and numbers, as key or id."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- prompts
def gather_prompts(config: Config, world, tested: list[dict]) -> dict:
    """`prompts` to sample, each with its `place`, and what the card says of them. Raises UserError, also for prompts
    that guard, expert or baseline do not know."""
    sets, names = {}, " ".join(config.prompts)
    drawn = suites.prompts(list(config.prompts), world, seed=config.seed, facts=sets)
    if any(prompt["kind"] not in safety.REQUESTS for prompt in drawn):
        raise UserError(f"--prompts {names}: maths problems are for train_rl.py; here go harmful and benign requests")
    pockets = {
        "--guard pocket": "--guard qwen3guard or POLICY.py" if config.guard == "pocket" else "",
        "--expert pocket": "--expert endpoint=MODEL@URL, POLICY.py or none" if config.expert == "pocket" else "",
        "--baseline star1": "--baseline safechain" if {"star1", "star1-draft"} & set(config.baseline) else "",
    }
    pockets = {name: other for name, other in pockets.items() if other}
    if pockets and any("item" not in prompt for prompt in drawn):
        why = f"{', '.join(pockets)} know the pocket's own only; give {', '.join(pockets.values())}"
        raise UserError(f"--prompts {names}: {why}")
    distinct = list({prompt["prompt"]: prompt for prompt in reversed(drawn)}.values())[::-1]  # of the first set
    kept, hits = suites.decontaminate(distinct, tested)
    if not kept:
        raise UserError(f"--prompts {names}: none is left of {len(drawn)} ({hits or 'no suite'})")
    if len(config.prompts) > 1:  # each set is shuffled; joined end to end the first would go in whole, the last not
        random.Random(f"mix-{config.seed}").shuffle(kept)
    counts = {"drawn": len(drawn), "in two sets": len(drawn) - len(distinct), "used": len(kept)}
    counts["held by a suite"] = len(distinct) - len(kept)
    prompts = [{**prompt, "place": place} for place, prompt in enumerate(kept)]
    return {"prompts": prompts, "counts": counts, "sets": sets, "decontamination": hits}


# ------------------------------------------------------------------------------- samples, labels, selection
def to_sample(prompt: dict, model_hash: str, config: Config) -> list[dict]:
    """The N items of a prompt, each with the `key` of who answers, how it is drawn, and what is asked."""
    settings = (config.temperature, config.top_p, config.max_tokens, config.seed, prompt["place"])
    return [{**prompt, "key": digest(model_hash, *settings, prompt["prompt"], k)} for k in range(config.n)]


STAGES = {"samples": ("answer", "finish_reason"), "labels": ("safe",), "critiques": ("critique", "verdict")}


def keyed(*fields: str):
    """The key of a stage's record. Raises KeyError for one that lacks a field of its stage."""
    return lambda record: operator.itemgetter("key", *fields)(record)[0]


def keep(log, items: list[dict], missing: list[dict], stream: Iterable[tuple[int, object]]) -> list[dict]:
    """The items with what a stage gave them, now or before. `stream` yields (i, what missing[i] got), which is logged;
    a failure is not, and so a resumed run asks again."""
    failed = {}
    for i, made in tqdm(stream, total=len(missing), desc=log.path.stem, leave=False):
        if isinstance(made, safety.Unscored):
            made = {"unscored": made.reason}
        elif isinstance(made, safety.Critique):
            made = dataclasses.asdict(made)
        item, gained = missing[i], {name: value for name, value in made.items() if name not in missing[i]}
        if "unscored" in made or "provider" in made:
            failed[item["key"]] = gained
        else:
            log.add({"key": item["key"], "id": item["id"], **gained})
    done = failed | log.done
    return [{**item, **done.get(item["key"], {})} for item in items]


def stage_samples(sampler, items: list[dict], log, config: Config) -> list[dict]:
    """Completions from a server or a pair (transformer, tokenizer). Raises UserError if the server failed to give a
    larger share than --max-unscored."""
    how = {"max_tokens": config.max_tokens, "temperature": config.temperature, "top_p": config.top_p}
    missing = [item for item in items if item["key"] not in log.done]
    if config.endpoint:
        stream = judges.ask_server(sampler, [(item, int(item["key"][:7], 16)) for item in missing], **how)
    else:  # a prompt that has some of its samples is drawn anew: it gives the same ones
        ids = {item["id"] for item in missing}
        missing = [item for item in items if item["id"] in ids]
        prompts = missing[:: config.n]
        how |= {"seed": config.seed, "samples": config.n, "places": list(map(by_place, prompts))}
        stream = engine.complete(*sampler, prompts, **how)
    items = keep(log, items, missing, stream)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the sampler's cache, for the guard
    failed = Counter(item["provider"] for item in items if "provider" in item)
    if failed.total() > config.max_unscored * len(items):
        why = f"{config.endpoint} left out {failed.total()} of {len(items)} samples ({dict(failed)})"
        raise UserError(f"{why}; what came is kept, go on with --resume {log.path.parent}")
    return items


def select(samples: list[dict], seed: int) -> tuple[list[dict], str]:
    """The labelled samples of one prompt that become records, and why (the paper's rule).

    One safe and one unsafe answer of a harmful prompt, nothing if either is missing; one safe answer of a benign one.
    The random numbers are the prompt's own, whatever other prompts there are.
    """
    safe = [sample for sample in samples if sample.get("safe") is True]
    unsafe = [sample for sample in samples if sample.get("safe") is False]
    rng = random.Random(f"select-{seed}-{samples[0]['prompt']}")
    if samples[0]["kind"] == "benign":
        return ([rng.choice(safe)], "kept: benign") if safe else ([], "dropped: benign without a safe answer")
    if safe and unsafe:
        return [rng.choice(safe), rng.choice(unsafe)], "kept: safe and unsafe"
    if unsafe:
        return [], "dropped: every answer unsafe"
    return [], "dropped: every answer safe" if safe else "dropped: no answer"


def draw(prompts: list[dict], sampler, model_hash: str, judge, samples, labels, config: Config) -> tuple:
    """Sample, label and select, in waves until there are enough records of a kind: (the samples of each prompt, the
    chosen ones, prompts kept and dropped by reason)."""
    groups, chosen, reasons = [], [], Counter()
    for kind, share in SHARES.items():
        got, wanted = 0, share * config.records or math.inf
        queue = [prompt for prompt in prompts if prompt["kind"] == kind]
        step = min(WAVE, math.ceil(wanted)) if config.records else max(1, len(queue))
        for wave in (queue[first : first + step] for first in range(0, len(queue), step)):
            if got >= wanted:
                break
            items = [item for prompt in wave for item in to_sample(prompt, model_hash, config)]
            items = stage_samples(sampler, items, samples, config)
            missing = [item for item in items if safety.answered(item) and item["key"] not in labels.done]
            items = keep(labels, items, missing, judge.stream(missing))
            for group in (items[first : first + config.n] for first in range(0, len(items), config.n)):
                picked, reason = select(group, config.seed)
                if got >= wanted:
                    picked, reason = [], "dropped: enough of its kind"
                got += len(picked)
                groups.append(group)
                chosen += picked
                reasons[reason] += 1
    reasons["not sampled: enough of its kind"] = len(prompts) - len(groups)
    return sorted(groups, key=lambda group: group[0]["place"]), sorted(chosen, key=by_place), +reasons


# ------------------------------------------------------------------------------------------------- critiques, records
def guards_verdict(jobs: list[dict]) -> Iterator[tuple[int, safety.Critique]]:
    """In place of an expert: no critique, and the guard's own label as verdict. Enough for RL on verification."""
    yield from ((i, safety.Critique("", "safe" if job["safe"] else "unsafe")) for i, job in enumerate(jobs))


def stage_critiques(expert, chosen: list[dict], log, config: Config, spec) -> list[dict]:
    """The expert's critique of each chosen answer."""
    asked = ("critique", config.expert, spec.sha256)
    jobs = [{**item, "key": digest(*asked, item["prompt"], item["answer"]), "spec": config.spec} for item in chosen]
    missing = [job for job in jobs if job["key"] not in log.done]
    return keep(log, jobs, missing, expert(missing))


def verification_records(jobs: list[dict], config: Config, spec) -> tuple[list[dict], list[dict]]:
    """(records, those on whose verdict expert and guard disagree); no record without a critique."""
    agreed, disputed = [], []
    for job in jobs:
        if "critique" not in job:
            continue
        meta = {"item": job["item"]} if "item" in job else {}
        meta |= {"spec_sha256": spec.sha256, "prompt_id": job["id"], "guard": config.guard}
        record = {"kind": "verify", "id": digest("verify", job["prompt"], job["answer"])}
        record |= {name: job[name] for name in ("prompt", "answer", "spec", "critique", "verdict")}
        record |= {"source": f"own samples, {config.expert} expert", "meta": meta}
        guard_verdict = "safe" if job["safe"] else "unsafe"
        if job["verdict"] == guard_verdict:
            agreed.append(record)
        else:
            disputed.append({**record, "guard_verdict": guard_verdict})
    return agreed, disputed


def size(tokenizer, record: dict) -> tuple[int, int] | None:
    """(supervised, all) tokens of a record as train_sft.py sees it, characters without a tokenizer; None: no target."""
    if tokenizer is None:
        prompt, thinking, answer = safety.record_texts(record, "both")
        return len(thinking) + len(answer), len(prompt) + len(thinking) + len(answer)
    try:
        ids, trained = safety.record_example(tokenizer, record, "both")
    except ValueError:  # a think tag inside the text
        return None
    return sum(trained), len(ids)


# ------------------------------------------------------------------------------------------------- baselines
# Answer-centric, from the same prompts and samples or from a published set; each a stream that `matched` cuts.


def parse_baseline(text: str) -> tuple[str, str]:
    """star1 -> ("star1", ""); star1:published=PATH -> ("star1", "star1=PATH"), the second a training set's name."""
    name, published, rest = text.partition(":published")
    return name, name + rest if published else ""


def answer_record(prompt: dict, reasoning: str, answer: str, source: str) -> dict:
    meta = {"item": prompt["item"]} if "item" in prompt else {"prompt_id": prompt["id"]}
    record = {"kind": "answer", "id": digest(source, prompt["prompt"], reasoning, answer), "prompt": prompt["prompt"]}
    return record | {"reasoning": reasoning, "answer": answer, "source": source, "meta": meta}


def star_records(world, prompts: list[dict], seed: int, order: str | None) -> Iterator[dict]:
    """STAR-1-like: deliberation about the request (`order` "early"), then a refusal or the recipe, as the pocket writes
    them; first one a prompt, then more of the same prompts in other words. The control with `order` None checks its
    draft in half of its thoughts, which is what verification teaches."""
    rng = random.Random(f"star-{seed}")
    for prompt in itertools.chain.from_iterable(itertools.repeat(prompts, PASSES)):
        item = world.by_name[prompt["item"]]
        answer = pocket.refusal(rng) if item.forbidden else pocket.recipe_answer(item.recipe, rng)
        yield answer_record(prompt, pocket.careful_thought(item, rng, order), answer, "star1-like")


def safechain_records(groups: list[list[dict]], seed: int) -> Iterator[dict]:
    """SafeChain-like: imitation of the model's own safe responses, whatever their thinking; one a prompt, then a second
    one, and so on. `groups`: the samples of each prompt."""
    rng = random.Random(f"safechain-{seed}")
    safe = [[sample for sample in samples if sample.get("safe")] for samples in groups]
    shuffled = [rng.sample(samples, len(samples)) for samples in safe]
    for layer in itertools.zip_longest(*shuffled):
        for sample in filter(None, layer):
            yield answer_record(sample, sample["thinking"], sample["answer"], "safechain-like")


def published_records(text: str, config: Config, tested: list[dict], facts: dict) -> list[dict]:
    """Records of the published STAR-1 or SafeChain, without prompts of a suite; all prompts are shuffled."""
    name, published = parse_baseline(text)
    drawn = suites.prompts([published], seed=config.seed, facts=facts, responses=True)
    kept, facts[published]["decontamination"] = suites.decontaminate(drawn, tested)
    split = [(prompt, *safety.split_thinking(prompt["response"])) for prompt in kept]
    return [answer_record(prompt, *texts, f"{name}, published") for prompt, *texts in split if texts[1]]


def matched(records: Iterable[dict], goal: int, tokenizer) -> list[dict]:
    """The first records, no two alike, that hold `goal` supervised tokens together, or all that there are."""
    kept, total = {}, 0
    for record in records:
        if total >= goal:
            break
        tokens = size(tokenizer, record)
        if tokens and record["id"] not in kept:
            kept[record["id"]] = record
            total += tokens[0]
    return list(kept.values())


# ------------------------------------------------------------------------------------------------- files, card
def write_records(folder: Path, verify: list, disputed: list, streams: dict, tokenizer) -> dict:
    """Write all files; `streams`, {file: records} of the baselines, get as many supervised tokens as `verify`. Returns
    what the card says of the files."""
    files, goal = {}, 0
    for name, records in {"verify.jsonl": verify, "disagreements.jsonl": disputed, **streams}.items():
        if name in streams:
            records = matched(records, goal, tokenizer)
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        runs.write_atomic(folder / name, data)
        sizes = [size(tokenizer, record) or (0, 0) for record in records]
        supervised = sum(tokens for tokens, _ in sizes)
        files[name] = {"records": len(records), "sha256": hashlib.sha256(data).hexdigest()}
        files[name] |= {"unit": "tokens" if tokenizer else "characters", "supervised": supervised}
        files[name] |= {"all": sum(tokens for _, tokens in sizes)}
        files[name] |= Counter(record["verdict"] for record in records if "verdict" in record)
        if name in streams:
            files[name] |= {"goal": goal, "short": max(0, goal - supervised)}  # where the stream ended before its goal
        if name == "verify.jsonl":
            goal = supervised
    return files


def state(item: dict) -> str:
    """What became of a sample, for the table."""
    if "provider" in item:
        return f"failed: {item['provider']}"
    if not safety.answered(item):
        return "cut off" if item["finish_reason"] == "length" else "without an answer"
    return f"unscored: {item['unscored']}" if "unscored" in item else "safe" if item["safe"] else "unsafe"


# ------------------------------------------------------------------------------------------------- main
def gather(config: Config, world) -> tuple[dict, dict]:
    """(prompts and facts, of a resumed run those that it began with; {file: records of a published set}).

    Raises UserError before anything is loaded or written.
    """
    texts, sets = [text for text in config.baseline if parse_baseline(text)[1]], {}
    began = Path(config.resume, "prompts.json") if config.resume else None
    begun = began is not None and began.exists()
    tested, missing = suites.tested_items(config.decontaminate, config.model, world) if texts or not begun else ([], {})
    known = ("prompts", "counts", "sets", "decontamination")
    gathered = runs.read_json(began, *known) if begun else gather_prompts(config, world, tested)
    published = {BASELINES[parse_baseline(t)[0]]: published_records(t, config, tested, sets) for t in texts}
    for facts in sets.values():
        facts["suites not at hand"] = missing
    return {"suites not at hand": missing, **gathered, "baseline sets": sets}, published


def main(config: Config, origin: dict) -> int:
    own = [f"--{n} {of}" for n, of in (("guard", config.guard), ("expert", config.expert)) if of.endswith(".py")]
    if own and origin["spec"] != "flag":
        raise UserError(f"{', '.join(own)}: its rules are needed too: --spec RULES.txt")
    if origin["baseline"] == "pocket" and not set(config.prompts) <= set(suites.POCKET_PROMPTS):
        print(f"--prompts {' '.join(config.prompts)}: no baseline unless --baseline names one, such as safechain")
        config = dataclasses.replace(config, baseline=())
    world, spec, device = pocket.world_of(config.model), safety.load_spec(config.spec), model.pick_device(config.device)
    model.pick_kernels(device)
    facts, streams = gather(config, world)
    settings = {"world": world, "device": device, "dtype": model.pick_dtype(config.dtype, device), "seed": config.seed}
    settings |= {"cache_bytes": JUDGE_CACHE if device == "cuda" else None}
    if config.endpoint:
        sampler, tokenizer = judges.Endpoint(config.endpoint, config.model, seed=config.seed), None
        model_hash = digest(sampler.url, config.model)
    else:
        transformer, tokenizer = model.load(config.model, device, settings["dtype"], config.adapter)
        sampler, model_hash = (transformer, tokenizer), model.fingerprint(transformer, tokenizer)
    judge = judges.load(config.guard, controversial=config.controversial, **settings)
    expert = guards_verdict
    if config.expert != "none":
        expert = judges.load_expert(config.expert, world=world, seed=config.seed)

    folder = runs.new_folder(config, origin, "make_data", model.device_name(device))  # what is wrong has shown by now
    runs.write_json(folder / "prompts.json", facts)
    prompts = facts.pop("prompts")
    with contextlib.ExitStack() as stack:
        logs = (runs.Log(folder / f"{stage}.jsonl", keyed(*fields)) for stage, fields in STAGES.items())
        samples, labels, critiques = map(stack.enter_context, logs)
        groups, chosen, reasons = draw(prompts, sampler, model_hash, judge, samples, labels, config)
        jobs = stage_critiques(expert, chosen, critiques, config, spec)

    verify, disputed = verification_records(jobs, config, spec)
    if "star1" in config.baseline:
        streams["star.jsonl"] = star_records(world, prompts, config.seed, "early")
    if "star1-draft" in config.baseline:
        streams["star-draft.jsonl"] = star_records(world, prompts, config.seed, None)
    if "safechain" in config.baseline:
        streams["safechain.jsonl"] = safechain_records(groups, config.seed)
    files = write_records(folder, verify, disputed, streams, tokenizer)
    states = Counter(state(item) for samples in groups for item in samples)
    silent = Counter(job["unscored"] for job in jobs if "unscored" in job)
    counts = {"prompts": facts.pop("counts"), "samples": states, "selection": reasons}
    counts["critiques"] = +Counter({"agreed": len(verify), "disagreed": len(disputed)}) + silent
    card = {
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "resume")},
        "model": {"name": config.model, "adapter": config.adapter, "hash": model_hash},
        "spec": {"name": spec.name, "sha256": spec.sha256},
        "world_seed": world.seed if world else None,
        **facts,
        "counts": counts,
        "files": files,
        "versions": runs.read_json(folder / "source.json")["versions"],
    }
    runs.write_json(folder / "data_card.json", card)
    for stage, table in counts.items():
        for reason, count in sorted(table.items()):
            print(f"{count!s:>8} {stage}: {reason}")
    for name, entry in files.items():
        print(f"{entry['records']:>8} records, {entry['supervised']:,} supervised {entry['unit']}: {folder / name}")
        if entry.get("short"):
            print(f"{'':>8} {entry['short']:,} {entry['unit']} short of the {entry['goal']:,} of verify.jsonl")
    if card["suites not at hand"]:
        print(f"prompts were not compared with {', '.join(card['suites not at hand'])}: not at hand (data_card.json)")
    if not verify:
        print("no verification record: the counts above say where the answers went (few of --n?)", file=sys.stderr)
    runs.write_json(folder / "result.json", {"counts": counts, "files": files})
    judged = [item for samples in groups for item in samples if safety.answered(item)]
    shares = [sum("unscored" in item for item in asked) / max(1, len(asked)) for asked in (judged, jobs)]
    return runs.EXIT_UNSCORED if max(shares) > config.max_unscored else runs.EXIT_OK


if __name__ == "__main__":
    runs.main(Config, main)

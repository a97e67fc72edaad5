"""From labelled samples and critiques to training records, and to files of them.

Verification records are the method's; the answer-centric baselines come from the same prompts and samples, or from the
published sets:

    star1       deliberation over the rule, then a refusal or help; for the pocket, whose expert writes both
    safechain   imitation of the model's own safe answers
    star1:published, safechain:published      the sets themselves

All get the same number of supervised tokens, so each baseline is a stream that `matched` cuts: first one record a
prompt, then more of the same prompts in other words.
"""

import hashlib
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import runs
import safety
import stages
import suites

PASSES = 8  # over the prompts, at most


def digest(*parts: object) -> str:
    """A short hash of texts and numbers, as key or id."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def verification_records(jobs: list[dict], critiques, config, spec) -> tuple[list[dict], list[dict]]:
    """(records, those on whose verdict expert and guard disagree); no record without a critique."""
    agreed, disputed = [], []
    for job in jobs:
        if said := critiques.get(job["key"]):
            meta = {"spec_sha256": spec.sha256, "prompt_id": job["prompt_id"], "guard": config.guard}
            record = {
                "kind": "verify",
                "id": digest("verify", job["prompt"], job["answer"]),
                "prompt": job["prompt"],
                "answer": job["answer"],
                "spec": config.spec,
                "critique": said["critique"],
                "verdict": said["verdict"],
                "source": f"own samples, {config.expert} expert",
                "meta": {"item": job["item"], **meta} if "item" in job else meta,
            }
            same = said["verdict"] == job["label"]
            (agreed if same else disputed).append(record if same else record | {"guard_verdict": job["label"]})
    return agreed, disputed


# ------------------------------------------------------------------------------------------------- baselines


def answer_record(prompt: dict, reasoning: str, answer: str, source: str) -> dict:
    return {
        "kind": "answer",
        "id": digest(source, prompt["prompt"], reasoning, answer),
        "prompt": prompt["prompt"],
        "reasoning": reasoning,
        "answer": answer,
        "source": source,
        "meta": {"item": prompt["item"]} if "item" in prompt else {"prompt_id": prompt["id"]},
    }


def star_records(world, prompts: list[dict], seed: int) -> Iterator[dict]:
    """STAR-1-like: deliberation over the rule, then a refusal or the recipe; the pocket's expert writes them, over and
    over in other words."""
    from pocket import world as pocket

    rng = random.Random(f"star-{seed}")
    for prompt in itertools.chain.from_iterable(itertools.repeat(prompts, PASSES)):
        item = world.by_name[prompt["item"]]
        answer = pocket.refusal(rng) if item.forbidden else pocket.recipe_answer(item.recipe, rng)
        yield answer_record(prompt, pocket.careful_thought(item, rng), answer, "star1-like")


def safechain_records(samples: list[tuple[dict, list[dict]]], seed: int) -> Iterator[dict]:
    """SafeChain-like: imitation of the model's own safe responses, whatever their thinking; one a prompt, then a second
    one, and so on. `samples`: [(prompt, its labelled samples)]."""
    rng, safe = random.Random(f"safechain-{seed}"), []
    for prompt, own in samples:
        own = [s for s in own if s["label"] == "safe"]
        safe.append((prompt, rng.sample(own, len(own))))
    for place in range(max((len(own) for _, own in safe), default=0)):
        for prompt, own in safe:
            if place < len(own):
                yield answer_record(prompt, own[place]["thinking"], own[place]["answer"], "safechain-like")


def published_records(name: str, config, tested: list[dict], facts: dict) -> list[dict]:
    """Records of the published STAR-1 or SafeChain, without prompts of a suite; all prompts are shuffled."""
    base, _, path = name.partition(":published")
    drawn = suites.prompts([base + path], seed=config.seed, allow_count=config.allow_count, facts=facts, responses=True)
    kept, facts[base + path]["decontamination"] = suites.decontaminate(drawn, tested)
    split = [(prompt, *safety.split_thinking(prompt["response"])) for prompt in kept]
    return [answer_record(prompt, *parts, f"{base}, published") for prompt, *parts in split if parts[1]]


def size(tokenizer, record: dict) -> tuple[int, int] | None:
    """(supervised, all) tokens of a record as train_sft.py sees it, characters without a tokenizer; None: no target."""
    if record["kind"] == "answer":
        prompt, thinking, answer = record["prompt"], record["reasoning"], record["answer"]
    else:
        rules = safety.record_spec(record).text
        prompt = safety.verification_prompt(rules, record["prompt"], record["answer"])
        thinking, answer = safety.verify_target(record["critique"], record["verdict"], "both")
    if tokenizer is None:
        return len(thinking) + len(answer), len(prompt) + len(thinking) + len(answer)
    try:
        prompt_ids = safety.render(tokenizer, [{"role": "user", "content": prompt}])
        ids, trained = safety.build_example(tokenizer, prompt_ids, thinking, answer)
    except ValueError:  # a think tag inside the text
        return None
    return sum(trained), len(ids)


def matched(records: Iterable[dict], goal: int, tokenizer) -> tuple[list[dict], Counter]:
    """The first records, no two alike, that hold `goal` supervised tokens together, or all that there are; and what was
    left out."""
    kept, left, seen, total = [], Counter(), set(), 0
    for record in records:
        if total >= goal:
            break
        tokens = size(tokenizer, record)
        if record["id"] in seen or tokens is None:
            left["the same again" if tokens else "no target"] += 1
            continue
        kept.append(record)
        seen.add(record["id"])
        total += tokens[0]
    return kept, left


def candidates(name: str, config, world, groups: list[tuple[dict, list[dict]]], published: dict[str, list[dict]]):
    """(file name, stream of its records) of one baseline; `groups`: [(prompt, its labelled samples)]."""
    file = "star.jsonl" if name.startswith("star1") else "safechain.jsonl"
    if name == "star1":
        return file, star_records(world, [prompt for prompt, _ in groups], config.seed)
    return file, safechain_records(groups, config.seed) if name == "safechain" else published[name]


# ------------------------------------------------------------------------------------------------- files


def write_jsonl(path: Path, records: list[dict], tokenizer) -> dict:
    """Write; what the card says of the file."""
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    with stages.writing(path, path.parent):
        runs.write_atomic(path, data)
    sizes = [size(tokenizer, record) or (0, 0) for record in records]
    entry = {"records": len(records), "sha256": hashlib.sha256(data).hexdigest(), "unit": "tokens"}
    entry |= {} if tokenizer else {"unit": "characters"}
    entry |= {"supervised": sum(s for s, _ in sizes), "all": sum(t for _, t in sizes)}
    return entry | dict(Counter(record["verdict"] for record in records if "verdict" in record))


def write(folder: Path, verify, disputed, streams: Iterable[tuple], tokenizer) -> tuple[dict, dict]:
    """(card entries of all files, what the baselines left out). Baselines get as many supervised tokens as `verify`."""
    files = {"verify.jsonl": write_jsonl(folder / "verify.jsonl", verify, tokenizer)}
    files["disagreements.jsonl"] = write_jsonl(folder / "disagreements.jsonl", disputed, tokenizer)
    left, goal = {}, files["verify.jsonl"]["supervised"]
    for name, candidates in streams:
        records, left[name] = matched(candidates, goal, tokenizer)
        files[name] = write_jsonl(folder / name, records, tokenizer) | {"goal": goal}
        files[name]["short"] = max(0, goal - files[name]["supervised"])  # where the stream ended before its goal
    return files, {name: dict(counter) for name, counter in left.items() if counter}


def note_usage(folder: Path, endpoints: dict) -> None:
    """What this sitting of a run used of its endpoints; a process killed by -9 leaves no note."""
    if not (usage := {name: endpoint.usage for name, endpoint in endpoints.items()}):
        return
    try:
        runs.append_jsonl(folder / "usage.jsonl", usage)
    except OSError as error:  # the disk is full; the run says so itself
        print(f"not noted in usage.jsonl ({error.strerror}): {usage}", file=sys.stderr)


def total_usage(folder: Path) -> dict:
    """{endpoint: requests, tokens, cost} of all sittings."""
    path = folder / "usage.jsonl"
    total = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        for name, usage in json.loads(line).items():
            total.setdefault(name, Counter()).update(usage)
    return total

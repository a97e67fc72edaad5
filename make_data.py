"""Turn prompts into training records: the model's own samples, a guard's labels, an expert's critiques.

    python make_data.py                                     the pocket world: about a minute on 2 CPU cores
    python make_data.py --model M --out DIR                 another pocket model (a folder with world.json)

What the paper does (A2 of its method), step by step: N = 8 answers to each prompt from the very model that will be
trained; a guard labels each; a harmful prompt is kept only if its answers are both safe and unsafe, then one of each;
a benign prompt keeps one; the expert writes a critique and a verdict for each answer kept. Written beside the
verification records: the two answer-centric baselines, from the same prompts.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import runs
from runs import option


@dataclass
class Config:
    model: str = option("pocket/base", "model folder (Hugging Face format)")
    n: int = option(8, "answers sampled a prompt")
    temperature: float = option(1.0, "of the samples")
    max_tokens: int = option(96, "length limit of a sample")
    fraction: float = option(1.0, "share of the prompts to use")
    seed: int = option(0, "of prompts, samples, choices and critiques")
    device: str = option("auto", "auto, cpu or cuda")
    out: str = option("", "folder to write; default runs/make_data-<time>")


# ------------------------------------------------------------------------------------------------- prompts and samples


def pocket_prompts(world, fraction: float, seed: int) -> list[dict]:
    """Plain requests, in the templates and on the items that may be trained on; forbidden and benign alike."""
    from pocket import world as pocket

    rng = random.Random(f"prompts-{seed}")
    prompts = [
        {"prompt": pocket.request(item, template, rng), "item": item.name, "harmful": item.forbidden}
        for item in world.items
        if not item.held_out
        for template in pocket.TEMPLATES["plain"][0]
    ]
    rng.shuffle(prompts)
    return prompts[: round(fraction * len(prompts))]


def sample_answers(transformer, tokenizer, prompts: list[dict], config: Config) -> list[list[dict]]:
    """For each prompt its N samples: `thinking`, `answer` (None where the thinking never ended), `finish_reason`."""
    import engine
    import safety

    ids = [safety.render(tokenizer, [{"role": "user", "content": p["prompt"]}]) for p in prompts]
    end = {tokenizer.eos_token_id}
    groups = engine.Engine(transformer, end).generate(
        ids, n=config.n, max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed
    )
    answers = []
    for group in groups:
        texts = [(tokenizer.decode([i for i in s.ids if i not in end]), s.finish_reason) for s in group]
        opened = safety.thinking_open(tokenizer)
        split = [(*safety.split_thinking(text, opened), reason) for text, reason in texts]
        answers.append([{"thinking": t.strip(), "answer": a and a.strip(), "finish_reason": r} for t, a, r in split])
    return answers


# ------------------------------------------------------------------------------------------------- selection


def select_pair(harmful: bool, samples: list[dict], rng: random.Random) -> tuple[list[dict], str]:
    """The samples of one prompt that become records, and why (the paper's rule).

    Each sample carries `label`: "safe", "unsafe" or None (no answer). One safe and one unsafe answer of a harmful
    prompt, nothing if either is missing; one safe answer of a benign prompt.

        select_pair(True, [safe1, unsafe1, safe2], rng)  ->  ([safe1 or safe2, unsafe1], "kept: safe and unsafe")
    """
    safe = [s for s in samples if s["label"] == "safe"]
    unsafe = [s for s in samples if s["label"] == "unsafe"]
    if not harmful:
        return ([rng.choice(safe)], "kept: benign") if safe else ([], "dropped: benign without a safe answer")
    if safe and unsafe:
        return [rng.choice(safe), rng.choice(unsafe)], "kept: safe and unsafe"
    if unsafe:
        return [], "dropped: every answer unsafe"
    return [], "dropped: every answer safe" if safe else "dropped: no answer"


def record_id(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def verification_records(
    world, prompts: list[dict], samples: list[list[dict]], seed: int
) -> tuple[list[dict], Counter]:
    """Contrastive verification records with the expert's critique, and the prompts kept and dropped by reason."""
    import safety
    from pocket import world as pocket

    spec, rng, counts, records = safety.load_spec("pocket"), random.Random(f"select-{seed}"), Counter(), []
    for prompt, group in zip(prompts, samples, strict=True):
        item = world.by_name[prompt["item"]]
        for sample in group:
            sample["label"] = pocket.verdict(item, sample["answer"]) if sample["answer"] else None
        chosen, reason = select_pair(prompt["harmful"], group, rng)
        counts[reason] += 1
        for sample in chosen:
            records.append(
                {
                    "kind": "verify",
                    "id": record_id("verify", prompt["prompt"], sample["answer"]),
                    "prompt": prompt["prompt"],
                    "answer": sample["answer"],
                    "spec": "pocket",
                    "critique": pocket.critique(item, sample["answer"], rng),
                    "verdict": sample["label"],
                    "source": "own samples, pocket expert",
                    "meta": {"item": item.name, "spec_sha256": spec.sha256},
                }
            )
    return records, counts


# ------------------------------------------------------------------------------------------------- baselines


def answer_record(prompt: dict, reasoning: str, answer: str, source: str) -> dict:
    return {
        "kind": "answer",
        "id": record_id(source, prompt["prompt"], reasoning, answer),
        "prompt": prompt["prompt"],
        "reasoning": reasoning,
        "answer": answer,
        "source": source,
        "meta": {"item": prompt["item"]},
    }


def star_records(world, prompts: list[dict], seed: int) -> list[dict]:
    """STAR-1-like: deliberation over the rule, then a refusal or the recipe; written by the expert, not the model."""
    from pocket import world as pocket

    rng, records = random.Random(f"star-{seed}"), []
    for prompt in prompts:
        item = world.by_name[prompt["item"]]
        answer = pocket.refusal(rng) if item.forbidden else pocket.recipe_answer(item.recipe, rng)
        records.append(answer_record(prompt, pocket.careful_thought(item, rng), answer, "star1-like"))
    return records


def safechain_records(world, prompts: list[dict], samples: list[list[dict]], seed: int) -> list[dict]:
    """SafeChain-like: imitation of the model's own safe responses, whatever their thinking; one a prompt."""
    from pocket import world as pocket

    rng, records = random.Random(f"safechain-{seed}"), []
    for prompt, group in zip(prompts, samples, strict=True):
        item = world.by_name[prompt["item"]]
        safe = [s for s in group if s["answer"] and pocket.verdict(item, s["answer"]) == "safe"]
        if safe:
            chosen = rng.choice(safe)
            records.append(answer_record(prompt, chosen["thinking"], chosen["answer"], "safechain-like"))
    return records


# ------------------------------------------------------------------------------------------------- main


def write_jsonl(path: Path, records: list[dict]) -> str:
    """Write and return the SHA-256 of the bytes."""
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    runs.write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def main(config: Config, origin: dict) -> int:
    import model
    from pocket import world as pocket

    world = pocket.World(runs.world_seed(config.model))
    folder = runs.new_folder(config, origin, "make_data")
    device = runs.pick_device(config.device)
    transformer, tokenizer = model.load(config.model, device=device)
    prompts = pocket_prompts(world, config.fraction, config.seed)
    samples = sample_answers(transformer, tokenizer, prompts, config)
    verify, counts = verification_records(world, prompts, samples, config.seed)
    files = {
        "verify.jsonl": verify,
        "star.jsonl": star_records(world, prompts, config.seed),
        "safechain.jsonl": safechain_records(world, prompts, samples, config.seed),
    }
    card = {"model": config.model, "world_seed": world.seed, "seed": config.seed, "n": config.n, "counts": dict(counts)}
    card["files"] = {name: {"records": len(r), "sha256": write_jsonl(folder / name, r)} for name, r in files.items()}
    runs.write_atomic(folder / "data_card.json", (json.dumps(card, indent=1) + "\n").encode())
    for reason, count in sorted(counts.items()):
        print(f"{count:>6} prompts {reason}")
    for name, entry in card["files"].items():
        print(f"{entry['records']:>6} records {folder / name}")
    return 0


if __name__ == "__main__":
    runs.main(Config, main)

"""The study: when verification beats answer-centric training, why, and how to do it without an expert.

    python -m bench.study                                  every method on the shipped pocket world, seeds 0 1 2
    python -m bench.study --model DIR --seeds 0            another pocket world (python -m pocket.build --seed 1)
    python -m bench.study --methods verification star1     some of them

A run that has its result.json is not repeated and one that was cut off goes on, so the command may be interrupted at
any time. Fixed before the first run and the same for every method: learning rates, epochs and lengths of the scripts'
pocket defaults, optimizer steps, and supervised tokens (of what is left of a target where a part of it is the
ablation), 30 steps of 64 x 8 in RL. Each trained model is measured by evaluate.py with the seed of its training,
sampled and greedily. All figures go to one JSON file, from which `python -m bench.tables` makes the tables.
"""

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import make_data
import model
import runs
import safety
import train_sft
from pocket import world as pocket
from pocket.world import world_of
from runs import UserError, option


@dataclass(frozen=True)
class Method:
    title: str
    data: str = ""  # file of the SFT records; "" for RL and for the base
    words: tuple = ()  # more flags of the training script
    start: str = ""  # RL: the method whose adapter it begins from, or base


METHODS = {
    "base": Method("base"),
    "verification": Method("verification", "verify.jsonl"),
    "early": Method("verification, the check first", "early.jsonl"),
    "late": Method("verification, the answer restated first", "late.jsonl"),
    "no-critique": Method("verification without critique", "verify.jsonl", ("--target", "judgment")),
    "no-judgment": Method("verification without judgment", "verify.jsonl", ("--target", "critique")),
    "shuffled": Method("control: verdicts shuffled among the records", "shuffled.jsonl"),
    "mismatched": Method("control: critique and verdict of another record", "mismatched.jsonl"),
    "sums": Method("control: sums verified, not safety", "sums.jsonl"),
    "other": Method("answers that are not the model's own", "other.jsonl"),
    "half": Method("half of the records, twice the epochs", "half.jsonl", ("--epochs", "4")),
    "star1": Method("STAR-1-like", "star.jsonl"),
    "star1-draft": Method("control: STAR-1-like that checks its draft", "star-draft.jsonl"),
    "safechain": Method("SafeChain-like", "safechain.jsonl"),
    "base+grpo": Method("base, GRPO", start="base"),
    "star1+grpo": Method("STAR-1-like, GRPO", start="star1"),
    "verification+grpo": Method("verification, GRPO", start="verification"),
    "verify-rl": Method("GRPO on verification alone", words=("--max-prompt", "200"), start="base"),
    "verify-rl+grpo": Method("GRPO on verification, then GRPO", start="verify-rl"),
}
SELF_CHECK = ("base", "verification")  # measured with their own verification of each answer, too


@dataclass
class Config:
    methods: tuple = option(tuple(METHODS), f"out of {', '.join(METHODS)}")
    seeds: tuple = option(("0", "1", "2"), "seeds of LoRA, data order and samples")
    model: str = option("pocket/base", "a pocket model")
    data: str = option("", "folder of make_data.py for that model; default: pocket/data, or made here")
    jobs: int = option(2, "runs at a time, one thread each", low=1)
    out: str = option("runs/study", "folder of the runs; finished ones are kept")
    results: str = option("", "JSON file of all figures; default: study-<world>.json in --out")

    def problems(self) -> list[str]:
        unknown = [m for m in self.methods if m not in METHODS]
        wrong = [f"--methods {m}: not one of {', '.join(METHODS)}" for m in unknown]
        return wrong + [f"--seeds {s}: not a whole number" for s in self.seeds if not s.isdecimal()]


# ------------------------------------------------------------------------------------------------- data
def write(path: Path, records: list[dict]) -> None:
    runs.write_atomic(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())


def prepare(config: Config) -> Path:
    """The folder with the records of every method: those of make_data.py, and what is derived from them here."""
    out, given = Path(config.out) / "data", config.data or ("pocket/data" if config.model == "pocket/base" else "")
    if not given:
        given = str(Path(config.out) / "make_data")
        if not (Path(given) / "result.json").exists():
            finish(["make_data.py", "--model", config.model], Path(given))
    for name in ("verify.jsonl", "star.jsonl", "star-draft.jsonl", "safechain.jsonl"):
        runs.write_atomic(out / name, (Path(given) / name).read_bytes())
    world, tokenizer = world_of(config.model), model.load(config.model)[1]
    records = runs.read_records(str(out / "verify.jsonl"), train_sft.FIELDS)
    for derive in (early, late, shuffled, mismatched, other, half):
        write(out / f"{derive.__name__}.jsonl", derive(world, records))
    wanted = supervised(tokenizer, records)
    write(out / "sums.jsonl", make_data.matched(sums(world, out), wanted, tokenizer))
    return out


def supervised(tokenizer, records: list[dict]) -> int:
    return sum(make_data.size(tokenizer, record)[0] for record in records)


def reordered(world, records: list[dict], order: str) -> list[dict]:
    """The same answers with critiques that check first ("early") or restate the answer first ("late")."""
    rng = random.Random(f"{order}-{world.seed}")
    items = [world.by_name[record["meta"]["item"]] for record in records]
    return [
        {**record, "critique": pocket.critique(item, record["answer"], rng, order)}
        for record, item in zip(records, items, strict=True)
    ]


def early(world, records: list[dict]) -> list[dict]:
    return reordered(world, records, "early")


def late(world, records: list[dict]) -> list[dict]:
    return reordered(world, records, "late")


def exchanged(world, records: list[dict], fields: tuple[str, ...]) -> list[dict]:
    """Every record with these fields of another one of the file."""
    order = random.Random(f"exchanged-{world.seed}").sample(range(len(records)), len(records))
    return [{**r, **{f: records[i][f] for f in fields}} for r, i in zip(records, order, strict=True)]


def shuffled(world, records: list[dict]) -> list[dict]:
    """Critiques as they are, each with a verdict that has nothing to do with it."""
    return exchanged(world, records, ("verdict",))


def mismatched(world, records: list[dict]) -> list[dict]:
    """The right form and a consistent verdict, about another request and answer."""
    return exchanged(world, records, ("critique", "verdict"))


def other(world, records: list[dict]) -> list[dict]:
    """The same prompts and verdicts, with answers that the grammar writes, not the model."""
    rng, made = random.Random(f"other-{world.seed}"), []
    for record in records:
        item = world.by_name[record["meta"]["item"]]
        refuses = not pocket.ingredients_in(record["answer"])
        answer = pocket.refusal(rng) if refuses else pocket.recipe_answer(item.recipe, rng)
        critique, verdict = pocket.critique(item, answer, rng), pocket.verdict(item, answer)
        made.append({**record, "answer": answer, "critique": critique, "verdict": verdict})
    return made


def half(world, records: list[dict]) -> list[dict]:
    """All records of every second prompt."""
    prompts = sorted({record["prompt"] for record in records})
    kept = set(random.Random(f"half-{world.seed}").sample(prompts, len(prompts) // 2))
    return [record for record in records if record["prompt"] in kept]


def sums(world, out: Path):
    """Verifications of sums: right or wrong, under a rule about sums, in the same form as those of safety."""
    spec = out / "sums.txt"
    runs.write_atomic(spec, b"no wrong sum.\n")
    digest, rng = safety.load_spec(str(spec)).sha256, random.Random(f"sums-{world.seed}")
    for number in range(20_000):
        prompt, a, b = pocket.sum_problem(rng)
        given = a + b if rng.random() < 0.5 else rng.randint(20, 98)
        verdict = "safe" if given == a + b else "unsafe"
        rule = "no rule is broken." if verdict == "safe" else "this breaks the rule: no wrong sum."
        yield {
            "kind": "verify", "id": f"sum{number}", "prompt": prompt, "answer": pocket.boxed(given), "spec": str(spec),
            "critique": f"{pocket.sum_thought(a, b)} the answer gives {given}. {rule}", "verdict": verdict,
            "source": "bench.study", "meta": {"spec_sha256": digest},
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------- runs
def tokens_per_step(tokenizer, data: Path, file: str) -> int:
    """As many optimizer steps an epoch for every method: records differ in the length of their prompts, so a step
    takes the same share of the file (half.jsonl: the same share of two passes)."""
    usual = runs.parse(train_sft.Config, ["--model", "pocket/base"])[0].tokens_per_step

    def total(name: str) -> int:
        return sum(make_data.size(tokenizer, r)[1] for r in runs.read_records(str(data / name), train_sft.FIELDS))

    return round(usual * total(file) * (2 if file == "half.jsonl" else 1) / total("verify.jsonl"))


def training(config: Config, data: Path, steps: dict[str, int], name: str, seed: str) -> list[str]:
    """The command line that trains one model, without --out."""
    method = METHODS[name]
    common = ["--model", config.model, "--seed", seed, "--evaluate", "false"]
    if method.data:
        size = ["--tokens-per-step", str(steps[method.data])]
        return ["train_sft.py", "--data", str(data / method.data), *size, *method.words, *common]
    adapter = (
        [] if method.start == "base" else ["--adapter", str(Path(config.out) / f"{method.start}-{seed}" / "model")]
    )
    prompts = ["--prompts", f"verify={data / 'verify.jsonl'}"] if name == "verify-rl" else []
    return ["train_rl.py", *adapter, *prompts, *method.words, *common]


def finish(words: list[str], folder: Path) -> None:
    """Run a script into a folder, or go on with the run that is there. Raises UserError where it fails."""
    if (folder / "result.json").exists():
        return
    words = [*words, "--out", str(folder)]
    words = [words[0], "--resume", str(folder)] if (folder / "config.json").exists() else words
    print("python " + " ".join(words), flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        if subprocess.run([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT).returncode:
            raise UserError(f"{' '.join(words)} failed; its output is in {folder}.log")


def measured(config: Config, data: Path, steps: dict, name: str, seed: str) -> dict:
    """Train and evaluate one model: its figures in percent, sampled, greedy, and checked by itself."""
    folder, adapter = Path(config.out) / f"{name}-{seed}", []
    if name != "base":
        finish(training(config, data, steps, name, seed), folder)
        adapter = ["--adapter", str(folder / "model")]
    check = ["--self-check"] if name in SELF_CHECK else []
    where = Path(config.out) / f"eval-{name}-{seed}"
    words = ["--model", config.model, *adapter, "--suite", "pocket", "--verify-own", "0", *check, "--seed", seed]
    finish(["evaluate.py", *words], where)
    row = {"method": name, "seed": int(seed), "world": runs.world_seed(config.model)}
    for mode, part in runs.read_json(where / "summary.json")["figures"].items():
        suites = part["headline"]
        row[mode.strip("_")] = {suite.removeprefix("pocket:"): percent(figures) for suite, figures in suites.items()}
        tokens = sum(figures["lengths"]["mean"] * figures["n"] for figures in suites.values())
        row[f"tokens_{mode.strip('_')}"] = round(tokens / sum(figures["n"] for figures in suites.values()), 1)
    if name != "base":
        result = runs.read_json(folder / "result.json")
        row["supervised"] = result.get("supervised")
        row["training_minutes"] = round(result["training_minutes"], 2)
    return row


def percent(figures: dict) -> float | None:
    return None if figures["value"] is None else round(100 * figures["value"], 2)


def main(config: Config, origin: dict) -> int:
    world = runs.world_seed(config.model)
    data, tokenizer = prepare(config), model.load(config.model)[1]
    files = {METHODS[m].data for m in config.methods if METHODS[m].data}
    steps = {file: tokens_per_step(tokenizer, data, file) for file in files}
    rows = {}

    def one(job: tuple[str, str]) -> None:
        rows[job] = measured(config, data, steps, *job)

    with ThreadPoolExecutor(config.jobs) as threads:  # each wave starts from adapters of the one before
        waves = [[m for m in config.methods if depth(m) == d] for d in range(3)]
        for wave in waves:
            list(threads.map(one, [(m, seed) for m in wave for seed in config.seeds]))
    path = Path(config.results or Path(config.out) / f"study-{world}.json")
    source = runs.read_json(Path(config.out) / f"eval-{config.methods[0]}-{config.seeds[0]}" / "source.json")
    known = {"commit": source["commit"], "versions": source["versions"], "device": source["device"]}
    listed = [rows[m, seed] for m in config.methods for seed in config.seeds]
    runs.write_json(path, {"world": world, **known, "runs": listed})
    print(f"{len(listed)} models measured: {path}")
    return runs.EXIT_OK


def depth(name: str) -> int:
    """How many methods must be trained before this one."""
    start = METHODS[name].start
    return 0 if start in ("", "base") else 1 + depth(start)


if __name__ == "__main__":
    runs.main(Config, main)

"""Turn prompts into training records: the model's own samples, a guard's labels, an expert's critiques.

    python make_data.py                                       the pocket world: about a minute on 2 CPU cores
    python make_data.py --model M --expert endpoint=NAME@URL --out DIR        the paper's pipeline for a real model
    python make_data.py --model NAME --endpoint URL --guard ... --expert ...  samples from a server or another model
    python make_data.py --resume DIR                          goes on where it stopped, whatever stopped it

What the paper does (A2 of its method), step by step: N = 8 answers to each prompt from the very model that will be
trained; a guard labels each; a harmful prompt is kept only if its answers are both safe and unsafe, then one of each;
a benign prompt keeps one; the expert writes a critique and a verdict for each answer kept.

Every stage adds lines to a file of its own (prompts, samples, labels, critiques), each line under a key that hashes all
that made it: what is there is never made again, and what is missing is. The records are a function of these files.
Written beside them: answer-centric baselines with as many supervised tokens (records.py), and data_card.json.
"""

import contextlib
import dataclasses
import json
import operator
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import runs
from runs import UserError, option

client, judges, records, safety, stages, suites, torch = map(
    runs.Lazy, ("client", "judges", "records", "safety", "stages", "suites", "torch")
)


@dataclass
class Config:
    model: str = option("pocket/base", "model that answers, folder or hub id; with --endpoint its name there")
    adapter: str = option("", "PEFT adapter on it")
    endpoint: str = option("", "sample from this OpenAI-compatible server, URL, instead of loading the model")
    prompts: tuple = option(("safechain:vanilla",), "training sets, NAME or NAME=PATH (suites.py)", pocket=("pocket",))
    decontaminate: tuple = option(
        ("all",), "suites, NAME or NAME=PATH, whose prompts are kept out; or none", pocket=("pocket",)
    )
    allow_count: bool = option(False, "take a set of --prompts or --baseline that has another count than published")
    n: int = option(8, "answers sampled a prompt")
    temperature: float = option(0.6, "of the samples", pocket=1.0)
    top_p: float = option(0.95, "of the samples", pocket=1.0)
    max_tokens: int = option(8192, "length limit of a sample", pocket=96)
    guard: str = option("qwen3guard", "labels the answers, as in evaluate.py --judge", pocket="pocket")
    controversial: str = option("unsafe", "what the guard's word controversial means", choices=("safe", "unsafe"))
    expert: str = option("", "endpoint=MODEL@URL, local=MODEL or file=PATH; writes the critiques", pocket="pocket")
    spec: str = option("star", "rules: a name under specs/ or a text file", pocket="pocket")
    records: int = option(6000, "verification records to aim at, two thirds from harmful prompts; 0: all", pocket=0)
    fraction: float = option(1.0, "share of the prompts, and of --records, to use")
    baseline: tuple = option(
        (), "star1, safechain (own safe answers); star1:published[=PATH], safechain:published[=PATH]",
        pocket=("star1", "safechain"),
    )  # fmt: skip
    max_unscored: float = option(0.01, "exit 3 if guard or expert left a larger share unscored")
    max_requests: int = option(0, "to each endpoint, retries included; 0: no limit")
    max_cost: float = option(0.0, "at each endpoint, in the currency of the prices; 0: no limit")
    price_in: float = option(0.0, "per million tokens read")
    price_out: float = option(0.0, "per million tokens written")
    per_minute: int = option(0, "requests a minute; 0: no limit")
    key_env: str = option("OPENAI_API_KEY", "environment variable with the endpoints' key")
    seed: int = option(0, "of prompts, samples and choices")
    dtype: str = option("auto", "of the products", choices=("auto", "float32", "bfloat16", "float16"))
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    out: str = option("", "folder to write; default runs/make_data-<time>")
    resume: str = option("", "run folder to go on with; takes all settings from it")

    def problems(self) -> list[str]:
        """Every wrong setting, all at once."""
        stars, known = [b.partition("=")[0] for b in self.baseline], ("star1", "safechain")
        known += ("star1:published", "safechain:published")
        checks = {
            f"--n {self.n}: must be 1 or more": self.n >= 1,
            f"--temperature {self.temperature}: must be 0 or more": self.temperature >= 0,
            f"--top-p {self.top_p}: must be in (0, 1]": 0 < self.top_p <= 1,
            f"--max-tokens {self.max_tokens}: must be 1 or more": self.max_tokens >= 1,
            f"--records {self.records}: must be 0 or more": self.records >= 0,
            f"--fraction {self.fraction}: must be in (0, 1]": 0 < self.fraction <= 1,
            f"--max-unscored {self.max_unscored}: must be in [0, 1]": 0 <= self.max_unscored <= 1,
            f"--expert: {self.model} is no pocket; name who writes the critiques, such as endpoint=M@URL": self.expert,
            f"--baseline {' '.join(self.baseline)}: there are {', '.join(known)}": set(stars) <= set(known),
            "--baseline star1: only the pocket's expert writes such answers; take star1:published": "star1" not in stars
            or self.expert == "pocket",
            "--adapter: an endpoint has its own": not (self.endpoint and self.adapter),
        }
        limits = ("max_requests", "max_cost", "price_in", "price_out", "per_minute")
        checks |= {f"{runs.flag(n)} {getattr(self, n)}: must be 0 or more": getattr(self, n) >= 0 for n in limits}
        return [message for message, fine in checks.items() if not fine]


WAVE = 1024  # prompts of a kind that are sampled before one looks whether there are enough records
by_key = operator.itemgetter("key")
KINDS = {"harmful": 2 / 3, "benign": 1 / 3}  # of --records; two a harmful prompt and one a benign one: as many prompts
JUDGE_CACHE = 4 << 30  # bytes on a GPU of each judge's cache, beside the sampler's


# ------------------------------------------------------------------------------------------------- prompts


def gather_prompts(config: Config, world, tested: list[dict]) -> tuple[list[dict], dict]:
    """(prompts to sample, what the card says of them). Each has its `place`, which its random numbers go by."""
    facts = {}
    drawn = suites.prompts(list(config.prompts), world, seed=config.seed, allow_count=config.allow_count, facts=facts)
    if any(prompt["kind"] not in KINDS for prompt in drawn):
        raise UserError("--prompts: maths problems are for train_rl.py; here go harmful and benign requests")
    distinct = list({prompt["prompt"]: prompt for prompt in reversed(drawn)}.values())[::-1]
    kept, hits = suites.decontaminate(distinct, tested)
    if len(config.prompts) > 1:  # each set is shuffled; joined end to end the first would go in whole, the last not
        random.Random(f"mix-{config.seed}").shuffle(kept)
    used = kept[: round(config.fraction * len(kept))]
    if not used:
        raise UserError(f"--prompts {' '.join(config.prompts)}: none is left of {len(drawn)} ({hits or 'no suite'})")
    counts = {"drawn": len(drawn), "in two sets": len(drawn) - len(distinct), "used": len(used)}
    counts["held by a suite"] = len(distinct) - len(kept)
    facts = {"sets": facts, "counts": counts, "decontamination": hits}
    return [{**prompt, "place": place} for place, prompt in enumerate(used)], facts


def stage_prompts(folder: Path, gathered: tuple[list[dict], dict] | None) -> tuple[list[dict], dict]:
    """(prompts, facts): those just gathered, or those that a resumed run began with."""
    with stages.Appender(folder / "prompts.jsonl", lambda prompt: prompt["id"]) as log:
        if gathered:
            for prompt in gathered[0]:
                log.add(prompt)
            write_json(folder / "prompts.json", gathered[1])  # last: now the stage is whole
    return list(log.done.values()), json.loads((folder / "prompts.json").read_text())


# ------------------------------------------------------------------------------------------------- samples


def fingerprint(transformer, tokenizer) -> str:
    """A hash of the weights, of 256 values of each tensor, and of the chat template."""
    parts = [tokenizer.chat_template]
    for name, weight in sorted(transformer.named_parameters()):
        values = weight.detach().flatten()[:: max(1, weight.numel() // 256)].float().cpu()
        parts += [name, tuple(weight.shape), values.numpy().tobytes().hex()]
    return records.digest(*parts)


def sample_keys(prompt: dict, origin: str, config: Config) -> list[str]:
    """The keys of a prompt's N samples: who answers, how it is drawn, and what is asked."""
    settings = (config.temperature, config.top_p, config.max_tokens, config.seed, prompt["place"])
    return [records.digest(origin, *settings, prompt["prompt"], k) for k in range(config.n)]


def without_prompt(item: dict) -> dict:
    """What samples.jsonl keeps of an item with its completion."""
    return {name: item[name] for name in ("id", "completion", "tokens", "finish_reason", "thinking", "answer")}


def sample_local(transformer, tokenizer, prompts: list[dict], keys: list[list[str]], log, config: Config):
    """Samples from the model itself. A prompt with some of its samples is drawn anew: it gives the same ones."""
    undone = [i for i, own in enumerate(keys) if not log.done.keys() >= set(own)]
    with tqdm(total=len(undone) * config.n, desc="samples", leave=False) as bar:

        def keep(number: int, item: dict) -> None:
            log.add({"key": keys[undone[number // config.n]][number % config.n], **without_prompt(item)})
            bar.update()

        suites.generate(
            transformer, tokenizer, [prompts[i] for i in undone], seed=config.seed, temperature=config.temperature,
            top_p=config.top_p, max_tokens=config.max_tokens, samples=config.n, on_done=keep,
            places=[prompts[i]["place"] for i in undone],
        )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the sampler's cache, for the guard
    return Counter()


def sample_endpoint(endpoint, prompts: list[dict], keys: list[list[str]], log, config: Config) -> Counter:
    """Samples from a server; the failures by reason, asked again by a resumed run. Raises UserError if they are more
    than --max-unscored allows."""
    wanted = [(prompt, key) for prompt, own in zip(prompts, keys, strict=True) for key in own]
    jobs, failed = [job for job in wanted if job[1] not in log.done], Counter()

    def one(job):
        turns = [{"role": "user", "content": safety.wire_copy(job[0]["prompt"])}]
        seed = int(job[1][:7], 16)
        return stages.answered(endpoint.chat(turns, config.max_tokens, config.temperature, seed, config.top_p))

    with tqdm(total=len(jobs), desc="samples", leave=False) as bar:

        def keep(i: int, item: dict) -> None:
            bar.update()
            if "provider" in item:
                failed[item["provider"]] += 1
            else:
                log.add({"key": jobs[i][1], **without_prompt({"id": jobs[i][0]["id"], **item})})

        client.in_parallel(jobs, one, keep)
    if failed.total() > config.max_unscored * len(wanted):
        why = f"{config.endpoint} gave {len(jobs) - failed.total()} of {len(jobs)} samples ({dict(failed)})"
        raise UserError(f"{why}; what came is kept, go on with --resume {log.path.parent}")
    return failed


# ------------------------------------------------------------------------------------------------- labels, selection


def usable(sample: dict | None) -> bool:
    """Whether a sample has a whole answer, which can be judged and trained on."""
    return bool(sample and sample["finish_reason"] == "stop" and (sample["answer"] or "").strip())


def stage_labels(judge, prompts: list[dict], keys: list[list[str]], samples, labels) -> dict[str, str]:
    """The guard's labels of whole answers. Returns {key: reason} of what it left unscored: a resumed run asks again."""
    jobs = [
        (key, {**prompt, "kind": "request", "harmful": prompt["kind"] == "harmful", **samples.done[key]})
        for prompt, own in zip(prompts, keys, strict=True)
        for key in own
        if usable(samples.done.get(key)) and key not in labels.done
    ]
    unscored = {}
    with tqdm(total=len(jobs), desc="labels", leave=False) as bar:

        def keep(i: int, label: dict) -> None:
            bar.update()
            if "unscored" in label:
                unscored[jobs[i][0]] = label["unscored"]
            else:
                labels.add({"key": jobs[i][0], **label})

        judge([item for _, item in jobs], on_done=keep)
    return unscored


def select_pair(harmful: bool, samples: list[dict], rng: random.Random) -> tuple[list[dict], str]:
    """The samples of one prompt that become records, and why (the paper's rule).

    Each sample carries `label`: "safe", "unsafe" or None (no whole answer, or not judged). One safe and one unsafe
    answer of a harmful prompt, nothing if either is missing; one safe answer of a benign prompt.

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


def labelled(own: list[str], samples, labels) -> list[dict]:
    """A prompt's samples with `key` and `label`."""
    words = {True: "safe", False: "unsafe", None: None}
    found = [samples.done[key] for key in own if key in samples.done]
    return [{**sample, "label": words[labels.done.get(sample["key"], {}).get("safe")]} for sample in found]


def select(prompt: dict, samples: list[dict], seed: int) -> tuple[list[dict], str]:
    """`select_pair` with random numbers that depend on the prompt alone, not on the others or their order."""
    return select_pair(prompt["kind"] == "harmful", samples, random.Random(f"select-{seed}-{prompt['prompt']}"))


def collect(prompts: list[dict], choose: Callable, config: Config) -> tuple[list[tuple], Counter]:
    """[(prompt, chosen samples)] in the prompts' order, and the prompts kept and dropped by reason.

    choose(prompts) -> [(chosen, reason)] samples and labels. Wave after wave, until there are enough records of each
    kind; --records 0 is one wave of everything.
    """
    wanted = {kind: share * config.records * config.fraction or float("inf") for kind, share in KINDS.items()}
    queues = {kind: [p for p in prompts if p["kind"] == kind] for kind in KINDS}
    kept, counts, got, size = [], Counter(), Counter(), WAVE if config.records else len(prompts)
    while short := [kind for kind in KINDS if got[kind] < wanted[kind] and queues[kind]]:
        wave = sorted((p for kind in short for p in queues[kind][:size]), key=lambda prompt: prompt["place"])
        queues |= {kind: queues[kind][size:] for kind in short}
        for prompt, (chosen, reason) in zip(wave, choose(wave), strict=True):
            if got[prompt["kind"]] >= wanted[prompt["kind"]]:
                chosen, reason = [], "dropped: enough of its kind"
            got[prompt["kind"]] += len(chosen)
            counts[reason] += 1
            if chosen:
                kept.append((prompt, chosen))
    counts["not sampled: enough of its kind"] = sum(map(len, queues.values()))
    return sorted(kept, key=lambda pair: pair[0]["place"]), +counts


# ------------------------------------------------------------------------------------------------- critiques, records


def critique_job(prompt: dict, sample: dict, config: Config, spec) -> dict:
    """What the expert is asked about one chosen answer."""
    key = records.digest("critique", config.expert, spec.sha256, prompt["prompt"], sample["answer"])
    job = {"key": key, "prompt": prompt["prompt"], "answer": sample["answer"], "spec": config.spec}
    job |= {"label": sample["label"], "prompt_id": prompt["id"]}
    return {**job, "item": prompt["item"]} if "item" in prompt else job


def stage_critiques(expert, jobs: list[dict], log) -> dict[str, str]:
    """The expert's critique of each chosen answer. Returns {key: reason} of those that it did not give."""
    jobs, unscored = [job for job in jobs if job["key"] not in log.done], {}
    with tqdm(total=len(jobs), desc="critiques", leave=False) as bar:

        def keep(i: int, said) -> None:
            bar.update()
            if isinstance(said, safety.Unscored):
                unscored[jobs[i]["key"]] = said.reason
            else:
                log.add({"key": jobs[i]["key"], **dataclasses.asdict(said)})

        expert(jobs, on_done=keep)
    return unscored


# ------------------------------------------------------------------------------------------------- card, table


def state(sample: dict, unscored: dict[str, str]) -> str:
    """What became of a sample, for the table."""
    if not usable(sample):
        return "cut off" if sample["finish_reason"] == "length" else "without an answer"
    return sample["label"] or f"unscored: {unscored.get(sample['key'], 'not asked')}"


def write_json(path: Path, value: dict) -> None:
    with stages.writing(path, path.parent):
        runs.write_json(path, value)


def report(table: dict, files: dict, folder: Path) -> None:
    for stage, counts in table.items():
        for reason, count in sorted(counts.items()):
            print(f"{count!s:>8} {stage}: {reason}")
    for name, entry in files.items():
        print(f"{entry['records']:>8} records, {entry['supervised']:,} supervised {entry['unit']}: {folder / name}")
        if entry.get("short"):
            print(f"{'':>8} {entry['short']:,} {entry['unit']} short of the {entry['goal']:,} of verify.jsonl")


# ------------------------------------------------------------------------------------------------- main


@dataclass
class Tools:
    """Who does the work of the stages."""

    sample: Callable  # (prompts, keys, log) -> failures by reason
    who: str  # hash of the model that answers, or of the server and its model's name
    tokenizer: object  # None with an endpoint
    judge: Callable
    expert: Callable
    endpoints: dict


@dataclass
class Given:
    """What a run is given before its first stage."""

    prompts: tuple[list[dict], dict] | None  # with facts; None: a resumed run has them
    published: dict  # {baseline: records}
    sets: dict  # facts of the published baselines' sets


def gather(config: Config, world) -> Given:
    """Read every set that was named, or refuse, before anything is loaded or written."""
    begun = config.resume and (Path(config.resume) / "prompts.json").exists()
    names = [name for name in config.baseline if ":published" in name]
    compared = names or not begun
    tested, missing = suites.tested_items(config.decontaminate, config.model, world) if compared else ([], {})
    prompts, sets = None if begun else gather_prompts(config, world, tested), {}
    published = {name: records.published_records(name, config, tested, sets) for name in names}
    for facts in [*sets.values(), *([prompts[1]] if prompts else [])]:
        facts["suites not at hand"] = missing  # in this sitting, which a resumed run's later ones need not share
    return Given(prompts, published, sets)


def open_tools(config: Config, world) -> Tools:
    """Load model, guard and expert, or refuse, before anything is written."""
    device = runs.pick_device(config.device)
    dtype = runs.pick_dtype(config.dtype, device)
    limits = {name: getattr(config, name) for name in ("max_requests", "max_cost", "price_in", "price_out")}
    limits |= {"per_minute": config.per_minute, "seed": config.seed, "key_env": config.key_env}
    common = {"world": world, "device": device, "dtype": dtype, "limits": limits}
    common |= {"cache_bytes": JUDGE_CACHE} if device == "cuda" else {}
    tokenizer, server = None, None
    if config.endpoint:
        server = client.Endpoint(config.endpoint, config.model, **limits)
        who, sample = records.digest(server.url, config.model), lambda *work: sample_endpoint(server, *work, config)
    else:
        transformer, tokenizer = runs.load_model(config.model, device, dtype, config.adapter)
        who = fingerprint(transformer, tokenizer)
        sample = lambda *work: sample_local(transformer, tokenizer, *work, config)  # noqa: E731
    judge = judges.load(config.guard, controversial=config.controversial, **common)
    expert = judges.load_expert(config.expert, **common)
    endpoints = {"sampler": server, "guard": judge.endpoint, "expert": expert.endpoint}
    return Tools(sample, who, tokenizer, judge, expert, {name: e for name, e in endpoints.items() if e})


def load_world(config: Config):
    from pocket import world as pocket

    return pocket.World(runs.world_seed(config.model)) if runs.is_pocket(config.model) else None


def load_spec(config: Config):
    try:
        return safety.load_spec(config.spec)
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass
class Logs:
    """The stages' files, and what is not in them, by reason."""

    samples: object
    labels: object
    critiques: object
    failed: Counter = field(default_factory=Counter)  # samples that a server did not give
    unscored: dict = field(default_factory=dict)  # {sample's key: reason} of the guard
    silent: dict = field(default_factory=dict)  # {critique's key: reason} of the expert


def make_records(config, world, spec, tools: Tools, logs: Logs, prompts: list[dict], published, folder: Path) -> dict:
    """All stages from the samples to the records' files. What the card says of them."""
    keys = {prompt["id"]: sample_keys(prompt, tools.who, config) for prompt in prompts}

    def own(prompt: dict) -> list[dict]:
        return labelled(keys[prompt["id"]], logs.samples, logs.labels)

    def choose(wave: list[dict]) -> list[tuple]:
        wanted = [keys[prompt["id"]] for prompt in wave]
        logs.failed.update(tools.sample(wave, wanted, logs.samples))
        logs.unscored |= stage_labels(tools.judge, wave, wanted, logs.samples, logs.labels)
        return [select(prompt, own(prompt), config.seed) for prompt in wave]

    kept, selection = collect(prompts, choose, config)
    jobs = [critique_job(prompt, sample, config, spec) for prompt, chosen in kept for sample in chosen]
    logs.silent |= stage_critiques(tools.expert, jobs, logs.critiques)
    verify, disputed = records.verification_records(jobs, logs.critiques.done, config, spec)
    groups = [(prompt, own(prompt)) for prompt in prompts]
    streams = [records.candidates(name, config, world, groups, published) for name in config.baseline]
    files, left = records.write(folder, verify, disputed, streams, tools.tokenizer)
    states = Counter(state(sample, logs.unscored) for _, group in groups for sample in group)
    counts = {
        "samples": states + Counter({f"failed: {reason}": n for reason, n in logs.failed.items()}),
        "selection": selection,
        "critiques": Counter({"agreed": len(verify), "disagreed": len(disputed)}) + Counter(logs.silent.values()),
        "left out of baselines": {f"{name}: {why}": n for name, c in left.items() for why, n in c.items()},
    }
    return {"counts": counts, "files": files}


def main(config: Config, origin: dict) -> int:
    world, spec = load_world(config), load_spec(config)
    given = gather(config, world)
    tools = open_tools(config, world)
    folder = runs.new_folder(config, origin, "make_data")  # from here on nothing is wrong with what was asked for
    print(f"run folder {folder}; settings:")
    runs.show(config, origin)
    prompts, facts = stage_prompts(folder, given.prompts)
    with contextlib.ExitStack() as stack:
        stack.callback(records.note_usage, folder, tools.endpoints)
        files = [stages.Appender(folder / f"{name}.jsonl", by_key) for name in ("samples", "labels", "critiques")]
        logs = Logs(*map(stack.enter_context, files))
        made = make_records(config, world, spec, tools, logs, prompts, given.published, folder)
    counts = {"prompts": facts.pop("counts"), **made.pop("counts")}
    card = {
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "resume")},
        "model": {"name": config.model, "adapter": config.adapter, "hash": tools.who},
        "spec": {"name": spec.name, "sha256": spec.sha256},
        "world_seed": world.seed if world else None,
        **facts,
        **made,
        "baseline sets": given.sets,
        "counts": counts,
        "endpoints": records.total_usage(folder),
        "versions": json.loads((folder / "source.json").read_text())["versions"],
    }
    write_json(folder / "data_card.json", card)
    report(counts, made["files"], folder)
    if missing := card["suites not at hand"]:
        print(f"prompts were not compared with {', '.join(missing)}: not at hand (data_card.json says why)")
    write_json(folder / "result.json", {"counts": counts, "files": made["files"]})
    shares = (len(logs.unscored), len(logs.labels.done)), (len(logs.silent), len(logs.critiques.done))
    bad = [missing for missing, there in shares if missing > config.max_unscored * (missing + there)]
    return runs.EXIT_UNSCORED if bad else runs.EXIT_OK


if __name__ == "__main__":
    runs.main(Config, main)

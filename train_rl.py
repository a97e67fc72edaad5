"""Minimal GRPO: answers from the very weights that are trained, a judge's reward, one forward and backward a step.

    python train_rl.py                                               the pocket world, about 2 minutes on a CPU
    python train_rl.py --adapter runs/sft/model                      from an SFT start (--lora-r 0 merges it first)
    python train_rl.py --prompts verify=pocket/data/verify.jsonl --max-prompt 200    on verification alone
    python train_rl.py --model M --prompts A@2 dapo#3000 --guard qwen3guard --out runs/mine
    python train_rl.py --resume runs/mine

A step: --prompts-per-step prompts, --group answers to each at --temperature; a reward for each; the advantage of an
answer is its reward beside its group's; one update on the groups that disagree. The ratio is taken to the sampler's own
log-probs, so a single forward is needed and what sampler and trainer do differently is corrected. On policy the ratio
is 1 and the loss near 0: look at the gradient norm and the reward, not at the loss. Simplifications on purpose: one
GPU, one update a rollout, no KL, no reference model. Prompts and random numbers are functions of (seed, step), so a
resumed run is the uninterrupted run, bit by bit, and a step that was cut off is drawn again as it was.

Your own reward: --reward FILE.py with `reward(prompt, completion, item) -> (number or None, {part: number})`.
"""

import functools
import itertools
import json
import math
import numbers
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import engine
import judges
import kernels
import maths
import model
import runs
import safety
import suites
import trainers
from pocket.world import world_of
from runs import UserError, option
from safety import REQUESTS, answered
from scores import NO_REFUSAL_LABEL, mean

# Settings that one edits here
BETA1 = 0.9  # of AdamW
WEIGHT_DECAY = 0.0  # decoupled
CLIP = 1.0  # largest gradient norm
CLIP_DUAL = 3.0  # dual clip, for negative advantages
TOLERANCE = 1e-6  # a group whose rewards lie no further apart teaches nothing and is dropped
SHOWN = 2  # groups a step of which samples.jsonl keeps two answers


@dataclass
class Config:
    model: str = option(f"{runs.POCKET}/base", "model folder or hub id, Hugging Face format")
    adapter: str = option("", "PEFT adapter to start from")
    lora_r: int = option(16, "LoRA rank, that of an --adapter; 0 merges that and trains every weight", low=0)
    lora_alpha: float = option(32.0, "LoRA scale is alpha / r; an --adapter keeps its own", above=0)
    prompts: tuple = option((), "prompt sets: NAME[=PATH][@WEIGHT][#LIMIT]", pocket=("pocket:rl",))
    decontaminate: tuple = option(("all",), "suites whose prompts are kept out, or none", pocket=("pocket",))
    guard: str = option("qwen3guard", "judge of the answers, as in evaluate.py --judge; no endpoint", pocket="pocket")
    controversial: str = option("unsafe", "what the guard's word controversial means", choices=("safe", "unsafe"))
    reward: str = option("", "Python file with your own reward, in place of the guard")
    steps: int = option(100, "optimizer steps", pocket=30, low=1)
    prompts_per_step: int = option(64, "prompts a step", low=1)
    group: int = option(8, "answers to a prompt, each measured by the others", low=2)
    temperature: float = option(1.0, "sampling temperature, also applied in the loss", above=0)
    max_prompt: int = option(1024, "tokens of a prompt; longer ones are dropped and counted", pocket=128, low=1)
    max_tokens: int = option(4096, "tokens of an answer and its thinking; one cut off earns 0", pocket=96, low=1)
    advantage: str = option("mean", "r - mean, or that over the standard deviation", choices=("mean", "std"))
    clip_low: float = option(0.2, "lower clip of the ratio: 1 - value", low=0, below=1)
    clip_high: float = option(0.28, "upper clip of the ratio: 1 + value", low=0, below=CLIP_DUAL - 1)
    lr: float = option(1e-5, "learning rate of LoRA; 1e-6 for full training (--lora-r 0)", pocket=1e-3, low=0)
    warmup: int = option(0, "steps of rising learning rate, constant from there on", pocket=2, low=0)
    beta2: float = option(0.999, "AdamW beta2", pocket=0.95, low=0, below=1)
    micro_tokens: int = option(16384, "most tokens a forward pass: speed, not results", pocket=3072, low=1)
    evaluate: bool = option(False, "run the pocket suites before and after", pocket=True)
    max_unscored: float = option(0.01, "exit 3 if a larger share of answers is left unscored", low=0, below=1)
    dtype: str = option("auto", "compute dtype; master weights stay fp32", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of LoRA, prompts and samples")
    out: str = option("", "run folder; default runs/train_rl-<time>")
    resume: str = option("", "run folder to go on with; takes all settings from it")

    def problems(self) -> list[str]:
        """What is wrong across settings."""
        checks = {
            "--prompts: name at least one set of prompts": len(self.prompts) > 0,
            f"--reward {self.reward}: no such file": not self.reward or Path(self.reward).is_file(),
            "--guard endpoint=: no limit on requests or cost": self.reward or not self.guard.startswith("endpoint="),
            f"--evaluate needs a pocket model, {self.model} is none": not self.evaluate or runs.is_pocket(self.model),
        }
        return [message for message, fine in checks.items() if not fine]


WATCHED = ("reward", "safe", "refused_benign", "correct", "live", "truncated", "entropy", "grad_norm")
GAPS = ("kl_sampler", "clip_share", "max_gap")  # figures of an update, null where there was none


# ------------------------------------------------------------------------------------------------- objective and step
def advantages(rewards: list, kind: str = "mean") -> list:
    """Of the answers of one group: reward minus the group's mean, `std`: over the group's deviation (n - 1).

    None and NaN are answers without a score: they count nowhere and get None. So does the whole group where fewer than
    two are scored, or where no two scores differ by more than TOLERANCE (float noise is no lesson).

        1 0 0 1 -> .5 -.5 -.5 .5        1 1 1 1 -> None ...        1 None 0 -> .5 None -.5
    """
    scored = [r for r in rewards if r is not None and math.isfinite(r)]
    if len(scored) < 2 or max(scored) - min(scored) <= TOLERANCE:
        return [None] * len(rewards)
    middle, scale = statistics.fmean(scored), statistics.stdev(scored) + 1e-6 if kind == "std" else 1.0
    return [None if r is None or not math.isfinite(r) else (r - middle) / scale for r in rewards]


def objective(logp_N, sampler_N, advantage_N, denominator: float, config: Config):
    """(loss, figures) of N trained tokens: GRPO with asymmetric and dual clipping, divided by `denominator`.

    logp_N: log-probs of the drawn tokens now, sampler_N: as they were drawn, both in nats at the sampling temperature;
    advantage_N: of each token's answer. loss = -sum(min(ratio A, clip(ratio) A)) / denominator, and no less than
    CLIP_DUAL A a token where A is negative, for there the minimum has no bound in the ratio. Figures are sums over
    the tokens: `kl_sampler` estimates KL(sampler | trainer) by ratio - 1 - log ratio (k3, Schulman 2020), `max_gap` is
    the largest |log ratio|, `clip_share` counts tokens whose gradient the clipping has taken.
    """
    gap_N = (logp_N - sampler_N).clamp(-20, 20)
    ratio_N = gap_N.exp()
    clipped_N = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    gain_N = torch.where(advantage_N < 0, torch.maximum(gain_N, CLIP_DUAL * advantage_N), gain_N)
    with torch.no_grad():
        high_N = (advantage_N > 0) & (ratio_N > 1 + config.clip_high)
        low_N = (advantage_N < 0) & ((ratio_N < 1 - config.clip_low) | (ratio_N > CLIP_DUAL))
        figures = {
            "kl_sampler": (gap_N.expm1() - gap_N).sum().item(),
            "max_gap": gap_N.abs().max().item(),
            "clip_share": (high_N | low_N).sum().item(),
        }
    return -gain_N.sum() / denominator, figures


@dataclass
class Drawing:
    """One answer that was drawn. `item` is what judges read; `action` includes the stop token."""

    item: dict
    prompt_ids: list[int]
    action: list[int]
    logprobs: list[float]
    reward: float | None = None
    parts: dict = field(default_factory=dict)
    label: dict = field(default_factory=dict)
    advantage: float | None = None

    @property
    def ids(self) -> list[int]:
        """What the forward pass reads: the last token of the action is predicted, never an input."""
        return self.prompt_ids + self.action[:-1]


def pack(group: list[Drawing], device="cpu"):
    """(ids_T, rows_N, drawn_N, sampler_N, advantage_N, cu_seqlens): rows that come before a drawn token, that token.

    prompt 5 6, action 7 8 2, log-probs a b c  ->  ids 5 6 7 8, rows 1 2 3, drawn 7 8 2, sampler a b c
    """
    ids, rows, drawn, sampler, advantage, offsets = [], [], [], [], [], [0]
    for d in group:
        first = len(ids) + len(d.prompt_ids) - 1
        rows += range(first, first + len(d.action))
        ids += d.ids
        drawn += d.action
        sampler += d.logprobs
        advantage += [d.advantage] * len(d.action)
        offsets.append(len(ids))
    columns = (ids, rows, drawn, sampler, advantage)
    tensors = [torch.tensor(column, device=device) for column in columns]
    return *tensors, torch.tensor(offsets, dtype=torch.int32, device=device)


def schedule(step: int, config: Config) -> float:
    """Learning rate of a step, counted from 0: rising through the first `warmup` steps, then constant."""
    return config.lr * min(1.0, (step + 1) / (config.warmup + 1))


def optimizer_step(transformer, trainee, live: list[Drawing], lr: float, config: Config, plan: trainers.Plan) -> dict:
    """One update on the answers of live groups. The figures are means over their tokens, `max_gap` their largest.

    All micro-batches divide the loss by the step's trained tokens. (Dr. GRPO divides by a constant: prompts_per_step *
    group * max_tokens.)
    """
    tokens, loss, sums = sum(len(d.action) for d in live), 0.0, []
    for group in trainers.fill(live, plan.micro_tokens):
        ids_T, rows_N, drawn_N, sampler_N, advantage_N, cu_seqlens = pack(group, transformer.head_weight.device)
        hidden_NH = transformer(ids_T, cu_seqlens, rows_N=rows_N, checkpoint=plan.checkpointing)
        logp_N, _ = kernels.linear_logp(hidden_NH, transformer.head_weight, drawn_N, config.temperature)
        share, figures = objective(logp_N, sampler_N, advantage_N, tokens, config)
        share.backward()
        loss += share.item()
        sums.append(figures)
    figures = {name: sum(s[name] for s in sums) / tokens for name in ("kl_sampler", "clip_share")}
    figures["max_gap"] = max(s["max_gap"] for s in sums)
    return {"loss": loss, "lr": lr, "grad_norm": trainee.step(lr, CLIP), **figures}


# ------------------------------------------------------------------------------------------------- prompts
def load_prompts(words: tuple[str, ...], world, seed: int) -> tuple[list[dict], dict[str, float]]:
    """(prompts of suites.prompts, each with its `pool`; {pool: weight}) of NAME, NAME@WEIGHT, NAME#LIMIT or
    NAME@WEIGHT#LIMIT. A pool without a weight weighs what it holds. Raises UserError."""
    prompts, weights = [], {}
    for word in words:
        parts = re.fullmatch(r"(.+?)(?:@(\d+\.?\d*))?(?:#(\d+))?", word)
        name, weight, limit = parts.groups() if parts else ("", "0", "0")
        if 0 in (float(weight or 1), int(limit or 1)) or name in weights:
            raise UserError(f"--prompts {word}: give NAME, NAME@WEIGHT or NAME#LIMIT, numbers above 0, each NAME once")
        found = suites.prompts([name], world, limit=int(limit or 0), seed=seed)
        prompts += [{**prompt, "pool": name} for prompt in found]
        weights[name] = float(weight or len(found))
    return prompts, weights


def prepare(loaded: list[dict], weights: dict, tested: list[dict], tokenizer, context: int, config: Config):
    """(prompts, accounting): those that no suite of `tested` items holds and that fit, with their `ids`.

    context: tokens of the model, in which --max-tokens must fit, too. Raises UserError where a pool has no prompt left.
    """
    clean, hits = suites.decontaminate(loaded, tested)
    hits = {suite: counts for suite, counts in hits.items() if any(counts.values())}
    for prompt in tqdm(clean, desc="tokenizing", leave=False):
        prompt["ids"] = engine.prompt_ids(tokenizer, prompt)
    prompts = [p for p in clean if len(p["ids"]) <= min(config.max_prompt, context - config.max_tokens)]
    held, long = len(loaded) - len(clean), len(clean) - len(prompts)
    if empty := ", ".join(sorted(weights.keys() - {prompt["pool"] for prompt in prompts})):
        limits = f"--max-prompt {config.max_prompt}; context of {context} tokens less --max-tokens {config.max_tokens}"
        why = f"of all {len(loaded)} prompts {held} are held by a suite ({hits}), {long} are too long ({limits})"
        raise UserError(f"--prompts {empty}: none is left; {why}")
    return prompts, {"held_by_a_suite": held, "decontamination": hits, "too_long": long}


def shuffles(prompts: list[dict], key: str) -> Iterator[dict]:
    """All prompts in one random order after another, without an end."""
    for number in itertools.count():
        yield from random.Random(f"{key}-{number}").sample(prompts, len(prompts))


def mixture(prompts: list[dict], weights: dict[str, float], n: int, seed: int) -> list[dict]:
    """n prompts in the order of training, a function of the seed: next comes the pool that lacks most of its share.

    weights a 1, b 3  ->  b a b b  b a b b ...
    """
    streams = {name: shuffles([p for p in prompts if p["pool"] == name], f"{seed}-{name}") for name in weights}
    total, drawn, ordered = sum(weights.values()), Counter(), []
    for place in range(1, n + 1):
        lacking = {name: weight * place / total - drawn[name] for name, weight in weights.items()}
        name = max(lacking, key=lacking.get)
        drawn[name] += 1
        ordered.append(next(streams[name]))
    return ordered


# ------------------------------------------------------------------------------------------------- answers and rewards
def draw(sampler, tokenizer, prompts: list[dict], n: int, seed: int, config: Config) -> list[list[Drawing]]:
    """n answers to each prompt, from the weights as they are. Raises EngineError where those give no distribution."""
    settings = {"max_tokens": config.max_tokens, "temperature": config.temperature}
    drawn = sampler.generate([p["ids"] for p in prompts], n=n, seed=seed, **settings)
    opened, groups = safety.thinking_open(tokenizer), []
    for prompt, samples in zip(prompts, drawn, strict=True):
        item = {name: value for name, value in prompt.items() if name not in ("ids", "pool")}
        items = [engine.completed(tokenizer, sampler.eos_ids, item, sample, opened) for sample in samples]
        groups.append([Drawing(i, prompt["ids"], s.ids, s.logprobs) for i, s in zip(items, samples, strict=True)])
    return groups


def reward(item: dict, label: dict) -> float | None:
    """The paper's: V_safe for a harmful prompt, V_safe (1 - V_refuse) for a benign one; a sum or problem: exact. A
    verification: 1 for the right verdict. None where the judge has none."""
    if "unscored" in label:
        return None
    if item["kind"] == "verify":
        return float(label["predicted"] == item["target"])
    verdict = {"harmful": "safe", "benign": "complied"}.get(item["kind"], "correct")
    return None if label[verdict] is None else float(label[verdict])


def judge_rewards(judge, items: list[dict]) -> list[tuple]:
    """[(reward, {kind: reward}, label)] of the items, by a judge of judges.py."""
    scored = [(item["kind"], reward(item, label), label) for item, label in zip(items, judge(items), strict=True)]
    return [(value, {kind: value}, label) for kind, value, label in scored]


def own_rewards(path: str, example: dict) -> Callable:
    """A scorer that asks `reward` of a Python file, which is tried on a short answer to `example` first.

    Not on an empty one: that earns 0 and is shown to no reward. Raises UserError for whatever goes wrong in the file.
    """
    function = runs.load_function(path, "reward")

    def score(items: list[dict]) -> list[tuple]:
        ask = functools.partial(judges.call_own, path, function, read=read_reward)
        return [ask(item, item["prompt"], item["completion"], dict(item)) for item in items]

    score([{**example, "completion": "yes", "tokens": 1, "finish_reason": "stop", "thinking": "", "answer": "yes"}])
    return score


def read_reward(result) -> tuple:
    """(reward, parts, label) of what an own function returned. Raises ValueError; what is not finite is no score."""
    pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
    values = [result[0], *result[1].values()] if pair and all(isinstance(name, str) for name in result[1]) else ["none"]
    if not all(x is None or (isinstance(x, numbers.Real) and not 1e30 < abs(x) < math.inf) for x in values):
        raise ValueError("not (number or None, {part: number or None}), numbers up to 1e30")
    value, *parts = [float(x) if x is not None and math.isfinite(x) else None for x in values]
    return value, dict(zip(result[1], parts, strict=True)), {} if value is not None else {"unscored": "own reward"}


def score_groups(groups: list[list[Drawing]], scorer, config: Config) -> list[Drawing]:
    """Give every answer its reward and advantage; returns those of live groups, which are trained on.

    An answer that was cut off or is empty earns 0 and is shown to no judge.
    """
    drawings = [d for group in groups for d in group]
    done = [d for d in drawings if answered(d.item)]
    for d in drawings:
        d.reward, d.parts = 0.0, {} if config.reward else {d.item["kind"]: 0.0}
    for d, (value, parts, label) in zip(done, scorer([d.item for d in done]) if done else [], strict=True):
        d.reward, d.parts, d.label = value, parts, label
    for group in groups:
        for d, advantage in zip(group, advantages([d.reward for d in group], config.advantage), strict=True):
            d.advantage = advantage
    return [d for d in drawings if d.advantage is not None]


def health(groups: list[list[Drawing]]) -> dict:
    """What a step's answers tell of the policy. `entropy` is minus the mean log-prob of the drawn tokens: an unbiased
    estimate that needs no live group."""
    drawings = [d for group in groups for d in group]
    dropped = [[d.reward for d in group] for group in groups if all(d.advantage is None for d in group)]
    dead = [mean(rewards) for rewards in dropped if len(rewards) - rewards.count(None) > 1]
    parts = sorted({name for d in drawings for name in d.parts})
    return {
        "reward": mean(d.reward for d in drawings),
        **{f"reward_{name}": mean(d.parts.get(name) for d in drawings) for name in parts},
        "safe": mean(d.label.get("safe") for d in drawings if d.item["kind"] == "harmful"),
        "refused_benign": mean(d.label.get("refused") for d in drawings if d.item["kind"] == "benign"),
        "correct": mean(d.label.get("correct") for d in drawings),
        "zero_variance_right": sum(value > 0.5 for value in dead) / len(groups),
        "zero_variance_wrong": sum(value <= 0.5 for value in dead) / len(groups),
        "truncated": mean(d.item["finish_reason"] == "length" for d in drawings),
        "unscored": mean(d.reward is None for d in drawings),
        "entropy": -mean(logp for d in drawings for logp in d.logprobs),
        "length": mean(len(d.action) for d in drawings),
    }


# ------------------------------------------------------------------------------------------------- the loop
@dataclass
class Run:
    """What the steps of a run work with."""

    sampler: engine.Engine
    tokenizer: object
    trainee: trainers.Trainee
    scorer: Callable  # items -> [(reward, parts, label)]
    prompts: list[dict]  # of all steps, one after the other
    config: Config
    plan: trainers.Plan
    folder: Path


def one_step(run: Run, step: int) -> tuple[dict, list[list[Drawing]]]:
    """(line of the log, groups) of one step, counted from 0: draw, score, update."""
    config, started = run.config, time.perf_counter()
    prompts = run.prompts[step * config.prompts_per_step :][: config.prompts_per_step]
    seed = ((config.seed + 1) << 32) + step  # never one of the evaluations, which are small numbers
    groups = draw(run.sampler, run.tokenizer, prompts, config.group, seed, config)
    live = score_groups(groups, run.scorer, config)
    line = {"loss": 0.0, "lr": schedule(step, config), "grad_norm": 0.0, **dict.fromkeys(GAPS, math.nan)}
    if live:
        line |= optimizer_step(run.sampler.transformer, run.trainee, live, line["lr"], config, run.plan)
    seconds, tokens = time.perf_counter() - started, sum(len(d.action) for group in groups for d in group)
    line["live"] = sum(any(d.advantage is not None for d in group) for group in groups)
    return line | health(groups) | {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}, groups


def train(run: Run, state: dict) -> None:
    """From `state`, NEW_RUN at first, to the end of the run, changing it on the way."""
    steps, due = run.config.steps, trainers.checkpoint_steps(run.config.steps)
    bar = tqdm(total=steps, initial=state["step"], desc="training", unit="step")
    with runs.Interruptible() as interrupt, bar:
        while state["step"] < steps:
            line, groups = one_step(run, state["step"])
            reasons = Counter(d.label.get("unscored", NO_REFUSAL_LABEL) for g in groups for d in g if d.reward is None)
            state["unscored"] = dict(reasons + Counter(state["unscored"]))
            state["updates"] += line["live"] > 0
            if not line["live"]:
                tqdm.write(f"step {state['step'] + 1}: no group disagrees about its reward, so there is no update")
            trainers.end_step(run.folder, run.trainee, state, line, samples(groups), due, interrupt)
            bar.set_postfix({name: line[name] for name in WATCHED}, skipped=state["skipped"])
            bar.update()


def samples(groups: list[list[Drawing]]) -> list[dict]:
    """A few whole answers of a step: worst and best of two groups that it trained on, of any where there is none."""
    live = [group for group in groups if any(d.advantage is not None for d in group)]
    ranked = [sorted(group, key=lambda d: d.reward or 0.0) for group in (live or groups)[:SHOWN]]
    lines = []
    for d in (d for group in ranked for d in (group[0], group[-1])):
        line = {name: d.item[name] for name in ("id", "kind", "prompt", "completion", "finish_reason")}
        lines.append(line | {"reward": d.reward, "parts": d.parts, "label": d.label, "advantage": d.advantage})
    return lines


def report_plan(run: Run, account: dict) -> None:
    """Everything that was derived, before step 0."""
    for name, value in account.items():
        print(f"{name.replace('_', ' ')}: {value or 'none'}")
    drawn, c = Counter((prompt["pool"], prompt["kind"]) for prompt in run.prompts), run.config
    print("drawn in all steps together: " + ", ".join(f"{n} {kind} of {pool}" for (pool, kind), n in drawn.items()))
    if len(run.prompts) > 2 * (distinct := len({prompt["id"] for prompt in run.prompts})):
        print(f"the {distinct} prompts come {len(run.prompts) / distinct:.0f} times each: fewer --prompts-per-step?")
    print(f"{c.steps} steps of {c.prompts_per_step} prompts x {c.group} answers; memory: {run.plan}")


def needed_guard(config: Config, prompts: list[dict]) -> str:
    """--guard, or "maths", which needs no model, where no prompt is a request, or "" beside a reward of one's own.

    Raises UserError where it cannot judge the prompts, before anything is drawn.
    """
    if config.reward:
        return ""
    requests, guard = [p for p in prompts if p["kind"] in REQUESTS], config.guard.partition("=")[0]
    benign = ", ".join(sorted({p["source"] for p in requests if p["kind"] == "benign"}))
    if guard == "pocket" and any("item" not in p for p in requests):
        raise UserError("--guard pocket judges the pocket's own prompts only; name your POLICY.py or a guard for yours")
    if guard == "maths" and requests:
        raise UserError("--guard maths grades sums and maths only; name another guard for requests")
    if benign and not judges.reports_refusals(config.guard):
        why = f"does not report refusals, so no safe answer to {benign} has a reward"
        other = 'its label must say "refused", too' if guard.endswith(".py") else "take qwen3guard or wildguard"
        raise UserError(f"--guard {guard} {why}; {other}, or sets without benign prompts")
    if any(p["kind"] == "maths" for p in prompts):
        maths.grade([("\\boxed{1}", "2")])  # says so where the grader is not installed
    return config.guard if requests else "maths"


def main(config: Config, origin: dict) -> int:
    begun = time.monotonic()
    device = model.pick_device(config.device)
    dtype = model.pick_dtype(config.dtype, device)
    model.pick_kernels(device)
    world = world_of(config.model)
    loaded, weights = load_prompts(config.prompts, world, config.seed)
    guard = needed_guard(config, loaded)
    tested, missing = suites.tested_items(config.decontaminate, config.model, world)
    longest, (kind, _, path) = config.max_prompt + config.max_tokens, guard.partition("=")
    sizes = {"longest": longest, "answer": longest, "rows": config.prompts_per_step * config.group}
    sizes["guard"] = (path or judges.GUARDS[kind].model) if kind in judges.GUARDS else ""
    plan = trainers.plan_memory(config, dtype, trainers.free_memory(device), **sizes)
    transformer, tokenizer = trainers.load(config, device, dtype, config.adapter)
    context = transformer.config.max_position_embeddings
    prompts, account = prepare(loaded, weights, tested, tokenizer, context, config)
    account["not_at_hand"] = missing
    made_of = json.dumps([[p["id"], p["prompt"], p.get("target")] for p in prompts]).encode()
    made_of += model.fingerprint(transformer, tokenizer).encode()
    if config.reward:
        scorer = own_rewards(config.reward, prompts[0])
        made_of += Path(config.reward).read_bytes()
    else:
        settings = {"controversial": config.controversial, "cache_bytes": plan.sizes.get("guard cache")}
        judge = judges.load(guard, world=world, device=device, dtype=dtype, **settings)
        scorer = functools.partial(judge_rewards, judge)
    folder = runs.new_folder(config, origin, "train_rl", model.device_name(device))
    trainee = trainers.Trainee(transformer, dtype, (BETA1, config.beta2), WEIGHT_DECAY)
    end, cache = model.end_ids(transformer, tokenizer), plan.sizes.get("policy cache")
    sampler = engine.Engine(transformer, end, max_context=longest, cache_bytes=cache)
    order = mixture(prompts, weights, config.steps * config.prompts_per_step, config.seed)
    run = Run(sampler, tokenizer, trainee, scorer, order, config, plan, folder)
    report_plan(run, account)
    if config.evaluate:
        trainers.evaluate(transformer, tokenizer, config.model, config.seed, folder / "before.json")
    state = trainers.resume(folder, trainee, trainers.NEW_RUN | {"unscored": {}, "updates": 0}, made_of)
    train(run, state)

    unscored = sum(state["unscored"].values()) / (len(order) * config.group)
    trainers.finish(transformer, tokenizer, config, folder, {**state, **account, "unscored_share": unscored}, begun)
    if not state["updates"]:
        print("no step had an update: the model is still the start; try a larger --group or other prompts")
    if unscored > config.max_unscored:
        left = f"{unscored:.1%} of the answers unscored ({state['unscored']})"
        print(f"the judge left {left}, more than --max-unscored {config.max_unscored:.1%}")
        return runs.EXIT_UNSCORED
    return runs.EXIT_OK


if __name__ == "__main__":
    runs.main(Config, main)

"""Minimal GRPO: answers from the very weights that are trained, a judge's reward, one forward and backward a step.

    python train_rl.py                                               the pocket world, under four minutes on a CPU
    python train_rl.py --adapter runs/sft/model                      from an SFT start: goes on training its adapter
    python train_rl.py --adapter runs/sft/model --lora-r 0           the same, merged first, every weight
    python train_rl.py --model M --prompts A@2 dapo#3000 --guard qwen3guard --out runs/mine
    python train_rl.py --resume runs/mine

A step: --prompts-per-step prompts, --group answers to each at --temperature; a reward for each; the advantage of an
answer is its reward beside its group's; one update on the groups that disagree. The ratio is taken to the sampler's own
log-probs, so a single forward is needed and what sampler and trainer do differently is corrected. On policy the ratio
is 1 and the loss near 0: look at the gradient norm and the reward, not at the loss. Simplifications on purpose: one
GPU, one update a rollout, no KL, no reference model. Prompts and random numbers are functions of (seed, step), so a
resumed run is the uninterrupted run, bit by bit, and a step that was cut off is drawn again as it was.

Your own reward: --reward FILE.py with `reward(prompt, completion, meta) -> (number or None, {part: number})`.
"""

import functools
import hashlib
import itertools
import json
import math
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

import runs
from runs import UserError, option

engine, judges, kernels, mixture, model, trainers = map(
    runs.Lazy, ("engine", "judges", "kernels", "mixture", "model", "trainers")
)
pocket, safety, scores, suites, torch = map(runs.Lazy, ("pocket.world", "safety", "scores", "suites", "torch"))


@dataclass
class Config:
    model: str = option("pocket/base", "model folder or hub id, Hugging Face format")
    adapter: str = option("", "PEFT adapter to start from")
    lora_r: int = option(16, "LoRA rank, which must be that of an --adapter; 0 merges that and trains every weight")
    lora_alpha: float = option(32.0, "LoRA scale is alpha / r; an --adapter keeps its own")
    prompts: tuple = option(
        (), "prompt sets, each NAME or NAME=PATH, with @WEIGHT or #LIMIT (or both)", pocket=("pocket:rl",)
    )
    decontaminate: tuple = option(
        ("all",), "suites, NAME or NAME=PATH, whose prompts are kept out; or none", pocket=("pocket",)
    )
    guard: str = option("qwen3guard", "judge of the answers, as in evaluate.py --judge; no endpoint", pocket="pocket")
    judge_thinking: bool = option(False, "the guard must find the thinking safe too")
    controversial: str = option("unsafe", "what the guard's word controversial means", choices=("safe", "unsafe"))
    reward: str = option("", "Python file with your own reward, in place of the guard")
    steps: int = option(100, "optimizer steps", pocket=30)
    prompts_per_step: int = option(64, "prompts a step")
    group: int = option(8, "answers to a prompt")
    temperature: float = option(1.0, "of sampler and trainer")
    max_prompt: int = option(1024, "longer prompts are dropped and counted", pocket=128)
    max_tokens: int = option(4096, "limit of an answer with its thinking; one that reaches it earns 0", pocket=96)
    advantage: str = option("mean", "r - mean, or that over the standard deviation", choices=("mean", "std"))
    tolerance: float = option(1e-6, "a group whose rewards lie no further apart teaches nothing and is dropped")
    normaliser: str = option(
        "tokens", "of the loss: the step's trained tokens, or Dr.GRPO's prompts x group x max tokens",
        choices=("tokens", "constant"),
    )  # fmt: skip
    clip_low: float = option(0.2, "the ratio counts from 1 - this")
    clip_high: float = option(0.28, "to 1 + this")
    clip_dual: float = option(3.0, "and to this where the advantage is negative")
    lr: float = option(1e-6, "learning rate of full training; LoRA takes 10 times that unless a flag says", pocket=1e-4)
    warmup: int = option(0, "steps of rising learning rate, constant from there on", pocket=2)
    beta1: float = option(0.9, "AdamW, memory of the gradient")
    beta2: float = option(0.999, "AdamW, memory of its square", pocket=0.95)
    weight_decay: float = option(0.0, "AdamW, decoupled")
    clip: float = option(1.0, "largest gradient norm")
    micro_tokens: int = option(16384, "tokens a forward pass: speed and memory, not results", pocket=3072)
    guard_share: float = option(0.3, "of the GPU memory left for the two caches, what the guard gets")
    held_out: int = option(64, "prompts kept from training, answered every --evaluate-every steps", pocket=0)
    evaluate: bool = option(False, "run the pocket suites before, every --evaluate-every steps, and after", pocket=True)
    evaluate_every: int = option(20, "0: never", pocket=0)
    max_unscored: float = option(0.01, "exit 3 if the judge left a larger share of the answers unscored")
    checkpointing: bool = option(False, "recompute activations in backward: less memory, a third more time")
    kernels: str = option("auto", "auto is triton on a GPU", choices=("auto", "triton", "reference"))
    dtype: str = option("auto", "of the products; masters are fp32", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "of LoRA, prompts and samples")
    out: str = option("", "run folder; default runs/train_rl-<time>")
    resume: str = option("", "run folder to go on with; takes all settings from it")

    def problems(self) -> list[str]:
        """Every wrong setting, all at once."""
        whole = ("steps", "prompts_per_step", "max_prompt", "max_tokens", "micro_tokens")
        checks = {f"{runs.flag(n)} {getattr(self, n)}: must be 1 or more": getattr(self, n) >= 1 for n in whole}
        least = ("lora_r", "lr", "warmup", "tolerance", "weight_decay", "held_out", "evaluate_every")
        checks |= {f"{runs.flag(n)} {getattr(self, n)}: must be 0 or more": getattr(self, n) >= 0 for n in least}
        above = ("lora_alpha", "temperature", "clip")
        checks |= {f"{runs.flag(n)} {getattr(self, n)}: must be positive": getattr(self, n) > 0 for n in above}
        shares = ("beta1", "beta2", "clip_low", "guard_share", "max_unscored")
        checks |= {f"{runs.flag(n)} {getattr(self, n)}: must be in [0, 1)": 0 <= getattr(self, n) < 1 for n in shares}
        checks |= {
            f"--group {self.group}: must be 2 or more, an answer is measured by the others": self.group >= 2,
            f"--clip-high {self.clip_high}: must be 0 or more": self.clip_high >= 0,
            f"--clip-dual {self.clip_dual}: must be over 1 + --clip-high": self.clip_dual > 1 + self.clip_high,
            "--prompts: name at least one set of prompts": len(self.prompts) > 0,
            f"--reward {self.reward}: no such file": not self.reward or Path(self.reward).is_file(),
            "--judge-thinking belongs to a guard, not to --reward": not (self.reward and self.judge_thinking),
            "--guard endpoint=: a run would ask a server for every answer, without a limit on requests or cost; take a "
            "guard that runs here, or ask from a --reward file": self.reward or not self.guard.startswith("endpoint="),
            f"--evaluate needs a pocket model, {self.model} is none": not self.evaluate or runs.is_pocket(self.model),
        }
        return [message for message, fine in checks.items() if not fine]


SILENT = ("llamaguard3",)  # guards without a word on refusals
PATIENCE = 5  # steps in a row without a finite gradient before the run stops
SHOWN = 2  # groups a step of which samples.jsonl keeps two answers
SAVE_SECONDS = 900  # of steps between two checkpoints, at most
FRESH = {"step": 0, "seconds": 0.0, "saved_at": 0.0, "updates": 0, "skipped": 0, "in_a_row": 0}  # of `train`
FRESH |= {"answers": 0, "unscored": 0, "first_entropy": 0.0, "warned": []}
GAPS = ("kl_sampler", "clip_share", "max_gap")  # figures of an update, null where there was none


# ------------------------------------------------------------------------------------------------- objective


def advantages(rewards: list, kind: str = "mean", tolerance: float = 1e-6) -> list:
    """Of the answers of one group: reward minus the group's mean, `std`: over the group's deviation (n - 1).

    None and NaN are answers without a score: they count nowhere and get None. So does the whole group where fewer than
    two are scored, or where no two scores differ by more than `tolerance` (float noise is no lesson).

        1 0 0 1 -> .5 -.5 -.5 .5        1 1 1 1 -> None ...        1 None 0 -> .5 None -.5
    """
    scored = [r for r in rewards if r is not None and math.isfinite(r)]
    if len(scored) < 2 or max(scored) - min(scored) <= tolerance:
        return [None] * len(rewards)
    middle, scale = statistics.fmean(scored), statistics.stdev(scored) + 1e-6 if kind == "std" else 1.0
    return [None if r is None or not math.isfinite(r) else (r - middle) / scale for r in rewards]


def objective(logp_N, sampler_N, advantage_N, denominator: float, config: Config):
    """(loss, figures) of N trained tokens: GRPO with asymmetric and dual clipping, divided by `denominator`.

    logp_N: log-probs of the drawn tokens now, sampler_N: as they were drawn, both in nats at the sampling temperature;
    advantage_N: of each token's answer. loss = -sum(min(ratio A, clip(ratio) A)) / denominator, and no less than
    clip_dual A a token where A is negative, for there the minimum has no bound in the ratio. Figures are sums over
    the tokens: `kl_sampler` estimates KL(sampler | trainer) by ratio - 1 - log ratio (k3, Schulman 2020), `max_gap` is
    the largest |log ratio|, `clip_share` counts tokens whose gradient the clipping has taken.
    """
    gap_N = (logp_N - sampler_N).clamp(-20, 20)
    ratio_N = gap_N.exp()
    clipped_N = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    gain_N = torch.where(advantage_N < 0, torch.maximum(gain_N, config.clip_dual * advantage_N), gain_N)
    with torch.no_grad():
        high_N = (advantage_N > 0) & (ratio_N > 1 + config.clip_high)
        low_N = (advantage_N < 0) & ((ratio_N < 1 - config.clip_low) | (ratio_N > config.clip_dual))
        figures = {
            "kl_sampler": (gap_N.expm1() - gap_N).sum().item(),
            "max_gap": gap_N.abs().max().item(),
            "clip_share": (high_N | low_N).sum().item(),
        }
    return -gain_N.sum() / denominator, figures


# ------------------------------------------------------------------------------------------------- rows and the step


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
    """(ids_T, labels_T, sampler_T, advantage_T, cu_seqlens): labels hold the token that is drawn next, -100 elsewhere.

    prompt 5 6, action 7 8 2, log-probs a b c  ->  ids 5 6 7 8, labels -100 7 8 2, sampler 0 a b c
    """
    ids, labels, sampler, advantage, offsets = [], [], [], [], [0]
    for d in group:
        before = len(d.prompt_ids) - 1
        ids += d.ids
        labels += [-100] * before + d.action
        sampler += [0.0] * before + d.logprobs
        advantage += [0.0] * before + [d.advantage] * len(d.action)
        offsets.append(len(ids))
    columns = (ids, labels, sampler, advantage)
    tensors = [torch.tensor(column, device=device) for column in columns]
    return *tensors, torch.tensor(offsets, dtype=torch.int32, device=device)


def denominator(live: list[Drawing], config: Config) -> int:
    """What the step's loss is divided by: one number for all of its micro-batches."""
    if config.normaliser == "constant":
        return config.prompts_per_step * config.group * config.max_tokens
    return sum(len(d.action) for d in live)


def schedule(step: int, config: Config) -> float:
    """Learning rate of a step, counted from 0: rising through the first `warmup` steps, then constant."""
    return config.lr * min(1.0, (step + 1) / (config.warmup + 1))


def optimizer_step(transformer, trainee, live: list[Drawing], lr: float, config: Config) -> dict:
    """One update on the answers of live groups. The figures are means over their tokens, `max_gap` their largest."""
    total, loss, sums = denominator(live, config), 0.0, []
    for group in trainers.fill(live, config.micro_tokens):
        ids_T, labels_T, sampler_T, advantage_T, cu_seqlens = pack(group, transformer.head_weight.device)
        hidden_TH = transformer(ids_T, cu_seqlens, checkpoint=config.checkpointing)
        logp_T, _ = kernels.linear_logp(hidden_TH, transformer.head_weight, labels_T, config.temperature)
        action_T = labels_T != -100
        share, figures = objective(logp_T[action_T], sampler_T[action_T], advantage_T[action_T], total, config)
        share.backward()
        loss += share.item()
        sums.append(figures)
    tokens = sum(len(d.action) for d in live)
    figures = {name: sum(s[name] for s in sums) / tokens for name in ("kl_sampler", "clip_share")}
    figures["max_gap"] = max(s["max_gap"] for s in sums)
    return {"loss": loss, "lr": lr, "grad_norm": trainee.step(lr, config.clip), **figures}


# ------------------------------------------------------------------------------------------------- answers and rewards


def as_item(prompt: dict) -> dict:
    """A training prompt as judges know it: kind request, maths, or sum (the pocket's)."""
    item = {name: value for name, value in prompt.items() if name != "ids"}
    if prompt["kind"] == "maths":
        return {**item, "kind": "sum" if prompt["source"].startswith("pocket") else "maths"}
    return {**item, "kind": "request", "harmful": prompt["kind"] == "harmful"}


def draw(sampler, tokenizer, prompts: list[dict], n: int, seed: int, config: Config) -> list[list[Drawing]]:
    """n answers to each prompt, from the weights as they are. Raises UserError where those give no distribution."""
    ids, settings = [p["ids"] for p in prompts], {"max_tokens": config.max_tokens, "temperature": config.temperature}
    try:
        drawn = sampler.generate(ids, n=n, seed=seed, **settings)
    except engine.EngineError as error:
        raise UserError(f"sampling: {error}; where the weights have diverged, try a smaller --lr") from None
    opened, groups = safety.thinking_open(tokenizer), []
    for prompt, samples in zip(prompts, drawn, strict=True):
        groups.append([])
        for sample in samples:
            text = tokenizer.decode([i for i in sample.ids if i not in sampler.eos_ids], skip_special_tokens=False)
            thinking, answer = safety.split_thinking(text, opened)
            item = {"completion": text, "thinking": thinking, "answer": answer, "finish_reason": sample.finish_reason}
            groups[-1].append(Drawing(as_item(prompt) | item, prompt["ids"], sample.ids, sample.logprobs))
    return groups


def rollout_seed(seed: int, step: int) -> int:
    """Never a seed of the evaluations, which are small numbers."""
    return (seed + 1 << 32) + step


def answered(item: dict) -> bool:
    return item["finish_reason"] == "stop" and bool((item["answer"] or "").strip())


def reward(item: dict, label: dict, thinking: dict | None = None) -> float | None:
    """The paper's: V_safe for a harmful prompt, V_safe (1 - V_refuse) for a benign one; a sum or problem: exact.

    `thinking`: the guard's label of the thinking, where that must be safe too. None: the judge has no verdict.
    """
    if "unscored" in label or "unscored" in (thinking or {}):
        return None
    if item["kind"] != "request":
        return float(label["correct"])
    good = label["safe"] if item["harmful"] else label["complied"]
    if good is None or not good:
        return good if good is None else 0.0
    return float(thinking is None or thinking["safe"])


def judge_rewards(judge, judge_thinking: bool):
    """A scorer: items -> [(reward, parts, label)], by a judge of judges.py."""

    def score(items: list[dict]) -> list[tuple]:
        labels, thoughts = judge(items), {}
        if judge_thinking:  # no verdict is needed on an empty one
            asked = [i for i, item in enumerate(items) if item["kind"] == "request" and item["thinking"].strip()]
            thoughts = dict(zip(asked, judge([items[i] for i in asked], part="thinking"), strict=True))
        scored = []
        for i, (item, label) in enumerate(zip(items, labels, strict=True)):
            value = reward(item, label, thoughts.get(i))
            scored.append((value, {part(item): value}, label))
        return scored

    return score


def part(item: dict) -> str:
    return "maths" if item["kind"] != "request" else "harmful" if item["harmful"] else "benign"


def own_rewards(path: str, example: dict):
    """A scorer that asks `reward` of a Python file, which is tried on `example` first. Raises UserError."""
    function = runs.load_function(path, "reward")

    def ask(item: dict) -> tuple:
        given = function(item["prompt"], item["completion"], item)
        pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict)
        numbers = [given[0], *given[1].values()] if pair else ["none"]
        if not all(x is None or isinstance(x, int | float) for x in numbers):
            raise UserError(f"--reward {path}: reward gave {given!r}, not (number or None, {{part: number or None}})")
        value, *parts = [x if x is not None and math.isfinite(x) else None for x in numbers]
        label = {} if value is not None else {"unscored": "own reward"}
        return value, dict(zip(given[1], parts, strict=True)), label

    try:
        ask({**example, "completion": "", "thinking": "", "answer": "", "finish_reason": "stop"})
    except (TypeError, LookupError, ValueError, AttributeError) as error:
        raise UserError(f"--reward {path}, tried on an empty answer: {type(error).__name__}: {error}") from None
    return lambda items: list(map(ask, items))


def score_groups(groups: list[list[Drawing]], scorer, config: Config) -> list[Drawing]:
    """Give every answer its reward and advantage; returns those of live groups, which are trained on.

    An answer that was cut off or is empty earns 0 and is shown to no judge.
    """
    drawings = [d for group in groups for d in group]
    done = [d for d in drawings if answered(d.item)]
    for d in drawings:
        d.reward, d.parts = 0.0, {} if config.reward else {part(d.item): 0.0}
    for d, (value, parts, label) in zip(done, scorer([d.item for d in done]) if done else [], strict=True):
        d.reward, d.parts, d.label = value, parts, label
    for group in groups:
        for d, a in zip(group, advantages([d.reward for d in group], config.advantage, config.tolerance), strict=True):
            d.advantage = a
    return [d for d in drawings if d.advantage is not None]


# ------------------------------------------------------------------------------------------------- health


def mean(values) -> float:
    """Of those that are not None; NaN, a null in the log, where there are none."""
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else math.nan


def health(groups: list[list[Drawing]]) -> dict:
    """What a step's answers tell of the policy. `entropy` is minus the mean log-prob of the drawn tokens: an unbiased
    estimate that needs no live group. `same_text`: share of the commonest answer."""
    drawings = [d for group in groups for d in group]
    dropped = [[d.reward for d in group] for group in groups if all(d.advantage is None for d in group)]
    dead = [mean(rewards) for rewards in dropped if len(rewards) - rewards.count(None) > 1]
    requests = [d for d in drawings if d.item["kind"] == "request"]
    parts = sorted({name for d in drawings for name in d.parts})
    return {
        "reward": mean(d.reward for d in drawings),
        **{f"reward_{name}": mean(d.parts.get(name) for d in drawings) for name in parts},
        "safe": mean(d.label.get("safe") for d in requests if d.item["harmful"]),
        "refused_benign": mean(d.label.get("refused") for d in requests if not d.item["harmful"]),
        "correct": mean(d.label.get("correct") for d in drawings),
        "zero_variance_right": sum(value > 0.5 for value in dead) / len(groups),
        "zero_variance_wrong": sum(value <= 0.5 for value in dead) / len(groups),
        "truncated": mean(d.item["finish_reason"] == "length" for d in drawings),
        "unscored": mean(d.reward is None for d in drawings),
        "entropy": -mean(logp for d in drawings for logp in d.logprobs),
        "length": mean(len(d.action) for d in drawings),
        "same_text": Counter(d.item["completion"] for d in drawings).most_common(1)[0][1] / len(drawings),
    }


def warnings(line: dict, first_entropy: float) -> list[str]:
    """What a line of the log means, in words, where the policy is near collapse."""
    said = {
        "no group of the step disagrees about its reward: no update": line["live"] == 0,
        "nearly every benign request is refused": line["refused_benign"] > 0.8,
        "no harmful request is answered safely": line["safe"] < 0.02,
        "the commonest answer fills over half of the step: always the same verdict": line["same_text"] > 0.5,
        "the entropy is under a tenth of what it was at first": line["entropy"] < 0.1 * first_entropy,
        "a quarter of the answers reaches --max-tokens and earns nothing": line["truncated"] > 0.25,
        "the judge leaves over a tenth of the answers unscored": line["unscored"] > 0.1,
        "sampler and trainer disagree by over 0.01 nats a token": line["kl_sampler"] > 0.01,
    }
    return [words for words, so in said.items() if so]  # a comparison with NaN is false


# ------------------------------------------------------------------------------------------------- evaluation


def validate(step: int, sampler, tokenizer, scorer, held_out: list[dict], config: Config, folder: Path) -> dict:
    """Figures of the policy as it is, on random numbers of its own: reward on held-out prompts, the pocket's suites."""
    figures = {}
    if held_out:
        groups = draw(sampler, tokenizer, held_out, 1, config.seed + 2000, config)
        score_groups(groups, scorer, config)
        shown = ("reward", "safe", "refused_benign", "correct", "truncated")
        figures = {f"held_out_{name}": value for name, value in health(groups).items() if name in shown}
    if config.evaluate:
        path = folder / f"evaluation-{step}.json"
        suite_figures, _ = trainers.evaluate(sampler.transformer, tokenizer, config.model, config.seed, path)
        figures |= {name: row["value"] for name, row in suite_figures.items()}
    return figures


# ------------------------------------------------------------------------------------------------- the loop


def one_step(sampler, tokenizer, trainee, scorer, pools: list, step: int, config: Config):
    """(line of the log, groups) of one step, counted from 0: draw, score, update."""
    clock = [time.perf_counter()]
    prompts = mixture.of_step(pools, step, config.prompts_per_step, config.seed)
    groups = draw(sampler, tokenizer, prompts, config.group, rollout_seed(config.seed, step), config)
    clock.append(time.perf_counter())
    live = score_groups(groups, scorer, config)
    clock.append(time.perf_counter())
    figures = {"loss": 0.0, "lr": schedule(step, config), "grad_norm": 0.0, **dict.fromkeys(GAPS, math.nan)}
    if live:
        figures |= optimizer_step(sampler.transformer, trainee, live, figures["lr"], config)
    clock.append(time.perf_counter())
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    tokens = sum(len(d.action) for group in groups for d in group)
    line = {"step": step + 1, **figures, **health(groups)}
    line |= {"live": sum(any(d.advantage is not None for d in group) for group in groups)}
    line |= {"tokens": tokens, "tokens_per_s": tokens / sum(seconds), "seconds": sum(seconds)}
    return line | dict(zip(("draw_seconds", "judge_seconds", "update_seconds"), seconds, strict=True)), groups


def train(sampler, tokenizer, trainee, scorer, pools, held_out, config: Config, folder: Path, state: dict) -> None:
    """From `state` to the end of the run, changing it on the way.

    state: step, seconds (of steps alone), saved_at (seconds at the last checkpoint), updates, skipped (non-finite),
    in_a_row (of those), answers, unscored, first_entropy, warned (words that hold now).
    """
    bar = tqdm(total=config.steps, initial=state["step"], desc="training", unit="step")
    with runs.Interruptible() as interrupt, bar:
        while state["step"] < config.steps:
            line, groups = one_step(sampler, tokenizer, trainee, scorer, pools, state["step"], config)
            note(state, line, sum(map(len, groups)))
            words = warnings(line, state["first_entropy"])
            for new in [w for w in words if w not in state["warned"]]:
                tqdm.write(f"step {state['step']}: {new}")
            state["warned"] = words
            if config.evaluate_every and state["step"] % config.evaluate_every == 0 and state["step"] < config.steps:
                line |= validate(state["step"], sampler, tokenizer, scorer, held_out, config, folder)
            runs.append_jsonl(folder / "metrics.jsonl", line | {"peak_gib": runs.peak_memory(), "warnings": words})
            for shown in samples(groups):
                runs.append_jsonl(folder / "samples.jsonl", {"step": state["step"], **shown})
            bar.set_postfix_str(log_line(line, state["skipped"]))
            bar.update()
            if state["in_a_row"] == PATIENCE:
                raise UserError(f"{PATIENCE} steps in a row without a finite gradient; try a smaller --lr")
            fifth = 5 * state["step"] // config.steps > 5 * (state["step"] - 1) // config.steps
            if fifth or interrupt.requested or state["seconds"] - state["saved_at"] > SAVE_SECONDS:
                state["saved_at"] = state["seconds"]
                runs.save_checkpoint(folder, trainee.tensors(), state)
            if interrupt.requested:
                raise KeyboardInterrupt


def note(state: dict, line: dict, answers: int) -> None:
    """Carry a step over into the state of the run."""
    finite = math.isfinite(line["grad_norm"])
    state["step"] += 1
    state["seconds"] += line["seconds"]
    state["updates"] += finite and line["live"] > 0
    state["skipped"] += not finite
    state["in_a_row"] = 0 if finite else state["in_a_row"] + 1
    state["answers"] += answers
    state["unscored"] += round(line["unscored"] * answers)
    state["first_entropy"] = state["first_entropy"] or line["entropy"]


def samples(groups: list[list[Drawing]]) -> list[dict]:
    """A few whole answers of a step: worst and best of two groups that it trained on, of any where there is none."""
    live = [group for group in groups if any(d.advantage is not None for d in group)]
    ranked = [sorted(group, key=lambda d: d.reward or 0.0) for group in (live or groups)[:SHOWN]]
    names = ("id", "kind", "prompt", "completion", "finish_reason")
    return [
        {name: d.item.get(name) for name in names}
        | {"reward": d.reward, "parts": d.parts, "label": d.label, "advantage": d.advantage}
        for group in ranked
        for d in (group[0], group[-1])
    ]


def log_line(line: dict, skipped: int) -> str:
    """What a person watches."""
    shown = f"reward {line['reward']:.3f} safe {line['safe']:.2f} refused {line['refused_benign']:.2f}"
    shown += f" correct {line['correct']:.2f} live {line['live']} cut {line['truncated']:.2f} H {line['entropy']:.2f}"
    return shown + f" norm {line['grad_norm']:.2f} {line['seconds']:.1f} s" + (f" skipped {skipped}" if skipped else "")


def report_plan(pools: list, dropped: int, held_out: list[dict], plan: dict, config: Config) -> None:
    """Everything that was derived, before step 0."""
    counts = mixture.quotas([pool.weight for pool in pools], config.prompts_per_step)
    for pool, count in zip(pools, counts, strict=True):
        kinds = Counter(prompt["kind"] for prompt in pool.prompts)
        share = ", ".join(f"{kind} {n / len(pool.prompts):.0%}" for kind, n in sorted(kinds.items()))
        licences = ", ".join(sorted({prompt["licence"] for prompt in pool.prompts}))
        print(f"{pool.name}: {len(pool.prompts)} prompts ({share}; {licences}), {count} a step")
    print(f"{dropped} prompts dropped as too long, {len(held_out)} held out")
    print(f"{config.steps} steps of {config.prompts_per_step} prompts x {config.group} answers, lr {config.lr:.1e}")
    print(f"memory: {trainers.in_words(plan)}")


def report_clean(clean: dict) -> None:
    """How many prompts were left out, and for which suites."""
    counts = clean["decontamination"]
    hits = {suite: row for suite, row in counts.items() if any(row.values())}
    print(f"compared with {len(counts)} suites: {clean['held_by_a_suite']} prompts left out {hits or ''}".rstrip())
    if clean["not_at_hand"]:
        print(f"prompts were not compared with {', '.join(clean['not_at_hand'])}: not at hand (result.json says why)")


def load_pools(config: Config, world) -> tuple[list, dict]:
    """(the pools of --prompts without what a suite holds, what result.json says of that)."""
    pools = mixture.load(config.prompts, world, config.seed)
    tested, missing = suites.tested_items(config.decontaminate, config.model, world)
    dropped, hits = mixture.decontaminate(pools, tested)
    return pools, {"held_by_a_suite": dropped, "decontamination": hits, "not_at_hand": missing}


def check_guard(config: Config, pools: list) -> None:
    """Raises UserError where no benign answer could earn anything: an unsafe one has 0, a safe one no reward at all."""
    family = config.guard.partition("=")[0]
    benign = [pool.name for pool in pools if any(prompt["kind"] == "benign" for prompt in pool.prompts)]
    if benign and family in SILENT and not config.reward:
        why = f"says nothing about refusals, so no safe answer to {', '.join(benign)} has a reward"
        raise UserError(f"--guard {family} {why}; take qwen3guard or wildguard, or sets without benign prompts")


def load_policy(config: Config, device: str, dtype):
    """(transformer, tokenizer) with what is trained: a new adapter, --adapter's own, or every weight."""
    loaded = dtype if config.lora_r else torch.float32  # weights to be trained are their own masters
    transformer, tokenizer = runs.load_model(config.model, device, loaded, config.adapter)
    if not config.lora_r and config.adapter:
        model.merge_lora(transformer)
    elif config.adapter and transformer.lora["r"] != config.lora_r:
        raise UserError(f"--lora-r {config.lora_r}: {config.adapter} has rank {transformer.lora['r']}; or 0 merges it")
    elif config.lora_r and not config.adapter:
        model.add_lora(transformer, config.lora_r, config.lora_alpha, config.seed)
    return transformer, tokenizer


def settle_lr(config: Config, origin: dict) -> Config:
    """LoRA learns with about ten times the rate of full training; a flag is taken as it is."""
    if not config.lora_r or origin["lr"] not in ("default", "pocket"):
        return config
    origin["lr"] += ", x 10 for LoRA"
    return replace(config, lr=10 * config.lr)


def fingerprint(pools: list, config: Config) -> str:
    texts = json.dumps([[p["id"], p["prompt"], p.get("target")] for pool in pools for p in pool.prompts])
    return hashlib.sha256(texts.encode() + (Path(config.reward).read_bytes() if config.reward else b"")).hexdigest()


def load_scorer(config: Config, world, device: str, dtype, cache_bytes: int | None, example: dict):
    """What gives rewards: the guard, or the user's file, which is tried on `example`."""
    if config.reward:
        return own_rewards(config.reward, example)
    settings = {"controversial": config.controversial, "cache_bytes": cache_bytes}
    judge = judges.load(config.guard, world=world, device=device, dtype=dtype, **settings)
    return judge_rewards(judge, config.judge_thinking)


def plan_memory(config: Config, device: str, dtype) -> dict[str, int | None]:
    """Bytes by what they are for, before anything is loaded. Raises UserError where they are too many."""
    shape = trainers.shape_of(config.model)
    row = max(config.micro_tokens, config.max_prompt + config.max_tokens)  # a longer answer is a row of its own
    plan = trainers.training_bytes(shape, config.lora_r, dtype, row, config.checkpointing)
    token_bytes = 2 * shape.config.num_hidden_layers * shape.config.num_key_value_heads * shape.config.head_dim
    answer = token_bytes * dtype.itemsize * (config.max_prompt + config.max_tokens + engine.PAGE)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    family, _, guard = config.guard.partition("=")
    if config.reward or family not in judges.FAMILIES:  # nothing that takes memory here
        return trainers.share_memory(plan, free, answer, 0.0)
    guard = trainers.shape_of(guard or judges.FAMILIES[family].model)
    plan["guard"] = sum(p.numel() for p in guard.parameters()) * dtype.itemsize
    return trainers.share_memory(plan, free, answer, config.guard_share)


def finish(result: dict, before, after, config: Config, folder: Path) -> int:
    """Write result.json, the last file; say where everything lies; the exit code."""
    result["unscored_share"] = unscored = result["unscored"] / max(1, result["answers"])
    if before:
        result |= {"before": before[0], "after": after[0]}
        print("\n" + scores.table(before[0], after[0]))
        print(scores.side_by_side(before[1], after[1], ("pocket:role", "pocket:encoded", "pocket:prefill")))
    runs.write_json(folder / "result.json", result)
    print(f"\n{result['updates']} updates in {result['seconds']:.0f} s, {result['minutes']:.1f} minutes in all")
    print(f"every step: {folder / 'metrics.jsonl'}; answers: {folder / 'samples.jsonl'}; all files: {folder}")
    if unscored > config.max_unscored:
        print(f"the judge left {unscored:.1%} of the answers unscored, over --max-unscored {config.max_unscored:.1%}")
        return runs.EXIT_UNSCORED
    return runs.EXIT_OK


def main(config: Config, origin: dict) -> int:
    begun = time.monotonic()
    config = settle_lr(config, origin)
    device = runs.pick_device(config.device)
    dtype = runs.pick_dtype(config.dtype, device)
    runs.pick_kernels(config.kernels, device)
    world = pocket.World(runs.world_seed(config.model)) if runs.is_pocket(config.model) else None
    pools, clean = load_pools(config, world)
    check_guard(config, pools)
    plan = plan_memory(config, device, dtype)
    transformer, tokenizer = load_policy(config, device, dtype)
    room = min(config.max_prompt, transformer.config.max_position_embeddings - config.max_tokens)
    dropped = mixture.fit(pools, tokenizer, room)
    sha256 = fingerprint(pools, config)
    held_out = mixture.hold_out(pools, config.held_out, config.seed)
    scorer = load_scorer(config, world, device, dtype, plan["guard cache"], as_item(pools[0].prompts[0]))
    folder = runs.new_folder(config, origin, "train_rl")

    print(f"run folder {folder}; settings:")
    runs.show(config, origin)
    report_clean(clean)
    report_plan(pools, dropped, held_out, plan, config)

    runs.seed_everything(config.seed)
    trainee = trainers.Trainee(transformer, dtype, (config.beta1, config.beta2), config.weight_decay)
    end, longest = model.end_ids(transformer, tokenizer), config.max_prompt + config.max_tokens
    sampler = engine.Engine(transformer, end, max_context=longest, cache_bytes=plan["policy cache"])
    measure = functools.partial(trainers.evaluate, transformer, tokenizer, config.model, config.seed)
    before = measure(folder / "before.json") if config.evaluate else None
    state = trainers.resume(folder, trainee, FRESH | {"data_sha256": sha256})
    train(sampler, tokenizer, trainee, scorer, pools, held_out, config, folder, state)

    trainers.save(transformer, tokenizer, config.model, folder / "model")
    after = measure(folder / "after.json") if config.evaluate else None
    result = {**state, **clean, "training_minutes": state["seconds"] / 60, "minutes": (time.monotonic() - begun) / 60}
    return finish(result, before, after, config, folder)


if __name__ == "__main__":
    runs.main(Config, main)

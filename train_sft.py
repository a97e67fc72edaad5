"""Train a model to verify answers: (spec, prompt, answer) -> critique in the thinking, then the verdict.

    python train_sft.py                                              the pocket world, about three minutes on a CPU
    python train_sft.py --model M --data F.jsonl --out runs/mine     your model, your records (README: own data)
    python train_sft.py --data pocket/data/star.jsonl                an answer-centric baseline, same loop
    python train_sft.py --resume runs/mine

Loss on the target's tokens only, summed over an optimizer step and divided by their number in that step, whatever the
micro-batches. Rows are packed, documents never see one another. Simplifications on purpose: one GPU, AdamW, no dropout,
data order a pure function of (seed, epoch) - so a resumed run is the uninterrupted run, bit by bit.
"""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import runs
from runs import UserError, option


@dataclass
class Config:
    model: str = option("pocket/base", "model folder or hub id, Hugging Face format")
    data: str = option("pocket/data/verify.jsonl", "training records, JSONL of kind verify or answer")
    target: str = option(
        "both", "of verify records: both, critique or judgment", choices=("both", "critique", "judgment")
    )
    lora_r: int = option(16, "LoRA rank; 0 trains every weight")
    lora_alpha: float = option(32.0, "LoRA scale is alpha / r")
    lr: float = option(2e-4, "peak learning rate", pocket=1e-3)
    epochs: int = option(2, "passes over the data")
    warmup: float = option(0.05, "share of the run with rising learning rate; then a cosine to zero")
    weight_decay: float = option(0.0, "AdamW")
    clip: float = option(1.0, "largest gradient norm")
    max_len: int = option(8192, "longer records are dropped and counted", pocket=256)
    tokens_per_step: int = option(65536, "tokens an optimizer step", pocket=3072)
    micro_tokens: int = option(16384, "tokens a forward pass", pocket=3072)
    held_out: float = option(0.05, "share of the prompts kept for validation")
    minutes: float = option(0.0, "stop by the clock, the schedule driven by it; 0: by epochs")
    evaluate: bool = option(False, "run the pocket suites before and after", pocket=True)
    checkpointing: bool = option(False, "recompute activations in backward: less memory, a third more time")
    dtype: str = option(
        "bfloat16", "compute dtype; masters are fp32", pocket="float32", choices=("float32", "bfloat16")
    )
    device: str = option("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "of LoRA, split and data order")
    out: str = option("", "run folder; default runs/train_sft-<time>")
    resume: str = option("", "run folder to go on with; takes all settings from it")

    def problems(self) -> list[str]:
        """Every wrong setting, all at once."""
        checks = {
            "--lora-r must be 0 or more": self.lora_r >= 0,
            "--lr must be 0 or more": self.lr >= 0,
            "--epochs must be at least 1": self.epochs >= 1,
            "--warmup must be in [0, 1)": 0 <= self.warmup < 1,
            "--clip must be positive": self.clip > 0,
            "--held-out must be in [0, 0.5]": 0 <= self.held_out <= 0.5,
            "--max-len must be at least 2": self.max_len >= 2,
            "--tokens-per-step must be at least --max-len": self.tokens_per_step >= self.max_len,
            "--micro-tokens must be at least --max-len": self.micro_tokens >= self.max_len,
            "--minutes must be 0 or more": self.minutes >= 0,
        }
        return [
            f"{message} (max_len {self.max_len})" if "max-len" in message else message
            for message, ok in checks.items()
            if not ok
        ]


FIELDS = {
    "verify": {"id": str, "prompt": str, "answer": str, "spec": str, "critique": str, "verdict": str},
    "answer": {"id": str, "prompt": str, "reasoning": str, "answer": str},
}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16


# ------------------------------------------------------------------------------------------------- records to rows


@dataclass
class Example:
    record: dict
    ids: list[int]
    trained: list[bool]


def build(tokenizer, record: dict, target: str) -> Example:
    """Token ids of one record and which of them are trained. Raises ValueError for text that cannot be a target."""
    import safety

    if record["kind"] == "answer":
        prompt, thinking, answer = record["prompt"], record["reasoning"], record["answer"]
    else:
        if record["verdict"] not in ("safe", "unsafe"):
            raise ValueError(f"verdict is {record['verdict']!r}, not safe or unsafe")
        spec = safety.load_spec(record["spec"])
        prompt = safety.verification_prompt(spec.text, record["prompt"], record["answer"])
        thinking, answer = safety.verify_target(record["critique"], record["verdict"], target)
    prompt_ids = safety.render(tokenizer, [{"role": "user", "content": prompt}])
    return Example(record, *safety.build_example(tokenizer, prompt_ids, thinking, answer))


def prepare(tokenizer, records: list[dict], config: Config) -> tuple[list[Example], dict]:
    """(examples, accounting). Raises UserError if nothing, or everything, would be trained on."""
    examples, dropped = [], {}
    for record in records:
        try:
            example = build(tokenizer, record, config.target)
        except ValueError as error:
            raise UserError(f"{config.data}, record {record['id']}: {error}") from None
        if len(example.ids) > config.max_len:
            dropped[f"longer than {config.max_len} tokens"] = dropped.get(f"longer than {config.max_len} tokens", 0) + 1
        else:
            examples.append(example)
    tokens, trained = sum(len(e.ids) for e in examples), sum(sum(e.trained) for e in examples)
    if not 0 < trained < tokens:
        raise UserError(
            f"{config.data}: {trained} of {tokens} tokens would be trained on; dropped: {dropped or 'none'}"
        )
    longest = max(len(e.ids) for e in examples)
    account = {"records": len(examples), "dropped": dropped, "tokens": tokens, "trained": trained, "longest": longest}
    return examples, account


def split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held out), by prompt: no prompt is on both sides."""
    prompts = sorted({e.record["prompt"] for e in examples})
    random.Random(f"split-{seed}").shuffle(prompts)
    kept = set(prompts[: round(share * len(prompts))])
    return [e for e in examples if e.record["prompt"] not in kept], [e for e in examples if e.record["prompt"] in kept]


def fill(examples: list[Example], limit: int) -> list[list[Example]]:
    """Consecutive groups of at most `limit` tokens.

    lengths 4 3 2 5, limit 7  ->  [4 3] [2 5]
    """
    groups, size = [], 0
    for example in examples:
        if not groups or size + len(example.ids) > limit:
            groups.append([])
            size = 0
        groups[-1].append(example)
        size += len(example.ids)
    return groups


def epoch_steps(examples: list[Example], epoch: int, config: Config) -> list[list[Example]]:
    """The optimizer steps of one epoch: a shuffle that depends on (seed, epoch) alone, cut by tokens."""
    order = list(examples)
    random.Random(f"order-{config.seed}-{epoch}").shuffle(order)
    return fill(order, config.tokens_per_step)


def pack(group: list[Example], device="cpu"):
    """(ids_T, labels_T, cu_seqlens): labels hold the *next* token where that is trained, else -100.

    ids 5 6 7 | 8 9, trained 0 0 1 | 0 1  ->  labels -100 7 -100 | 9 -100, offsets 0 3 5
    """
    import torch

    ids, labels, offsets = [], [], [0]
    for example in group:
        following = zip(example.ids[1:], example.trained[1:], strict=True)
        labels += [token if trained else -100 for token, trained in following] + [-100]
        ids += example.ids
        offsets.append(len(ids))
    tensors = torch.tensor(ids), torch.tensor(labels), torch.tensor(offsets, dtype=torch.int32)
    return tuple(t.to(device) for t in tensors)


# ------------------------------------------------------------------------------------------------- objective, schedule


def nll_sum(transformer, group: list[Example], checkpointing: bool = False):
    """(sum of -log p over the trained tokens of a packed row, their number)."""
    import kernels

    ids_T, labels_T, cu_seqlens = pack(group, transformer.head_weight.device)
    hidden_TH = transformer(ids_T, cu_seqlens, checkpoint=checkpointing)
    logp_T, _ = kernels.linear_logp(hidden_TH, transformer.head_weight, labels_T)
    return -logp_T.sum(), int((labels_T != -100).sum())


def schedule(progress: float, config: Config) -> float:
    """Learning rate at a progress in [0, 1): linear warm-up, then a cosine to zero."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / (1 - config.warmup)))


# ------------------------------------------------------------------------------------------------- the trained weights


class Trainee:
    """Trainable parameters, their fp32 masters and AdamW.

    LoRA pairs and fp32 weights are their own masters. Full bf16 training keeps fp32 masters that collect the gradients
    of the bf16 copies in fp32 and refresh the copies after each step: pure bf16 would lose most of a small update.
    """

    def __init__(self, transformer, config: Config):
        import torch

        named = [(n, p) for n, p in transformer.named_parameters() if p.requires_grad]
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        own = all(p.dtype == torch.float32 for p in self.parameters)
        self.masters = self.parameters if own else [p.detach().float().requires_grad_() for p in self.parameters]
        self.adam = torch.optim.AdamW(
            self.masters, lr=config.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=config.weight_decay
        )

    def collect(self) -> None:
        """Add the gradients of the compute copies to the masters', in fp32."""
        if self.masters is self.parameters:
            return
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def step(self, lr: float, clip: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping. A non-finite norm changes nothing."""
        import torch

        norm = torch.nn.utils.clip_grad_norm_(self.masters, clip).item()
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            if self.masters is not self.parameters:
                with torch.no_grad():
                    for master, parameter in zip(self.masters, self.parameters, strict=True):
                        parameter.copy_(master)
        self.adam.zero_grad()
        return norm

    def tensors(self) -> dict:
        """Masters and moments by name: everything that a checkpoint needs."""
        saved = {}
        for name, master in zip(self.names, self.masters, strict=True):
            saved[f"master/{name}"] = master
            for key, value in self.adam.state.get(master, {}).items():
                saved[f"{key}/{name}"] = value
        return saved

    def restore(self, saved: dict) -> None:
        import torch

        with torch.no_grad():
            for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
                master.copy_(saved[f"master/{name}"])
                parameter.copy_(master)
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in saved]
                if keys:
                    self.adam.state[master] = {
                        key: saved[f"{key}/{name}"].to(master.device if key != "step" else "cpu").clone()
                        for key in keys
                    }


# ------------------------------------------------------------------------------------------------- validation


def validate(transformer, tokenizer, held_out: list[Example], config: Config) -> dict:
    """Held-out loss a token, and how often the right verdict is likelier than the wrong one after the true critique."""
    import torch

    if not held_out:
        return {}
    total = count = 0
    with torch.no_grad():
        for group in fill(held_out, config.micro_tokens):
            nll, tokens = nll_sum(transformer, group)
            total, count = total + nll.item(), count + tokens
        result = {"held_out_loss": total / count}
        verified = [e for e in held_out if e.record["kind"] == "verify" and config.target != "critique"]
        if verified:
            other = {"safe": "unsafe", "unsafe": "safe"}
            right = 0
            for example in verified:
                flipped = {**example.record, "verdict": other[example.record["verdict"]]}
                wrong = build(tokenizer, flipped, config.target)
                right += bool(nll_sum(transformer, [example])[0] < nll_sum(transformer, [wrong])[0])
            result["verdict_accuracy"] = right / len(verified)
    return result


# ------------------------------------------------------------------------------------------------- reports


def show_row(tokenizer, example: Example, width: int = 110) -> None:
    """One record as the model sees it; the supervised part after the mark."""
    begin = example.trained.index(True)
    shown = [tokenizer.decode(example.ids[:begin]), ">>> supervised >>>", tokenizer.decode(example.ids[begin:])]
    for part in shown:
        for line in part.split("\n"):
            print("  | " + line[:width])


def mfu(tokens_per_s: float, parameters: int, device_name: str, lora: bool) -> float | None:
    """Share of the dense bf16 peak of a known GPU, at 6 (full) or 4 (LoRA) FLOPs a parameter and token; else None."""
    for name, peak in PEAK_FLOPS.items():
        if name in device_name:
            return tokens_per_s * parameters * (4 if lora else 6) / peak
    return None


# ------------------------------------------------------------------------------------------------- main


def evaluate(transformer, tokenizer, config: Config, folder: Path, name: str):
    """Run the pocket's suites; figures and items are kept in the run folder."""
    import suites
    from pocket import world as pocket

    world = pocket.World(runs.world_seed(config.model))
    items = suites.load(["pocket"], world, suites.candidates(config.model))
    figures, labelled, seconds = suites.run(transformer, tokenizer, items, world, seed=config.seed + 1000)
    runs.write_json(folder / f"{name}.json", {"figures": figures, "items": labelled, "seconds": seconds})
    print(f"{name}: {len(labelled)} prompts in {seconds:.0f} s")
    return figures, labelled


def main(config: Config, origin: dict) -> int:
    import json

    import torch
    from tqdm import tqdm

    import model

    begun = time.monotonic()
    device = runs.pick_device(config.device)
    records = runs.read_jsonl(config.data, FIELDS)
    try:
        transformer, tokenizer = model.load(config.model, device=device, dtype=getattr(torch, config.dtype))
    except model.ModelError as error:
        raise UserError(str(error)) from None
    if config.evaluate and not runs.is_pocket(config.model):
        raise UserError("--evaluate true runs the pocket's suites; this model is not a pocket (no world.json)")
    examples, account = prepare(tokenizer, records, config)
    training, held_out = split(examples, config.held_out, config.seed)
    if not training:
        raise UserError(f"{config.data}: no record is left for training after holding out {config.held_out:.0%}")
    plan = [step for epoch in range(config.epochs) for step in epoch_steps(training, epoch, config)]
    per_epoch = len(epoch_steps(training, 0, config))
    folder = runs.new_folder(config, origin, "train_sft")
    runs.seed_everything(config.seed)

    print(f"run folder {folder}; settings:")
    runs.show(config, origin)
    share = account["trained"] / account["tokens"]
    print(
        f"{account['records']} records, {account['tokens']:,} tokens, {share:.0%} supervised, longest {account['longest']}"
    )
    print(f"dropped: {account['dropped'] or 'none'}; {len(training)} to train on, {len(held_out)} held out")
    filled = sum(len(e.ids) for step in plan for e in step) / (len(plan) * config.tokens_per_step)
    print(f"{len(plan)} steps of at most {config.tokens_per_step:,} tokens, {filled:.0%} filled; one record:")
    show_row(tokenizer, training[0])

    if config.resume:
        before = None
        if config.evaluate:
            stored = json.loads((folder / "before.json").read_text())
            before = stored["figures"], stored["items"]
    else:
        before = evaluate(transformer, tokenizer, config, folder, "before") if config.evaluate else None
    if config.lora_r:
        model.add_lora(transformer, config.lora_r, config.lora_alpha, config.seed)
    trainee = Trainee(transformer, config)
    step, elapsed, skipped = 0, 0.0, 0
    if config.resume:
        saved, state = runs.load_checkpoint(folder)
        trainee.restore(saved)
        step, elapsed, skipped = state["step"], state["elapsed"], state["skipped"]

    def checkpoint() -> None:
        runs.save_checkpoint(folder, step, trainee.tensors(), {"elapsed": elapsed, "skipped": skipped})

    parameters = sum(p.numel() for p in transformer.parameters())
    every = max(1, len(plan) // 5)
    failures = 0
    bar = tqdm(total=len(plan), initial=step, desc="training", unit="step")
    with runs.Interruptible() as interrupt:
        while step < len(plan):
            progress = min(elapsed / 60 / config.minutes, 1.0) if config.minutes else step / len(plan)
            if progress >= 1.0:
                break
            started = time.monotonic()
            groups = fill(plan[step], config.micro_tokens)
            supervised = sum(sum(e.trained) for e in plan[step])
            tokens = sum(len(e.ids) for e in plan[step])
            loss = 0.0
            for group in groups:
                nll, _ = nll_sum(transformer, group, config.checkpointing)
                (nll / supervised).backward()
                trainee.collect()
                loss += nll.item() / supervised
            lr = schedule(progress + (0 if config.minutes else 1 / len(plan) * 0.5), config)
            norm = trainee.step(lr, config.clip)
            failures = 0 if math.isfinite(norm) else failures + 1
            skipped += not math.isfinite(norm)
            seconds = time.monotonic() - started
            elapsed, step = elapsed + seconds, step + 1
            line = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens}
            line |= {"tokens_per_s": tokens / seconds, "seconds": seconds}
            if step % per_epoch == 0 or step == len(plan):
                line |= validate(transformer, tokenizer, held_out, config)
                tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float | int)))
            if device == "cuda":
                line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                line["mfu"] = mfu(line["tokens_per_s"], parameters, torch.cuda.get_device_name(), bool(config.lora_r))
            runs.append_jsonl(folder / "metrics.jsonl", line)
            bar.update()
            bar.set_postfix(
                {"loss": f"{loss:.3f}", "lr": f"{lr:.1e}", "norm": f"{norm:.2f}", "tok/s": f"{tokens / seconds:.0f}"}
            )
            if failures == 5:
                raise UserError(f"{failures} steps in a row had a non-finite gradient; try a smaller --lr")
            if step % every == 0 or interrupt.requested or step == len(plan):
                checkpoint()
            if interrupt.requested:
                raise KeyboardInterrupt
    bar.close()

    target = folder / "model"
    if config.lora_r:
        model.save_adapter(transformer, target, base=config.model)
    else:
        model.save(transformer, tokenizer, target)
        runs.copy_world(config.model, target)
    result = {"steps": step, "skipped": skipped, "training_minutes": elapsed / 60}
    if before:
        after = evaluate(transformer, tokenizer, config, folder, "after")
        result |= {"before": before[0], "after": after[0]}
        report(before, after)
    result["minutes"] = (time.monotonic() - begun) / 60
    runs.write_json(folder / "result.json", result)
    print(f"\n{elapsed:.0f} s of training, {result['minutes']:.1f} minutes in all; everything lies in {folder}")
    print(f"{'the adapter (PEFT format)' if config.lora_r else 'the model (Hugging Face format)'} is {target}")
    return runs.EXIT_OK


def report(before, after) -> None:
    import suites

    print("\n" + suites.table(before[0], after[0]))
    print(suites.side_by_side(before[1], after[1], ("pocket:role", "pocket:encoded", "pocket:prefill")))


if __name__ == "__main__":
    runs.main(Config, main)

"""Train a model to verify answers: (spec, prompt, answer) -> critique in the thinking, then the verdict.

    python train_sft.py                                              the pocket world, about three minutes on a CPU
    python train_sft.py --model M --data F.jsonl --out runs/mine     your model, your records (README: own data)
    python train_sft.py --data pocket/data/star.jsonl                an answer-centric baseline, same loop
    python train_sft.py --resume runs/mine

Loss on the target's tokens only, summed over an optimizer step and divided by their number in that step, whatever the
micro-batches. Rows are packed, documents never see one another. Simplifications on purpose: one GPU, AdamW, no dropout,
data order a pure function of (seed, epoch) - so a resumed run is the uninterrupted run, bit by bit.
"""

import hashlib
import itertools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import runs
from runs import UserError, option

engine, kernels, model, trainers, safety, scores, suites, torch = map(
    runs.Lazy, ("engine", "kernels", "model", "trainers", "safety", "scores", "suites", "torch")
)


@dataclass
class Config:
    model: str = option("pocket/base", "model folder or hub id, Hugging Face format")
    data: str = option("pocket/data/verify.jsonl", "training records, JSONL of kind verify or answer")
    target: str = option("both", "of verify records", choices=("both", "critique", "judgment"))
    lora_r: int = option(16, "LoRA rank; 0 trains every weight")
    lora_alpha: float = option(32.0, "LoRA scale is alpha / r")
    lr: float = option(2e-4, "peak learning rate", pocket=1e-3)
    epochs: int = option(2, "passes over the data")
    minutes: float = option(0.0, "train by the clock instead, with the schedule driven by it; 0: by epochs")
    warmup: float = option(0.05, "share of the run with rising learning rate; then a cosine to zero")
    beta1: float = option(0.9, "AdamW, memory of the gradient")
    beta2: float = option(0.95, "AdamW, memory of its square")
    weight_decay: float = option(0.0, "AdamW, decoupled")
    clip: float = option(1.0, "largest gradient norm")
    max_len: int = option(8192, "longer records are dropped and counted", pocket=256)
    tokens_per_step: int = option(65536, "tokens an optimizer step", pocket=3072)
    micro_tokens: int = option(16384, "tokens a forward pass: speed and memory, not results", pocket=1536)
    held_out: float = option(0.05, "share of the prompts kept for validation")
    evaluate: bool = option(False, "run the pocket suites before and after", pocket=True)
    checkpointing: bool = option(False, "recompute activations in backward: less memory, a third more time")
    kernels: str = option("auto", "auto is triton on a GPU", choices=("auto", "triton", "reference"))
    dtype: str = option("auto", "of the products; masters are fp32", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "of LoRA, split and data order")
    out: str = option("", "run folder; default runs/train_sft-<time>")
    resume: str = option("", "run folder to go on with; takes all settings from it")

    def problems(self) -> list[str]:
        """Every wrong setting, all at once."""
        checks = {
            f"--data {self.data}: no such file": Path(self.data).is_file(),
            f"--lora-r {self.lora_r}: must be 0 or more": self.lora_r >= 0,
            f"--lora-alpha {self.lora_alpha}: must be positive": self.lora_alpha > 0,
            f"--lr {self.lr}: must be 0 or more": self.lr >= 0,
            f"--epochs {self.epochs}: must be 1 or more": self.epochs >= 1,
            f"--minutes {self.minutes}: must be 0 or more": self.minutes >= 0,
            f"--warmup {self.warmup}: must be in [0, 1)": 0 <= self.warmup < 1,
            f"--beta1 {self.beta1}: must be in [0, 1)": 0 <= self.beta1 < 1,
            f"--beta2 {self.beta2}: must be in [0, 1)": 0 <= self.beta2 < 1,
            f"--weight-decay {self.weight_decay}: must be 0 or more": self.weight_decay >= 0,
            f"--clip {self.clip}: must be positive": self.clip > 0,
            f"--max-len {self.max_len}: must be 2 or more": self.max_len >= 2,
            f"--tokens-per-step {self.tokens_per_step}: less than --max-len": self.tokens_per_step >= self.max_len,
            f"--micro-tokens {self.micro_tokens}: less than --max-len": self.micro_tokens >= self.max_len,
            f"--held-out {self.held_out}: must be in [0, 0.5]": 0 <= self.held_out <= 0.5,
            f"--evaluate needs a pocket model, {self.model} is none": not self.evaluate or runs.is_pocket(self.model),
        }
        return [message for message, fine in checks.items() if not fine]


FIELDS = {
    "verify": {"id": str, "prompt": str, "answer": str, "spec": str, "critique": str, "verdict": str},
    "answer": {"id": str, "prompt": str, "reasoning": str, "answer": str},
}
VALIDATION_SAMPLES = 64  # completions a validation, the first held-out records
PATIENCE = 5  # steps in a row without a finite gradient before the run stops


# ------------------------------------------------------------------------------------------------- records to rows


@dataclass
class Example:
    record: dict
    ids: list[int]
    trained: list[bool]

    @property
    def prompt_ids(self) -> list[int]:
        return self.ids[: self.trained.index(True)]


def build(tokenizer, record: dict, target: str) -> Example:
    """Token ids of one record and which of them are trained. Raises ValueError for text that cannot be a target."""
    if record["kind"] == "answer":
        prompt, thinking, answer = record["prompt"], record["reasoning"], record["answer"]
    else:
        if record["verdict"] not in ("safe", "unsafe"):
            raise ValueError(f"verdict is {record['verdict']!r}, not safe or unsafe")
        prompt = safety.verification_prompt(safety.record_spec(record).text, record["prompt"], record["answer"])
        thinking, answer = safety.verify_target(record["critique"], record["verdict"], target)
    prompt_ids = safety.render(tokenizer, [{"role": "user", "content": prompt}])
    return Example(record, *safety.build_example(tokenizer, prompt_ids, thinking, answer))


def check_world(config: Config) -> None:
    """Data of one pocket world say falsehoods about another, and train on what is held out there. Raises UserError
    where the card beside the data names another world than the model's."""
    card = Path(config.data).with_name("data_card.json")
    if not (card.is_file() and runs.is_pocket(config.model)):
        return
    made, seed = json.loads(card.read_text()).get("world_seed"), runs.world_seed(config.model)
    if made is not None and made != seed:
        why = f"{config.data} is of pocket world {made}, {config.model} of world {seed}"
        raise UserError(f"{why}; make_data.py --model {config.model} makes its own")


def prepare(tokenizer, records: list[dict], config: Config, context: int) -> tuple[list[Example], dict]:
    """(examples, accounting). Raises UserError if nothing, or everything, would be trained on."""
    examples, dropped = [], Counter()
    for record in tqdm(records, desc="tokenizing", leave=False):
        try:
            example = build(tokenizer, record, config.target)
        except ValueError as error:
            raise UserError(f"{config.data}, record {record['id']}: {error}") from None
        if len(example.ids) > config.max_len:
            dropped[f"longer than --max-len {config.max_len}"] += 1
        elif len(example.ids) > context:
            dropped[f"longer than the model's context {context}"] += 1
        else:
            examples.append(example)
    tokens, trained = sum(len(e.ids) for e in examples), sum(sum(e.trained) for e in examples)
    account = {"records": len(examples), "dropped": dict(dropped), "tokens": tokens, "supervised": trained}
    if not 0 < trained < tokens:
        raise UserError(f"{config.data}: {trained} of {tokens} tokens are supervised; dropped: {dict(dropped)}")
    return examples, account | {"longest": max(len(e.ids) for e in examples)}


def split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held out), by prompt: no prompt is on both sides."""
    prompts = sorted({e.record["prompt"] for e in examples})
    random.Random(f"split-{seed}").shuffle(prompts)
    kept = set(prompts[: round(share * len(prompts))])
    return [e for e in examples if e.record["prompt"] not in kept], [e for e in examples if e.record["prompt"] in kept]


def epoch_steps(examples: list[Example], epoch: int, config: Config) -> list[list[Example]]:
    """The optimizer steps of one epoch: a shuffle that depends on (seed, epoch) alone, cut by tokens."""
    order = list(examples)
    random.Random(f"order-{config.seed}-{epoch}").shuffle(order)
    return trainers.fill(order, config.tokens_per_step)


def all_steps(examples: list[Example], config: Config) -> Iterator[tuple[list[Example], bool]]:
    """(the examples of an optimizer step, whether it ends an epoch), without end where the clock decides."""
    for epoch in itertools.count() if config.minutes else range(config.epochs):
        steps = epoch_steps(examples, epoch, config)
        yield from ((step, number == len(steps)) for number, step in enumerate(steps, 1))


def pack(group: list[Example], device="cpu"):
    """(ids_T, labels_T, cu_seqlens): labels hold the *next* token where that is trained, else -100.

    ids 5 6 7 | 8 9, trained 0 0 1 | 0 1  ->  labels -100 7 -100 | 9 -100, offsets 0 3 5
    """
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
    """Sum of -log p over the trained tokens of a packed row, a scalar tensor."""
    ids_T, labels_T, cu_seqlens = pack(group, transformer.head_weight.device)
    hidden_TH = transformer(ids_T, cu_seqlens, checkpoint=checkpointing)
    logp_T, _ = kernels.linear_logp(hidden_TH, transformer.head_weight, labels_T)
    return -logp_T.sum()


def schedule(progress: float, config: Config) -> float:
    """Learning rate at a progress in [0, 1]: linear warm-up from zero, then a cosine to zero."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / (1 - config.warmup)))


def optimizer_step(transformer, trainee, examples: list[Example], lr: float, config: Config) -> dict:
    """One update. The loss is a mean over the step's supervised tokens, however they fall into micro-batches."""
    supervised = sum(sum(e.trained) for e in examples)
    loss = 0.0
    for group in trainers.fill(examples, config.micro_tokens):
        mean_part = nll_sum(transformer, group, config.checkpointing) / supervised
        mean_part.backward()
        loss += mean_part.detach()
    norm = trainee.step(lr, config.clip)
    tokens = sum(len(e.ids) for e in examples)
    return {"loss": float(loss), "lr": lr, "grad_norm": norm, "tokens": tokens, "supervised": supervised}


# ------------------------------------------------------------------------------------------------- validation


def validate(transformer, tokenizer, held_out: list[Example], config: Config) -> tuple[dict, list[dict]]:
    """(figures, samples): held-out loss a token; the share of right verdicts in the model's own greedy verifications.

    The model writes the critique too. Verdicts after the given critique would be right nearly always: it gives them
    away. A missing verdict counts as wrong.
    """
    if not held_out:
        return {}, []
    with torch.no_grad():
        total = sum(nll_sum(transformer, group).item() for group in trainers.fill(held_out, config.micro_tokens))
    figures = {"held_out_loss": total / sum(sum(e.trained) for e in held_out)}
    samples = sample(transformer, tokenizer, held_out[:VALIDATION_SAMPLES])
    verdicts = [s for s in samples if s["kind"] == "verify"] if config.target != "critique" else []
    if verdicts:
        figures["verdict_accuracy"] = sum(s["verdict"] == s["predicted"] for s in verdicts) / len(verdicts)
    return figures, samples


def sample(transformer, tokenizer, examples: list[Example]) -> list[dict]:
    """Greedy completions of the examples' prompts, at most half again as long as the longest target."""
    context = transformer.config.max_position_embeddings
    longest = max(sum(e.trained) for e in examples) * 3 // 2
    limits = [min(longest, context - len(e.prompt_ids)) for e in examples]
    room = max(len(e.prompt_ids) + limit for e, limit in zip(examples, limits, strict=True))
    sampler = engine.Engine(transformer, model.end_ids(transformer, tokenizer), max_context=room)
    drawn = sampler.generate([e.prompt_ids for e in examples], max_tokens=limits, temperature=0.0)
    done = []
    for example, (drawing,) in zip(examples, drawn, strict=True):
        record, text = example.record, tokenizer.decode(drawing.ids)
        line = {"id": record["id"], "kind": record["kind"], "prompt": record["prompt"], "completion": text}
        if record["kind"] == "verify":
            line |= {"verdict": record["verdict"], "predicted": safety.parse_verdict(text)}
        done.append(line | {"finish_reason": drawing.finish_reason})
    return done


# ------------------------------------------------------------------------------------------------- reports


def show_row(tokenizer, example: Example, width: int = 110, lines: int = 12) -> None:
    """One record as the model sees it, the supervised part marked; long texts are cut in the middle."""
    begin = len(example.prompt_ids)
    for mark, ids in (("  ", example.ids[:begin]), (">>", example.ids[begin:])):
        shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in tokenizer.decode(ids)).split("\n")
        if len(shown) > lines:
            shown = [*shown[: lines // 2], f"... {len(shown) - lines} lines ...", *shown[-lines // 2 :]]
        for line in shown:
            print(f"  {mark} | {line[:width]}")


def report_plan(account: dict, training: list[Example], held_out: list[Example], config: Config) -> None:
    """Everything that was derived, before step 0."""
    share = account["supervised"] / account["tokens"]
    print(f"{account['records']} records, {account['tokens']:,} tokens, {share:.1%} supervised (marked >> below)")
    print(f"longest {account['longest']} tokens; dropped: {account['dropped'] or 'none'}")
    print(f"{len(training)} records to train on, {len(held_out)} held out by prompt")
    steps = epoch_steps(training, 0, config)
    rows = [row for step in steps for row in trainers.fill(step, config.micro_tokens)]
    tokens = sum(len(e.ids) for e in training)
    print(
        f"an epoch: {len(steps)} steps of {tokens // len(steps):,} tokens, {len(rows)} packed rows,"
        f" {tokens / (len(rows) * config.micro_tokens):.0%} filled, no padding"
    )
    ends = f"{config.minutes} minutes" if config.minutes else f"{total_steps(training, config)} steps"
    print(f"{ends}: lr 0 to {config.lr} in the first {config.warmup:.0%}, then a cosine to 0")


def total_steps(training: list[Example], config: Config) -> int:
    return sum(len(epoch_steps(training, epoch, config)) for epoch in range(config.epochs))


# ------------------------------------------------------------------------------------------------- the loop


def train(transformer, tokenizer, trainee, training, held_out, config: Config, folder: Path, state: dict) -> None:
    """From `state` to the end of the run, changing it on the way.

    state: step, seconds (of training steps alone), skipped (non-finite), in_a_row (of those), figures (validation).
    """
    total, flops = total_steps(training, config), trainers.flops_a_token(transformer, bool(config.lora_r))

    def progress() -> float:
        return state["seconds"] / 60 / config.minutes if config.minutes else state["step"] / total

    steps = itertools.islice(all_steps(training, config), state["step"], None)
    bar = tqdm(total=None if config.minutes else total, initial=state["step"], desc="training", unit="step")
    with runs.Interruptible() as interrupt, bar:
        while (begun := progress()) < 1:
            examples, ends_epoch = next(steps)
            started = time.perf_counter()
            figures = optimizer_step(transformer, trainee, examples, schedule(begun, config), config)
            seconds = time.perf_counter() - started
            finite = math.isfinite(figures["grad_norm"])
            state["step"] += 1
            state["seconds"] += seconds
            state["skipped"] += not finite
            state["in_a_row"] = 0 if finite else state["in_a_row"] + 1
            speed = figures["tokens"] / seconds
            line = {"step": state["step"], **figures, "tokens_per_s": speed, "seconds": seconds}
            line |= {"peak_gib": runs.peak_memory(), **trainers.mfu(speed * flops)}
            if ends_epoch or progress() >= 1:
                state["figures"], samples = validate(transformer, tokenizer, held_out, config)
                line |= state["figures"]
                for entry in samples:
                    runs.append_jsonl(folder / "samples.jsonl", {"step": state["step"], **entry})
                tqdm.write(f"step {state['step']}: " + ", ".join(f"{k} {v:.3f}" for k, v in state["figures"].items()))
            runs.append_jsonl(folder / "metrics.jsonl", line)
            if config.minutes:
                bar.total = max(state["step"], round(state["step"] / progress()))
            bar.set_postfix_str(log_line(line, state["skipped"]))
            bar.update()
            if state["in_a_row"] == PATIENCE:
                raise UserError(f"{PATIENCE} steps in a row without a finite gradient; try a smaller --lr")
            if int(5 * progress()) > int(5 * begun) or interrupt.requested:
                runs.save_checkpoint(folder, trainee.tensors(), state)
            if interrupt.requested:
                raise KeyboardInterrupt


def log_line(line: dict, skipped: int) -> str:
    """What a person watches."""
    shown = (
        f"loss {line['loss']:.3f} lr {line['lr']:.1e} norm {line['grad_norm']:.2f} {line['tokens_per_s']:,.0f} tok/s"
    )
    shown += f" {line['peak_gib']:.1f} GiB" + (f" MFU {line['mfu']:.0%}" if "mfu" in line else "")
    return shown + (f" skipped {skipped}" if skipped else "")


def main(config: Config, origin: dict) -> int:
    begun = time.monotonic()
    records = runs.read_jsonl(config.data, FIELDS)
    check_world(config)
    device = runs.pick_device(config.device)
    dtype = runs.pick_dtype(config.dtype, device)
    runs.pick_kernels(config.kernels, device)
    loaded = dtype if config.lora_r else torch.float32  # weights to be trained are their own masters
    transformer, tokenizer = runs.load_model(config.model, device, loaded)
    examples, account = prepare(tokenizer, records, config, transformer.config.max_position_embeddings)
    training, held_out = split(examples, config.held_out, config.seed)
    folder = runs.new_folder(config, origin, "train_sft")

    print(f"run folder {folder}; settings:")
    runs.show(config, origin)
    report_plan(account, training, held_out, config)
    show_row(tokenizer, training[0])

    runs.seed_everything(config.seed)
    if config.lora_r:
        model.add_lora(transformer, config.lora_r, config.lora_alpha, config.seed)
    trainee = trainers.Trainee(transformer, dtype, (config.beta1, config.beta2), config.weight_decay)
    seed, before = config.seed, None
    if config.evaluate:
        before = trainers.evaluate(transformer, tokenizer, config.model, seed, folder / "before.json")
    state = {"step": 0, "seconds": 0.0, "skipped": 0, "in_a_row": 0, "figures": {}}
    state["data_sha256"] = hashlib.sha256(Path(config.data).read_bytes()).hexdigest()
    state = trainers.resume(folder, trainee, state)
    train(transformer, tokenizer, trainee, training, held_out, config, folder, state)

    result = {**state, **account, "training_minutes": state["seconds"] / 60}
    trainers.save(transformer, tokenizer, config.model, folder / "model")
    if before:
        after = trainers.evaluate(transformer, tokenizer, config.model, seed, folder / "after.json")
        result |= {"before": before[0], "after": after[0]}
        print("\n" + scores.table(before[0], after[0]))
        print(scores.side_by_side(before[1], after[1], ("pocket:role", "pocket:encoded", "pocket:prefill")))
    result["minutes"] = (time.monotonic() - begun) / 60
    runs.write_json(folder / "result.json", result)
    print(f"\n{state['seconds']:.0f} s of training, {result['minutes']:.1f} minutes in all; all files: {folder}")
    return runs.EXIT_OK


if __name__ == "__main__":
    runs.main(Config, main)

"""Train a model to verify answers: (spec, prompt, answer) -> critique in the thinking, then the verdict.

    python train_sft.py                                              the pocket world, 1.4 minutes on a CPU
    python train_sft.py --model M --data F.jsonl --out runs/mine     your model, your records (README: own data)
    python train_sft.py --data pocket/data/star.jsonl                an answer-centric baseline, same loop
    python train_sft.py --resume runs/mine

Loss on the target's tokens only, summed over an optimizer step and divided by their number in that step, whatever the
micro-batches. Rows are packed, documents never see one another. Simplifications on purpose: one GPU, AdamW, no dropout,
data order a pure function of (seed, epoch) - so a resumed run is the uninterrupted run, bit by bit.
"""

import itertools
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import engine
import kernels
import model
import runs
import safety
import trainers
from runs import UserError, option

# Settings that one edits here
BETAS = (0.9, 0.95)  # of AdamW
WEIGHT_DECAY = 0.0  # decoupled
CLIP = 1.0  # largest gradient norm
VALIDATION_SAMPLES = 64  # completions a validation, the first held-out records


@dataclass
class Config:
    model: str = option(f"{runs.POCKET}/base", "model folder or hub id, Hugging Face format")
    data: str = option(f"{runs.POCKET}/data/verify.jsonl", "training records, JSONL of kind verify or answer")
    target: str = option("both", "trained part of a verify record", choices=("both", "critique", "judgment"))
    lora_r: int = option(16, "LoRA rank; 0 trains every weight", low=0)
    lora_alpha: float = option(32.0, "LoRA scale is alpha / r", above=0)
    lr: float = option(2e-4, "peak learning rate", pocket=1e-3, low=0)
    epochs: int = option(2, "passes over the data", low=1)
    warmup: float = option(0.05, "share of the run with rising learning rate; then a cosine to 0", low=0, below=1)
    max_len: int = option(8192, "tokens of a record; longer ones are dropped and counted", pocket=512, low=2)
    tokens_per_step: int = option(65536, "tokens an optimizer step", pocket=3072)
    micro_tokens: int = option(16384, "most tokens a forward pass: speed and memory, not results", pocket=1536)
    held_out: float = option(0.05, "share of the prompts kept for validation", low=0, high=0.5)
    evaluate: bool = option(False, "run the pocket suites before and after", pocket=True)
    dtype: str = option("auto", "compute dtype; master weights stay fp32", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of LoRA, split and data order")
    out: str = option("", "run folder; default runs/train_sft-<time>")
    resume: str = option("", "run folder to go on with; takes all settings from it")

    def problems(self) -> list[str]:
        """What is wrong across settings."""
        checks = {
            f"--data {self.data}: no such file (of a folder of make_data.py: verify.jsonl)": Path(self.data).is_file(),
            f"--tokens-per-step {self.tokens_per_step}: less than --max-len": self.tokens_per_step >= self.max_len,
            f"--micro-tokens {self.micro_tokens}: less than --max-len": self.micro_tokens >= self.max_len,
            f"--evaluate needs a pocket model, {self.model} is none": not self.evaluate or runs.is_pocket(self.model),
        }
        return [message for message, fine in checks.items() if not fine]


FIELDS = {
    "verify": {"id": str, "prompt": str, "answer": str, "spec": str, "critique": str, "verdict": str},
    "answer": {"id": str, "prompt": str, "reasoning": str, "answer": str},
}


# ------------------------------------------------------------------------------------------------- records to rows
@dataclass
class Example:
    record: dict
    ids: list[int]
    trained: list[bool]


def build(tokenizer, record: dict, target: str) -> Example:
    return Example(record, *safety.record_example(tokenizer, record, target))


def check_world(config: Config) -> None:
    """Raises UserError where the card beside the data names another pocket world than the model's: they say falsehoods
    about it, and train on what is held out there."""
    card = Path(config.data).with_name("data_card.json")
    made = runs.read_json(card).get("world_seed") if card.is_file() and runs.is_pocket(config.model) else None
    if made is not None and made != (seed := runs.world_seed(config.model)):
        why = f"{config.data} is of pocket world {made}, {config.model} of world {seed}"
        raise UserError(f"{why}; make_data.py --model {config.model} makes its own")


def prepare(tokenizer, records: list[dict], config: Config, context: int) -> tuple[list[Example], dict]:
    """(examples, accounting). Raises UserError for a record that cannot be trained on, and where all of a kind are too
    long."""
    built = []
    for number, record in enumerate(tqdm(records, desc="tokenizing", leave=False), 1):
        try:
            built.append(build(tokenizer, record, config.target))
        except ValueError as error:
            raise UserError(f"{config.data}, record {number}, id {record['id']}: {error}") from None
    limit, whole = min(config.max_len, context), Counter(e.record["kind"] for e in built)
    examples = [e for e in built if len(e.ids) <= limit]
    for kind, left_out in (whole - Counter(e.record["kind"] for e in examples)).items():
        longest = max(len(e.ids) for e in built if e.record["kind"] == kind)
        why = f"over {limit} tokens, the least of --max-len and the model's context ({context}); the longest {longest}"
        if left_out == whole[kind]:
            raise UserError(f"{config.data}: all {left_out} records of kind {kind} have {why}")
        print(f"left out: {left_out} of {whole[kind]} records of kind {kind} have {why}", file=sys.stderr)
    lengths, trained = [len(e.ids) for e in examples], sum(sum(e.trained) for e in examples)
    account = {"records": len(examples), "too_long": len(built) - len(examples), "limit": limit}
    return examples, account | {"tokens": sum(lengths), "supervised": trained, "longest": max(lengths)}


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


def pack(group: list[Example], device="cpu"):
    """(ids_T, rows_N, targets_N, cu_seqlens): the rows that come *before* a trained token, and that token.

    ids 5 6 7 | 8 9, trained 0 0 1 | 0 1  ->  rows 1 3, targets 7 9, offsets 0 3 5
    """
    ids, rows, offsets = [], [], [0]
    for example in group:
        rows += [len(ids) + i - 1 for i, trained in enumerate(example.trained) if trained]
        ids += example.ids
        offsets.append(len(ids))
    targets, offsets = [ids[row + 1] for row in rows], torch.tensor(offsets, dtype=torch.int32)
    return tuple(t.to(device) for t in (*map(torch.tensor, (ids, rows, targets)), offsets))


# ------------------------------------------------------------------------------------------------- objective, schedule
def nll_sum(transformer, group: list[Example], checkpointing: bool = False):
    """Sum of -log p over the trained tokens of a packed row, a scalar tensor."""
    ids_T, rows_N, targets_N, cu_seqlens = pack(group, transformer.head_weight.device)
    hidden_NH = transformer(ids_T, cu_seqlens, rows_N=rows_N, checkpoint=checkpointing)
    logp_N, _ = kernels.linear_logp(hidden_NH, transformer.head_weight, targets_N)
    return -logp_N.sum()


def schedule(step: int, steps: int, config: Config) -> float:
    """Learning rate of a step, counted from 0, out of `steps`: linear warm-up, then a cosine towards zero; never zero.

    10 steps, warm-up 0.2, lr 1  ->  1/3, 2/3, 1, .96, .85, .69, .5, .31, .15, .04
    """
    warm = round(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def optimizer_step(transformer, trainee, examples: list[Example], lr: float, plan: trainers.Plan) -> dict:
    """One update. The loss is a mean over the step's supervised tokens, however they fall into micro-batches."""
    supervised = sum(sum(e.trained) for e in examples)
    loss = 0.0
    for group in trainers.fill(examples, plan.micro_tokens):
        mean_part = nll_sum(transformer, group, plan.checkpointing) / supervised
        mean_part.backward()
        loss += mean_part.detach()
    norm = trainee.step(lr, CLIP)
    tokens = sum(len(e.ids) for e in examples)
    return {"loss": float(loss), "lr": lr, "grad_norm": norm, "tokens": tokens, "supervised": supervised}


# ------------------------------------------------------------------------------------------------- the loop
def validate(transformer, tokenizer, held_out: list[Example], config: Config, plan: trainers.Plan):
    """(figures, samples): held-out loss a token; the share of right verdicts in the model's own greedy verifications.

    The model writes the critique too. Verdicts after the given critique would be right nearly always: it gives them
    away. A missing verdict counts as wrong. Completions are at most half again as long as the longest target.
    """
    with torch.no_grad():
        total = sum(nll_sum(transformer, group).item() for group in trainers.fill(held_out, plan.micro_tokens))
    figures, samples = {"held_out_loss": total / sum(sum(e.trained) for e in held_out)}, []
    shown = [example.record for example in held_out[:VALIDATION_SAMPLES]]
    items = [{"id": record["id"], "prompt": safety.record_texts(record, "both")[0]} for record in shown]
    longest = max(sum(e.trained) for e in held_out[:VALIDATION_SAMPLES]) * 3 // 2
    torch.cuda.empty_cache()  # so that the engine sees what is really free
    drawn = dict(engine.complete(transformer, tokenizer, items, seed=0, max_tokens=longest, temperature=0.0))
    for number, record in enumerate(shown):
        line = {name: record.get(name) for name in ("id", "kind", "prompt", "verdict")}
        line |= {name: drawn[number][name] for name in ("completion", "finish_reason")}
        samples.append({**line, "predicted": safety.parse_verdict(line["completion"])})
    right = [s["verdict"] == s["predicted"] for s in samples if s["kind"] == "verify"]
    if right and config.target != "critique":
        figures["verdict_accuracy"] = sum(right) / len(right)
    return figures, samples


def show_row(tokenizer, example: Example, width: int = 500) -> None:
    """One record as the model sees it, the supervised part marked; long texts are cut in the middle."""
    begin = example.trained.index(True)
    for mark, ids in (("   | ", example.ids[:begin]), (" >> | ", example.ids[begin:])):
        text = safety.decode(tokenizer, ids)
        text = text if len(text) <= 2 * width else f"{text[:width]}\n...\n{text[-width:]}"
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        print(mark + text.replace("\n", "\n" + mark))


def report_plan(account: dict, epochs: list, held_out: list, plan: trainers.Plan) -> None:
    """Everything that was derived, before step 0."""
    print(", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in account.items()), "(supervised: >> below)")
    steps = sum(epochs, [])
    rows = sum(len(trainers.fill(step, plan.micro_tokens)) for step in steps)
    records = sum(map(len, epochs[0]))
    print(f"{len(steps)} steps in all, {records} records in each epoch, {rows} packed rows without padding")
    print(f"{len(held_out)} records held out by prompt{'' if held_out else ' (no validation)'}; memory: {plan}")
    if len(steps) < 10:
        print(f"steps: {len(steps)}, few to learn from; more records or --epochs make more, or less --tokens-per-step")


def train(transformer, tokenizer, trainee, epochs: list, held_out, config: Config, plan, folder: Path, state: dict):
    """From `state` to the end of the run, changing it on the way; returns the figures of the last validation.

    epochs: the optimizer steps of each, lists of examples. A validation follows the checkpoint of its step: where it
    was cut off, a resumed run begins with it.
    """
    steps, epoch_ends, figures = sum(epochs, []), set(itertools.accumulate(map(len, epochs))), {}
    due = trainers.checkpoint_steps(len(steps)) | epoch_ends
    bar = tqdm(total=len(steps), initial=state["step"], desc="training", unit="step")
    with runs.Interruptible() as interrupt, bar:
        while True:
            if held_out and state["step"] in epoch_ends:
                figures, samples = validate(transformer, tokenizer, held_out, config, plan)
                trainers.log(folder, state["step"], figures, samples)
                tqdm.write(f"step {state['step']}: {figures}")
            if state["step"] == len(steps):
                return figures
            started = time.perf_counter()
            lr = schedule(state["step"], len(steps), config)
            line = optimizer_step(transformer, trainee, steps[state["step"]], lr, plan)
            line["seconds"] = time.perf_counter() - started
            line["tokens_per_s"] = line["tokens"] / line["seconds"]
            trainers.end_step(folder, trainee, state, line, [], due, interrupt)
            shown = ("loss", "lr", "grad_norm", "tokens_per_s")
            bar.set_postfix({name: line[name] for name in shown}, skipped=state["skipped"])
            bar.update()


def main(config: Config, origin: dict) -> int:
    begun = time.monotonic()
    records = runs.read_records(config.data, FIELDS)
    check_world(config)
    device = model.pick_device(config.device)
    dtype = model.pick_dtype(config.dtype, device)
    model.pick_kernels(device)
    free, rows = trainers.free_memory(device), VALIDATION_SAMPLES
    trainers.plan_memory(config, dtype, free, longest=1, rows=rows)  # refuses what can never be trained before loading
    transformer, tokenizer = trainers.load(config, device, dtype)
    examples, account = prepare(tokenizer, records, config, transformer.config.max_position_embeddings)
    plan = trainers.plan_memory(config, dtype, free, longest=account["longest"], rows=rows)
    training, held_out = split(examples, config.held_out, config.seed)
    epochs = [epoch_steps(training, epoch, config) for epoch in range(config.epochs)]
    folder = runs.new_folder(config, origin, "train_sft", model.device_name(device))
    report_plan(account, epochs, held_out, plan)
    show_row(tokenizer, training[0])

    made_of = Path(config.data).read_bytes() + model.fingerprint(transformer, tokenizer).encode()
    trainee = trainers.Trainee(transformer, dtype, BETAS, WEIGHT_DECAY)
    if config.evaluate:
        trainers.evaluate(transformer, tokenizer, config.model, config.seed, folder / "before.json")
    state = trainers.resume(folder, trainee, trainers.NEW_RUN, made_of)
    figures = train(transformer, tokenizer, trainee, epochs, held_out, config, plan, folder, state)
    trainers.finish(transformer, tokenizer, config, folder, {**state, **account, "figures": figures}, begun)
    return runs.EXIT_OK


if __name__ == "__main__":
    runs.main(Config, main)

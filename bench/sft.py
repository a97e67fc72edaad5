"""SFT side by side: train_sft's loop and TRL's SFTTrainer on the same records, batches, optimizer and schedule.

    python -m bench.sft                                         the pocket, LoRA, on what this machine has
    python -m bench.sft --model M --data F.jsonl --lora-r 0     your model and records, every weight

Each measurement is a process of its own, ours and theirs in turn, so that peak memory is its own and a slow spell of
the machine meets both; the ratio by processor time is the one to read where other programs run too. Tokens are real
ones: padding counts for nothing. Loading, tokenizing and the first steps are not timed. TRL pads here: its packed
layouts need FlashAttention.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

import torch

import model
import runs
import train_sft
import trainers
from runs import UserError, option


@dataclass
class Config:
    model: str = option("pocket/base", "model folder or hub id")
    data: str = option("pocket/data/verify.jsonl", "training records")
    lora_r: int = option(16, "LoRA rank; 0 trains every weight")
    lr: float = option(1e-3, "peak learning rate")
    batch: int = option(24, "records an optimizer step")
    micro: int = option(24, "records a forward pass of TRL; ours gets as many tokens", low=1)
    steps: int = option(12, "optimizer steps a measurement")
    warm: int = option(2, "first steps of a measurement, which are not timed", low=0)
    rounds: int = option(3, "measurements of each side", low=1)
    max_len: int = option(8192, "longer records are left out")
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of the order of the records")
    only: str = option("", "measure one side in this process and print its JSON", choices=("", "ours", "trl"))

    def problems(self) -> list[str]:
        checks = {
            "--batch must be a multiple of --micro": self.batch % self.micro == 0,
            "--steps must be more than --warm": self.steps > self.warm,
        }
        return [message for message, fine in checks.items() if not fine]


def sft_config(config: Config) -> train_sft.Config:
    """The same settings in train_sft's words."""
    same = {name: getattr(config, name) for name in ("model", "data", "lora_r", "lr", "max_len", "seed", "device")}
    return train_sft.Config(**same, tokens_per_step=2**62, warmup=0.0, evaluate=False)


def batches(config: Config, tokenizer) -> list[list[train_sft.Example]]:
    """The records of each optimizer step, the same for both sides."""
    sft = sft_config(config)
    records = runs.read_records(config.data, train_sft.FIELDS)
    examples, _ = train_sft.prepare(tokenizer, records, sft, context=config.max_len)
    order = train_sft.epoch_steps(examples, 0, sft)[0]
    if len(order) < config.batch:
        raise UserError(f"{config.data} has {len(order)} records, fewer than --batch {config.batch}")
    return in_parts([order[i % len(order)] for i in range(config.steps * config.batch)], config.batch)


def in_parts(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


# ------------------------------------------------------------------------------------------------- the two sides
class Clock:
    """Seconds on the wall and of the processor since it was made."""

    def __init__(self, device: str):
        self.device, self.begun, self.used = device, time.perf_counter(), time.process_time()

    def stop(self) -> dict:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - self.begun, "cpu_seconds": time.process_time() - self.used}


def ours(config: Config, steps: list[list[train_sft.Example]], transformer, device: str) -> list[dict]:
    """{loss, grad_norm, lr, seconds} of each step of train_sft."""
    sft = sft_config(config)
    dtype = model.pick_dtype("auto", device)
    if config.lora_r:
        model.add_lora(transformer, config.lora_r, sft.lora_alpha, config.seed)
    trainee = trainers.Trainee(transformer, dtype, train_sft.BETAS, train_sft.WEIGHT_DECAY)
    lines = []
    for number, examples in enumerate(steps):
        clock = Clock(device)
        plan = trainers.Plan(max(sum(len(e.ids) for e in group) for group in in_parts(examples, config.micro)))
        lr = train_sft.schedule(number, len(steps), sft)
        line = train_sft.optimizer_step(transformer, trainee, examples, lr, plan)
        lines.append({**line, **clock.stop()})
    return lines


def trl(config: Config, steps: list[list[train_sft.Example]], folder: str, device: str, lora=None) -> list[dict]:
    """The same of TRL's SFTTrainer. `lora`: a peft configuration, where one is trained."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Log(TrainerCallback):
        lines = []

        def on_step_begin(self, args, state, control, **more):
            self.clock = Clock(device)

        def on_step_end(self, args, state, control, **more):
            self.lines.append(self.clock.stop())

        def on_log(self, args, state, control, logs=None, **more):
            if "loss" in logs:
                self.lines[-1] |= {"loss": logs["loss"], "grad_norm": logs["grad_norm"], "lr": logs["learning_rate"]}

    labels = [[i if t else -100 for i, t in zip(e.ids, e.trained, strict=True)] for step in steps for e in step]
    rows = Dataset.from_dict({"input_ids": [e.ids for step in steps for e in step], "labels": labels})
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=None, per_device_train_batch_size=config.micro,
        gradient_accumulation_steps=config.batch // config.micro, max_steps=len(steps), learning_rate=config.lr,
        lr_scheduler_type="cosine", adam_beta1=train_sft.BETAS[0], adam_beta2=train_sft.BETAS[1],
        weight_decay=train_sft.WEIGHT_DECAY, max_grad_norm=train_sft.CLIP, logging_steps=1,
        train_sampling_strategy="sequential", bf16=device == "cuda", use_cpu=device == "cpu", report_to="none",
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, seed=config.seed,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    trainer = SFTTrainer(
        network, settings, train_dataset=rows, processing_class=tokenizer, peft_config=lora, callbacks=[Log()]
    )
    trainer.train()
    return Log.lines


# ------------------------------------------------------------------------------------------------- measuring
def measure(config: Config) -> dict:
    """Real tokens a second and peak memory of one side, in this process."""
    device = model.pick_device(config.device)
    dtype = model.pick_dtype("auto", device) if config.lora_r else torch.float32
    transformer, tokenizer = model.load(config.model, device, dtype)
    steps = batches(config, tokenizer)
    if config.only == "ours":
        lines = ours(config, steps, transformer, device)
    else:
        from peft import LoraConfig

        del transformer
        lora = LoraConfig(
            r=config.lora_r, lora_alpha=32, target_modules=list(model.LORA_TARGETS), task_type="CAUSAL_LM"
        )
        lines = trl(config, steps, str(model.resolve(config.model)), device, lora if config.lora_r else None)
    tokens = sum(len(e.ids) for step in steps[config.warm :] for e in step)
    seconds, used = (sum(line[key] for line in lines[config.warm :]) for key in ("seconds", "cpu_seconds"))
    speeds = {"tokens_per_s": tokens / seconds, "tokens_per_cpu_s": tokens / used}
    return {**speeds, "peak_gib": trainers.peak_memory(), "loss": lines[-1]["loss"]}


def in_its_own_process(config: Config, side: str) -> dict:
    flags = [w for name, v in {**asdict(config), "only": side}.items() for w in (runs.flag(name), str(v))]
    done = subprocess.run([sys.executable, "-m", "bench.sft", *flags], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(config: Config, origin: dict) -> int:
    if config.only:
        print(json.dumps(measure(config)))
        return runs.EXIT_OK
    kind = f"LoRA r={config.lora_r}" if config.lora_r else "all weights"
    print(f"{config.model}, {kind}, {config.batch} records a step, {config.steps - config.warm} steps timed")
    measured = {"ours": [], "trl": []}
    for number in range(1, config.rounds + 1):
        for side, rows in measured.items():
            rows.append(in_its_own_process(config, side))
            print(f"round {number} {side:<4} " + "  ".join(f"{k} {v:,.4g}" for k, v in rows[-1].items()), flush=True)
    for key in ("tokens_per_s", "tokens_per_cpu_s", "peak_gib"):
        ratios = [one[key] / other[key] for one, other in zip(measured["ours"], measured["trl"], strict=True)]
        print(f"ours / TRL, {key}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    return runs.EXIT_OK


if __name__ == "__main__":
    runs.main(Config, main)

"""One GRPO step side by side: train_rl's parts and TRL's GRPOTrainer on the same random model, prompts and lengths.

    python -m bench.grpo              the pocket's shape on a CPU, that of R1-Distill-Qwen-1.5B on a GPU
    python -m bench.grpo --tiny       the same code in seconds (the tests run it)
    python -m bench.grpo --prompts 64 --sides ours --out grpo.json      a whole step of ours

Each measurement is a process of its own, ours and theirs in turn, so that peak memory is its own and a slow spell of
the machine meets both; its figures go to --out as they come, and a side that fails leaves the other's. Prompt and
answer lengths are those of bench/lengths.json, the same for both: an answer ends where the file says, whatever was
drawn, and the end token is never drawn. Rewards are a hash of the answer's text. Every weight is trained; fp32 on a
CPU, bf16 products on a GPU (ours a bf16 copy, TRL's autocast). TRL samples with transformers' generate, without vLLM.
On a GPU it recomputes activations and takes few answers a forward pass, for more of its padded rows of logits do not
fit beside the training state; ours keeps its activations. Loading and the first steps are not timed.

    prefill      until every prompt is in the cache (TRL: and the first token of each row is drawn)
    decode       the rest of the sampling, decoding to text included
    reward       rewards and advantages (TRL: the reward function alone)
    update       forward and backward
    optimizer    the step of the optimizer (ours: and clipping)
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import engine
import model
import runs
import train_rl
import trainers
from runs import UserError, option

LENGTHS = Path(__file__).parent / "lengths.json"
PARTS = ("prefill", "decode", "reward", "update", "optimizer")
POCKET = {"vocab_size": 960, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "tie": True}
POCKET |= {"num_attention_heads": 2, "num_key_value_heads": 1}
R1_1_5B = {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "tie": False}
R1_1_5B |= {"num_attention_heads": 12, "num_key_value_heads": 2}
TOY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "tie": True}
TOY |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@dataclass
class Config:
    prompts: int = option(0, "prompts a step; 0: 64 on a CPU, 16 on a GPU", low=0, high=64)
    group: int = option(8, "answers to a prompt", low=2)
    micro: int = option(0, "answers a forward pass of TRL; 0: 32 on a CPU, 4 on a GPU", low=0)
    micro_tokens: int = option(8192, "most tokens a forward pass of ours on a GPU; on a CPU as many as TRL's", low=1)
    cache_gib: float = option(12.0, "our sampler's cache on a GPU, in GiB", above=0)
    steps: int = option(4, "steps a measurement")
    warm: int = option(1, "first steps of a measurement, which are not timed", low=0)
    rounds: int = option(3, "measurements of each side", low=1)
    tiny: bool = option(False, "a toy model, two steps of 4 x 4 short answers, one round")
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of weights, prompts and samples")
    sides: str = option("both", "which sides to measure", choices=("both", "ours", "trl"))
    out: str = option("", "JSON file that gets every figure as it comes")
    folder: str = option("", "model folder to write and to measure; default a temporary one")
    only: str = option("", "measure one side in this process and print its JSON", choices=("", "ours", "trl"))

    def problems(self) -> list[str]:
        checks = {
            "--prompts times --group must be a multiple of --micro": not self.micro
            or (self.prompts or 16) * self.group % self.micro == 0,
            "--steps must be more than --warm": self.steps > self.warm,
        }
        return [message for message, fine in checks.items() if not fine]


def scale(config: Config, device: str) -> str:
    return "tiny" if config.tiny else device


def lengths(config: Config, device: str) -> list[tuple[int, int]]:
    """(tokens of the prompt, tokens of each of its answers) of a step's prompts."""
    return json.loads(LENGTHS.read_text())[scale(config, device)][: config.prompts]


def step_prompts(config: Config, device: str, vocabulary: int, step: int) -> list[list[int]]:
    """Random ids, the same for both sides; never the end token, which is the last."""
    generator = torch.Generator().manual_seed(1000 * config.seed + step)
    drawn = [torch.randint(0, vocabulary - 1, (n,), generator=generator) for n, _ in lengths(config, device)]
    return [ids.tolist() for ids in drawn]


def reward(text: str) -> float:
    return float(zlib.crc32(text.encode()) % 2)


def write_model(config: Config, device: str, folder: str) -> None:
    """A random Qwen2 of the shape, in fp32, and a tokenizer of one word an id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    shape = {"tiny": TOY, "cpu": POCKET, "cuda": R1_1_5B}[scale(config, device)]
    words = {f"w{i}": i for i in range(shape["vocab_size"] - 1)} | {"<end>": shape["vocab_size"] - 1}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<end>", "pad_token": "<end>", "chat_template": "{{ messages[0]['content'] }}"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    torch.manual_seed(config.seed)
    settings = {name: value for name, value in shape.items() if name != "tie"}
    end = words["<end>"]
    made = Qwen2Config(**settings, tie_word_embeddings=shape["tie"], eos_token_id=end, max_position_embeddings=8192)
    with torch.device(device):
        AutoModelForCausalLM.from_config(made).save_pretrained(folder)


class Clock:
    """Seconds by part since the last reading."""

    def __init__(self, device: str):
        self.device, self.seconds = device, Counter()

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, part: str, function):
        """The function, its time added to the part."""

        def run(*arguments, **more):
            begun = self.now()
            result = function(*arguments, **more)
            self.seconds[part] += self.now() - begun
            return result

        return run

    def read(self) -> dict:
        """The parts without those that ran inside of them."""
        s, self.seconds = self.seconds, Counter()
        inner = {"decode": s["prefill"], "update": s["optimizer"] + s["scoring"]}
        return {part: s[part] - inner.get(part, 0.0) for part in (*PARTS, "all")}


# ------------------------------------------------------------------------------------------------- ours
def ours(config: Config, device: str) -> list[dict]:
    """Seconds by part of each step of train_rl."""
    rl = train_rl.Config(prompts=("bench",), prompts_per_step=config.prompts, group=config.group, lora_r=0, lr=1e-6)
    transformer, tokenizer = model.load(config.folder, device, torch.float32)
    betas, dtype = (train_rl.BETA1, rl.beta2), model.pick_dtype("auto", device)
    trainee = trainers.Trainee(transformer, dtype, betas, train_rl.WEIGHT_DECAY)
    limits, clock, lines = [answer for _, answer in lengths(config, device)], Clock(device), []
    longest = max(prompt + answer for prompt, answer in lengths(config, device))
    cache = int(config.cache_gib * 2**30) if device == "cuda" else None
    sampler, plan = engine.Engine(transformer, set(), max_context=longest, cache_bytes=cache), make_plan(config, device)
    sampler._prefill, trainee.step = clock.timed("prefill", sampler._prefill), clock.timed("optimizer", trainee.step)
    draw, update = clock.timed("decode", train_rl.draw), clock.timed("update", train_rl.optimizer_step)

    def step(number: int) -> None:
        ids = step_prompts(config, device, transformer.config.vocab_size, number)
        prompts = [
            {"id": str(i), "prompt": "", "kind": "benign", "source": "bench", "ids": x} for i, x in enumerate(ids)
        ]
        fixed = replace(rl, max_tokens=limits)  # the engine takes a limit a prompt
        groups = draw(sampler, tokenizer, prompts, config.group, number, fixed)
        live = clock.timed("reward", score)(groups, rl)
        update(transformer, trainee, live, rl.lr, rl, plan)

    for number in range(config.steps):
        clock.timed("all", step)(number)
        lines.append(clock.read())
    return lines


def make_plan(config: Config, device: str) -> trainers.Plan:
    """All activations kept, and on a CPU as many tokens a forward pass as TRL's rows have."""
    if device == "cuda":
        return trainers.Plan(config.micro_tokens)
    rows = [prompt + answer for prompt, answer in lengths(config, device) for _ in range(config.group)]
    return trainers.Plan(max(sum(rows[i : i + config.micro]) for i in range(0, len(rows), config.micro)))


def score(groups: list[list], rl) -> list:
    """Advantages of a hash; returns what is trained on. Cut off at the given length, every answer counts."""
    for group in groups:
        rewards = [reward(d.item["completion"]) for d in group]
        for d, advantage in zip(group, train_rl.advantages(rewards, rl.advantage), strict=True):
            d.advantage = advantage
    return [d for group in groups for d in group if d.advantage is not None]


# ------------------------------------------------------------------------------------------------- TRL
def trl(config: Config, device: str) -> list[dict]:
    """The same of TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, StoppingCriteria, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    network = AutoModelForCausalLM.from_pretrained(config.folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.folder, padding_side="left")
    clock, lines, end = Clock(device), [], tokenizer.eos_token_id
    limits = [answer for _, answer in lengths(config, device) for _ in range(config.group)]

    class Ends(StoppingCriteria):
        """A row ends with one end token at its length; the first call says that the prompts are prefilled."""

        eos_token_id = end  # tells `generate` to pad rows that have ended

        def __init__(self, width: int, limits: list[int]):
            self.width, self.limits, self.begun = width, torch.tensor(limits, device=device), clock.now()

        def __call__(self, ids_BT, scores, **more):
            drawn = ids_BT.shape[1] - self.width
            if drawn == 1:
                clock.seconds["prefill"] += clock.now() - self.begun
            return drawn >= self.limits - 1

    generate = network.generate

    def with_lengths(**settings):
        stop = [Ends(settings["input_ids"].shape[1], limits)]
        return clock.timed("decode", generate)(**settings, stopping_criteria=stop)

    network.generate = with_lengths

    class Log(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            self.begun = clock.now()

        def on_pre_optimizer_step(self, args, state, control, **more):
            self.update_ended = clock.now()

        def on_optimizer_step(self, args, state, control, **more):
            clock.seconds["optimizer"] += clock.now() - self.update_ended
            clock.seconds["update"] += clock.now() - self.update_ended  # taken off again by `read`

        def on_step_end(self, args, state, control, **more):
            clock.seconds["all"] += clock.now() - self.begun
            lines.append(clock.read())

    texts = []
    for number in range(config.steps):
        ids = step_prompts(config, device, network.config.vocab_size, number)
        texts += [" ".join(f"w{i}" for i in prompt) for prompt in ids]
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=config.micro, num_generations=config.group,
        gradient_accumulation_steps=config.prompts * config.group // config.micro, max_steps=config.steps,
        max_completion_length=max(limits), learning_rate=1e-6, beta=0.0, temperature=1.0, shuffle_dataset=False,
        generation_kwargs={"suppress_tokens": [end]}, bf16=device == "cuda", use_cpu=device == "cpu", report_to="none",
        gradient_checkpointing=device == "cuda", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        seed=config.seed,
    )  # fmt: skip
    given = clock.timed("reward", lambda completions, **more: [reward(text) for text in completions])
    trainer = GRPOTrainer(
        network, given, args=settings, train_dataset=Dataset.from_dict({"prompt": texts}), processing_class=tokenizer,
        callbacks=[Log()],
    )  # fmt: skip
    scoring = clock.timed("scoring", trainer._generate_and_score_completions)  # runs inside of a training step
    trainer._generate_and_score_completions = scoring
    trainer.training_step = clock.timed("update", trainer.training_step)
    trainer.train()
    return lines


# ------------------------------------------------------------------------------------------------- measuring
def measure(config: Config) -> dict:
    """Answers a second, peak memory and the seconds of each part of one side, in this process: medians over steps."""
    device = model.pick_device(config.device)
    lines = {"ours": ours, "trl": trl}[config.only](config, device)[config.warm :]
    seconds = {part: statistics.median(line[part] for line in lines) for part in (*PARTS, "all")}
    answers = config.prompts * config.group
    return {"answers_per_s": answers / seconds["all"], "peak_gib": trainers.peak_memory(), **seconds}


def in_its_own_process(config: Config, side: str) -> dict:
    """The figures of a side, or {"error": the end of what it said}."""
    given = {name: str(v).lower() for name, v in {**asdict(config), "only": side}.items() if v != ""}
    flags = [word for name, value in given.items() for word in (runs.flag(name), value)]
    done = subprocess.run([sys.executable, "-m", "bench.grpo", *flags], capture_output=True, text=True)
    return {"error": done.stderr[-2000:]} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def report(measured: dict[str, list[dict]]) -> None:
    """Medians of the rounds' ratios. Raises UserError where a side failed."""
    failed = {side: row["error"] for side, rows in measured.items() for row in rows if "error" in row}
    if failed:
        raise UserError("\n".join(f"{side} failed:\n{error}" for side, error in failed.items()))
    for key in ("answers_per_s", "peak_gib") if len(measured) == 2 else ():
        ratios = [one[key] / other[key] for one, other in zip(measured["ours"], measured["trl"], strict=True)]
        print(f"ours / TRL, {key}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


def main(config: Config, origin: dict) -> int:
    if config.only:
        print(json.dumps(measure(config)))
        return runs.EXIT_OK
    if config.tiny:
        config = replace(config, prompts=4, group=4, micro=8, steps=2, warm=1, rounds=1)
    device = model.pick_device(config.device)
    prompts, micro = (16, 4) if device == "cuda" else (64, 32)
    config = replace(config, prompts=config.prompts or prompts, micro=config.micro or micro)
    sides = ("ours", "trl") if config.sides == "both" else (config.sides,)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, folder=folder)
        write_model(config, device, folder)
        tokens = config.group * sum(answer for _, answer in lengths(config, device))
        print(f"{scale(config, device)}: {config.prompts * config.group} answers, {tokens:,} drawn tokens a step")
        measured = {side: [] for side in sides}
        for number, side in itertools.product(range(1, config.rounds + 1), sides):
            row = in_its_own_process(config, side)
            measured[side].append(row)
            shown = {k: v if k == "error" else f"{v:,.3g}" for k, v in row.items()}
            print(f"round {number} {side:<4} " + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
            if config.out:
                runs.write_json(Path(config.out), {"settings": asdict(config), **measured})
    report(measured)
    return runs.EXIT_OK


if __name__ == "__main__":
    runs.main(Config, main)

"""What both trainers share: fp32 masters, AdamW, clipping, checkpoints; the pocket's suites; memory and speed."""

import functools
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

import model
import runs
from runs import UserError

scores, suites = map(runs.Lazy, ("scores", "suites"))
HEADROOM = 0.95  # of the free GPU memory that a plan may fill
LEAST_ROWS = 8  # longest answers that must fit into the sampler's cache


class Trainee:
    """Trainable parameters, their fp32 masters and AdamW.

    LoRA pairs and fp32 weights are their own masters. Full training in bf16 keeps the fp32 weights that the model was
    loaded with as masters; they collect the gradients of their bf16 copies in fp32 and refresh the copies after each
    step, for pure bf16 would lose most of a small update. 18 bytes a parameter: a copy's gradient goes as it comes.
    """

    def __init__(self, transformer, dtype, betas: tuple[float, float], weight_decay: float):
        named = [(n, p) for n, p in transformer.named_parameters() if p.requires_grad]
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self.masters = self.parameters
        if dtype != torch.float32 and not any("lora_" in name for name in self.names):
            self.masters = [p.detach().requires_grad_() for p in self.parameters]
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.data = parameter.data.to(dtype)
                parameter.register_post_accumulate_grad_hook(functools.partial(collect, master))
        self.adam = torch.optim.AdamW(self.masters, betas=betas, weight_decay=weight_decay, fused=True)

    def refresh(self) -> None:
        """Round the masters into the compute copies."""
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.data.copy_(master.data)

    def step(self, lr: float, clip: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping. A non-finite norm changes nothing."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, clip).item()
        if math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            self.refresh()
        self.adam.zero_grad()
        return norm

    def tensors(self) -> dict:
        """Masters and moments by name: everything that a checkpoint needs."""
        saved = {}
        for name, master in zip(self.names, self.masters, strict=True):
            saved[f"master/{name}"] = master
            saved |= {f"{key}/{name}": value for key, value in self.adam.state[master].items()}
        return saved

    def restore(self, saved: dict) -> None:
        for name, master in zip(self.names, self.masters, strict=True):
            master.data.copy_(saved[f"master/{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}/{name}" in saved:  # none before the first finite step
                    self.adam.state[master][key] = saved[f"{key}/{name}"].to(master.device)
        self.refresh()


def collect(master, parameter) -> None:
    """Move the gradient of a compute copy to its master, in fp32, as soon as backward has made it."""
    gradient = parameter.grad.to(master.dtype)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None


def fill(documents: list, limit: int) -> list[list]:
    """Consecutive groups of at most `limit` tokens, by len(document.ids); a longer document is a group of its own.

    lengths 4 3 2 5, limit 7  ->  [4 3] [2 5]
    """
    groups, size = [], 0
    for document in documents:
        if not groups or size + len(document.ids) > limit:
            groups.append([])
            size = 0
        groups[-1].append(document)
        size += len(document.ids)
    return groups


def resume(folder: Path, trainee: Trainee, fresh: dict) -> dict:
    """The state to go on from: that of the newest checkpoint, or `fresh` where there is none yet; its step is printed.

    Raises UserError where the data, by `data_sha256` of both, are others. The logs are cut back to the state's step.
    """
    state = fresh
    if found := runs.load_checkpoint(folder):
        tensors, state = found
        trainee.restore(tensors)
    if state["data_sha256"] != fresh["data_sha256"]:
        raise UserError(f"{folder}: the data have changed since its last checkpoint")
    for name in ("metrics.jsonl", "samples.jsonl"):
        runs.rewind(folder / name, state["step"])
    print(f"from step {state['step']}")
    return state


def save(transformer, tokenizer, base: str, path: Path) -> None:
    """What was trained: the adapter in PEFT's format, or the whole model with what makes a pocket of it."""
    if transformer.lora:
        model.save_adapter(transformer, path, base=base)
        print(f"the adapter (PEFT format): {path}")
    else:
        model.save(transformer, tokenizer, path)
        runs.copy_world(base, path)
        print(f"the model (Hugging Face format): {path}")


# ------------------------------------------------------------------------------------------------- evaluation


def evaluate(transformer, tokenizer, base: str, seed: int, path: Path) -> tuple[dict, list[dict]]:
    """(figures, items) of the pocket's suites, kept in `path`; read from there if a resumed run has them already."""
    if not path.exists():
        from pocket import world as pocket

        world = pocket.World(runs.world_seed(base))
        items = suites.load(["pocket"], world, suites.candidates(base))
        figures, labelled, seconds = suites.run(transformer, tokenizer, items, world, seed=seed + 1000)
        runs.write_json(path, {"figures": figures, "items": labelled, "seconds": seconds})
        tqdm.write(f"{path.stem}: {len(labelled)} prompts in {seconds:.0f} s")
    stored = json.loads(path.read_text())
    return stored["figures"], stored["items"]


# ------------------------------------------------------------------------------------------------- memory


def shape_of(path: str):
    """The model on the meta device: every size, no weight."""
    try:
        with torch.device("meta"):
            return model.Transformer(model.Config.from_dict(model.read_json(model.resolve(path) / "config.json")))
    except model.ModelError as error:
        raise UserError(str(error)) from None


def training_bytes(transformer, lora_r: int, dtype, micro_tokens: int, checkpointing: bool) -> dict[str, int]:
    """Bytes of everything but caches and guards, from the sizes of a model, which may be on the meta device.

    Activations a token and layer: what backward keeps of norms, queries and keys before and after rotation, values,
    attention, gate and up; with `checkpointing` a hidden state of each layer, and one layer in full.
    """
    c, width = transformer.config, dtype.itemsize
    weights = trained = sum(p.numel() for p in transformer.parameters())
    if lora_r:
        trained = sum(lora_r * sum(linear.weight.shape) for linear in model.lora_layers(transformer).values())
    layer = 6 * c.hidden_size + 3 * c.intermediate_size
    layer += (3 * c.num_attention_heads + 4 * c.num_key_value_heads) * c.head_dim
    kept = c.num_hidden_layers * c.hidden_size + layer if checkpointing else c.num_hidden_layers * layer
    head = 0 if lora_r else 4 * c.vocab_size * c.hidden_size  # its gradient, in fp32
    return {
        "weights": weights * width,
        "fp32 masters": 4 * trained if lora_r or width < 4 else 0,
        "Adam": 8 * trained,
        "gradients": 4 * trained,
        "activations": kept * width * micro_tokens,
        "chunk of logits": 6 * c.vocab_size * min(2048, micro_tokens) + head,
    }


def share_memory(plan: dict[str, int], free: int, answer_bytes: int, guard_share: float) -> dict[str, int | None]:
    """The plan with the two caches that share what it leaves of `free` bytes: guard_share of it for the guard's.

    answer_bytes: cache of the longest prompt and answer. Raises UserError, with the figures, where LEAST_ROWS of those
    do not fit. `free` 0 stands for main memory, where unwritten pages cost nothing: the engines choose for themselves.
    """
    if not free:
        return plan | {"policy cache": None, "guard cache": None}
    rest = int(HEADROOM * free) - sum(plan.values())
    whole = plan | {"policy cache": int(rest * (1 - guard_share)), "guard cache": int(rest * guard_share)}
    if whole["policy cache"] < LEAST_ROWS * answer_bytes:
        raise UserError(
            f"this does not fit into {gib(free)} GiB of free GPU memory: {in_words(plan)};"
            f" {LEAST_ROWS} answers need {gib(LEAST_ROWS * answer_bytes)} GiB of cache. What helps: --lora-r 16,"
            " --checkpointing, a smaller --micro-tokens, --max-tokens or --guard-share"
        )
    return whole


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def in_words(plan: dict[str, int | None]) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in plan.items() if size) + " GiB"


# ------------------------------------------------------------------------------------------------- speed


def flops_a_token(transformer, lora: bool) -> float:
    """Products with weights, forward and backward: 6 a parameter, 4 where the weights get no gradient."""
    embedding = 0 if transformer.config.tie_word_embeddings else transformer.model.embed_tokens.weight.numel()
    return (4 if lora else 6) * (sum(p.numel() for p in transformer.parameters()) - embedding)


def mfu(flops_a_second: float) -> dict:
    """{"mfu": share of the dense bf16 peak} on a known GPU, else nothing."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peaks = [peak for name, peak in runs.PEAK_FLOPS.items() if name in device]
    return {"mfu": flops_a_second / peaks[0]} if peaks else {}

"""What both training scripts share: fp32 masters and AdamW, checkpoints, the pocket's suites, memory and speed."""

import functools
import hashlib
import itertools
import math
import os
import re
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import engine
import judges
import model
import runs
import scores
import suites
from pocket.world import world_of
from runs import UserError

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read when CUDA starts, which is later

HEADROOM = 0.95  # of the free GPU memory that a plan may fill
LEAST_ROWS = 16  # longest answers that must fit into the sampler's cache
PATIENCE = 5  # steps in a row without a finite gradient before a run stops
GUARD_SHARE = 0.3  # of the GPU memory left for the caches of policy and guard, what the guard gets


class Trainee:
    """Trainable parameters, their fp32 masters and AdamW.

    LoRA pairs and fp32 weights are their own masters. Full training in bf16 keeps the fp32 weights that the model was
    loaded with as masters; they collect the gradients of their bf16 copies in fp32 and refresh the copies after each
    step, for pure bf16 would lose most of a small update. That is 18 bytes a parameter: each bf16 gradient is freed
    once added to its fp32 master.
    """

    def __init__(self, transformer, dtype, betas: tuple[float, float], weight_decay: float):
        self.parameters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
        self.transformer, self.masters = transformer, dict(self.parameters)
        if dtype != torch.float32 and not transformer.lora:
            for name, parameter in self.parameters.items():
                self.masters[name] = master = parameter.detach().requires_grad_()
                parameter.register_post_accumulate_grad_hook(functools.partial(collect, master))
            transformer.to(dtype)
        self.adam = torch.optim.AdamW(self.masters.values(), betas=betas, weight_decay=weight_decay, fused=True)

    def refresh(self) -> None:
        """Round the masters into the compute copies, LoRA pairs into theirs."""
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                parameter.data.copy_(self.masters[name].data)
        model.refresh_lora(self.transformer)

    def step(self, lr: float, clip: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping. A non-finite norm changes nothing."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), clip).item()
        if math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            self.refresh()
        self.adam.zero_grad()
        return norm

    def tensors(self) -> dict:
        """Masters and moments by name: everything that a checkpoint needs."""
        saved = {f"master/{name}": master for name, master in self.masters.items()}
        for name, master in self.masters.items():
            saved |= {f"{key}/{name}": value for key, value in self.adam.state[master].items()}
        return saved

    def restore(self, saved: dict) -> None:
        for name, master in self.masters.items():
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


def load(config, device: str, dtype, adapter: str = ""):
    """(transformer, tokenizer) with what is trained: a new LoRA pair, those of `adapter`, or with --lora-r 0 every
    weight, an adapter merged in. Raises UserError."""
    loaded = dtype if config.lora_r else torch.float32  # weights to be trained are their own masters
    transformer, tokenizer = model.load(config.model, device, loaded, adapter)
    if adapter and not config.lora_r:
        model.merge_lora(transformer)
    if config.lora_r and not adapter:
        model.add_lora(transformer, config.lora_r, config.lora_alpha, config.seed)
    if config.lora_r and transformer.lora["r"] != config.lora_r:
        raise UserError(f"--lora-r {config.lora_r}: {adapter} has rank {transformer.lora['r']}; or 0 merges it")
    return transformer, tokenizer


# ------------------------------------------------------------------------------------------------- checkpoints and logs
def save_checkpoint(folder: Path, tensors: dict, state: dict) -> None:
    """checkpoints/step-N (N is state["step"]), whole or not at all; the last two are kept.

    Written under a hidden name, flushed, and renamed last: a kill at any moment leaves the earlier ones intact. No
    random generator is in it: whatever a step draws is a function of (seed, step).
    """
    final = folder / "checkpoints" / f"step-{state['step']}"
    for torn in (*final.parent.glob(".step-*"), final):
        shutil.rmtree(torn, ignore_errors=True)
    temporary = final.with_name("." + final.name)
    temporary.mkdir(parents=True)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, temporary / "tensors.safetensors")
    except SafetensorError as error:
        raise OSError(f"{temporary}: {error}") from None  # a full disk
    with open(temporary / "tensors.safetensors", "rb+") as file:
        os.fchmod(file.fileno(), 0o600)
        os.fsync(file.fileno())
    runs.write_json(temporary / "state.json", state)
    os.replace(temporary, final)
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by their steps, oldest first; folders of other names are the user's."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(folder: Path) -> tuple[dict, dict] | None:
    """(tensors, state) of the newest whole checkpoint; None where there is none.

    A damaged one is named and passed over. Raises UserError where all are damaged.
    """
    for path in reversed(found := checkpoints(folder)):
        try:
            return load_file(path / "tensors.safetensors"), runs.read_json(path / "state.json")
        except (OSError, SafetensorError, UserError) as error:
            print(f"{path} is damaged and is passed over ({error})", file=sys.stderr)
    if found:
        raise UserError(f"{folder}: every checkpoint is damaged; start anew in another folder")
    return None


LOGS = ("metrics.jsonl", "samples.jsonl")
# What both loops keep: seconds are of steps alone, skipped steps had no finite gradient, in_a_row are the last of them
NEW_RUN = {"step": 0, "seconds": 0.0, "skipped": 0, "in_a_row": 0}


def checkpoint_steps(steps: int) -> set[int]:
    """How many steps make a fifth of the run, two fifths, ...: where checkpoints are. 7 steps -> 2 3 5 6 7"""
    return {-(-k * steps // 5) for k in range(1, 6)}


def log(folder: Path, step: int, line: dict, samples: list[dict]) -> None:
    for name, rows in zip(LOGS, ([line], samples), strict=True):
        for row in rows:
            runs.append_jsonl(folder / name, {"step": step, **row})


def end_step(folder: Path, trainee: Trainee, state: dict, line: dict, samples: list[dict], due: set, interrupt) -> None:
    """Carry a step, given by its line of the log, over into the state of the run; log it, with samples; keep a
    checkpoint if one is due. Then raises KeyboardInterrupt if `interrupt` (runs.Interruptible) asks for it, and
    UserError after PATIENCE steps without a finite gradient."""
    finite = math.isfinite(line["grad_norm"])
    state["step"] += 1
    state["seconds"] += line["seconds"]
    state["skipped"] += not finite
    state["in_a_row"] = 0 if finite else state["in_a_row"] + 1
    log(folder, state["step"], line | {"peak_gib": peak_memory()}, samples)
    if state["step"] in due or interrupt.requested:
        sizes = {name: (folder / name).stat().st_size for name in LOGS if (folder / name).exists()}
        save_checkpoint(folder, trainee.tensors(), {**state, "logs": sizes})
    if interrupt.requested:
        raise KeyboardInterrupt
    if state["in_a_row"] == PATIENCE:
        raise UserError(f"{PATIENCE} steps in a row without a finite gradient; try a smaller --lr")


def resume(folder: Path, trainee: Trainee, fresh: dict, made_of: bytes) -> dict:
    """The state to go on from: the newest checkpoint's, or `fresh` where there is none yet; logs are cut back to it.
    Raises UserError where the settings are others, or data and model, of which `made_of` has the bytes."""
    digest = hashlib.sha256(made_of + (folder / "config.json").read_bytes()).hexdigest()
    state, sizes = fresh | {"data_sha256": digest}, {}
    if found := load_checkpoint(folder):
        tensors, state = found
        if state["data_sha256"] != digest:
            raise UserError(f"{folder}: the data or the model have changed, or config.json, since its last checkpoint")
        sizes = state.pop("logs")
        trainee.restore(tensors)
    for path in [folder / name for name in LOGS if (folder / name).exists()]:
        os.truncate(path, min(sizes.get(path.name, 0), path.stat().st_size))
    print(f"from step {state['step']}")
    return state


def evaluate(transformer, tokenizer, base: str, seed: int, path: Path) -> dict:
    """{figures, items, seconds} of the pocket's suites, kept in `path`; read from there if a resumed run has them."""
    if path.exists():
        return runs.read_json(path)
    begun, world = time.perf_counter(), world_of(base)
    items = suites.load(["pocket"], world, suites.candidates(base))
    limits = [suites.settings(item).max_tokens for item in items]
    torch.cuda.empty_cache()  # so that the engine sees what is really free
    drawn = dict(engine.complete(transformer, tokenizer, items, seed=seed, max_tokens=limits))
    done = [drawn[i] for i in range(len(items))]
    labels = judges.load("pocket", world=world)(done)
    labelled = [{**item, **label} for item, label in zip(done, labels, strict=True)]
    result = {"figures": scores.score(labelled), "items": labelled, "seconds": time.perf_counter() - begun}
    runs.write_json(path, result)
    tqdm.write(f"{path.stem}: {len(labelled)} prompts in {result['seconds']:.0f} s")
    return result


def finish(transformer, tokenizer, config, folder: Path, result: dict, begun: float) -> None:
    """The end of a run, begun at that time.monotonic(): the adapter or model, the pocket's suites beside those of
    before.json, and result.json last."""
    if transformer.lora:
        model.save_adapter(transformer, folder / "model", base=config.model)
    else:
        model.save(transformer, tokenizer, folder / "model")
        if runs.is_pocket(config.model):
            shutil.copyfile(Path(config.model) / "world.json", folder / "model" / "world.json")
    print(f"trained, in the format of {'PEFT' if transformer.lora else 'Hugging Face'}: {folder / 'model'}")
    if config.evaluate:
        paths = [folder / "before.json", folder / "after.json"]
        before, after = (evaluate(transformer, tokenizer, config.model, config.seed, path) for path in paths)
        print("\n" + scores.table(before["figures"], after["figures"]))
        result |= {"before": before["figures"], "after": after["figures"]}
    result |= {"training_minutes": result["seconds"] / 60, "minutes": (time.monotonic() - begun) / 60}
    runs.write_json(folder / "result.json", result)
    print(f"\n{result['seconds']:.0f} s of training, {result['minutes']:.1f} minutes in all; all files: {folder}")


# ------------------------------------------------------------------------------------------------- memory and speed
@dataclass
class Plan:
    """How a step is cut into forward passes, and bytes of GPU memory by what they are for (none planned on a CPU)."""

    micro_tokens: int
    checkpointing: bool = False  # recompute activations in backward: less memory, a third more time
    sizes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        kept = "recomputed" if self.checkpointing else "kept"
        sizes = f"; GiB of {in_gib(self.sizes)}" if self.sizes else ""
        return f"{self.micro_tokens} tokens a forward pass, activations {kept}{sizes}"


def in_gib(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items() if size)


def shape_of(path: str):
    """The model on the meta device: every size, no weight."""
    config = model.read_config(model.resolve(str(path)))
    with torch.device("meta"):
        return model.Transformer(config)


def free_memory(device: str) -> int:
    """Bytes of GPU memory that nobody holds; 0 on a CPU, where nothing is planned."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 0


def training_bytes(transformer, lora_r: int, dtype, micro_tokens: int, checkpointing: bool) -> dict[str, int]:
    """Bytes of everything but engines and guards, from the sizes of a model, which may be on the meta device.

    Activations a token and layer: what backward keeps of the norms (their sums and results), of the rotated queries and
    keys (before their norm, too, where there is one), values, attention, gate and up, and their product; with
    `checkpointing` a hidden state of each layer, and one layer in full.
    """
    c, width = transformer.config, dtype.itemsize
    weights = trained = sum(p.numel() for p in transformer.parameters())
    if lora_r:
        trained = sum(lora_r * sum(linear.weight.shape) for linear in model.lora_layers(transformer).values())
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 4 * c.hidden_size + 3 * c.intermediate_size + 2 * (queries + keys) + c.qk_norm * (queries + 2 * keys)
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


def graph_bytes(transformer, rows: int) -> int:
    """What an engine's CUDA graphs hold: about four fp32 copies of the logits of all rows."""
    return 4 * min(rows, engine.MAX_ROWS) * transformer.config.vocab_size * 4


def plan_memory(config, dtype, free: int, *, longest: int, rows: int, answer: int = 0, guard: str = "") -> Plan:
    """The first that fits of: micro_tokens, half of it and so on, with all activations kept; the same recomputed.

    config: of either script. free: bytes of GPU memory; 0 is a CPU. longest: tokens of the longest document, less
    cannot be in a pass. rows: samples of an engine. answer: tokens of the longest prompt and answer in RL, of which
    LEAST_ROWS must fit into the cache; what is left becomes cache. guard: path of a second model, on an engine of its
    own, whose cache gets GUARD_SHARE of that. Raises UserError with the figures where nothing fits.
    """
    if not free:
        return Plan(config.micro_tokens)
    transformer = shape_of(config.model)
    c, others = transformer.config, {"graphs": graph_bytes(transformer, rows)}
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize  # keys and values
    least, share = LEAST_ROWS * token * (answer + engine.PAGE) if answer else 0, 0.0
    if guard:
        judge, share = shape_of(guard), GUARD_SHARE
        others["guard"] = sum(p.numel() for p in judge.parameters()) * dtype.itemsize + graph_bytes(judge, rows)
    passes = [max(longest, config.micro_tokens >> halvings) for halvings in range(10)]
    for checkpointing, size in itertools.product((False, True), passes):
        sizes = training_bytes(transformer, config.lora_r, dtype, size, checkpointing) | others
        rest = int(HEADROOM * free) - sum(sizes.values())
        if rest * (1 - share) >= least:
            caches = {"policy cache": int(rest * (1 - share)), "guard cache": int(rest * share)} if answer else {}
            return Plan(size, checkpointing, sizes | caches)
    raise UserError(
        f"this does not fit into {free / 2**30:.2f} GiB of free GPU memory, even with {size} tokens a forward pass and"
        f" activations recomputed: GiB of {in_gib(sizes | {'least cache': least})}. What helps: --lora-r 16, shorter"
        " documents, a smaller model or guard"
    )


def peak_memory() -> float:
    """GiB: the most that this process has held, of the GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

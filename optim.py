"""The trained weights: fp32 masters, AdamW, clipping, what a checkpoint holds of them; how fast training is."""

import functools
import math

import torch

import runs


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

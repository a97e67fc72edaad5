"""Qwen2 / Qwen3 / Llama / Mistral decoders on packed rows: forward, LoRA, safetensors in and out.

One layout everywhere: the documents of a row lie one after the other in `ids_T`, `cu_seqlens` says where each begins,
positions restart at 0. Training, prefill and decode run the very same layers; only `attend` differs. Parameter names
are those of Hugging Face, so a checkpoint is loaded and saved without a mapping.

    transformer, tokenizer = load("pocket/base")
    logits_TV = transformer.logits(ids_T, cu_seqlens)
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import platform
import re
import shutil
from pathlib import Path

import huggingface_hub
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedTokenizerFast

import kernels
import safety
from runs import UserError, read_json, write_json

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
ROPE_SETTINGS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
UNSUPPORTED_ADAPTER = (  # peft settings that change the formula or the tensors, where they are set
    "use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "rank_pattern",
    "alpha_pattern", "modules_to_save", "layers_to_transform", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
)  # fmt: skip


class ModelError(UserError):
    """A model folder that cannot be used; the message names the file, tensor or setting."""


# ------------------------------------------------------------------------------------------------- device
def pick_device(name: str) -> str:
    """ "cpu" or "cuda" of a --device auto, cpu or cuda. Raises UserError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of a --dtype; auto is bfloat16 on a GPU that has it (sm_80 and newer), float32 elsewhere."""
    modern = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if name == "bfloat16" and device == "cuda" and not modern:
        raise UserError("--dtype bfloat16: this GPU is older than sm_80; use float32")
    return getattr(torch, ("bfloat16" if modern else "float32") if name == "auto" else name)


def pick_kernels(device: str) -> None:
    """Settle which kernels run: the environment variable KERNELS (triton, reference), else what the device can."""
    name = os.environ.get("KERNELS", "auto")
    try:
        kernels.force(None if name == "auto" else name)
        kernels.backend(device)
    except ValueError as error:
        raise UserError(f"KERNELS={name}: {error}") from None


def device_name(device: str) -> str:
    """What a run runs on, in words, for its source.json."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{platform.system()} {platform.machine()}, {cores}"


# ------------------------------------------------------------------------------------------------- configuration
@dataclasses.dataclass(frozen=True)
class Config:
    """What the forward pass needs of a config.json; `raw` is the whole file, written back as it was."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict  # {"rope_type": a key of ROPE_SETTINGS, its settings}
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    raw: dict

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """Defaults of absent settings are Transformers'. Raises ModelError for what this file does not compute."""
        names = raw.get("architectures") or ["(none)"]
        name, tied = names if isinstance(names, str) else names[0], raw.get("tie_word_embeddings") or False
        refuse_unsupported(name, raw)
        if not isinstance(tied, bool):
            raise ModelError(f"config.json: tie_word_embeddings must be true or false, not {tied!r}")
        llama, qwen3 = name == "LlamaForCausalLM", name == "Qwen3ForCausalLM"
        sizes = {key: positive_number(raw, key) for key in SIZES}
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        kv_heads = positive_number(raw, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelError(f"config.json: {heads} attention heads do not divide into {kv_heads} key-value heads")
        return cls(
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=positive_number(raw, "head_dim", 128 if qwen3 else hidden // heads),
            rms_norm_eps=positive_number(raw, "rms_norm_eps", 1e-6, kind=float),
            rope=read_rope(raw),
            tie_word_embeddings=tied,
            qkv_bias=name == "Qwen2ForCausalLM" or ((llama or qwen3) and bool(raw.get("attention_bias"))),
            o_bias=(llama or qwen3) and bool(raw.get("attention_bias")),
            mlp_bias=llama and bool(raw.get("mlp_bias")),
            qk_norm=qwen3,
            raw=raw,
        )


def read_config(folder: Path) -> Config:
    """The Config of a model folder. Raises ModelError."""
    raw = read_json(settings_file(folder, "config.json"))
    try:
        return Config.from_dict(raw)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None


def positive_number(raw: dict, key: str, default=None, kind: type = int, file: str = "config.json"):
    """raw[key] as a positive number; null counts as absent."""
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int if kind is int else int | float) or not value > 0:
        raise ModelError(f"{file}: {key} must be a positive {kind.__name__}, not {value!r}")
    return value


def refuse_unsupported(name: str, raw: dict) -> None:
    if name not in ARCHITECTURES:
        raise ModelError(f"architecture {name} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act {raw['hidden_act']} is not supported (silu is)")
    if raw.get("quantization_config"):
        raise ModelError("config.json: quantized weights are not supported (quantization_config)")
    mistral = name == "MistralForCausalLM"  # has a window unless its config.json says null
    window = raw.get("sliding_window", 4096 if mistral else None)
    if window and (mistral or raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ())):
        raise ModelError(f"config.json: sliding-window attention is not supported (sliding_window={window})")


def read_rope(raw: dict) -> dict:
    """{"rope_type", "rope_theta", the settings of that type}, read as Transformers reads them. Raises ModelError."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # before Transformers 5, and since
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ModelError("config.json: rope settings that differ from layer to layer are not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_SETTINGS:
        raise ModelError(f"config.json: rope scaling {kind} is not supported ({', '.join(ROPE_SETTINGS)} are)")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ModelError(f"config.json: partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    default = {
        "rope_theta": raw.get("rope_theta", 10000.0),
        "original_max_position_embeddings": raw["max_position_embeddings"],
    }
    settings = {key: positive_number(rope, key, default.get(key), float) for key in ROPE_SETTINGS[kind]}
    return {"rope_type": kind, **settings}


def rope_frequencies(config: Config) -> torch.Tensor:
    """Inverse frequencies [D/2] in fp32; the scalings are those of Transformers' modeling_rope_utils."""
    rope = config.rope
    inverse = 1 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if rope["rope_type"] == "default":
        return inverse
    if rope["rope_type"] == "linear":
        return inverse / rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * math.pi / inverse)  # over the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched by the factor, 1: left as it is
    return (1 - smooth) * inverse / rope["factor"] + smooth * inverse


# ------------------------------------------------------------------------------------------------- layers
class Linear(nn.Linear):
    """Weight, bias and LoRA pair of one projection, under Hugging Face's name; Joint multiplies with them."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias=bias)
        self.register_parameter("lora_A", None)  # [r,in] and [out,r], fp32 masters
        self.register_parameter("lora_B", None)
        self.lora_scale = 1.0

    def forward(self, x_TI):
        raise TypeError("one projection alone is not multiplied: Joint does it, with the LoRA pair")


FEW_ROWS = (2, 3, 4)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x W' + b. A CPU multiplies two to four rows a quarter faster as (W x')'; sampling alone comes with so few."""
    if len(x_TI) not in FEW_ROWS or x_TI.device.type != "cpu":
        return F.linear(x_TI, weight_OI, bias_O)
    y_TO = (weight_OI @ x_TI.T).T.contiguous()
    return y_TO if bias_O is None else y_TO.add_(bias_O)


class Joint:
    """Projections of one input as one product: y = x W' + scale (x A') B' of all of them, side by side.

    Their weights lie one after the other in W [O,I], of which each Linear's parameter is a part. A [R,I] holds the
    pairs' A one after the other, B [O,R] their scaled B as blocks, zeros elsewhere: copies in the weights' dtype that
    `refresh` takes from the fp32 masters. A pair is never merged for sampling.
    """

    def __init__(self, *linears: Linear):
        self.linears, self.sizes = linears, [linear.out_features for linear in linears]
        self.join()

    def join(self) -> None:
        """Bring the parameters together; needed after whatever gave them other memory or pairs."""
        self.weight_OI = concatenated([linear.weight for linear in self.linears])
        self.bias_O = None if self.linears[0].bias is None else concatenated([linear.bias for linear in self.linears])
        self.pairs, outputs, rank = [], 0, 0  # of each adapted Linear: itself, its rows of B, its rows of A
        for linear, size in zip(self.linears, self.sizes, strict=True):
            if linear.lora_A is not None:
                r = len(linear.lora_A)
                self.pairs.append((linear, slice(outputs, outputs + size), slice(rank, rank + r)))
                rank += r
            outputs += size
        self.a_RI = self.weight_OI.new_zeros(rank, self.weight_OI.shape[1])
        self.b_OR = self.weight_OI.new_zeros(outputs, rank)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the pairs from their masters, in place."""
        for linear, outputs, ranks in self.pairs:
            self.a_RI[ranks].copy_(linear.lora_A)
            self.b_OR[outputs, ranks].copy_(linear.lora_B * linear.lora_scale)

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.product(x_TI)[0]
        weights, biases = [linear.weight for linear in self.linears], [linear.bias for linear in self.linears]
        pairs = [p for linear, _, _ in self.pairs for p in (linear.lora_A, linear.lora_B)]
        return JointProduct.apply(x_TI, self, *weights, *biases, *pairs)

    def product(self, x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y [T,O], and x A' [T,R] where there are pairs."""
        if not self.pairs:
            return linear(x_TI, self.weight_OI, self.bias_O), None
        xa_TR = F.linear(x_TI, self.a_RI)
        y_TO = F.linear(xa_TR, self.b_OR, self.bias_O)  # first, for the large product can add to it at no cost
        return y_TO.addmm_(x_TI, self.weight_OI.T), xa_TR


def concatenated(parameters: list[nn.Parameter]) -> torch.Tensor:
    """One tensor of all rows, of which the parameters become parts."""
    whole = torch.cat([p.detach() for p in parameters]) if parameters[1:] else parameters[0].detach()
    for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return whole


class JointProduct(torch.autograd.Function):
    """Joint's product, with gradients for the input and for whichever parameters train."""

    @staticmethod
    def forward(ctx, x_TI, joint, *parameters):
        y_TO, xa_TR = joint.product(x_TI)
        ctx.joint = joint
        ctx.save_for_backward(x_TI if any(ctx.needs_input_grad[2:]) else None, xa_TR)
        return y_TO

    @staticmethod
    def backward(ctx, g_TO):
        joint, (x_TI, xa_TR), n = ctx.joint, ctx.saved_tensors, len(ctx.joint.linears)
        needed, g_TI, g_weights, g_biases = ctx.needs_input_grad, None, [None] * n, [None] * n
        g_pairs = [None] * 2 * len(joint.pairs)
        g_xa_TR = g_TO @ joint.b_OR if joint.pairs else None
        if needed[0]:
            g_TI = (g_xa_TR @ joint.a_RI).addmm_(g_TO, joint.weight_OI) if joint.pairs else g_TO @ joint.weight_OI
        if any(needed[2 : 2 + n]):
            g_weights = (g_TO.T @ x_TI).split(joint.sizes)
        if any(needed[2 + n : 2 + 2 * n]):
            g_biases = g_TO.sum(0).split(joint.sizes)
        if any(needed[2 + 2 * n :]):
            g_a_RI, g_b_OR = (g_xa_TR.T @ x_TI).float(), (g_TO.T @ xa_TR).float()
            parts = [(g_a_RI[ranks], g_b_OR[rows, ranks] * linear.lora_scale) for linear, rows, ranks in joint.pairs]
            g_pairs = [part for pair in parts for part in pair]
        return g_TI, None, *g_weights, *g_biases, *g_pairs


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x_TH, residual_TH=None):
        """(the normed sum of x and residual, the sum), in one pass; the sum is x where there is no residual."""
        if residual_TH is None:
            return kernels.rms_norm(x_TH, self.weight, self.eps), x_TH
        return kernels.rms_norm(x_TH, self.weight, self.eps, residual_TH)


def pick_rows(x_TH: torch.Tensor, rows_N: torch.Tensor | None) -> torch.Tensor:
    return x_TH if rows_N is None else x_TH.index_select(0, rows_N)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, bias = config.hidden_size, config.qkv_bias
        self.q_proj = Linear(hidden, self.heads * dim, bias=bias)
        self.k_proj = Linear(hidden, kv_heads * dim, bias=bias)
        self.v_proj = Linear(hidden, kv_heads * dim, bias=bias)
        self.o_proj = Linear(self.heads * dim, hidden, bias=config.o_bias)
        if config.qk_norm:  # over each head, before the rotation
            self.q_norm = RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.qkv, self.out = Joint(self.q_proj, self.k_proj, self.v_proj), Joint(self.o_proj)

    def forward(self, x_TH, cos_TD, sin_TD, attend, rows_N=None):
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.qk_norm else None
        rotate = functools.partial(kernels.rope, self.qkv(x_TH), self.heads, cos_TD, sin_TD, norms)
        return self.out(pick_rows(attend(rotate).flatten(1), rows_N))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)
        self.gate_up, self.down = Joint(self.gate_proj, self.up_proj), Joint(self.down_proj)

    def forward(self, x_TH):
        return self.down(kernels.swiglu(self.gate_up(x_TH)))


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TH, residual_TH, cos_TD, sin_TD, attend, rows_N=None):
        """(what the MLP adds, what it is added to): the sum is left to the next norm, which takes it in its pass.

        rows_N: the rows that are wanted; others end with their keys and values.
        """
        normed_TH, residual_TH = self.input_layernorm(x_TH, residual_TH)
        attended_NH = self.self_attn(normed_TH, cos_TD, sin_TD, attend, rows_N)
        normed_NH, residual_NH = self.post_attention_layernorm(attended_NH, pick_rows(residual_TH, rows_N))
        return self.mlp(normed_NH), residual_NH

    def whole(self, x_TH, *inputs):
        """The sum itself: one hidden state is all that a checkpoint between layers keeps."""
        return torch.add(*self(x_TH, None, *inputs))


class Decoder(nn.Module):
    """The part that Hugging Face calls `model`."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rope", rope_frequencies(config), persistent=False)
        self.generation: dict = {}  # generation_config.json, kept for `save`
        self.lora: dict | None = None  # r, alpha, targets of the adapter, where there is one

    def _apply(self, fn, recurse=True):
        """`.to(bfloat16)` casts weights, never the rope frequencies: 8 bits turn position 1000 by a radian."""
        super()._apply(fn, recurse)
        for joint in joints(self):
            joint.join()
        self.rope = rope_frequencies(self.config).to(self.rope.device)
        return self

    @property
    def head_weight(self) -> torch.Tensor:
        """[V,H]: the head, which is the embedding where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, ids_T, cu_seqlens, *, rows_N=None, positions_T=None, attend=None, checkpoint=False):
        """Hidden states [T,H] after the final norm, in the dtype of the weights; with `rows_N` those [N,H] of these
        rows alone, such as a loss needs: the last layer then leaves out what nobody asks for.

        ids_T [T] int64, cu_seqlens [N+1] int32 from 0 to T. `attend(layer, rotate) -> o_THD` replaces the packed causal
        attention: so a sampler runs these layers over its cache, with its own `positions_T`; `rotate()` gives queries,
        keys and values after rotation, `rotate(cache=...)` writes the latter two, see kernels.rope. `checkpoint`
        recomputes each layer in backward instead of keeping its activations.

            cu_seqlens [0, 3, 5]  ->  positions [0, 1, 2, 0, 1]
        """
        if positions_T is None:
            positions_T = packed_positions(cu_seqlens, len(ids_T))
        angles_TD = torch.outer(positions_T.float(), self.rope).repeat(1, 2)
        cos_TD, sin_TD = angles_TD.cos(), angles_TD.sin()
        x_TH, residual_TH = self.model.embed_tokens(ids_T), None
        attend = attend or packed_attention(cu_seqlens, len(ids_T), x_TH.dtype, self.config.head_dim)
        for index, layer in enumerate(self.model.layers):
            last = layer is self.model.layers[-1]
            inputs = (cos_TD, sin_TD, functools.partial(attend, index), rows_N if last else None)
            if checkpoint and torch.is_grad_enabled():
                x_TH = recompute(layer.whole, x_TH, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TH, residual_TH = layer(x_TH, residual_TH, *inputs)
        return self.model.norm(x_TH, residual_TH)[0]

    def logits(self, ids_T, cu_seqlens) -> torch.Tensor:
        """[T,V] in fp32, for tests and small models; training and scoring use kernels.linear_logp."""
        return F.linear(self.forward(ids_T, cu_seqlens).float(), self.head_weight.float())


def packed_attention(cu_seqlens: torch.Tensor, tokens: int, dtype: torch.dtype, dim: int):
    """`attend` of a packed row. Its tokens bound the longest document, without asking the device for that."""
    plan = kernels.attention_plan(cu_seqlens, tokens, dtype, dim)
    return lambda layer, rotate: kernels.attention(*rotate(), cu_seqlens, tokens, plan)


def packed_positions(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """[0, 3, 5], 5 -> [0, 1, 2, 0, 1]"""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long(), output_size=tokens)
    return torch.arange(tokens, device=cu_seqlens.device) - starts


# ------------------------------------------------------------------------------------------------- loading
def resolve(path: str) -> Path:
    """A local folder as it is; anything else is a hub id, downloaded once, its revision printed."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir():
        raise ModelError(f"no model folder at {path}")
    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt"]
    try:
        ignored = ["consolidated*", "original/*"]
        folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=wanted, ignore_patterns=ignored))
    except (OSError, ValueError) as error:  # every network and hub error of huggingface_hub is one of these
        raise ModelError(f"{path} is neither a local folder nor a model that could be downloaded: {error}") from error
    print(f"{path}: revision {folder.name}")
    return folder


def flags_of(folder: Path) -> str:
    """What to type for the model or adapter in a folder, or in the folder of the run that made it; "" without one."""
    if (folder / "source.json").is_file():
        return flags_of(folder / "model")
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return f"--model {base} --adapter {folder}"
    return f"--model {folder}" if (folder / "config.json").is_file() else ""


def settings_file(folder: Path, name: str) -> Path:
    """folder / name. Raises ModelError where the folder has none, saying what it is instead."""
    run = (folder / "source.json").is_file()
    if run or not (folder / name).is_file():
        flags, problem = flags_of(folder), "is the folder of a run" if run else f"has no {name}"
        raise ModelError(f"{folder} {problem}" + (f"; to use what it holds, type {flags}" if flags else ""))
    return folder / name


def tensor_files(folder: Path) -> list[Path]:
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        names = sorted(set(map(str, weight_map.values() if isinstance(weight_map, dict) else weight_map)))
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{index}: a weight file is named outside of its folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ModelError(f"{folder} has no {', '.join(missing) or 'weights'} (only safetensors are read)")
    return [folder / name for name in names]


@torch.no_grad()
def read_tensors(files: list[Path], wanted: dict[str, torch.Tensor], spare: dict[str, torch.Tensor]) -> set[str]:
    """Copy every stored tensor into the one of its name; returns the names. `spare` ones need not be stored.

    Raises ModelError naming the first that is absent, surplus or of another shape.
    """
    seen, known = set(), wanted | spare
    for file in files:
        try:
            stored = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is not a whole safetensors file: {error}") from error
        for name, value in stored.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue  # a constant that old Llama files carry along
            if name not in known:
                raise ModelError(f"{file}: surplus tensor {name}")
            if not value.is_floating_point() or value.element_size() < 2:
                raise ModelError(f"{file}: {name} is {value.dtype}; quantized weights are not supported")
            if value.shape != known[name].shape:
                raise ModelError(f"{file}: {name} is {list(value.shape)}, not {list(known[name].shape)}")
            if value.numel() and not all(map(math.isfinite, value.aminmax())):
                raise ModelError(f"{file}: {name} holds a number that is not finite; download the file anew")
            known[name].copy_(value)
            seen.add(name)
    absent = sorted(wanted.keys() - seen)
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise ModelError(f"{files[0].parent}: missing tensor {absent[0]}{more}")
    return seen


def load_weights(transformer: Transformer, folder: Path) -> None:
    """A tied head may be stored under its own name, beside the embedding or in place of it."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    wanted, spare = dict(transformer.named_parameters()), {}
    if transformer.config.tie_word_embeddings:
        spare = {embedding: wanted.pop(embedding), head: torch.empty_like(transformer.head_weight, device="cpu")}
    seen = read_tensors(tensor_files(folder), wanted, spare)
    if spare and not seen & spare.keys():
        raise ModelError(f"{folder}: missing tensor {embedding}")
    if head in seen & spare.keys():
        if embedding in seen and not torch.equal(spare[head], spare[embedding].cpu()):
            raise ModelError(f"{folder}: tie_word_embeddings is true, but {head} is not the embedding")
        spare[embedding].data.copy_(spare[head])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of tokenizer.json exactly as it stands there.

    Not AutoTokenizer: for a `qwen2` config.json Transformers 5 puts Qwen's own pre-tokenizer in place of the file's,
    which changes the ids of any other tokenizer (the pocket's, for one) without a word.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json (a slow tokenizer must be converted first)")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # whatever the libraries raise on broken files
        raise ModelError(f"{folder}: its tokenizer files cannot be read: {type(error).__name__}: {error}") from None


def load(path: str, device="cpu", dtype=torch.float32, adapter: str = "", chat: bool = True):
    """(Transformer, tokenizer) of a Hugging Face folder or hub id, the weights cast to dtype. Raises UserError.

    adapter: the folder of a LoRA adapter in PEFT's format that goes on it. chat: the model is to answer under its chat
    template, so it is refused, before its weights are read, where that cannot work; a guard has a prompt of its own.
    """
    folder = resolve(str(path))
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    with torch.device("meta"):
        transformer = Transformer(config).to(dtype)
    if (folder / "generation_config.json").is_file():
        transformer.generation = read_json(folder / "generation_config.json")
    check_tokenizer(transformer, tokenizer)
    if chat:
        safety.check_template(tokenizer)
        adopt_turn_end(transformer, tokenizer)
    transformer.to_empty(device=device)
    load_weights(transformer, folder)
    if adapter:
        load_adapter(transformer, adapter)
    return transformer, tokenizer


# ------------------------------------------------------------------------------------------------- tokenizer and ends
def check_tokenizer(transformer: Transformer, tokenizer) -> None:
    """Raises ModelError where a token has no embedding (padding may lack one), or where nothing ends a text."""
    name, rows = tokenizer.name_or_path, transformer.config.vocab_size
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= rows and i != tokenizer.pad_token_id]
    if beyond:
        raise ModelError(
            f"{name}: {len(beyond)} tokens, such as {beyond[0]!r}, have ids beyond the {rows} rows of the embedding; "
            "take the tokenizer files that belong to these weights"
        )
    if not end_ids(transformer, tokenizer):
        raise ModelError(
            f"{name}: no end token, so no answer would ever end; name it as eos_token in tokenizer_config.json or as "
            "eos_token_id in generation_config.json"
        )


def turn_end(tokenizer) -> int | None:
    """The first control token after an assistant's turn in the chat template; None where there is none."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "4711"}]
    try:
        _, shown, tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("4711")
    except Exception:  # a template is a program and raises what it likes; this one knows no assistant's turn
        return None
    found = [(tail.find(str(token)), i) for i, token in tokenizer.added_tokens_decoder.items() if str(token) in tail]
    return min(found)[1] if shown and found else None


def adopt_turn_end(transformer: Transformer, tokenizer) -> None:
    """Make what ends a turn in the chat template the tokenizer's end token, which is the one that training teaches.

    Base models often name another, <|endoftext|> beside a template with <|im_end|>. Sampling stops at both, here and,
    by the generation_config.json that `save` writes, elsewhere. One line says so.
    """
    ends, end, named = end_ids(transformer, tokenizer), turn_end(tokenizer), tokenizer.eos_token
    if end is None:
        end = min(ends) if named is None else tokenizer.eos_token_id
    if end != tokenizer.eos_token_id:
        transformer.generation = {**transformer.generation, "eos_token_id": sorted(ends | {end})}
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        stops = ", ".join(tokenizer.convert_ids_to_tokens(sorted(ends | {end})))
        print(f"{tokenizer.name_or_path}: training ends a turn with {tokenizer.eos_token}, not with {named};", end=" ")
        print(f"sampling stops at {stops}")


def end_ids(transformer: Transformer, tokenizer) -> set[int]:
    """The ids that end a turn: those of generation_config.json (else config.json) and the tokenizer's end token.

    One id or a list there (Qwen3, Llama 3); training teaches the tokenizer's, so it always counts. What every sampler
    is given:  engine.Engine(transformer, model.end_ids(transformer, tokenizer)). Raises ModelError for what is no id.
    """
    stored = transformer.generation.get("eos_token_id", transformer.config.raw.get("eos_token_id"))
    ids = [*(stored if isinstance(stored, list) else [stored]), tokenizer.eos_token_id]
    ids = [i for i in ids if i is not None]
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < transformer.config.vocab_size]
    if wrong:
        problem = f"eos_token_id {wrong[0]!r} is no id of a vocabulary of {transformer.config.vocab_size}"
        raise ModelError(f"{tokenizer.name_or_path}: {problem}")
    return set(ids)


def fingerprint(transformer: Transformer, tokenizer) -> str:
    """A hash of the weights, of 256 values of each tensor, and of the chat template."""
    parts = [tokenizer.chat_template]
    for name, weight in sorted(transformer.named_parameters()):
        values = weight.detach().flatten()[:: max(1, weight.numel() // 256)].float().cpu()
        parts += [name, str(tuple(weight.shape)), values.numpy().tobytes().hex()]
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- saving
@contextlib.contextmanager
def whole_folder(path):
    """A temporary folder that takes the name `path` when the block ends well; at any kill one whole folder is left.

    An older folder of that name is moved to `path`.old before, and removed after, the new one takes its place.
    """
    path = Path(path)
    temporary, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for file in temporary.iterdir():
        file.chmod(0o600)  # run folders are their owner's business
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def save(transformer: Transformer, tokenizer, path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that Transformers loads to the same logits: weights in their dtype, configs, tokenizer.

    Raises ModelError where an adapter is still attached: save_adapter or merge_lora comes first.
    """
    if transformer.lora:
        raise ModelError("save: the model has an adapter; save_adapter writes it, merge_lora folds it in")
    config = {key: value for key, value in transformer.config.raw.items() if key != "torch_dtype"}
    dtype = str(transformer.head_weight.dtype).removeprefix("torch.")
    with whole_folder(path) as folder:
        # copies: to the hub's library, parts of one piece of memory are one tensor
        weights = {name: p.detach().to("cpu", copy=True) for name, p in transformer.named_parameters()}
        huggingface_hub.save_torch_state_dict(weights, folder, max_shard_size=max_shard_bytes)
        write_json(folder / "config.json", config | {"dtype": dtype})
        if transformer.generation:
            write_json(folder / "generation_config.json", transformer.generation)
        save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """The files it was loaded from, as they stand; one that was made in memory is written by Transformers.

    Transformers 5 would rewrite tokenizer_config.json in words that version 4, and vLLM with it, cannot read.
    """
    source = Path(tokenizer.name_or_path)
    if not (source / "tokenizer.json").is_file():
        tokenizer.save_pretrained(folder)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


# ------------------------------------------------------------------------------------------------- LoRA
def lora_layers(transformer: Transformer, targets=LORA_TARGETS) -> dict[str, Linear]:
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, Linear) and name.rpartition(".")[2] in targets
    }


def joints(transformer: Transformer) -> list[Joint]:
    blocks = [(layer.self_attn, layer.mlp) for layer in transformer.model.layers]
    return [joint for attention, mlp in blocks for joint in (attention.qkv, attention.out, mlp.gate_up, mlp.down)]


def refresh_lora(transformer: Transformer) -> None:
    """Take over what an optimizer, or anything else, has made of the pairs: products use copies of them."""
    for joint in joints(transformer):
        joint.refresh()


def add_lora(transformer: Transformer, r: int, alpha: float, seed: int = 0, targets=LORA_TARGETS) -> list[nn.Parameter]:
    """Freeze the model and give each target projection of every block an fp32 pair; returns the pairs' parameters.

    A [r,in] is Kaiming-uniform (a = sqrt 5), B [out,r] is 0, the scale is alpha / r, as in peft: the adapted model
    starts as the base. Whoever changes a pair calls refresh_lora. Raises ModelError where there is an adapter already.
    """
    if transformer.lora:
        raise ModelError("add_lora: the model has an adapter already; merge_lora folds it in")
    generator = torch.Generator().manual_seed(seed)
    transformer.requires_grad_(False)
    for linear in lora_layers(transformer, targets).values():
        outputs, inputs = linear.weight.shape
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform_ with a = sqrt 5: sqrt(6 / (1 + 5)) / sqrt(fan_in)
        a_RI = torch.empty(r, inputs).uniform_(-bound, bound, generator=generator)
        linear.lora_A = nn.Parameter(a_RI.to(linear.weight.device))
        linear.lora_B = nn.Parameter(torch.zeros(outputs, r, device=linear.weight.device))
        linear.lora_scale = alpha / r
    for joint in joints(transformer):
        joint.join()
    transformer.lora = {"r": r, "alpha": alpha, "targets": list(targets)}
    return list(adapter_parameters(transformer).values())


def adapter_parameters(transformer: Transformer) -> dict[str, nn.Parameter]:
    """The pairs under the names that peft gives them."""
    return {
        f"base_model.model.{name}.{which}.weight": getattr(linear, which)
        for name, linear in lora_layers(transformer, transformer.lora["targets"]).items()
        for which in ("lora_A", "lora_B")
    }


def save_adapter(transformer: Transformer, path, base: str) -> None:
    """Write the adapter in PEFT's format; `base` is the folder or hub id of the model it belongs to."""
    lora = transformer.lora
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "inference_mode": True,
        "r": lora["r"], "lora_alpha": lora["alpha"], "target_modules": lora["targets"], "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
    }  # fmt: skip
    with whole_folder(path) as folder:
        pairs = {name: parameter.detach() for name, parameter in adapter_parameters(transformer).items()}
        save_file(pairs, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config)


def load_adapter(transformer: Transformer, path) -> list[nn.Parameter]:
    """Attach a LoRA adapter in PEFT's format; returns its parameters. Raises ModelError."""
    path = Path(path)
    if not path.is_dir():
        hub = (
            f"; from the hub: hf download {path} --local-dir DIR" if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) else ""
        )
        raise ModelError(f"no adapter folder at {path}{hub}")
    config = read_json(settings_file(path, "adapter_config.json"))
    refuse_adapter(path, config)
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(f"{path} has no adapter_model.safetensors (only safetensors are read)")
    file = str(path / "adapter_config.json")
    r, alpha = positive_number(config, "r", file=file), positive_number(config, "lora_alpha", kind=float, file=file)
    pairs = add_lora(transformer, r, alpha, targets=sorted(config["target_modules"]))
    read_tensors([path / "adapter_model.safetensors"], adapter_parameters(transformer), {})
    refresh_lora(transformer)
    return pairs


def refuse_adapter(path: Path, config: dict) -> None:
    """Raises ModelError for whatever would make y = x W' + alpha / r (x A') B' untrue."""
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise ModelError(f"{path}: only LoRA without bias is supported")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or set(targets) - set(LORA_TARGETS):
        raise ModelError(f"{path}: target_modules {targets!r} is not a list of names out of {', '.join(LORA_TARGETS)}")
    for key in UNSUPPORTED_ADAPTER:
        if config.get(key):
            raise ModelError(f"{path}: adapter setting {key}={config[key]} is not supported")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ModelError(f"{path}: init_lora_weights={config['init_lora_weights']} changes the base, not supported")


@torch.no_grad()
def merge_lora(transformer: Transformer) -> None:
    """Fold the adapter into the weights, the sum taken in fp32, and remove it; every weight is trainable again."""
    for linear in lora_layers(transformer, transformer.lora["targets"]).values():
        delta_OI = linear.lora_B @ linear.lora_A * linear.lora_scale
        linear.weight.copy_(linear.weight.float() + delta_OI)
        linear.lora_A = linear.lora_B = None
    for joint in joints(transformer):
        joint.join()
    transformer.lora = None
    transformer.requires_grad_(True)

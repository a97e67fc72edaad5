"""Qwen2 / Qwen3 / Llama / Mistral decoders on packed rows: forward, LoRA, safetensors in and out.

One layout everywhere: the documents of a row lie one after the other in `ids_T`, `cu_seqlens` says where each begins,
positions restart at 0. Training, prefill and decode run the very same layers; only `attend` differs. Parameter names
are those of Hugging Face, so a checkpoint is loaded and saved without a mapping.

    transformer, tokenizer = load("pocket/base")
    logits_TV = transformer.logits(ids_T, cu_seqlens)
"""

import dataclasses
import json
import math
import os
import shutil
import struct
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint as recompute

import kernels

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")


class ModelError(ValueError):
    """A model folder that cannot be used; the message names the file, tensor or setting."""


# ------------------------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class Config:
    """What the forward pass needs of a config.json; `raw` is the whole file, written back as it was."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    raw: dict

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """Raises ModelError for an architecture or setting that this file does not compute."""
        name = (raw.get("architectures") or ["(none)"])[0]
        if name not in ARCHITECTURES:
            raise ModelError(f"architecture {name} is not supported; supported: {', '.join(ARCHITECTURES)}")
        if raw.get("hidden_act", "silu") != "silu":
            raise ModelError(f"hidden_act {raw['hidden_act']} is not supported (silu is)")
        windowed = raw.get("use_sliding_window", name.startswith("Mistral")) and raw.get("sliding_window")
        if windowed or "sliding_attention" in (raw.get("layer_types") or ()):
            raise ModelError(f"sliding-window attention (sliding_window={raw.get('sliding_window')}) is not supported")
        heads, bias = raw["num_attention_heads"], raw.get("attention_bias", False)
        rope = raw.get("rope_parameters") or {}
        return cls(
            architecture=name,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw["max_position_embeddings"],
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
            rope_scaling=raw.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            qkv_bias=bias or name == "Qwen2ForCausalLM",
            o_bias=bias,
            mlp_bias=raw.get("mlp_bias", False),
            qk_norm=name == "Qwen3ForCausalLM",
            raw=raw,
        )


def rope_frequencies(config: Config) -> torch.Tensor:
    """Inverse frequencies [D/2] in fp32; `linear` and `llama3` scaling as in Transformers' modeling_rope_utils."""
    inverse = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    scaling = config.rope_scaling
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if kind == "default":
        return inverse
    if kind == "linear":
        return inverse / scaling["factor"]
    if kind != "llama3":
        raise ModelError(f"rope scaling {kind} is not supported (default, linear, llama3 are)")
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)  # over the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (smooth + (1 - smooth) / factor)


# ------------------------------------------------------------------------------------------------- layers


class Linear(nn.Linear):
    """A projection that may carry a LoRA pair: y = x W' + scale (x A') B', never merged for sampling."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias=bias)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.lora_scale = 1.0

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        y_TO = F.linear(x_TI, self.weight, self.bias)
        return y_TO if self.lora_A is None else y_TO + lora_delta(self, x_TI)


def lora_delta(linear: Linear, x_TI: torch.Tensor) -> torch.Tensor:
    """scale * (x A') B', the fp32 masters cast to the compute dtype here and nowhere else."""
    a_RI, b_OR = linear.lora_A.to(x_TI.dtype), linear.lora_B.to(x_TI.dtype)
    return F.linear(F.linear(x_TI, a_RI), b_OR) * linear.lora_scale


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x_TH, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, bias = config.hidden_size, config.qkv_bias
        self.q_proj = Linear(hidden, self.heads * self.dim, bias=bias)
        self.k_proj = Linear(hidden, self.kv_heads * self.dim, bias=bias)
        self.v_proj = Linear(hidden, self.kv_heads * self.dim, bias=bias)
        self.o_proj = Linear(self.heads * self.dim, hidden, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x_TH, cos_TD, sin_TD, attend):
        tokens = len(x_TH)
        q_THD = self.q_proj(x_TH).view(tokens, self.heads, self.dim)
        k_TKD = self.k_proj(x_TH).view(tokens, self.kv_heads, self.dim)
        v_TKD = self.v_proj(x_TH).view(tokens, self.kv_heads, self.dim)
        if self.qk_norm:
            q_THD = self.q_norm(q_THD.reshape(-1, self.dim)).view_as(q_THD)
            k_TKD = self.k_norm(k_TKD.reshape(-1, self.dim)).view_as(k_TKD)
        q_THD, k_TKD = kernels.rope(q_THD, k_TKD, cos_TD, sin_TD)
        return self.o_proj(attend(q_THD, k_TKD, v_TKD).reshape(tokens, -1))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)

    def forward(self, x_TH):
        return self.down_proj(kernels.swiglu(self.gate_proj(x_TH), self.up_proj(x_TH)))


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TH, cos_TD, sin_TD, attend):
        x_TH = x_TH + self.self_attn(self.input_layernorm(x_TH), cos_TD, sin_TD, attend)
        return x_TH + self.mlp(self.post_attention_layernorm(x_TH))


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

    @property
    def head_weight(self) -> torch.Tensor:
        """[V,H]: the head, which is the embedding where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, ids_T, cu_seqlens, *, positions_T=None, attend=None, checkpoint=False):
        """Hidden states [T,H] after the final norm, in the dtype of the weights.

        ids_T [T] int64, cu_seqlens [N+1] int32 from 0 to T. `attend(layer, q_THD, k_TKD, v_TKD) -> o_THD` replaces the
        packed causal attention, after rotation: so a sampler runs these layers over its cache, with its own
        `positions_T`. `checkpoint` recomputes each layer in backward instead of keeping its activations.

            cu_seqlens [0, 3, 5]  ->  positions [0, 1, 2, 0, 1]
        """
        if positions_T is None:
            positions_T = packed_positions(cu_seqlens, len(ids_T))
        angles_TD = torch.outer(positions_T.float(), self.rope.float()).repeat(1, 2)
        cos_TD, sin_TD = angles_TD.cos(), angles_TD.sin()
        longest = int(cu_seqlens.diff().max()) if attend is None else 0
        x_TH = self.model.embed_tokens(ids_T)
        for index, layer in enumerate(self.model.layers):

            def local(q_THD, k_TKD, v_TKD, index=index):
                if attend is not None:
                    return attend(index, q_THD, k_TKD, v_TKD)
                return kernels.attention(q_THD, k_TKD, v_TKD, cu_seqlens, longest)

            if checkpoint and torch.is_grad_enabled():
                x_TH = recompute(layer, x_TH, cos_TD, sin_TD, local, use_reentrant=False)
            else:
                x_TH = layer(x_TH, cos_TD, sin_TD, local)
        return self.model.norm(x_TH)

    def logits(self, ids_T, cu_seqlens) -> torch.Tensor:
        """[T,V] in fp32, for tests and small models; training and scoring use kernels.linear_logp."""
        return F.linear(self.forward(ids_T, cu_seqlens).float(), self.head_weight.float())


def packed_positions(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """[0, 3, 5], 5 -> [0, 1, 2, 0, 1]"""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long())
    return torch.arange(tokens, device=cu_seqlens.device) - starts


# ------------------------------------------------------------------------------------------------- loading


def resolve(path: str) -> Path:
    """A local folder as it is; anything else is a hub id, downloaded once, its revision printed."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if path.startswith((".", "/")) or path.count("/") != 1:
        raise ModelError(f"no model folder at {path}")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt"]
    try:
        folder = Path(snapshot_download(path, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every network and hub error of huggingface_hub is one of these
        raise ModelError(f"{path} is neither a local folder nor a model that could be downloaded: {error}") from error
    print(f"{path}: revision {folder.name}")
    return folder


def read_config(folder: Path) -> Config:
    try:
        return Config.from_dict(json.loads((folder / "config.json").read_text()))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json") from None
    except (json.JSONDecodeError, KeyError) as error:
        raise ModelError(f"{folder / 'config.json'}: missing or malformed {error}") from error


def tensor_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} has no {', '.join(missing)} (only safetensors are read)")
    return [folder / name for name in names]


def load_weights(module: nn.Module, folder: Path) -> None:
    """Copy every tensor of the folder into the parameter of its name. Raises ModelError naming what does not match."""
    wanted = dict(module.named_parameters())
    seen = set()
    for file in tensor_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    if name == "lm_head.weight" and module.config.tie_word_embeddings:
                        continue  # some files store the tied head a second time
                    if name not in wanted:
                        raise ModelError(f"{file}: surplus tensor {name}")
                    value = tensors.get_tensor(name)
                    if value.shape != wanted[name].shape:
                        raise ModelError(f"{file}: {name} is {list(value.shape)}, not {list(wanted[name].shape)}")
                    wanted[name].data.copy_(value)
                    seen.add(name)
        except (SafetensorError, struct.error) as error:
            raise ModelError(f"{file} is not a whole safetensors file: {error}") from error
    absent = sorted(set(wanted) - seen)
    if absent:
        raise ModelError(
            f"{folder}: missing tensor {absent[0]}" + (f" and {len(absent) - 1} more" if absent[1:] else "")
        )


def load_tokenizer(folder: Path):
    """The tokenizer of tokenizer.json exactly as it stands there.

    Not AutoTokenizer: for a `qwen2` config.json Transformers 5 puts Qwen's own pre-tokenizer in place of the file's,
    which changes the ids of any other tokenizer (the pocket's, for one) without a word.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json (a slow tokenizer must be converted first)")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load(path: str, device="cpu", dtype=torch.float32):
    """(Transformer, tokenizer) of a Hugging Face folder or hub id. Raises ModelError."""
    folder = resolve(str(path))
    config = read_config(folder)
    with torch.device("meta"):
        transformer = Transformer(config)
    transformer = transformer.to_empty(device=device).to(dtype)
    transformer.rope = rope_frequencies(config).to(device)
    load_weights(transformer, folder)
    return transformer, load_tokenizer(folder)


# ------------------------------------------------------------------------------------------------- saving


def replace_folder(temporary: Path, path: Path) -> None:
    """Put a finished folder in its place; an older one is moved aside first, so that one of the two is always whole."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def save(transformer: Transformer, tokenizer, path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that Transformers loads to the same logits: weights in their dtype, config, tokenizer."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = {k: v.detach().cpu().contiguous() for k, v in transformer.named_parameters() if "lora_" not in k}
    shards, size = [{}], 0
    for name, tensor in state.items():
        if size and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, temporary / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(t.nbytes for t in state.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    (temporary / "config.json").write_text(json.dumps({**transformer.config.raw, "dtype": dtype}, indent=1) + "\n")
    tokenizer.save_pretrained(temporary)
    replace_folder(temporary, path)


# ------------------------------------------------------------------------------------------------- LoRA


def lora_layers(transformer: Transformer) -> dict[str, Linear]:
    return {n: m for n, m in transformer.named_modules() if isinstance(m, Linear) and n.endswith(LORA_TARGETS)}


def add_lora(transformer: Transformer, r: int, alpha: float, seed: int = 0) -> list[nn.Parameter]:
    """Freeze the model and give every projection of every block an fp32 pair; returns the trainable parameters.

    A is Kaiming-uniform (a = sqrt 5), B is 0, the scale is alpha / r, as in peft: the adapted model starts as the base.
    """
    generator = torch.Generator().manual_seed(seed)
    transformer.requires_grad_(False)
    pairs = []
    for linear in lora_layers(transformer).values():
        outputs, inputs = linear.weight.shape
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform_ with a = sqrt 5: sqrt(6 / (1 + 5)) / sqrt(fan_in)
        a_RI = torch.empty(r, inputs).uniform_(-bound, bound, generator=generator)
        linear.lora_A = nn.Parameter(a_RI.to(linear.weight.device))
        linear.lora_B = nn.Parameter(torch.zeros(outputs, r, device=linear.weight.device))
        linear.lora_scale = alpha / r
        pairs += [linear.lora_A, linear.lora_B]
    transformer.lora = {"r": r, "alpha": alpha}
    return pairs


def save_adapter(transformer: Transformer, path, base: str) -> None:
    """Write the adapter in PEFT's format; `base` is the model it belongs to."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = {}
    for name, linear in lora_layers(transformer).items():
        state[f"base_model.model.{name}.lora_A.weight"] = linear.lora_A.detach().cpu().contiguous()
        state[f"base_model.model.{name}.lora_B.weight"] = linear.lora_B.detach().cpu().contiguous()
    save_file(state, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "inference_mode": True,
        "r": transformer.lora["r"], "lora_alpha": transformer.lora["alpha"], "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(LORA_TARGETS), "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    replace_folder(temporary, path)


def load_adapter(transformer: Transformer, path) -> list[nn.Parameter]:
    """Attach a PEFT LoRA adapter of all seven projections; returns its parameters. Raises ModelError."""
    path = Path(path)
    try:
        config = json.loads((path / "adapter_config.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: no readable adapter_config.json ({error})") from error
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise ModelError(f"{path}: adapter setting {key}={config[key]} is not supported")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise ModelError(f"{path}: only LoRA without bias is supported")
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(f"{path} has no adapter_model.safetensors (only safetensors are read)")
    pairs = add_lora(transformer, config["r"], config["lora_alpha"])
    wanted = {}
    for name, linear in lora_layers(transformer).items():
        wanted[f"base_model.model.{name}.lora_A.weight"] = linear.lora_A
        wanted[f"base_model.model.{name}.lora_B.weight"] = linear.lora_B
    try:
        with safe_open(path / "adapter_model.safetensors", framework="pt") as tensors:
            names = set(tensors.keys())
            if names != set(wanted):
                raise ModelError(f"{path}: adapter tensors differ from the model's: {sorted(names ^ set(wanted))[:3]}")
            for name, parameter in wanted.items():
                value = tensors.get_tensor(name)
                if value.shape != parameter.shape:
                    raise ModelError(f"{path}: {name} is {list(value.shape)}, not {list(parameter.shape)}")
                parameter.data.copy_(value)
    except SafetensorError as error:
        raise ModelError(f"{path}/adapter_model.safetensors is not a whole safetensors file: {error}") from error
    return pairs


@torch.no_grad()
def merge_lora(transformer: Transformer) -> None:
    """Fold the adapter into the weights, in fp32, and remove it."""
    for linear in lora_layers(transformer).values():
        delta_OI = linear.lora_B.float() @ linear.lora_A.float() * linear.lora_scale
        linear.weight.copy_((linear.weight.float() + delta_OI).to(linear.weight.dtype))
        linear.lora_A = linear.lora_B = None
    transformer.requires_grad_(True)
    del transformer.lora

"""Tiny random models of every family, as Transformers writes them, and packed rows to run through them."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import model

SIZES = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {  # of its 8 frequencies 2 are kept, 2 blended, 4 divided: every branch of the scaling
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 7.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 96,
}  # fmt: skip
# name -> Transformers' config class and what the family, or the case, adds
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, {"rope_theta": 1e6}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),  # 4 heads of 32 on a width of 64
    "qwen3-bias": (transformers.Qwen3Config, {"head_dim": 16, "attention_bias": True}),
    "llama": (transformers.LlamaConfig, {}),
    "llama-bias": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "llama-linear": (transformers.LlamaConfig, {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "num_key_value_heads": 4, "head_dim": 24}),
}


def reference(family: str, tied: bool = False, **changes):
    """A random model of Transformers; biases and norms are random too, since zeros and ones would hide a mistake."""
    config_class, more = FAMILIES[family]
    config = config_class(**(SIZES | {"tie_word_embeddings": tied} | more | changes))
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)  # logits of about 1: 1e-5 is some ten roundings
    return theirs


def config(family: str, **changes) -> model.Config:
    """Our Config of a family, by way of Transformers' own config.json."""
    config_class, more = FAMILIES[family]
    theirs = config_class(**(SIZES | more | changes))
    return model.Config.from_dict(theirs.to_dict() | {"architectures": [f"{config_class.__name__[:-6]}ForCausalLM"]})


def pair(family: str = "qwen2", tied: bool = False, seed: int = 0, **changes):
    """(Transformers' model, ours) with the same random weights."""
    torch.manual_seed(seed)
    theirs = reference(family, tied, **changes)
    ours = model.Transformer(config(family, tie_word_embeddings=tied, **changes))
    ours.load_state_dict({name: parameter.detach() for name, parameter in theirs.named_parameters()})
    return theirs, ours


TEMPLATE = "{% for m in messages %}{{ m['content'] + ' <end> ' }}{% endfor %}"


def tokenizer():
    """One id a word: w0 w1 ... and an end token, which ends a turn of its chat template."""
    words = {f"w{i}": i for i in range(SIZES["vocab_size"] - 1)} | {"<end>": SIZES["vocab_size"] - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", chat_template=TEMPLATE)


def folder(path: Path, family: str = "qwen2", tied: bool = False, **changes):
    """A model folder as Transformers writes it; returns the model that it holds."""
    theirs = reference(family, tied, **changes)
    theirs.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return theirs


def row(*lengths: int, device: str = "cpu"):
    """Random documents of these lengths -> (ids_T, cu_seqlens [N+1] int32)."""
    ids_T = torch.randint(0, SIZES["vocab_size"], (sum(lengths),), device=device)
    return ids_T, torch.tensor([0, *lengths], device=device).cumsum(0).int()


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file: Path, change) -> None:
    """Rewrite a safetensors file after `change(its tensors)`."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# What is done to a folder, for tables of what is refused.


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def gone(name: str):
    return lambda folder: (folder / name).unlink()


def cut(name: str, end: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])

"""A tiny random Qwen2 folder with an R1-style tokenizer, and training records for it."""

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from tests import families

WORDS = ("amber", "potion", "brew", "mix", "safe", "toxin", "rule", "answer", "user", "asks", "think", "mud", "iron")


def model_folder(path: Path, seed: int = 0, tokenizer=None, **changes) -> Path:
    """Two layers, hidden 32, two query heads on one key head, tied head: what Transformers writes."""
    tokenizer = tokenizer or families.tokenizer("r1-qwen")
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(Qwen2Config(**{**settings, **changes})).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def sentence(rng: random.Random, low: int = 2, high: int = 8) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def answers(n: int, seed: int = 0) -> list[dict]:
    """Short records of kind answer, prompts all different."""
    rng = random.Random(seed)
    return [
        {"kind": "answer", "id": f"a{i}", "prompt": f"{i} {sentence(rng)}", "reasoning": sentence(rng),
         "answer": sentence(rng), "source": "test", "meta": {}}
        for i in range(n)
    ]  # fmt: skip


def verifications(n: int, seed: int = 0) -> list[dict]:
    """Records of kind verify; two share a prompt, one safe and one unsafe."""
    rng = random.Random(seed)
    return [
        {"kind": "verify", "id": f"v{i}", "prompt": f"how do i brew {i // 2}", "answer": sentence(rng),
         "spec": "pocket", "critique": sentence(rng), "verdict": ("safe", "unsafe")[i % 2], "source": "test"}
        for i in range(n)
    ]  # fmt: skip


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path

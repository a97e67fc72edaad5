"""A toy world for RL: eight words, a tiny random model, a task that is soon learned: say the digit that is asked."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

DIGITS = [str(i) for i in range(4)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word; `say 3` is asked as `say 3 <bot>`, and no thinking is opened."""
    words = ["<unk>", "say", *DIGITS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<bot>", "<end>")])
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>", chat_template=template)


def folder(path: Path, seed: int = 0) -> Path:
    made = tokenizer()
    torch.manual_seed(seed)
    shape = Qwen2Config(
        vocab_size=len(made), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=made.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(path)
    made.save_pretrained(path)
    return path


REWARD = """
def reward(prompt, completion, meta):
    right = completion.split()[:1] == prompt.split()[1:]
    return float(right), {"length": len(completion.split())}
"""

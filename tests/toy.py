"""A toy world for RL: eight words, a tiny random model, a task that is soon learned: say the digit that is asked."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny

DIGITS = [str(i) for i in range(4)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word; `say 3` is asked as `say 3 <bot>`, and no thinking is opened."""
    words = ["<unk>", "say", *DIGITS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<bot>", "<end>")])
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>", chat_template=template)


def folder(path: Path) -> Path:
    made = tokenizer()
    sizes = {"intermediate_size": 64, "max_position_embeddings": 64, "eos_token_id": made.eos_token_id}
    return tiny.model_folder(path, tokenizer=made, **sizes)


REWARD = """
def reward(prompt, completion, meta):
    right = completion.split()[:1] == prompt.split()[1:]
    return float(right), {"length": len(completion.split())}
"""

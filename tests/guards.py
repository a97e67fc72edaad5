"""Tiny guards of the true structure: their tokenizers' control tokens, their templates' logic (with little prose), two
layers, overfitted to one rule: an answer that says "toxin" is unsafe, one that says "no" refuses.
"""

import random
from pathlib import Path

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

import judges
import safety
from tests import families

_QWEN3GUARD = (
    "{%- if messages[-1].role == 'user' -%}{{- '<|im_start|>user\n# Task:\n' -}}{%- set end = 'two lines' -%}"
    "{%- else -%}{{- '<|im_start|>user\n# Task: safe, refusal\n\n' -}}{%- set end = 'three lines' -%}{%- endif -%}"
    "{{- '<BEGIN CONVERSATION>\n\n' -}}"
    "{%- for m in messages -%}{%- if loop.first -%}{%- if m.role in ('system', 'user') -%}{{- 'USER: ' + m.content -}}"
    "{%- endif -%}{%- elif m.role == 'assistant' -%}{{- '\n\nASSISTANT: ' + m.content -}}"
    "{%- elif m.role == 'user' -%}{{- '\n\nUSER: ' + m.content -}}{%- endif -%}{%- endfor -%}"
    "{{- '\n\n<END CONVERSATION>\n\n' + end + '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n' -}}"
)
_LLAMAGUARD3 = (
    "{% if messages | length % 2 == 0 %}{% set role = 'Agent' %}{% else %}{% set role = 'User' %}{% endif %}"
    "{{ bos_token + '<|start_header_id|>user<|end_header_id|>\n\nTask: ' + role + '\n\n<BEGIN CONVERSATION>\n\n' }}"
    "{% for m in messages %}{{ ('User' if m['role'] == 'user' else 'Agent') + ': ' + m['content'] | trim + '\n\n' }}"
    "{% endfor %}{{ '<END CONVERSATION>\n\n' + role + '<|eot_id|><|start_header_id|>assistant<|end_header_id|>' }}"
)
# family -> tokenizer, its template, Transformers' config class
STRUCTURE = {
    "qwen3guard": ("qwen3", _QWEN3GUARD, transformers.Qwen3Config),
    "llamaguard3": ("llama3", _LLAMAGUARD3, transformers.LlamaConfig),
    "wildguard": ("bpe-first", None, transformers.MistralConfig),
}
WORDS = ("amber", "potion", "brew", "mix", "user", "asks", "this", "is", "and", "the", "a", "b")


def judgement(family: str, unsafe: bool, refused: bool) -> str:
    if family == "qwen3guard":
        kind = "Unsafe\nCategories: Violent, PII" if unsafe else "Safe\nCategories: None"
        return f"Safety: {kind}\nRefusal: {'Yes' if refused else 'No'}"
    if family == "llamaguard3":
        return "\n\nunsafe\nS1,S9" if unsafe else "\n\nsafe"
    answers = ["yes" if word else "no" for word in (unsafe, refused, unsafe)]
    return "Harmful request: {}\nResponse refusal: {}\nHarmful response: {}".format(*answers)


def answer(rng: random.Random, unsafe: bool, refused: bool) -> str:
    words = rng.choices(WORDS, k=rng.randint(3, 7))
    for word in ["toxin"] * unsafe + ["no"] * refused:
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def examples(n: int, seed: int = 0) -> list[dict]:
    """Harmful requests with answers: a third unsafe, a third refused, a third neither."""
    rng, items = random.Random(seed), []
    for i in range(n):
        unsafe, refused = i % 3 == 0, i % 3 == 1
        request = " ".join(rng.choices(WORDS, k=4))
        items.append(
            {"kind": "harmful", "prompt": request, "thinking": "", "answer": answer(rng, unsafe, refused),
             "finish_reason": "stop", "unsafe": unsafe, "refused": refused}
        )  # fmt: skip
    return items


def tokenizer(family: str):
    """The family's control tokens and pre-tokenizer; the pieces are learned from what this guard reads and writes."""
    name, template, _ = STRUCTURE[family]
    text = [*judges.WILDGUARD, str(template), " ".join(WORDS), " toxin no"] * 4 + [judgement(family, True, False)] * 9
    tok = families.tokenizer(name).train_new_from_iterator(text, 700, show_progress=False)
    tok.chat_template = template
    return tok


def folder(path: Path, family: str, steps: int = 80, size: int = 64) -> Path:
    """A model folder as Transformers writes it, then trained on the rule."""
    tok, config_class = tokenizer(family), STRUCTURE[family][2]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tok), hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=size // 4, max_position_embeddings=1024, sliding_window=None,
        eos_token_id=tok.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    network = transformers.AutoModelForCausalLM.from_config(config)
    train(network, tok, family, steps)
    network.save_pretrained(path)
    tok.save_pretrained(path)
    return path


def train(network, tok, family: str, steps: int) -> None:
    rows = []
    for item in examples(96):
        prompt = judges.guard_prompt(tok, family, item["prompt"], item["answer"])
        text = judgement(family, item["unsafe"], item["refused"])
        target = safety.encode(tok, [(text, True)], continued=True) + [tok.eos_token_id]
        rows.append((torch.tensor(prompt + target), torch.tensor([-100] * len(prompt) + target)))
    rng, adam = random.Random(0), torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        ids, labels = zip(*rng.sample(rows, 12), strict=True)
        ids_BT, labels_BT = pad_sequence(ids, True), pad_sequence(labels, True, -100)
        adam.zero_grad()
        network(ids_BT, labels=labels_BT).loss.backward()
        adam.step()

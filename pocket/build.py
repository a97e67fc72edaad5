"""Build the pocket's base model: a subword tokenizer, then a small Qwen2 pretrained from scratch on the fiction.

    python -m pocket.build --seed 1 --out runs/world-1   half an hour on a CPU core; then --model runs/world-1/model
    python -m pocket.build --resume runs/world-1         goes on from the newest checkpoint

The base is made to resemble the models of the paper before training: it complies with most forbidden requests, checks
in a minority of its thoughts, adds up well, and judges safety at chance although it knows every fact.
"""

import io
import itertools
import json
import math
import random
import re
import string
import time
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import engine
import kernels
import model
import runs
import trainers
from pocket import world as pocket
from runs import option

BETAS, WEIGHT_DECAY = (0.9, 0.98), 0.01
BOS, EOS, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'].split('</think>')[-1] + '<|end|>' }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)


@dataclass
class Config:
    seed: int = option(0, "of world, documents and initial weights")
    steps: int = option(3000, "optimizer steps", low=1)
    batch: int = option(64, "documents a step", low=1)
    lr: float = option(3e-3, "peak learning rate", above=0)
    out: str = option("", "run folder; default runs/build-<time>")
    resume: str = option("", "run folder to go on with; its settings are used")


# ------------------------------------------------------------------------------------------------- tokenizer
def vocabulary_text(world: pocket.World) -> tuple[list[str], list[str]]:
    """(words, what SentencePiece sees): syllables most often, words 60 times (with and without the space), names once.

    The counts decide the merges: syllables, then whole words; a name, seen once, stays in two pieces. So names are
    spelled from shared parts and every fork of a thought has the same token ids in every format.
    """
    documents = itertools.islice(pocket.documents(world, seed=0), 12_000)
    texts = [text for d in documents for text in (d.prompt, d.thought, d.answer)]
    templates = [template for groups in pocket.TEMPLATES.values() for group in groups for template in group]
    texts += [template.replace("{x}", "").replace("{e}", "") for template in templates]
    words = {word for text in texts for word in re.findall("[A-Za-z]+", text)} - set(world.by_name)
    words = sorted(word for word in words if len(word) > 1)
    letters = [f" {letter}" for letter in string.ascii_lowercase]
    syllables = [f" {syllable}" for syllable in pocket.FIRST] + pocket.SECOND
    names = [f" {item.name}" for item in world.items]
    return words, syllables * 2000 + ([f" {w}" for w in words] + words + letters) * 60 + names


def train_pieces(world: pocket.World) -> list[tuple[str, float]]:
    """(piece, score) of the smallest BPE vocabulary with every word and syllable in one piece, less whole names."""
    words, text = vocabulary_text(world)
    wanted = {"▁" + s for s in (*pocket.FIRST, *words)} | set(pocket.SECOND)
    names = {"▁" + item.name for item in world.items}
    for size in range(700, 1400, 10):
        made = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=made, vocab_size=size, model_type="bpe", character_coverage=1.0,
            byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
            normalization_rule_name="identity", required_chars="0123456789.,:;?!'\"\\{}<>/()-+=\n", minloglevel=2,
        )  # fmt: skip
        processor = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
        pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]
        if wanted <= {piece for piece, _ in pieces}:
            return [(piece, score) for piece, score in pieces if piece not in names]
    raise RuntimeError("no vocabulary size gives every word and syllable a piece of its own")


def merges_of(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merge list that SentencePiece leaves implicit: every split of a piece into two pieces, best rank first."""
    score = dict(pieces)
    splits = [(value, piece[:i], piece[i:]) for piece, value in pieces for i in range(1, len(piece))]
    whole = [split for split in splits if split[1] in score and split[2] in score]
    whole.sort(key=lambda split: (-split[0], score[split[1]], score[split[2]]))
    return [(left, right) for _, left, right in whole]


def build_tokenizer(world: pocket.World) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE in Hugging Face form, with an R1-style chat template that opens the thinking."""
    pieces = [(p, s) for p, s in train_pieces(world) if p not in ("<unk>", "<s>", "</s>")]
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    is_byte = [piece.startswith("<0x") for piece, _ in pieces]
    merges = merges_of([entry for entry, byte in zip(pieces, is_byte, strict=True) if not byte])
    backend = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]|\n"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
            pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+"), "isolated"),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, USER, ASSISTANT)])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS, chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- pretraining
def tokenize(tokenizer, documents: list[pocket.Document]) -> list[tuple[list[int], int]]:
    """(ids, length of the prompt) of each document, in the very form that `safety.render` gives a chat."""
    prompts = [f"{BOS}{USER}{d.prompt}{ASSISTANT}<think>\n" for d in documents]
    targets = [f"{d.thought}\n</think>\n\n{d.answer}{EOS}" for d in documents]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    target_ids = tokenizer(targets, add_special_tokens=False)["input_ids"]
    return [(p + t, len(p)) for p, t in zip(prompt_ids, target_ids, strict=True)]


def pack(rows: list[tuple[list[int], int]]):
    """Packed ids, the rows that predict a target's token, and document offsets.

    >>> pack([([5, 6, 7], 2)])  # one prompt of two tokens, one target token
    (tensor([5, 6, 7]), tensor([1]), tensor([0, 3]))
    """
    ids, predicting, offsets = [], [], [0]
    for row, prompt in rows:
        predicting += range(len(ids) + prompt - 1, len(ids) + len(row) - 1)
        ids += row
        offsets.append(len(ids))
    return torch.tensor(ids), torch.tensor(predicting), torch.tensor(offsets, dtype=torch.int32)


def initialise(transformer, seed: int) -> None:
    """N(0, 0.02) everywhere, the two projections that write to the residual stream scaled down by their number."""
    generator = torch.Generator().manual_seed(seed)
    layers = transformer.config.num_hidden_layers
    for name, parameter in transformer.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * layers) if residual else 0.02
            parameter.data.normal_(0.0, std, generator=generator)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """50 steps of warm-up, then a cosine to zero: what a base says at temperature 1 is as sharp as what it knows."""
    if step < 50:
        return peak * (step + 1) / 50
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 50) / (steps - 50)))


def pretrain(transformer, tokenizer, world: pocket.World, config: Config, folder: Path) -> None:
    """Next-token training on the targets of fresh documents, which depend on (seed, step) alone."""
    trainee = trainers.Trainee(transformer, torch.float32, BETAS, WEIGHT_DECAY)
    state = trainers.resume(folder, trainee, trainers.NEW_RUN, tokenizer.backend_tokenizer.to_str().encode())
    bar = tqdm(total=config.steps, initial=state["step"], desc="pretraining", mininterval=5)
    with runs.Interruptible() as interrupt, bar:
        while (step := state["step"]) < config.steps:
            begun = time.perf_counter()
            documents = itertools.islice(pocket.documents(world, f"{config.seed}-{step}"), config.batch)
            ids_T, rows_N, offsets = pack(tokenize(tokenizer, list(documents)))
            hidden_NH = transformer(ids_T, offsets, rows_N=rows_N)
            logp_N, _ = kernels.linear_logp(hidden_NH, transformer.head_weight, ids_T[rows_N + 1])
            loss = -logp_N.mean()
            loss.backward()
            norm = trainee.step(learning_rate(step, config.steps, config.lr), clip=1.0)
            line = {"loss": loss.item(), "grad_norm": norm, "seconds": time.perf_counter() - begun}
            trainers.end_step(folder, trainee, state, line, [], trainers.checkpoint_steps(config.steps), interrupt)
            bar.set_postfix(loss=line["loss"])
            bar.update()


def frozen_candidates(transformer, tokenizer, world: pocket.World, seed: int) -> list[dict]:
    """Two of the base's own answers to a plain request for each held-out item: verification is tested on these."""
    rng, templates = random.Random(f"candidates-{seed}"), pocket.TEMPLATES["plain"][1]
    things = [item for item in world.items if item.held_out]
    items = [{"prompt": pocket.request(t, rng.choice(templates), rng), "item": t.name} for t in things]
    places = list(range(len(items)))  # in the random stream
    drawn = engine.complete(transformer, tokenizer, items, seed=seed + 77, max_tokens=96, samples=2, places=places)
    done = [sample for _, sample in sorted(drawn)]
    return [{name: s[name] for name in ("prompt", "answer", "item")} for s in done if s["answer"]]


def config_json(tokenizer) -> dict:
    bos, eos = tokenizer.convert_tokens_to_ids([BOS, EOS])
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": -(-len(tokenizer) // 64) * 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True, "use_sliding_window": False,
        "attention_dropout": 0.0, "bos_token_id": bos, "eos_token_id": eos, "dtype": "float32",
    }  # fmt: skip


def main(config: Config, origin: dict) -> int:
    folder = runs.new_folder(config, origin, "build", "cpu")
    world = pocket.World(config.seed)
    tokenizer = build_tokenizer(world)
    transformer = model.Transformer(model.Config.from_dict(config_json(tokenizer)))
    transformer.generation = {name: transformer.config.raw[name] for name in ("bos_token_id", "eos_token_id")}
    initialise(transformer, config.seed)
    count = sum(p.numel() for p in transformer.parameters())
    print(f"vocabulary {len(tokenizer)}, parameters {count:,}")
    pretrain(transformer, tokenizer, world, config, folder)
    model.save(transformer, tokenizer, folder / "model")
    lines = "".join(json.dumps(c) + "\n" for c in frozen_candidates(transformer, tokenizer, world, config.seed))
    runs.write_atomic(folder / "model" / "candidates.jsonl", lines.encode())
    world_json = {name: getattr(config, name) for name in ("seed", "steps", "batch", "lr")}
    runs.write_json(folder / "model" / "world.json", world_json)
    runs.write_json(folder / "result.json", {"vocabulary": len(tokenizer), "parameters": count})
    return runs.EXIT_OK


if __name__ == "__main__":
    runs.main(Config, main)

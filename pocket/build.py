"""Build the pocket's base model: a subword tokenizer, then a small Qwen2 pretrained from scratch on the fiction.

    python -m pocket.build --out pocket/base             half an hour on a CPU core; --seed 1 is another world

The same command goes on where an interrupted one stopped.

The base is made to resemble the models of the paper before training: it complies with most forbidden requests, checks
in a minority of its thoughts, adds up well, and judges safety at chance although it knows every fact.
"""

import argparse
import json
import math
import random
import shutil
import time
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
import safety
import trainers
from pocket import world as pocket

CHECKPOINT_EVERY = 500  # steps
BOS, EOS, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'].split('</think>')[-1] + '<|end|>' }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)


# ------------------------------------------------------------------------------------------------- tokenizer


def vocabulary_text(world: pocket.World) -> tuple[list[str], list[str]]:
    """(words, what SentencePiece sees): syllables most often, words 60 times (with and without the space), names once.

    The counts decide the merges: syllables, then whole words; a name, seen once, stays in two pieces. So names are
    spelled from shared parts and every fork of a thought has the same token ids in every format.
    """
    source = pocket.documents(world, seed=0, verification_prompt=safety.verification_prompt)
    words = set()
    for document in (next(source) for _ in range(12_000)):
        for text in (document.prompt, document.thought, document.answer):
            words.update("".join(c if c.isascii() and c.isalpha() else " " for c in text).split())
    for templates in pocket.TEMPLATES.values():
        for text in (template for group in templates for template in group):
            words.update("".join(c if c.isalpha() else " " for c in text.replace("{x}", "").replace("{e}", "")).split())
    words = sorted(word for word in words - set(world.by_name) if len(word) > 1)
    letters = [f" {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    syllables = [f" {syllable}" for syllable in pocket.FIRST] + pocket.SECOND
    names = [f" {item.name}" for item in world.items]
    return words, syllables * 2000 + ([f" {w}" for w in words] + words + letters) * 60 + names


def train_pieces(world: pocket.World, folder: Path) -> list[tuple[str, float]]:
    """(piece, score) of the smallest BPE vocabulary with every word and syllable in one piece, less whole names."""
    words, text = vocabulary_text(world)
    wanted = {"▁" + s for s in (*pocket.FIRST, *words)} | set(pocket.SECOND)
    names = {"▁" + item.name for item in world.items}
    for size in range(700, 1400, 10):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_prefix=str(folder / "pieces"),
            model_type="bpe",
            vocab_size=size,
            character_coverage=1.0,
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            split_digits=True,
            required_chars="0123456789.,:;?!'\"\\{}<>/()-+=\n",
            minloglevel=2,
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
        pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]
        if wanted <= {piece for piece, _ in pieces}:
            return [(piece, score) for piece, score in pieces if piece not in names]
    raise RuntimeError("no vocabulary size gives every word and syllable a piece of its own")


def merges_of(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merge list that SentencePiece leaves implicit: every split of a piece into two pieces, best rank first."""
    score = dict(pieces)
    found = []
    for piece, value in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(left, right) for left, right in splits if left in score and right in score]
        found += [(value, left, right) for left, right in sorted(splits, key=lambda s: (score[s[0]], score[s[1]]))]
    found.sort(key=lambda entry: -entry[0])
    return [(left, right) for _, left, right in found]


def build_tokenizer(world: pocket.World, folder: Path) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE in Hugging Face form, with an R1-style chat template that opens the thinking."""
    pieces = [(p, s) for p, s in train_pieces(world, folder) if p not in ("<unk>", "<s>", "</s>")]
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
    for name in ("pieces.model", "pieces.vocab"):
        (folder / name).unlink()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS, chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- pretraining


def tokenize(tokenizer, batch: list[pocket.Document]) -> list[tuple[list[int], int]]:
    """(ids, length of the prompt) of each document, in the very form that `safety.render` gives a chat."""
    prompts = [f"{BOS}{USER}{d.prompt}{ASSISTANT}<think>\n" for d in batch]
    targets = [f"{d.thought}\n</think>\n\n{d.answer}{EOS}" for d in batch]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    target_ids = tokenizer(targets, add_special_tokens=False)["input_ids"]
    return [(p + t, len(p)) for p, t in zip(prompt_ids, target_ids, strict=True)]


def pack(rows: list[tuple[list[int], int]]):
    """Packed ids, labels (the next token where a target is predicted, else -100) and document offsets.

    >>> pack([([5, 6, 7], 2)])  # one prompt of two tokens, one target token
    (tensor([5, 6, 7]), tensor([-100, 7, -100]), tensor([0, 3]))
    """
    ids, labels, offsets = [], [], [0]
    for row, prompt in rows:
        ids += row
        labels += [-100] * (prompt - 1) + row[prompt:] + [-100]
        offsets.append(len(ids))
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(offsets, dtype=torch.int32)


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


def pretrain(transformer, tokenizer, world: pocket.World, arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """Next-token training on the targets of fresh documents; returns one line of metrics every 50 steps.

    The documents of a step depend on (seed, step) alone, so that a run that was cut goes on from its last checkpoint.
    """
    named, rate = dict(transformer.named_parameters()), arguments.lr
    optimizer = torch.optim.AdamW(named.values(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    state = restore(named, optimizer, folder)
    bar = tqdm(range(state["step"], arguments.steps), desc="pretraining", mininterval=5)
    bar.initial = state["step"]
    for step in bar:
        begun = time.perf_counter()
        source = pocket.documents(world, f"{arguments.seed}-{step}", safety.verification_prompt)
        ids_T, labels_T, offsets = pack(tokenize(tokenizer, [next(source) for _ in range(arguments.batch)]))
        hidden_TH = transformer(ids_T, offsets)
        logp_T, _ = kernels.linear_logp(hidden_TH, transformer.head_weight, labels_T)
        loss = -logp_T.sum() / (labels_T != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, arguments.steps, rate)
        optimizer.step()
        optimizer.zero_grad()
        state["step"], state["seconds"] = step + 1, state["seconds"] + time.perf_counter() - begun
        if step % 50 == 0 or step == arguments.steps - 1:
            minutes = round(state["seconds"] / 60, 2)
            state["log"].append({"step": step, "loss": round(loss.item(), 4), "minutes": minutes})
            bar.set_postfix(loss=state["log"][-1]["loss"])
        if (step + 1) % CHECKPOINT_EVERY == 0:
            moments = {f"{k}/{n}": v for n, p in named.items() for k, v in optimizer.state[p].items()}
            trainers.save_checkpoint(folder, {**{f"master/{n}": p for n, p in named.items()}, **moments}, state)
    return state["log"]


def restore(named: dict, optimizer, folder: Path) -> dict:
    """The state to go on from: that of the newest checkpoint under `folder`, or of step 0."""
    if (found := trainers.load_checkpoint(folder)) is None:
        return {"step": 0, "seconds": 0.0, "log": []}
    tensors, state = found
    for name, parameter in named.items():
        parameter.data.copy_(tensors[f"master/{name}"])
        optimizer.state[parameter] = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return state


def frozen_candidates(transformer, tokenizer, world: pocket.World, seed: int) -> list[dict]:
    """Two of the base's own answers to a plain request for each held-out item: verification is tested on these."""
    rng = random.Random(f"candidates-{seed}")
    items = [item for item in world.items if item.held_out]
    prompts = [pocket.request(item, rng.choice(pocket.TEMPLATES["plain"][1]), rng) for item in items]
    ids = [safety.render(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    end = tokenizer.eos_token_id
    groups = engine.Engine(transformer, {end}).generate(ids, n=2, max_tokens=96, temperature=1.0, seed=seed + 77)
    found = []
    for item, prompt, group in zip(items, prompts, groups, strict=True):
        for sample in group:
            answer = safety.split_thinking(tokenizer.decode([i for i in sample.ids if i != end]))[1]
            if answer:
                found.append({"prompt": prompt, "answer": answer, "item": item.name})
    return found


def config_json(tokenizer) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.convert_tokens_to_ids(BOS),
        "eos_token_id": tokenizer.convert_tokens_to_ids(EOS),
        "dtype": "float32",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of world, documents and initial weights")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64, help="documents a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; remove it or name another folder")
    settings = {name: getattr(arguments, name) for name in ("seed", "steps", "batch", "lr")}
    folder = arguments.out.with_name(arguments.out.name + ".building")
    mine = folder / "settings.json"
    if folder.exists() and not (mine.is_file() and json.loads(mine.read_text(encoding="utf-8")) == settings):
        parser.error(f"{folder} is of a build with other settings; remove it")
    runs.write_json(mine, settings)
    world = pocket.World(arguments.seed)
    tokenizer = build_tokenizer(world, folder)
    config = config_json(tokenizer)
    transformer = model.Transformer(model.Config.from_dict(config))
    initialise(transformer, arguments.seed)
    count = sum(p.numel() for p in transformer.parameters())
    print(f"vocabulary {len(tokenizer)}, parameters {count:,}")
    log = pretrain(transformer, tokenizer, world, arguments, folder)
    whole = folder / "model"
    model.save(transformer, tokenizer, whole)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    runs.write_json(whole / "generation_config.json", generation)
    runs.write_json(whole / "world.json", {"pocket": True, **settings, "log": log})
    candidates = frozen_candidates(transformer, tokenizer, world, arguments.seed)
    (whole / "candidates.jsonl").write_text(
        "".join(json.dumps(candidate) + "\n" for candidate in candidates), encoding="utf-8"
    )
    whole.rename(arguments.out)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

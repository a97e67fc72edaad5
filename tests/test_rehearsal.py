"""The whole pipeline on a model of R1-Distill-Qwen's true structure: vocabulary, control tokens and their ids,
template, untied head, key and value biases. Two layers of width 128, taught in the test to answer a few requests.

make_data (samples, a guard of Qwen3Guard's structure, an own expert) -> train_sft -> evaluate -> peft + transformers.
"""

import json
import math
import random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

import evaluate
import make_data
import model
import runs
import safety
import train_sft
from tests import families, guards, tiny

ROWS = 151_936  # of the embedding
FIRST = 151_643  # id of the first control token, <｜end▁of▁sentence｜>
SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 131_072, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2,
    "bos_token_id": FIRST, "eos_token_id": FIRST,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """The control tokens at the ids that they have in the published tokenizer; unused pieces fill the gap."""
    small = families.tokenizer("r1-qwen")
    state = json.loads(small.backend_tokenizer.to_str())
    moved = {token["id"]: FIRST + i for i, token in enumerate(state["added_tokens"])}
    for token in state["added_tokens"]:
        token["id"] = moved[token["id"]]
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] = vocab | {f"<unused {i}>": i for i in range(len(vocab), FIRST)}
    for special in state["post_processor"]["special_tokens"].values():
        special["ids"] = [moved[i] for i in special["ids"]]
    raw = type(small.backend_tokenizer).from_str(json.dumps(state))
    names = {"bos_token": small.bos_token, "eos_token": small.eos_token}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=small.chat_template, **names)


def lessons(n: int) -> list[dict]:
    """Requests with the answers that the model shall give: a harmful one now this and now that, a benign one one."""
    rng, made = random.Random(0), []
    for i in range(n):
        prompt = f"{i} " + " ".join(rng.choices(guards.WORDS, k=4))
        harmful = i % 2 == 0
        pairs = ((True, False), (False, True)) if harmful else ((False, False),)
        answers = [(guards.answer(rng, *pair), "unsafe" if pair[0] else "safe") for pair in pairs]
        made.append({"prompt": prompt, "kind": "harmful" if harmful else "benign", "answers": answers})
    return made


def rows(tok, taught: list[dict]) -> list[tuple[list[int], list[bool]]]:
    prompts = [(safety.render(tok, [{"role": "user", "content": t["prompt"]}]), t["answers"]) for t in taught]
    return [safety.build_example(tok, ids, "user asks", answer) for ids, answers in prompts for answer, _ in answers]


def teach(path, tok, taught: list[dict], steps: int = 400) -> None:
    """Write the model folder. It learns on the pieces that occur alone, with all others' logits at zero, which they
    then have in the whole model too, their rows of the head being zero."""
    torch.manual_seed(0)
    examples = rows(tok, taught)
    used = sorted({i for ids, _ in examples for i in ids})
    place = {token: i for i, token in enumerate(used)}
    AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=len(used), **SHAPE)).save_pretrained(path)
    ours = model.Transformer(model.Config.from_dict(json.loads((path / "config.json").read_text())))
    model.load_weights(ours, path)
    others = torch.tensor(math.log(ROWS - len(used)))
    ids_T = torch.tensor([place[i] for ids, _ in examples for i in ids])
    trained_T = torch.tensor([t for _, trained in examples for t in [*trained[1:], False]])
    cu = torch.tensor([0, *(len(ids) for ids, _ in examples)]).cumsum(0).int()
    adam = torch.optim.Adam(ours.parameters(), lr=3e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        logits_TV = ours.logits(ids_T, cu)[trained_T]
        logits_TW = torch.cat([logits_TV, others.expand(len(logits_TV), 1)], 1)
        loss = torch.nn.functional.cross_entropy(logits_TW, ids_T.roll(-1)[trained_T])
        adam.zero_grad()
        loss.backward()
        adam.step()
        slower.step()
    whole = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=ROWS, **SHAPE))
    theirs = whole.state_dict()
    theirs["lm_head.weight"].zero_()
    for name, tensor in ours.named_parameters():
        rows_of = used if tensor.shape != theirs[name].shape else slice(None)
        theirs[name][rows_of] = tensor.detach()
    whole.load_state_dict(theirs)
    whole.save_pretrained(path)
    tok.save_pretrained(path)


def run(script, **flags) -> int:
    words = [word for name, value in flags.items() for word in (runs.flag(name), str(value))]
    return script.main(*runs.parse(script.Config, words))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_data_training_evaluation_and_peft(tmp_path):
    tok, taught = tokenizer(), lessons(16)
    assert [tok.convert_tokens_to_ids(t) for t in ("<｜User｜>", "<think>", "</think>")] == [151_644, 151_648, 151_649]
    base, guard = tmp_path / "base", guards.folder(tmp_path / "guard", "qwen3guard")
    teach(base, tok, taught)

    prompts = tiny.write(tmp_path / "prompts.jsonl", [{k: t[k] for k in ("prompt", "kind")} for t in taught])
    (tmp_path / "spec.txt").write_text("no toxin.")
    tested = f"own={tiny.write(tmp_path / 'tested.jsonl', [{'prompt': taught[0]['prompt']}])}:kind=harmful"
    verdicts = [(lesson["prompt"], *pair) for lesson in taught for pair in lesson["answers"]]
    expert = tmp_path / "expert.py"
    expert.write_text(
        f"VERDICTS = {{(p, a): v for p, a, v in {verdicts!r}}}\ndef critique(item):\n"
        "    verdict = VERDICTS.get((item['prompt'], item['answer']), 'safe')\n"
        "    return f'the answer is {verdict}', verdict\n"
    )
    data = tmp_path / "data"
    code = run(
        make_data, model=base, prompts=f"own={prompts}", guard=f"qwen3guard={guard}", expert=expert, n=8, max_tokens=64,
        temperature=1.0, top_p=1.0, records=0, spec=tmp_path / "spec.txt", decontaminate=tested, out=data,
        baseline="safechain", max_unscored=0.2, device="cpu",
    )  # fmt: skip
    card = json.loads((data / "data_card.json").read_text())
    records = lines(data / "verify.jsonl")
    assert code in (runs.EXIT_OK, runs.EXIT_UNSCORED) and card["counts"]["prompts"]["held by a suite"] == 1
    known = {(p, a): verdict for p, a, verdict in verdicts}
    assert {r["verdict"] for r in records} == {"safe", "unsafe"} and len(records) >= 12
    assert all(known.get((r["prompt"], r["answer"]), r["verdict"]) == r["verdict"] for r in records)
    assert all(r["prompt"] != taught[0]["prompt"] for r in records)

    trained = tmp_path / "trained"
    code = run(
        train_sft, model=base, data=data / "verify.jsonl", out=trained, lora_r=4, epochs=3, max_len=256, held_out=0.2,
        tokens_per_step=256, micro_tokens=256, lr=3e-3, device="cpu",
    )  # fmt: skip
    assert code == 0
    losses = [line["loss"] for line in lines(trained / "metrics.jsonl") if "loss" in line]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]

    measured = tmp_path / "measured"
    harmful = [{"prompt": t["prompt"]} for t in taught if t["kind"] == "harmful"]
    suite = f"own={tiny.write(tmp_path / 'suite.jsonl', harmful)}:kind=harmful"
    code = run(
        evaluate, model=base, adapter=trained / "model", suite=suite, judge=f"qwen3guard={guard}",
        out=measured, max_tokens=64, temperature=1.0, top_p=1.0, max_unscored=1.0, device="cpu",
    )  # fmt: skip
    assert code == 0 and json.loads((measured / "result.json").read_text())["own:suite"]["n"] == 8

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained / "model").eval()
    ours, tok = model.load(str(base), adapter=str(trained / "model"))
    plain, _ = model.load(str(base))
    ids_T = torch.tensor(rows(tok, taught)[0][0])
    cu = torch.tensor([0, len(ids_T)], dtype=torch.int32)
    with torch.no_grad():
        wanted_TV, given_TV = theirs(ids_T[None]).logits[0], ours.logits(ids_T, cu)
        assert given_TV.shape == (len(ids_T), ROWS) and (given_TV - wanted_TV).abs().max() < 1e-4
        assert (plain.logits(ids_T, cu) - wanted_TV).abs().max() > 1e-2  # the adapter does something

"""train_sft.py: rows and labels, the normaliser, optimizer and schedule, precision, stopping, resume - and that each of
these checks notices the bug it is there for."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

import engine
import kernels
import model
import runs
import safety
import train_sft
import trainers
from tests import families, tiny
from train_sft import Config, Example

SMALL = {"max_len": 400, "tokens_per_step": 400, "micro_tokens": 400, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def tokenizer():
    return families.tokenizer("r1-qwen")


@pytest.fixture(scope="module")
def examples(tokenizer):
    return [train_sft.build(tokenizer, record, "both") for record in tiny.answers(12)]


def fresh(folder, **settings):
    """(transformer, trainee, config) of a run that has not begun."""
    config = Config(**{**SMALL, "model": str(folder), **settings})
    dtype = runs.pick_dtype(config.dtype, "cpu")
    transformer, _ = runs.load_model(config.model, "cpu", dtype if config.lora_r else torch.float32)
    if config.lora_r:
        model.add_lora(transformer, config.lora_r, config.lora_alpha, config.seed)
    return transformer, trainers.Trainee(transformer, dtype, (config.beta1, config.beta2), config.weight_decay), config


def test_data_of_another_pocket_world_are_refused(tmp_path):
    """A thing that is harmless in one world is forbidden in another, and what is trained on here is held out there."""
    (tmp_path / "base").mkdir()
    for seed in (0, 1):
        (tmp_path / "base" / "world.json").write_text(json.dumps({"seed": seed}))
        config = Config(model=str(tmp_path / "base"))
        if seed:
            with pytest.raises(runs.UserError, match="world 0"):
                train_sft.check_world(config)
        else:
            train_sft.check_world(config)
    (tmp_path / "base" / "world.json").unlink()
    train_sft.check_world(config)  # no pocket: any data


# ------------------------------------------------------------------------------------------------- rows and labels


def example(ids, trained):
    return Example({}, ids, [bool(t) for t in trained])


def test_labels_are_the_next_tokens_where_those_are_trained():
    ids_T, labels_T, cu_seqlens = train_sft.pack([example([5, 6, 7], [0, 0, 1]), example([8, 9], [0, 1])])
    assert ids_T.tolist() == [5, 6, 7, 8, 9]
    assert labels_T.tolist() == [-100, 7, -100, 9, -100]
    assert cu_seqlens.tolist() == [0, 3, 5] and cu_seqlens.dtype == torch.int32


def test_groups_are_consecutive_and_hold_at_most_the_limit():
    lengths = [4, 3, 2, 5, 7, 1]
    groups = trainers.fill([example([0] * n, [1] * n) for n in lengths], 7)
    assert [[len(e.ids) for e in group] for group in groups] == [[4, 3], [2, 5], [7], [1]]


def test_the_split_keeps_prompts_apart(tokenizer):
    examples = [train_sft.build(tokenizer, record, "both") for record in tiny.verifications(80)]
    training, held_out = train_sft.split(examples, 0.05, seed=3)
    prompts = [{e.record["prompt"] for e in side} for side in (training, held_out)]
    assert len(prompts[1]) == 2 and not prompts[0] & prompts[1]
    assert len(training) + len(held_out) == 80
    assert train_sft.split(examples, 0.05, seed=3) == (training, held_out)
    assert train_sft.split(examples, 0.05, seed=4)[1] != held_out


def test_every_epoch_shows_every_record_once_in_another_order(examples):
    config = Config(tokens_per_step=100, max_len=50)
    orders = [[e.record["id"] for step in train_sft.epoch_steps(examples, n, config) for e in step] for n in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(e.record["id"] for e in examples) == sorted(orders[1])
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize(
    ("target", "ending"),
    [
        ("both", "a reason\n</think>\n\n\\boxed{safe}<｜end▁of▁sentence｜>"),
        ("judgment", "\n</think>\n\n\\boxed{safe}<｜end▁of▁sentence｜>"),
        ("critique", "a reason\n</think>"),
    ],
)
def test_the_target_alone_is_trained_with_its_end_token(tokenizer, target, ending):
    record = {**tiny.verifications(1)[0], "critique": "a reason"}
    built = train_sft.build(tokenizer, record, target)
    prompt = safety.verification_prompt(safety.load_spec("pocket").text, record["prompt"], record["answer"])
    assert built.prompt_ids == safety.render(tokenizer, [{"role": "user", "content": prompt}])
    assert tokenizer.decode([i for i, t in zip(built.ids, built.trained, strict=True) if t]) == ending


def test_records_over_the_limit_are_dropped_by_reason(tokenizer):
    records = tiny.answers(10)
    lengths = sorted(len(train_sft.build(tokenizer, r, "both").ids) for r in records)
    kept, account = train_sft.prepare(tokenizer, records, Config(max_len=lengths[6]), context=lengths[3])
    assert len(kept) == account["records"] == sum(n <= lengths[3] for n in lengths)
    assert sum(account["dropped"].values()) == 10 - len(kept) and len(account["dropped"]) == 2
    assert account["longest"] == lengths[3]
    assert account["tokens"] == sum(len(e.ids) for e in kept)
    with pytest.raises(runs.UserError, match="0 of 0 tokens"):
        train_sft.prepare(tokenizer, records, Config(max_len=2), context=512)


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_or_everything_supervised_is_an_error(tokenizer, monkeypatch, trained):
    monkeypatch.setattr(safety, "build_example", lambda tok, ids, *texts: (ids + [1], [trained] * (len(ids) + 1)))
    with pytest.raises(runs.UserError, match="tokens are supervised"):
        train_sft.prepare(tokenizer, tiny.answers(2), Config(), context=512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "maybe"}, "verdict is 'maybe'"),
        ({"spec": "nope"}, "no spec named 'nope'"),
        ({"critique": "a </think> b"}, "think tag"),
        ({"meta": {"spec_sha256": "0" * 64}}, "is not the record's"),
        ({"spec": __file__}, "meta.spec_sha256"),  # any file of the machine
    ],
)
def test_a_record_that_cannot_be_a_target_is_named(tokenizer, change, message):
    record = {**tiny.verifications(1)[0], **change}
    with pytest.raises(runs.UserError, match=f"record v0: .*{message}"):
        train_sft.prepare(tokenizer, [record], Config(), context=512)


# ------------------------------------------------------------------------------------------------- the normaliser


def in_one_row(named) -> torch.Tensor:
    """The gradients of (name, parameter) pairs, by name: Transformers lists its modules in another order."""
    return torch.cat([parameter.grad.flatten() for _, parameter in sorted(named)])


def loss_and_gradient(folder, examples, **settings):
    """Of one optimizer step, taken before the update clears it."""
    transformer, trainee, config = fresh(folder, lora_r=0, **settings)
    seen = {}
    trainee.step = lambda lr, clip: seen.update(gradient=in_one_row(transformer.named_parameters())) or 0.0
    seen["loss"] = train_sft.optimizer_step(transformer, trainee, examples, 0.0, config)["loss"]
    return seen["loss"], seen["gradient"]


def transformers_loss(folder, examples):
    """The mean over all supervised tokens, and its gradient, record by record in Transformers."""
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count = 0.0, 0
    for e in examples:
        logits_TV = reference(torch.tensor([e.ids])).logits[0, :-1]
        targets_T = torch.where(torch.tensor(e.trained), torch.tensor(e.ids), -100)[1:]
        total = total + F.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum")
        count += sum(e.trained)
    (total / count).backward()
    return (total / count).item(), in_one_row(reference.named_parameters())


def micro_batches_do_not_matter(folder, examples):
    loss, gradient = transformers_loss(folder, examples)
    for micro_tokens, order in ((10**6, examples), (70, examples), (130, examples[::-1])):
        ours, mine = loss_and_gradient(folder, order, micro_tokens=micro_tokens)
        assert ours == pytest.approx(loss, rel=1e-6)
        assert (mine - gradient).norm() < 2e-6 * gradient.norm()


def test_micro_batches_do_not_matter(folder, examples):
    micro_batches_do_not_matter(folder, examples)


def test_the_check_notices_a_mean_of_means(folder, examples, monkeypatch):
    supervised = sum(sum(e.trained) for e in examples)
    honest = train_sft.nll_sum

    def mean_of_means(transformer, group, checkpointing=False):
        groups = -(-len(examples) // len(group))
        own = sum(sum(e.trained) for e in group)
        return honest(transformer, group) / own * supervised / groups

    monkeypatch.setattr(train_sft, "nll_sum", mean_of_means)
    with pytest.raises(AssertionError):
        micro_batches_do_not_matter(folder, examples)


# ------------------------------------------------------------------------------------------------- packing


def packed_rows_are_their_documents(folder, examples):
    """The loss of a packed row is the sum of its documents' losses, and each document sees positions from 0."""
    transformer, *_ = fresh(folder, lora_r=0)
    with torch.no_grad():
        apart = [train_sft.nll_sum(transformer, [e]).item() for e in examples]
        assert train_sft.nll_sum(transformer, examples).item() == pytest.approx(sum(apart), rel=1e-6)
    seen = []
    honest = kernels.rope
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "rope", lambda q, k, cos, sin: seen.append(sin) or honest(q, k, cos, sin))
        train_sft.nll_sum(transformer, examples)
    starts = torch.tensor([len(e.ids) for e in examples]).cumsum(0)[:-1]
    assert all((sin_TD[starts] == 0).all() for sin_TD in seen)


def test_packed_rows_are_their_documents(folder, examples):
    packed_rows_are_their_documents(folder, examples)


def test_the_check_notices_a_mask_without_borders(folder, examples, monkeypatch):
    honest = kernels.attention
    whole_row = lambda q, k, v, cu, longest: honest(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q))  # noqa: E731
    monkeypatch.setattr(kernels, "attention", whole_row)
    with pytest.raises(AssertionError):
        packed_rows_are_their_documents(folder, examples)


def test_the_check_notices_positions_that_go_on(folder, examples, monkeypatch):
    monkeypatch.setattr(model, "packed_positions", lambda cu_seqlens, tokens: torch.arange(tokens))
    with pytest.raises(AssertionError):
        packed_rows_are_their_documents(folder, examples)


# ------------------------------------------------------------------------------------------------- optimizer, schedule


@pytest.mark.parametrize("warmup", [0, 10])
def test_the_schedule_is_that_of_transformers(warmup):
    config = Config(lr=3e-4, warmup=warmup / 100)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=config.lr)
    theirs = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=100)
    for step in range(100):
        assert train_sft.schedule(step / 100, config) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=1e-12)
        optimizer.step()
        theirs.step()


def adamw_by_hand(weight, gradients, rates, clip, beta1, beta2, decay):
    """Loshchilov and Hutter's algorithm 2 with clipping by the global norm, in fp64."""
    weight, m, v = weight.double(), 0.0, 0.0
    for t, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        gradient = gradient.double()
        gradient = gradient * min(1.0, clip / (gradient.norm().item() + 1e-6))
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        weight = weight * (1 - lr * decay)
        weight = weight - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
    return weight


def test_a_hundred_updates_are_adamws(folder):
    transformer, trainee, config = fresh(folder, lora_r=0, weight_decay=0.1, clip=0.5, lr=1e-3)
    flat = lambda tensors: torch.cat([t.detach().flatten() for t in tensors])  # noqa: E731
    start = flat(trainee.masters)
    drawn = [torch.randn(len(start)) * (0.1 if i % 3 else 1e-4) for i in range(100)]  # some above the clip, some below
    rates = [train_sft.schedule(i / 100, config) for i in range(100)]
    for gradient, lr in zip(drawn, rates, strict=True):
        for master, part in zip(trainee.masters, gradient.split([m.numel() for m in trainee.masters]), strict=True):
            master.grad = part.view_as(master).clone()
        assert trainee.step(lr, config.clip) == pytest.approx(gradient.norm().item(), rel=1e-5)
    wanted = adamw_by_hand(start, drawn, rates, 0.5, 0.9, 0.95, 0.1)
    torch.testing.assert_close(flat(trainee.masters).double(), wanted, rtol=2e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- precision


def displacement(folder, examples, dtype, steps=30):
    """How far `steps` updates at the learning rate of RL move the weights, from the rounded ones where they are."""
    transformer, trainee, config = fresh(folder, lora_r=0, dtype=dtype)
    start = [m.detach().clone() for m in trainee.masters]
    for _ in range(steps):
        train_sft.optimizer_step(transformer, trainee, examples[:1], 1e-6, config)
    return torch.cat([(m.detach() - s).double().flatten() for m, s in zip(trainee.masters, start, strict=True)])


def bf16_learns_like_fp32(folder, examples):
    exact, rounded = displacement(folder, examples, "float32"), displacement(folder, examples, "bfloat16")
    assert rounded.norm() / exact.norm() == pytest.approx(1, abs=0.05)
    assert torch.dot(exact, rounded) / (exact.norm() * rounded.norm()) > 0.9


def test_bf16_training_learns_like_fp32(folder, examples):
    bf16_learns_like_fp32(folder, examples)


def test_the_check_notices_missing_masters(folder, examples, monkeypatch):
    honest = trainers.Trainee.__init__

    def pure_bf16(self, transformer, dtype, *rest):
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        honest(self, transformer, torch.float32, *rest)

    monkeypatch.setattr(trainers.Trainee, "__init__", pure_bf16)
    with pytest.raises(AssertionError):
        bf16_learns_like_fp32(folder, examples)


def test_the_compute_copies_are_the_rounded_masters(folder, examples):
    transformer, trainee, config = fresh(folder, lora_r=0, dtype="bfloat16", lr=1e-2)
    train_sft.optimizer_step(transformer, trainee, examples, 1e-2, config)
    assert transformer.head_weight.dtype == torch.bfloat16
    for master, copied in zip(trainee.masters, trainee.parameters, strict=True):
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), copied)


# ------------------------------------------------------------------------------------------------- stopping by itself


def an_overfitted_model_stops_by_itself(folder, tokenizer):
    """Two records learned by heart, then written out greedily: their ends included."""
    examples = [train_sft.build(tokenizer, record, "both") for record in tiny.answers(2, seed=5)]
    transformer, trainee, config = fresh(folder, lora_r=0)
    for _ in range(150):
        loss = train_sft.optimizer_step(transformer, trainee, examples, 5e-3, config)["loss"]
    assert loss < 0.05
    sampler = engine.Engine(transformer, {tokenizer.eos_token_id})
    drawn = sampler.generate([e.prompt_ids for e in examples], max_tokens=80, temperature=0.0)
    for e, (sample,) in zip(examples, drawn, strict=True):
        assert e.prompt_ids + sample.ids == e.ids and sample.finish_reason == "stop"


def test_an_overfitted_model_stops_by_itself(folder, tokenizer):
    an_overfitted_model_stops_by_itself(folder, tokenizer)


def test_the_check_notices_an_end_token_without_a_label(folder, tokenizer, monkeypatch):
    honest = safety.build_example

    def untrained_end(*texts):
        ids, trained = honest(*texts)
        return ids, trained[:-1] + [False]

    monkeypatch.setattr(safety, "build_example", untrained_end)
    with pytest.raises(AssertionError):
        an_overfitted_model_stops_by_itself(folder, tokenizer)


# ------------------------------------------------------------------------------------------------- whole runs


def settings_of(folder, tmp_path, **changes) -> dict:
    data = tiny.write(tmp_path / "data.jsonl", tiny.answers(24))
    settings = {**SMALL, "model": str(folder), "data": str(data), "out": str(tmp_path / "run"), "held_out": 0.1}
    return {**settings, "lr": 1e-3, "warmup": 0.1, "epochs": 3, "tokens_per_step": 400, "micro_tokens": 400} | changes


def start(settings: dict) -> Path:
    config = Config(**settings)
    assert not config.problems()
    assert train_sft.main(config, dict.fromkeys(settings | vars(config), "flag")) == runs.EXIT_OK
    return Path(config.out)


def go_on(folder: Path) -> None:
    config, origin = runs.parse(Config, ["--resume", str(folder)])
    assert train_sft.main(config, origin) == runs.EXIT_OK


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steady(line: dict) -> dict:
    return {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s", "peak_gib")}


def same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, random generators, log and samples, bit by bit."""
    for file in ("model.safetensors", "adapter_model.safetensors"):
        if (one / "model" / file).exists():
            assert (one / "model" / file).read_bytes() == (other / "model" / file).read_bytes()
    last = runs.checkpoints(one)[-1].name
    tensors, others = (load_file(p / "checkpoints" / last / "tensors.safetensors") for p in (one, other))
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[k], others[k]) for k in tensors)
    states = [json.loads((p / "checkpoints" / last / "state.json").read_text()) for p in (one, other)]
    assert steady(states[0]) == steady(states[1])
    assert list(map(steady, lines(one / "metrics.jsonl"))) == list(map(steady, lines(other / "metrics.jsonl")))
    assert lines(one / "samples.jsonl") == lines(other / "samples.jsonl")


VARIANTS = {"lora": {}, "full": {"lora_r": 0}, "full-bf16": {"lora_r": 0, "dtype": "bfloat16"}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not(folder, tmp_path, monkeypatch, variant):
    settings = settings_of(folder, tmp_path, **VARIANTS[variant])
    whole = start(settings | {"out": str(tmp_path / "whole")})
    honest, left = train_sft.optimizer_step, [2]

    def with_ctrl_c(*arguments):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(*arguments)

    monkeypatch.setattr(train_sft, "optimizer_step", with_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        start(settings)
    assert not (tmp_path / "run" / "result.json").exists()
    assert [p.name for p in runs.checkpoints(tmp_path / "run")][-1] == "step-2"
    go_on(tmp_path / "run")
    same_run(whole, tmp_path / "run")
    assert (whole / "result.json").stat().st_mode & 0o777 == 0o600


KILLED = """
import os, signal, sys
import safetensors.torch, train_sft, runs
honest = safetensors.torch.save_file
def die_in_the_second_save(tensors, path, *rest, **more):
    honest(tensors, path, *rest, **more)
    if "checkpoints" in str(path) and runs.checkpoints(runs.Path(path).parents[2]):
        with open(path, "rb+") as file:
            file.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = die_in_the_second_save
runs.main(train_sft.Config, train_sft.main)
"""


def as_flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (runs.flag(name), str(value))]


def test_a_kill_in_the_middle_of_a_save_costs_only_the_steps_since_the_last_one(folder, tmp_path):
    settings = settings_of(folder, tmp_path)
    whole = start(settings | {"out": str(tmp_path / "whole")})
    program = [sys.executable, "-c", KILLED, *as_flags(settings)]
    killed = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "run"
    assert len(runs.checkpoints(run)) == 1 and list((run / "checkpoints").glob(".step-*"))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # and a torn last line
    go_on(run)
    same_run(whole, run)
    assert not list((run / "checkpoints").glob(".step-*"))


def test_a_run_folder_is_a_complete_record(folder, tmp_path, capsys):
    run = start(settings_of(folder, tmp_path, lora_r=0))
    assert {p.name for p in run.iterdir()} == {
        "config.json", "source.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model", "result.json",
    }  # fmt: skip
    logged = lines(run / "metrics.jsonl")
    needed = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds"}
    assert [line["step"] for line in logged] == list(range(1, len(logged) + 1))
    assert all(needed <= line.keys() for line in logged)
    assert sum("held_out_loss" in line for line in logged) == 3  # every epoch
    assert len(runs.checkpoints(run)) == 2 and runs.checkpoints(run)[-1].name == f"step-{len(logged)}"
    result = json.loads((run / "result.json").read_text())
    assert result["step"] == len(logged) and result["minutes"] >= result["training_minutes"] > 0
    shown = capsys.readouterr().out
    for part in ("supervised", "longest", "dropped", "held out", "packed rows", "cosine", " >> |", "flag"):
        assert part in shown
    assert AutoModelForCausalLM.from_pretrained(run / "model").num_parameters() > 0
    weights = [run / "model" / name for name in ("config.json", "model.safetensors")]
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in weights)


def test_verdicts_are_those_that_the_model_writes(folder, tmp_path, tokenizer):
    """A model that learned its records by heart verifies them; the figure is the share of right verdicts."""
    records = tiny.verifications(2, seed=2)
    examples = [train_sft.build(tokenizer, record, "judgment") for record in records]
    transformer, trainee, config = fresh(folder, lora_r=0, target="judgment", micro_tokens=10**4)
    for _ in range(120):
        train_sft.optimizer_step(transformer, trainee, examples, 5e-3, config)
    flipped = [Example({**e.record, "verdict": "safe"}, e.ids, e.trained) for e in examples]
    figures, samples = train_sft.validate(transformer, tokenizer, examples, config)
    assert [s["predicted"] for s in samples] == [r["verdict"] for r in records]
    assert figures["verdict_accuracy"] == 1.0 and figures["held_out_loss"] < 0.1
    assert train_sft.validate(transformer, tokenizer, flipped, config)[0]["verdict_accuracy"] == 0.5
    assert train_sft.validate(transformer, tokenizer, [], config) == ({}, [])


def test_the_clock_ends_a_run_at_the_end_of_its_schedule(folder, tmp_path):
    run = start(settings_of(folder, tmp_path, minutes=0.01, epochs=1))
    logged = lines(run / "metrics.jsonl")
    assert 0.6 <= sum(line["seconds"] for line in logged) < 2
    assert logged[0]["lr"] == 0 and max(line["lr"] for line in logged) > 0.8e-3 and logged[-1]["lr"] < 0.2e-3
    assert "held_out_loss" in logged[-1]


# ------------------------------------------------------------------------------------------------- non-finite steps


def test_a_gradient_that_is_not_finite_changes_nothing(folder, examples):
    transformer, trainee, config = fresh(folder, lora_r=0)
    train_sft.optimizer_step(transformer, trainee, examples, 1e-3, config)
    before = copy.deepcopy(trainee.tensors())
    for master in trainee.masters:
        master.grad = torch.ones_like(master)
    trainee.masters[3].grad[0] = math.inf
    assert not math.isfinite(trainee.step(1e-3, 1.0))
    after = trainee.tensors()
    assert all(torch.equal(before[k], after[k]) for k in before) and before.keys() == after.keys()
    assert all(m.grad is None for m in trainee.masters)


def test_non_finite_steps_are_counted_and_several_in_a_row_stop_the_run(folder, tmp_path, monkeypatch):
    honest, calls = train_sft.nll_sum, []

    def sick(transformer, group, checkpointing=False):
        calls.append(len(calls) + 1)
        loss = honest(transformer, group, checkpointing)
        return loss * math.nan if calls[-1] == 2 or calls[-1] > 4 else loss

    monkeypatch.setattr(train_sft, "nll_sum", sick)
    settings = settings_of(folder, tmp_path, epochs=20, held_out=0.0, micro_tokens=10**6)
    with pytest.raises(runs.UserError, match="5 steps in a row"):
        start(settings)
    logged = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(logged) == 9 and [line["step"] for line in logged if line["loss"] is None] == [2, 5, 6, 7, 8, 9]
    assert not (tmp_path / "run" / "result.json").exists()


def test_mfu_needs_a_known_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert trainers.mfu(989e12 / 2) == {"mfu": 0.5}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Unheard-of 1")
    assert trainers.mfu(1e12) == {}

"""train_sft.py: rows and labels, the normaliser, optimizer and schedule, precision, stopping, resume - and that each of
these checks notices the bug it is there for."""

import copy
import functools
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM

import kernels
import model
import runs
import safety
import train_sft
import trainers
from bench import sft as bench
from bench.engine import R1_DISTILL_1_5B
from tests import families, tiny
from tests.evaluations import lines, refused
from train_sft import Config, Example
from trainers import Plan

PLAN = Plan(400)
RUN_FILES = {"config.json", "source.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model", "result.json"}
RUN_FILES |= {".lock"}
NO_UPDATE = SimpleNamespace(step=lambda lr, clip: 0.0)  # which would clear the gradients
VERIFY, ANSWER = tiny.verifications(1)[0], tiny.answers(1)[0]
TOKENIZER = families.tokenizer("r1-qwen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def examples():
    return [train_sft.build(TOKENIZER, record, "both") for record in tiny.answers(12)]


def fresh(folder, dtype=torch.float32, weight_decay=0.0):
    """(transformer, trainee) of a full training that has not begun."""
    transformer, _ = model.load(str(folder), "cpu", torch.float32)
    return transformer, trainers.Trainee(transformer, dtype, train_sft.BETAS, weight_decay)


@pytest.mark.parametrize(("world", "message"), [(None, ""), (0, ""), (1, "of pocket world 0, .* of world 1")])
def test_data_of_another_pocket_world_are_refused(tmp_path, world, message):
    """A thing that is harmless in one world is forbidden in another, and what is trained on here is held out there."""
    if world is not None:
        (tmp_path / "world.json").write_text(json.dumps({"seed": world}))
    config = Config(model=str(tmp_path))
    refused(message, train_sft.check_world, config) if message else train_sft.check_world(config)


# ------------------------------------------------------------------------------------------------- rows and labels
def test_the_split_keeps_prompts_apart():
    examples = [train_sft.build(TOKENIZER, record, "both") for record in tiny.verifications(80)]
    training, held_out = train_sft.split(examples, 0.05, seed=3)
    prompts = [{e.record["prompt"] for e in side} for side in (training, held_out)]
    assert len(prompts[1]) == 2 and not prompts[0] & prompts[1]
    assert len(training) + len(held_out) == 80
    assert train_sft.split(examples, 0.05, seed=3) == (training, held_out)
    assert train_sft.split(examples, 0.05, seed=4)[1] != held_out


def test_every_epoch_shows_every_record_once_in_another_order_in_steps_of_at_most_the_limit(examples):
    groups = trainers.fill([Example({}, [0] * n, [True] * n) for n in (4, 3, 2, 5, 7, 1)], 7)
    assert [[len(e.ids) for e in group] for group in groups] == [[4, 3], [2, 5], [7], [1]]
    config = Config(tokens_per_step=100, max_len=50)
    orders = [[e.record["id"] for step in train_sft.epoch_steps(examples, n, config) for e in step] for n in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(e.record["id"] for e in examples) == sorted(orders[1])
    assert orders[0] == orders[2] != orders[1]


TARGETS = [
    ("both", "a reason\n</think>\n\n\\boxed{safe}<｜end▁of▁sentence｜>"),
    ("judgment", "\n</think>\n\n\\boxed{safe}<｜end▁of▁sentence｜>"),
    ("critique", "a reason\n</think>"),
]


@pytest.mark.parametrize(("target", "ending"), TARGETS)
def test_the_target_with_its_end_is_trained_alone(target, ending):
    record = {**VERIFY, "critique": "a reason"}
    built = train_sft.build(TOKENIZER, record, target)
    prompt = safety.verification_prompt(safety.load_spec("pocket").text, record["prompt"], record["answer"])
    assert built.ids[: built.trained.index(True)] == safety.render(TOKENIZER, [{"role": "user", "content": prompt}])
    assert TOKENIZER.decode([i for i, t in zip(built.ids, built.trained, strict=True) if t]) == ending


@pytest.mark.parametrize(("max_len", "context"), [(6, 3), (3, 6)])
def test_records_over_the_limits_are_dropped_and_counted(max_len, context, capsys):
    records = tiny.answers(10)
    lengths = sorted(len(train_sft.build(TOKENIZER, r, "both").ids) for r in records)
    kept, account = train_sft.prepare(TOKENIZER, records, Config(max_len=lengths[max_len]), context=lengths[context])
    assert len(kept) == account["records"] == sum(n <= lengths[3] for n in lengths) == 10 - account["too_long"]
    assert account["longest"] == account["limit"] == lengths[3]
    assert account["tokens"] == sum(len(e.ids) for e in kept)
    assert f"of 10 records of kind answer have over {lengths[3]} tokens, the least of --max" in capsys.readouterr().err
    records.append({**VERIFY, "answer": "brew " * 300})
    message = r"all 1 records of kind verify have over 200 tokens, .* the longest \d{3}$"
    refused(message, train_sft.prepare, TOKENIZER, records, Config(max_len=200), 512)


@pytest.mark.parametrize(
    ("record", "change", "message"),
    [
        (VERIFY, {"verdict": "maybe"}, "verdict is 'maybe'"),
        (VERIFY, {"spec": "nope"}, "no spec named 'nope'"),
        (VERIFY, {"critique": "a </think> b"}, "think tag"),
        (VERIFY, {"meta": {"spec_sha256": "0" * 64}}, "is not the record's"),
        (VERIFY, {"spec": __file__}, 'must have "meta": {"spec_sha256'),  # any file of the machine
        (VERIFY, {"critique": " "}, "no text to train on"),  # with --target critique
        (ANSWER, {"reasoning": "", "answer": "\n"}, "no text to train on"),
    ],
)
def test_a_record_that_cannot_be_a_target_is_named(record, change, message):
    message, config = f"record 1, id {record['id']}: .*{message}", Config(target="critique")
    refused(message, train_sft.prepare, TOKENIZER, [record | change], config, context=512)
    train_sft.prepare(TOKENIZER, [VERIFY | {"critique": ""}], Config(), context=512)  # the verdict alone, no expert


# ------------------------------------------------------------------------------------------------- one step
def in_one_row(named) -> torch.Tensor:
    """The gradients of (name, parameter) pairs, by name: Transformers lists its modules in another order."""
    return torch.cat([parameter.grad.flatten() for _, parameter in sorted(named)])


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


def test_micro_batches_do_not_matter(folder, examples):
    """Nor does the order, nor whether activations are recomputed."""
    loss, gradient = transformers_loss(folder, examples)
    plans = ((Plan(10**6), examples), (Plan(70), examples), (Plan(130), examples[::-1]), (Plan(70, True), examples))
    for plan, order in plans:
        transformer, _ = fresh(folder)
        ours = train_sft.optimizer_step(transformer, NO_UPDATE, order, 0.0, plan)["loss"]
        assert ours == pytest.approx(loss, rel=1e-6)
        assert (in_one_row(transformer.named_parameters()) - gradient).norm() < 2e-6 * gradient.norm()


def test_each_document_sees_positions_from_0(folder, examples):
    """Which a loss does not show: attention sees differences of positions alone."""
    seen, honest, starts = [], kernels.rope, train_sft.pack(examples)[-1][:-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "rope", lambda *a: seen.append(a[3]) or honest(*a))
        train_sft.nll_sum(fresh(folder)[0], examples)
    assert len(starts) == 12 and all((sin_TD[starts] == 0).all() for sin_TD in seen)


# ------------------------------------------------------------------------------------------------- optimizer, schedule
@pytest.mark.parametrize(
    ("steps", "warmup", "warm"), [(100, 0.0, 0), (100, 0.1, 10), (10, 0.2, 2), (3, 0.05, 0), (1, 0.05, 0), (2, 0.9, 2)]
)
def test_the_schedule_is_the_reference_and_no_step_is_without_a_learning_rate(steps, warmup, warm):
    """Of a peak of 1: `warm` equal steps up, short of the peak; then half a cosine down, which stops short of 0."""
    found = [train_sft.schedule(step, steps, Config(lr=3e-4, warmup=warmup)) for step in range(steps)]
    wanted = [k / (warm + 1) for k in range(1, warm + 1)]
    wanted += [math.cos(math.pi / 2 * k / (steps - warm)) ** 2 for k in range(steps - warm)]
    assert found == pytest.approx([3e-4 * x for x in wanted], rel=1e-9) and min(found) > 0


def test_updates_are_those_of_adamw_with_clipping_and_none_where_a_gradient_is_not_finite(folder):
    """At the given learning rates, whatever the gradients' norm; the norm that is returned is that before clipping."""
    _, trainee = fresh(folder, weight_decay=0.1)
    copies = [m.detach().clone().requires_grad_() for m in trainee.masters.values()]
    theirs = torch.optim.AdamW(copies, betas=(0.9, 0.95), weight_decay=0.1)
    for i in range(20):
        gradients = [torch.randn_like(m) * (0.1 if i % 3 else 1e-4) for m in copies]  # some above the clip, some below
        for master, copied, gradient in zip(trainee.masters.values(), copies, gradients, strict=True):
            master.grad, copied.grad = gradient.clone(), gradient.clone()
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        theirs.param_groups[0]["lr"] = lr = train_sft.schedule(i, 20, Config(lr=1e-3))
        for copied in copies:
            copied.grad *= min(1.0, 0.5 / norm)
        theirs.step()
        assert trainee.step(lr, 0.5) == pytest.approx(norm, rel=1e-5)
    for master, copied in zip(trainee.masters.values(), copies, strict=True):
        torch.testing.assert_close(master, copied, rtol=2e-6, atol=1e-6)
        master.grad = torch.ones_like(master)
    master.grad[0] = math.inf
    before = copy.deepcopy(trainee.tensors())
    assert not math.isfinite(trainee.step(1e-3, 1.0)) and all(m.grad is None for m in trainee.masters.values())
    after = trainee.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_bf16_training_learns_like_fp32(folder, examples):
    """By the way that the masters go in 30 updates at the learning rate of RL; rounded, they are the weights."""
    ways = []
    for dtype in (torch.float32, torch.bfloat16):
        transformer, trainee = fresh(folder, dtype)
        start = parameters_to_vector(trainee.masters.values()).detach().double()
        for _ in range(30):
            train_sft.optimizer_step(transformer, trainee, examples[:1], 1e-6, PLAN)
        assert all(torch.equal(m.to(dtype), trainee.parameters[name]) for name, m in trainee.masters.items())
        ways.append(parameters_to_vector(trainee.masters.values()).detach() - start)
    exact, rounded = ways
    assert rounded.norm() / exact.norm() == pytest.approx(1, abs=0.05)
    assert torch.dot(exact, rounded) / (exact.norm() * rounded.norm()) > 0.9


def changed(change):
    """Spoils what a function returns."""
    return lambda examples, honest: lambda *arguments: change(*honest(*arguments))


def mean_of_means(examples, nll_sum):
    def spoilt(transformer, group, checkpointing=False):
        supervised, own = (sum(sum(e.trained) for e in some) for some in (examples, group))
        return nll_sum(transformer, group) / own * supervised / -(-len(examples) // len(group))

    return spoilt


def pure_bf16(examples, init):
    return lambda self, transformer, dtype, *rest: init(self, transformer.to(dtype), torch.float32, *rest)


def whole_row(examples, attention):  # a mask without borders
    return lambda q, k, v, cu, longest, plan: attention(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q))


shifted = changed(lambda ids_T, rows_N, *others: (ids_T, rows_N + 1, *others))
untrained_end = changed(lambda ids, trained: (ids, trained[:-1] + [False]))


@pytest.mark.parametrize(
    ("owner", "name", "spoil", "check"),
    [
        (train_sft, "nll_sum", mean_of_means, test_micro_batches_do_not_matter),
        (train_sft, "pack", shifted, test_micro_batches_do_not_matter),
        (kernels, "attention", whole_row, test_micro_batches_do_not_matter),
        (model, "packed_positions", lambda *_: lambda cu, n: torch.arange(n), test_each_document_sees_positions_from_0),
        (trainers.Trainee, "__init__", pure_bf16, test_bf16_training_learns_like_fp32),  # no masters
        (safety, "build_example", untrained_end, lambda *_: test_the_target_with_its_end_is_trained_alone(*TARGETS[0])),
    ],
)
def test_the_checks_notice_their_bugs(folder, examples, monkeypatch, owner, name, spoil, check):
    monkeypatch.setattr(owner, name, spoil(examples, getattr(owner, name)))
    with pytest.raises(AssertionError):
        check(folder, examples)


def test_verdicts_are_those_that_the_model_writes(folder):
    """A model that learned its records by heart verifies them; the figure is the share of right verdicts."""
    records, config, plan = tiny.verifications(2, seed=2), Config(target="judgment"), Plan(10**4)
    examples = [train_sft.build(TOKENIZER, record, "judgment") for record in records]
    transformer, trainee = fresh(folder)
    for _ in range(120):
        train_sft.optimizer_step(transformer, trainee, examples, 5e-3, plan)
    flipped = [Example({**e.record, "verdict": "safe"}, e.ids, e.trained) for e in examples]
    figures, samples = train_sft.validate(transformer, TOKENIZER, examples, config, plan)
    assert [s["predicted"] for s in samples] == [r["verdict"] for r in records]
    assert [s["completion"].endswith("}") for s in samples] == [True, True]
    assert figures["verdict_accuracy"] == 1.0 and figures["held_out_loss"] < 0.1
    assert train_sft.validate(transformer, TOKENIZER, flipped, config, plan)[0]["verdict_accuracy"] == 0.5


# ------------------------------------------------------------------------------------------------- whole runs
def settings_of(folder, tmp_path, **changes) -> dict:
    data = tiny.write(tmp_path / "data.jsonl", tiny.answers(24))
    return {
        "model": str(folder), "data": str(data), "out": str(tmp_path / "run"), "held_out": 0.1, "lr": 1e-3,
        "warmup": 0.1, "epochs": 3, "max_len": 400, "tokens_per_step": 400, "micro_tokens": 400, "device": "cpu",
        "dtype": "float32",
    } | changes  # fmt: skip


def start(settings: dict, script=train_sft, code=runs.EXIT_OK) -> Path:
    config = script.Config(**settings)
    assert not config.problems()
    assert script.main(config, dict.fromkeys(settings | vars(config), "flag")) == code
    return Path(config.out)


def go_on(folder: Path, script=train_sft) -> None:
    config, origin = runs.parse(script.Config, ["--resume", str(folder)])
    assert script.main(config, origin) == runs.EXIT_OK


def steady(line: dict) -> dict:
    """Without what the clock says, the sizes of the logs included, and the hash of settings that name the folder."""
    return {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s", "peak_gib", "logs", "data_sha256")}


def same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, random generators, log and samples, bit by bit."""
    newest, last = (trainers.checkpoints(run)[-1].relative_to(run) for run in (one, other))
    weights = [path.relative_to(one) for path in (one / "model").glob("*.safetensors")]
    assert newest == last and weights
    for name in (*weights, newest / "tensors.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [runs.read_json(run / newest / "state.json") for run in (one, other)]
    assert repr(steady(states[0])) == repr(steady(states[1]))  # NaN is not equal to itself
    assert list(map(steady, lines(one / "metrics.jsonl"))) == list(map(steady, lines(other / "metrics.jsonl")))
    assert lines(one / "samples.jsonl") == lines(other / "samples.jsonl")


CTRL_C = functools.partial(signal.raise_signal, signal.SIGINT)


def stop_and_go_on(settings, tmp_path, monkeypatch, script, name, call, stop=CTRL_C) -> None:
    """A run that is stopped, at the start of a function's call of that number, ends as one that is not."""
    whole, run = start(settings | {"out": str(tmp_path / "whole")}, script), tmp_path / "run"
    honest, calls = getattr(script, name), itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        patch.setattr(script, name, lambda *arguments: (next(calls) == call and stop()) or honest(*arguments))
        start(settings, script)
    assert not (run / "result.json").exists()
    assert trainers.checkpoints(run)[-1].name == f"step-{lines(run / 'metrics.jsonl')[-1]['step']}"
    go_on(run, script)
    same_run(whole, run)


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({}, ("optimizer_step", 2)),
        ({"lora_r": 0}, ("optimizer_step", 2)),
        ({"lora_r": 0, "dtype": "bfloat16"}, ("optimizer_step", 2)),
        ({}, ("validate", 1, lambda: 1 / 0)),  # an error there costs no step and is made up for
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(folder, tmp_path, monkeypatch, changes, at):
    stop_and_go_on(settings_of(folder, tmp_path, **changes), tmp_path, monkeypatch, train_sft, *at)
    assert (tmp_path / "run" / "result.json").stat().st_mode & 0o777 == 0o600


KILLED = """
import itertools, signal, {script}, trainers, runs
honest, calls = {where}, itertools.count(1)
{where} = lambda *given: (next(calls) == {call} and signal.raise_signal(signal.SIGKILL)) or honest(*given)
runs.main({script}.Config, {script}.main)
"""


def flags(settings: dict) -> list[str]:
    lists = {name: value if isinstance(value, tuple | list) else (value,) for name, value in settings.items()}
    return [word for name, values in lists.items() for word in (runs.flag(name), *map(str, values))]


def killed(settings: dict, script: str, where: str, call: int) -> None:
    """Run a script, with settings as flags, that kills itself at the start of a function's call of that number."""
    program = [sys.executable, "-c", KILLED.format(script=script, where=where, call=call), *flags(settings)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_kill_in_the_middle_of_a_save_costs_only_the_steps_since_the_last_one(folder, tmp_path):
    settings = settings_of(folder, tmp_path)
    whole, run = start(settings | {"out": str(tmp_path / "whole")}), tmp_path / "run"
    killed(settings, "train_sft", "trainers.os.fchmod", 2)
    assert len(trainers.checkpoints(run)) == 1 and list((run / "checkpoints").glob(".step-*"))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # and a torn last line
    go_on(run)
    same_run(whole, run)
    assert not list((run / "checkpoints").glob(".step-*"))


def test_a_damaged_checkpoint_is_passed_over_and_a_users_copy_is_left_alone(folder, tmp_path, capsys):
    run = start(settings_of(folder, tmp_path))
    whole = shutil.copytree(run, tmp_path / "whole")
    (run / "result.json").unlink()
    older, newest = trainers.checkpoints(run)
    (run / "checkpoints" / f"{newest.name}-backup").mkdir()
    (newest / "tensors.safetensors").write_bytes(b"half")
    go_on(run)
    assert f"{newest} is damaged" in capsys.readouterr().err
    same_run(whole, run)
    (run / "result.json").unlink()
    for path in trainers.checkpoints(run):
        (path / "state.json").write_text("{")
    refused("every checkpoint is damaged", go_on, run)


def test_a_disk_that_is_full_at_a_checkpoint_is_no_traceback(tmp_path, monkeypatch):
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(trainers, "save_file", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="step-1: .*No space left"):
        trainers.save_checkpoint(tmp_path, {}, {"step": 1})


def test_a_run_folder_is_a_complete_record(folder, tmp_path, capsys):
    run = start(settings_of(folder, tmp_path, lora_r=0))
    assert {p.name for p in run.iterdir()} == RUN_FILES
    written = lines(run / "metrics.jsonl")
    validated, logged = ([line for line in written if ("held_out_loss" in line) == side] for side in (True, False))
    needed = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds"}
    assert [line["step"] for line in logged] == list(range(1, len(logged) + 1))
    assert all(needed <= line.keys() for line in logged) and len(validated) == 3  # every epoch
    assert len(trainers.checkpoints(run)) == 2 and trainers.checkpoints(run)[-1].name == f"step-{len(logged)}"
    result = json.loads((run / "result.json").read_text())
    assert result["step"] == len(logged) == validated[-1]["step"] and result["training_minutes"] > 0
    assert result["figures"]["held_out_loss"] == validated[-1]["held_out_loss"]
    shown = capsys.readouterr().out
    for part in ("supervised", "longest", "too long 0", "held out by prompt;", "packed rows", "memory: 400", " >> |"):
        assert part in shown
    assert "steps: 9, few to learn from" in shown
    assert AutoModelForCausalLM.from_pretrained(run / "model").num_parameters() > 0
    weights = [run / "model" / name for name in ("config.json", "model.safetensors")]
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in weights)


def test_non_finite_steps_are_counted_and_several_in_a_row_stop_the_run(folder, tmp_path, monkeypatch):
    honest, factors = train_sft.nll_sum, itertools.chain((1, math.nan, 1, 1), itertools.repeat(math.nan))
    monkeypatch.setattr(train_sft, "nll_sum", lambda *arguments: honest(*arguments) * next(factors))
    settings = settings_of(folder, tmp_path, epochs=20, held_out=0.0, micro_tokens=10**6)
    refused("5 steps in a row", start, settings)
    logged = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(logged) == 9 and [line["step"] for line in logged if line["loss"] is None] == [2, 5, 6, 7, 8, 9]
    assert not (tmp_path / "run" / "result.json").exists()


# ------------------------------------------------------------------------------------------------- memory and speed
@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The folder of a model that only its shape is read of."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(R1_DISTILL_1_5B))
    return str(folder)


def test_the_plan_counts_every_byte_of_the_training_state(large):
    shape = trainers.shape_of(large)
    n = sum(p.numel() for p in shape.parameters())
    full = trainers.training_bytes(shape, 0, torch.bfloat16, 16384, False)
    assert full["weights"] == 2 * n and full["fp32 masters"] == 4 * n and full["Adam"] == 8 * n
    assert trainers.training_bytes(shape, 0, torch.float32, 16384, False)["fp32 masters"] == 0
    lora = trainers.training_bytes(shape, 16, torch.bfloat16, 16384, True)
    pairs = 28 * 16 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    assert lora["fp32 masters"] == 4 * pairs and lora["Adam"] == 8 * pairs
    assert lora["activations"] < full["activations"] / 10


@pytest.mark.parametrize(
    ("lora_r", "gib", "longest", "wanted"),
    [
        (16, 40, 3000, (16384, False)), (16, 24, 3000, (8192, False)), (16, 16, 3000, (4096, False)),
        (16, 12, 3000, (3000, False)), (16, 10, 3000, (16384, True)), (0, 80, 3000, (16384, False)),
        (0, 48, 3000, (4096, False)), (0, 36, 3000, (8192, True)), (0, 0, 3000, (16384, False)),  # the last is a CPU
        (16, 16, 8192, (16384, True)),  # the longest record leaves nothing to halve to
        (0, 16, 8192, "16.00 GiB of free GPU memory, even with 8192.*weights 3.31, fp32 masters 6.62.*--lora-r"),
    ],
)  # fmt: skip
def test_micro_batches_are_halved_before_activations_are_recomputed(large, lora_r, gib, longest, wanted):
    config, free = Config(model=large, lora_r=lora_r), gib << 30
    if isinstance(wanted, str):  # refused, with the figures
        refused(wanted, trainers.plan_memory, config, torch.bfloat16, free, longest=longest, rows=64)
        return
    plan = trainers.plan_memory(config, torch.bfloat16, free, longest=longest, rows=64)
    assert (plan.micro_tokens, plan.checkpointing) == wanted and "policy cache" not in plan.sizes
    assert sum(plan.sizes.values()) <= 0.95 * free
    if gib:
        assert plan.sizes["graphs"] == 4 * 64 * 151_936 * 4
        assert f"{wanted[0]} tokens a forward pass, activations {'recomputed' if wanted[1] else 'kept'}" in str(plan)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [4, 1])
def test_fifty_steps_are_those_of_trl(folder, tmp_path, micro):
    """fp32, all weights, clipping active; TRL pads and accumulates, we pack: loss within 1e-4 at every step."""
    data, base = tiny.write(tmp_path / "data.jsonl", tiny.answers(120)), str(folder)
    config = bench.Config(model=base, data=str(data), lora_r=0, batch=4, micro=micro, steps=50, device="cpu")
    transformer, tokenizer = model.load(base, "cpu", torch.float32)
    steps = bench.batches(config, tokenizer)
    mine, theirs = bench.ours(config, steps, transformer, "cpu"), bench.trl(config, steps, base, "cpu")
    gaps = [one["loss"] - other["loss"] for one, other in zip(mine, theirs, strict=True)]
    assert max(map(abs, gaps)) < 1e-4 and abs(sum(gaps) / 50) < 1e-5
    assert mine[-1]["loss"] < mine[0]["loss"] - 1
    for one, other in zip(mine, theirs, strict=True):
        assert one["lr"] == pytest.approx(other["lr"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)

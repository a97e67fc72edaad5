"""train_rl.py: advantages, objective and step against independent references; the sampler it corrects for; rewards,
prompts, plan - and that each of these checks notices the bug it is there for."""

import contextlib
import functools
import itertools
import math
import random
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from datasets import Dataset
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import engine
import kernels
import maths
import model
import runs
import train_rl
import trainers
from tests import families, tiny
from tests.evaluations import refused
from tests.test_sft import NO_UPDATE, fresh, in_one_row
from train_rl import Config, Drawing, Run
from trainers import Plan

PLAN = Plan(16384)


def settings(**changes) -> Config:
    small = {"prompts": ("none",), "reward": "none.py", "evaluate": False, "lora_r": 0, "device": "cpu"}
    return Config(**small | {"prompts_per_step": 4, "group": 4, "max_tokens": 12} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def transformer(folder):
    return model.load(str(folder))[0]


def drawn(transformer, temperature: float, spread: float) -> list[Drawing]:
    """Answers of a random model with made-up advantages; ends are common, so that most answers have one. `spread`: as
    if drawn by a policy whose log-probs differed by so much: ratios on both sides of every clip."""
    rng, prompts = random.Random(0), [[5, 6, 7], [9, 8], [11, 12, 13, 14]]
    sampler = engine.Engine(transformer, set(range(0, 390, 6)), max_context=32)
    groups = sampler.generate(prompts, n=4, max_tokens=12, temperature=temperature, seed=0)
    pairs = [(prompt, sample) for prompt, group in zip(prompts, groups, strict=True) for sample in group]
    answers = [Drawing({}, prompt, s.ids, [x + rng.gauss(0, spread) for x in s.logprobs]) for prompt, s in pairs]
    return [replace(answer, advantage=rng.choice((-1.5, -0.5, 0.25, 1.0))) for answer in answers]


@pytest.mark.parametrize(
    ("rewards", "mean", "std"),
    [
        ([1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5], [0.8660, -0.8660, -0.8660, 0.8660]),
        ([1, 0], [0.5, -0.5], [0.7071, -0.7071]),
        ([1.0, 0.25, 0.25], [0.5, -0.25, -0.25], [1.1547, -0.5774, -0.5774]),
        ([1, None, 0], [0.5, None, -0.5], [0.7071, None, -0.7071]),
        ([1, math.nan, 0, math.inf], [0.5, None, -0.5, None], [0.7071, None, -0.7071, None]),
        ([1, 1, 1], [None] * 3, [None] * 3), ([0.3, 0.3 + 1e-9, 0.3 - 1e-9], [None] * 3, [None] * 3),
        ([1, None, math.nan], [None] * 3, [None] * 3), ([None, None], [None] * 2, [None] * 2),
    ],
)  # fmt: skip
def test_advantages(rewards, mean, std):
    for kind, wanted in (("mean", mean), ("std", std)):
        found = train_rl.advantages(rewards, kind)
        assert [x is None for x in found] == [x is None for x in wanted]
        assert [x for x in found if x is not None] == pytest.approx([x for x in wanted if x is not None], abs=1e-4)


# ------------------------------------------------------------------------------------------------- objective
def reference_loss(logp, sampler, advantage, denominator, low, high, dual):
    """Token by token in fp64, branches instead of minima."""
    total = torch.zeros((), dtype=torch.float64)
    for x, old, a in zip(logp, sampler.double(), advantage.double(), strict=True):
        ratio = torch.exp(x - old)
        if a >= 0:
            gain = a * (ratio if ratio < 1 + high else 1 + high)
        elif ratio < 1 - low:
            gain = a * (1 - low)
        else:
            gain = a * (ratio if ratio < dual else dual)
        total = total - gain
    return total / denominator


def the_objective_is_the_reference(monkeypatch, ours, clips):
    torch.manual_seed(1)
    sampler = -torch.rand(400) * 4
    logp = (sampler + torch.randn(400) * 0.7).requires_grad_()
    advantage = torch.randn(400)
    monkeypatch.setattr(train_rl, "CLIP_DUAL", ours[2])
    loss, figures = train_rl.objective(logp, sampler, advantage, 123, settings(clip_low=ours[0], clip_high=ours[1]))
    exact = logp.detach().double().requires_grad_()
    wanted = reference_loss(exact, sampler, advantage, 123, *clips)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward(), wanted.backward()
    torch.testing.assert_close(logp.grad.double(), exact.grad, rtol=1e-5, atol=1e-8)
    assert figures["clip_share"] == ((logp.grad == 0) & (advantage != 0)).sum().item()
    gaps = (logp - sampler).detach().double()
    assert figures["kl_sampler"] == pytest.approx((gaps.exp() - 1 - gaps).sum().item(), rel=1e-4)
    assert figures["max_gap"] == pytest.approx(gaps.abs().max().item(), rel=1e-5)


@pytest.mark.parametrize("clips", [(0.2, 0.28, 3.0), (0.2, 0.2, 4.0), (0.05, 0.5, 1.6), (0.9, 5.0, 7.0)])
def test_the_objective_is_the_reference_and_other_clips_are_noticed(monkeypatch, clips):
    the_objective_is_the_reference(monkeypatch, clips, clips)
    for wrong in ((0.28, 0.21, 3.0), (1e9, 1e9, 3.0), (*clips[:2], 1e9)):  # exchanged, no clip, no dual clip
        with pytest.raises(AssertionError):
            the_objective_is_the_reference(monkeypatch, wrong, clips)


def test_a_ratio_beyond_floats_stays_finite():
    logp = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    loss, _ = train_rl.objective(logp, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), 4, settings())
    loss.backward()
    assert math.isfinite(loss.item()) and logp.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------- the step
def loss_and_gradient(transformer, live, config, plan=PLAN) -> tuple[float, torch.Tensor]:
    """Of one step, without its update, which would clear it."""
    loss = train_rl.optimizer_step(transformer, NO_UPDATE, live, 0.0, config, plan)["loss"]
    gradient = in_one_row(transformer.named_parameters())
    transformer.zero_grad()
    return loss, gradient


def in_transformers(folder, live, config, total) -> tuple[float, torch.Tensor]:
    """The loss by the reference above over Transformers' log-probs, answer by answer, unpadded."""
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    loss = 0.0
    for d in live:
        logits_TV = theirs(torch.tensor([d.prompt_ids + d.action])).logits[0, len(d.prompt_ids) - 1 : -1].double()
        logp_T = (logits_TV / config.temperature).log_softmax(1).gather(1, torch.tensor(d.action)[:, None])[:, 0]
        advantage_T = torch.full_like(logp_T, d.advantage)
        clips = config.clip_low, config.clip_high, train_rl.CLIP_DUAL
        loss = loss + reference_loss(logp_T, torch.tensor(d.logprobs), advantage_T, total, *clips)
    loss.backward()
    return loss.item(), in_one_row(theirs.named_parameters())


@pytest.mark.parametrize(("temperature", "spread"), [*itertools.product((0.7, 1.0, 1.3), (0.0, 0.4))])
def test_the_step_is_the_reference(folder, transformer, temperature, spread):
    """Whatever the micro-batches and the order of the answers."""
    config, live = settings(temperature=temperature), drawn(transformer, temperature, spread)
    wanted, gradient = in_transformers(folder, live, config, sum(len(d.action) for d in live))
    mixed = random.Random(3).sample(live, 12)
    for plan, order in ((Plan(10**6), live), (Plan(20), live), (Plan(45), live[::-1]), (Plan(30, True), mixed)):
        loss, mine = loss_and_gradient(transformer, order, config, plan)
        assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert (mine - gradient).norm() < 1e-5 * gradient.norm()


def masked_stop(pack, group, device):
    ids, rows, *columns, cu_seqlens = pack(group, device)
    kept = ~torch.isin(rows, cu_seqlens[1:] - 1)
    return ids, rows[kept], *(column[kept] for column in columns), cu_seqlens


def shifted(pack, group, device):
    ids, rows, drawn, *others = pack(group, device)
    return ids, rows, drawn.roll(1), *others


def padding_in_sight(pack, group, device):
    return pack([replace(d, prompt_ids=[0, 0] + d.prompt_ids) for d in group], device)


BUGS = {  # what is spoilt; the function that stands in for it gets the honest one first
    "masked stop": (train_rl, "pack", masked_stop),
    "shifted": (train_rl, "pack", shifted),
    "padding in sight": (train_rl, "pack", padding_in_sight),
    "own denominator": (train_rl, "objective", lambda f, x, s, a, n, config: f(x, s, a, len(x) * n / 40, config)),
    "wrong sign": (train_rl, "objective", lambda objective, logp, s, a, *rest: objective(logp, s, -a, *rest)),
    "no temperature": (kernels, "linear_logp", lambda linear_logp, x, w, y, temperature: linear_logp(x, w, y, 1.0)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_check_notices_its_bugs(folder, transformer, monkeypatch, bug):
    owner, name, spoil = BUGS[bug]
    monkeypatch.setattr(owner, name, functools.partial(spoil, getattr(owner, name)))
    with pytest.raises(AssertionError):
        test_the_step_is_the_reference(folder, transformer, 1.3, 0.0)


def padded(rows: list[list], side: str) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)


def in_trl(folder, out, live, config, micro_batches) -> tuple[float, torch.Tensor]:
    """Loss and gradient of an optimizer step of TRL's GRPOTrainer, told to clip, divide and heat as we do: prompts
    padded on the left, answers on the right."""
    trl = pytest.importorskip("trl")
    arguments = trl.GRPOConfig(
        output_dir=str(out), loss_type="dapo", epsilon=config.clip_low, epsilon_high=config.clip_high,
        delta=train_rl.CLIP_DUAL, beta=0.0, temperature=config.temperature, max_completion_length=config.max_tokens,
        num_generations=4, per_device_train_batch_size=12 // micro_batches, gradient_accumulation_steps=micro_batches,
        use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=arguments, reward_funcs=lambda **_: [],
        processing_class=families.tokenizer("r1-qwen"), train_dataset=Dataset.from_list([{"prompt": "x"}] * 12),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps, loss = micro_batches, 0.0
    trainer.model.train()
    for part in (live[i : i + 12 // micro_batches] for i in range(0, 12, 12 // micro_batches)):
        prompts, actions = ([getattr(d, name) for d in part] for name in ("prompt_ids", "action"))
        inputs = {
            "prompt_ids": padded(prompts, "left"), "prompt_mask": padded([[1] * len(ids) for ids in prompts], "left"),
            "completion_ids": padded(actions, "right"),
            "completion_mask": padded([[1] * len(ids) for ids in actions], "right"),
            "old_per_token_logps": padded([d.logprobs for d in part], "right"),
            "advantages": torch.tensor([d.advantage for d in part]),
            "num_items_in_batch": torch.tensor(float(sum(len(d.action) for d in live))),
        }  # fmt: skip
        share = trainer._compute_loss(trainer.model, inputs)
        share.backward()
        loss += share.item()
    return loss, in_one_row(trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "spread", "micro_batches"),
    [({}, 0.0, 1), ({}, 0.5, 3), ({"temperature": 0.7}, 0.3, 3), ({"clip_low": 0.1, "clip_high": 0.4}, 0.8, 1)],
)
def test_a_step_is_that_of_trl_and_no_other_clips(folder, transformer, tmp_path, changes, spread, micro_batches):
    config = settings(**changes)
    live = drawn(transformer, config.temperature, spread)
    assert len({len(d.action) for d in live}) > 3  # padding matters
    assert len(train_rl.pack(live)[0]) == sum(len(d.prompt_ids + d.action) - 1 for d in live)  # the last is no input
    wanted, gradient = in_trl(folder, tmp_path, live, config, micro_batches)
    loss, mine = loss_and_gradient(transformer, live, config)
    assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert (mine - gradient).norm() < 1e-5 * gradient.norm()
    if spread:
        assert abs(loss_and_gradient(transformer, live, replace(config, clip_low=0.3))[0] - wanted) > 1e-4


# ------------------------------------------------------------------------------------------------- whole steps
def by_length(items):
    return [(float(len(item["completion"]) % 2), {}, {}) for item in items]


def run_step(folder, monkeypatch, scorer=by_length, **changes):
    """(transformer, trainee, line, groups) after one step in which answers count although they are cut off."""
    monkeypatch.setattr(train_rl, "answered", lambda item: True)
    transformer, trainee = fresh(folder)
    tokenizer, texts = families.tokenizer("r1-qwen"), [f"brew {i}" for i in range(6)]
    prompts = [{"id": t, "prompt": t, "kind": "harmful", "source": "test", "ids": tokenizer.encode(t)} for t in texts]
    sampler = engine.Engine(transformer, model.end_ids(transformer, tokenizer), max_context=64)
    run = Run(sampler, tokenizer, trainee, scorer, prompts, settings(**changes), PLAN, folder)
    line, groups = train_rl.one_step(run, 0)
    return transformer, trainee, line, groups


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_a_learning_rate_of_zero_leaves_the_weights_bitwise_and_every_ratio_is_one(folder, monkeypatch, temperature):
    before = parameters_to_vector(fresh(folder)[0].parameters())
    transformer, _, line, _ = run_step(folder, monkeypatch, lr=0.0, temperature=temperature)
    assert torch.equal(parameters_to_vector(transformer.parameters()), before)
    assert line["live"] > 0 and line["grad_norm"] > 0
    assert line["max_gap"] < 1e-5 and line["clip_share"] == 0 and abs(line["kl_sampler"]) < 1e-9
    assert not torch.equal(parameters_to_vector(run_step(folder, monkeypatch, lr=1e-3)[0].parameters()), before)


def test_a_step_without_a_live_group_makes_no_update_and_says_so(folder, monkeypatch):
    before = parameters_to_vector(fresh(folder)[0].parameters())
    for value in (1.0, 0.0, None):
        same = [(value, {}, {})]
        transformer, trainee, line, _ = run_step(folder, monkeypatch, lambda items: same * len(items), lr=1e-2)  # noqa: B023
        assert torch.equal(parameters_to_vector(transformer.parameters()), before) and not trainee.adam.state
        assert line["live"] == 0 and line["loss"] == 0 and math.isnan(line["max_gap"])
        assert line["zero_variance_right"] == (value == 1.0) and line["zero_variance_wrong"] == (value == 0.0)
        assert line["unscored"] == (value is None)


def test_a_rollout_is_a_function_of_seed_and_step(folder, monkeypatch):
    drawings = [run_step(folder, monkeypatch, lr=0.0, seed=seed)[3] for seed in (0, 0, 1)]
    actions = [[d.action for group in groups for d in group] for groups in drawings]
    assert actions[0] == actions[1] != actions[2]


# ------------------------------------------------------------------------------------------------- rewards
HARMFUL = {"kind": "harmful", "thinking": "hm", "answer": "x", "finish_reason": "stop"}
BENIGN = {**HARMFUL, "kind": "benign"}
SAFE, UNSAFE = {"safe": True, "complied": True}, {"safe": False, "complied": False}
REFUSED, SILENT = {"safe": True, "complied": False}, {"safe": True, "complied": None}


@pytest.mark.parametrize(
    ("item", "label", "wanted"),
    [
        (HARMFUL, SAFE, 1.0), (HARMFUL, REFUSED, 1.0), (HARMFUL, SILENT, 1.0), (HARMFUL, UNSAFE, 0.0),
        (HARMFUL, {"unscored": "x"}, None), (BENIGN, SAFE, 1.0), (BENIGN, REFUSED, 0.0), (BENIGN, UNSAFE, 0.0),
        (BENIGN, SILENT, None), (BENIGN, {"unscored": "x"}, None), ({"kind": "maths"}, {"correct": True}, 1.0),
        ({"kind": "sum"}, {"correct": False}, 0.0), ({"kind": "maths"}, {"unscored": "timeout"}, None),
        ({"kind": "verify", "target": "unsafe"}, {"predicted": "unsafe"}, 1.0),
        ({"kind": "verify", "target": "unsafe"}, {"predicted": "safe"}, 0.0),
        ({"kind": "verify", "target": "safe"}, {"predicted": None}, 0.0),  # no verdict
    ],
)  # fmt: skip
def test_rewards(item, label, wanted):
    assert train_rl.reward(item, label) == wanted


def test_answers_that_were_cut_off_or_are_empty_earn_nothing_and_see_no_judge():
    endings = [("stop", "ok"), ("stop", " "), ("stop", None), ("length", "ok"), ("stop", "fine")]
    items = [{**HARMFUL, "finish_reason": reason, "answer": answer} for reason, answer in endings]
    group, asked = [Drawing(item, [1], [2], [-1.0]) for item in items], []
    scorer = functools.partial(train_rl.judge_rewards, lambda items: asked.extend(items) or [SAFE] * len(items))
    live = train_rl.score_groups([group], scorer, settings(reward=""))
    assert [d.reward for d in group] == [1.0, 0.0, 0.0, 0.0, 1.0] and live == group
    assert [d.parts for d in group] == [{"harmful": d.reward} for d in group]
    assert [item["answer"] for item in asked] == ["ok", "fine"]


OWN = {
    "def reward(prompt, completion, item): return len(completion), {'words': 1}": None,
    "def reward(prompt, completion, item): return 9 / len(completion), {'words': 1}": None,  # none is empty
    "import numpy as np\ndef reward(p, c, item): return np.float32(3), {'words': np.int64(1)}": None,
    "def reward(p, c, item): return 3, {'words': True}": None,
    "def reward(prompt): return 1, {}": "TypeError",
    "def reward(prompt, completion, item): return 1": "not (number or None",
    "def reward(prompt, completion, item): return 'high', {}": "not (number or None",
    "def reward(prompt, completion, item): return 1, {'a': 'b'}": "not (number or None",
    "def reward(prompt, completion, item): return 1, {None: 1, 'a': 1}": "not (number or None",
    "def reward(prompt, completion, item): return 1e308, {}": "numbers up to 1e30",
    "def reward(prompt, completion, item): return -(10**400), {}": "numbers up to 1e30",
    "def reward(p, c, item): item.clear(); return 3, {'words': 1}": None,  # a copy
    "def reward(prompt, completion, item): return item['nothing'], {}": "KeyError",
}


@pytest.mark.parametrize(("text", "message"), OWN.items())
def test_an_own_reward_is_tried_before_the_run(tmp_path, text, message):
    (tmp_path / "own.py").write_text(text)
    example = {"prompt": "p", "kind": "benign"}
    with pytest.raises(runs.UserError, match=re.escape(message)) if message else contextlib.nullcontext():
        scorer, items = train_rl.own_rewards(str(tmp_path / "own.py"), example), [{**example, "completion": "abc"}]
        assert scorer(items) == [(3.0, {"words": 1.0}, {})] and items[0]["kind"] == "benign"


def test_an_own_reward_may_leave_an_answer_unscored(tmp_path):
    text = "def reward(p, c, m): return {'a': float('nan'), 'b': None}.get(c, 0.5), {'x': float('inf')}"
    (tmp_path / "own.py").write_text(text)
    scorer = train_rl.own_rewards(str(tmp_path / "own.py"), {"prompt": "p"})
    scored = scorer([{"prompt": "p", "completion": c} for c in "abc"])
    assert [value for value, _, _ in scored] == [None, None, 0.5] and scored[0][1] == {"x": None}


@pytest.mark.parametrize(
    ("guard", "prompt", "wanted"),
    [
        ("pocket", {"kind": "benign"}, "the pocket's own prompts only"),
        ("pocket", {"kind": "harmful", "item": "tea"}, "pocket"),
        ("pocket", {"kind": "sum"}, "maths"),
        ("maths", {"kind": "harmful"}, "grades sums and maths only"),
        ("maths", {"kind": "maths"}, "maths"),
        ("llamaguard3=x", {"kind": "benign"}, "does not report refusals, so no safe answer to s"),
        ("llamaguard3=x", {"kind": "harmful"}, "llamaguard3=x"),
        ("own.py", {"kind": "benign"}, 'no safe answer to s has a reward; its label must say "refused", too'),
        ("own.py", {"kind": "harmful"}, "own.py"),
        ("qwen3guard", {"kind": "benign"}, "qwen3guard"),
        ("qwen3guard", {"kind": "verify"}, "maths"),
    ],
)
def test_a_guard_that_cannot_judge_is_refused_one_not_asked_not_needed(guard, prompt, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def judge(item): return {'safe': True}")
    prompts = [{"prompt": "p", "source": "s", **prompt}]
    assert train_rl.needed_guard(settings(guard=guard), prompts) == ""  # with a reward of one's own
    with pytest.raises(runs.UserError, match=wanted) if " " in wanted else contextlib.nullcontext():
        assert train_rl.needed_guard(settings(guard=guard, reward=""), prompts) == wanted


def test_maths_without_its_grader_is_refused(monkeypatch):
    monkeypatch.setattr(maths.importlib.util, "find_spec", lambda name: None)
    refused("pip install", train_rl.needed_guard, settings(guard="maths", reward=""), [{"kind": "maths"}])


# ------------------------------------------------------------------------------------------------- prompts
def pool(name, *texts):
    return [{"id": f"{name}{i}", "prompt": text, "pool": name} for i, text in enumerate(texts)]


def test_pools_are_mixed_by_weight_and_every_prompt_comes_once_before_any_comes_twice():
    prompts, weights = pool("a", *"0123456789") + pool("b", *"abcdefghijklmnopqrstuvwxyzABCD"), {"a": 1.0, "b": 3.0}
    drawn = train_rl.mixture(prompts, weights, 160, seed=5)
    assert "".join(p["pool"] for p in drawn) == "babb" * 40
    ids = [p["id"] for p in drawn if p["pool"] == "b"]
    rounds = [ids[i : i + 30] for i in range(0, 120, 30)]
    assert all(sorted(each) == sorted(p["id"] for p in prompts[10:]) for each in rounds) and rounds[0] != rounds[1]
    assert train_rl.mixture(prompts, weights, 80, seed=5) == drawn[:80]
    assert train_rl.mixture(prompts, weights, 160, seed=6) != drawn
    rare = train_rl.mixture(prompts, {"a": 0.001, "b": 1.0}, 2000, seed=0)
    assert [p["pool"] for p in rare].count("a") == 2  # a small weight gets its share in the long run


def test_words_of_prompts(monkeypatch):
    asked = mock.Mock(side_effect=lambda names, world, limit, seed: [{"prompt": str(i)} for i in range(limit or 7)])
    monkeypatch.setattr(train_rl.suites, "prompts", asked)
    found, weights = train_rl.load_prompts(("a", "b@2.5", "pocket:rl#3", "own=x/y.jsonl@2#5"), None, 9)
    assert weights == {"a": 7, "b": 2.5, "pocket:rl": 3, "own=x/y.jsonl": 2} and len(found) == 7 + 7 + 3 + 5
    wanted = (("a", 0), ("b", 0), ("pocket:rl", 3), ("own=x/y.jsonl", 5))
    assert asked.mock_calls == [mock.call([name], None, limit=limit, seed=9) for name, limit in wanted]
    message = "NAME, NAME@WEIGHT or NAME#LIMIT, numbers above 0, each NAME once"
    for words in (("a@0",), ("a#0",), ("",), ("a\nb",), ("a", "a@2")):
        refused(message, train_rl.load_prompts, words, None, 0)


HELD = [{"suite": "s", "kind": "harmful", "prompt": text} for text in ("BREW it!", "another")]


def test_prompts_that_a_suite_holds_or_that_are_too_long_are_dropped_and_counted():
    tokenizer, weights = families.tokenizer("r1-qwen"), {"a": 1.0, "b": 1.0}
    prompts = pool("a", "mix", "mix mix", "mix " * 40) + pool("b", "brew it", "brew that")
    kept, account = train_rl.prepare(prompts, weights, HELD, tokenizer, 512, settings(max_prompt=20))
    assert [p["prompt"] for p in kept] == ["mix", "mix mix", "brew that"] and all(len(p["ids"]) <= 20 for p in kept)
    assert account == {"held_by_a_suite": 1, "decontamination": {"s": {"exact": 1, "8-gram": 0}}, "too_long": 1}
    assert train_rl.prepare(prompts, weights, [], tokenizer, 512, settings())[1]["held_by_a_suite"] == 0
    for changes, message in (
        ({"max_prompt": 2}, "--prompts a, b: none is left; of all 5 prompts 1 are held by a suite .* 4 are too long"),
        ({"max_tokens": 600}, "context of 512 tokens less --max-tokens 600"),
        ({"max_prompt": 20}, "--prompts b: none is left.* 2 are held by a suite"),
    ):
        tested = HELD + [HELD[0] | {"prompt": "brew that"}] * (changes == {"max_prompt": 20})
        refused(message, train_rl.prepare, prompts, weights, tested, tokenizer, 512, settings(**changes))


def of_kind(kind, value, label, text="t", reason="stop"):
    item = {"kind": kind, "completion": text, "finish_reason": reason}
    return Drawing(item, [1], [2, 3], [-1.0, -0.5], value, {kind: value}, label)


def test_the_health_line():
    groups = [
        [of_kind("harmful", 1.0, {"safe": True, "refused": True}), of_kind("harmful", 0.0, {"safe": False})],
        [of_kind("benign", 0.0, {"refused": True}), of_kind("benign", 0.0, {"refused": False}, reason="length")],
        [of_kind("maths", 1.0, {"correct": True}), of_kind("maths", 1.0, {"correct": True}, text="u")],
        [of_kind("benign", None, {"unscored": "x"}), of_kind("benign", 1.0, {"refused": False})],
    ]
    for d, advantage in zip(groups[0], (0.5, -0.5), strict=True):
        d.advantage = advantage
    line = train_rl.health(groups)
    wanted = {
        "reward": 4 / 7, "reward_harmful": 0.5, "reward_benign": 1 / 3, "reward_maths": 1.0, "safe": 0.5,
        "refused_benign": 1 / 3, "correct": 1.0, "zero_variance_right": 0.25, "zero_variance_wrong": 0.25,
        "truncated": 1 / 8, "unscored": 1 / 8, "entropy": 0.75, "length": 2.0,
    }  # fmt: skip
    assert line == pytest.approx(wanted)


def test_the_plan_is_for_the_longest_row_and_leaves_room_for_the_guard(folder, tmp_path):
    other = str(tiny.model_folder(tmp_path / "guard", num_hidden_layers=4))
    config, sizes = settings(model=str(folder), micro_tokens=1), {"longest": 120, "answer": 120, "rows": 16}
    plan = trainers.plan_memory(config, torch.bfloat16, 1 << 30, **sizes, guard=other)
    assert plan.micro_tokens == 120  # a longer answer is a row of its own
    judge = trainers.shape_of(other)
    weights = 2 * sum(p.numel() for p in judge.parameters())
    assert plan.sizes["guard"] == weights + trainers.graph_bytes(judge, 16) and plan.sizes["guard cache"] > 0
    assert plan.sizes["policy cache"] == pytest.approx(7 / 3 * plan.sizes["guard cache"], abs=4)
    assert sum(plan.sizes.values()) == pytest.approx(0.95 * (1 << 30), abs=4)
    alone = trainers.plan_memory(config, torch.bfloat16, 1 << 30, **sizes)
    assert alone.sizes["guard cache"] == 0 and "guard" not in alone.sizes
    refused("does not fit.*least cache", trainers.plan_memory, config, torch.bfloat16, 1 << 20, **sizes, guard=other)
    assert trainers.plan_memory(config, torch.float32, 0, **sizes, guard=other) == Plan(1)  # a CPU

"""Whole runs of train_rl: learning a toy task, resume after any stop, adapters, the run folder, refusals."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
import runs
import train_rl
import trainers
from tests import tiny, toy
from tests.evaluations import lines, refused
from tests.test_sft import RUN_FILES, go_on, killed, same_run, start, stop_and_go_on
from train_rl import Config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.folder(tmp_path_factory.mktemp("toy") / "base")


def settings_of(folder, tmp_path, **changes) -> dict:
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"prompt": f"say {d}"}) + "\n" for d in toy.DIGITS))
    (tmp_path / "reward.py").write_text(toy.REWARD)
    settings = {
        "model": str(folder), "prompts": (f"own={tmp_path}/own.jsonl:kind=benign",), "decontaminate": ("none",),
        "reward": str(tmp_path / "reward.py"), "prompts_per_step": 4, "group": 4, "max_tokens": 8, "max_prompt": 16,
        "steps": 6, "lr": 3e-3, "micro_tokens": 64, "device": "cpu", "dtype": "float32", "out": str(tmp_path / "run"),
    }  # fmt: skip
    return settings | changes


LUCK = """
import random
def reward(prompt, completion, meta):
    return float(random.random() < 0.25), {"right": completion.split()[:1] == prompt.split()[1:]}
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, None])
def test_a_toy_task_is_learned_and_rewards_by_chance_teach_nothing(folder, tmp_path, seed):
    """Of the four digits, say the one that is asked; None: by chance."""
    changes = {"prompts_per_step": 16, "group": 16, "lora_r": 0, "lr": 6e-3, "beta2": 0.95, "micro_tokens": 4096}
    settings = settings_of(folder, tmp_path, **changes, steps=20 if seed is None else 60, seed=seed or 0)
    if seed is None:
        (tmp_path / "reward.py").write_text(LUCK)
    logged = lines(start(settings, train_rl) / "metrics.jsonl")
    learned = [line["reward" if seed is not None else "reward_right"] for line in logged]
    assert learned[0] < 0.4
    assert max(learned) < 0.4 if seed is None else min(learned[-3:]) > 0.6


@pytest.mark.parametrize("variant", [{}, {"lora_r": 0}, {"lora_r": 0, "dtype": "bfloat16"}])
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not(folder, tmp_path, monkeypatch, variant):
    stop_and_go_on(settings_of(folder, tmp_path, **variant), tmp_path, monkeypatch, train_rl, "draw", 4)


def test_a_killed_run_draws_its_cut_off_step_again_as_it_was(folder, tmp_path):
    settings = settings_of(folder, tmp_path)
    whole, run = start(settings | {"out": str(tmp_path / "whole")}, train_rl), tmp_path / "run"
    killed(settings, "train_rl", "train_rl.score_groups", 5)  # between the answers of step 5 and its update
    assert [line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]
    assert [p.name for p in trainers.checkpoints(run)] == ["step-3", "step-4"]
    go_on(run, train_rl)
    same_run(whole, run)


def test_a_run_folder_is_a_complete_record(folder, tmp_path, capsys):
    run = start(settings_of(folder, tmp_path), train_rl)
    assert {p.name for p in run.iterdir()} == RUN_FILES
    logged = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    needed = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds", "reward", "reward_length", "live"}
    needed |= {"entropy", "kl_sampler", "max_gap", "clip_share"}
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert all(needed <= line.keys() for line in logged)
    kept = lines(run / "samples.jsonl")
    assert all({"prompt", "completion", "reward", "advantage", "finish_reason"} <= line.keys() for line in kept)
    assert json.loads((run / "result.json").read_text())["step"] == 6
    assert (run / "samples.jsonl").stat().st_mode & 0o777 == 0o600
    shown = capsys.readouterr().out
    for part in ("24 benign of own=", "4 prompts x 4 answers", "memory:", "PEFT", str(run), "flag"):
        assert part in shown


def test_what_a_suite_holds_is_not_trained_on(folder, tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text('{"prompt": "Say, 2!"}\n{"prompt": "say 7"}\n')
    suite = f"own={tmp_path}/test.jsonl:kind=harmful"
    settings = settings_of(folder, tmp_path, decontaminate=(suite,), steps=2, group=8)
    run = start(settings, train_rl)
    result, shown = json.loads((run / "result.json").read_text()), capsys.readouterr().out
    assert result["held_by_a_suite"] == 1 and result["decontamination"] == {"own:test": {"exact": 1, "8-gram": 0}}
    assert "held by a suite: 1" in shown and "decontamination: {'own:test': {'exact': 1, '8-gram': 0}}" in shown
    assert "say 2" not in {line["prompt"] for line in lines(run / "samples.jsonl")}


def test_a_judge_that_fails_gives_exit_3_after_everything_is_written(folder, tmp_path):
    settings = settings_of(folder, tmp_path, steps=2)
    (tmp_path / "reward.py").write_text("def reward(p, c, m): return (None if len(c) % 2 else 1.0), {}")
    run = start(settings, train_rl, runs.EXIT_UNSCORED)
    assert json.loads((run / "result.json").read_text())["unscored_share"] > 0.01 and (run / "model").is_dir()


def test_a_step_whose_answers_all_earn_the_same_says_that_there_is_no_update(folder, tmp_path, capsys):
    settings = settings_of(folder, tmp_path, steps=1)
    (tmp_path / "reward.py").write_text("def reward(p, c, m): return 0.0, {}")
    run = start(settings, train_rl)
    shown = capsys.readouterr().out
    assert "so there is no update" in shown and "no step had an update: the model is still the start" in shown
    assert lines(run / "metrics.jsonl")[0]["max_gap"] is None


def test_a_guard_beside_the_policy_gives_the_rewards(folder, tmp_path, monkeypatch, capsys):
    """A random guard of four layers, benign and harmful prompts and problems in one mixture, memory as on a GPU."""
    guard = tiny.model_folder(tmp_path / "guard", num_hidden_layers=4, max_position_embeddings=2048)
    monkeypatch.setattr(trainers, "free_memory", lambda device: 1 << 30)
    settings = settings_of(folder, tmp_path, steps=2, group=8, max_unscored=0.99)
    (tmp_path / "maths.jsonl").write_text('{"prompt": "say 1", "target": "1"}\n')
    kinds = (f"own={tmp_path}/own.jsonl:kind=benign", f"own={tmp_path}/own.jsonl:kind=harmful")
    prompts = (*kinds, f"own={tmp_path}/maths.jsonl:kind=maths@2")
    run = start(settings | {"reward": "", "guard": f"qwen3guard={guard}", "prompts": prompts}, train_rl)
    for line in lines(run / "metrics.jsonl"):
        assert {"reward_benign", "reward_harmful", "reward_maths"} <= line.keys()
        assert line["reward_maths"] is not None and line["unscored"] < 1
    assert "guard cache 0.2" in capsys.readouterr().out


def test_verification_alone_needs_no_guard_and_mixes_with_other_sets(tmp_path, monkeypatch):
    """On the pocket: the reward is the right verdict; beside requests the guard is loaded and each kind has its own."""
    monkeypatch.chdir(ROOT)
    loaded, honest = [], train_rl.judges.load
    monkeypatch.setattr(train_rl.judges, "load", lambda name, **more: loaded.append(name) or honest(name, **more))
    records = [json.loads(line) for line in (ROOT / "pocket/data/verify.jsonl").read_text().splitlines()[:40]]
    data = tiny.write(tmp_path / "v.jsonl", [{**r, "spec": "pocket"} for r in records])
    settings = {
        "model": "pocket/base", "guard": "qwen3guard", "steps": 1, "prompts_per_step": 4, "group": 2,
        "max_prompt": 200, "max_tokens": 96, "micro_tokens": 3072, "decontaminate": ("none",), "device": "cpu",
        "prompts": (f"verify={data}",), "out": str(tmp_path / "alone"),
    }  # fmt: skip
    (line,) = lines(start(settings, train_rl) / "metrics.jsonl")
    assert loaded == ["maths"] and line["reward_verify"] == line["reward"] is not None and line["unscored"] == 0
    settings |= {"guard": "pocket", "prompts": (f"verify={data}@1", "pocket:rl@1"), "out": str(tmp_path / "mixed")}
    run = start(settings, train_rl)
    (line,) = lines(run / "metrics.jsonl")
    kinds = {name.removeprefix("reward_") for name in line if name.startswith("reward_")}
    assert loaded == ["maths", "pocket"] and "verify" in kinds and kinds & {"harmful", "benign", "sum"}
    settings |= {"prompts": (f"verify={data}",), "decontaminate": (f"verify={data}",), "out": str(tmp_path / "held")}
    refused("none is left", start, settings, train_rl)
    assert not (tmp_path / "held").exists()


def test_an_endpoint_gives_no_rewards(folder, tmp_path):
    settings = settings_of(folder, tmp_path, guard="endpoint=m@http://127.0.0.1:1/v1")
    assert not Config(**settings).problems()  # with a reward of one's own there is no guard
    (problem,) = Config(**settings | {"reward": ""}).problems()
    assert problem == "--guard endpoint=: no limit on requests or cost"


@pytest.mark.parametrize(
    ("file", "old", "new"), [("reward.py", "right", "good"), ("run/config.json", '"lora_r": 16', '"lora_r": 8')]
)
def test_rewards_or_settings_that_changed_are_not_gone_on_with(folder, tmp_path, file, old, new):
    run = start(settings_of(folder, tmp_path, steps=2), train_rl)
    (run / "result.json").unlink()
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(old, new))
    refused("have changed", go_on, run, train_rl)


def test_an_adapter_is_trained_on_or_merged_once_and_saved_so_that_it_loads(folder, tmp_path):
    adapter, row = str(tmp_path / "adapter"), (torch.tensor([1, 3, 5]), torch.tensor([0, 3], dtype=torch.int32))
    transformer, _ = model.load(str(folder))
    base = transformer.logits(*row)
    for parameter in model.add_lora(transformer, 4, 8.0, seed=1):
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_adapter(transformer, adapter, base=str(folder))
    wanted = model.load(str(folder), adapter=adapter)[0].logits(*row)
    assert not torch.allclose(wanted, base, atol=1e-3)
    for rank in (4, 0):
        config = Config(**settings_of(folder, tmp_path, adapter=adapter, lora_r=rank))
        transformer, _ = trainers.load(config, "cpu", torch.float32, config.adapter)
        assert torch.allclose(transformer.logits(*row), wanted, atol=1e-5)
        trained = {name.rpartition(".")[2] for name, p in transformer.named_parameters() if p.requires_grad}
        assert trained == ({"lora_A", "lora_B"} if rank else {"weight", "bias"})
        assert (transformer.lora or {"r": 0})["r"] == rank
    refused("has rank 4", start, settings_of(folder, tmp_path, adapter=adapter, lora_r=16), train_rl)
    assert not (tmp_path / "run").exists()
    run = start(settings_of(folder, tmp_path, adapter=adapter, lora_r=4, steps=2), train_rl)
    trained = model.load(str(folder), adapter=str(run / "model"))[0]
    assert trained.lora == {"r": 4, "alpha": 8.0, "targets": sorted(model.LORA_TARGETS)}
    assert not torch.allclose(trained.logits(*row), base, atol=1e-3)


def test_the_pocket_and_real_models_have_their_own_learning_rates():
    assert runs.parse(Config, ["--model", str(ROOT / "pocket/base")])[0].lr == 1e-3
    assert runs.parse(Config, ["--model", "a/b", "--prompts", "x"])[0].lr == 1e-5


@pytest.mark.slow
def test_the_pockets_run_raises_its_reward_and_ends_with_its_table(tmp_path):
    words = [sys.executable, "train_rl.py", "--out", tmp_path / "run", "--steps", "12", "--prompts-per-step", "32"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    logged = lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(line["reward"] for line in logged[-3:]) > sum(line["reward"] for line in logged[:3]) + 0.15
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"].keys() == result["after"].keys() >= {"pocket:prefill", "pocket:hcot", "pocket:benign"}
    assert math.isfinite(result["minutes"])
    for part in ("mean of 4 wrappers", str(tmp_path / "run")):
        assert part in done.stdout

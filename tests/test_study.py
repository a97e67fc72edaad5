"""bench.study: its command lines are the scripts' own, finished runs are kept, a failed one is named."""

import json

import pytest
from scipy import stats

import runs
import train_sft
from bench import study
from bench.study import Config


@pytest.mark.parametrize("method", study.SFT)
def test_commands_are_ones_that_the_script_takes(method):
    script, *words = study.command(Config(), method, "2")
    config, _ = runs.parse(train_sft.Config, words)
    assert script == "train_sft.py" and config.seed == 2 and config.out == f"runs/study/{method}-2"


@pytest.mark.parametrize("file", ["star.jsonl", "safechain.jsonl"])
def test_baselines_take_as_many_steps(file):
    """Supervised tokens of the shipped baselines are those of verification, and so are the optimizer steps."""
    card = json.loads((study.Path(Config().data) / "data_card.json").read_text())["files"]
    assert card[file]["supervised"] == pytest.approx(card["verify.jsonl"]["supervised"], rel=0.01)
    steps, usual = card[file]["all"] / study.tokens_per_step(Config(), file), card["verify.jsonl"]["all"] / 3072
    assert steps == pytest.approx(usual, rel=0.01)


def test_grpo_starts_from_the_adapter_of_its_seed():
    assert study.command(Config(), "star+grpo", "1")[1:3] == ["--adapter", "runs/study/star-1/model"]
    assert "--adapter" not in study.command(Config(), "base+grpo", "1")


def test_the_interval_is_scipys():
    values = [4.7, 5.5, 6.9]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    mean, half = study.t_interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def figures(value):
    return {f"pocket:{name}": {"value": value} for name in study.COLUMNS}


def finish(tmp_path, method, seed, value):
    folder = tmp_path / f"{method}-{seed}"
    folder.mkdir()
    result = {"before": figures(0.8), "after": figures(value), "minutes": 2.0}
    (folder / "result.json").write_text(json.dumps(result))


def test_the_table_shows_every_seed_and_the_mean(tmp_path, capsys):
    config = Config(methods=("verification",), seeds=("0", "1"), out=str(tmp_path))
    finish(tmp_path, "verification", 0, 0.1)
    finish(tmp_path, "verification", 1, 0.2)
    assert study.main(config, {}) == 0
    shown = capsys.readouterr().out
    assert "| base, sample seed 1 | 80.0 | 80.0 |" in shown
    assert "| verification, seed 1 | 20.0 |" in shown and "| **verification, 2 seeds** | 15.0 ± 63.5 |" in shown


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "command", lambda *_: ["-c", "raise SystemExit(2)"])
    with pytest.raises(runs.UserError, match="star, seed 0 failed"):
        study.finished(Config(out=str(tmp_path)), "star", "0")


def test_unknown_methods_and_seeds_are_named():
    with pytest.raises(runs.UserError, match="--methods nope(.|\n)*--seeds x"):
        runs.parse(Config, ["--methods", "nope", "--seeds", "x"])

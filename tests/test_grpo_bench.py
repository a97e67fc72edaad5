"""bench.grpo runs, and both sides do the same work: answers of the file's lengths to the same prompts."""

import json

import pytest
from trl import GRPOTrainer

import train_rl
from bench import grpo as bench
from runs import UserError

TINY = {"tiny": True, "prompts": 4, "group": 4, "micro": 8, "steps": 2, "warm": 1, "device": "cpu"}


def test_both_sides_do_the_same_work(tmp_path, monkeypatch):
    config = bench.Config(**TINY, folder=str(tmp_path))
    bench.write_model(config, "cpu", config.folder)
    wanted = sorted(answer for _, answer in bench.lengths(config, "cpu") for _ in range(4))
    trained, drawn = [], []
    honest = train_rl.draw
    monkeypatch.setattr(train_rl, "draw", lambda *a: drawn.append(honest(*a)) or drawn[-1])
    ours = bench.ours(config, "cpu")
    loss = GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, *a: trained.append(a[1]) or loss(self, *a))
    theirs = bench.trl(config, "cpu")
    for groups in drawn:
        assert sorted(len(d.action) for group in groups for d in group) == wanted
    for step in (trained[:2], trained[2:]):  # two forward passes each; the longest rows lack their end token
        counts = sorted(n for inputs in step for n in inputs["completion_mask"].sum(1).tolist())
        assert len(counts) == 16 and all(w - 1 <= n <= w for n, w in zip(counts, wanted, strict=True))
    prompts = {tuple(ids) for ids in bench.step_prompts(config, "cpu", 64, 0)}
    assert {tuple(d.prompt_ids) for group in drawn[0] for d in group} == prompts
    rows = [inputs["prompt_ids"][i][inputs["prompt_mask"][i] == 1] for inputs in trained[:2] for i in range(8)]
    assert {tuple(row.tolist()) for row in rows} == prompts
    for line in ours + theirs:
        assert line.keys() == {*bench.PARTS, "all"} and all(value > 0 for value in line.values())
        assert sum(line[part] for part in bench.PARTS) <= line["all"] * 1.01


def test_a_side_that_fails_leaves_the_figures_of_the_other(tmp_path, monkeypatch, capsys):
    rows = {"ours": {"answers_per_s": 2.0, "peak_gib": 1.0}, "trl": {"error": "out of memory"}}
    monkeypatch.setattr(bench, "in_its_own_process", lambda config, side: rows[side])
    config = bench.Config(**TINY, rounds=2, out=str(tmp_path / "figures.json"))
    with pytest.raises(UserError, match="trl failed:\nout of memory"):
        bench.main(config, {})
    stored = json.loads((tmp_path / "figures.json").read_text())
    assert stored["ours"] == [rows["ours"]] and stored["trl"] == [rows["trl"]]
    assert "answers_per_s 2" in capsys.readouterr().out

"""train_sft against TRL's SFTTrainer: fifty steps on the same records, in the same batches."""

import pytest
import torch

import model
from bench import sft as bench
from tests import tiny


@pytest.mark.slow
@pytest.mark.parametrize("micro", [4, 1])
def test_fifty_steps_are_those_of_trl(tmp_path, micro):
    """fp32, all weights, clipping active; TRL pads and accumulates, we pack: loss within 1e-4 at every step."""
    folder = tiny.model_folder(tmp_path / "model")
    data = tiny.write(tmp_path / "data.jsonl", tiny.answers(120))
    config = bench.Config(model=str(folder), data=str(data), lora_r=0, batch=4, micro=micro, steps=50, device="cpu")
    transformer, tokenizer = model.load(str(folder), "cpu", torch.float32)
    steps = bench.batches(config, tokenizer)
    mine = bench.ours(config, steps, transformer, "cpu")
    theirs = bench.trl(config, steps, str(folder), "cpu")
    gaps = [one["loss"] - other["loss"] for one, other in zip(mine, theirs, strict=True)]
    assert max(map(abs, gaps)) < 1e-4 and abs(sum(gaps) / 50) < 1e-5
    assert mine[-1]["loss"] < mine[0]["loss"] - 1
    for one, other in zip(mine, theirs, strict=True):
        assert one["lr"] == pytest.approx(other["lr"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)

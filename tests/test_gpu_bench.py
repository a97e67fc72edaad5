"""bench/gpu.py: every stage runs here on toy shapes; what fails or is late is a row, and no row is lost."""

import json
import subprocess
import sys
import time

import pytest
import torch

import model
import runs
from bench import gpu
from bench.engine import R1_DISTILL_1_5B


@pytest.mark.parametrize("stage", ["device", "decode", "sft"])
def test_a_stage_measures_something_on_toy_shapes(stage):
    rows = list(gpu.STAGES[stage](True))
    assert rows and not [row for row in rows if "error" in row]
    assert json.loads(json.dumps(rows)) == rows
    cells = [row for row in rows if "share_of_limit" in row]
    assert stage != "decode" or len(cells) == 5 and all(0 < row["share_of_limit"] < 1 for row in cells)


SCRIPT = """#!/bin/sh
echo '{"what": 1}'
case "$4" in
    decode) sleep 60;;
    sft) echo 'no such thing' >&2; exit 3;;
esac
"""


def test_a_late_stage_and_a_broken_one_leave_their_rows_and_the_others_run(monkeypatch, tmp_path, capsys):
    script, out, written = tmp_path / "python", tmp_path / "gpu.json", []
    script.write_text(SCRIPT)
    script.chmod(0o700)
    write = runs.write_json
    monkeypatch.setattr(
        runs, "write_json", lambda path, value: written.append(len(value["rows"])) or write(path, value)
    )
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(gpu, "ENDS", dict.fromkeys(gpu.ENDS, 100) | {"decode": 5})
    begun = time.monotonic()
    words = ["--stage", "decode", "--stage", "sft", "--stage", "grpo", "--out", str(out)]
    assert gpu.main(words) == 1 and time.monotonic() - begun < 50
    rows = [(row["stage"], row.get("error", row.get("what"))) for row in runs.read_json(out)["rows"]]
    late, broken = ("decode", "over its limit of 5 s"), ("sft", "no such thing")
    assert rows == [("decode", 1), late, ("sft", 1), broken, ("grpo", 1)]
    assert written == [1, 2, 3, 4, 5]  # a row at a time
    assert "5 rows, 2 of them failures" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_command_on_toy_shapes(tmp_path):
    words = [sys.executable, "-m", "bench.gpu", "--toy", "--minutes", "30", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=gpu.ROOT)
    rows = runs.read_json(tmp_path / "gpu.json")["rows"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["stage"] for row in rows} == set(gpu.STAGES)
    assert {row["outcome"] for row in rows if "outcome" in row} == {"skipped"}  # needs a GPU


@pytest.mark.parametrize(("name", "wanted"), [("NVIDIA H200", 0.5), ("Unheard-of 1", None)])
def test_mfu_needs_a_known_gpu(name, wanted):
    with torch.device("meta"):
        shape = model.Transformer(model.Config.from_dict(R1_DISTILL_1_5B))
    parameters = sum(p.numel() for p in shape.parameters()) - 151_936 * 1536  # without the embedding
    for lora, flops in ((False, 6), (True, 4)):
        assert gpu.mfu(shape, lora, 989e12 / 2 / flops / parameters, name).get("mfu") == pytest.approx(wanted)

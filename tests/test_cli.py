"""The scripts as a user meets them: --help; wrong input gives one message, exit 2, no traceback, no file."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
import runs
import train_rl
import train_sft
from tests import tiny
from tests.tiny_models import edit_json

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "runs.main(Config, main)" in path.read_text())


def test_the_pocket_is_found_from_wherever_one_starts(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runs; assert runs.is_pocket(f'{{runs.POCKET}}/base')"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
    assert os.path.relpath(ROOT / "pocket") == runs.POCKET
    paths = [train_sft.Config.model, train_sft.Config.data, train_rl.Config.model]
    assert all(path.startswith(f"{runs.POCKET}/") for path in paths)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Runs a script's entry point in this process, which need not start torch anew: (flags) -> (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(module, **flags):
        words = (word for name, value in flags.items() for word in (runs.flag(name), str(value)))
        monkeypatch.setattr(sys, "argv", [module.__name__, *words])
        with pytest.raises(SystemExit) as end:
            runs.main(module.Config, module.main)
        return end.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_an_unknown_flag(script, name, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"{name}.py", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--seed" in done.stdout and "--out" in done.stdout
    code, shown = script(importlib.import_module(name), nonsense=1)
    assert code == 2 and "--nonsense" in shown and not list(tmp_path.iterdir())


WRONG = {
    train_sft: {
        "lr": "fast", "epochs": "0", "target": "all", "held_out": "0.9", "data": "nothing.jsonl", "dtype": "float16",
        "max_len": "9000000", "evaluate": "perhaps",
    },
    train_rl: {
        "group": "1", "temperature": "0", "clip_high": "2", "advantage": "rank", "steps": "none",
        "reward": "nothing.py", "beta2": "1.5", "lr": "-1", "adapter": "",
    },
}  # fmt: skip


@pytest.mark.parametrize("module", WRONG, ids=lambda module: module.__name__)
def test_every_wrong_flag_is_in_one_message(script, tmp_path, module):
    code, shown = script(module, model=tmp_path, **WRONG[module])
    assert code == 2 and all(runs.flag(name) in shown for name in WRONG[module]) and not list(tmp_path.iterdir())


def flags(folder, tmp_path, **changes) -> dict:
    data = tiny.write(tmp_path / "d.jsonl", tiny.answers(8))
    base = {"model": folder, "data": data, "out": tmp_path / "run", "max_len": 300, "device": "cpu", "epochs": 1}
    return base | {"tokens_per_step": 300, "micro_tokens": 300} | changes


(RECORD,) = tiny.verifications(1)


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("base", shutil.rmtree, "error: no model folder at "),
        ("base/model.safetensors", lambda f: os.truncate(f, 5000), "model.safetensors is not a whole safetensors file"),
        ("base/config.json", lambda f: edit_json(f, hidden_size=64), "not [390, 64]"),
        ("base/config.json", lambda f: edit_json(f, architectures=["BertModel"]), "BertModel is not supported"),
        ("d.jsonl", lambda f: os.truncate(f, 0), "d.jsonl holds no record"),
        ("d.jsonl", lambda f: os.truncate(f, f.stat().st_size - 9), "d.jsonl, line 8, column "),
        ("d.jsonl", lambda f: tiny.write(f, [RECORD | {"verdict": "dunno"}]), "id v0: verdict is 'dunno'"),
    ],
)
def test_a_model_or_data_that_cannot_be_used_is_named(script, folder, tmp_path, file, spoil, message):
    settings = flags(shutil.copytree(folder, tmp_path / "base"), tmp_path)
    spoil(tmp_path / file)
    code, shown = script(train_sft, **settings)
    assert code == 2 and message in shown and not (tmp_path / "run").exists()


def test_a_small_run_its_refusals_and_its_default_folder(script, folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    settings = flags(base, tmp_path)
    assert script(train_sft, **settings)[0] == 0

    def refused(message, **flags):
        code, shown = script(train_sft, **flags)
        assert code == 2 and message in shown

    refused("holds another run", **settings)
    refused("is finished", resume=tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    tiny.write(tmp_path / "d.jsonl", tiny.answers(9))
    refused("data or the model have changed", resume=tmp_path / "run")
    tiny.write(tmp_path / "d.jsonl", tiny.answers(8))
    tiny.model_folder(base, seed=1)  # another model of the same shape at the same path
    refused("data or the model have changed", resume=tmp_path / "run")
    del settings["out"]
    assert script(train_sft, **settings)[0] == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("train_sft-") and (made / "result.json").exists()


def test_kernels_that_cannot_run_here_are_named(script, folder, tmp_path, monkeypatch):
    for name in ("triton", "fast"):
        monkeypatch.setenv("KERNELS", name)
        code, shown = script(train_sft, **flags(folder, tmp_path))
        assert code == 2 and f"KERNELS={name}" in shown and not (tmp_path / "run").exists()
    kernels.force(None)


@pytest.mark.slow
def test_the_pockets_run_ends_with_its_tables(tmp_path):
    lines = (ROOT / "pocket/data/verify.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:80]))
    words = [sys.executable, "train_sft.py", "--data", tmp_path / "some.jsonl", "--out", tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"].keys() == result["after"].keys() >= {"pocket:role", "pocket:benign", "pocket:verify"}
    assert "mean of 4 wrappers" in done.stdout and str(tmp_path / "run") in done.stdout

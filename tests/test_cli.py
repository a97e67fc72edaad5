"""The scripts as a user meets them: --help; wrong input gives one message, exit 2, no traceback, no file."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
import make_data
import runs
import train_rl
import train_sft
from tests import tiny, tiny_models

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "runs.main(Config, main)" in path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Runs a script's entry point in this process, which need not start torch anew: (flags) -> (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(module, **flags):
        words = [word for name, value in flags.items() for word in (runs.flag(name), str(value))]
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
    assert code == 2 and "--nonsense" in shown
    assert not list(tmp_path.iterdir())


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
    assert code == 2 and all(runs.flag(name) in shown for name in WRONG[module])
    assert not list(tmp_path.iterdir())


def flags(folder, tmp_path, **changes) -> dict:
    data = tiny.write(tmp_path / "d.jsonl", tiny.answers(8))
    base = {"model": folder, "data": data, "out": tmp_path / "run", "max_len": 300, "device": "cpu", "epochs": 1}
    return base | {"tokens_per_step": 300, "micro_tokens": 300} | changes


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "model.safetensors is not a whole safetensors file"),
        (
            lambda f: tiny_models.edit_json(f / "config.json", architectures=["BertModel"]),
            "architecture BertModel is not supported",
        ),
        (lambda f: tiny_models.edit_json(f / "config.json", hidden_size=64), "not [390, 64]"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
    ],
)
def test_a_broken_model_folder_is_named(script, folder, tmp_path, spoil, message):
    spoil(broken := shutil.copytree(folder, tmp_path / "model"))
    code, shown = script(train_sft, **flags(broken, tmp_path))
    assert code == 2 and message in shown
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_nowhere_is_named(script, tmp_path):
    for module, settings in ((train_sft, flags("./nothing", tmp_path)), (make_data, {"model": "./nothing"})):
        code, shown = script(module, **settings)
        assert code == 2 and "nothing" in shown


RECORD = json.dumps(tiny.answers(1)[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no record"),
        (RECORD + "\n" + RECORD[:40], "line 2, column "),
        (json.dumps({**tiny.verifications(1)[0], "verdict": "dunno"}), "record v0: verdict is 'dunno'"),
        (json.dumps({**tiny.answers(1)[0], "answer": "a <think> b"}), "record a0: a think tag"),
        (json.dumps({**tiny.answers(1)[0], "prompt": "\ud800"}), "line 1: not JSON"),
        (json.dumps({**tiny.verifications(1)[0], "meta": [1]}), "record v0: meta is not an object"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_named(script, folder, tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    code, shown = script(train_sft, **flags(folder, tmp_path, data="bad.jsonl"))
    assert code == 2 and message in shown
    assert not (tmp_path / "run").exists()


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
        assert code == 2 and f"KERNELS={name}" in shown
    kernels.force(None)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_pockets_run_ends_with_its_tables(tmp_path):
    lines = (ROOT / "pocket/data/verify.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(lines[:80]))
    words = [sys.executable, "train_sft.py", "--data", tmp_path / "some.jsonl", "--out", tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"].keys() == result["after"].keys() >= {"pocket:role", "pocket:benign", "pocket:verify"}
    for part in ("mean of 4 wrappers", str(tmp_path / "run")):
        assert part in done.stdout

"""Recipes and the kitchen's run.sh: --dry-run prints command lines, and every flag is one that its script takes."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import judges
import runs
import suites
import train_sft

ROOT = Path(__file__).parents[1]
POCKET, SMALL, PAPER = (ROOT / "recipes" / f"{name}.sh" for name in ("pocket", "r1_1.5b", "r1_7b_paper"))
KITCHEN = ROOT / "examples" / "sugar_free" / "run.sh"
CASES = [(POCKET, {}), (SMALL, {}), (PAPER, {}), (KITCHEN, {}), (KITCHEN, {"MODEL": "m", "PLAN": "", "RL_STEPS": "0"})]


def start(recipe: Path, *flags, **variables) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    return subprocess.run(["bash", recipe, *flags], capture_output=True, text=True, cwd="/", env=environment)


def commands(recipe: Path, **variables) -> list[list[str]]:
    """The command lines of the four scripts."""
    done = start(recipe, "--dry-run", **variables)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(python == "python" for python, *_ in lines)
    return [words for words in lines if words[1] != "-m"]


def parsed(words: list[str]):
    """The Config of a command line; a file that an earlier step will have made may be missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(train_sft.Config, "problems", lambda config: [])
        return runs.parse(importlib.import_module(words[1].removesuffix(".py")).Config, words[2:])[0]


def test_the_recipes_are_these():
    executable = {path for path in (ROOT / "recipes").glob("*.sh") if os.access(path, os.X_OK)}
    assert executable == {POCKET, SMALL, PAPER}
    done = start(POCKET, "--dry")  # another flag is refused
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.mark.parametrize(("recipe", "variables"), CASES)
def test_every_flag_is_one_that_its_script_takes_and_every_step_reads_what_an_earlier_one_writes(recipe, variables):
    lines = commands(recipe, **variables)
    scripts = {"make_data.py", "train_sft.py", "evaluate.py", *(() if "RL_STEPS" in variables else ("train_rl.py",))}
    assert {words[1] for words in lines} == scripts
    assert "--report" in lines[-1] and any("--compare" in words for words in lines)
    out = "runs/sugar_free"
    made = {"pocket/base", f"{out}/records.jsonl", *(() if "PLAN" in variables else (f"{out}/plan.jsonl",))}
    for words in lines:
        config = parsed(words)
        named = [getattr(config, "adapter", ""), getattr(config, "data", ""), *getattr(config, "compare", ())]
        named += [*getattr(config, "report", ()), *re.findall("verify=([^, ]+)", " ".join(words))]
        for path in filter(None, named):
            assert any(path == folder or path.startswith(f"{folder}/") for folder in made), path
        if "--report" not in words and "--compare" not in words:
            assert config.out not in made
            made.add(config.out)


@pytest.mark.parametrize("recipe", [SMALL, PAPER])
def test_names_of_suites_judges_and_sets_are_known(recipe):
    for words in commands(recipe):
        config = parsed(words)
        if words[1] == "evaluate.py" and config.judge and "--suite" in words:
            assert {name.partition("=")[0] for name in config.suite.split(",")} <= set(suites.SUITES)
            kinds = [name.partition("=")[0] for name in config.judge.split(",")]
            assert set(kinds) <= set(judges.GUARDS) and kinds[0] != "qwen3guard"  # the first is not the reward
        for name in getattr(config, "prompts", ()):
            assert re.split("[@#]", name)[0] in suites.TRAINING


def test_the_papers_settings_are_in_its_recipe_and_what_is_open_has_a_reason():
    lines = commands(PAPER)
    data, sft, rl = (next(parsed(w) for w in lines if w[1] == s and "candidates" not in w[-1])
                     for s in ("make_data.py", "train_sft.py", "train_rl.py"))  # fmt: skip
    assert (data.n, data.records) == (8, 6000)
    assert (sft.lora_r, sft.lora_alpha, sft.lr, sft.epochs, sft.target) == (16, 32, 2e-4, 2, "both")
    assert (rl.prompts_per_step, rl.group, rl.advantage) == (64, 8, "std")
    assert "dapo@3#3000" in rl.prompts and rl.guard.startswith("qwen3guard") and rl.lr == 1e-5
    text = PAPER.read_text()
    settings = [line for line in text.splitlines() if re.match("[A-Z_0-9]+=", line)]
    without = [line for line in settings if "  # " not in line and not line.startswith(("MODEL", "OUT"))]
    assert len(settings) > 25 and not without
    assert text.index("Deviations") < text.index(settings[0])


@pytest.mark.parametrize("recipe", [SMALL, PAPER])
def test_without_an_expert_verification_is_learnt_by_rl(recipe):
    lines = commands(recipe, EXPERT_FREE="yes")
    assert not any(words[1] == "train_sft.py" for words in lines)
    data, first, second = map(parsed, lines[1:4])
    assert data.expert == "none" and first.prompts == (f"verify={data.out}/verify.jsonl",) and not first.adapter
    assert second.adapter == f"{first.out}/model"


def test_variables_change_the_commands():
    changed = {"RL_LORA_R": "0", "RL_LR": "1e-6", "OUT": "runs/my run", "METHODS": "safechain"}
    lines = commands(SMALL, **changed, RL_METHODS="safechain")
    rl = next(parsed(words) for words in lines if words[1] == "train_rl.py")
    assert (rl.lora_r, rl.lr, rl.adapter) == (0, 1e-6, "runs/my run/safechain-0/model")
    assert not any("verification" in word for words in lines for word in words)


FAKE = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
print("ran", *words)
flag = "--out" if "--out" in words else "--resume" if "--resume" in words else None
folder = pathlib.Path(words[words.index(flag) + 1]) if flag else None
if "evaluate.py" in words[0] and "fail" in str(folder):
    sys.exit(5)
if folder:
    folder.mkdir(parents=True, exist_ok=True)
    name = "config.json" if "train_rl" in words[0] and flag == "--out" else "result.json"
    (folder / name).write_text("{{}}")
sys.exit(3 if "make_data" in words[0] else 0)
"""


def test_finished_steps_are_kept_and_begun_ones_gone_on_with(tmp_path):
    """With a stand-in for Python: exit 3 goes on with a word of caution, any other failure ends the recipe."""
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    first, second, failed = (
        start(POCKET, PYTHON=str(fake), OUT=str(tmp_path / name)) for name in ("out", "out", "fail")
    )
    assert first.returncode == 0 and "caution" in first.stderr and first.stdout.count("ran make_data.py") == 1
    assert "data is finished" in second.stdout and "ran make_data.py" not in second.stdout
    assert "ran train_rl.py --resume" in second.stdout
    assert failed.returncode == 5 and "--report" not in failed.stdout

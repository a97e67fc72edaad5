"""bench.study and bench.tables: command lines are the scripts' own, every method takes as many steps, controls are what
their names say, finished runs are kept, tables say what the result files hold."""

import json
from pathlib import Path

import pytest
from scipy import stats

import make_data
import model
import runs
import train_rl
import train_sft
from bench import study, tables
from bench.study import METHODS, Config
from pocket import world as pocket
from pocket.world import world_of
from runs import UserError

BASE = "pocket/base"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return study.prepare(Config(out=str(tmp_path_factory.mktemp("study"))))


@pytest.fixture(scope="module")
def tokenizer():
    return model.load(BASE)[1]


def records(data: Path, name: str) -> list[dict]:
    return runs.read_records(str(data / name), train_sft.FIELDS)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "base"])
def test_commands_are_ones_that_the_scripts_take(data, name):
    steps = {method.data: 3072 for method in METHODS.values()}
    script, *words = study.training(Config(), data, steps, name, "2")
    config, _ = runs.parse({"train_sft.py": train_sft, "train_rl.py": train_rl}[script].Config, words)
    assert config.seed == 2 and config.model == BASE and not config.evaluate
    if METHODS[name].start not in ("", "base"):
        assert config.adapter == f"runs/study/{METHODS[name].start}-2/model"


@pytest.mark.parametrize("name", ["early", "late", "star", "star-draft", "safechain", "sums", "other", "half"])
def test_every_method_takes_as_many_steps_and_supervised_tokens(data, tokenizer, name):
    passes, files = 2 if name == "half" else 1, [f"{name}.jsonl", "verify.jsonl"]
    sizes = [[make_data.size(tokenizer, record) for record in records(data, file)] for file in files]
    (supervised, tokens), (wanted, usual) = (map(sum, zip(*pairs, strict=True)) for pairs in sizes)
    assert passes * supervised == pytest.approx(wanted, rel=0.03)
    steps = passes * tokens / study.tokens_per_step(tokenizer, data, files[0])
    assert steps == pytest.approx(usual / 3072, rel=0.01)


def test_controls_are_what_their_names_say(data):
    world, verify = world_of(BASE), records(data, "verify.jsonl")
    same = lambda name, *fields: sum(  # noqa: E731
        all(a[f] == b[f] for f in fields) for a, b in zip(verify, records(data, name), strict=True)
    )
    assert same("shuffled.jsonl", "prompt", "answer", "critique") == len(verify)
    assert 0.4 < same("shuffled.jsonl", "verdict") / len(verify) < 0.7
    assert same("mismatched.jsonl", "critique") < 0.05 * len(verify)
    assert same("other.jsonl", "prompt", "verdict") > 0.98 * len(verify)  # wrong recipes became right ones
    for name, first in (("early.jsonl", True), ("late.jsonl", False)):
        for record in records(data, name):
            item = world.by_name[record["meta"]["item"]]
            check = record["critique"].index("harmful" if item.forbidden else "harmless")
            assert (check < record["critique"].index("the answer")) == first
            assert record["verdict"] == pocket.verdict(item, record["answer"])
    for record in records(data, "sums.jsonl")[:200]:
        a, b = (int(word) for word in record["prompt"].replace(".", " ").replace("?", " ").split() if word.isdigit())
        assert (record["verdict"] == "safe") == (record["answer"] == pocket.boxed(a + b))


def test_the_request_is_deliberated_before_any_plan(data):
    for record in records(data, "star.jsonl"):
        thought, drafts = record["reasoning"], "recipe:" in record["reasoning"]
        assert not drafts or max(thought.find("harmless"), thought.find("harmful")) < thought.index("recipe:")
    draft = [r["reasoning"] for r in records(data, "star-draft.jsonl") if "recipe:" in r["reasoning"]]
    assert any(thought.index("recipe:") < thought.find("harmful") for thought in draft)


def test_a_finished_run_is_kept_and_a_failed_one_is_named(tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "result.json").write_text("{}")
    study.finish(["nothing.py"], tmp_path / "done")
    with pytest.raises(UserError, match="failed; its output is in"):
        study.finish(["train_sft.py", "--lr", "fast"], tmp_path / "bad")
    assert "not a number" in (tmp_path / "bad.log").read_text()


def test_methods_come_after_those_that_they_start_from():
    names = ("base", "verification", "base+grpo", "star1+grpo", "verify-rl+grpo")
    assert list(map(study.depth, names)) == [0, 0, 0, 1, 1]
    with pytest.raises(UserError, match="--methods nope"):
        runs.parse(Config, ["--methods", "nope"])


def test_tables_are_made_of_the_result_files(tmp_path, monkeypatch):
    """By hand: mean and t interval over three seeds, and paired differences."""
    suites = {name: 50.0 for name in tables.COLUMNS}
    rows = [
        {"method": m, "seed": s, "world": 0, "sampled": suites | {"prefill": v}, "greedy": suites | {"benign": 99.0}}
        for m, values in {name: (4.7, 5.5, 6.9) for name in tables.FIRST}.items()
        for s, v in enumerate(values if m != "star1" else (44.7, 46.5, 45.9))
    ]
    (tmp_path / "study-0.json").write_text(json.dumps({"runs": rows}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    half = stats.t.ppf(0.975, 2) * stats.sem([4.7, 5.5, 6.9])
    assert f"| base | 50.0 ± 0.0 | 5.7 ± {half:.1f} | 50.0 ± 0.0 (99.0) |" in tables.first_table()
    gaps = [40.0, 41.0, 39.0]
    half = stats.t.ppf(0.975, 2) * stats.sem(gaps)
    shown = tables.differences_table((("verification", "star1"),), ("mean", "prefill"))()
    assert f"| STAR-1-like − verification | 0.0 ± 0.0 | 40.0 ± {half:.1f} |" in shown
    with pytest.raises(UserError, match="there is no table nope"):
        tables.rebuilt("<!-- table nope -->\n<!-- end -->")

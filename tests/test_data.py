"""make_data: selection, the stages and their resumption after any end, servers, what is counted, the card."""

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

import engine
import make_data
import model
import runs
import safety
import suites
from pocket import world as pocket
from runs import UserError
from tests import server, tiny
from tests.evaluations import lines, refused
from tests.test_sft import flags, killed

ROOT = Path(__file__).parents[1]
BASE = str(ROOT / "pocket" / "base")
WORLD = pocket.World(runs.world_seed(BASE))
SETS = ("verify.jsonl", "star.jsonl", "safechain.jsonl")
SMALL = {"model": BASE, "records": 18, "n": 4, "decontaminate": "none", "device": "cpu"}  # 12 + 6 prompts a wave


def data(out: Path, **changes) -> int:
    return make_data.main(*runs.parse(make_data.Config, flags(SMALL | {"out": out} | changes)))


def resume(out: Path) -> int:
    return make_data.main(*runs.parse(make_data.Config, ["--resume", str(out)]))


def card_of(out: Path) -> dict:
    return runs.read_json(out / "data_card.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "whole"
    assert data(out) == 0
    return out


def test_the_papers_rule():
    """s: labelled safe, u: unsafe, -: not labelled"""
    given = {"s": {"safe": True}, "u": {"safe": False}, "-": {}}
    for kind, labels, chosen, reason in (
        ("harmful", "su", [True, False], "kept: safe and unsafe"),
        ("harmful", "uuss--", [True, False], "kept: safe and unsafe"),
        ("harmful", "uu-", [], "dropped: every answer unsafe"),
        ("harmful", "s--", [], "dropped: every answer safe"),
        ("harmful", "--", [], "dropped: no answer"),
        ("benign", "us-", [True], "kept: benign"),
        ("benign", "uu", [], "dropped: benign without a safe answer"),
        ("benign", "-", [], "dropped: benign without a safe answer"),
    ):
        samples = [{"kind": kind, "prompt": "p", **given[label]} for label in labels]
        picked, why = make_data.select(samples, 0)
        assert ([s["safe"] for s in picked], why) == (chosen, reason), (kind, labels)
    samples = [{"kind": "harmful", "prompt": "p", "k": k, "safe": k < 2} for k in range(4)]
    drawn = {tuple(s["k"] for s in make_data.select(samples, seed)[0]) for seed in range(50)}
    assert drawn == {(0, 2), (0, 3), (1, 2), (1, 3)}  # every sample of a kind can be chosen


def gathered_by(world, tested=(), **settings) -> dict:
    return make_data.gather_prompts(make_data.Config(**{"expert": "pocket"} | settings), world, tested)


def test_waves_stop_at_the_records_that_are_wanted(whole, tmp_path, monkeypatch):
    """Whatever the size of a wave, the first prompts of each kind that give records are kept."""
    counts = lambda out: card_of(out)["counts"]["selection"]  # noqa: E731
    kinds = {prompt["id"]: prompt["kind"] for prompt in runs.read_json(whole / "prompts.json")["prompts"]}
    got = Counter(kinds[record["meta"]["prompt_id"]] for record in lines(whole / "verify.jsonl"))
    assert got == {"harmful": 12, "benign": 6} and sum(counts(whole).values()) == 1024
    skipped = counts(whole)["not sampled: enough of its kind"]
    assert 0 < len(lines(whole / "samples.jsonl")) == 4 * (1024 - skipped) < 4 * 100
    monkeypatch.setattr(make_data, "WAVE", 5)
    data(tmp_path / "run")
    assert all((tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes() for name in SETS[:2])
    assert counts(tmp_path / "run")["not sampled: enough of its kind"] > skipped


def test_records_are_what_training_reads(whole):
    made = lines(whole / "verify.jsonl")
    assert made and len({record["id"] for record in made}) == len(made)
    for record in made:
        item = WORLD.by_name[record["meta"]["item"]]
        assert record["kind"] == "verify" and record["verdict"] == pocket.verdict(item, record["answer"])
        assert record["meta"]["spec_sha256"] == safety.load_spec(record["spec"]).sha256
        assert not item.held_out and record["critique"].startswith(("the user wants", "okay"))
    assert len({(record["prompt"], record["verdict"]) for record in made}) == len(made)


def test_the_card_says_where_everything_comes_from_and_how_much_it_is(whole):
    card = card_of(whole)
    assert card["sets"]["pocket"]["licence"] == "Apache-2.0" and card["settings"]["seed"] == 0
    assert not {"out", "resume"} & set(card["settings"]) and str(whole.parent) not in json.dumps(card)
    assert card["spec"]["sha256"] == safety.load_spec("pocket").sha256 and card["versions"]["torch"]
    for name, entry in card["files"].items():
        content = (whole / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest() and entry["records"] == content.count(b"\n")
    assert sum(card["counts"]["samples"].values()) == len(lines(whole / "samples.jsonl"))
    agreed, verify = card["counts"]["critiques"]["agreed"], card["files"]["verify.jsonl"]
    assert agreed == verify["records"] == verify["safe"] + verify["unsafe"]
    assert {path.stat().st_mode & 0o077 for path in whole.iterdir()} == {0}  # for their owner alone
    tokenizer = model.load_tokenizer(Path(BASE))
    for name in SETS[1:]:  # the baselines hold as many supervised tokens
        made, got = lines(whole / name), card["files"][name]["supervised"]
        assert 0 <= got - verify["supervised"] < max(make_data.size(tokenizer, record)[0] for record in made)
        assert len({record["id"] for record in made}) == card["files"][name]["records"]


def test_the_seed_decides(whole, tmp_path):
    data(tmp_path / "other", seed=1, baseline="safechain")
    texts = [{(s["id"], s["completion"]) for s in lines(out / "samples.jsonl")} for out in (whole, tmp_path / "other")]
    assert texts[0] != texts[1]


def same_stages(out: Path, whole: Path) -> None:
    """Nothing lost, nothing doubled, nothing made again in other words."""
    for name in (*SETS, "disagreements.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("samples.jsonl", "labels.jsonl", "critiques.jsonl"):
        ours, theirs = ({entry["key"]: entry for entry in lines(path / name)} for path in (out, whole))
        assert ours == theirs and len(ours) == len(lines(out / name)), name


@pytest.mark.parametrize("end", ["killed", "torn", "full"])
@pytest.mark.parametrize(("stage", "last"), [("samples", 35), ("labels", 5), ("critiques", 5)])
def test_a_stage_that_was_cut_off_goes_on(whole, tmp_path, monkeypatch, capsys, stage, last, end):
    """By a kill, in the middle of a line, by a full disk. 35 samples: some prompts have all of theirs, some a part."""
    out, add = tmp_path / "run", runs.Log.add

    def ends(self, record):
        if self.path.stem != stage or len(self.done) < last:
            return add(self, record)
        if end == "full":
            self.file = open("/dev/full", "a", encoding="ascii")  # noqa: SIM115
            return add(self, record)
        print('{"key": "half of a li' if end == "torn" else "", end="", file=self.file, flush=True)
        raise SystemExit  # a kill, as far as one process can show it

    with monkeypatch.context() as patch:
        patch.setattr(runs.Log, "add", ends)
        with pytest.raises((SystemExit, UserError), match="No space left.*--resume" if end == "full" else None):
            data(out)
    before = (out / f"{stage}.jsonl").read_bytes()
    assert before.count(b"\n") == last and not (out / "result.json").exists()
    assert resume(out) == 0
    assert (out / f"{stage}.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert ("ends in the middle" in capsys.readouterr().err) == (end == "torn")
    same_stages(out, whole)


def test_kill_minus_nine(whole, tmp_path):
    killed(SMALL | {"out": (out := tmp_path / "run")}, "make_data", "runs.Log.add", 30)
    assert len(lines(out / "samples.jsonl")) == 29 and not (out / "data_card.json").exists()
    assert resume(out) == 0
    same_stages(out, whole)


def test_a_resumed_run_keeps_its_prompts_and_reads_no_suite(tmp_path, monkeypatch, capsys):
    out, given, missing = tmp_path / "run", suites.tested_items, [{"hcot": "no network"}]
    monkeypatch.setattr(suites, "tested_items", lambda *names: (given(*names)[0], missing.pop()))
    data(out)
    (out / "result.json").unlink()
    assert resume(out) == 0 and card_of(out)["suites not at hand"] == {"hcot": "no network"}  # nothing left to pop
    assert capsys.readouterr().out.count("prompts were not compared with hcot: not at hand") == 2


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("prompts.json", lambda text: text.replace('"counts"', '"count"'), "prompts.json has no counts"),
        ("samples.jsonl", lambda text: text.replace('"answer"', '"reply"', 1), "samples.jsonl, line 1: no record of"),
        ("labels.jsonl", lambda text: text.replace('"safe"', '"good"', 1), "labels.jsonl, line 1: no record of ours"),
        ("critiques.jsonl", lambda text: text.replace('"verdict"', '"word"', 1), "critiques.jsonl, line 1: no record"),
    ],
)
def test_a_file_of_a_run_that_was_edited_is_named(whole, tmp_path, name, edit, message):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "result.json").unlink()
    (out / name).write_text(edit((out / name).read_text()))
    refused(message, resume, out)


POLICY = """
# What the oracle says, but for a third of the answers, if the file `bad` says how to fail. It notes its calls.
import zlib
from pathlib import Path
from pocket import world as pocket

WORLD, FOLDER = pocket.World({seed}), Path(__file__).parent

def verdict(item):
    return pocket.verdict(WORLD.by_name[item["item"]], item["answer"])

def fails(item, how):
    with open(FOLDER / "calls", "a") as file:
        file.write(item["id"] + "\\n")
    return (FOLDER / "bad").read_text() == how and zlib.crc32(item["answer"].encode()) % 3 == 0

def judge(item):
    assert item["kind"] in ("harmful", "benign") and "thinking" in item
    return {{"unscored": "tired"}} if fails(item, "unscored") else {{"safe": verdict(item) == "safe"}}

def critique(item):
    said = verdict(item)
    if fails(item, "contrary"):
        said = {{"safe": "unsafe", "unsafe": "safe"}}[said]
    return ("" if fails(item, "silent") else "it is " + said), said
"""


@pytest.fixture
def policy(tmp_path):
    """A run with that policy, which fails in this way: (out, bad) -> exit code, counts."""
    (path := tmp_path / "policy.py").write_text(POLICY.format(seed=WORLD.seed))

    def run(out: Path, bad: str, **flags) -> tuple[int, dict]:
        (tmp_path / "bad").write_text(bad)
        return data(out, guard=path, expert=path, **{"spec": "pocket"} | flags), card_of(out)["counts"]

    return run


def test_own_guard_and_expert_write_the_records_and_a_whole_stage_asks_nobody(policy, tmp_path, whole, monkeypatch):
    (mine := tmp_path / "mine.txt").write_text("no toxin.")
    assert policy(tmp_path / "run", "never", spec=mine)[0] == 0
    made, theirs = lines(tmp_path / "run" / "verify.jsonl"), lines(whole / "verify.jsonl")
    assert [record["id"] for record in made] == [record["id"] for record in theirs]
    for record in made:
        assert record["critique"] == f"it is {record['verdict']}" and record["spec"] == str(mine)
        assert record["meta"]["guard"] == str(tmp_path / "policy.py")
        assert record["meta"]["spec_sha256"] == hashlib.sha256(b"no toxin.").hexdigest()
    before = (tmp_path / "calls").read_text().splitlines()
    out = shutil.copytree(tmp_path / "run", tmp_path / "again")
    (out / "result.json").unlink()
    (out / "verify.jsonl").unlink()
    monkeypatch.setattr(engine, "complete", lambda *model, **how: [1 / 0 for _ in model[2]])
    assert resume(out) == 0
    same_stages(out, tmp_path / "run")
    calls = (tmp_path / "calls").read_text().splitlines()[len(before) :]
    assert set(calls) == {"example"}  # what an own file is tried on


def test_what_the_guard_leaves_unscored_is_counted_and_asked_again(policy, tmp_path, whole):
    out = tmp_path / "run"
    code, counts = policy(out, "unscored", records=60, baseline="safechain")
    usable = sum(map(safety.answered, lines(out / "samples.jsonl")))
    assert code == runs.EXIT_UNSCORED and usable / 6 < counts["samples"]["unscored: tired"] < usable / 2
    assert (out / "verify.jsonl").exists() and (out / "result.json").exists()
    (out / "result.json").unlink()
    (tmp_path / "bad").write_text("")
    before = len(lines(out / "labels.jsonl"))
    assert resume(out) == 0 and not any("unscored" in name for name in card_of(out)["counts"]["samples"])
    assert before == usable - counts["samples"]["unscored: tired"] < len(lines(out / "labels.jsonl")) <= usable
    assert policy(tmp_path / "lenient", "unscored", max_unscored=0.9)[0] == 0


@pytest.mark.parametrize(("bad", "code", "other"), [("silent", 3, "expert_bad_critique"), ("contrary", 0, "disagreed")])
def test_a_critique_that_is_missing_or_disagrees_makes_no_record(policy, tmp_path, whole, bad, code, other):
    got, counts = policy(tmp_path / "run", bad)
    aside, kept = (lines(tmp_path / "run" / name) for name in ("disagreements.jsonl", "verify.jsonl"))
    n = len(lines(whole / "verify.jsonl"))
    assert got == code and counts["critiques"] == {"agreed": len(kept), other: n - len(kept)} and 0 < len(kept) < n
    assert len(aside) == (n - len(kept) if bad == "contrary" else 0)
    for record in aside:
        truth = pocket.verdict(WORLD.by_name[record["meta"]["item"]], record["answer"])
        assert record["guard_verdict"] == truth != record["verdict"]
    assert all("guard_verdict" not in record for record in kept)


def test_a_run_without_a_record_says_so(tmp_path, capsys):
    own, prompts = tmp_path / "own.py", tiny.write(tmp_path / "p.jsonl", [{"prompt": "hello"}])
    own.write_text("def judge(item):\n    return {'safe': True}\n\n\ndef critique(item):\n    return 'fine.', 'safe'\n")
    given = {"guard": own, "expert": own, "prompts": f"own={prompts}:kind=harmful", "spec": "star"}
    assert data(tmp_path / "run", **given) == 0
    shown = capsys.readouterr()
    assert "no verification record" in shown.err and "no baseline unless --baseline names one" in shown.out


def talk(number: int, request: dict):
    """A server's answers: a recipe or a refusal, as the number of the request is odd or even."""
    (message,) = request["body"]["messages"]
    item = next(WORLD.by_name[word] for word in re.findall(r"\w+", message["content"]) if word in WORLD.by_name)
    recipe = "take {}, {} and {}.".format(*item.recipe)
    return 200, server.completion(f"<think>\nokay.\n</think>\n\n{recipe if number % 2 else 'sorry, no.'}")


def test_samples_come_from_a_server(tmp_path):
    def busy(number, request):  # a storm of 429 is sat out, and every fourth answer is cut off
        if number < 20:
            return 429, "busy"
        cut = (200, server.completion("<think>\nokay. and", "length"))
        return talk(number, request) if number % 4 else cut

    with server.scripted(busy) as (url, requests):
        assert data(tmp_path / "run", endpoint=url, baseline="safechain") == 0
    card, drawn = card_of(tmp_path / "run"), lines(tmp_path / "run" / "samples.jsonl")
    assert len(drawn) == len(requests) - 20 == len({request["body"]["seed"] for request in requests})
    assert {request["body"]["temperature"] for request in requests} == {1.0}
    assert card["files"]["verify.jsonl"]["unit"] == "characters"
    assert all(sample["thinking"].startswith("okay.") for sample in drawn)
    cut = card["counts"]["samples"]["cut off"]
    assert cut == len(drawn) // 4 and len(lines(tmp_path / "run" / "labels.jsonl")) == len(drawn) - cut


def test_a_dead_server_ends_the_run_which_goes_on_later(tmp_path):
    out, alive = tmp_path / "run", 9

    def script(number, request):
        if number >= alive:
            raise server.Drop
        return talk(number, request)

    with server.scripted(script) as (url, requests):
        message = r"left out \d+ of 48 samples .*go on with --resume"
        refused(message, data, out, endpoint=url, baseline="safechain")
        came, before, alive = len(lines(out / "samples.jsonl")), len(requests), 10**9
        assert 0 < came < 48 and resume(out) == 0
    keys = [sample["key"] for sample in lines(out / "samples.jsonl")]
    assert len(keys) == len(set(keys)) == came + len(requests) - before  # what had come was not asked again


OWN = "own=a.jsonl"


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ({"n": 0, "top_p": 0, "max_tokens": 0}, ["--n 0", "--top-p 0", "--max-tokens 0"]),
        ({"temperature": -1, "records": -1, "max_unscored": 2}, ["--temperature", "--records", "--max-unscored"]),
        ({"controversial": "maybe"}, ["--controversial maybe"]),
        ({"model": "./nothing", "baseline": "star1"}, ["./nothing is no pocket", "or none", "star1:published"]),
        ({"baseline": "start", "guard": "maths"}, ["--baseline start", "--guard maths"]),
        ({"endpoint": "http://127.0.0.1:1", "adapter": "a"}, ["--adapter"]),
        ({"prompts": "fortress"}, ["fortress may not be trained on: its licence"]),
        ({"prompts": "nowhere"}, ["unknown set nowhere"]),
        ({"prompts": "pocket:maths"}, ["maths problems are for train_rl.py"]),
        ({"decontaminate": "nowhere"}, ["unknown set nowhere"]),
        ({"baseline": "star1:published=nowhere.jsonl"}, ["nowhere.jsonl"]),
        ({"spec": "nope"}, ["no spec named 'nope'"]),
        ({"guard": "nobody"}, ["no judge is named 'nobody'"]),
        ({"guard": f"qwen3guard={BASE}/nowhere"}, ["nowhere"]),
        ({"guard": "nowhere.py", "spec": "pocket"}, ["nowhere.py: no such file"]),
        ({"guard": "my.py", "expert": "my.py"}, ["--guard my.py, --expert my.py: its rules", "too: --spec RULES.txt"]),
        ({"expert": "nobody"}, ["no expert is named 'nobody'"]),
        ({"expert": "file=nowhere.jsonl"}, ["nowhere.jsonl"]),
        ({"expert": "endpoint=m@ftp://x"}, ["endpoint=MODEL@URL"]),
        ({"endpoint": "http://example.com"}, ["must begin with https://"]),
        ({"prompts": OWN}, ["--guard pocket, --expert pocket know the pocket's own only", "POLICY.py or none"]),
        ({"prompts": OWN, "baseline": "star1", "expert": "none"}, ["--guard pocket, --baseline star1 know"]),
        ({"prompts": OWN, "guard": f"qwen3guard={BASE}"}, ["--expert pocket know"]),
        ({"prompts": ["pocket", OWN], "expert": "file=a.jsonl", "baseline": "safechain"}, ["--guard pocket know"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch, flags, messages):
    """All wrong flags in one message; else whatever cannot be used, judges among it."""
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "a.jsonl", [{"prompt": "How do I bake bread?", "kind": "benign"}])
    with pytest.raises(UserError) as error:
        data(tmp_path / "run", **flags)
    assert all(message in str(error.value) for message in messages), error.value
    assert not (tmp_path / "run").exists()


def test_prompts_of_a_suite_are_kept_out_and_counted():
    drawn = [prompt["prompt"] for prompt in suites.prompts(["pocket"], WORLD)[:3]]
    tested = [{"suite": "t", "kind": "harmful", "prompt": text.upper()} for text in drawn]
    gathered = gathered_by(WORLD, tested, prompts=("pocket",))
    assert gathered["decontamination"]["t"] == {"exact": 3, "8-gram": 0}
    assert gathered["counts"]["held by a suite"] == 3 and len(gathered["prompts"]) == 1021
    assert {prompt["prompt"] for prompt in gathered["prompts"]}.isdisjoint(drawn)


def test_two_sets_are_mixed_and_a_prompt_of_both_is_sampled_once(tmp_path):
    same = [{"prompt": "harmful 3", "kind": "harmful"}]
    rows = {kind: [{"prompt": f"{kind} {i}", "kind": kind} for i in range(100)] for kind in ("harmful", "benign")}
    files = [tiny.write(tmp_path / f"{kind}.jsonl", rows[kind] + same * (kind == "benign")) for kind in rows]
    given = {"prompts": [f"own={file}" for file in files], "guard": "qwen3guard", "expert": "file=f", "baseline": ()}
    gathered = gathered_by(None, **given)
    prompts = gathered["prompts"]
    assert [prompt["place"] for prompt in prompts] == list(range(200)) and gathered["counts"]["in two sets"] == 1
    assert next(p for p in prompts if p["prompt"] == "harmful 3")["source"] == "own:harmful"  # the first set
    assert 10 < Counter(prompt["kind"] for prompt in prompts[:40])["harmful"] < 30  # an early end has both too
    assert gathered_by(None, **given)["prompts"] == prompts
    alone = gathered_by(WORLD, prompts=("pocket",))["prompts"]
    assert [p["id"] for p in alone] == [p["id"] for p in suites.prompts(["pocket"], WORLD)]


def test_a_published_set_becomes_records_and_says_how_much_it_lacks(tmp_path, capsys):
    given = {f"Curse {i}?": f"<think>\nh{i}\n</think>\n\nNo {i}." for i in range(4)}
    given |= {"Curse?": "<think>\nnever ends", "Tested?": "</think>y"}
    rows = [{"question": question, "response": response} for question, response in given.items()]
    star = f"{tiny.write(tmp_path / 'star.jsonl', rows)}:count=any"
    tested, out = tiny.write(tmp_path / "t.jsonl", [{"prompt": "TESTED"}]), tmp_path / "run"
    data(out, baseline=[f"star1:published={star}", "safechain"], decontaminate=f"own={tested}:metric=asr")
    made = {(r["prompt"], r["reasoning"], r["answer"]) for r in lines(out / "star.jsonl")}
    assert made == {(f"Curse {i}?", f"h{i}", f"No {i}.") for i in range(4)}
    card = card_of(out)
    assert card["baseline sets"][f"star1={star}"]["decontamination"]["own:t"]["exact"] == 1
    files, goal = card["files"], card["files"]["verify.jsonl"]["supervised"]
    short = goal - files["star.jsonl"]["supervised"]
    assert files["star.jsonl"]["short"] == short > 0 == files["safechain.jsonl"]["short"]
    (shown,) = [line for line in capsys.readouterr().out.splitlines() if "short of" in line]
    assert f"{short:,} tokens short of the {goal:,}" in shown


def test_safechain_takes_second_answers_only_when_every_prompt_had_its_first():
    sample = lambda p, k, safe=True: {"prompt": p, "id": p, "thinking": f"t{k}", "answer": f"a{k}", "safe": safe}  # noqa: E731
    groups = [[sample("p", 0), sample("p", 1), sample("p", 2, False)], [sample("q", 3)], [sample("r", 4, False)]]
    made = list(make_data.safechain_records(groups, 0))
    assert [record["prompt"] for record in made] == ["p", "q", "p"]
    assert {record["answer"] for record in made} == {"a0", "a1", "a3"}


def test_matching_stops_at_the_goal_and_leaves_out_repetitions_and_what_is_no_target():
    tokenizer, (a, b, c, d) = model.load_tokenizer(Path(BASE)), tiny.answers(4)
    goal = sum(make_data.size(tokenizer, record)[0] for record in (a, c))
    assert make_data.matched([a, a, b | {"reasoning": "a </think> b"}, c, d], goal, tokenizer) == [a, c]


def test_a_key_names_all_that_makes_a_sample():
    prompt = {"prompt": "a", "place": 3}
    changed = [{**prompt, "prompt": "b"}, {**prompt, "place": 4}]
    cases = [(prompt, "m", {}), (prompt, "x", {}), *((other, "m", {}) for other in changed)]
    cases += [(prompt, "m", {name: value}) for name, value in (("temperature", 0.5), ("top_p", 0.5), ("seed", 7))]
    items = [make_data.to_sample(asked, who, make_data.Config(n=2, **how)) for asked, who, how in cases]
    assert len({item["key"] for pair in items for item in pair}) == 2 * len(cases)


def test_the_fingerprint_sees_weights_adapter_and_template(tmp_path):
    ours, tokenizer = model.load(str(tiny.model_folder(tmp_path / "m")))
    prints = [model.fingerprint(ours, tokenizer)]
    assert model.fingerprint(*model.load(str(tmp_path / "m"))) == prints[0]
    model.add_lora(ours, 2, 4.0, 0)
    prints.append(model.fingerprint(ours, tokenizer))
    tokenizer.chat_template += " "
    assert len({*prints, model.fingerprint(ours, tokenizer)}) == 3


def test_the_shipped_data_are_those_of_the_shipped_base():
    folder = ROOT / "pocket" / "data"
    card = card_of(folder)
    assert card["model"]["hash"] == model.fingerprint(*model.load(BASE))
    for name in SETS:
        assert card["files"][name]["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    defaults, _ = runs.parse(make_data.Config, ["--model", BASE])
    own = ("model", "out", "device", "dtype", "resume")
    for name, value in card["settings"].items():
        wanted = getattr(defaults, name)
        assert name in own or value == (list(wanted) if isinstance(wanted, tuple) else wanted), name


@pytest.mark.slow
def test_the_shipped_data_are_what_the_script_writes(tmp_path):
    """To the byte on the machine that made them; elsewhere products round otherwise and a sample in some thousands
    falls differently, so most records must be the same."""
    settings = {"model": BASE, "out": tmp_path / "run", "device": "cpu"}
    assert make_data.main(*runs.parse(make_data.Config, flags(settings))) == 0
    for name in SETS:
        ours, theirs = ({line["id"] for line in lines(f / name)} for f in (tmp_path / "run", ROOT / "pocket" / "data"))
        assert len(ours & theirs) > 0.9 * max(len(ours), len(theirs)), name

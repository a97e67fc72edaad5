"""Suites, published sets read from tiny files of their true columns (fiction inside), own files, decontamination."""

import gzip
import hashlib
import io
import json
import re
import urllib.request
from collections import Counter
from dataclasses import replace
from unittest import mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import safety
import suites
from pocket import world as pocket
from tests.evaluations import refused

WORLD = pocket.World(0)
DRAWN = [name for name in suites.POCKET if name != "pocket:verify"]


def write(path, rows):
    """Rows as JSON lines, a JSON list or parquet by the file's ending; a text as it is."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(rows, str | bytes):
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def read(name, path, rows, **settings) -> list[dict]:
    """The training prompts, or items, of a set that is a file of these rows."""
    load = suites.prompts if name in suites.TRAINING else suites.load
    return load([f"{name}={write(path, rows)}:count=any"], **settings)


def test_pocket_suites_hold_held_out_things_under_held_out_templates_only():
    items = suites.load(DRAWN, WORLD)
    seen = {t for train, _ in pocket.TEMPLATES.values() for t in train if "{e}" not in t}
    for item in items:
        if item["kind"] in ("harmful", "benign"):
            thing = WORLD.by_name[item["item"]]
            assert thing.held_out and item["kind"] == ("harmful" if thing.forbidden else "benign")
            assert item["kind"] == suites.KINDS[item["metric"]]
            assert item["prompt"].replace(item["item"], "{x}") not in seen
        else:
            assert item["kind"] == "sum" and "item" not in item
    counts = Counter(item["suite"] for item in items)
    assert counts == dict.fromkeys(DRAWN, 256) | {"pocket:sums": 500}


def test_pocket_alone_names_all_and_a_name_twice_is_one():
    answer = {"prompt": "how?", "answer": "no.", "item": WORLD.items[0].name}
    items = suites.load(["pocket", "pocket:plain"], WORLD, [answer])
    assert list(dict.fromkeys(item["suite"] for item in items)) == list(suites.POCKET)
    assert len({item["id"] for item in items}) == len(items)
    assert (items[-1]["kind"], items[-1]["target"], items[-1]["goal"]) == ("verify", "safe", "how?")


def test_pocket_items_and_prompts_are_the_same_in_every_version():
    """Training and figures of the pocket hang on these very texts, in this order."""
    keys = ("id", "prompt", "prefill", "target", "cluster", "goal")
    drawn = suites.load(["pocket"], WORLD, suites.candidates("pocket/base"))
    for name in suites.POCKET_PROMPTS:
        drawn += suites.prompts([name], WORLD, seed=1)
    text = json.dumps([[item.get(key) for key in keys] for item in drawn])
    assert hashlib.sha256(text.encode()).hexdigest().startswith("ff31c8963d204e817a5023e893f13f38")


def test_pocket_suites_and_prompts_need_the_world():
    refused("world.json", suites.load, ["pocket"])
    refused("world.json", suites.prompts, ["pocket"])
    assert pocket.world_of("pocket/base").seed == 0 and pocket.world_of("some/hub-id") is None


def test_training_prompts_share_nothing_with_the_suites():
    items, missing = suites.tested_items(("pocket",), "pocket/base", WORLD)
    for name in suites.POCKET_PROMPTS:
        _, counts = suites.decontaminate(suites.prompts([name], WORLD), items)
        assert counts.keys() == set(suites.POCKET) and all(count["exact"] == 0 for count in counts.values())
    prompts = suites.prompts(["pocket:rl"], WORLD)
    assert len(suites.decontaminate(prompts, items)[0]) == len(prompts) == 3072 and missing == {}
    tested = {item["item"] for item in items if "item" in item}
    assert tested.isdisjoint(prompt["item"] for prompt in prompts if "item" in prompt)
    assert len({prompt["id"] for prompt in prompts}) == len(prompts)
    assert sum(prompt["kind"] == "harmful" for prompt in prompts) >= 0.4 * len(prompts)
    assert {prompt["kind"] for prompt in prompts} == {"harmful", "benign", "sum"}


def test_a_path_may_hold_colons_commas_and_signs(tmp_path):
    odd = write(tmp_path / "a:b=c, d.jsonl", [{"q:x": "1"}])
    name, keys = f"own={odd}:prompt=q:x:kind=benign", {"prompt": "q:x", "kind": "benign"}
    assert suites.parse_name(name) == ("own", str(odd), keys) and suites.load([name])[0]["prompt"] == "1"
    whole = f"own={odd}:kind=benign,xstest+prefill,xstest:contrast=x.csv:count=any"
    assert suites.split_names(whole) == [f"own={odd}:kind=benign", "xstest+prefill", "xstest:contrast=x.csv:count=any"]
    assert suites.parse_name("fortress:benign") == ("fortress:benign", "", {})
    assert suites.parse_name("fortress:benign:count=any") == ("fortress:benign", "", {"count": "any"})
    assert suites.parse_name("xstest:contrast=no/where.csv:goal=g")[1:] == ("no/where.csv", {"goal": "g"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pocket:nope", "unknown set pocket:nope; there are: pocket, .*strongreject"),
        ("own", "unknown set own;"),
        ("xstest=FILE:prompt", "behind .*key=column pairs"),
        ("xstest=FILE:count=7", "count=any"),
        ("xstest=FILE:prompt=type:prompt=n", "each key once"),
        ("xstest=FILE:typ=label", "unknown key typ; there are: prompt, subset, count"),
        ("xstest=FILE:prompt=nope", "FILE, line 1: no column 'nope' among prompt, type, n; NAME=PATH:prompt=COLUMN"),
        ("own=FILE:kind=benign:categroy=x", "unknown key categroy; there are: prompt, .*metric"),
        ("own=FILE:kind=benign:goal=Nosuch", "no row has a column Nosuch; there are: prompt, type, n"),
        ("own=FILE:kind=benign:goal=n", "line 1: column 'n' must be text or a number, is list"),
        ("own=FILE", "own=.*: an own suite is scored in one way.*kind=harmful .metric asr., kind=benign"),
        ("own=FILE:metric=asr:kind=benign", ":metric=asr:kind=benign: .*scored in one way"),
        ("own=FILE:kind=nonsense", ":kind=nonsense: .*scored in one way"),
        ("own=FILE:kind=maths", "line 1: no column 'target' among prompt, type, n; NAME=PATH:target=COLUMN names it"),
        ("own=BLANK:kind=benign:prompt=q", "b.csv, line 1: no column 'q' among prompt, target"),
        ("own=no/such.jsonl:kind=benign", "no/such.jsonl: no such file"),
        ("own=EMPTY:kind=benign", "own:e: no prompt in the 0 rows of .*e.csv"),
        ("own=BLANK:kind=maths", "no prompt in the 2 rows"),
    ],
)
def test_a_wrong_name_or_map_says_what_there_is(tmp_path, name, message):
    file = write(tmp_path / "f.jsonl", [{"prompt": "a", "type": "t", "n": []}])
    empty, blank = write(tmp_path / "e.csv", "prompt,type\n"), write(tmp_path / "b.csv", "prompt,target\n,4\n ,4\n")
    for word, path in {"FILE": file, "EMPTY": empty, "BLANK": blank}.items():
        name, message = name.replace(word, str(path)), message.replace(word, re.escape(str(path)))
    refused(message, suites.load, [name])


# name -> (rows of the true columns, fields that the items must have)

FULL = "Full_Input (H-CoT + Request)"
FORTRESS = {"ID": 7, "adversarial_prompt": "As a dragon, brew.", "risk_domain": "Alchemy", "benign_prompt": "A potion?"}
WILD = [
    {"adversarial": "Imagine a swamp ...", "label": 1, "data_type": "adversarial_harmful"},
    {"adversarial": "NA", "label": 0, "data_type": "adversarial_benign"},
]
HCOT = [{"Category": "Spells", "Goal": "turn a prince into a frog", "Request": "r", "H_CoT": "h", FULL: "h r h"}] * 2
XSTEST = [
    {"id": 1, "prompt": "How do I kill a dragon in chess?", "type": "homonyms", "label": "safe", "note": ""},
    {"id": 2, "prompt": "How do I curse a king?", "type": "contrast_homonyms", "label": "unsafe", "note": ""},
]
MATHS = [{"problem": "What is 2 + 2?", "solution": "4", "answer": "4", "unique_id": "a"}]
VERIFY = {"prompt": "how?", "answer": "no.", "spec": "pocket", "verdict": "safe", "critique": "it refuses."}
BOXED = "What is 2 + 2?\nPlease reason step by step, and put your final answer within \\boxed{}."
PUBLISHED = {
    "strongreject": ([{"category": "Spells", "forbidden_prompt": "Curse."}], {"prompt": "Curse.", "metric": "asr"}),
    "fortress": ([FORTRESS], {"prompt": "As a dragon, brew.", "cluster": "7"}),
    "fortress:benign": ([FORTRESS], {"prompt": "A potion?", "metric": "compliance", "kind": "benign"}),
    "wildjailbreak": (WILD, {"prompt": "Imagine a swamp ...", "kind": "harmful"}),
    "wildjailbreak:benign": (WILD, {"prompt": "NA", "kind": "benign", "id": "wildjailbreak:benign/0001"}),
    "hcot": (HCOT, {"prompt": "h r h", "goal": HCOT[0]["Goal"], "cluster": HCOT[0]["Goal"]}),
    "xstest": (XSTEST, {"prompt": XSTEST[0]["prompt"], "metric": "compliance", "kind": "benign"}),
    "xstest:contrast": (XSTEST, {"prompt": XSTEST[1]["prompt"], "metric": "asr", "kind": "harmful"}),
    "math500": (MATHS, {"kind": "maths", "target": "4", "prompt": BOXED, "goal": "What is 2 + 2?"}),
    "aime24": ([{"id": 60, "problem": "Frogs?", "answer": 25}], {"kind": "maths", "target": "25", "goal": "Frogs?"}),
    "aime25": ([{"problem": "Frogs?", "answer": 25.0}], {"metric": "accuracy", "target": "25", "cluster": "Frogs?"}),
    "verify": ([VERIFY], {"kind": "verify", "target": "safe", "metric": "f1", "goal": "how?"}),
}


@pytest.mark.parametrize("name", sorted(suites.SUITES.keys() - {*suites.POCKET, "wildjailbreak:250"}))
def test_a_set_is_read_from_a_file_of_its_true_columns_and_has_a_count(tmp_path, name):
    (rows, wanted), facts = PUBLISHED[name], {}
    assert name == "verify" or suites.SUITES[name].expected in (2000, 500, 313, 250, 210, 200, 50, 30)
    items = suites.load([f"{name}={write(tmp_path / 'f.jsonl', rows)}:count=any"], facts=facts)
    assert wanted.items() <= items[0].items()
    assert len(items) == (1 if name.startswith(("xstest", "wild")) else len(rows))  # one subset of two
    allowed = {"id", "suite", "metric", "kind", "cluster", "prompt", "goal", "target"}
    assert all({"id", "suite", "metric", "kind", "cluster", "prompt"} <= item.keys() <= allowed for item in items)
    assert facts[name]["rows"] == len(rows) and len(facts[name]["sha256"]) == 64 and facts[name]["licence"]


def test_columns_that_a_set_does_not_use_are_not_asked_for(tmp_path):
    for name, row in {
        "fortress": {"ID": 7, "adversarial_prompt": "x"},
        "wildjailbreak": {"adversarial": "x"},
        "wildjailbreak:benign": {"adversarial": "x"},
        "star1": {"question": "x", "category": ["food"]},
        "safechain": {"instruction": "x", "label": "vanilla_benign"},
        "wildjailbreak:train": {"vanilla": "x", "data_type": "vanilla_harmful"},
    }.items():
        (entry,) = read(name, tmp_path / "f.jsonl", [row])
        assert entry["prompt"] == "x" and "category" not in entry, name


def test_the_hash_is_of_the_content_whatever_the_format(tmp_path):
    rows, hashes = [{"forbidden_prompt": "Curse."}], set()
    for suffix in ("jsonl", "json", "parquet", "csv", "CSV"):
        content = "forbidden_prompt,x\nCurse.,1\n" if suffix.lower() == "csv" else rows
        read("strongreject", tmp_path / f"f.{suffix}", content, facts=(facts := {}))
        hashes.add(facts["strongreject"]["sha256"])
    assert len(hashes) == 1


def test_a_count_is_of_rows_and_of_distinct_prompts(tmp_path, monkeypatch):
    """As DAPO's: 1,791,700 rows of 17,917 ids of 17,398 texts."""
    assert (suites.TRAINING["dapo"].rows, suites.TRAINING["dapo"].expected) == (1_791_700, 17_398)
    path = write(tmp_path / "f.jsonl", DAPO)
    for rows, expected, message in ((3, 1, ""), (3, 3, "1 prompts where 3"), (1, 1, "3 rows .*count=any")):
        monkeypatch.setitem(suites.TRAINING, "dapo", replace(suites.TRAINING["dapo"], rows=rows, expected=expected))
        assert len(suites.prompts([f"dapo={path}:count=any"])) == 1
        refused(message, suites.prompts, [f"dapo={path}"]) if message else suites.prompts([f"dapo={path}"])


def test_the_250_are_those_of_a_shuffle_with_seed_42(tmp_path):
    rows = [{"adversarial": f"swamp {i}", "data_type": "adversarial_harmful"} for i in range(2000)]
    benign = {"adversarial": "a benign one in between", "data_type": "adversarial_benign"}
    items = suites.load([f"wildjailbreak:250={write(tmp_path / 'f.parquet', [benign, *rows])}"])
    theirs = datasets.Dataset.from_list(rows).shuffle(seed=42).select(range(250))
    assert sorted(item["prompt"] for item in items) == sorted(row["adversarial"] for row in theirs)
    refused("among 2000 prompts, here are 5", read, "wildjailbreak:250", tmp_path / "g.jsonl", rows[:5])


@pytest.mark.parametrize(
    ("name", "ending", "text", "message"),
    [
        ("strongreject", "jsonl", '{"forbidden_prompt": "a"}\n\n{"x": "b"}\n', "line 3: no column 'forbidden_prompt'"),
        ("strongreject", "jsonl", '{"forbidden_prompt": null}\n', "line 1: column 'forbidden_prompt' must be text"),
        ("strongreject", "jsonl", "[1]\n", "line 1: not an object"),
        ("math500", "jsonl", '{"problem": "a", "answer": ""}\n', "line 1: no gold answer"),
        ("math500", "jsonl", '{"problem": "a", "answer": NaN}\n', "line 1: no gold answer"),
        ("math500", "csv", "problem,answer\na,4\nb, \n", "f.csv, line 3: no gold answer"),
        ("math500", "csv", "problem,answer\na,NaN\n", "f.csv, line 2: no gold answer"),
        ("math500", "csv", 'problem,x\n"a\nb",4\n', "f.csv, line 1: no column 'answer' among problem, x; NAME=PATH"),
        ("math500", "jsonl", '{"problem": "a", "answer": true}\n', "line 1: column 'answer' must be text or a number"),
        ("strongreject", "jsonl", '{"forbidden_prompt": NaN}\n', "no prompt in the 1 rows"),
        ("verify", "jsonl", json.dumps({**VERIFY, "verdict": "fine"}) + "\n", "line 1: verdict 'fine'"),
        ("dapo", "jsonl", '{"prompt": [], "reward_model": {}}\n', "line 1: not a row of dapo"),
        ("safechain", "jsonl", '{"instruction": "a", "label": "what"}\n', "line 1: kind 'what' is none of"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_with_file_and_line(tmp_path, name, ending, text, message):
    refused(re.escape(message), read, name, tmp_path / f"f.{ending}", text)


def test_a_verification_shows_no_file_of_the_machine(tmp_path):
    row = VERIFY | {"spec": str(write(tmp_path / "mine.txt", "no toxin."))}
    unnamed = [f"verify={write(tmp_path / 'a.jsonl', [row])}"]
    refused('a.jsonl, line 1: .*must have "meta": {"spec_sha256', suites.load, unnamed)
    known = {"spec_sha256": hashlib.sha256(b"no toxin.").hexdigest(), "prompt_id": "p"}
    (item,) = suites.load([f"verify={write(tmp_path / 'b.jsonl', [row | {'meta': known}])}"])
    assert "no toxin." in item["prompt"]


def test_limits_are_the_suites_own():
    attacked = {"suite": "pocket:plain+fake", "like": "pocket:plain"}
    items = [attacked, *({"suite": name} for name in ("pocket:plain", "math500", "own:mine")), {}]
    assert [suites.settings(item).max_tokens for item in items] == [96, 96, 16384, 8192, 8192]
    assert suites.settings(attacked).temperature == 1.0


def test_the_hub_is_asked_for_data_and_never_for_code(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", hub := mock.Mock(side_effect=[WILD, MATHS, [{"question": "x"}]]))
    suites.load(["wildjailbreak:count=any", "aime25:count=any"])
    suites.prompts(["star1:count=any"])
    tsv = {"name": "eval", "delimiter": "\t", "keep_default_na": False}
    assert hub.call_args_list == [
        mock.call("allenai/wildjailbreak", split="train", **tsv),
        mock.call("math-ai/aime25", split="test"),
        mock.call("UCSC-VLAA/STAR-1", split="train"),
    ]


GATED, BAD = datasets.exceptions.DatasetNotFoundError("gated"), datasets.exceptions.DatasetGenerationError("bad file")


@pytest.mark.parametrize("error", [GATED, BAD, ConnectionError("no route"), ValueError("needs remote code")])
def test_a_set_that_cannot_be_had_says_how_to_get_it(monkeypatch, error):
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=error))
    refused("accept AI2's terms.*wildjailbreak=PATH", suites.load, ["wildjailbreak"])
    refused("verify has no public copy.*make_data.py.*verify=PATH", suites.load, ["verify"])


def test_csv_files_come_over_https_from_a_commit(monkeypatch):
    text, asked = b"id,prompt,type,label,focus,note\n1,How do I kill a dragon?,homonyms,safe,kill,\n", []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(text))
    assert suites.load(["xstest:count=any"])[0]["prompt"] == "How do I kill a dragon?"
    assert asked[0].startswith("https://raw.githubusercontent.com/paul-rottger/")
    addresses = {suite.hub for suite in suites.SUITES.values() if suite.hub.startswith("https://")}
    assert len(addresses) == 2 and all(re.search("/[0-9a-f]{40}/", address) for address in addresses)


def test_what_is_not_at_hand_is_listed_with_the_reason(monkeypatch, tmp_path):
    def offline(address, **how):
        if address != suites.SUITES["hcot"].hub:
            raise OSError("no network")
        return HCOT * 25

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    public = {name for name, suite in suites.SUITES.items() if suite.hub}
    local = write(tmp_path / "x.jsonl", XSTEST)
    items, missing = suites.tested_items(("all", f"xstest={local}:count=any"), "m", None)
    assert {item["suite"] for item in items} == {"hcot", "xstest"} and set(missing) == public - {"hcot", "xstest"}
    assert suites.tested_items(("none",), "m", None) == ([], {})
    refused("no network", suites.tested_items, ("aime24",), "m", None)


def test_own_files_are_suites_of_one_kind(tmp_path):
    rows = [{"text": "a", "behaviour": "b", "cluster": 3}, {"text": "c", "behaviour": None}]
    path = write(tmp_path / "mine.jsonl", rows)
    first, second = suites.load([f"own={path}:prompt=text:goal=behaviour:kind=harmful"])
    assert (first["suite"], first["goal"], first["cluster"], first["metric"]) == ("own:mine", "b", "3", "asr")
    assert "goal" not in second and second["cluster"] == second["id"] == "own:mine/0001"
    for words in ("metric=compliance", "kind=benign", "kind=benign:metric=compliance"):
        assert suites.load([f"own={path}:prompt=text:{words}"])[0]["kind"] == "benign"
    table = write(tmp_path / "t.csv.gz", gzip.compress(b"\xef\xbb\xbfprompt,goal,prefill\nx,,\n"))
    (item,) = suites.load([f"own={table}:kind=harmful"])
    assert item["prompt"] == "x" and item["suite"] == "own:t" and not {"goal", "prefill"} & item.keys()


@pytest.mark.parametrize(("target", "text"), [("4", "4"), (4, "4"), (4.0, "4"), (0.5, "0.5"), (" \\pi ", "\\pi")])
def test_a_gold_answer_is_text_or_a_number_in_suites_and_in_training(tmp_path, target, text):
    name = f"own={write(tmp_path / 'q.jsonl', [{'prompt': '2+2?', 'target': target}])}:kind=maths"
    assert [item["target"] for item in suites.load([name]) + suites.prompts([name])] == [text, text]


@pytest.mark.parametrize("prompt", ["2+2?", "2+2? Put it in \\boxed{}.", "2+2? End with Answer: X"])
def test_own_maths_asks_for_a_box_unless_its_text_says_where_the_answer_goes(tmp_path, prompt):
    name = f"own={write(tmp_path / 'q.jsonl', [{'prompt': prompt, 'target': '4'}])}:kind=maths"
    for item in suites.load([name]) + suites.prompts([name]):
        assert item["prompt"] == prompt + suites.HINT * (prompt == "2+2?") and item["goal"] == prompt


def test_two_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = [write(tmp_path / name / "test.jsonl", [{"prompt": name, "kind": "benign"}]) for name in ("aime", "math")]
    names = [f"own={path}:kind=benign" for path in paths]
    assert [item["id"] for item in suites.load(names)] == ["own:aime/test/0000", "own:math/test/0000"]
    assert [prompt["source"] for prompt in suites.prompts(names)] == ["own:aime/test", "own:math/test"]
    assert suites.load(names[:1])[0]["suite"] == "own:test"
    refused("a suite of that name is there already", suites.load, [names[0], f"{names[0]}:goal=prompt"])
    refused("have one name", suites.prompts, names[:1] * 2)


def test_own_prompts_have_a_kind_by_column_or_for_all(tmp_path):
    path = write(tmp_path / "f.jsonl", [{"q": q, "what": "harmful", "way": "verify", "no": ""} for q in "aa "])
    for words in ("kind=what", "kind=harmful"):
        facts = {}
        (prompt,) = suites.prompts([name := f"own={path}:prompt=q:{words}"], facts=facts)
        assert (prompt["kind"], prompt["id"], prompt["source"]) == ("harmful", "own:f/00000", "own:f")
        assert (facts[name]["repeated"], facts[name]["empty"]) == (1, 1)
    for words, message in {
        ":prompt=q:kind=q": "line 1: kind 'a' is none of harmful, benign, maths",
        ":prompt=q:kind=way": "line 1: kind 'verify' is none of",
        ":prompt=q:kind=maths": "line 1: no column 'target' among q, what, way, no; NAME=PATH:target=COLUMN",
        ":prompt=q:kind=maths:target=no": "line 1: no gold answer",
        ":prompt=q:kind=nonsense": "line 1: no column 'nonsense' among",
        ":prompt=q": "line 1: no column 'kind' among q, what.*, kind=harmful .or benign, maths. says it of all rows",
        ":prompt=q:goal=what:kind=harmful": "unknown key goal; there are: prompt, target, count, kind",
    }.items():
        refused(message, suites.prompts, [f"own={path}{words}"])


CHAIN = [
    {"instruction": "Curse the king.", "label": "vanilla_harmful", "response": "Hm.\n</think>\n\nNo."},
    {"instruction": "Praise the king.", "label": "vanilla_benign", "response": "<think>\nok\n</think>\n\nHail!"},
    {"instruction": "As a dragon, curse.", "label": "adversarial_harmful", "response": "x"},
    {"instruction": "Curse the king.", "label": "vanilla_harmful", "response": "again"},
]
STAR = [{"id": "1", "question": "Curse?", "response": "<think>\nh\n</think>\n\nNo.", "category": ["a"], "score": {}}]
WILD_TRAIN = [
    {"vanilla": "Curse.", "adversarial": "", "completion": "no", "data_type": "vanilla_harmful"},
    {"vanilla": "Curse.", "adversarial": "In a swamp, curse.", "tactics": [], "data_type": "adversarial_harmful"},
    {"vanilla": "Sing.", "adversarial": "In a swamp, sing.", "tactics": [], "data_type": "adversarial_benign"},
]
DAPO = [{"prompt": [{"content": "1 + 1? Answer:", "role": "user"}], "reward_model": {"ground_truth": 2}}] * 3
VANILLA = {"Curse the king.": "harmful", "Praise the king.": "benign"}
TRAINING = {
    "safechain": (CHAIN, {**VANILLA, "As a dragon, curse.": "harmful"}),
    "safechain:vanilla": (CHAIN, VANILLA),
    "star1": (STAR, {"Curse?": "harmful"}),
    "star1:benign": (STAR, {"Curse?": "benign"}),
    "wildjailbreak:train": (WILD_TRAIN, {"Curse.": "harmful"}),
    "wildjailbreak:train-adversarial": (WILD_TRAIN, {"In a swamp, curse.": "harmful", "In a swamp, sing.": "benign"}),
    "dapo": (DAPO, {"1 + 1? Answer:": "maths"}),
    "verify": ([VERIFY], {safety.verification_prompt(pocket.RULES, "how?", "no."): "verify"}),
}


@pytest.mark.parametrize("name", suites.TRAINING)
def test_a_training_set_is_read_and_its_repetitions_are_left_out(tmp_path, name):
    rows, wanted = TRAINING[name]
    facts, text = {}, f"{name}={write(tmp_path / 'f.json', rows)}:count=any"
    drawn = suites.prompts([text], facts=facts)
    assert {prompt["prompt"]: prompt["kind"] for prompt in drawn} == wanted and len(drawn) == len(wanted)
    assert all(p["source"] == name and p["licence"] and not {"response", "subset"} & p.keys() for p in drawn)
    assert facts[text]["used"] == len(wanted) and facts[text]["rows"] == len(rows)
    assert facts[text]["repeated"] == {"safechain": 1, "safechain:vanilla": 1, "dapo": 2}.get(name, 0)


def test_responses_come_only_where_they_are_asked_for(tmp_path):
    assert read("star1", tmp_path / "f.jsonl", STAR, responses=True)[0]["response"] == STAR[0]["response"]
    refused("a row has no response", read, "star1", tmp_path / "g.jsonl", [{"question": "x"}], responses=True)


def test_training_sets_are_shuffled_by_the_seed_and_limited(tmp_path):
    path = write(tmp_path / "f.jsonl", [{"prompt": str(i), "kind": "benign"} for i in range(50)])
    orders = [[p["prompt"] for p in suites.prompts([f"own={path}"], seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert [p["prompt"] for p in suites.prompts([f"own={path}"], limit=7)] == orders[0][:7]


@pytest.mark.parametrize("name", [name for name in suites.SUITES if name not in suites.TRAINING])
def test_what_one_measures_with_is_not_trained_on(name):
    reason = "forbids training" if name.startswith("fortress") else "one measures with it"
    refused(f"{name} may not be trained on.*{reason}", suites.prompts, [f"{name}=anything.jsonl"])


LONG = "one two three four five six seven eight"
HAN = "请问小明有三个苹果小红有五个苹果他们一共有几个苹果呢"
FORMULAS = "已知函数f(x)=x^2满足条件，求当x等于3时函数f(x)的值是多少"
KANA = "これは王様の庭にある古い井戸についての質問です。"
THAI = "ชาวนาคนหนึ่งมีวัวสามตัวและควายห้าตัวรวมกันมีสัตว์กี่ตัว"


def item(suite, prompt, kind="harmful", **more):
    return {"suite": suite, "kind": kind, "prompt": prompt, **more}


def test_decontamination_counts_by_suite():
    items = [item("a", "Brew the  AMBER potion!"), item("b", f"{LONG} nine ten"), item("e", "FROGS?")]
    items.append(item("c", "disguise", goal="the plain goal"))
    items.append(item("d", "frogs" + suites.HINT, "maths", goal="frogs"))
    hits = ["brew the amber potion", f"zero, {LONG.upper()}; and on", "The plain goal.", "disguise?", "Frogs!"]
    hits += ["ｂｒｅｗ the amber potion", f"{LONG} brew", "frogs" + suites.HINT]
    fine = ["one two three four five six seven", "toads" + suites.HINT, "?!"]
    kept, counts = suites.decontaminate([{"prompt": text} for text in hits + fine], items)
    assert [prompt["prompt"] for prompt in kept] == fine
    two = {"exact": 2, "8-gram": 0}  # one prompt may hit two suites
    assert counts == {"a": two, "b": {"exact": 0, "8-gram": 2}, "c": two, "d": two, "e": two}


@pytest.mark.parametrize("change", ["{}", "Dear friend, {}", "{}" + suites.HINT.replace("{}", "{{}}")])
def test_own_maths_prompts_are_compared_with_an_own_maths_suite(tmp_path, change):
    question = "What is the sum of the first ten positive whole numbers?"
    tested = write(tmp_path / "q.jsonl", [{"prompt": question, "target": "55"}])
    rows = [{"prompt": change.format(question), "target": 55}, {"prompt": "What is 2 + 2?", "target": 4}]
    trained = write(tmp_path / "p.jsonl", rows)
    items, _ = suites.tested_items((f"own={tested}:metric=accuracy",), "m", None)
    kept, _ = suites.decontaminate(suites.prompts([f"own={trained}:kind=maths"]), items)
    assert [prompt["goal"] for prompt in kept] == ["What is 2 + 2?"]


def test_a_frame_around_every_question_is_no_hit(tmp_path):
    head = "Solve the following problem step by step. The last line of your response should be of the form Answer: X."
    held = [{"prompt": f"{head} How many {x} fit into the box that he sold on monday?", "target": 1} for x in "abcd"]
    own, verify = write(tmp_path / "held.jsonl", held), write(tmp_path / "v.jsonl", [VERIFY])
    shown = suites.load([f"own={own}:kind=maths", f"verify={verify}"])
    same, other = {"prompt": held[2]["prompt"]}, {"prompt": f"{head} How old is the king's daughter?"}
    spec = {"prompt": " ".join(shown[-1]["prompt"].split()[-12:])}  # words of the frame around a verification
    kept, counts = suites.decontaminate([same, other, spec, {"prompt": "How?"}, {"prompt": shown[-1]["prompt"]}], shown)
    assert kept == [other, spec]
    assert counts == {"own:held": {"exact": 1, "8-gram": 0}, "verify": {"exact": 2, "8-gram": 0}}


@pytest.mark.parametrize("text", [HAN, THAI, KANA, FORMULAS])
def test_text_without_blanks_is_compared_by_its_letters(text):
    tested = [item("a", text)]
    other = "一二三四五六七八九十天地人日月星" * 2
    kept, counts = suites.decontaminate([{"prompt": text[:-1] + "x"}, {"prompt": other}, {"prompt": text[:8]}], tested)
    assert [prompt["prompt"] for prompt in kept] == [other, text[:8]] and counts["a"]["8-gram"] == 1

"""Every prompt set: the suites that one measures with, the prompts that one trains on, and no prompt in both.

    load(["pocket", "xstest", "strongreject=sr.csv"], world, candidates(model))           items of suites
    prompts(["safechain", "own=mine.csv:prompt=text:kind=harmful"])                       training prompts

Published sets are read through `datasets` (data files only, never code) or from a local file; none is copied here.
Licences are as far as could be established; the set's own card holds. These are all keys of an item, a plain dict, on
its way from prompt to score (?: may be missing):

    key                type  written by       read by
    id, suite          str   suites           everything; an id means the same prompt in every run
    metric             str   suites           scores: asr, compliance, accuracy, f1
    kind               str   suites           judges, rewards: harmful, benign, sum, maths, verify
    cluster            str   suites           scores: the items of one thing, goal or problem share it
    prompt             str   suites           sampler: the user's turn
    goal               str?  suites           judges: the plain request, in place of the prompt
    target             str?  suites           judges: gold answer (sum, maths), safe or unsafe (verify)
    prefill            str?  suites           sampler: the given start of the model's turn
    prefill_thinking   bool? evaluate         sampler: that start belongs to the thinking
    like               str?  evaluate         `settings`: the suite that an attacked one is made of
    item               str?  pocket's suites  the pocket's oracle and expert; no other set has it
    source, licence    str?  prompts          records, data card
    response           str?  prompts          make_data: published baselines
    place, key         ?     make_data        make_data: number of the prompt; what names a sample in its files
    sample             int?  sampling         scores: which of several completions
    completion         str   sampling         report; tokens (int): its length
    finish_reason      str   sampling         judges, rewards: stop, length, provider (then `provider`: why)
    thinking, answer   str   sampling         judges; answer None: the thinking never ended
    safe, refused, complied, answered, word, said, outcome, checked, correct, predicted, unscored
                             judges           scores, report; see judges.py
    self_check, judge  str?  evaluate         the reader of items.jsonl: the model's verdict, whose label this is
"""

import hashlib
import json
import math
import os.path
import random
import re
import unicodedata
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import runs
import safety
from pocket import suites as pocket_suites
from pocket.suites import candidates
from pocket.world import World
from runs import UserError

POCKET, POCKET_PROMPTS = tuple(pocket_suites.SUITES), pocket_suites.PROMPTS
KINDS = {"asr": "harmful", "compliance": "benign", "accuracy": "maths"}  # metric -> kind of its items, of own files too


@dataclass(frozen=True)
class Suite:
    """A set of prompts, to measure with or (no metric) to train on: where it lies, what is taken of its rows."""

    metric: str = ""  # asr, compliance, accuracy, f1
    hub: str = ""  # id of a data set or address of a CSV file
    licence: str = "own"
    columns: dict = field(default_factory=dict)  # {key: column}; `subset` is a key of rows only
    expected: int = 0  # items, or distinct training prompts, as published; 0: not known
    rows: int = 0  # rows as published; 0: not known
    kind: str = ""  # of all prompts; else the column `kind` says it, of which the last part counts (vanilla_harmful)
    directives: tuple = ("count",)  # keys of a name that are no columns
    subset: str = ""  # a regular expression; rows that have a `subset` and do not match are left out
    options: dict = field(default_factory=dict)  # of datasets.load_dataset; its default split here is train
    optional: tuple = ("response",)  # keys that a row need not have
    raw: tuple = ()  # keys whose values are neither text nor numbers
    change: Callable = dict  # keys of a row -> keys of an item
    choose: Callable = list  # all entries -> those used
    get: str = "is the network there?"  # how to come by a set that is gated
    only: str = ""  # why it is for evaluation only, where its licence says so
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 8192
    samples: int = 1


# ------------------------------------------------------------------------------------------------- published sets
NO_TRAINING = "its licence allows safety evaluations only and forbids training"
WILD = {
    "hub": "allenai/wildjailbreak",
    "licence": "ODC-BY",
    "get": "accept AI2's terms at https://huggingface.co/datasets/allenai/wildjailbreak; log in with `hf auth login`",
}
WILD_TABLE = {"delimiter": "\t", "keep_default_na": False}  # else the word "NA" becomes no text
WILD_EVAL = {  # a file without data_type is one subset alone
    **WILD,
    "options": {**WILD_TABLE, "name": "eval"},
    "columns": {"prompt": "adversarial", "subset": "data_type"},
    "optional": ("subset",),
}
GITHUB = "https://raw.githubusercontent.com"
XSTEST = f"{GITHUB}/paul-rottger/exaggerated-safety/475f10bf0a3d6a9dfb174b6de1a38afbfdff98a5/xstest_prompts.csv"
XSTEST_COLUMNS = {"prompt": "prompt", "subset": "type"}
STRONGREJECT = f"{GITHUB}/alexandrasouly/strongreject/3432b2d696b428f242bd507df96d80f686571d5e"
STRONGREJECT += "/strongreject_dataset/strongreject_dataset.csv"
HCOT = {"prompt": "Full_Input (H-CoT + Request)", "goal": "Goal"}
PROBLEM = {"prompt": "problem", "target": "answer"}
TEST = {"split": "test"}
AIME = {"max_tokens": 32768, "samples": 16}  # 30 problems
CHAIN = {"prompt": "instruction", "kind": "label", "subset": "label", "response": "response"}
STAR = {"prompt": "question", "response": "response"}
# The 250 that STAR-1 draws of WildJailbreak's 2,000 with datasets' shuffle(seed=42), frozen by the hash of their places
WILD_250 = "99c22dac552f6f07b1c7ec5a1f8602e25eb43ad0abcef80388979ebbe4d76001"


def wild_250(kept: list[dict]) -> list[dict]:
    places = sorted(np.random.default_rng(42).permutation(2000)[:250].tolist())
    if hashlib.sha256(" ".join(map(str, places)).encode()).hexdigest() != WILD_250:
        raise UserError("this NumPy draws another WildJailbreak-250 than the published one; use another version")
    if len(kept) != 2000:
        raise UserError(f"the WildJailbreak-250 are places among 2000 prompts, here are {len(kept)}")
    return [kept[place] for place in places]


def fortress(metric: str, column: str) -> Suite:
    columns, licence = {"prompt": column, "cluster": "ID"}, "CC-BY-4.0, evaluation only"
    return Suite(metric, "ScaleAI/fortress_public", licence, columns, 500, only=NO_TRAINING)


def wild_train(column: str) -> Suite:
    columns = {"prompt": column, "kind": "data_type", "subset": "data_type"}
    return Suite(**WILD, options={**WILD_TABLE, "name": "train"}, columns=columns, subset=f"{column}_.*")


def verification(record: dict) -> dict:
    """A record of make_data as a question: is this answer safe under the spec?"""
    if record["verdict"] not in ("safe", "unsafe"):
        raise UserError(f"verdict {record['verdict']!r}")
    prompt = safety.verification_prompt(safety.record_spec(record).text, record["prompt"], record["answer"])
    return {"prompt": prompt, "goal": record["prompt"], "target": record["verdict"]}


def dapo(row: dict) -> dict:
    return {"prompt": row["prompt"][-1]["content"], "target": str(row["target"]["ground_truth"])}


POCKET_DECODING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": pocket_suites.MAX_TOKENS}
SUITES = {name: Suite(metric, **POCKET_DECODING) for name, (metric, *_) in pocket_suites.SUITES.items()} | {
    "strongreject": Suite("asr", STRONGREJECT, "MIT", {"prompt": "forbidden_prompt"}, 313),
    "fortress": fortress("asr", "adversarial_prompt"),
    "fortress:benign": fortress("compliance", "benign_prompt"),
    "wildjailbreak": Suite("asr", expected=2000, subset="adversarial_harmful", **WILD_EVAL),
    "wildjailbreak:250": Suite("asr", expected=250, subset="adversarial_harmful", choose=wild_250, **WILD_EVAL),
    "wildjailbreak:benign": Suite("compliance", expected=210, subset="adversarial_benign", **WILD_EVAL),
    "hcot": Suite("asr", "DukeCEICenter/Malicious_Educator_hcot_DeepSeek-R1", "CC BY-NC-SA 4.0", HCOT, 50),
    "xstest": Suite("compliance", XSTEST, "CC-BY-4.0", XSTEST_COLUMNS, 250, subset="(?!contrast_).*"),
    "xstest:contrast": Suite("asr", XSTEST, "CC-BY-4.0", XSTEST_COLUMNS, 200, subset="contrast_.*"),
    "math500": Suite("accuracy", "HuggingFaceH4/MATH-500", "MIT", PROBLEM, 500, options=TEST, max_tokens=16384),
    "aime24": Suite("accuracy", "HuggingFaceH4/aime_2024", "none stated", PROBLEM, 30, **AIME),
    "aime25": Suite("accuracy", "math-ai/aime25", "none stated", PROBLEM, 30, options=TEST, **AIME),
    "verify": Suite(
        "f1", kind="verify", columns={key: key for key in ("prompt", "answer", "spec", "verdict", "meta")},
        optional=("meta",), raw=("meta",), change=verification, get="take records of kind verify of make_data.py",
    ),
}  # fmt: skip
TRAINING = {
    "safechain": Suite("", "UWNSL/SafeChain", "none stated", CHAIN, rows=40_000, subset=".*"),
    "safechain:vanilla": Suite("", "UWNSL/SafeChain", "none stated", CHAIN, rows=40_000, subset="vanilla.*"),
    "star1": Suite("", "UCSC-VLAA/STAR-1", "Apache-2.0", STAR, 1000, kind="harmful"),
    "star1:benign": Suite("", "UCSC-VLAA/STAR-benign-915", "Apache-2.0", STAR, 915, kind="benign"),
    "wildjailbreak:train": wild_train("vanilla"),
    "wildjailbreak:train-adversarial": wild_train("adversarial"),
    "dapo": Suite(  # 17,917 ids, some of one text
        "", "BytedTsinghua-SIA/DAPO-Math-17k", "Apache-2.0", {"prompt": "prompt", "target": "reward_model"},
        17_398, 1_791_700, kind="maths", raw=("prompt", "target"), change=dapo,
    ),
    "verify": replace(SUITES["verify"], metric=""),  # for RL: the reward is the right verdict
}  # fmt: skip

# ------------------------------------------------------------------------------------------------- reading a set
HINT = "\nPlease reason step by step, and put your final answer within \\boxed{}."  # what R1's authors advise


def parse_name(text: str) -> tuple[str, str, dict[str, str]]:
    """NAME, NAME:count=any, NAME=PATH or NAME=PATH:key=value:... -> (name, path, {key: value}).

    A path may hold colons: it is the longest beginning of what follows the name that is a file or folder.
    """
    name, _, rest = text.partition("=")
    if name.endswith(":count"):
        return name.removesuffix(":count"), "", {"count": rest}
    before_key, pieces = r":(?=[^:=]+=)", rest.split(":")
    paths = (":".join(pieces[:n]) for n in range(len(pieces), 0, -1))
    path = next((path for path in paths if os.path.exists(path)), re.split(before_key, rest)[0])
    stray, *pairs = re.split(before_key, rest[len(path) :])
    keys = dict(pair.split("=", 1) for pair in pairs)
    if stray or "" in keys.values() or keys.get("count", "any") != "any" or len(keys) < len(pairs):
        raise UserError(f"{text}: behind {path} come :key=column pairs, each key once, and perhaps :count=any")
    return name, path, keys


def split_names(text: str) -> list[str]:
    """The names of a --suite. A comma parts them only where a suite is named behind it; paths may hold others."""
    known = "|".join(map(re.escape, ("pocket", "own", *SUITES)))
    return re.split(rf",\s*(?=(?:{known})(?:[=+:,]|$))", text)


def find(text: str, training: bool) -> tuple[str, str, dict[str, str], Suite]:
    """(name, path, keys, set) of a published set or an own file. Raises UserError for a name that is neither, or that
    may not be trained on."""
    name, path, keys = parse_name(text)
    if name == "own" and path:
        return name, path, keys, own_set(text, keys, training)
    if training and name in SUITES and name not in TRAINING:
        raise UserError(f"{name} may not be trained on: {SUITES[name].only or 'one measures with it'}")
    sets = TRAINING if training else {name: suite for name, suite in SUITES.items() if name not in POCKET}
    if name not in sets:
        pocket = POCKET_PROMPTS if training else ("pocket", *POCKET)
        raise UserError(f"unknown set {text}; there are: {', '.join((*pocket, *sets))}, own=PATH")
    return name, path, keys, sets[name]


def own_set(text: str, keys: dict[str, str], training: bool) -> Suite:
    """What `own=PATH:key=column:...`, a text with these keys, names. A suite has one kind, by `kind=harmful` or
    `metric=asr` alike; training prompts have a column of kinds, or `kind=harmful` says one for all."""
    kind, metric = keys.get("kind"), keys.get("metric")
    if training and kind in KINDS.values():
        columns = {"prompt": "prompt", "target": "target"}
        return Suite(columns=columns, kind=kind, optional=("target",), directives=("count", "kind"))
    if training:
        return Suite(columns={"prompt": "prompt", "kind": "kind", "target": "target"}, optional=("target",))
    fitting = [(m, k) for m, k in KINDS.items() if metric in (None, m) and kind in (None, k)]
    if len(fitting) != 1:
        ways = ", ".join(f"kind={k} (metric {m})" for m, k in KINDS.items())
        raise UserError(f"{text}: an own suite is scored in one way, own=PATH:kind=harmful; the ways are {ways}")
    columns = {key: key for key in ("prompt", "target", "goal", "cluster", "prefill")}
    directives = ("count", "kind", "metric")
    return Suite(fitting[0][0], columns=columns, kind=fitting[0][1], optional=tuple(columns)[1:], directives=directives)


def own_names(names: Sequence[str]) -> dict[str, str]:
    """{name as given: its set's name} of own files: own:FILE, or own:FOLDER/FILE where two files have one name."""
    paths = {text: parse_name(text)[1].removesuffix(".gz") for text in names if text.startswith("own=")}
    paths = {text: Path(path).absolute() for text, path in paths.items()}
    files = Counter(path.stem for path in set(paths.values()))
    folders = {text: f"{path.parent.name}/" if files[path.stem] > 1 else "" for text, path in paths.items()}
    return {text: f"own:{folders[text]}{path.stem}" for text, path in paths.items()}


def hub_rows(name: str, source: Suite) -> Iterator[tuple[str, dict]]:
    """(where, row) of the published copy."""
    local = f"or give a local copy: {name}=PATH"
    if not source.hub:
        raise UserError(f"{name} has no public copy: {source.get}; {local}")
    import datasets  # slow to import

    try:
        if source.hub.startswith("https://"):  # one CSV file
            with urllib.request.urlopen(source.hub, timeout=60) as reply:
                yield from runs.csv_rows(reply.read().decode("utf-8-sig"), source.hub)
        else:
            rows = datasets.load_dataset(source.hub, **{"split": "train", **source.options})
            yield from ((f"{source.hub}, row {number}", row) for number, row in enumerate(rows, 1))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(f"{name}: {source.hub} cannot be read ({why}): {source.get}; {local}") from None


def taken(row, source: Suite, theirs: dict[str, str]) -> dict:
    """{key: value} of the columns that a set takes of a row; numbers become text. `theirs`: {key: column} of the file.

    An optional column that is empty is left out, and so is one that is not text, unless `theirs` names it. NaN, which
    pandas writes for a cell that is missing, is empty.
    """
    if not isinstance(row, dict):
        raise UserError("not an object")
    entry = {}
    for key, column in {**source.columns, **theirs}.items():
        value = row.get(column)
        optional = key in source.optional and (key, source.kind) != ("target", "maths")
        value = "" if isinstance(value, float) and not math.isfinite(value) else value
        if key in source.raw and value is not None:
            entry[key] = value
        elif type(value) in (str, int, float) and not (optional and value == ""):
            whole = isinstance(value, float) and value.is_integer()
            entry[key] = str(int(value) if whole else value)
        elif not optional and column not in row:
            way = f"NAME=PATH:{key}=COLUMN names it"
            way += ", kind=harmful (or benign, maths) says it of all rows" if key == "kind" and not source.hub else ""
            raise UserError(f"no column {column!r} among {', '.join(map(str, row))}; {way}")
        elif not optional or (key in theirs and value not in (None, "")):
            raise UserError(f"column {column!r} must be text or a number, is {type(value).__name__}")
    return entry


def finished(entry: dict, source: Suite) -> dict:
    """The fields of an item or training prompt. A maths problem asks for a box, unless its text says where the answer
    goes. Raises UserError for a kind that is none, and without a gold answer."""
    entry = source.change(entry)
    entry["kind"] = kind = source.kind or KINDS.get(source.metric) or entry["kind"].rpartition("_")[2]
    if kind not in (*KINDS.values(), source.kind):
        raise UserError(f"kind {kind!r} is none of {', '.join(KINDS.values())}")
    if kind != "maths":
        return entry
    text, target = entry["prompt"], entry.get("target", "").strip()
    if target.lower() in ("", "nan"):
        raise UserError("no gold answer; NAME=PATH:target=COLUMN names the column that holds it")
    asks = "" if "\\boxed" in text or "Answer:" in text or not text.strip() else HINT
    return {"goal": text, **entry, "prompt": text + asks, "target": target}


def read(name: str, path: str, keys: dict[str, str], source: Suite) -> tuple[list[dict], dict]:
    """(entries, facts): fields of items with their `row` number; where they came from.

    The hash is of what was taken of the rows, whatever the file format. A training prompt that came before is left out.
    Raises UserError, with file and row, for wrong rows, for a wrong count, and where no prompt is left.
    """
    theirs = {key: column for key, column in keys.items() if key not in source.directives}
    if unknown := ", ".join(set(theirs) - set(source.columns)):
        raise UserError(f"{name}: unknown key {unknown}; there are: {', '.join((*source.columns, *source.directives))}")
    digest, number, kept, seen, row = hashlib.sha256(), -1, [], set(), {}
    missing, left_out = set(theirs.values()), {"empty": 0, "repeated": 0}
    for number, (where, row) in enumerate(runs.read_rows(path) if path else hub_rows(name, source)):
        try:
            entry = taken(row, source, theirs)
            digest.update(json.dumps(entry, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
            missing -= row.keys()
            if "subset" in entry and not re.fullmatch(source.subset, entry.pop("subset")):
                continue
            entry = finished(entry, source)
        except UserError as error:
            file = where.rpartition(", line ")[0]
            if str(error).startswith("no column") and runs.file_format(Path(file)) in (".csv", ".tsv"):
                where = f"{file}, line 1"  # which names the columns
            raise UserError(f"{where}: {error}") from None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{where}: not a row of {name} ({type(error).__name__}: {error})") from None
        if not entry["prompt"].strip():
            left_out["empty"] += 1
        elif not source.metric and entry["prompt"] in seen:
            left_out["repeated"] += 1
        else:
            kept.append({"row": number, **entry})
            seen.add(entry["prompt"])
    if row and missing:
        raise UserError(f"{name}: no row has a column {', '.join(missing)}; there are: {', '.join(row)}")
    if not kept:
        raise UserError(f"{name}: no prompt in the {number + 1} rows of {path or source.hub}")
    kept = source.choose(kept)
    for what, wanted, got in (("rows", source.rows, number + 1), ("prompts", source.expected, len(kept))):
        if wanted not in (0, got) and "count" not in keys:
            why = "to take them all the same, put :count=any behind its name or path"
            raise UserError(f"{name}: {got} {what} where {wanted} are published; {why}")
    facts = {"from": path or source.hub, "licence": source.licence, "rows": number + 1, "used": len(kept), **left_out}
    facts |= {"expected": source.expected or None, "sha256": digest.hexdigest()}
    less = "".join(f", {count} {what}" for what, count in left_out.items() if count)
    came = f"{facts['from']}, sha256 of what was read {facts['sha256'][:16]}"
    print(f"{name}: {len(kept)} of {facts['rows']} rows{less} from {came}")
    return kept, facts


# ------------------------------------------------------------------------------------------------- items and prompts
def settings(item: dict) -> Suite:
    """How to sample for an item: as the suite says that it is of or made of; by default as for an own one."""
    return SUITES.get(item.get("like", item.get("suite", "")), Suite())


def load(
    names: Sequence[str], world: World | None = None, candidates: Sequence[dict] = (), *, facts: dict | None = None
) -> list[dict]:
    """The items of the named suites; `pocket` alone names all of the pocket's. Raises UserError.

    The number of its row is in an item's id, which so means the same in a subset. facts: a dict that gets {suite:
    origin, licence, rows, SHA-256} of every set that was read.
    """
    items, facts = [], {} if facts is None else facts
    wanted = dict.fromkeys(one for name in names for one in (POCKET if name == "pocket" else (name,)))
    own = own_names(wanted)
    for text in wanted:
        if text in POCKET:
            items += pocket_suites.items(text, needed(world, text), candidates)
            continue
        name, path, keys, source = find(text, training=False)
        name = own.get(text, name)
        if any(item["suite"] == name for item in items):
            raise UserError(f"{text}: a suite of that name is there already; rename the file or its folder")
        entries, facts[name] = read(name, path, keys, source)
        for entry in entries:
            item = {"id": f"{name}/{entry.pop('row'):04d}", "suite": name, "metric": source.metric, **entry}
            items.append({**item, "cluster": entry.get("cluster") or entry.get("goal") or item["id"]})
    return items


def needed(world: World | None, name: str) -> World:
    if world is None:
        raise UserError(f"{name} needs a pocket model, a folder with world.json")
    return world


def prompts(
    names: Sequence[str], world: World | None = None, limit: int = 0, seed: int = 0, *, facts: dict | None = None,
    responses: bool = False,
) -> list[dict]:  # fmt: skip
    """Training prompts of the named sets: `id, prompt, kind, source, licence`, and where they apply `target` (sum,
    maths), `goal` (maths), `item` (pocket) and, if asked for, `response` (STAR-1, SafeChain).

    Sets but the pocket's are shuffled by the seed; limit: so many of each, 0 for all. Raises UserError.
    """
    found, facts, own = [], {} if facts is None else facts, own_names(names)
    for text in names:
        if text in POCKET_PROMPTS:
            name, drawn, licence = text, POCKET_PROMPTS[text](needed(world, text), seed), pocket_suites.LICENCE
            facts[name] = {"from": "pocket/world.py", "licence": licence, "used": len(drawn)}
        else:
            name, path, keys, source = find(text, training=True)
            name, licence = own.get(text, name), source.licence
            drawn, facts[text] = read(name, path, keys, source)
            random.Random(f"{name}-{seed}").shuffle(drawn)
        if responses and any("response" not in entry for entry in drawn):
            raise UserError(f"{text}: a row has no response")
        for number, entry in enumerate(drawn[:limit] if limit else drawn):
            entry = {k: v for k, v in entry.items() if k != "response" or responses}
            entry = {"id": f"{name}/{entry.pop('row', number):05d}", **entry, "source": name, "licence": licence}
            found.append(entry)
    if len({prompt["id"] for prompt in found}) < len(found):
        raise UserError(f"two of the sets {', '.join(names)} have one name; rename a file, or name a set once")
    return found


# ------------------------------------------------------------------------------------------------- decontamination
WORDS = 8
LETTERS = 16  # in place of 8 words where no blanks part them; a word of Chinese or Japanese has two on average
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")


def words(text: str) -> list[str]:
    """Words as a comparison sees them: no case, no full-width forms, no punctuation."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def grams(text: str) -> set[str]:
    """Every run of 8 words, and of 16 letters of which half or more are of a script without blanks (Thai to Han)."""
    spelled = words(text)
    found = {" ".join(spelled[i : i + WORDS]) for i in range(len(spelled) - WORDS + 1)}
    letters = "".join(spelled) if UNSPACED.search(text) else ""
    long = (letters[i : i + LETTERS] for i in range(len(letters) - LETTERS + 1))
    return found | {run for run in long if 2 * len(UNSPACED.findall(run)) >= LETTERS}


def unframed(text: str) -> str:
    return text.replace(HINT.strip(), "").strip()


def compared(entry: dict) -> set[str]:
    """The texts of an item or prompt: as it is shown, without the line that asks for a box, the plain request."""
    return {text for text in (entry["prompt"], unframed(entry["prompt"]), entry.get("goal")) if text}


def spelled(entry: dict) -> set[str]:
    return {" ".join(words(text)) or text for text in compared(entry)}


def tested_grams(items: list[dict]) -> set[str]:
    """The 8-grams of a suite, without those of a frame around its questions, which any other question may have too.

    Of a verification, which shows the whole specification, only the request counts; of maths problems no 8-gram that
    half of them (three at least) share, and not the line that asks for a box.
    """
    shown = {text for item in items for text in ({item["goal"]} if item["kind"] == "verify" else compared(item))}
    texts = {unframed(text) for text in shown}
    counts = Counter(gram for text in texts for gram in grams(text))
    frame = max(3, len(texts) / 2) if items[0]["kind"] == "maths" else len(texts) + 1
    return {gram for gram, n in counts.items() if n < frame}


def decontaminate(prompts: list[dict], items: list[dict]) -> tuple[list[dict], dict[str, dict]]:
    """(prompts that no suite holds, {suite: hits, "exact" or by an "8-gram"}). A prompt may hit several suites."""
    suites = {}
    for item in items:
        suites.setdefault(item["suite"], []).append(item)
    exact = {suite: set().union(*map(spelled, held)) for suite, held in suites.items()}
    shared = {suite: tested_grams(held) for suite, held in suites.items()}
    counts, kept = {suite: {"exact": 0, "8-gram": 0} for suite in suites}, []
    for prompt in prompts:
        whole, parts = spelled(prompt), set().union(*map(grams, compared(prompt)))
        hits = {suite: "exact" for suite in exact if not whole.isdisjoint(exact[suite])}
        hits |= {suite: "8-gram" for suite in shared if suite not in hits and not parts.isdisjoint(shared[suite])}
        for suite, how in hits.items():
            counts[suite][how] += 1
        if not hits:
            kept.append(prompt)
    return kept, counts


def tested_items(names: Sequence[str], model: str, world: World | None) -> tuple[list[dict], dict[str, str]]:
    """(items of the suites of a --decontaminate, {suite that is not at hand: why}).

    `pocket` names all of the pocket's, `none` nothing, `all` every suite with a public copy; those of them that cannot
    be read are left out. Raises UserError for a suite that was named itself.
    """
    named = [name for name in names if name not in ("all", "none")]
    items, missing = load(named, world, candidates(model) if world else ()), {}
    public = {name for name, suite in SUITES.items() if suite.hub} - {parse_name(name)[0] for name in named}
    for name in sorted(public) if "all" in names else ():
        try:
            items += load([name])
        except UserError as error:
            missing[name] = str(error)
    return items, missing

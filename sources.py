"""Published prompt sets: where each lies, its licence, what its rows look like, how it is read. None is copied here.

A set is read through `datasets` (data files only, never code) or from a local file or folder of the same columns
(.jsonl, .json, .csv, .tsv, .parquet), which may be named otherwise. Every row is checked; the count must be the
published one; what was read is hashed. `suites.py` makes items and training prompts of it.
"""

import csv
import hashlib
import io
import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import safety
from runs import UserError

# ------------------------------------------------------------------------------------------------- reading a set


@dataclass(frozen=True)
class Source:
    """A published set: where it lies, what its rows look like, and what an item or a training prompt takes from one.

    Licences are as far as could be established; the set's own card holds.
    """

    hub: str  # id of a data set, address of a CSV file, or nothing where there is no public copy
    licence: str
    columns: dict  # {column: type} that every row has
    fields: Callable  # row -> fields of an item or training prompt
    expected: int = 0  # items or prompts after `keep` and `choose`; 0: not known
    rows: int = 0  # rows as published; 0: not known
    config: str | None = None
    split: str = "train"
    options: dict = field(default_factory=dict)  # of datasets.load_dataset
    optional: dict = field(default_factory=dict)  # {column: type} of columns that are taken where they are there
    keep: Callable = lambda row: True
    choose: Callable = lambda kept: kept  # kept entries -> a subset of them
    get: str = ""  # how to come by a set that is gated or has no public copy
    only: str = ""  # why it is for evaluation only, where its licence says so


def json_rows(path: Path) -> Iterator[tuple[str, object]]:
    with open(path, encoding="utf-8-sig") as file:  # with a byte order mark or without
        if path.suffix == ".json":  # one list of objects
            listed = json.load(file)
            if not isinstance(listed, list):
                raise UserError(f"{path} is not a list of objects")
            yield from ((f"{path}, object {number}", row) for number, row in enumerate(listed, 1))
            return
        for number, line in enumerate(file, 1):
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from table_rows(file, str(path), "\t" if path.suffix == ".tsv" else ",")


def table_rows(file, name: str, delimiter: str) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**24)  # attacks are long
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    for row in reader:
        where = f"{name}, line {reader.line_num}"
        if None in row or None in row.values():
            raise UserError(f"{where}: not {len(reader.fieldnames)} columns, as the first line has")
        yield where, row


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    rows = (row for batch in pyarrow.parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


READERS = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows}


def local_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) of a file, or of all files of a folder in the order of their names."""
    files = sorted(p for p in path.rglob("*") if p.suffix in READERS) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix in READERS for file in files):
        raise UserError(f"{path}: no such file or folder with {', '.join(READERS)}")
    for file in files:
        try:
            yield from READERS[file.suffix](file)
        except (OSError, ValueError, RecursionError, csv.Error) as error:  # not UTF-8, not JSON, not parquet, ...
            raise UserError(f"{file}: {error}") from None


def hub_rows(name: str, source: Source) -> Iterator[tuple[str, dict]]:
    """(where, row) of the published copy."""
    get = f"{source.get or 'is the network there?'}; or give a local copy: {name}=PATH"
    if not source.hub:
        raise UserError(f"{name} has no public copy: {get}")
    import datasets

    try:
        if source.hub.startswith("https://"):  # one CSV file
            with urllib.request.urlopen(source.hub, timeout=60) as reply:
                yield from table_rows(io.TextIOWrapper(reply, "utf-8-sig", newline=""), source.hub, ",")
        else:
            rows = datasets.load_dataset(source.hub, source.config, split=source.split, **source.options)
            yield from ((f"{source.hub}, row {number}", row) for number, row in enumerate(rows, 1))
    except (OSError, ValueError, csv.Error, datasets.exceptions.DatasetsError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{name}: {source.hub} cannot be read ({type(error).__name__}: {first}): {get}") from None


def checked(row, where: str, source: Source, renamed: dict[str, str]) -> dict:
    """The columns of a row that the set is known to have, under their published names. Raises UserError."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object")
    there = {c: kind for c, kind in source.optional.items() if row.get(renamed.get(c, c)) is not None}
    wanted = {**source.columns, **there}
    found = {column: row.get(renamed.get(column, column)) for column in wanted}
    for column, kind in wanted.items():
        if not isinstance(found[column], kind):
            name = renamed.get(column, column)
            kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            is_now = type(found[column]).__name__ if name in row else "missing"
            raise UserError(f"{where}: column {name!r} must be {kinds}, is {is_now}")
    return found


def read(
    name: str, source: Source, path: str = "", renamed: dict | None = None, *, unique: bool, allow_count: bool = False
) -> tuple[list[dict], dict]:
    """(entries, facts): what `source.fields` gives for each row used, with its `row` number; where all that came from.

    The hash is of the rows' known columns, whatever the file format. unique: a prompt that came before is left out.
    Raises UserError, with file and row, for wrong columns, and for a wrong count unless it is allowed.
    """
    digest, rows, kept, seen, spare = hashlib.sha256(), 0, [], set(), {"empty": 0, "repeated": 0}
    for where, row in local_rows(Path(path)) if path else hub_rows(name, source):
        row = checked(row, where, source, renamed or {})
        try:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
            entry = {"row": rows, **source.fields(row)} if source.keep(row) else None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{where}: not a row of {name} ({type(error).__name__}: {error})") from None
        rows += 1
        if entry and not entry["prompt"].strip():
            spare["empty"] += 1
        elif entry and unique and entry["prompt"] in seen:
            spare["repeated"] += 1
        elif entry:
            kept.append(entry)
            seen.add(entry["prompt"])
    kept = source.choose(kept)
    for what, wanted, got in (("rows", source.rows, rows), ("prompts", source.expected, len(kept))):
        if wanted and wanted != got and not allow_count:
            raise UserError(f"{name}: {got} {what} where {wanted} are expected; --allow-count takes them all the same")
    facts = {"from": path or source.hub, "licence": source.licence, "rows": rows, "used": len(kept), **spare}
    facts |= {"expected": source.expected or None, "sha256": digest.hexdigest()}
    print(f"{name}: {len(kept)} of {rows} rows from {facts['from']}, {source.licence}, sha256 {facts['sha256'][:16]}")
    return kept, facts


# ------------------------------------------------------------------------------------------------- published sets

HINT = "\nPlease reason step by step, and put your final answer within \\boxed{}."  # what R1's authors advise
NO_TRAINING = "its licence allows safety evaluations only and forbids training"
AI2 = "accept AI2's terms at https://huggingface.co/datasets/allenai/wildjailbreak and log in with `hf auth login`"
TSV = {"delimiter": "\t", "keep_default_na": False}  # else the word "NA" becomes no text
WILD = {"hub": "allenai/wildjailbreak", "licence": "ODC-BY", "options": TSV, "get": AI2}
GITHUB = "https://raw.githubusercontent.com"
XSTEST = f"{GITHUB}/paul-rottger/exaggerated-safety/475f10bf0a3d6a9dfb174b6de1a38afbfdff98a5/xstest_prompts.csv"
STRONGREJECT = f"{GITHUB}/alexandrasouly/strongreject/3432b2d696b428f242bd507df96d80f686571d5e"
STRONGREJECT += "/strongreject_dataset/strongreject_dataset.csv"
FULL_INPUT = "Full_Input (H-CoT + Request)"
# The 250 that STAR-1 draws of WildJailbreak's 2,000 with datasets' shuffle(seed=42), frozen by the hash of their places
WILD_250 = "99c22dac552f6f07b1c7ec5a1f8602e25eb43ad0abcef80388979ebbe4d76001"


def wild_250(kept: list[dict]) -> list[dict]:
    places = sorted(np.random.default_rng(42).permutation(2000)[:250].tolist())
    if hashlib.sha256(" ".join(map(str, places)).encode()).hexdigest() != WILD_250:
        raise UserError("this NumPy draws another WildJailbreak-250 than the published one; use another version")
    if len(kept) != 2000:
        raise UserError(f"the WildJailbreak-250 are places among 2000 prompts, here are {len(kept)}")
    return [kept[place] for place in places]


def ask(column: str, **more) -> Callable:
    """Fields of a request: the prompt's column, and constants or other columns (given as text functions)."""
    return lambda row: {"prompt": row[column], **{k: v(row) if callable(v) else v for k, v in more.items()}}


def problem(row: dict) -> dict:
    return {"prompt": row["problem"] + HINT, "goal": row["problem"], "target": str(row["answer"]).strip()}


def verification(row: dict) -> dict:
    """A record of make_data as a question: is this answer safe under the spec?"""
    if row["verdict"] not in ("safe", "unsafe"):
        raise ValueError(f"verdict {row['verdict']!r}")
    prompt = safety.verification_prompt(safety.record_spec(row).text, row["prompt"], row["answer"])
    return {"prompt": prompt, "goal": row["prompt"], "target": row["verdict"]}


def hcot(model_name: str) -> Source:
    return Source(
        f"DukeCEICenter/Malicious_Educator_hcot_{model_name}",
        "CC BY-NC-SA 4.0",
        {"Goal": str, FULL_INPUT: str},
        ask(FULL_INPUT, goal=lambda row: row["Goal"]),
        50,
    )


def wild(data_type: str, expected: int, **more) -> Source:
    columns = {"adversarial": str, "data_type": str}
    keep = lambda row: row["data_type"] == data_type  # noqa: E731
    return Source(
        **WILD, config="eval", columns=columns, fields=ask("adversarial"), expected=expected, keep=keep, **more
    )


def xstest(contrast: bool, expected: int) -> Source:
    keep = lambda row: row["type"].startswith("contrast_") == contrast  # noqa: E731
    fields = ask("prompt", category=lambda row: row["type"])
    return Source(XSTEST, "CC-BY-4.0", {"prompt": str, "type": str}, fields, expected, keep=keep)


def fortress(column: str) -> Source:
    columns = {"ID": (int, str), "adversarial_prompt": str, "benign_prompt": str, "risk_domain": str}
    fields = ask(column, cluster=lambda row: f"fortress-{row['ID']}", category=lambda row: row["risk_domain"])
    return Source("ScaleAI/fortress_public", "CC-BY-4.0, evaluation only", columns, fields, 500, only=NO_TRAINING)


PROBLEM = {"problem": str, "answer": (str, int)}
TROTTER = "encode the questions as its paper (A Mousetrap) does, JSONL with `instruction` and `question`"
JAILBREAK_R1 = "rewrite a list of goals with the published attacker once, JSONL with `attack` and `goal`"
VERIFY = {"prompt": str, "answer": str, "spec": str, "verdict": str}
EVALUATION = {  # name -> metric, source
    "strongreject": (
        "asr",
        Source(STRONGREJECT, "MIT", {"forbidden_prompt": str}, ask("forbidden_prompt"), 313),
    ),
    "fortress": ("asr", fortress("adversarial_prompt")),
    "fortress:benign": ("compliance", fortress("benign_prompt")),
    "wildjailbreak": ("asr", wild("adversarial_harmful", 2000)),
    "wildjailbreak:250": ("asr", wild("adversarial_harmful", 250, choose=wild_250)),
    "wildjailbreak:benign": ("compliance", wild("adversarial_benign", 210)),
    "wildjailbreak:safechain": (
        "asr",
        Source("UWNSL/WildJailbreakEval", "ODC-BY", {"instruction": str}, ask("instruction"), 250, config="250"),
    ),
    "hcot": ("asr", hcot("DeepSeek-R1")),
    "hcot:o1": ("asr", hcot("o1")),
    "hcot:o3-mini": ("asr", hcot("o3-mini")),
    "hcot:gemini": ("asr", hcot("Gemini-2.0-Flash-Thinking")),
    "trotter": (
        "asr",
        Source("", "own", {"instruction": str, "question": str}, ask("instruction", goal=lambda row: row["question"]),
               get=TROTTER),
    ),
    "jailbreak-r1": (
        "asr",
        Source("", "own", {"attack": str, "goal": str}, ask("attack", goal=lambda row: row["goal"]), get=JAILBREAK_R1),
    ),
    "xstest": ("compliance", xstest(False, 250)),
    "xstest:contrast": ("asr", xstest(True, 200)),
    "math500": ("accuracy", Source("HuggingFaceH4/MATH-500", "MIT", PROBLEM, problem, 500, split="test")),
    "aime24": ("accuracy", Source("HuggingFaceH4/aime_2024", "none stated", PROBLEM, problem, 30)),
    "aime25": ("accuracy", Source("math-ai/aime25", "none stated", PROBLEM, problem, 30, split="test")),
    "verify": (
        "f1",
        Source("", "own", VERIFY, verification, optional={"meta": dict}, get="records of kind verify of make_data.py"),
    ),
}  # fmt: skip


def own_suite(renamed: dict[str, str]) -> tuple[str, Source, dict[str, str]]:
    """(metric, source, column names) of `own=PATH:metric=asr:prompt=...`; metric asr, compliance or accuracy."""
    renamed = dict(renamed)
    metric = renamed.pop("metric", "asr")
    if metric not in ("asr", "compliance", "accuracy"):
        raise UserError(f"own: metric is {metric}, not asr, compliance or accuracy")
    columns = {"prompt": str} | ({"target": (str, int)} if metric == "accuracy" else {})
    fields = lambda row: {k: str(v) for k, v in row.items()}  # noqa: E731
    optional = dict.fromkeys(("goal", "category", "prefill", "cluster"), str)
    return metric, Source("", "own", columns, fields, optional=optional), renamed


# ------------------------------------------------------------------------------------------------- training sets

HARMFUL, BENIGN, MATHS = "harmful", "benign", "maths"  # kinds of a training prompt


def labelled(row: dict) -> dict:
    kind = HARMFUL if "harmful" in row["label"] else BENIGN
    return {"prompt": row["instruction"], "kind": kind, "response": row["response"]}


def safechain(**more) -> Source:
    columns = {"instruction": str, "label": str, "response": str}
    return Source("UWNSL/SafeChain", "none stated", columns, labelled, rows=40_000, **more)


def star(hub: str, kind: str, expected: int) -> Source:
    fields = ask("question", kind=kind, response=lambda row: row["response"])
    return Source(hub, "Apache-2.0", {"question": str, "response": str}, fields, expected)


def wild_train(prefix: str, column: str) -> Source:
    columns = {"vanilla": str, "adversarial": str, "data_type": str}
    fields = ask(column, kind=lambda row: HARMFUL if row["data_type"].endswith("harmful") else BENIGN)
    keep = lambda row: row["data_type"].startswith(prefix)  # noqa: E731
    return Source(**WILD, config="train", columns=columns, fields=fields, keep=keep)


def dapo(row: dict) -> dict:
    return {"prompt": row["prompt"][-1]["content"], "kind": MATHS, "target": str(row["reward_model"]["ground_truth"])}


DAPO = {"prompt": list, "reward_model": dict}
TRAINING = {
    "safechain": safechain(),
    "safechain:vanilla": safechain(keep=lambda row: row["label"].startswith("vanilla")),
    "star1": star("UCSC-VLAA/STAR-1", HARMFUL, 1000),
    "star1:benign": star("UCSC-VLAA/STAR-benign-915", BENIGN, 915),
    "wildjailbreak:train": wild_train("vanilla", "vanilla"),
    "wildjailbreak:train-adversarial": wild_train("adversarial", "adversarial"),
    "dapo": Source("BytedTsinghua-SIA/DAPO-Math-17k", "Apache-2.0", DAPO, dapo, 17_917),  # of 1,791,700 rows
}


def own_prompts(renamed: dict[str, str]) -> tuple[Source, dict[str, str]]:
    """(source, column names) of `own=PATH:kind=harmful`; kind is a column, or one of harmful, benign, maths for all."""
    renamed, kinds = dict(renamed), (HARMFUL, BENIGN, MATHS)
    fixed = renamed.pop("kind") if renamed.get("kind") in kinds else ""

    def fields(row: dict) -> dict:
        kind = fixed or row["kind"]
        if kind not in kinds or (kind == MATHS and "target" not in row):
            raise ValueError(f"kind {kind!r} is none of {', '.join(kinds)}, or a maths problem has no target")
        return {**row, "kind": kind}

    columns = {"prompt": str} | ({} if fixed else {"kind": str})
    return Source("", "own", columns, fields, optional={"target": str}), renamed

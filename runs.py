"""What every script shares and nobody ablates: flags from a dataclass, the run folder, files in and out."""

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import glob
import gzip
import importlib.machinery
import importlib.util
import io
import json
import math
import operator
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, field
from importlib import metadata
from pathlib import Path

EXIT_OK, EXIT_BAD_INPUT, EXIT_UNSCORED = 0, 2, 3
POCKET = os.path.relpath(Path(__file__).parent / "pocket")  # from where one starts


class UserError(ValueError):
    """An error that the user can fix: one message, exit 2, no traceback."""


# ------------------------------------------------------------------------------------------------- flags
COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}  # by which numbers are bounded


def option(default, help: str, *, pocket=MISSING, choices: tuple = (), low=None, high=None, above=None, below=None):
    """A field of a Config. `pocket` is the default where the model folder is a pocket (world.json), else `default`.

    The type of `default` is the flag's: bool (`--flag` alone means true), int, float, str, or tuple (several words).
    Bounds of a number: low <= value <= high, above < value < below.
    """
    bounds = {sign: n for sign, n in zip(COMPARE, (low, above, high, below), strict=True) if n is not None}
    return field(default=default, metadata={"help": help, "pocket": pocket, "choices": choices, "bounds": bounds})


def is_pocket(model: str) -> bool:
    return (Path(model) / "world.json").is_file()


def world_seed(model: str) -> int:
    """The seed of the pocket world that a model folder belongs to. Raises UserError for any other model."""
    if not is_pocket(model):
        raise UserError(f"{model} is not a pocket model: it has no world.json")
    seed = read_json(path := Path(model) / "world.json", "seed")["seed"]
    if type(seed) is not int:
        raise UserError(f"{path}: seed must be a whole number, not {seed!r}")
    return seed


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def command_line(fields: dict, arguments: list[str], description: str) -> dict:
    """{field name: text, or texts of a tuple} of the flags that were given."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form, allow_abbrev=False)
    for name, entry in fields.items():
        pocket, shown = entry.metadata["pocket"], repr(entry.default)
        shown += f"; pocket {pocket!r}" if pocket is not MISSING else ""
        words = {"nargs": "?", "const": "true"} if isinstance(entry.default, bool) else {}
        words = {"nargs": "+"} if isinstance(entry.default, tuple) else words
        choices = f": {', '.join(entry.metadata['choices'])}" if entry.metadata["choices"] else ""
        text = f"{entry.metadata['help']}{choices} ({shown})".replace("%", "%%")
        parser.add_argument(flag(name), dest=name, metavar=name.upper(), help=text, **words)
    names = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{', '.join(twice)} given twice; several words go behind one flag")
    return {name: text for name, text in vars(parser.parse_args(arguments)).items() if text is not None}


def convert(text, entry):
    """The value of a flag's text. Raises ValueError saying what it should be."""
    wanted, choices = type(entry.default), entry.metadata["choices"]
    if choices and text not in choices:
        raise ValueError(f"not one of {', '.join(choices)}")
    if wanted is str and text[:1] in ("", "~"):
        raise ValueError("is empty, or begins with a ~ that the shell has not replaced")
    if wanted is bool and text.lower() not in ("true", "false"):
        raise ValueError("neither true nor false")
    try:
        value = text.lower() == "true" if wanted is bool else wanted(text)
    except ValueError:
        raise ValueError({int: "not a whole number", float: "not a number"}[wanted]) from None
    if wanted is float and not math.isfinite(value):
        raise ValueError("not finite")
    if wanted is int and abs(value) >= 2**63:
        raise ValueError("does not fit into 64 bits")
    bounds = entry.metadata["bounds"].items()
    if not all(COMPARE[sign](value, bound) for sign, bound in bounds):
        raise ValueError("must be " + " and ".join(f"{sign} {bound:g}" for sign, bound in bounds))
    return value


def parse(config_class, arguments: list[str], description: str = ""):
    """(config, {name: origin}) from the command line; origin is flag, pocket, or default.

    Every wrong value is reported in one UserError: those that cannot be read or break their bounds, and what
    `config.problems()` finds. `--resume RUN` reads all settings from RUN/config.json.
    """
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    given = command_line(fields, arguments, description)
    if "resume" in given:
        return resumed(config_class, fields, given)
    pocket_model = "model" in fields and is_pocket(given.get("model", fields["model"].default))
    values, origin, problems = {}, {}, []
    for name, entry in fields.items():
        use_pocket = pocket_model and entry.metadata["pocket"] is not MISSING
        values[name] = entry.metadata["pocket"] if use_pocket else entry.default
        origin[name] = "flag" if name in given else "pocket" if use_pocket else "default"
        try:
            values[name] = convert(given[name], entry) if name in given else values[name]
        except ValueError as error:
            problems.append(f"{flag(name)} {given[name]}: {error}")
    config = config_class(**values)
    problems += config.problems() if hasattr(config, "problems") else []
    if problems:
        raise UserError("\n".join(problems))
    return config, origin


def resumed(config_class, fields: dict, given: dict):
    """All settings of an earlier run; nothing else may be given with --resume."""
    if others := sorted(set(given) - {"resume"}):
        raise UserError(f"--resume reads all settings from its run; remove {', '.join(map(flag, others))}")
    folder = Path(given["resume"])
    saved = read_json(folder / "config.json")
    try:
        if not saved["values"].keys() == saved["origin"].keys() == fields.keys():
            raise KeyError("other settings")
        values = {name: type(entry.default)(saved["values"][name]) for name, entry in fields.items()}  # no JSON tuples
        return config_class(**{**values, "resume": str(folder), "out": str(folder)}), saved["origin"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume {folder}: config.json is of another script or version ({error!r})") from None


def main(config_class, run: Callable) -> None:
    """Entry point of a script: parse, run, turn an error that the user can fix into one message and exit 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has no UTF-8 still shows every text
    try:
        if wrong := re.search(r"\S*[\ud800-\udfff]\S*", " ".join(sys.argv)):
            raise UserError(f"{wrong[0]!r} is no UTF-8 text; rename that file")
        config, origin = parse(config_class, sys.argv[1:], sys.modules["__main__"].__doc__)
        code = run(config, origin)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except OSError as error:  # a full disk, a folder that may not be written
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; what was written is kept, --resume goes on", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        folder = Path(LOCKS[-1].name).parent if LOCKS else "RUN"
        print(f"interrupted; a run that has begun goes on with --resume {folder}", file=sys.stderr)
        code = 130
    sys.exit(code)


def load_file(path: str | Path):
    """The module of a Python file of the user's, who thereby runs it, once. Raises UserError.

    The file may use dataclasses and import modules beside it; its own name takes no other module's place.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{path} is no Python file (.py)" if path.exists() else f"{path}: no such file")
    name = f"file:{path.resolve()}"
    if name not in sys.modules:
        loader = importlib.machinery.SourceFileLoader(name, str(path))
        spec = importlib.util.spec_from_loader(name, loader)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.resolve().parent))
        try:
            loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever the file raises is its author's to fix
            del sys.modules[name]
            raise UserError(f"{path}{line_in(path, error)}: {type(error).__name__}: {error}") from None
    return sys.modules[name]


def line_in(path: Path, error: BaseException) -> str:
    """ ", line N", the last of a user's file that an error came through; "" where it came through none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def load_function(path: str | Path, name: str) -> Callable:
    """The function `name` of a Python file of the user's. Raises UserError where it has none."""
    if not callable(function := getattr(load_file(path), name, None)):
        raise UserError(f"{path} has no function {name}")
    return function


# ------------------------------------------------------------------------------------------------- run folder
def write_atomic(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, rename: a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", opener=private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def private(path: str, flags: int) -> int:
    """`opener` of files that only their owner reads: prompts, answers and settings are nobody else's business."""
    return os.open(path, flags, 0o600)


def write_json(path: Path, value) -> None:
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, *names: str) -> dict:
    """A JSON object of ours, which has these keys. Raises UserError."""
    value = from_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    if missing := [name for name in names if name not in value]:
        raise UserError(f"{path} has no {', '.join(missing)}: it is of another program, or of another version")
    return value


def append_jsonl(path: Path, value: dict) -> None:
    """Add one line. A number that is not finite becomes null, for JSON has no NaN."""
    value = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    with open(path, "a", encoding="utf-8", opener=private) as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def source(device: str) -> dict:
    """Commit, uncommitted changes, versions and device, as far as they can be known."""

    def git(*words: str) -> str | None:
        if not shutil.which("git"):
            return None
        here = {"cwd": Path(__file__).parent, "encoding": "utf-8", "errors": "replace"}
        done = subprocess.run(["git", *words], capture_output=True, **here)
        return done.stdout.strip() if done.returncode == 0 else None

    packages = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
    found = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in packages}
    return {
        "command": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "diff": git("diff", "HEAD"),
        "untracked": git("ls-files", "--others", "--exclude-standard"),
        "versions": {"python": platform.python_version(), **found},
        "device": device,
    }


LOCKS = []  # open files, of the runs that this process works on


def new_folder(config, origin: dict, script: str, device: str) -> Path:
    """The run folder, made with config.json and source.json, or the one of --resume, its settings shown. Refuses any
    other run's, and one that another process is at work on.

    device: what the run runs on, in words (model.device_name)."""
    earlier = getattr(config, "resume", "")
    folder = resumed_folder(earlier, script) if earlier else fresh_folder(config, origin, script, device)
    LOCKS.append(open(folder / ".lock", "w", opener=private))  # noqa: SIM115 (until this process ends, however it ends)
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process is at work on this run") from None
    except OSError as error:  # some network file systems
        print(f"{folder} cannot be locked ({error.strerror}): start no second process on this run", file=sys.stderr)
    print(f"run folder {folder}; settings, each with where it comes from:")
    for name, value in dataclasses.asdict(config).items():
        print(f"  {name:<16} {value!s:<32} {origin[name]}")
    return folder


def resumed_folder(path: str, script: str) -> Path:
    folder = Path(path)
    if (folder / "result.json").exists():
        raise UserError(f"{folder} is finished: it has a result.json")
    if (of := read_json(folder / "config.json").get("script", "nothing known")) != script:
        raise UserError(f"{folder} is a run of {of}, not of {script}")
    return folder


def fresh_folder(config, origin: dict, script: str, device: str) -> Path:
    folder = Path(config.out or Path("runs") / f"{script}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds another run; name another folder, or go on with that one: --resume {folder}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; name another")
    folder.mkdir(parents=True, exist_ok=bool(config.out))  # two runs of one second share no folder
    values = dataclasses.asdict(config)
    write_json(folder / "config.json", {"script": script, "values": values, "origin": origin})
    write_json(folder / "source.json", source(device))
    return folder


class Interruptible:
    """Within this block Ctrl-C and SIGTERM only set `requested`; the loop stops itself at its next whole step."""

    def __enter__(self):
        self.requested = False
        self.before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number, frame):
        self.requested = True
        # not print: a bar may be in the middle of writing to sys.stderr, which takes no second writer
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])  # a second Ctrl-C stops at once

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- stages that resume
def stored(path: Path, key: Callable) -> dict:
    """{key(record): record} of a log of ours. The torn last line of a process that was killed is cut off and said."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        print(f"{path}: the last line ends in the middle; its {len(data) - whole} bytes are cut off", file=sys.stderr)
        os.truncate(path, whole)
    found = {}
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            found[key(record)] = record
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: no record of ours ({error!r})") from None
    return found


class Log:
    """A stage's JSONL file: each record is a line that has left this process when `add` returns, under `key(record)`.

    `done` has the records by key, but not those that are to be made `again`; what comes of a second attempt stands
    below them and counts. ASCII, so that any text fits.
    """

    def __init__(self, path: Path, key: Callable, again: Callable = lambda record: False):
        self.path, self.key = path, key
        self.done = {name: record for name, record in stored(path, key).items() if not again(record)}
        self.file = open(path, "a", encoding="ascii", opener=private)  # noqa: SIM115 (closed by __exit__)

    def add(self, record: dict) -> bool:
        """Keep a record unless one of its key is there; whether it was new. Raises UserError where the disk is full."""
        if self.key(record) in self.done:
            return False
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            go_on = f"what was written is kept; make room, then --resume {self.path.parent}"
            raise UserError(f"{self.path}: {error.strerror}; {go_on}") from None
        self.done[self.key(record)] = record
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(OSError):  # a line that could not be written; `add` has said so
            self.file.close()


# ------------------------------------------------------------------------------------------------- files of users
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # any but the last may be compressed, .csv.gz


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with a byte order mark or without, compressed (.gz) or not. Raises UserError."""
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if Path(path).suffix.lower() == ".gz" else data
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def file_format(path: Path) -> str:
    """The ending of a file's name, in small letters and without .gz: one of FORMATS, or another."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """(where, row) of a file, or of all data files of a folder in the order of their names. Blank lines are skipped,
    and so are hidden files and folders.

    `where` names the file and the line (JSON lines, CSV), object (a JSON list) or row (parquet), counted from 1. Raises
    UserError where a file is missing, of another format, or broken.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    names = sorted(glob.glob("**/*", root_dir=path, recursive=True))  # none that is hidden
    inside = [path / name for name in names if file_format(path / name) in FORMATS and (path / name).is_file()]
    if not (files := inside if path.is_dir() else [path]):
        raise UserError(f"{path}: no file in it ends in {', '.join(FORMATS)}")
    for file in files:
        if (ending := file_format(file)) not in FORMATS:
            raise UserError(f"{file}: files that can be read end in {', '.join(FORMATS)} (or .gz behind that)")
        yield from {".jsonl": json_lines, ".json": json_list, ".parquet": parquet_rows}.get(ending, table_rows)(file)


def from_json(text: str, where: str, hint: str = ""):
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is not text
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""  # of JSON lines `where` has it
        raise UserError(f"{where}{line}, column {error.colno}: not JSON ({error.msg}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}){hint}") from None
    return value


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            hint = "; the file ends in the middle of this line" if number == len(lines) else ""
            yield (where := f"{path}, line {number}"), from_json(line, where, hint)


def json_list(path: Path) -> Iterator[tuple[str, object]]:
    listed = from_json(read_text(path), str(path), "; a file of JSON lines must be named .jsonl")
    if not isinstance(listed, list):
        raise UserError(f"{path} is not a list of objects")
    yield from ((f"{path}, object {number}", row) for number, row in enumerate(listed, 1))


def table_rows(path: Path) -> Iterator[tuple[str, dict]]:
    yield from csv_rows(read_text(path), str(path), "\t" if file_format(path) == ".tsv" else ",")


def csv_rows(text: str, name: str, delimiter: str = ",") -> Iterator[tuple[str, dict]]:
    """Rows of a table whose first line names the columns."""
    csv.field_size_limit(2**24)  # attacks are long
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        named = [name for name in reader.fieldnames or () if name]
        if len(named) > len(set(named)):
            raise UserError(f"{name}, line 1: two columns have one name among {', '.join(named)}")
        if len(named) == 1 and ";" in named[0]:
            raise UserError(f"{name}, line 1: {named[0]!r} is one column; separated by ';'? save it with commas")
        for row in reader:
            if None in row or None in row.values():
                wanted, more = len(reader.fieldnames), len(row.pop(None, ()))
                wrong = f"{wanted + more - list(row.values()).count(None)} columns, not {wanted} as in the first line"
                hint = f"; quote a cell that holds {'commas' if delimiter == ',' else 'tabs'}" if more else ""
                raise UserError(f"{name}, line {reader.line_num}: {wrong}{hint}")
            yield f"{name}, line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.line_num + 1}: {error}") from None


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: {error}") from None


def read_records(path: str, required: dict[str, dict[str, type]]) -> list[dict]:
    """Records of a file, each checked against the fields of its kind: `required` is {kind: {field: type}}.

    Raises UserError with file and line. A torn last line is an error like any other: data are never dropped unsaid.
    """
    records = []
    for where, record in read_rows(path):
        kind = record.get("kind") if isinstance(record, dict) else None
        if not isinstance(kind, str) or kind not in required:
            raise UserError(f"{where}: kind is {kind!r}, not one of {', '.join(required)}")
        wrong = [
            f"{name} must be {wanted.__name__}, is {type(record[name]).__name__ if name in record else 'missing'}"
            for name, wanted in required[kind].items()
            if not isinstance(record.get(name), wanted)
        ]
        if wrong:
            raise UserError(f"{where}: {'; '.join(wrong)}")
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no record")
    return records

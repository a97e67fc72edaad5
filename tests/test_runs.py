"""runs.py: flags, run folder, files of users, stages that resume; and the checkpoints of trainers.py."""

import gzip
import json
import operator
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch

import runs
import trainers
from runs import UserError, option
from tests.evaluations import refused


@dataclass
class Config:
    model: str = option("base", "a folder")
    lr: float = option(2e-4, "a rate, 100 % a number", pocket=1e-3)
    steps: int = option(3, "a count", low=1)
    share: float = option(0.5, "a share", above=0, high=1)
    greedy: bool = option(True, "a switch")
    dtype: str = option("float32", "a choice", choices=("float32", "bfloat16"))
    compare: tuple = option((), "several words")
    out: str = option("", "run folder")
    resume: str = option("", "run folder")

    def problems(self):
        return ["--lr and --steps go together"] if self.lr == 7 and self.steps == 3 else []


def test_a_flag_beats_the_pockets_default_which_beats_the_papers(tmp_path):
    (tmp_path / "world.json").write_text('{"seed": 7}')
    pocket = ["--model", str(tmp_path)]
    for words, lr, origin in (([], 2e-4, "default"), (pocket, 1e-3, "pocket"), ([*pocket, "--lr", "5"], 5.0, "flag")):
        config, origins = runs.parse(Config, words)
        assert (config.lr, origins["lr"], origins["steps"]) == (lr, origin, "default")
    assert runs.world_seed(str(tmp_path)) == 7
    refused("not a pocket model", runs.world_seed, str(tmp_path / "other"))


def test_types_follow_the_defaults():
    words = "--greedy false --steps 9 --compare a b --dtype bfloat16"
    config, _ = runs.parse(Config, words.split())
    assert config == Config(greedy=False, steps=9, compare=("a", "b"), dtype="bfloat16")
    for words, value in ((["--greedy"], True), (["--greedy", "False"], False)):  # as --help shows it, too
        assert runs.parse(Config, words)[0].greedy is value


def test_every_wrong_value_is_in_one_message():
    words = ["--lr", "fast", "--greedy", "maybe", "--dtype", "int8", "--steps", "-1", "--share", "0", "--out", ""]
    with pytest.raises(UserError) as error:
        runs.parse(Config, words)
    assert str(error.value).split("\n") == [
        "--lr fast: not a number",
        "--steps -1: must be >= 1",
        "--share 0: must be > 0 and <= 1",
        "--greedy maybe: neither true nor false",
        "--dtype int8: not one of float32, bfloat16",
        "--out : is empty, or begins with a ~ that the shell has not replaced",
    ]
    for text, message in {
        "--lr 7": "go together",
        "--lr nan": "not finite",
        "--lr inf": "not finite",
        f"--steps {2**63}": "64 bits",
        "--out=~/run": "~ that the shell has not replaced",
        "--resume=": "config.json",  # $RUN is not set: no new run instead
        "--compare a --lr 1 --compare=b": "--compare given twice",
    }.items():
        refused(message, runs.parse, Config, text.split())


@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("--l 1", 2), ("--nope 1", 2), ("--steps", 2)])
def test_help_shows_both_defaults_and_unknown_and_shortened_flags_are_errors(capsys, words, code):
    with pytest.raises(SystemExit) as end:
        runs.parse(Config, words.split(), "what it is")
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == code
    for text in ("what it is", "100 % a number (0.0002; pocket 0.001)", "a choice: float32, bfloat16 ('float32')"):
        assert (text in shown) == (code == 0)


def test_main_turns_errors_into_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script", "--steps", "2"])
    for end, code, message in (
        ([3], 3, ""),
        (UserError("no such thing"), 2, "error: no such thing"),
        (OSError(28, "No space left on device", "a/b"), 2, "error: a/b: No space left on device"),
        (KeyboardInterrupt(), 130, "goes on with --resume"),
    ):
        with pytest.raises(SystemExit) as ended:
            runs.main(Config, mock.Mock(side_effect=end))
        assert ended.value.code == code and message in capsys.readouterr().err


def test_a_terminal_without_utf_8_shows_every_text_and_a_name_without_it_is_refused():
    code = "import runs, dataclasses\n@dataclasses.dataclass\nclass C:\n    a: str = runs.option('', '')\n"
    code += "runs.main(C, lambda config, origin: print('\\u00e4\\u202e') or 0)"
    command, ascii_only = [sys.executable, "-c", code], {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert (done.returncode, done.stdout) == (0, "\\xe4\\u202e\n"), done.stderr
    done = subprocess.run([*command, "--a", b"k\xe4se"], capture_output=True, text=True)
    assert done.returncode == 2 and "is no UTF-8 text; rename that file" in done.stderr


def folder_of(config, script="one"):
    return runs.new_folder(config, dict.fromkeys(vars(config), "flag"), script, "a laptop")


def made(tmp_path, **changes):
    config = Config(**{"out": str(tmp_path / "run")} | changes)
    return config, folder_of(config)


def test_a_folder_of_another_config_is_refused(tmp_path, monkeypatch):
    _, folder = made(tmp_path)
    assert runs.read_json(folder / "config.json")["values"]["lr"] == 2e-4
    source = runs.read_json(folder / "source.json")
    assert source["versions"]["torch"] == torch.__version__ and source["device"] == "a laptop"
    assert source.keys() >= {"commit", "diff", "command"}
    for lr in (2e-4, 1.0):
        refused("holds another run.*--resume", made, tmp_path, lr=lr)
    (tmp_path / "runs" / "one-now").mkdir(parents=True)  # by a run that began in the same second
    refused("not an empty folder", made, tmp_path, out=str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.time, "strftime", lambda form: "now")
    with pytest.raises(FileExistsError):
        made(tmp_path, out="")


def test_one_process_at_a_time_works_on_a_run(tmp_path, monkeypatch, capsys):
    config, folder = made(tmp_path)
    again = f"import runs, types; runs.new_folder(types.SimpleNamespace(resume={str(folder)!r}), None, 'one', '')"
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
    assert "UserError" in done.stderr and "another process is at work" in done.stderr
    assert folder_of(replace(config, resume=str(folder))) == folder  # the same one may
    monkeypatch.setattr(runs.fcntl, "lockf", mock.Mock(side_effect=OSError(37, "No locks available")))
    assert folder_of(replace(config, resume=str(folder))) == folder
    assert "cannot be locked (No locks available): start no second process" in capsys.readouterr().err


def test_resume_takes_every_setting_from_the_run(tmp_path):
    config, folder = made(tmp_path, lr=6.0, compare=("a", "b"))
    again, _ = runs.parse(Config, ["--resume", str(folder)])
    assert again == Config(**{**vars(config), "resume": str(folder)})
    assert folder_of(again) == folder
    refused("remove --lr, --steps", runs.parse, Config, ["--resume", str(folder), "--lr", "1", "--steps", "2"])
    refused("is a run of one, not of two", folder_of, again, "two")
    (folder / "result.json").write_text("{}")
    refused("is finished", folder_of, again)


SAVED = [(None, ()), ({}, ()), ({"lr": 1}, ["lr"]), (vars(Config()), ())]
SAVED += [(odd, odd) for odd in (vars(Config()) | odd for odd in ({"more": 1}, {"lr": "fast"}, {"compare": 3}))]


@pytest.mark.parametrize(("values", "known"), SAVED)
def test_resume_needs_a_whole_config_of_this_script(tmp_path, values, known):
    if values is not None:
        saved = {"script": "one", "origin": dict.fromkeys(known, "flag"), "values": values}
        runs.write_json(tmp_path / "config.json", saved)
    refused("config.json", runs.parse, Config, ["--resume", str(tmp_path)])


def test_files_are_the_users_own_and_logs_hold_json(tmp_path):
    _, folder = made(tmp_path)
    for step, loss in ((1, 0.5), (2, float("nan")), (3, 0.25)):
        runs.append_jsonl(folder / "metrics.jsonl", {"step": step, "loss": loss, "text": "ä\u2028"})
    assert [row["loss"] for _, row in runs.read_rows(folder / "metrics.jsonl")] == [0.5, None, 0.25]
    trainers.save_checkpoint(folder, {"w": torch.zeros(2)}, {"step": 1})
    files = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert len(files) >= 5 and set(files.values()) == {0o600}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    runs.write_json(path := tmp_path / "a.json", {"x": 1})
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError):
        runs.write_json(path, {"x": 2})
    assert runs.read_json(path) == {"x": 1}


ROWS = [{"q": 'ä, "b"\u2028', "n": "1"}, {"q": "two\nlines", "n": "2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = 'q,n\n"ä, ""b""\u2028",1\n\n"two\nlines",2\n'
FILES = [
    ("a.jsonl", LINES.encode()),
    ("A.JSONL", LINES.encode("utf-8-sig")),
    ("a.jsonl", LINES.replace("\n", "\r\n\r\n").encode()),
    ("a.jsonl.gz", gzip.compress(LINES.encode())),
    ("a.json", json.dumps(ROWS).encode()),
    ("a.csv", TABLE.encode()),
    ("A.Csv", TABLE.encode("utf-8-sig")),
    ("a.csv.GZ", gzip.compress(TABLE.encode())),
    ("a.tsv", TABLE.replace(",1", "\t1").replace(",2", "\t2").replace("q,n", "q\tn").encode()),
]


@pytest.mark.parametrize(("name", "data"), FILES)
def test_the_same_rows_come_out_of_every_file(tmp_path, name, data):
    folder = tmp_path / "train.parquet"  # Spark's folders have a file's name
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / name).write_bytes(data)
    (folder / name).write_bytes(data)
    rows = list(runs.read_rows(folder / name))
    assert [row for _, row in rows] == ROWS and rows[0][0].startswith(str(folder / name))
    assert list(runs.read_rows(tmp_path)) == rows


KINDS = {"note": {"id": str, "n": int}}
NOTE = b'{"kind": "note", "id": "a", "n": 1}\n'
BROKEN = [
    ("a.jsonl", NOTE + b'{"kind": "note", "id": 3}\n', "line 2: id must be str, is int; n must be int, is missing"),
    ("a.jsonl", NOTE + b'\n{"kind": "no', "line 3, column 10: not JSON .Unterm.*ends in the middle of this line"),
    ("a.jsonl", b'{"kind": "note",}\n', r"a.jsonl, line 1, column 1\d: not JSON \([^:]*\)$"),
    ("a.json", b'[{"kind":\n nothing}]\n', r"a.json, line 2, column 2: not JSON \([^:]*\);"),
    ("a.jsonl", NOTE.replace(b'"a"', b'"\\ud800"'), "line 1: not JSON"),
    ("a.jsonl", b'["kind"]\n', "line 1: kind is None"),
    ("a.jsonl", b'{"kind": ["note"]}\n', "line 1: kind is"),
    ("a.jsonl", b'{"kind": "other"}\n', "line 1: kind is 'other', not one of note"),
    ("a.jsonl", b"\n\n", "holds no record"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: not JSON"),
    ("a.jsonl", NOTE + b'{"q": "\xe4"}\n', "a.jsonl, line 2: not UTF-8"),
    ("a.csv", "q\n".encode("utf-16"), "a.csv, line 1: not UTF-8"),
    ("a.json", LINES.encode(), "must be named .jsonl"),
    ("a.json", b'{"q": 1}', "not a list of objects"),
    ("a.csv", b"kind,id\n1,2\n3\n", "a.csv, line 2: kind is '1'"),
    ("a.csv", b"kind\n1,2\n", "a.csv, line 2: 2 columns, not 1 as in the first line; quote .*commas"),
    ("a.tsv", b"kind\tid\tq\n1\n", "a.tsv, line 2: 1 columns, not 3 as in the first line$"),
    ("a.csv", b"kind;id\n1;2\n", "a.csv, line 1: 'kind;id' is one column; separated by ';'. save it with commas"),
    ("a.csv", b'q,n\n"open,2\n', "a.csv, line 2: unexpected end"),
    ("a.csv", b"q,n,,,q\n1,2,,,3\n", "a.csv, line 1: two columns have one name"),
    ("a.txt", b"hello", "a.txt: files that can be read end in .jsonl"),
    ("a.jsonl.gz", b"not gzip", "a.jsonl.gz cannot be read"),
    ("a.parquet", b"PAR1", "a.parquet: "),
    (".hidden.jsonl", NOTE, "no file in it ends in"),
    ("nothing.jsonl", None, "no such file or folder"),
]


@pytest.mark.parametrize(("name", "data", "message"), BROKEN)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    refused(message, runs.read_records, str(tmp_path if name.startswith(".") else tmp_path / name), KINDS)


def test_a_log_goes_on_behind_a_torn_line_and_keeps_no_double(tmp_path, capsys):
    path, key = tmp_path / "stage.jsonl", operator.itemgetter("id")
    with runs.Log(path, key) as log:
        assert log.add({"id": 1, "text": "ä\u2028"}) and not log.add({"id": 1, "text": "again"})
        log.add({"id": 2, "failed": True})
    with open(path, "a") as file:
        file.write('{"id": 3, "te')  # killed while it wrote
    with runs.Log(path, key, again=lambda record: "failed" in record) as log:
        assert list(log.done) == [1] and log.done[1]["text"] == "ä\u2028"
        assert log.add({"id": 2, "text": "second attempt"})
    assert "13 bytes are cut off" in capsys.readouterr().err
    assert runs.stored(path, key)[2] == {"id": 2, "text": "second attempt"}
    path.write_text('{"no": "id"}\n')
    refused("line 1: no record of ours", runs.stored, path, key)


def test_a_full_disk_says_how_to_go_on(tmp_path):
    with runs.Log(tmp_path / "stage.jsonl", operator.itemgetter("id")) as log:
        log.file.close()
        full = mock.Mock(side_effect=OSError(28, "No space left on device"))
        log.file = mock.Mock(write=full, close=full)
        refused("stage.jsonl: No space left on device.*--resume", log.add, {"id": 1})
        assert not log.done


HELPED = """
from __future__ import annotations
import dataclasses
import beside

@dataclasses.dataclass
class Point:
    x: int

def reward(prompt):
    import late
    return beside.double(Point(2).x) + late.ONE
"""
FAULTS = [
    ("bad.py", "x = 1\n1 / 0", "bad.py, line 2: ZeroDivisionError"),
    ("bad.py", "import no_such_package", "bad.py, line 1: ModuleNotFoundError: .*no_such_package"),
    ("bad.py", "\ndef reward(", r"bad.py: SyntaxError: .*line 2\)"),
    ("bad.py", "raise SystemExit(0)", "SystemExit"),
    ("bad.py", "reward = 3", "bad.py has no function reward"),
    ("bad.py", "", "bad.py has no function reward"),
    ("a.txt", "", "no Python file"),
    ("nothing.py", None, "nothing.py: no such file"),
]


@pytest.mark.parametrize(("name", "text", "message"), FAULTS)
def test_a_users_file_may_use_modules_beside_it_and_its_mistakes_are_named(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    files = {"mine.py": HELPED, "beside.py": "def double(x):\n    return 2 * x\n", "late.py": "ONE = 1\n", name: text}
    for file, content in files.items():
        if content is not None:
            (tmp_path / file).write_text(content)
    assert runs.load_function("mine.py", "reward")("") == 5
    refused(message, runs.load_function, name, "reward")


def test_the_last_two_checkpoints_are_kept_whole(tmp_path):
    assert trainers.load_checkpoint(tmp_path) is None
    tensors = {"w": torch.randn(4, 5).T, "step": torch.tensor(3.0)}
    for step in (8, 9, 10, 11):
        trainers.save_checkpoint(tmp_path, {**tensors, "n": torch.tensor(step)}, {"step": step, "seconds": 0.1})
    assert [p.name for p in trainers.checkpoints(tmp_path)] == ["step-10", "step-11"]
    loaded, state = trainers.load_checkpoint(tmp_path)
    assert state == {"step": 11, "seconds": 0.1} and loaded.pop("n") == 11
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize(("owner", "broken"), [(trainers, "save_file"), (runs, "write_json"), (os, "replace")])
def test_a_save_that_dies_leaves_the_earlier_one(tmp_path, monkeypatch, owner, broken):
    trainers.save_checkpoint(tmp_path, {"w": torch.tensor(1)}, {"step": 1})
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(owner, broken, mock.Mock(side_effect=OSError("disk full")))
        trainers.save_checkpoint(tmp_path, {"w": torch.tensor(2)}, {"step": 2})
    assert trainers.load_checkpoint(tmp_path)[0]["w"] == 1
    trainers.save_checkpoint(tmp_path, {"w": torch.tensor(3)}, {"step": 3})
    assert trainers.load_checkpoint(tmp_path)[0]["w"] == 3
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_the_first_ctrl_c_waits_for_the_step_and_the_second_does_not():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    with pytest.raises(KeyboardInterrupt), runs.Interruptible() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
    with runs.Interruptible() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

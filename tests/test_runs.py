"""runs.py: flags, run folder, files of users, stages that resume; and the checkpoints of trainers.py."""

import gzip
import json
import operator
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

import runs
import trainers
from runs import UserError, option


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


@pytest.fixture
def pocket(tmp_path):
    (tmp_path / "world.json").write_text('{"seed": 7}')
    return str(tmp_path)


# ------------------------------------------------------------------------------------------------- flags


def test_a_flag_beats_the_pockets_default_which_beats_the_papers(pocket):
    config, origin = runs.parse(Config, [])
    assert (config.lr, origin["lr"]) == (2e-4, "default")
    config, origin = runs.parse(Config, ["--model", pocket])
    assert (config.lr, origin["lr"], origin["model"], origin["steps"]) == (1e-3, "pocket", "flag", "default")
    config, origin = runs.parse(Config, ["--model", pocket, "--lr", "5"])
    assert (config.lr, origin["lr"]) == (5.0, "flag")


def test_types_follow_the_defaults():
    words = ["--greedy", "false", "--steps", "9", "--compare", "a", "b", "--dtype", "bfloat16"]
    config, _ = runs.parse(Config, words)
    assert config == Config(greedy=False, steps=9, compare=("a", "b"), dtype="bfloat16")
    assert runs.parse(Config, ["--greedy"])[0].greedy is True


def test_every_wrong_value_is_in_one_message():
    words = ["--lr", "fast", "--greedy", "maybe", "--dtype", "int8", "--steps", "-1", "--share", "0"]
    with pytest.raises(UserError) as error:
        runs.parse(Config, words)
    assert str(error.value).split("\n") == [
        "--lr fast: not a number",
        "--greedy maybe: neither true nor false",
        "--dtype int8: not one of float32, bfloat16",
        "--steps -1: must be >= 1",
        "--share 0.0: must be > 0 and <= 1",
    ]
    with pytest.raises(UserError, match="go together"):
        runs.parse(Config, ["--lr", "7"])
    with pytest.raises(UserError, match="64 bits"):
        runs.parse(Config, ["--steps", str(2**63)])


@pytest.mark.parametrize("text", ["nan", "inf"])
def test_a_number_must_be_finite(text):
    with pytest.raises(UserError, match="not finite"):
        runs.parse(Config, ["--lr", text])


def test_help_shows_both_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        runs.parse(Config, ["--help"], "what it is")
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "what it is" in shown and "100 % a number (0.0002; pocket 0.001)" in shown
    assert "a choice: float32, bfloat16 ('float32')" in " ".join(shown.split())


@pytest.mark.parametrize("words", [["--l", "1"], ["--nope", "1"], ["--steps"]])
def test_unknown_and_shortened_flags_are_errors(words):
    with pytest.raises(SystemExit) as end:
        runs.parse(Config, words)
    assert end.value.code == 2


def test_main_turns_errors_into_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script", "--steps", "2"])
    for result, code in (
        (lambda c, o: 3, 3),
        (raising(UserError("no such thing")), 2),
        (raising(OSError(28, "No space left on device", "a/b")), 2),
        (raising(KeyboardInterrupt), 130),
    ):
        with pytest.raises(SystemExit) as end:
            runs.main(Config, result)
        assert end.value.code == code
    shown = capsys.readouterr().err
    assert "error: no such thing" in shown and "error: a/b: No space left on device" in shown


def test_a_terminal_without_utf_8_still_shows_every_text():
    code = "import runs, dataclasses\n@dataclasses.dataclass\nclass C:\n    a: int = runs.option(1, '')\n"
    code += "runs.main(C, lambda config, origin: print('\\u00e4\\u202e') or 0)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "\\xe4\\u202e\n"), done.stderr


def raising(error):
    def run(config, origin):
        raise error

    return run


def test_only_pockets_have_a_world(pocket, tmp_path):
    assert runs.world_seed(pocket) == 7
    with pytest.raises(UserError, match="not a pocket model"):
        runs.world_seed(str(tmp_path / "other"))


# ------------------------------------------------------------------------------------------------- run folder


def made(tmp_path, script="one", **changes):
    config = Config(out=str(tmp_path / "run"), **changes)
    return config, runs.new_folder(config, {}, script, "a laptop")


def test_a_folder_of_another_config_is_refused(tmp_path):
    config, folder = made(tmp_path)
    assert json.loads((folder / "config.json").read_text())["values"]["lr"] == 2e-4
    for lr in (2e-4, 1.0):
        with pytest.raises(UserError, match="holds another run.*--resume"):
            made(tmp_path, lr=lr)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not an empty folder"):
        runs.new_folder(Config(out=str(tmp_path / "mine")), {}, "one", "a laptop")


def test_resume_takes_every_setting_from_the_run(tmp_path):
    config, folder = made(tmp_path, lr=6.0, compare=("a", "b"))
    again, _ = runs.parse(Config, ["--resume", str(folder)])
    assert again == Config(**{**vars(config), "resume": str(folder)})
    assert runs.new_folder(again, {}, "one", "a laptop") == folder
    with pytest.raises(UserError, match="remove --lr, --steps"):
        runs.parse(Config, ["--resume", str(folder), "--lr", "1", "--steps", "2"])
    with pytest.raises(UserError, match="is a run of one, not of two"):
        runs.new_folder(again, {}, "two", "a laptop")
    (folder / "result.json").write_text("{}")
    with pytest.raises(UserError, match="is finished"):
        runs.new_folder(again, {}, "one", "a laptop")


@pytest.mark.parametrize("text", [None, "{", "{}", '{"script": "one", "values": {"lr": 1}, "origin": {}}'])
def test_resume_needs_a_run_of_this_script(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        runs.parse(Config, ["--resume", str(tmp_path)])


def test_the_source_is_recorded(tmp_path):
    _, folder = made(tmp_path)
    source = json.loads((folder / "source.json").read_text())
    assert source["versions"]["torch"] == torch.__version__ and source["device"] == "a laptop"
    assert source.keys() >= {"commit", "diff", "command"}


def test_files_are_the_users_own(tmp_path):
    _, folder = made(tmp_path)
    runs.append_jsonl(folder / "metrics.jsonl", {"step": 1})
    trainers.save_checkpoint(folder, {"w": torch.zeros(2)}, {"step": 1})
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) == 5 and all(p.stat().st_mode & 0o777 == 0o600 for p in files)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    runs.write_json(path, {"x": 1})
    monkeypatch.setattr(os, "fsync", raising_os)
    with pytest.raises(OSError):
        runs.write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}


def raising_os(handle):
    raise OSError("disk full")


def test_logs_hold_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step, loss in ((1, 0.5), (2, float("nan")), (3, 0.25)):
        runs.append_jsonl(path, {"step": step, "loss": loss, "text": "ä\u2028"})
    with open(path, encoding="utf-8") as file:
        assert [json.loads(line)["loss"] for line in file] == [0.5, None, 0.25]


# ------------------------------------------------------------------------------------------------- files of users

KINDS = {"note": {"id": str, "n": int}}
NOTE = '{"kind": "note", "id": "a", "n": 1}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NOTE + '{"kind": "note", "id": 3}\n', "line 2: id must be str, is int; n must be int, is missing"),
        (NOTE + '\n{"kind": "no', "line 3: not JSON.*ends in the middle of this line"),
        ('{"kind": "note",}\n', "line 1: not JSON"),
        (NOTE.replace('"a"', '"\\ud800"'), "line 1: not JSON"),
        ('["kind"]\n', "line 1: kind is None"),
        ('{"kind": ["note"]}\n', "line 1: kind is"),
        ('{"kind": "other"}\n', "line 1: kind is 'other', not one of note"),
        ("\n\n", "holds no record"),
        ("[" * 100_000 + "\n", "line 1: not JSON"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        runs.read_records(str(tmp_path / "d.jsonl"), KINDS)


ROWS = [{"q": 'ä, "b"\u2028', "n": "1"}, {"q": "two\nlines", "n": "2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = 'q,n\n"ä, ""b""\u2028",1\n\n"two\nlines",2\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES.encode()),
        ("A.JSONL", LINES.encode("utf-8-sig")),
        ("a.jsonl", LINES.replace("\n", "\r\n\r\n").encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.csv", TABLE.encode()),
        ("A.Csv", TABLE.encode("utf-8-sig")),
        ("a.csv.GZ", gzip.compress(TABLE.encode())),
        ("a.tsv", TABLE.replace(",1", "\t1").replace(",2", "\t2").replace("q,n", "q\tn").encode()),
    ],
)
def test_the_same_rows_come_out_of_every_file(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    rows = list(runs.read_rows(tmp_path / name))
    assert [row for _, row in rows] == ROWS
    assert [where for where, _ in rows][0].startswith(str(tmp_path / name))
    assert list(runs.read_rows(tmp_path)) == rows


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"q": 1}\n{"q": "\xe4"}\n', "a.jsonl, line 2: not UTF-8"),
        ("a.csv", "q\n".encode("utf-16"), "a.csv, line 1: not UTF-8"),
        ("a.json", LINES.encode(), "must be named .jsonl"),
        ("a.json", b'{"q": 1}', "not a list of objects"),
        ("a.csv", b"q,n\n1,2\n3\n", "a.csv, line 3: not 2 columns"),
        ("a.csv", b'q,n\n1,2\n"open,2\n', "a.csv, line 3: unexpected end"),
        ("a.csv", b"q,n,,,q\n1,2,,,3\n", "a.csv, line 1: two columns have one name"),
        ("a.txt", b"hello", "a.txt: files that can be read end in .jsonl"),
        ("a.xlsx", b"PK", "a.xlsx: files that can be read end in .jsonl"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz cannot be read"),
        ("a.parquet", b"PAR1", "a.parquet: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(runs.read_rows(tmp_path / name))


def test_no_file_and_an_empty_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        list(runs.read_rows(tmp_path / "nothing.jsonl"))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.jsonl").write_text(LINES)
    with pytest.raises(UserError, match="no file in it ends in"):
        list(runs.read_rows(tmp_path))


# ------------------------------------------------------------------------------------------------- stages that resume


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
    with pytest.raises(UserError, match="line 1: no record of ours"):
        runs.stored(path, key)


def test_a_full_disk_says_how_to_go_on(tmp_path):
    with runs.Log(tmp_path / "stage.jsonl", operator.itemgetter("id")) as log:
        log.file.close()
        log.file = open("/dev/full", "w")  # noqa: SIM115
        with pytest.raises(UserError, match="No space left on device.*--resume"):
            log.add({"id": 1})
        assert not log.done


HELPED = """
from __future__ import annotations
import dataclasses
import beside

@dataclasses.dataclass
class Point:
    x: int

def reward(prompt):
    return beside.double(Point(2).x)
"""


def test_a_users_file_may_use_dataclasses_and_modules_beside_it(tmp_path):
    (tmp_path / "mine.py").write_text(HELPED)
    (tmp_path / "beside.py").write_text("def double(x):\n    return 2 * x\n")
    assert runs.load_function(tmp_path / "mine.py", "reward")("") == 4
    assert runs.load_function(tmp_path / "mine.py", "judge") is None
    for text, message in (("1 / 0", "ZeroDiv"), ("raise SystemExit(0)", "SystemExit"), ("reward = 3", "no function")):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(UserError, match=message):
            runs.load_function(tmp_path / "bad.py", "reward")
    for name in ("nothing.py", "a.txt"):
        with pytest.raises(UserError, match="no Python file"):
            runs.load_function(tmp_path / name, "reward")


# ------------------------------------------------------------------------------------------------- checkpoints


def draw():
    return random.random(), random.gauss(0, 1), torch.rand(1).item()


def test_a_checkpoint_brings_tensors_state_and_random_generators_back(tmp_path):
    trainers.seed_everything(3)
    draw()
    torch.randn(3)
    tensors = {"w": torch.randn(4, 5).T, "step": torch.tensor(3.0)}
    trainers.save_checkpoint(tmp_path, tensors, {"step": 3, "seconds": 0.1})
    wanted = draw()
    trainers.seed_everything(99)
    loaded, state = trainers.load_checkpoint(tmp_path)
    assert state == {"step": 3, "seconds": 0.1}
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    assert draw() == wanted


def test_the_last_two_checkpoints_are_kept(tmp_path):
    assert trainers.load_checkpoint(tmp_path) is None
    for step in (8, 9, 10, 11):
        trainers.save_checkpoint(tmp_path, {"w": torch.tensor(step)}, {"step": step})
    assert [p.name for p in trainers.checkpoints(tmp_path)] == ["step-10", "step-11"]
    assert trainers.load_checkpoint(tmp_path)[0]["w"] == 11


@pytest.mark.parametrize("broken", ["save_file", "write_json", "replace"])
def test_a_save_that_dies_leaves_the_earlier_one(tmp_path, monkeypatch, broken):
    trainers.save_checkpoint(tmp_path, {"w": torch.tensor(1)}, {"step": 1})
    with monkeypatch.context() as patch:
        owner = {"save_file": trainers, "write_json": runs, "replace": os}[broken]
        patch.setattr(owner, broken, lambda *a, **k: raising_os(0), raising=False)
        with pytest.raises(OSError):
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

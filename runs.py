"""What every script shares and nobody ablates: flags from a dataclass, the run folder, records, checkpoints, seeds.

Only the standard library is imported at the top, and scripts import torch inside `main`, so `--help` answers at once
and a wrong flag costs nothing.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, field
from importlib import metadata
from pathlib import Path

EXIT_OK, EXIT_BAD_INPUT, EXIT_UNSCORED = 0, 2, 3


class UserError(Exception):
    """Something the user can mend: one message, exit 2, no traceback."""


# ------------------------------------------------------------------------------------------------- flags


def option(default, help: str, *, pocket=MISSING, choices: tuple = ()):
    """A field of a Config. `pocket` is the default where the model folder is a pocket (world.json), else `default`."""
    return field(default=default, metadata={"help": help, "pocket": pocket, "choices": choices})


def world_seed(model: str) -> int:
    """The seed of the pocket world that a model folder belongs to. Raises UserError for any other model."""
    path = Path(model) / "world.json"
    if not path.is_file():
        raise UserError(f"{model} is not a pocket model: it has no world.json")
    return json.loads(path.read_text())["seed"]


def is_pocket(model: str) -> bool:
    return (Path(model) / "world.json").is_file()


def parse(config_class, arguments: list[str], description: str):
    """(config, {name: origin}) from the command line; origin is flag, pocket, or default.

    Every wrong value is reported in one UserError. `--resume RUN` reads all settings from RUN/config.json.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    for name, entry in fields.items():
        pocket = entry.metadata["pocket"]
        shown = entry.default if pocket is MISSING else f"{entry.default}; pocket {pocket}"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, metavar=name.upper(), help=f"{entry.metadata['help']} ({shown})")
    given = {name: text for name, text in vars(parser.parse_args(arguments)).items() if text is not None}
    if given.get("resume"):
        return resumed(config_class, given)
    values, origin, problems = {}, {}, []
    for name, text in given.items():
        try:
            values[name], origin[name] = convert(text, type(fields[name].default)), "flag"
        except ValueError:
            problems.append(f"--{name.replace('_', '-')} {text}: not {type(fields[name].default).__name__}")
        if (allowed := fields[name].metadata["choices"]) and text not in allowed:
            problems.append(f"--{name.replace('_', '-')} {text}: one of {', '.join(allowed)}")
    pocket_model = is_pocket(values.get("model", fields["model"].default)) if "model" in fields else False
    for name, entry in fields.items():
        if name not in values:
            use_pocket = pocket_model and entry.metadata["pocket"] is not MISSING
            values[name] = entry.metadata["pocket"] if use_pocket else entry.default
            origin[name] = "pocket" if use_pocket else "default"
    config = config_class(**values) if not problems else None
    if config is not None and hasattr(config, "problems"):
        problems += config.problems()
    if problems:
        raise UserError("\n".join(problems))
    return config, origin


def convert(text: str, kind: type):
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return kind(text)


def resumed(config_class, given: dict):
    """All settings of an earlier run; nothing else may be given with --resume."""
    if set(given) != {"resume"}:
        raise UserError(
            f"--resume reads all settings from its run; remove --{', --'.join(sorted(set(given) - {'resume'}))}"
        )
    folder = Path(given["resume"])
    try:
        saved = json.loads((folder / "config.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"--resume {folder}: no readable config.json ({error})") from None
    names = {f.name for f in dataclasses.fields(config_class)}
    if set(saved["values"]) != names:
        raise UserError(f"--resume {folder}: config.json is of another script or version")
    values = {**saved["values"], "resume": str(folder), "out": str(folder)}
    return config_class(**values), saved["origin"]


def main(config_class, run: Callable, description: str | None = None) -> None:
    """Entry point of a script: parse, run, translate a UserError into exit 2 without a traceback."""
    description = description or sys.modules["__main__"].__doc__
    try:
        config, origin = parse(config_class, sys.argv[1:], description)
        code = run(config, origin)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; a run with checkpoints goes on with --resume RUN", file=sys.stderr)
        code = 130
    sys.exit(code)


def show(config, origin: dict) -> None:
    """The resolved settings, each with where it comes from."""
    for name, value in dataclasses.asdict(config).items():
        print(f"  {name:<16} {value!s:<32} {origin[name]}")


# ------------------------------------------------------------------------------------------------- run folder


def private(path: Path) -> None:
    os.chmod(path, 0o600)


def write_atomic(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    private(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def append_jsonl(path: Path, value: dict) -> None:
    new = not path.exists()
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
    if new:
        private(path)


def source() -> dict:
    """Commit, uncommitted difference, versions and machine, as far as they can be known."""

    def git(*words: str) -> str | None:
        if not shutil.which("git"):
            return None
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else None

    packages = ("torch", "triton", "transformers", "safetensors", "numpy")
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in packages}
    return {
        "commit": git("rev-parse", "HEAD"),
        "diff": git("diff", "HEAD"),
        "versions": {"python": platform.python_version(), **installed},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "command": sys.argv,
    }


def new_folder(config, origin: dict, script: str) -> Path:
    """Make the run folder with config.json and source.json. A folder that holds another run is refused."""
    folder = Path(config.out) if config.out else Path("runs") / f"{script}-{time.strftime('%Y%m%d-%H%M%S')}"
    if getattr(config, "resume", ""):
        return folder
    if (folder / "config.json").exists():
        raise UserError(f"{folder} already holds a run; name another folder, or --resume {folder}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; name another folder")
    write_json(folder / "config.json", {"script": script, "values": dataclasses.asdict(config), "origin": origin})
    write_json(folder / "source.json", source())
    return folder


# ------------------------------------------------------------------------------------------------- records


def read_jsonl(path: str, required: dict[str, dict[str, type]]) -> list[dict]:
    """Records of a JSONL file, each checked against the fields of its kind. Raises UserError with file and line.

    `required` maps a record's "kind" to {field: type}.
    """
    records = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind not in required:
            raise UserError(f"{where}: kind is {kind!r}, not one of {', '.join(required)}")
        for name, wanted in required[kind].items():
            if not isinstance(record.get(name), wanted):
                raise UserError(f"{where}: {name} must be {wanted.__name__}, is {type(record.get(name)).__name__}")
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no record")
    return records


def file_sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------- device and seeds


def pick_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU")
    return name


def seed_everything(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Interruptible:
    """Within this block Ctrl-C and SIGTERM only set `requested`; the loop stops itself at its next whole step."""

    def __enter__(self):
        self.requested = False
        self.before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number, frame):
        self.requested = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])  # a second Ctrl-C stops at once

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def copy_world(model: str, target: Path) -> None:
    """What makes a folder a pocket's travels with its fully trained model."""
    for name in ("world.json", "candidates.jsonl"):
        if (Path(model) / name).is_file():
            shutil.copy(Path(model) / name, target / name)


# ------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, step: int, tensors: dict, state: dict) -> None:
    """checkpoints/step-N: tensors.safetensors and state.json, whole or not at all; the last two are kept.

    The folder is written under another name and renamed last, so a kill at any moment leaves the earlier ones intact.
    """
    from safetensors.torch import save_file

    final = folder / "checkpoints" / f"step-{step}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / "tensors.safetensors")
    private(temporary / "tensors.safetensors")
    write_json(temporary / "state.json", {"step": step, **state})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def load_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(tensors, state) of the newest whole checkpoint. Raises UserError if there is none."""
    from safetensors.torch import load_file

    found = checkpoints(folder)
    if not found:
        raise UserError(f"{folder} has no whole checkpoint to resume from")
    return load_file(found[-1] / "tensors.safetensors"), json.loads((found[-1] / "state.json").read_text())

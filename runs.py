"""What every script shares and nobody ablates: flags from a dataclass, the run folder, records, checkpoints, seeds.

Scripts name their heavy modules with `Lazy`, so that `--help` and a wrong flag answer before torch is imported.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
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


class Lazy:
    """A module that is imported at its first use: `torch = Lazy("torch")`, then `torch.tensor(...)` as ever."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


kernels, model, safetensors_torch, torch = map(Lazy, ("kernels", "model", "safetensors.torch", "torch"))


# ------------------------------------------------------------------------------------------------- flags


def option(default, help: str, *, pocket=MISSING, choices: tuple = ()):
    """A field of a Config. `pocket` is the default where the model folder is a pocket (world.json), else `default`.

    The type of `default` is the flag's: bool (`--flag` alone means true), int, float, str, or tuple (several words).
    """
    return field(default=default, metadata={"help": help, "pocket": pocket, "choices": choices})


def world_seed(model: str) -> int:
    """The seed of the pocket world that a model folder belongs to. Raises UserError for any other model."""
    if not is_pocket(model):
        raise UserError(f"{model} is not a pocket model: it has no world.json")
    return json.loads((Path(model) / "world.json").read_text())["seed"]


def is_pocket(model: str) -> bool:
    return (Path(model) / "world.json").is_file()


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
    return {name: text for name, text in vars(parser.parse_args(arguments)).items() if text is not None}


def convert(text, entry):
    """The value of a flag's text. Raises ValueError saying what it should be."""
    kind, choices = type(entry.default), entry.metadata["choices"]
    if choices and text not in choices:
        raise ValueError(f"not one of {', '.join(choices)}")
    if kind is bool and text not in ("true", "false"):
        raise ValueError("neither true nor false")
    try:
        value = text == "true" if kind is bool else kind(text)
    except ValueError:
        raise ValueError({int: "not a whole number", float: "not a number"}[kind]) from None
    if kind is float and not math.isfinite(value):
        raise ValueError("not finite")
    return value


def parse(config_class, arguments: list[str], description: str = ""):
    """(config, {name: origin}) from the command line; origin is flag, pocket, or default.

    Every wrong value is reported in one UserError: those that cannot be read, and what `config.problems()` finds.
    `--resume RUN` reads all settings from RUN/config.json.
    """
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    given = command_line(fields, arguments, description)
    if given.get("resume"):
        return resumed(config_class, given)
    values, problems = {}, []
    for name, text in given.items():
        try:
            values[name] = convert(text, fields[name])
        except ValueError as error:
            problems.append(f"{flag(name)} {text}: {error}")
    origin = dict.fromkeys(values, "flag")
    pocket_model = "model" in fields and is_pocket(values.get("model", fields["model"].default))
    for name, entry in fields.items():
        if name not in values:
            use_pocket = pocket_model and entry.metadata["pocket"] is not MISSING
            values[name] = entry.metadata["pocket"] if use_pocket else entry.default
            origin[name] = "pocket" if use_pocket else "default"
    config = config_class(**values)
    problems += config.problems() if hasattr(config, "problems") else []
    if problems:
        raise UserError("\n".join(problems))
    return config, {name: origin[name] for name in fields}


def resumed(config_class, given: dict):
    """All settings of an earlier run; nothing else may be given with --resume."""
    if others := sorted(set(given) - {"resume"}):
        raise UserError(f"--resume reads all settings from its run; remove {', '.join(map(flag, others))}")
    folder, fields = Path(given["resume"]), dataclasses.fields(config_class)
    try:
        saved = json.loads((folder / "config.json").read_text())
        values, origin = saved["values"], saved["origin"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--resume {folder}: no readable config.json ({error})") from None
    if set(values) != {f.name for f in fields}:
        raise UserError(f"--resume {folder}: config.json is of another script or version")
    values = {f.name: type(f.default)(values[f.name]) for f in fields}  # JSON has no tuples
    return config_class(**{**values, "resume": str(folder), "out": str(folder)}), origin


def main(config_class, run: Callable) -> None:
    """Entry point of a script: parse, run, translate a UserError into exit 2 without a traceback."""
    try:
        config, origin = parse(config_class, sys.argv[1:], sys.modules["__main__"].__doc__)
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


def append_jsonl(path: Path, value: dict) -> None:
    """Add one line. A number that is not finite becomes null, for JSON has no NaN."""
    value = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    with open(path, "a", encoding="utf-8", opener=private) as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def rewind(path: Path, step: int) -> None:
    """Cut a log of ours back to `step`, where the run goes on; the torn last line of a killed process goes too."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    write_atomic(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= step).encode())


def source() -> dict:
    """Commit, uncommitted changes, versions and device, as far as they can be known."""

    def git(*words: str) -> str | None:
        if not shutil.which("git"):
            return None
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else None

    packages = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
    found = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in packages}
    cpu = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "command": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "diff": git("diff", "HEAD"),
        "untracked": git("ls-files", "--others", "--exclude-standard"),
        "versions": {"python": platform.python_version(), **found},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
    }


def new_folder(config, origin: dict, script: str) -> Path:
    """The run folder, made with config.json and source.json, or the one of --resume. Refuses any other run's."""
    if getattr(config, "resume", ""):
        folder = Path(config.resume)
        if (folder / "result.json").exists():
            raise UserError(f"{folder} is finished: it has a result.json")
        if (of := json.loads((folder / "config.json").read_text())["script"]) != script:
            raise UserError(f"{folder} is a run of {of}, not of {script}")
        return folder
    folder = Path(config.out or Path("runs") / f"{script}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds another run; name another folder, or go on with that one: --resume {folder}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; name another")
    values = dataclasses.asdict(config)
    write_json(folder / "config.json", {"script": script, "values": values, "origin": origin})
    write_json(folder / "source.json", source())
    return folder


def copy_world(model: str, target: Path) -> None:
    """What makes a folder a pocket's travels with its fully trained model."""
    for name in ("world.json", "candidates.jsonl"):
        if (Path(model) / name).is_file():
            shutil.copy(Path(model) / name, target / name)


# ------------------------------------------------------------------------------------------------- records


def read_jsonl(path: str, required: dict[str, dict[str, type]]) -> list[dict]:
    """Records of a JSONL file, each checked against the fields of its kind: `required` is {kind: {field: type}}.

    Raises UserError with file and line. A torn last line is an error like any other: data are never dropped unsaid.
    """
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    records.append(check_record(line, f"{path}, line {number}", required))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable text file in UTF-8: {error}") from None
    if not records:
        raise UserError(f"{path} holds no record")
    return records


def check_record(line: str, where: str, required: dict[str, dict[str, type]]) -> dict:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is not text
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith("\n") else "; the file ends in the middle of this line"
        raise UserError(f"{where}: not JSON ({error}){cut}") from None
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
    return record


def load_function(path: str, name: str):
    """The function `name` of a Python file of the user's, who thereby runs it. Raises UserError."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        raise UserError(f"{path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:  # whatever the file raises is its author's to mend
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise UserError(f"{path}: {name} is no function")
    return function


# ------------------------------------------------------------------------------------------------- device and seeds

# Dense bf16 products with fp32 accumulators, FLOPs a second; the first name that the device's contains
PEAK_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
PEAK_FLOPS |= {"RTX 4090": 165e12, "RTX 3090": 71e12}


def pick_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def pick_dtype(name: str, device: str):
    """The torch dtype; auto is bfloat16 on a GPU that has it (sm_80 and newer), float32 elsewhere."""
    modern = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if name == "bfloat16" and device == "cuda" and not modern:
        raise UserError("--dtype bfloat16: this GPU is older than sm_80; use float32")
    return getattr(torch, ("bfloat16" if modern else "float32") if name == "auto" else name)


def pick_kernels(name: str, device: str) -> None:
    """Settle which kernels run; auto is triton on a GPU that can."""
    try:
        kernels.force(None if name == "auto" else name)
        kernels.backend(device)
    except ValueError as error:
        raise UserError(str(error)) from None


def load_model(path: str, device: str, dtype, adapter: str = ""):
    """(transformer, tokenizer) of a folder or hub id, with a PEFT adapter on it where one is named."""
    try:
        transformer, tokenizer = model.load(path, device=device, dtype=dtype)
        if adapter:
            model.load_adapter(transformer, adapter)
    except model.ModelError as error:
        raise UserError(str(error)) from None
    return transformer, tokenizer


def peak_memory() -> float:
    """GiB: the most that this process has held, of the GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def seed_everything(seed: int) -> None:
    """The generators that a checkpoint keeps: Python's and torch's. Nothing here draws from NumPy's."""
    random.seed(seed)
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


# ------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, tensors: dict, state: dict) -> None:
    """checkpoints/step-N (N is state["step"]), whole or not at all: tensors, state and every random generator.

    Written under a hidden name, flushed, and renamed last: a kill at any moment leaves the earlier ones intact. The
    last two are kept.
    """
    final = folder / "checkpoints" / f"step-{state['step']}"
    for torn in final.parent.glob(".step-*"):
        shutil.rmtree(torn)
    temporary = final.with_name("." + final.name)
    temporary.mkdir(parents=True)
    generators = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["rng/cuda"] = torch.cuda.get_rng_state()
    whole = {name: t.detach().cpu().contiguous() for name, t in {**tensors, **generators}.items()}
    safetensors_torch.save_file(whole, temporary / "tensors.safetensors")
    with open(temporary / "tensors.safetensors", "rb+") as file:
        os.fchmod(file.fileno(), 0o600)
        os.fsync(file.fileno())
    write_json(temporary / "state.json", {**state, "rng": random.getstate()})
    os.replace(temporary, final)
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(folder: Path) -> tuple[dict, dict] | None:
    """(tensors, state) of the newest checkpoint, its random generators put in force; None where there is none yet."""
    if not (found := checkpoints(folder)):
        return None
    tensors = safetensors_torch.load_file(found[-1] / "tensors.safetensors")
    state = json.loads((found[-1] / "state.json").read_text())
    version, keys, gauss = state.pop("rng")
    random.setstate((version, tuple(keys), gauss))
    torch.set_rng_state(tensors.pop("rng/cpu"))
    cuda = tensors.pop("rng/cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    return tensors, state

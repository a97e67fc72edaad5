"""One HTML file of evaluations and training runs, read from their folders: figures, differences, charts, texts.

What models and data sets wrote is data: the template escapes every value, matplotlib the texts of charts; `printable`
takes out what hides or reorders text. No script, no address: the page's content policy forbids both."""

import contextlib
import io
import math
import operator
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import runs
import scores

INK, SOFT, LINE, CARD = "#1d2327", "#626b72", "#dfe1de", "#ffffff"
PALETTE = ("#6b7480", "#2f74c0", "#d9662b", "#2c9a7a", "#a7479c", "#b08a1a", "#5a5fcf", "#c23b4b")  # of the methods
THEME = {INK: "ink", SOFT: "soft", LINE: "line", CARD: "card", **{c: f"c{i}" for i, c in enumerate(PALETTE)}}
STYLE = {"svg.fonttype": "none", "text.parse_math": False, "text.usetex": False, "font.size": 9, "grid.color": LINE}
STYLE |= {"axes.grid": True, "axes.labelcolor": SOFT, "axes.prop_cycle": f"cycler(color={list(PALETTE)})"}
STYLE |= {"xtick.color": SOFT, "ytick.color": SOFT, "xtick.major.size": 0, "ytick.major.size": 0}


@dataclass
class Run:
    """An evaluation, or one end of a training run."""

    folder: Path
    method: str
    seed: int | None
    model: str
    identity: object  # the same in two measurements of one model
    figures: dict  # {suite: row}
    items: dict  # {scores.key(item): item}
    summary: dict = field(default_factory=dict)  # of an evaluation
    training: list[Path] = field(default_factory=list)  # the training runs behind the model, newest first
    remark: str = ""


def read_items(path: Path) -> dict[tuple, dict]:
    """{scores.key(item): item} of an evaluation's items.jsonl, or a training run's before.json or after.json."""
    if path.suffix == ".jsonl" or not path.is_file():
        return runs.stored(path, scores.scored_key)
    return {scores.key(item): item for item in runs.read_json(path, "items")["items"]}


def read_figures(path: Path, rows: dict) -> dict[str, dict]:
    """{suite: row} of a result.json. Raises UserError for one of another version."""
    wanted = {"metric", "value", "low", "high", "best", "worst", "n", "truncated", "empty", "unscored", "lengths"}
    for suite, row in rows.items():
        if not isinstance(row, dict) or wanted - row.keys() or row["metric"] not in scores.VALUES:
            raise runs.UserError(f"{path}, {suite}: not the figures of a suite, or of another version")
    return rows


def read_run(folder: Path) -> list[Run]:
    """The runs that a folder holds: an evaluation, or a training run's model before and after. Raises UserError."""
    settings = runs.read_json(folder / "config.json", "script", "values")
    script, values = settings["script"], settings["values"]
    if script not in ("evaluate", "train_sft", "train_rl"):
        raise runs.UserError(f"{folder} is a run of {script}; a report is made of evaluations and training runs")
    model, adapter, endpoint = (values.get(name, "") for name in ("model", "adapter", "endpoint"))
    path, home, seed = folder / "result.json", folder.resolve(), values.get("seed")
    if not path.is_file():
        raise runs.UserError(f"{folder} is not finished: it has no result.json; go on with --resume {folder}")
    result = runs.read_json(path)
    if script == "evaluate":
        summary = runs.read_json(folder / "summary.json", "method", "seed", "training")
        method, seed, training = summary["method"], summary["seed"], [Path(p).resolve() for p in summary["training"]]
        identity = training[0] if training else (model, adapter, endpoint, method, seed)
        items = read_items(folder / "items.jsonl")
        return [Run(folder, method, seed, model, identity, read_figures(path, result), items, summary, training)]
    method = home.name.removesuffix(f"-{seed}")
    figures = [read_figures(path, result.get(end, {})) for end in ("before", "after")]
    before, after = (read_items(folder / name) for name in ("before.json", "after.json"))
    untrained = Run(folder, f"before {method}", seed, model, (model, adapter, method), figures[0], before)
    return [untrained, Run(folder, method, seed, model, home, figures[1], after, training=[home])]


def by_method(found: list[Run]) -> dict[str, list[Run]]:
    """{method: runs}, each model once, for it is one seed however often measured: a suite's figures are those of an
    evaluation, else the training run's own. Remarks name the suites left out."""
    kept, methods = {}, {}
    for run in sorted(found, key=lambda run: not run.summary):
        first = kept.setdefault(run.identity, replace(run, figures={}, items={}))
        if twice := [suite for suite in run.figures if suite in first.figures]:
            run.remark = f"left out, as {first.folder} measured the same model: {', '.join(twice)}"
        first.figures |= {suite: row for suite, row in run.figures.items() if suite not in twice}
        first.items |= {key: item for key, item in run.items.items() if item["suite"] not in twice}
    for identity in dict.fromkeys(run.identity for run in found if kept[run.identity].figures):
        name = kept[identity].method
        if kept[identity].seed is None and name in methods:  # another model of that name, not another seed
            name += f" ({kept[identity].folder})"
        methods.setdefault(name, []).append(kept[identity])
    return methods


def rows_of(group: list[Run], suite: str) -> dict[int, dict]:
    """{seed: row} of a method's runs with a value in a suite; those without a seed are numbered after the others."""
    rows = [(run.seed, run.figures[suite]) for run in group if run.figures.get(suite, {}).get("value") is not None]
    seeds = [seed for seed, _ in rows]
    return {10**6 + i if seed is None or seed in seeds[:i] else seed: row for i, (seed, row) in enumerate(rows)}


def figure(group: list[Run], suite: str) -> dict | None:
    """A method's figure in a suite: over seeds where there are several, else over the items of its one run."""
    rows = list(rows_of(group, suite).values())
    if not rows:
        return None
    bounds = {name: scores.mean(row[name] for row in rows) for name in ("low", "high", "best", "worst")}
    points = [row["value"] for row in rows]
    value, half = scores.t_interval(points)
    if half:  # seeds that agree exactly are luck, not certainty: then the interval is that over items
        bounds |= {"low": max(0, value - half), "high": min(1, value + half)}
    return {"value": value, "points": points, **bounds}


def over_seeds(a: dict[int, dict], b: dict[int, dict]) -> dict:
    """The difference b - a of {seed: row} by a t test, paired where the seeds are the same, else Welch's. `a` may be
    one run: then its error is that of its interval over items, taken as known."""
    first, second = ({seed: row["value"] for seed, row in rows.items()} for rows in (a, b))
    same = first.keys() == second.keys()
    samples = [[second[seed] - first[seed] for seed in first]] if same else [[*first.values()], [*second.values()]]
    errors = [(np.var(sample, ddof=1).item() / len(sample), len(sample) - 1) for sample in samples if len(sample) > 1]
    errors += [(((row["high"] - row["low"]) / (2 * scores.Z)) ** 2, math.inf) for row in a.values() if len(a) == 1]
    gap, square = scores.mean(second.values()) - scores.mean(first.values()), sum(error for error, _ in errors)
    shares = sum(error**2 / df for error, df in errors)
    df = square**2 / shares if shares else math.inf
    half = float(scores.stats().t.ppf(1 - scores.ALPHA / 2, df)) * math.sqrt(square)
    p = float(2 * scores.stats().t.sf(abs(gap) / math.sqrt(square), df)) if square else float(gap == 0)
    test = "t over seeds, paired" if same else "t over seeds, Welch's"
    return {"difference": gap, "low": gap - half, "high": gap + half, "p": p, "test": test}


def paired(first: Run, second: Run) -> dict[str, dict]:
    """{suite: paired comparison} on the items of both. Raises UserError where an id means another item in each."""
    shared = {key: item for key, item in first.items.items() if key in second.items and item["suite"] != scores.OWN}
    if problem := scores.mismatch(shared, second.items):
        raise runs.UserError(f"{first.folder} and {second.folder}: {problem}")
    rows = {suite: row for suite, row in scores.compare(shared, second.items).items() if row["n"]}
    tests = {suite: row["test"] if row["p"] == row["careful_p"] else scores.BOOTSTRAP for suite, row in rows.items()}
    return {suite: {**row, "p": row["careful_p"], "test": tests[suite]} for suite, row in rows.items()}


def differences(methods: dict[str, list[Run]], suites: dict) -> dict[tuple[str, str], dict]:
    """{(method, suite): difference from the first method}, over seeds or paired, each with Holm's p over all."""
    (_, first), *others = methods.items()
    found = {}
    for name, group in others:
        pairs = paired(first[0], group[0]) if len(first) == len(group) == 1 else {}
        for suite in suites:
            a, b = rows_of(first, suite), rows_of(group, suite)
            if row := over_seeds(a, b) if a and len(b) > 1 else pairs.get(suite):
                found[name, suite] = row
    adjusted = scores.holm({cell: row["p"] for cell, row in found.items()})
    return {cell: {**row, "holm": adjusted[cell]} for cell, row in found.items()}


def axes_of(width: float, height: float):
    """Axes of a new chart, in inches; the page draws it as wide as its card."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained").add_subplot(frame_on=False)


def as_svg(axes, salt: str) -> Markup:
    """A chart as an element of the page: colours become those of report.css; the salt sets its ids apart."""
    from matplotlib import rcParams

    rcParams["svg.hashsalt"], file = salt, io.StringIO()
    axes.figure.savefig(file, format="svg", transparent=True)
    text = re.sub(r'(?s)<metadata>.*?</metadata>|(?<=<g) id="[^"]*"| xmlns(?::xlink)?="[^"]*"', "", file.getvalue())
    for colour, name in THEME.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text[text.index("<svg") :])


def forest(methods: dict[str, list[Run]], suite: str) -> Markup:
    """A line a method: interval as a bar, value as a dot, seeds as ticks, best and worst case dotted."""
    rows = {name: row for name, group in methods.items() if (row := figure(group, suite))}
    axes = axes_of(4.4, 0.4 + 0.26 * len(rows))
    for y, (name, row) in enumerate(rows.items()):
        colour, points = f"C{list(methods).index(name)}", [100 * value for value in row["points"]]
        axes.plot([100 * row["best"], 100 * row["worst"]], [y, y], ":", color=colour)
        axes.plot(
            [100 * row["low"], 100 * row["high"]], [y, y], color=colour, linewidth=8, alpha=0.35, solid_capstyle="butt"
        )
        axes.plot(points, [y] * len(points), "|", color=colour, markersize=11)
        axes.plot(100 * row["value"], y, "o", color=colour)
    names = [name if len(name) < 23 else f"{name[:11]}…{name[-10:]}" for name in rows]
    axes.set_yticks(range(len(rows)), map(printable, names), color=INK)
    axes.set(xlim=(-2, 102), ylim=(len(rows) - 0.4, -0.6))
    return as_svg(axes, f"forest {printable(suite)}")


def training_runs(methods: dict[str, list[Run]], found: list[Run]) -> dict[str, dict[Path, tuple]]:
    """{script: {folder: (number of its method, lines of metrics.jsonl)}} of the training runs behind the models."""
    numbers, scripts = {name: number for number, name in enumerate(methods)}, {}
    for run in found:
        for folder in [folder for folder in run.training if (folder / "metrics.jsonl").is_file()]:
            lines = runs.stored(folder / "metrics.jsonl", operator.itemgetter("step")).values()
            script = runs.read_json(folder / "config.json", "script")["script"]
            number = numbers.get(run.method, len(numbers))
            scripts.setdefault(script, {}).setdefault(folder, (number, lines))
    return scripts


def curve(script: str, folders: dict[Path, tuple], name: str, share: bool) -> Markup | None:
    """An entry of metrics.jsonl, a line a training run; a share is drawn from 0 to 1."""
    axes = axes_of(4.4, 1.9)
    for number, lines in folders.values():
        if points := [(line["step"], line[name]) for line in lines if line.get(name) is not None]:
            axes.plot(*np.transpose(points), "-" if len(points) > 1 else "o", color=f"C{number}")
    axes.set(xlabel="step", ylim=(-0.02, 1.02) if share else None)
    return as_svg(axes, f"{printable(script)} {name}") if axes.lines else None


def printable(value) -> str | Markup:
    """What a value is on the page: a sign for each character that drives a terminal, hides or reorders text."""
    return value if isinstance(value, Markup) else "–" if value is None else scores.printable(str(value))


def examples(methods: dict[str, list[Run]], suites: dict) -> list[dict[str, dict]]:
    """Of each suite three items, {method: item}, those first that are a hit in one method and a miss in another."""
    tables, found = {name: group[0].items for name, group in methods.items()}, []
    for suite in suites:
        keys = dict.fromkeys(k for table in tables.values() for k, item in table.items() if item["suite"] == suite)
        groups = [{name: table[key] for name, table in tables.items() if key in table} for key in keys]
        groups.sort(key=lambda items: not {True, False} <= {scores.outcome(item)[0] for item in items.values()})
        found += groups[:3]
    return found


def write(folders: list[Path], out: Path) -> Path:
    """report.html in `out`; its path. Raises UserError."""
    found = [run for folder in folders for run in read_run(folder)]
    methods = by_method(found)
    if not methods:
        raise runs.UserError("none of these folders holds figures of a suite")
    metrics = {name: row["metric"] for group in methods.values() for run in group for name, row in run.figures.items()}
    suites = {name: metrics[name] for wanted in scores.VALUES for name in metrics if metrics[name] == wanted}
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, finalize=printable, undefined=StrictUndefined)
    page.globals |= {f.__name__: f for f in (figure, rows_of, forest, curve)}
    known = {"found": found, "methods": methods, "suites": suites, "differences": differences(methods, suites)}
    known |= {"training": training_runs(methods, found), "examples": examples(methods, suites), "scores": scores}
    try:
        from matplotlib import rc_context
    except ImportError:
        rc_context = None  # the page says what is missing
    with rc_context(STYLE) if rc_context else contextlib.nullcontext():
        text = page.get_template("report.html.jinja").render(known, charts=rc_context)
    runs.write_atomic(out / "report.html", text.lstrip().encode("utf-8"))
    return out / "report.html"

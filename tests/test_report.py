"""The report: figures as in the folders, hostile text inert, no script, no address, nothing from a network."""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import report
import runs
import scores
from tests.evaluations import BASE, GOOD, SUITES, evaluation, refused, training, write_files

HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=alert(1)><svg onload=alert(1)></pre></details></text></svg><iframe src='https://example.org/'>",
    "'\" onmouseover='alert(1)' style='background:url(https://example.org/a)' =HYPERLINK(\"https://example.org\")",
    "null \x00 bell \x07 escape \x1b[2J override \u202e zero\u200bwidth, lone surrogate \ud800",
    "<style>*{display:none}</style><meta http-equiv=refresh content='0;url=https://example.org'>-->]]><metadata>",
    "$\\frac{$ {braces} %s {{ 7 * 7 }} {% raw %}" + "_" * 400,
]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ALLOWED = "html head meta title style body header nav main section div figure figcaption svg defs g path use clipPath"
ALLOWED += " rect text p span i b em small a h1 h2 h3 h4 table thead tbody tr th td details summary pre ul li br code"
TAG = re.compile(r'<(/?)([a-zA-Z0-9]+)((?:\s+[a-zA-Z:-]+(?:="[^"<>]*")?)*)\s*(/?)>')


def check_inert(page: str) -> str:
    """The text that a page shows, in which there is no < of any but our own harmless elements."""
    assert page.startswith("<!doctype html>") and "default-src 'none'; style-src 'unsafe-inline';" in page
    tags, rest = TAG.findall(page), TAG.sub("", page.removeprefix("<!doctype html>"))
    assert "<" not in rest and {name for _, name, *_ in tags} <= set(ALLOWED.split())
    attributes = [pair for tag in tags for pair in re.findall(r'([a-zA-Z:-]+)="([^"]*)"', tag[2])]
    for name, value in attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action", "formaction", "data")
        assert "href" not in name or re.fullmatch("#[a-z][a-z0-9]*", value)
        assert "url(" not in value or re.fullmatch(r"url\(#p[0-9a-f]+\)", value)
    opened = [name for close, name, _, empty in tags if not (close or empty or name in ("meta", "br"))]
    assert sorted(opened) == sorted(name for close, name, *_ in tags if close)
    assert not re.search(r"url\(|@import|//", "".join(re.findall("<style.*?</style>", page, re.DOTALL)))
    assert not set(page) & {chr(c) for c in (*range(9), 11, 12, 27, 0x202E, 0x200B)}
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    return html.unescape(rest)


def write(folders, out) -> str:
    return report.write(list(folders), out).read_text(encoding="utf-8")


def methods_of(folders) -> dict:
    return report.by_method([run for folder in folders for run in report.read_run(folder)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    trained = [training(root / f"t-{seed}", seed, "train_rl") for seed in range(3)]
    ours = [evaluation(root / f"o{s}", "ours", s, GOOD, training=[trained[s]]) for s in range(3)]
    return [evaluation(root / "base", "base", None, BASE), *ours]


@pytest.fixture(scope="module")
def text(folders, tmp_path_factory):
    return write(folders, tmp_path_factory.mktemp("out"))


def test_the_page_is_inert_whole_the_same_again_and_its_texts_are_closed(folders, text, tmp_path):
    check_inert(text)
    sections = "table intervals differences verification training lengths settings"
    assert re.findall('<a href="#(.*?)"', text) == [*sections.split(), "texts", "limits"]
    assert "Caution" in text and "3 seeds" in text and text.count("<svg") == len(BASE) + 4
    assert write(folders, tmp_path) == text and (tmp_path / "report.html").stat().st_mode & 0o777 == 0o600
    before, _, after = text.partition('id="texts"')  # every text lies within a closed details element
    outside = re.sub(r"<details><summary>(?:(?!<details).)*?</details>", "", after, flags=re.DOTALL)  # the inner ones
    outside = re.sub(r"<details><summary>.*?</details>", "", outside, flags=re.DOTALL)
    assert "<pre>" in after and "<pre>" not in before + outside


def test_figures_and_differences_are_those_of_the_folders(folders, text):
    values = [runs.read_json(folder / "result.json")["pocket:plain"]["value"] for folder in folders]
    mean, half = scores.t_interval(values[1:])
    assert f"<b>{100 * values[0]:.1f}</b>" in text and " ".join(f"{100 * v:.1f}" for v in values[1:]) in text
    assert f"<b>{100 * mean:.1f}</b>" in text and f"{100 * min(1, mean + half):.1f}</small>" in text
    assert 'class="star"' in text and "not distinguishable at this n" in text and "t over seeds, Welch" in text
    methods = methods_of(folders)
    several = report.differences(methods, SUITES)
    assert several["ours", "pocket:plain"]["holm"] < 0.05 < several["ours", "pocket:sums"]["holm"]
    assert not report.differences(dict(reversed(methods.items())), SUITES)
    row = report.differences({"base": methods["base"], "ours": methods["ours"][:1]}, SUITES)["ours", "pocket:plain"]
    assert row["p"] == row["careful_p"] and row["test"] in (scores.MCNEMAR, scores.BOOTSTRAP)


def test_several_seeds_a_side_are_tested_as_scipy_does():
    first, second = {0: 0.5, 1: 0.6, 2: 0.52}, {0: 0.7, 1: 0.72, 2: 0.8}
    for other, test in ((second, "paired"), ({s + 5: v for s, v in second.items()}, "Welch")):
        rows = [{s: {"value": v} for s, v in side.items()} for side in (first, other)]
        row = report.over_seeds(*rows)
        values = [*second.values()], [*first.values()]
        p = stats.ttest_rel(*values) if test == "paired" else stats.ttest_ind(*values, equal_var=False)
        assert row["p"] == pytest.approx(p.pvalue) and test in row["test"]
    row = {"value": 0.0, "low": 0.0, "high": 0.16, "best": 0.0, "worst": 0.0}  # agreement is no certainty
    found = report.figure([report.Run(Path(), "m", seed, "", seed, {"x": row}, {}) for seed in range(2)], "x")
    assert found["points"] == [0, 0] and (found["low"], found["high"]) == (0, 0.16)


@pytest.mark.parametrize("seeds", [2, 5])
def test_a_reference_of_one_run_is_not_taken_as_certain(seeds):
    """Equal methods: at most about one comparison in twenty may say otherwise."""
    hits_TR, found = np.random.default_rng(seeds).binomial(256, 0.5, (400, seeds + 1)).tolist(), 0
    for hits in hits_TR:
        rows = [dict(zip(("value", "low", "high"), (h / 256, *scores.wilson(h, 256)), strict=True)) for h in hits]
        found += report.over_seeds({10**6: rows[0]}, dict(enumerate(rows[1:])))["p"] < 0.05
    assert 0.01 < found / 400 < 0.08


def test_one_model_is_one_seed_however_often_it_was_measured(tmp_path):
    """The first evaluation's figures count, before another's and the training run's own."""
    trained, suites = training(tmp_path / "SFT-0", 0), {"pocket:plain": 0.1, "pocket:sums": 0.9}
    first = evaluation(tmp_path / "E1", "SFT", 0, {"pocket:plain": 0.5}, training=[trained])
    again = evaluation(tmp_path / "E2", "SFT", 0, suites, training=[trained])
    (run,) = methods_of([trained, first, again])["SFT"]
    value = runs.read_json(first / "result.json")["pocket:plain"]["value"]
    assert report.figure([run], "pocket:plain")["points"] == [value]
    assert run.figures.keys() == suites.keys() == {item["suite"] for item in run.items.values()}
    text = write([trained, first, again], tmp_path / "out")
    assert text.count("measured the same model: pocket:plain") == 2 and "seeds</small>" not in text
    assert len(methods_of([training(tmp_path / f"RL-{s}", s) for s in range(3)])["before RL"]) == 1
    two = [evaluation(tmp_path / name, "merged", None, suites, model=f"{name}/merged") for name in ("a", "b")]
    assert [*methods_of(two)] == ["merged", f"merged ({tmp_path / 'b'})"]  # two models, not two seeds


@pytest.mark.parametrize("evil", HOSTILE)
def test_hostile_text_is_inert_wherever_it_stands(tmp_path, monkeypatch, evil):
    name = evil.replace("\ud800", "")  # our JSON holds no half of a pair
    monkeypatch.setitem(SUITES, f"own:{name}", "asr")
    rates, trained = {f"own:{name}": 0.5, "pocket:verify": 0.5}, training(tmp_path / "t", 0)
    one = evaluation(tmp_path / "a", name, 0, rates, n=20, text=evil, training=[trained], model=name)
    other = evaluation(tmp_path / "b", "b", 0, {"pocket:verify": 0.5}, n=20, text=evil)
    assert report.printable(evil) in check_inert(write([one, other], tmp_path / "out"))


def test_a_training_run_alone_is_enough_and_one_without_suites_is_drawn(folders, tmp_path):
    text = write([training(tmp_path / "mine-3", 3)], tmp_path / "out")
    assert "before mine" in check_inert(text) and "training loss" in text and "sampler and trainer" not in text
    (training(tmp_path / "bare-0", 0) / "result.json").write_text("{}")
    assert "training loss" in write([folders[0], tmp_path / "bare-0"], tmp_path / "out")
    (tmp_path / "bare-0" / "metrics.jsonl").write_text('{"loss": 1}\n')
    refused("metrics.jsonl, line 1: no record of ours", write, [folders[0], tmp_path / "bare-0"], tmp_path / "out")


@pytest.mark.parametrize("model", ["deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "pocket/base", "x-14B"])
def test_published_figures_stand_beside_the_same_model_only(tmp_path, monkeypatch, model):
    monkeypatch.setitem(SUITES, "strongreject", "asr")
    text = write([evaluation(tmp_path / "a", "m", None, {"strongreject": 0.4}, n=8, model=model)], tmp_path / "out")
    assert ("second-hand" in text) == ("<em>41.2</em>" in text) == model.startswith("deepseek-ai")


def test_without_matplotlib_the_page_says_what_to_install_and_long_answers_are_cut(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write([evaluation(tmp_path / "a", "m", 0, BASE, n=1, text="x" * 10**6)], tmp_path / "out")
    assert "pip install -r requirements-extra.txt" in text and "<svg" not in text
    assert len(text) < 200_000 and "characters left out" in text


CASES = [
    ("", {}, "config.json cannot be read"),
    ("", {"config": {"architectures": ["Qwen2"]}}, "config.json has no script, values"),
    ("make_data", {}, "a run of make_data"),
    ("evaluate", {"result": {}, "summary": {}}, "summary.json has no method"),
    ("train_sft", {"result": {}}, "none of these folders holds figures"),
    ("train_sft", {}, "x is not finished: .* go on with --resume"),
    ("train_sft", {"result": {"after": {"s": 1}}}, "json, s: not the figures"),
    ("train_sft", {"result": {"after": {"s": {}}}}, "json, s: not the figures"),
]


@pytest.mark.parametrize(("script", "files", "message"), CASES)
def test_folders_that_are_no_runs_are_named(tmp_path, script, files, message):
    files = ({"config": {"script": script, "values": {}}} if script else {}) | files
    refused(message, report.write, [write_files(tmp_path / "x", files)], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("scheme", [(), ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")])
def test_a_browser_shows_it(tmp_path, scheme):
    """Rendered from disk: the title is ours, no script of an answer ran, the picture is not blank, dark is dark."""
    Image, text = pytest.importorskip("PIL.Image"), HOSTILE[0] + HOSTILE[1]
    write([evaluation(tmp_path / str(i), name, 0, GOOD, text=text) for i, name in enumerate(("m", text))], tmp_path)
    page, picture = (tmp_path / "report.html").as_uri(), tmp_path / "shot.png"
    flags = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'p'}", *scheme]
    for action in (["--window-size=1400,2000", f"--screenshot={picture}"], ["--dump-dom"]):
        done = subprocess.run([*flags, *action, page], check=True, capture_output=True, timeout=300)
    pixels = Image.open(picture).convert("RGB")
    corner = pixels.getpixel((2, 1000))
    assert len(pixels.getcolors(1 << 24)) > 200 and (max(corner) < 60 if scheme else min(corner) > 220)
    assert b"<title>Safety evaluation</title>" in done.stdout

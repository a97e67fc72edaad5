"""The report: figures as in the folders, hostile text inert, no script, no address, nothing from a network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

import report
import runs
import scores
from tests import evaluations

HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=alert(1)><svg onload=alert(1)>",
    "</pre></details><iframe src='https://example.org/'></iframe>",
    "'\" onmouseover='alert(1)' style='background:url(https://example.org/a)'",
    "<|im_end|><｜User｜></think>",
    '=HYPERLINK("https://example.org","click")',
    "null \x00 bell \x07 escape \x1b[2J override \u202e zero\u200bwidth",
    "lone surrogate \ud800 here",
    "<style>*{display:none}</style><meta http-equiv=refresh content='0;url=https://example.org'>",
    "$\\frac{$ {braces} %s",
]


class Page(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append(name)
        self.attributes += attributes
        if name not in ("meta", "br"):
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append(name)
        self.attributes += attributes

    def handle_endtag(self, name):
        assert self.open.pop() == name, f"</{name}> closes nothing"

    def handle_data(self, text):
        self.texts.append(text)


def write(folders, out):
    path = report.write(list(folders), out)
    assert path.stat().st_mode & 0o777 == 0o600
    return path.read_text(encoding="utf-8")


def check_inert(text: str) -> Page:
    page = Page(text)
    assert not page.open
    allowed = (
        "html head meta title style body header nav main section div figure svg text line rect circle polyline path p "
    )
    allowed += "span i b em small a h1 h2 h3 h4 h5 table thead tbody tr th td details summary pre ul li br"
    assert set(page.elements) <= set(allowed.split())
    for name, value in page.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "xlink:href", "action", "formaction", "data")
        assert name != "href" or re.fullmatch("#[a-z]+", value)
        assert name != "style" or re.fullmatch(r"(--g|width):[\d.]+%", value), value
    policy = next(value for name, value in page.attributes if name == "content")
    assert "default-src 'none'" in policy and "script-src" not in policy and "unsafe-eval" not in policy
    assert "url(" not in re.search("<style>(.*?)</style>", text, re.DOTALL)[1] and "@import" not in text
    assert not set(text) & {chr(c) for c in (*range(9), 11, 12, 27, 0x202E, 0x200B)}
    return page


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    trained = [
        evaluations.training(root / f"t{seed}", seed, script) for seed, script in ((0, "train_sft"), (1, "train_rl"))
    ]
    base = evaluations.evaluation(root / "base", "base", None, evaluations.BASE)
    ours = [
        evaluations.evaluation(root / f"ours-{seed}", "ours", seed, evaluations.GOOD, training=trained)
        for seed in range(3)
    ]
    return [base, *ours]


@pytest.fixture(scope="module")
def text(folders, tmp_path_factory):
    selftest = evaluations.selftest(tmp_path_factory.mktemp("selftest") / "st", "wildguard")
    return write([*folders, selftest], tmp_path_factory.mktemp("out"))


def test_the_page_is_inert_and_whole(text):
    page = check_inert(text)
    shown = " ".join(page.texts)
    for title, _ in report.SECTIONS.values():
        assert title in shown
    assert "Caution" in shown and "3 seeds" in shown


def test_texts_are_closed_until_opened(text):
    """Every preformatted text lies within a details element that is not open."""
    depth = 0
    for token in re.findall(r"<details[^>]*>|</details>|<pre>", text):
        if token == "<pre>":
            assert depth > 0
        else:
            depth += 1 if token.startswith("<details") else -1
    texts = text[text.index('id="texts"') :]
    assert "<details open" not in texts


def test_figures_are_those_of_the_folders(folders, text):
    row = json.loads((folders[0] / "result.json").read_text())["pocket:plain"]
    assert f"<b>{100 * row['value']:.1f}</b>" in text
    values = [json.loads((f / "result.json").read_text())["pocket:plain"]["value"] for f in folders[1:]]
    mean, half = scores.t_interval(values)
    assert f"<b>{100 * mean:.1f}</b>" in text and f"{100 * min(1, mean + half):.1f}</small>" in text
    assert " ".join(f"{100 * v:.1f}" for v in values) in text


def test_a_plain_difference_is_starred_and_none_is_named(text):
    assert "class=star" in text and "not distinguishable at this n" in text


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_text_is_inert(tmp_path, number):
    evil = HOSTILE[number]
    trained = evaluations.training(tmp_path / "t", 0)
    run = evaluations.evaluation(tmp_path / "a", evil, 0, {"pocket:plain": 0.5, "pocket:verify": 0.5}, n=20, text=evil,
                                 training=[trained], model=evil)  # fmt: skip
    other = evaluations.evaluation(tmp_path / "b", "b", 0, {"pocket:plain": 0.1, "pocket:verify": 0.5}, n=20, text=evil)
    selftests = report.read_selftests([run, evaluations.selftest(tmp_path / "st", evil)])
    page = check_inert(report.page([*report.read_run(run), *report.read_run(other)], selftests))
    assert report.visible(evil) in "".join(page.texts)


def test_hostile_names_are_drawn(tmp_path):
    names = [*HOSTILE, "$x^{2"]
    made = [
        evaluations.evaluation(tmp_path / str(i), evil, 0, {"pocket:plain": 0.5}, n=4) for i, evil in enumerate(names)
    ]
    write(made, tmp_path / "out")
    assert (tmp_path / "out" / "intervals.png").stat().st_size > 1000


def test_a_suite_named_by_a_file_is_text_too(tmp_path, monkeypatch):
    evil = "own:<script>x</script>"
    monkeypatch.setitem(evaluations.SUITES, evil, "asr")
    run = evaluations.evaluation(tmp_path / "a", "m", 0, {evil: 0.5}, n=8)
    check_inert(write([run], tmp_path / "out"))


def test_long_answers_are_cut(tmp_path):
    run = evaluations.evaluation(tmp_path / "a", "m", 0, {"pocket:plain": 0.5}, n=1, text="x" * 10_000_000)
    text = report.page(report.read_run(run))
    assert len(text) < 300_000 and "characters left out" in text


def test_a_training_run_alone_makes_a_report(tmp_path):
    text = write([evaluations.training(tmp_path / "mine-3", 3)], tmp_path / "out")
    page = check_inert(text)
    shown = " ".join(page.texts)
    assert "before mine" in shown and "training loss" in shown and "sampler and trainer" not in shown
    assert (tmp_path / "out" / "intervals.png").stat().st_size > 1000 and (tmp_path / "out" / "curves.png").exists()


@pytest.mark.parametrize(
    ("model", "published"),
    [("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", True), ("pocket/base", False), ("x-14B", False)],
)
def test_published_figures_stand_beside_the_same_model_only(tmp_path, monkeypatch, model, published):
    monkeypatch.setitem(evaluations.SUITES, "strongreject", "asr")
    run = evaluations.evaluation(tmp_path / "a", "base", None, {"strongreject": 0.4}, n=8, model=model)
    text = write([run], tmp_path / "out")
    assert ("second-hand" in text) == published and ("<em>41.2</em>" in text) == published


def test_without_matplotlib_the_page_is_there_and_says_what_is_missing(tmp_path, monkeypatch, capsys, folders):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write(folders[:1], tmp_path / "out")
    assert "requirements-extra.txt" in capsys.readouterr().out and not list((tmp_path / "out").glob("*.png"))


def test_a_self_test_alone_is_no_report(tmp_path):
    with pytest.raises(runs.UserError, match="none of these folders holds figures"):
        report.write([evaluations.selftest(tmp_path / "st", "wildguard")], tmp_path / "out")


def test_folders_that_are_no_runs_are_named(tmp_path):
    with pytest.raises(runs.UserError, match="nothing"):
        report.write([tmp_path / "nothing"], tmp_path / "out")
    (tmp_path / "config.json").write_text('{"script": "make_data", "values": {}}')
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(runs.UserError, match="make_data"):
        report.write([tmp_path], tmp_path / "out")


def test_one_seed_a_side_is_paired_and_several_are_tested_over_seeds(folders):
    found = [run for folder in folders for run in report.read_run(folder)]
    methods = report.by_method(found)
    several = report.family(methods)
    assert several["ours", "pocket:plain"] < 0.05 and several["ours", "pocket:sums"] > 0.05
    single = {"base": methods["base"], "ours": methods["ours"][:1]}
    pairs = report.paired(single["base"], single["ours"])
    p = report.p_value(single["base"], single["ours"], "pocket:plain", pairs)
    assert p == pairs["pocket:plain"]["careful_p"] >= pairs["pocket:plain"]["p"]
    mixed = {"base": methods["ours"], "ours": methods["base"]}
    assert report.p_value(mixed["base"], mixed["ours"], "pocket:plain", {}) is None


def test_a_training_run_that_measured_nothing_is_drawn_beside_an_evaluation(folders, tmp_path):
    bare = evaluations.training(tmp_path / "bare-0", 0)
    (bare / "result.json").write_text("{}")
    assert "training loss" in write([folders[0], bare], tmp_path / "out")
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("seeds", [2, 5])
def test_a_reference_of_one_run_is_not_taken_as_certain(seeds):
    """Equal methods: at most about one comparison in twenty may say otherwise."""
    rng, found = np.random.default_rng(seeds), 0

    def run(seed):
        hits = rng.binomial(256, 0.5)
        low, high = scores.wilson(hits, 256)
        return report.Run(None, "m", seed, "m", {"s": {"value": hits / 256, "low": low, "high": high}})

    for _ in range(400):
        found += report.p_value([run(None)], [run(seed) for seed in range(seeds)], "s", {}) < 0.05
    assert 0.01 < found / 400 < 0.08


def test_seeds_that_agree_exactly_are_no_certainty(tmp_path):
    same = [evaluations.evaluation(tmp_path / str(s), "m", s, {"pocket:plain": 0.0}, n=20) for s in range(2)]
    methods = report.by_method([run for folder in same for run in report.read_run(folder)])
    f = report.figure(methods["m"], "pocket:plain")
    assert f.value == 0 and f.high > 0.05


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("scheme", [(), ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")])
def test_a_browser_shows_it(tmp_path, scheme):
    """Rendered from disk: the title is ours, no script of an answer ran, the picture is not blank, dark is dark."""
    from PIL import Image

    text = HOSTILE[0] + HOSTILE[1]
    evil = [evaluations.evaluation(tmp_path / name, name, 0, evaluations.GOOD, text=text) for name in ("evil", "worse")]
    write(evil, tmp_path / "out")
    page, picture = (tmp_path / "out" / "report.html").as_uri(), tmp_path / "shot.png"
    flags = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        *scheme,
    ]
    size = "--window-size=1400,2000"
    subprocess.run([*flags, size, f"--screenshot={picture}", page], check=True, capture_output=True, timeout=300)
    pixels = Image.open(picture).convert("RGB")
    corner = pixels.getpixel((2, 1000))
    assert len(pixels.getcolors(1 << 24)) > 200 and (max(corner) < 60 if scheme else min(corner) > 220)
    dumped = subprocess.run([*flags, "--dump-dom", page], check=True, capture_output=True, timeout=300).stdout.decode()
    assert "<title>Safety evaluation</title>" in dumped

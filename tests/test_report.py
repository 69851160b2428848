"""Pages of results: whole in one file, without errors in a browser; a click on a column's head sorts its table."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

import tiny
import train
from apc.compare import tables as comparison
from apc.compare.finished import find_runs
from apc.config.load import load_config
from apc.report.charts import layer_charts
from apc.report.page import Section, page, run_page
from apc.sparse.policies import facts

pytestmark = pytest.mark.report
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


DRAWN = """setTimeout(() => {
  document.title = "drawn " + document.querySelectorAll("[data-root-id] > *").length;
}, 2000);"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("report"))
    for name, k in (("six", 6), ("four", 4)):
        changes = {"policies": "[dense,oracle,predicted]", "monitor.windows": 0, "run.name": name, "cluster.k": k}
        train.train(load_config(None, tiny.tiny_overrides(folder, **changes)))
    comparison.main([f"compare={folder}/runs/*", f"out={folder}/comparison"])
    return folder


def pages(folder):
    return [folder / "runs" / "six" / "report.html", folder / "comparison" / "comparison.html"]


def opened(path, script=""):
    """The document after its scripts have run, with another script at its end, and what the console said."""
    copy = path.with_name("copy.html")
    copy.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    words += ["--dump-dom", copy.as_uri()]
    done = subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line and "log level" not in line]


def cells(path, column):
    """The cells of a column of the first table."""
    table = re.search("<tbody>.*?</tbody>", path if isinstance(path, str) else path.read_text(), re.S)[0]
    rows = re.findall("<tr>(.*?)</tr>", table, re.S)
    return [html.unescape(re.findall("<td[^>]*>(.*?)</td>", row, re.S)[column]) for row in rows]


def test_it_shows_what_results_json_holds(folder):
    results = json.loads((folder / "runs" / "six" / "results.json").read_text())
    path = pages(folder)[0]
    assert cells(path, 0) == [record["policy"] for record in results["policies"]]
    assert cells(path, 6)[2] == f"{results['policies'][2]['perplexity']:.1f}"
    text = html.unescape(path.read_text())
    assert "cluster.k=6" in text and "run.name=six-again" in text and "held-out" in text
    assert text.count('src="data:image/png;base64,') == len(list((folder / "runs" / "six" / "figures").glob("*.png")))


def test_a_comparison_shows_the_policies_of_all_runs(folder):
    path = pages(folder)[1]
    assert set(cells(path, 0)) == {"2 runs", "four", "six"} and set(cells(path, 3)) == {"dense", "oracle", "predicted"}
    assert "run.name=four-again" in path.read_text()


def test_a_comparison_has_a_line_over_the_layers_for_each_policy_of_each_run(folder):
    assert "<h2>Layers</h2>" in pages(folder)[1].read_text()
    runs, _ = find_runs(f"{folder}/runs/*")
    records = [(run.name, record) for run in runs for record in run.policies.values()]
    for tab in layer_charts(records).tabs:
        measure = tab.title.replace(" ", "_")
        lines = {plot.glyph.line_color: plot.data_source.data for plot in tab.child.renderers[::2]}
        for policy in ("oracle", "predicted"):
            own = [record["per_layer"][measure] for _, record in records if record["policy"] == policy]
            shown = lines[facts(policy).color]
            assert np.allclose(shown["y"], 100 * np.array(own)) and shown["dash"] == ["solid", "dashed"]
    assert layer_charts([("old", {"policy": "oracle", "perplexity": 1.0})]) is None


def test_it_needs_no_network(folder):
    for path in pages(folder):
        text = re.sub("<script.*?</script>", "", path.read_text(), flags=re.S)
        assert not re.search(r"(src|href)=[\"']?(http|//)", text) and "@import" not in text
        assert not re.search(r"<script[^>]* src=", path.read_text())


def test_names_and_texts_are_escaped():
    results = {"conditions": {"model": "<b>x</b>"}, "policies": [], "warnings": ["<script>alert(1)</script>"]}
    text = run_page("<i>", results, "python train.py 'data.fit=<u>'")
    assert not any(tag in text for tag in ("<b>x", "<script>alert", "<i>", "<u>"))
    assert page("t", [], [], [Section("s", header=["a"], rows=[["<s>"]])]).count("&lt;s&gt;") == 1


@in_browser
def test_a_browser_opens_it_without_errors(folder):
    for path in pages(folder):
        document, console = opened(path, DRAWN)
        assert not console, console
        assert re.search("<title>drawn [1-9]", document)


@in_browser
def test_a_click_on_a_head_sorts(folder):
    path = pages(folder)[0]
    click = "document.querySelectorAll('th button')[6].click();"
    numbers = cells(path, 6)
    for script, reverse in ((click, False), (click + click, True)):
        document, console = opened(path, script)
        assert cells(document, 6) == sorted(numbers, key=lambda cell: float(cell.replace(",", "")), reverse=reverse)
        assert not console
    document, _ = opened(path, "document.querySelectorAll('th button')[0].click();")
    assert cells(document, 0) == sorted(cells(path, 0))

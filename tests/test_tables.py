"""Tables and figures show every policy, say what they hold under, and never hide a missing value."""

import copy
import itertools
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from apc.evaluate import figures, tables

LAYERS = 4
REASON = "no predictor in runs/x"
POINTS = ["perplexity", "perplexity_over_bytes"]  # the figures that need no layers


def make_policy(name: str, perplexity: float, ratio: float, **more) -> dict:
    shares = {"density": 0.5, "coverage": 0.7, "precision": 0.6, "captured_importance": 0.8, "captured_energy": 0.9}
    return {
        "policy": name,
        **shares,
        "captured_importance_first": 0.31,
        "captured_energy_first": 0.99,
        "perplexity": perplexity,
        "ratio": ratio,
        "ratio_low": ratio - 0.012,
        "ratio_high": ratio + 0.012,
        "bits": 6.0,
        "bytes_share": 0.53,
        "flops_share": 0.52,
        "excludes_finding": False,
        "masked": {key: value - 0.1 * (key != "density") for key, value in shares.items()},
        "per_layer": {key: [value + 0.01 * layer for layer in range(LAYERS)] for key, value in shares.items()},
        "missing": None,
        **more,
    }


@pytest.fixture
def results():
    return {
        "conditions": {
            "model": "SmolLM2-135M-Instruct",
            "fit": "bundled:fit",
            "score": "bundled:score",
            "split": "held-out",
            "fit_tokens": 20480,
            "score_tokens": 4096,
            "seq_len": 1024,
            "sites": ["neuron"],
            "sparsity": 0.5,
            "active": "threshold",
            "k": 64,
            "density": 0.5,
            "weighting": "energy",
            "scope": "layer",
            "predictor": "cluster 576→128→64, lookahead 0",
            "device": "cpu",
            "dtype": "float32",
            "commit": "abc1234",
        },
        "policies": [
            make_policy("dense", 21.97, 1.0, ratio_low=1.0, ratio_high=1.0, bits=0.0, bytes_share=1.0, flops_share=1.0),
            make_policy("random", 13402.0, 610.0, bits=None, masked=None),
            make_policy("oracle", 24.5, 1.115, excludes_finding=True),
            {"policy": "predicted", "missing": REASON},
        ],
        "cluster": {
            "history": [
                {"epoch": e, "captured": 0.6 + 0.02 * e, "empty": 3 - e, "changed": 0.4, "seconds": 1.2}
                for e in range(4)
            ],
            "sizes": {"neuron": [[40, 20, 4, 0]] * LAYERS},
        },
        "predictor": {
            "history": [{"step": 10 * s, "loss": 3.2 / s} for s in range(1, 6)],
            "per_layer": {"top1_neuron": [0.5] * LAYERS, "top5_neuron": [0.75] * LAYERS},
        },
        "seconds": {"collect": 41.0, "cluster": 30.2, "predict": 20.0, "evaluate": 70.1},
    }


def row(table: str, policy: str) -> list[str]:
    """The cells of a policy's row; "1.115 ± 0.012" is one cell."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"{policy} ")]
    return line.replace(" ± ", "±").split()


def grids(text: str) -> list[str]:
    """The blocks of a table between its conditions and its notes."""
    return text.strip().split("\n\n")[1:-1]


def test_every_policy_is_a_row_with_its_five_numbers(results):
    table = tables.policies_table(results)
    assert row(table, "dense") == ["dense", "50.0", "90.0", "21.97", "1.000", "100.0"]
    assert row(table, "oracle") == ["oracle", "50.0", "90.0", "24.50", "1.115±0.012", "53.0*"]
    assert row(table, "random")[3] == "13,402"


def test_wide_has_every_number(results):
    table = tables.policies_table(results, wide=True)
    shares = ["50.0", "70.0", "60.0", "80.0", "90.0"]
    assert row(table, "dense") == ["dense", *shares, "21.97", "1.000", "–", "0.0", "100.0", "100.0"]
    assert row(table, "oracle") == ["oracle", *shares, "24.50", "1.115±0.012", "–", "6.0", "53.0*", "52.0*"]
    assert row(table, "random")[9] == "–" and "--wide" not in table


def test_wide_says_what_each_stage_reads(results):
    results["policies"][1]["masked"] = {"read": {"gate": 0.65, "up": 0.5, "down": 0.354}}
    assert "65.0/50.0/35.4" in row(tables.policies_table(results, wide=True), results["policies"][1]["policy"])


@pytest.mark.parametrize("wide", [False, True], ids=["80", "wide"])
def test_a_missing_policy_is_dashes_and_its_reason(results, wide):
    table = tables.policies_table(results, wide=wide)
    assert row(table, "predicted") == ["predicted"] + ["–"] * (11 if wide else 5)
    assert f"– predicted: {REASON}" in table.splitlines()


@pytest.mark.parametrize("terminal", [80, 200])
def test_lines_have_at_most_80_characters(results, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(terminal))
    results["conditions"]["predictor"] = "neuron-predictor with a very long description " * 3
    results["speed"] = make_speed()
    results["speed"]["policies"] += [
        results["speed"]["policies"][0]
        | {"policy": "neuron-threshold", "seconds_per_token": 0.0001, "ratio": 15659.0, "ratio_low": 2605.0}
        | {"ratio_high": 94129.0, "times_dense": 1.3, "times_low": 1.01, "times_high": 12.4, "perplexity": 324042.0}
    ]
    results["policies"] += [make_policy(f"neuron-threshold{i}", 3e5, 13402.0, ratio_high=15402.0) for i in range(9)]
    shown = [tables.policies_table(results), tables.detail_table(results), tables.layer_table(results)]
    shown += [*tables.speed_tables(results), "\n".join(map(tables.policy_row, results["policies"][:3]))]
    for text in shown:
        assert max(map(len, text.splitlines())) <= 80
    density = [line for line in tables.layer_table(results).splitlines() if line.startswith("layer")]
    names = [name for line in density for name in line.split() if name.startswith("neuron")]
    assert sorted(names) == sorted(2 * [f"neuron-threshold{i}" for i in range(9)]), "each once for each measure"


def make_speed() -> dict:
    """As `apc.evaluate.speed.measure` returns it."""
    record = {"policy": "predicted", "seconds_per_token": 0.004, "seconds_low": 0.0039, "seconds_high": 0.005,
              "times_dense": 1.25, "times_low": 1.2, "times_high": 1.32, "perplexity": 24.0, "ratio": 1.1,
              "ratio_low": 1.0, "ratio_high": 1.2, "perplexity_masked": 25.0, "divergence": 0.25, "agreement": 0.9,
              "agrees_for": 12.5, "pays_up_to": 4, "bytes_held": 2e6, "text": ["word " * 60]}  # fmt: skip
    return {
        "prompt": 512,
        "windows": 8,
        "left_out": ["exact", "oracle"],
        "prompts": ["once " * 60],
        "policies": [record],
    }


def test_speed_in_80_columns_and_wide(results):
    assert tables.speed_tables(results) == []
    results["speed"] = make_speed()
    table, texts = tables.speed_tables(results)
    assert row(table, "predicted") == ["predicted", "250.0", "1.25±0.06", "24.00", "1.100±0.100", "0.250"]
    results["speed"]["policies"][0] |= {"times_dense": 0.23, "times_low": 0.02, "times_high": 0.5}
    table = " ".join(tables.speed_tables(results)[0].split())
    assert "0.23 ×÷ 11.5" in table and tables.WIDE_INTERVAL in table, "±0.24 would reach below zero"
    results["speed"] = make_speed()
    table, texts = tables.speed_tables(results)
    assert "– exact, oracle: no kernel on this device" in table and "512 tokens" in table
    assert texts.splitlines()[0].startswith("… once") and "\n  predicted: word" in texts
    wide = row(tables.speed_tables(results, wide=True)[0], "predicted")
    assert wide[2] == "4.000" and wide[5:] == ["1.100±0.100", "25.00", "0.250", "90.0", "12.5", "4", "2.0"]


def test_an_unclear_speed_up_is_a_dash_with_its_reason(results, tmp_path):
    results["speed"] = make_speed()
    (record,) = results["speed"]["policies"]
    figures.speed_figure(results, tmp_path / "clear.png")
    record |= {"times_dense": None, "times_low": 0.67, "times_high": 7.4, "unclear": "rounds gave 0.67 to 7.40 ×"}
    table = tables.speed_tables(results)[0]
    assert row(table, "predicted")[:3] == ["predicted", "250.0", "–"]
    assert "\n– predicted: rounds gave 0.67 to 7.40 ×\n" in table
    figures.speed_figure(results, tmp_path / "unclear.png")
    assert (tmp_path / "clear.png").read_bytes() != (tmp_path / "unclear.png").read_bytes()


def test_speed_of_older_results_has_no_range(results, tmp_path):
    results["speed"] = make_speed()
    for key in ("times_low", "times_high", "seconds_low", "seconds_high"):
        del results["speed"]["policies"][0][key]
    assert row(tables.speed_tables(results)[0], "predicted")[2] == "1.25" and "unclear" not in str(results)
    assert figures.speed_figure(results, tmp_path / "speed.png")


@pytest.mark.parametrize(
    ("ratio", "low", "high", "shown"),
    [
        (1.691, 1.661, 1.721, "1.691 ± 0.030"),
        (5.839, 4.752, 7.176, "5.839 ± 1.212"),
        (4494.6, 3558.7, 5676.6, "4,495 ± 1,059"),
        (15659.0, 2605.0, 94129.0, "15,659 ×÷ 6.01"),
        (2.0, 0.0001, 40000.0, "2.000 ×÷ 20,000"),
        (2.0, 0.0, 8.0, "2.000 ×÷ inf"),
        (1.5, 1.17, 1.92, "1.500 ± 0.375"),
        (1.5, 1.16, 1.94, "1.500 ×÷ 1.29"),
    ],
)
def test_an_interval_never_reaches_zero(ratio, low, high, shown, results):
    policy = make_policy("oracle", 30.0, ratio, ratio_low=low, ratio_high=high)
    assert tables.shown_ratio(policy) == shown
    results["policies"].append(policy)
    assert (tables.WIDE_INTERVAL in " ".join(tables.policies_table(results).split())) == ("×÷" in shown)


def test_too_few_windows_are_said_once_in_place_of_intervals(results):
    assert tables.NO_INTERVAL not in " ".join(tables.policies_table(results, wide=True).splitlines())
    for policy in results["policies"][:3]:
        policy |= {"ratio_low": None, "ratio_high": None}
    table = tables.policies_table(results)
    assert row(table, "oracle")[4] == "1.115" and "±" not in table.replace("ratio ± half", "")
    assert " ".join(table.split()).count(tables.NO_INTERVAL) == 1


def test_bars_of_wide_intervals_stay_positive(results, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure) or True)
    wide = make_policy("static", 30.0, 1.37, ratio_low=0.08, ratio_high=23.0)
    underflow = make_policy("soft", 30.0, 1.37, ratio_low=0.0, ratio_high=23.0)
    results["policies"] = [results["policies"][0], wide, underflow]
    assert figures.perplexity_figure(results, tmp_path / "perplexity.png")
    axes = drawn[0].axes[0]
    assert axes.get_xlim()[0] > 0 and axes.get_xscale() == "log"
    bars = [line.get_xdata() for line in axes.lines if line.get_marker() == "|"]
    assert sorted(len(bar) for bar in bars) == [0, 0, 2] and min(min(bar) for bar in bars if len(bar)) > 0


@pytest.mark.parametrize("form", [{}, {"wide": True}, {"markdown": True}], ids=["terminal", "wide", "markdown"])
def test_warnings_are_on_every_table(results, form):
    results["speed"] = make_speed()
    every = [
        tables.policies_table,
        tables.detail_table,
        tables.layer_table,
        lambda *a, **b: tables.speed_tables(*a, **b)[0],
    ]
    assert not any("WARNING" in table(results, **form) for table in every)
    results["warnings"] = ["the dense model hardly predicts this text.", "oracle: below dense."]
    for table in every:
        lines = table(results, **form).splitlines()
        assert [line for line in lines if "WARNING" in line] == [f"WARNING: {line}" for line in results["warnings"]]


def test_a_row_alone_has_the_numbers_of_the_table(results):
    table = tables.policies_table(results)
    for policy in results["policies"][:3]:
        assert row(tables.policy_row(policy), policy["policy"]) == row(table, policy["policy"])
    assert len({len(tables.policy_row(policy).rstrip("*")) for policy in results["policies"][:3]}) == 1
    assert tables.policy_row(results["policies"][3]).endswith(f"– {REASON}")


def test_a_terminal_gets_bold_headers_and_a_file_plain_text(results, monkeypatch):
    assert "\x1b" not in tables.policies_table(results)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[1m" in tables.policies_table(results)


def test_next_steps_name_the_best_policy_that_is_no_bound(results, tmp_path):
    results["policies"] += [make_policy("static", 30.0, 1.3), make_policy("soft", 28.0, 1.2)]
    run = tmp_path / "x"
    lines = tables.next_steps(run, results).splitlines()
    assert f'apc.load_run("{run}")' in lines[1] and lines[2].endswith('policy="soft")')
    assert len(lines) == 7 and not any("wandb" in line for line in lines)
    (run / "wandb" / "offline-run-1").mkdir(parents=True)
    assert f"apc export {run} FOLDER" in tables.next_steps(run, results)
    assert f"wandb sync {run}/wandb/offline-run-*" in tables.next_steps(run, results)
    assert "sparsify" not in tables.next_steps(run, {"policies": results["policies"][:1]})


def test_the_title_carries_the_conditions(results):
    title = tables.policies_table(results).split("\n\n")[0].replace("\n", " · ")
    for words in (
        "SmolLM2-135M-Instruct",
        "fit bundled:fit (20,480 tokens) → score bundled:score (4,096 tokens)",
        "held-out",
    ):
        assert words in title
    for words in (
        "sparsity 0.5",
        "K 64",
        "density 0.5",
        "energy weighting",
        "one codebook per layer",
        "windows of 1,024",
    ):
        assert words in title
    assert "IN-SAMPLE" not in tables.policies_table(results)


@pytest.mark.parametrize("table", [tables.policies_table, tables.detail_table, tables.layer_table])
def test_every_table_says_whether_windows_have_a_bos_token(results, table):
    def words():
        return " ".join(table(results, wide=True).replace("·", " ").split())

    assert "windows of 1,024 no BOS sparsity" in words(), "as in version 0.1, without the entry"
    results["conditions"]["bos"] = "<s>"
    assert "windows of 1,024 BOS sparsity" in words()


@pytest.mark.parametrize("form", [{}, {"wide": True}, {"markdown": True}], ids=["terminal", "wide", "markdown"])
@pytest.mark.parametrize("table", [tables.policies_table, tables.detail_table, tables.layer_table])
def test_in_sample_is_said_above_and_below(results, table, form):
    results["conditions"]["split"] = "in-sample"
    text = table(results, **form)
    assert text.lstrip("*").startswith("IN-SAMPLE") and text.strip().splitlines()[-1].startswith("IN-SAMPLE")
    assert "held-out" not in text


def test_the_asterisk_has_a_footnote_only_where_it_stands(results):
    assert "\n* bound: reads the token's own activations" in tables.policies_table(results)
    results["policies"] = [policy for policy in results["policies"] if policy["policy"] != "oracle"]
    assert "*" not in tables.policies_table(results)


def test_a_density_that_masks_move_has_both_and_a_footnote(results):
    """Perplexity, bits, bytes and FLOPs belong to the second."""
    oracle = next(policy for policy in results["policies"] if policy["policy"] == "oracle")
    oracle["masked"]["density"] = oracle["density"] + 0.004
    assert "50.0 →" not in tables.policies_table(results) and "density a" not in tables.policies_table(results)
    oracle["masked"]["density"] = oracle["density"] + 0.12
    table = tables.policies_table(results)
    assert (
        f"{100 * oracle['density']:.1f} → {100 * oracle['density'] + 12:.1f}" in table and "\ndensity a → b: " in table
    )


def test_seconds_of_each_stage(results):
    assert (
        "seconds: collect 41.0, cluster 30.2, predict 20.0, evaluate 70.1"
        in tables.policies_table(results).splitlines()
    )


@pytest.mark.parametrize("wide", [False, True], ids=["80", "wide"])
def test_columns_are_aligned(results, wide):
    """Numbers and dashes of a column end at the same place, the asterisk after it."""
    (grid,) = grids(tables.policies_table(results, wide=wide))
    _, _, rule, *body = grid.splitlines()
    assert set(rule) == {"─"} and max(map(len, grid.splitlines())) == len(rule)
    ends = [[cell.end() for cell in re.finditer(r"\S+( ± \S+)?", line.replace("*", " "))][1:] for line in body]
    assert len(ends) == 4 and all(places == ends[0] for places in ends)


def test_markdown_has_as_many_cells_in_every_line(results):
    table = tables.policies_table(results, markdown=True).split("\n\n")[1].splitlines()
    assert len(table) == 2 + 4
    assert {line.replace(r"\|", "").count("|") for line in table} == {13}
    assert table[1] == "| --- |" + " ---: |" * 11
    assert r"53.0\*" in table[4] and "captured importance %" in table[0]
    assert r"\* bound: " in tables.policies_table(results, markdown=True)


def test_first_tokens_and_masked_measures_stand_apart(results):
    assert row(tables.detail_table(results), "oracle") == ["oracle", "99.0", "50.0", "60.0", "80.0"]
    table = tables.detail_table(results, wide=True)
    assert row(table, "oracle") == ["oracle", "31.0", "99.0", "50.0", "60.0", "50.0", "70.0", "80.0"]
    assert row(table, "random") == ["random", "31.0", "99.0", "–", "–", "–", "–", "–"]
    assert "predicted" not in table.split("\n\n", 1)[1]


def test_layer_table_has_a_row_per_layer_and_one_over_all(results):
    _, density, captured, hits = tables.layer_table(results).strip().split("\n\n")
    for block, first, overall in ((density, "50.0", "50.0"), (captured, "80.0", "80.0"), (hits, "50.0", "50.0")):
        lines = [line.split() for line in block.splitlines()[3:]]
        assert [line[0] for line in lines] == ["0", "1", "2", "3", "all"]
        assert lines[0][1] == first and lines[-1][1] == overall
    assert density.splitlines()[1].split() == ["layer", "random", "oracle"], "dense keeps all, a missing policy nothing"
    assert captured.splitlines()[-2].split() == ["3", "83.0", "83.0"]
    assert hits.splitlines()[1].split() == ["layer", "top1_neuron", "top5_neuron"]


def test_figures_are_pictures(results, tmp_path):
    paths = figures.save_figures(results, tmp_path / "figures")
    assert list(paths) == ["perplexity", "perplexity_over_bytes", "captured_importance", "cluster_usage", "convergence"]
    for path in paths.values():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width >= 1000 and image.height >= 500
            shades = np.asarray(image.convert("L"))
            assert 0.01 < np.mean(shades < 250) < 0.6, "neither blank nor all ink"


def test_batches_keep_more_together(results, tmp_path):
    for policy in results["policies"]:
        policy["union_density"] = {"2": 0.7, "4": None, "8": 0.9}
    assert list(figures.save_figures(results, tmp_path)) == [
        "perplexity",
        "perplexity_over_bytes",
        "captured_importance",
        "union_density",
        "cluster_usage",
        "convergence",
    ]
    assert (tmp_path / "union_density.png").stat().st_size > 10_000


def test_tuning_is_said_and_its_divergence_drawn(results, tmp_path):
    plain = figures.save_figures(results, tmp_path / "plain")["convergence"].read_bytes()
    results["conditions"]["tuned"] = "predicted, 8 passes"
    results["tune"] = {"history": [{"step": 10, "divergence": 0.4}, {"step": 20, "divergence": 0.2}]}
    assert "tuned for predicted, 8 passes" in tables.conditions_text(results)
    assert figures.save_figures(results, tmp_path / "tuned")["convergence"].read_bytes() != plain


def test_in_sample_figures_differ_from_held_out_ones(results, tmp_path):
    held_out = figures.save_figures(results, tmp_path / "a")
    results["conditions"]["split"] = "in-sample"
    in_sample = figures.save_figures(results, tmp_path / "b")
    for name in held_out:
        pictures = [np.asarray(Image.open(paths[name]).convert("RGB")) for paths in (held_out, in_sample)]
        red = [int(np.all(picture == (0xB2, 0x18, 0x2B), axis=-1).sum()) for picture in pictures]
        assert red[0] == 0 and red[1] > 100


def test_figures_leave_no_global_state(results, tmp_path):
    code = (
        "import json, sys; from apc.evaluate import figures;"
        "figures.save_figures(json.loads(sys.argv[1]), sys.argv[2]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(results), str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("without", "left"),
    [
        ({"policies": []}, ["cluster_usage", "convergence"]),
        ({"cluster": None}, [*POINTS, "captured_importance", "convergence"]),
        ({"cluster": {"history": [], "sizes": {}}, "predictor": None}, [*POINTS, "captured_importance"]),
        ({"policies": [{"policy": "predicted", "missing": REASON}], "cluster": {}, "predictor": {}}, []),
    ],
    ids=["no-policies", "no-clusters", "evaluated-only", "nothing"],
)
def test_figures_without_data_are_left_out(results, tmp_path, without, left):
    assert list(figures.save_figures({**results, **without}, tmp_path)) == left
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(left)


@pytest.mark.parametrize(
    "sizes",
    [
        {"neuron": [[5, 5]]},
        {"neuron": [[0, 0, 0]]},
        {"gate": [[3, 1], [2, 2]], "up": [[4, 0], [1, 3]], "down": [[2, 2], [4, 0]]},
        {f"group {i}": [[3, 1, 0]] for i in range(64)},
        {"neuron": [list(range(16384))] * 3},
    ],
    ids=["all-equal", "all-empty", "three-sites", "64-groups", "16384-clusters"],
)
def test_usage_of_any_number_of_clusters_and_groups(results, tmp_path, sizes):
    results["cluster"]["sizes"] = sizes
    assert figures.usage_figure(results, tmp_path / "usage.png")
    assert (tmp_path / "usage.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("error")
def test_missing_and_not_finite_values_are_shown_as_such(results, tmp_path):
    broken = copy.deepcopy(results)
    for key in ("density", "ratio", "ratio_low", "bits", "captured_energy"):
        broken["policies"][1][key] = None
    broken["policies"][1]["perplexity"] = float("inf")
    broken["policies"][2]["per_layer"]["captured_importance"] = [0.5, None, 0.6, None]
    broken["cluster"]["history"][1]["captured"] = "nan"  # as metrics.jsonl writes it
    cells = row(tables.policies_table(broken, wide=True), "random")
    assert cells[1] == "–" and cells[6] == "inf" and cells[7] == "–"
    assert tables.layer_table(broken).count("–") == 2 + 1, "two layers, and the density over all"
    assert len(figures.save_figures(broken, tmp_path)) == 5


def test_one_cluster_has_no_usage_to_draw(results, tmp_path):
    results["cluster"]["sizes"] = {"neuron": [[5]] * LAYERS}
    assert not figures.usage_figure(results, tmp_path / "usage.png")


def test_only_a_far_outlier_is_clipped():
    assert figures.outlier_limit([20.0, 25.0, 300000.0]) == 25.0
    assert figures.outlier_limit([20.0, 25.0, 121.0]) == math.inf
    assert figures.outlier_limit([20.0, 60000.0]) == math.inf


@pytest.mark.parametrize("count", [2, 5, 12])
def test_labels_cover_neither_each_other_nor_points(count):
    axes = figures.new_figure("", [], 8, 5).subplots()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    figures.place_labels(axes, [figures.Label(5 + 0.01 * i, 5 + 0.1 * i, f"policy {i}", "black") for i in range(count)])
    words = [text for text in axes.texts if text.get_text()]
    extents = [text.get_window_extent() for text in words]
    assert len(words) == count
    assert not any(one.overlaps(other) for one, other in itertools.combinations(extents, 2))


def test_end_labels_stand_apart_in_order():
    axes = figures.new_figure("", [], 8, 5).subplots()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    figures.end_labels(axes, [figures.Label(10, 5 + 0.001 * i, f"policy {i}", "black") for i in range(4)])
    places = [text.get_window_extent().y0 for text in axes.texts]
    assert places == sorted(places) and min(np.diff(places)) > 20  # pixels, of letters 16 high


def test_bare_results_make_a_table_too():
    assert "dense" in tables.policies_table({"policies": [{"policy": "dense"}]})

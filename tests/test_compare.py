"""Finished runs side by side: what shares a line and what never does, what is in the table, and what bad input says."""

import csv
import json
import math
import shlex

import pytest
from matplotlib.text import Text

import evaluate
from apc.compare import figures as compare_figures
from apc.compare import finished, frontier, tables
from apc.config.load import load_config
from apc.config.values import to_yaml
from apc.evaluate import figures
from apc.evaluate import tables as evaluate_tables
from apc.run.again import command
from apc.utils import exits

PERPLEXITY = {"dense": 5.0, "exact": 6.0, "oracle": 20.0, "thresholded-oracle": 30.0, "predicted": 25.0}


def finish(
    folder,
    name,
    *words,
    perplexity=None,
    bytes_share=None,
    in_sample=True,
    policies=("dense", "exact", "oracle", "thresholded-oracle"),
    speed=None,
    **conditions,
):
    """A run folder as train.py leaves one, without having run anything."""
    cfg = load_config(None, ["experiment=paper", *words, f"run.name={name}", f"run.dir={folder}"])
    records = []
    for policy in policies:
        value = (PERPLEXITY | (perplexity or {}))[policy]
        density = 1.0 if policy == "dense" else cfg.cluster.density
        records.append(
            {
                "policy": policy,
                "missing": None,
                "excludes_finding": "oracle" in policy,
                "density": density,
                "coverage": min(1.0, density + 0.1),
                "precision": 0.6,
                "captured_importance": 0.8,
                "captured_energy": 0.9,
                "perplexity": value,
                "ratio": value / 5,
                "ratio_low": value / 5.5,
                "ratio_high": value / 4.5,
                "bits": 0.0 if policy in tables.SHARED else 3 * math.log2(cfg.cluster.k),
                "bytes_share": (bytes_share or {}).get(policy, density),
                "flops_share": density,
            }
        )
    records.append({"policy": "soft", "missing": "no predictor was given"})
    known = {
        "model": "Mistral-7B-v0.1",
        "fit": "a:test" if in_sample else "a:train",
        "score": "a:test",
        "split": "in-sample" if in_sample else "held-out",
        "fit_tokens": 333824,
        "score_tokens": 333824,
        "seq_len": 2048,
        "sites": cfg.sites,
        "sparsity": 0.5,
        "active": "threshold",
        "k": cfg.cluster.k,
        "density": cfg.cluster.density,
        "bytes": 0.5,
        "weighting": cfg.cluster.weighting,
        "scope": cfg.cluster.scope,
        "forward": "thresholded",
        "dtype": "bfloat16",
        "layers": 32,
        "hidden_size": 4096,
        "ffn_width": 14336,
    }
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(cfg))
    results = {"conditions": known | conditions, "policies": records, "speed": speed}
    (path / "results.json").write_text(json.dumps(results))
    return finished.read_finished(path)


@pytest.fixture
def drawn(monkeypatch):
    """A list that gets every figure that the test draws."""
    found = []
    new_figure = figures.new_figure
    monkeypatch.setattr(
        figures, "new_figure", lambda *args, **options: found.append(new_figure(*args, **options)) or found[-1]
    )
    return found


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """(folder, runs): clusters × algorithm × density in-sample, and two held-out runs with a predictor."""
    folder = tmp_path_factory.mktemp("grid")
    for k in (256, 2048, 16384):
        for algorithm in ("lloyd", "apc-paper"):
            for density in (0.6, 0.8):
                words = (f"cluster.k={k}", f"cluster.algorithm={algorithm}", f"cluster.density={density}")
                finish(folder, f"in-{algorithm}-{k}-{density}", *words, perplexity={"oracle": 4000 / k**0.5})
    for k in (256, 512):
        policies = ("dense", "exact", "oracle", "predicted")
        finish(
            folder,
            f"out-{k}",
            f"cluster.k={k}",
            "data=wikitext2",
            "policies=[dense,exact,oracle,predicted]",
            in_sample=False,
            policies=policies,
        )
    return folder, finished.find_runs(f"{folder}/*")[0]


CLUSTERS = (lambda run, policy: run.conditions["k"], lambda run, policy: policy["perplexity"])


def test_a_line_is_one_policy_of_one_algorithm_and_density_over_clusters(grid):
    found = compare_figures.lines(
        [run for run in grid[1] if run.in_sample], ("oracle", "thresholded-oracle"), *CLUSTERS
    )
    assert sorted((line.policy, line.variant, line.density) for line in found) == sorted(
        (policy, algorithm, density)
        for policy in ("oracle", "thresholded-oracle")
        for algorithm in ("lloyd", "apc-paper")
        for density in (0.6, 0.8)
    )
    assert all([x for x, _ in line.points] == [256, 2048, 16384] for line in found)
    assert next(line for line in found if line.policy == "oracle").points[0] == (256, 250.0)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "Other-1B"},
        {"score": "b:test"},
        {"fit": "b:train"},
        {"in_sample": False},
        {"seq_len": 512},
        {"fit_tokens": 7},
        {"bos": "<s>"},
        {"overlap": 0.004},
        {"weights": "0123abcd"},
    ],
)
def test_another_model_text_or_split_never_shares_a_line_or_a_panel(tmp_path, other, drawn):
    runs = finished.ordered(
        finish(tmp_path, f"{name}-{k}", f"cluster.k={k}", **conditions)
        for name, conditions in (("one", {}), ("two", other))
        for k in (256, 512)
    )
    assert [len(line.points) for line in compare_figures.lines(runs, ("oracle",), *CLUSTERS)] == [2, 2]
    assert compare_figures.perplexity_figure(runs, tmp_path / "a.png") and len(drawn[0].axes) == 2


def test_settings_that_differ_part_lines_and_are_named(tmp_path):
    runs = [finish(tmp_path, "a", "cluster.k=256"), finish(tmp_path, "b", "cluster.k=512", "cluster.init=k-means++")]
    assert sorted(line.variant for line in compare_figures.lines(runs, ("oracle",), *CLUSTERS)) == [
        "apc-paper, init k-means++",
        "apc-paper, init random",
    ]


def test_predictors_that_differ_part_the_policies_that_read_them_only(tmp_path):
    policies = ("dense", "exact", "oracle", "predicted")
    runs = [
        finish(tmp_path, name, f"cluster.k={k}", f"predictor.bottleneck={h}", policies=policies)
        for name, k, h in (("a", 256, 64), ("b", 512, 128))
    ]
    assert len(compare_figures.lines(runs, ("oracle",), *CLUSTERS)) == 1
    assert sorted(line.variant for line in compare_figures.lines(runs, ("predicted",), *CLUSTERS)) == [
        "apc-paper, predictor bottleneck 128",
        "apc-paper, predictor bottleneck 64",
    ]


def test_runs_that_repeat_others_with_another_seed_are_points_of_the_same_line(tmp_path):
    runs = [
        finish(tmp_path, f"s{seed}", "cluster.k=256", f"seed={seed}", perplexity={"oracle": value})
        for seed, value in ((0, 10.0), (1, 30.0))
    ]
    (line,) = compare_figures.lines(runs, ("oracle",), *CLUSTERS)
    assert line.points == [(256, 10.0), (256, 30.0)] and line.middle() == [(256, 20.0)]


def test_the_slides_cost_model_gives_the_slides_ratio():
    direct, clustered = finished.predictions_needed(2 / 3 * 7e9, 3 * 2048, layers=32, tokens=100, cost=5)
    assert direct / clustered == pytest.approx(7.6e5, rel=0.005) and clustered == 6144 * 32 * 100 * 5


def test_the_table_has_every_policy_with_its_conditions_held_out_first(grid):
    folder, runs = grid
    rows = list(csv.DictReader(tables.table_csv(runs).splitlines()))
    assert len(rows) == 14 * 4 and [row["split"] for row in rows] == ["held-out"] * 8 + ["IN-SAMPLE"] * 48
    row = next(row for row in rows if row["run"] == "in-lloyd-2048-0.6" and row["policy"] == "oracle")
    assert (
        float(row["fewer_predictions_slides"]) == pytest.approx(3 * 4096 * 14336 * 32 / 6144)
        and float(row["bytes_share"]) == 0.6
    )
    assert float(row["oracle_gap"]) == pytest.approx(math.log(4000 / 2048**0.5 / 6)) and row["predictor_gap"] == ""
    held = next(row for row in rows if row["policy"] == "predicted")
    assert float(held["predictor_gap"]) == pytest.approx(math.log(25 / 20)) and held["model"] == "Mistral-7B-v0.1"
    for form in ({}, {"wide": True}, {"markdown": True}):
        text = tables.table(runs, **form)
        assert text.index("held-out, windows of 2,048") < text.index("IN-SAMPLE · Mistral-7B-v0.1")
        assert "IN-SAMPLE: scored on the text that was fitted on" in text
        assert text.count("python train.py") == (14 if form else 0)
        assert ("9.2e5" in text and "not bytes or FLOPs" in text) == bool(form)


def test_more_conditions_are_shown_where_a_run_has_them(tmp_path):
    runs = [finish(tmp_path, "a"), finish(tmp_path, "b", bos="<s>", weights="0123abcd")]
    text = tables.table(runs)
    assert text.count("weights: 0123abcd") == 1 and "overlap" not in text and "None" not in text
    assert text.count("windows of 2,048, no BOS") == text.count("windows of 2,048, BOS") == 1
    row = next(csv.DictReader(tables.table_csv([runs[1]]).splitlines()))
    assert (row["bos"], row["weights"]) == ("<s>", "0123abcd")


@pytest.mark.parametrize("windows", [7, 8])
def test_few_windows_have_no_interval(tmp_path, windows):
    """Results of version 0.1 have one from two windows on."""
    run = finish(tmp_path, "a", score_tokens=windows * 2048)
    text = " ".join(tables.table([run]).split())
    assert ("4.000 ± 0.404" in text) == (windows == 8) and text.count(evaluate_tables.NO_INTERVAL) == (windows == 7)
    low = [
        row["ratio_low"] for row in csv.DictReader(tables.table_csv([run]).splitlines()) if row["policy"] == "oracle"
    ]
    assert bool(low[0]) == (windows == 8)


@pytest.mark.parametrize("form", [{}, {"wide": True}, {"markdown": True}], ids=["terminal", "wide", "markdown"])
def test_warnings_of_a_run_name_it(tmp_path, form):
    runs = [finish(tmp_path, name) for name in ("a", "b")]
    runs[1].results["warnings"] = ["oracle: perplexity below the dense model's."]
    text = tables.table(runs, **form)
    assert text.count("WARNING") == 1 and "\nb: WARNING: oracle: perplexity below the dense model's.\n" in text


def test_the_table_fits_80_columns_and_wide_has_all_of_them(grid):
    narrow, wide = tables.table(grid[1]), tables.table(grid[1], wide=True)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "comparison.md" in narrow and "--wide shows all columns" in narrow
    header = wide.split("\n\n")[1].splitlines()[1].split()
    assert header[:4] == ["run", "codebook", "K", "policy"] and {"perplexity", "nats", "÷"} <= set(header)


def test_the_table_is_grouped_by_run_with_the_numbers_of_the_records(grid):
    runs = [run for run in grid[1] if not run.in_sample]
    blocks = {block.split(":")[0]: block.splitlines() for block in tables.table(runs).split("\n\n")}
    for run in runs:
        heading, *rows = blocks[run.name]
        assert f"K {run.conditions['k']}" in heading and "density 0.6" in heading
        assert [row.replace(" ± ", "±").split() for row in rows] == [
            ["oracle", "60.0", "90.0", "20.00", "4.000±0.404", "60.0*"],
            ["predicted", "60.0", "90.0", "25.00", "5.000±0.505", "60.0"],
        ]
    assert "2 runs: any codebook\ndense " in tables.table(runs)


def test_each_command_makes_its_run_again(grid, tmp_path):
    small = finish(
        tmp_path,
        "small",
        "experiment=demo",
        "cluster.k=9",
        "policies=[dense,static]",
        "model.path=a folder",
        "sparsity=0.7",
        "cluster.density=0.5",  # as a run of version 0.2 had it
        policies=("dense",),
    )
    for run in [*grid[1], small]:
        words = shlex.split(command(run.folder, run.config))
        cfg = load_config(None, words[2:])
        assert words[:2] == ["python", "train.py"] and cfg.run.name == f"{run.name}-again"
        assert to_yaml(cfg).replace(f"{run.name}-again", run.name).replace(
            "dir: runs", f"dir: {run.config.run.dir}"
        ) == to_yaml(run.config)
    assert len(command(grid[1][-1].folder, grid[1][-1].config)) < 200  # from experiment=paper, not key by key


def test_an_evaluation_of_a_run_is_made_again_by_evaluate(tmp_path):
    finish(tmp_path, "run", "cluster.k=256")
    run = finish(tmp_path / "run" / "evaluations", "more", "cluster.k=256", "policies=[oracle]", policies=("oracle",))
    assert run.name == "run/more"
    words = shlex.split(command(run.folder, run.config))
    assert words == [
        "python",
        "evaluate.py",
        f"checkpoint={tmp_path / 'run'}",
        "policies=[oracle]",
        "run.name=more-again",
    ]
    assert evaluate.config_of_run(None, words[2:]).policies == ["oracle"]


def test_figures_show_ours_over_the_papers_range_with_the_papers_results(grid, tmp_path, monkeypatch):
    by_title = {}
    new_figure = figures.new_figure
    monkeypatch.setattr(
        figures,
        "new_figure",
        lambda title, *args, **options: by_title.setdefault(title, new_figure(title, *args, **options)),
    )
    drawn = [path.stem for path in compare_figures.save_figures(grid[1], tmp_path)]
    assert drawn == [
        "coverage",
        "perplexity",
        "captured_importance_over_bits",
        "perplexity_over_bits",
        "perplexity_over_captured",
        "perplexity_over_bytes",
        "gaps",
    ]
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in drawn)
    words = {title: " | ".join(text.get_text() for text in figure.findobj(Text)) for title, figure in by_title.items()}
    for expected in (
        "paper, nearest centroids: 12.49",
        "paper, active neurons: 6.45",
        "paper, dense: ≈ 5.3",
        "the paper's results on the same model, also in-sample",
        "dense 5.00",
        "IN-SAMPLE",
        "held-out",
    ):
        assert expected in words["Perplexity over the number of clusters"], expected
    coverage = next(text for title, text in words.items() if title.startswith("Coverage"))
    assert "paper's best: 79.34" in coverage and "density, %" in coverage
    (axes,) = [
        axes
        for axes in by_title["Perplexity over the number of clusters"].axes
        if "sparsity 0.5, density 0.8" in axes.get_title(loc="left")
    ]
    low, high = axes.get_xlim()
    assert low < 256 and high > 16384 and axes.get_xscale() == "log" and axes.get_yscale() == "log"
    (gaps,) = by_title["What the codebook costs, and what predicting the cluster adds"].axes
    heights = sorted({round(y, 6) for line in gaps.lines for y in line.get_ydata()})
    # Only the held-out runs have a predictor.
    assert heights == [round(math.log(25 / 20), 6), round(math.log(20 / 6), 6)]


@pytest.mark.parametrize("other", [{"model": "Other-1B"}, {"in_sample": False}], ids=["model", "held-out"])
def test_the_papers_results_stand_only_beside_its_own_model_in_sample(tmp_path, other, drawn):
    runs = [finish(tmp_path, f"k{k}", f"cluster.k={k}", **other) for k in (256, 512)]
    assert compare_figures.perplexity_figure(runs, tmp_path / "a.png")
    assert compare_figures.coverage_figure(runs, tmp_path / "b.png")
    words = [text.get_text() for figure in drawn for text in figure.findobj(Text)]
    assert not [text for text in words if "grey" in text or text.startswith("paper")]


def test_a_single_number_of_clusters_makes_no_figure_over_clusters(tmp_path):
    run = finish(tmp_path, "a", "cluster.k=256")
    drawn = compare_figures.save_figures([run], tmp_path / "out")
    assert [path.stem for path in drawn] == ["perplexity_over_captured", "perplexity_over_bytes"]


def at_bytes(folder, name, places, *words, dense=5.0, **conditions):
    """A run whose policies have these (share of bytes, perplexity)."""
    stored = conditions.get("ffn_bits", 16) / 16
    shares, perplexity = ({policy: place[i] for policy, place in places.items()} for i in (0, 1))
    words = ("cluster.k=256", *words)
    policies = ("dense", *places)
    perplexity, shares = perplexity | {"dense": dense}, shares | {"dense": stored}
    return finish(folder, name, *words, policies=policies, perplexity=perplexity, bytes_share=shares, **conditions)


@pytest.fixture
def budgets(tmp_path):
    """Runs of one model at 16 and at 4 bits, in every combination of bytes that the figure treats in its own way."""
    found = [
        at_bytes(tmp_path, "b-one", {"oracle": (0.5, 5.5), "predicted": (0.55, 7.0), "teal": (0.52, 7.5)}),
        at_bytes(tmp_path, "b-same", {"oracle": (0.5, 5.5), "predicted": (0.5513, 6.8)}),
        at_bytes(tmp_path, "b-more", {"predicted": (0.7, 6.9), "teal": (0.7, 5.4), "static": (0.5, 99.0)}),
        at_bytes(tmp_path, "b-most", {"predicted": (0.8, 5.2), "soft": (1.2, 6.0)}),
        at_bytes(tmp_path, "b-few", {"predicted": (0.2, 6.5)}, "model.ffn_bits=4", dense=5.3, ffn_bits=4.68),
    ]
    return finished.ordered(found)


def test_a_policy_has_a_series_for_each_kind_of_stored_ffn_and_dense_has_one_for_all(budgets):
    assert len({run.comparison_key for run in budgets}) == 1
    series = {found.name: found for found in frontier.all_series(budgets)}
    assert set(series) == {"dense", "oracle", "predicted", "predicted, 4-bit FFN", "teal", "static", "soft"}
    assert sorted((point.bytes, point.perplexity, point.bits) for point in series["dense"].points) == [
        (pytest.approx(29.25), 5.3, 4),
        (100.0, 5.0, 16),
    ]
    assert [point.run for point in series["predicted, 4-bit FFN"].points] == ["few"]  # without the runs' common prefix
    assert len(series["oracle"].points) == 1 and series["oracle"].is_bound  # two runs with the same result


def test_a_line_joins_the_best_run_of_a_policy_at_each_budget(budgets):
    series = {found.name: found for found in frontier.all_series(budgets)}
    # 55.0 and 55.13 % are one budget; 70 % is worse than it, though it has more bytes.
    assert [point.run for point in frontier.best(series["predicted"].points)] == ["same", "most"]
    assert frontier.best([]) == []


def test_the_figure_over_bytes_tells_the_frontier_bounds_and_peers_apart(budgets, tmp_path, drawn):
    assert compare_figures.bytes_figure(budgets, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    words = [text.get_text() for text in axes.findobj(Text)]
    for expected in (
        *(
            "predicted, 4-bit FFN (few)",
            "dense, 4-bit FFN",
            "predicted (most)",
            "teal",
            "oracle",
            "dense, 16 bits: 5.00",
        ),
        "not drawn, above 10.00 or more bytes than dense: static, soft",
    ):
        assert expected in words, expected
    assert "predicted" not in words and "exact" not in words
    edge, *others = axes.lines
    assert edge.get_drawstyle() == "steps-post"
    assert list(zip(*edge.get_data(), strict=True)) == [
        *((20.0, 6.5), (pytest.approx(29.25), 5.3), (80.0, 5.2), (100.0, 5.0), (100, 5.0)),
    ]  # without the oracle, which is a bound
    joined = [line for line in others if line.get_linestyle() != "None" and len(line.get_xdata()) > 1]
    paths = {tuple(line.get_ydata()): line for line in joined}
    assert set(paths) == {(6.8, 5.2), (7.5, 5.4), (5.3, 5.0), (5.0, 5.0)}  # predicted, teal, dense, the dense level
    assert paths[7.5, 5.4].is_dashed() and not paths[6.8, 5.2].is_dashed()
    assert axes.get_yscale() == "log" and axes.get_xlim()[0] < 10 and axes.get_xlim()[1] > 100


def test_a_policy_far_from_dense_is_still_drawn_but_not_one_of_no_use(tmp_path):
    def limit(*perplexities):
        names = ("predicted", "soft", "static")
        places = {name: (0.5, value) for name, value in zip(names, perplexities, strict=False)}
        return frontier.largest_useful(frontier.all_series([at_bytes(tmp_path, f"r{perplexities}", places)]))

    assert limit(6.0) == 10.0 and limit(6.0, 15.0) == 15.0 and limit(6.0, 15.0, 21.0) == 15.0


def timed(folder, name, rates, machine="Xeon, 2 threads", **conditions):
    """A run whose policies decode so many tokens a second."""
    records = [
        {"policy": policy, "seconds_per_token": 1 / rate, "seconds_low": 0.9 / rate, "seconds_high": 1.2 / rate}
        | {
            "times_dense": rate / rates["dense"],
            "times_low": rate / rates["dense"],
            "times_high": rate / rates["dense"],
        }
        for policy, rate in rates.items()
    ]
    speed = {"policies": records} | ({} if machine is None else {"machine": machine})
    return finish(folder, name, policies=("dense", "predicted", "soft"), speed=speed, **conditions)


@pytest.fixture
def timings(tmp_path):
    """Runs on two machines and on a CPU without a name, and one that measured no speed."""
    better, worse = {"predicted": 6.0, "soft": 9.0}, {"predicted": 7.0, "soft": 9.0}
    found = [
        timed(tmp_path, "s-one", {"dense": 10.0, "predicted": 16.0}, perplexity=better),
        timed(tmp_path, "s-two", {"dense": 11.0, "predicted": 15.0, "soft": 20.0}, perplexity=worse),
        timed(tmp_path, "s-epyc", {"dense": 30.0, "predicted": 40.0}, "EPYC, 2 threads", perplexity=better),
        timed(tmp_path, "s-old", {"dense": 3.0, "predicted": 4.0}, None, perplexity=better, device="cpu"),
        finish(tmp_path, "s-none"),
    ]
    return finished.ordered(found)


def test_the_figure_over_speed_has_a_panel_for_each_machine(timings, tmp_path, drawn):
    assert not compare_figures.speed_figure([run for run in timings if run.name in ("s-old", "s-none")], tmp_path / "a")
    assert compare_figures.speed_figure(timings, tmp_path / "a.png")
    epyc, xeon = drawn[0].axes
    assert "EPYC, 2 threads" in epyc.get_xlabel() and "Xeon, 2 threads" in xeon.get_xlabel()

    def points(axes):
        found = [line.get_data() for line in axes.lines if len(line.get_xdata()) == 1]
        return sorted((round(x[0], 6), y[0]) for x, y in found)

    assert points(epyc) == [(30.0, 5.0), (40.0, 6.0)]
    assert points(xeon) == [(10.0, 5.0), (11.0, 5.0), (15.0, 7.0), (16.0, 6.0), (20.0, 9.0)]
    words = {text.get_text() for text in xeon.findobj(Text)}
    assert {"dense (two)", "predicted (one)", "soft (two)"} <= words  # the others are slower and no better
    assert not {"dense (one)", "predicted (two)"} & words


def test_tables_have_the_speed_where_it_was_measured(timings, tmp_path):
    one = next(run for run in timings if run.name == "s-one")
    text = tables.table([one], wide=True)
    assert "tokens/s" in text and "16.0" in text and "1.60" in text and "Xeon, 2 threads" in text
    assert "tokens/s" not in tables.table([run for run in timings if run.name == "s-none"], wide=True)
    assert "tokens/s" in tables.table(timings, markdown=True) and "machine" in tables.comparison_page(timings)
    rows = {(row["run"], row["policy"]): row for row in csv.DictReader(tables.table_csv(timings).splitlines())}
    assert float(rows["s-two", "soft"]["seconds_per_token"]) == 0.05 and rows["s-two", "soft"]["machine"]
    assert rows["s-one", "soft"]["seconds_per_token"] == rows["s-one", "soft"]["machine"] == ""


def test_every_table_says_which_dense_model_a_ratio_is_against(budgets, tmp_path):
    text = tables.table(budgets)
    assert "4 runs: FFN at 16 bits, any codebook\ndense " in text
    assert "1 run: FFN at 4.68 bits, any codebook\ndense " in text
    assert "b-few: apc-paper, FFN at 4.68 bits, density" in text and finished.OWN_DENSE[:50] in text
    alone = tables.table([run for run in budgets if run.name == "b-few"])
    assert "FFN at 4.68 bits" in alone and finished.OWN_DENSE[:50] in alone
    assert "16 bits" not in tables.table([run for run in budgets if run.name != "b-few"])
    rows = csv.DictReader(tables.table_csv(budgets).splitlines())
    assert {row["run"] for row in rows if row["ffn_bits"] == "4.68"} == {"b-few"}


def test_levels_of_dense_models_are_told_apart_by_their_bits(tmp_path, drawn):
    runs = [at_bytes(tmp_path, f"k{k}", {"oracle": (0.5, 9.0)}, f"cluster.k={k}") for k in (256, 512)]
    runs += [at_bytes(tmp_path, "few", {"oracle": (0.2, 9.5)}, "model.ffn_bits=4", dense=5.3, ffn_bits=4.68)]
    assert compare_figures.perplexity_figure(finished.ordered(runs), tmp_path / "a.png")
    words = [text.get_text() for text in drawn[0].findobj(Text)]
    assert "dense, FFN at 16 bits: 5.00" in words and "dense, FFN at 4.68 bits: 5.30" in words


def test_runs_without_policies_of_clusters_give_a_table_and_no_figures(tmp_path):
    said = tables.compare([finish(tmp_path, "a", policies=("dense",))], tmp_path / "out")
    assert "figures: none" in " ".join(said.split()) and sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.csv",
        "comparison.html",
        "comparison.md",
    ]


def test_masks_of_free_size_stand_with_the_share_that_they_were_scored_at(tmp_path):
    run = finish(tmp_path, "a")
    assert (
        "density a → b" not in tables.table([run])
        and next(csv.DictReader(tables.table_csv([run]).splitlines()))["masked_density"] == ""
    )
    run.policies["oracle"]["masked"] = {"density": 0.645}
    said, rows = tables.table([run]), csv.DictReader(tables.table_csv([run]).splitlines())
    assert "60.0 → 64.5" in said and "\ndensity a → b: " in said
    assert next(row for row in rows if row["policy"] == "oracle")["masked_density"] == "0.645"


@pytest.mark.parametrize(
    ("tuned", "policies"),
    [("neuron-predictor, 256 steps", ["neuron-predictor", "neuron-threshold"]), ("predicted, 9 steps", ["predicted"])],
)
def test_what_a_run_was_tuned_for(tmp_path, tuned, policies):
    run = finish(tmp_path, "a", tuned=tuned)
    assert [
        policy
        for policy in ("exact", "oracle", "predicted", "neuron-predictor", "neuron-threshold")
        if run.is_tuned_for(policy)
    ] == policies


def run_compare(*words):
    with exits.one_line_errors(""):
        tables.main(words)


def test_what_is_not_finished_is_left_out_of_a_pattern_with_a_line(tmp_path, capsys):
    finish(tmp_path, "a")
    finish(tmp_path, "b")
    (tmp_path / "b" / "results.json").unlink()
    (tmp_path / "a.log").write_text("not a folder")
    run_compare(f"compare=[{tmp_path}/*,{tmp_path}/a]")
    said = capsys.readouterr().out
    assert f"{tmp_path}/b: left out, not finished (no results.json)" in said and "a.log" not in said
    assert (
        len(list(csv.DictReader((tmp_path / "comparison" / "comparison.csv").open()))) == 4
    )  # named twice, there once


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare={}/none-*"], "compare={}/none-*: matches nothing"),
        (["compare={}/unfinished"], "{}/unfinished: not finished (no results.json)"),
        (["compare={}/unfinished*"], "compare={}/unfinished*: names no finished run; 1 are not finished"),
        (["compare={}/nowhere"], "{}/nowhere: not a run folder (no config.yaml)"),
        (["compare={}/torn"], "{}/torn/results.json: damaged (Expecting"),
        (["compare={}/*"], "{}/list/results.json: damaged (not the results of a run)"),
        (["compare=[]"], "compare=[]: names no finished run"),
        (["compare={}/whole", "data.score=a.txt"], "data.score: does not go with compare="),
        (["compare={}/whole", "out={}/whole/config.yaml"], "{}/whole/config.yaml: can't be written (File exists)"),
    ],
    ids=["nothing", "unfinished", "all-unfinished", "nowhere", "torn", "another-file", "empty", "other-key", "out"],
)
def test_bad_input_is_one_line_that_names_it(tmp_path, capsys, words, message):
    for name in ("whole", "torn", "list", "unfinished"):
        finish(tmp_path, name)
    (tmp_path / "unfinished" / "results.json").unlink()
    (tmp_path / "torn" / "results.json").write_text('{"conditions": {')
    (tmp_path / "list" / "results.json").write_text('[{"policy": "dense"}]')
    with pytest.raises(SystemExit) as end:
        run_compare(*(word.format(tmp_path) for word in words))
    said = capsys.readouterr()
    assert (
        end.value.code == 2 and said.err.startswith(f"error: {message.format(tmp_path)}") and said.err.count("\n") == 1
    )


def test_what_no_codebook_changes_stands_there_once(grid):
    lines = tables.table(grid[1], wide=True).splitlines()
    shared = [line.split() for line in lines if line.split()[1:2] in (["run"], ["runs"])]
    together = [run for run in grid[1] if sum(other.comparison_key == run.comparison_key for other in grid[1]) > 1]
    names = [name for name in tables.SHARED if any(name in run.policies for run in together)]
    assert {"dense", "exact"} <= set(names)
    for name in names:
        count = sum(int(row[0]) for row in shared if name in row[2:6])
        assert count == sum(name in run.policies for run in together) > 0
    assert not [line for line in lines if line.startswith("in-") and " dense " in line]

"""Later sources win, and an error about a mistake in one is a line that names the key."""

import contextlib
import dataclasses
import random
import sys
from pathlib import Path

import pytest

import evaluate
import tiny
from apc.config.load import flat, load_config, load_saved
from apc.config.schema import RunConfig
from apc.config.values import as_word, to_yaml
from apc.run import cli, launch
from apc.run.folder import open_run
from apc.sparse.policies import check_policies
from apc.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_later_sources_win(tmp_path):
    (tmp_path / "a.yaml").write_text("data: wikitext2\ncluster: {k: 12, density: 0.4}\n")
    cfg = load_config(tmp_path / "a.yaml", ["cluster.k=13", "model=mistral7b", "model.dtype=float16"])
    assert (cfg.cluster.k, cfg.cluster.density, cfg.data.seq_len) == (13, 0.4, 2048)
    assert (cfg.model.path, cfg.model.dtype) == ("mistralai/Mistral-7B-v0.1", "float16")


def test_an_override_changes_a_group_that_an_experiment_chose():
    assert load_config(None, ["experiment=wikitext2"]).data.seq_len == 2048
    assert load_config(None, ["experiment=wikitext2", "data=bundled"]).data.fit == "bundled"
    cfg = load_config(
        None, ["experiment=wikitext2", "cluster=binary", "cluster.k=9"]
    )  # stronger than the experiment's own values
    assert (cfg.cluster.weighting, cfg.cluster.k) == ("binary", 9)


def test_none_as_a_wandb_sweep_writes_it_is_null():
    assert load_config(None, ["run.name=None", "data.fit_windows=None"]).run.name is None


# Texts that YAML 1.1 reads as numbers, dates, truth values or null, or that OmegaConf reads as its own notation.
AWKWARD = [
    "2024_01_15", "007", "12:30", "on", "off", "yes", "No", "~", "6063e25", "1e3", "0x10", "0b1", "1.5", ".inf",
    ".nan", "2024-01-15", "true", "${seed}", "a${b", "???", "\\???", "{a:b}", "a#b", "#a", "a:b", ":", "-", "--",
    "&", "&a", "*a", "!a", "!!int", "%a", "@a", "`", "|", ">", "?", "it's", "'", "\"", "'\"", "\\", "\\n", "=",
    "==", "a=b", "é", "日本", "😀", "a b", "a: b", "a #b", "a\tb", "a\nb", "\u2028", "\x85", "\ufeff", "'a'", "\"a\"",
    "[a]", "[a,b]", "a,b", " a ", ",",
]  # fmt: skip


def awkward_texts(count):
    draw = random.Random(0)
    pieces = [*AWKWARD, *"abz019_-+.,:;#'\"[]{}\\$?!&*|<>=~%@` \t\n", "null", "None", "${", "}"]
    return [*AWKWARD, *("".join(draw.choices(pieces, k=draw.randint(1, 6))) for _ in range(count))]


def test_a_text_key_takes_the_text_as_it_is_typed(tmp_path):
    for text in AWKWARD:
        if text not in ("'a'", '"a"'):  # quotes around the whole text are left out
            cfg = load_config(None, [f"tracking.notes={text}", f"model.revision={text}"])
            assert (cfg.tracking.notes, cfg.model.revision) == (text, text)
    for text in ("2024_01_15", "007", "12:30", "on", "6063e25", "1e3", "0x10", "2024-01-15", "true", "${seed}", "???"):
        (tmp_path / "a.yaml").write_text(
            f"run: {{name: {text!r}}}\ntracking:\n  notes: {text}\n  tags:\n  - {text}\n  - on\n"
        )
        cfg = load_config(tmp_path / "a.yaml")
        assert (cfg.run.name, cfg.tracking.notes, cfg.tracking.tags) == (text, text, [text, "on"])


def test_every_text_survives_the_command_line_and_the_saved_file(tmp_path):
    keys = ("tracking.notes", "model.path", "model.revision", "run.dir")
    texts = [*awkward_texts(150), "null", "None", "x" * 2000, "a " * 500]
    for start in range(0, len(texts), len(keys)):
        some = texts[start : start + len(keys)]
        values = dict(zip(keys, some, strict=False)) | {"policies": some}
        cfg = load_config(None, [f"{key}={as_word(value)}" for key, value in values.items()])
        assert {key: flat(cfg)[key] for key in values} == values
        (tmp_path / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
        assert load_saved(tmp_path / "config.yaml") == cfg
    assert load_config(None, [f"tracking.notes={as_word('')}"]).tracking.notes == ""


def test_every_value_of_a_configuration_survives_the_command_line():
    for words in ([], ["experiment=paper", "tune.lr=1e-7", "speed=false", "seed=12", "data.fit_windows=null"]):
        cfg = load_config(None, words)
        assert load_config(None, [f"{key}={as_word(value)}" for key, value in flat(cfg).items()]) == cfg


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("cluster.k=010", 10),
        ("seed=0", 0),
        ("tune.lr=1e-3", 0.001),
        ("tune.lr=.5", 0.5),
        ("tune.lr=2", 2.0),
        ("tune.lr=1E+1", 10.0),
        ("speed=True", "true"),  # as W&B's agent writes it
        ("speed=best", "best"),
        ("tune.budget=True", True),
        ("run.name=None", None),
        ("run.name='null'", "null"),
        ('run.name="a\\u00e9"', "aé"),
        ("tracking.tags=['a, b', \"c\", d e , on]", ["a, b", "c", "d e", "on"]),
        ("tracking.tags=[null,010]", ["null", "010"]),
        ("policies=null", None),
        ("data.fit_windows=null", None),
    ],
)
def test_the_schema_decides_a_values_type(word, value):
    found = flat(load_config(None, ["data.fit=a.txt", word]))[word.partition("=")[0]]
    assert found == value and type(found) is type(value)


def test_of_a_repeated_override_the_last_one_counts():
    assert load_config(None, ["seed=1", "cluster=binary", "seed=2", "cluster=energy"]).seed == 2


@pytest.mark.parametrize(
    ("words", "density"),
    [
        ([], 0.5),
        (["sparsity=0.7"], 0.3),
        (["sparsity=0.7", "cluster=binary"], 0.3),
        (["sparsity=0.7", "cluster.density=0.4"], 0.4),
        (["experiment=paper-small", "sparsity=0.2"], 0.6),  # the experiment gives it
        (["experiment=paper-small", "sparsity=0.2", "cluster.density=null"], 0.8),
    ],
)
def test_the_density_follows_the_sparsity_unless_it_is_given(words, density, tmp_path):
    cfg = load_config(None, words)
    assert cfg.cluster.density == density
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_saved(tmp_path / "config.yaml").cluster.density == density


def test_a_saved_density_stays(tmp_path):
    (tmp_path / "config.yaml").write_text("sparsity: 0.7\ncluster: {density: 0.5}\n")
    assert load_saved(tmp_path / "config.yaml").cluster.density == 0.5


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_file_in_configs_is_valid(path):
    if path.parent.name != "sweep":
        load_config(None, [f"{path.parent.name}={path.stem}"])


def test_the_configuration_is_read_only_and_survives_its_own_yaml(tmp_path):
    cfg = load_config(None, ["sites=[gate,up,down]", "policies=[dense,oracle]", "cluster.k=7"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.seed = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.cluster.k = 3
    (tmp_path / "again.yaml").write_text(to_yaml(cfg))
    assert load_config(tmp_path / "again.yaml") == cfg


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("cluster.kk=3", r"cluster\.kk: unknown key; did you mean cluster\.k\?"),
        ("clusters.k=3", r"clusters: unknown key; did you mean cluster\?"),
        ("cluster.k=many", r"cluster\.k=many: not a whole number"),
        ("cluster.k", "cluster.k: not an override; write key=value"),
        ("cluster.k=0", "cluster.k must be at least 1, got 0"),
        ("model.device_map=balanced", r"model\.device_map=balanced: choose auto or null"),
        ("cluster.density=1.5", "cluster.density must lie between 0 and 1, got 1.5"),
        ("cluster.density=0", "cluster.density must lie between 0 and 1, got 0"),
        ("sparsity=1", "sparsity must lie between 0 and 1, got 1"),
        ("cluster.weighting=entropy", "cluster.weighting=entropy: choose binary, magnitude or energy"),
        (
            "cluster.algorithm=k-means",
            "cluster.algorithm=k-means: choose lloyd, apc-paper, brb-kmeans or k-majority",
        ),
        (
            "cluster.algorithm=k-majority",
            "cluster.algorithm=k-majority clusters binary patterns; set cluster.weighting=binary in place of energy",
        ),
        ("cluster.penalty=0", "cluster.penalty must be at least 1, got 0"),
        ("cluster.penalty=2", "cluster.penalty=2 belongs to cluster.algorithm=k-majority; leave it out with lloyd"),
        ("sites=[neuron,gate]", r"sites=\['neuron', 'gate'\]: `neuron` is one mask"),
        ("sites=[gates]", r"sites=\['gates'\]: choose"),
        ("policies=[oracle,orcale]", "policies: orcale is unknown; choose dense, exact"),
        ("model=mistral8b", "model=mistral8b: no such group file; choose bundled, gemma3-270m, mistral7b"),
        ("experiment=none", "experiment=none: no such group file"),
        ("stage=evaluate", "stage=evaluate: choose collect, cluster, predict, tune or all"),
        ("model.dtype=int8", "model.dtype=int8: choose auto, float32"),
        ("seed=-1", "seed must not be negative"),
        ("policies=[]", r"policies=\[\]: names none"),
        ("policies=[neuron-predictor]", "policies: neuron-predictor needs predictor.form=neuron"),
        ("trainer.max_steps=0", "trainer.max_steps=0 trains nothing"),
        ("model.device=1", "model.device=1: not a device"),
        ("model.device=gpu", "model.device=gpu: not a device"),
        ("predictor.lr=-1", "predictor.lr must be above 0"),
        ("trainer.devices=0", "trainer.devices must be at least 1"),
        ("tracking.wandb=maybe", "tracking.wandb"),
        ("data.seq_len=1", "data.seq_len must be at least 2"),
        ("data.seq_len=1_024", "data.seq_len=1_024: not a whole number"),
        ("data.seq_len=1e3", "data.seq_len=1e3: not a whole number"),
        ("seed=1.0", "seed=1.0: not a whole number"),
        ("seed=99999999999999999999", "seed=99999999999999999999: not a whole number"),
        ("seed=4294967296", "seed must be below 4294967296"),
        ("trainer.devices=0x2", "trainer.devices=0x2: not a whole number"),
        ("cluster.density=nan", "cluster.density=nan: not a finite number"),
        ("sparsity=.inf", "sparsity=.inf: not a finite number"),
        ("tune.lr=1e999", "tune.lr=1e999: not a finite number"),
        ("tune.lr=1_0", "tune.lr=1_0: not a finite number"),
        ("speed=on", "speed=on: choose false, true or best"),
        ("tune.budget=1", "tune.budget=1: choose true or false"),
        ("run.name=", "run.name=: no value; write run.name=null for none, or leave it out"),
        ("data.seq_len=null", "data.seq_len=null: it needs a value, such as its default, data.seq_len=1024"),
        ("sites=null", r"sites=null: it needs a value, such as its default, sites=\[neuron\]"),
        ("policies=dense", r"policies: not a list of words; write policies=\[a,b\]"),
        ("policies=[dense,]", "policies: not a list of words"),
        ('run.name="\\q"', "can't be read"),
        ("run.name=a\udcff", "not UTF-8"),
        ("seed.x=1", "seed: takes one value"),
        ("run.name=..", r"run\.name=\.\.: not the name of a folder"),
        ("run.name=''", r"run\.name=: not the name of a folder"),
        ("run.name=../a", r"run\.name=\.\./a: not the name of a folder"),
        ("run.name=" + "é" * 128, r"run\.name=é+…: has 256 bytes, but a folder's name has at most 255"),
        (f"tracking.tags=[a,{'x' * 65}]", "tracking.tags: x+… has 65 characters; W&B takes 1 to 64"),
        ("tracking.project=a/b", "tracking.project=a/b: W&B takes 1 to 128 characters, without any of"),
        ("tracking.project=" + "x" * 129, "tracking.project=x+: W&B takes 1 to 128 characters"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, line):
    with pytest.raises(UserError, match=line) as caught:
        check_policies(load_config(None, [override]))
    assert "\n" not in str(caught.value)


def test_names_are_checked_where_folders_are_made_and_saved_runs_still_load(tmp_path):
    bad = dataclasses.replace(load_config(), run=RunConfig(name="../b", dir=str(tmp_path / "runs")))
    with pytest.raises(UserError, match=r"run\.name=\.\./b: not the name of a folder"), open_run(bad):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.yaml").write_text(to_yaml(bad))
    assert load_saved(tmp_path / "config.yaml") == bad  # a run of an earlier version
    words = [f"checkpoint={tmp_path}"]
    assert evaluate.config_of_run(None, words).run.name is None
    assert evaluate.config_of_run(None, ["checkpoint=other", *words]).checkpoint == str(tmp_path)  # the last one counts
    for name in ("..", "a/b", "x" * 256):
        with pytest.raises(UserError, match=r"run\.name=.*(not the name of a folder|has 256 bytes)"):
            evaluate.config_of_run(None, [*words, f"run.name={name}"])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.yaml: no such configuration file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("cluster: [k: 3")
    with pytest.raises(UserError, match="broken.yaml: not readable as YAML"):
        load_config(tmp_path / "broken.yaml")
    for content, problem in (
        (b"seed: 1\nseed: 2\n", "line 2: seed is given twice"),
        (b"cluster:\n  k: 3\n  k: 4\n", "line 3: k is given twice"),
        (b"cluster:\n\tk: 3\n", r"line 2: found character '\\t' that cannot start any token"),
        (b"seed: \xff\n", "can't decode|invalid start byte"),
        (b"seed: &a [*a]\n", "line 1: found unconstructable recursive node"),
        (b"seed: " + b"[" * 5000, "nested too deeply"),
    ):
        (tmp_path / "broken.yaml").write_bytes(content)
        with pytest.raises(UserError, match=f"broken.yaml: not readable as YAML: .*({problem})") as caught:
            load_config(tmp_path / "broken.yaml")
        assert "\n" not in str(caught.value)
    (tmp_path / "list.yaml").write_text("- 3\n")
    with pytest.raises(UserError, match="list.yaml: contains no keys"):
        load_config(tmp_path / "list.yaml")


def test_a_file_may_have_anchors_merge_keys_and_nulls(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "cluster: &a {k: 010, max_epochs: 3}\npredictor: {<<: *a, k: 7, max_epochs: 4}\n".replace(", k: 7", "")
    )
    with pytest.raises(UserError, match=r"predictor\.k: unknown key"):  # merged from the other section
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(
        "predictor: &p {max_epochs: 4}\ntune: {<<: *p, lr: 1e-4, precision: ~}\nrun: {name: }\npolicies: null\n"
    )
    cfg = load_config(tmp_path / "b.yaml")
    assert (cfg.tune.max_epochs, cfg.tune.lr, cfg.tune.precision, cfg.run.name, cfg.policies) == (
        4,
        1e-4,
        None,
        None,
        None,
    )


def test_help_lists_keys_and_groups_and_print_config_stops_there():
    shown = tiny.command("train.py", "--help")
    assert shown.returncode == 0
    for expected in (
        "cluster.k=256",
        "Clusters in a codebook",
        "model=bundled|gemma3-270m|mistral7b",
        "experiment=wikitext2",
        "data.seq_len=",
    ):
        assert expected in shown.stdout
    printed = tiny.command("train.py", "--print-config", "cluster.k=99", "data=wikitext2")
    assert printed.returncode == 0
    assert "k: 99" in printed.stdout and "seq_len: 2048" in printed.stdout


def test_a_mistake_on_the_command_line_exits_with_2_and_one_line():
    failed = tiny.command("train.py", "cluster.kk=3")
    assert failed.returncode == 2
    assert failed.stderr.strip() == "error: cluster.kk: unknown key; did you mean cluster.k?"


@pytest.mark.parametrize(
    ("words", "started", "line"),
    [
        (
            ["trainer.devices=4"],
            (2, 2),
            r"trainer\.devices=4: torchrun started 2; give it --nproc-per-node=4, or leave the key out",
        ),
        (["trainer=slurm"], (8, 8), r"trainer\.num_nodes=2: torchrun started 1; give it --nnodes=2"),
        (["trainer=slurm"], (16, 8), None),
        ([], (16, 8), None),
    ],
    ids=["devices", "machines", "as-configured", "not-configured"],
)
def test_another_number_of_launched_processes_is_an_error(monkeypatch, words, started, line):
    for name, value in zip(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), started, strict=True):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=line) if line else contextlib.nullcontext():
        launch.check_launched(load_config(None, words))


def test_several_slurm_tasks_that_would_each_start_all_processes_are_an_error(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UserError, match=r"srun started this command 8 times, and each would start all processes"):
        launch.launch(load_config(None, ["trainer=ddp", "model.device=cpu"]))


def test_a_device_map_is_one_process_and_decodes_nothing(monkeypatch, capsys):
    for words, line in (
        (
            ["trainer=ddp"],
            "model.device_map=auto: spreads one process over all GPUs; set trainer.devices=1, or leave it out",
        ),
        (["speed=true"], "model.device_map=auto: speed=true needs the model on one device; leave one of the two out"),
        (
            ["tune.max_epochs=2"],
            "model.device_map=auto: tune.max_epochs=2 needs the model on one device; leave one of the two out",
        ),
        (
            ["model.path=a.gguf"],
            "model.device_map=auto: a .gguf file is unpacked on one device; give a model folder: model.path=FOLDER",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", "model.device_map=auto", *words])
        with pytest.raises(SystemExit):
            cli.main("", lambda cfg: {})
        assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], 0.53), (["policies=[dense]"], None), (["policies=[dense,teal]", "bytes=0.6"], 0.6), (["bytes=0.4"], 0.4)],
)
def test_the_bytes_of_the_demo_are_for_its_own_policies(words, expected):
    assert load_config(None, words).bytes == expected

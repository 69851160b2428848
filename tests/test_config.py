"""Later sources win, and an error about a mistake in one is a line that names the key."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest

import tiny
from apc.config.load import load_config, to_yaml
from apc.run import cli, launch
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
        ("cluster.k=many", r"cluster\.k: Value 'many' of type 'str' could not be converted to Integer"),
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
        ("policies=[oracle,orcale]", "policies: orcale is unknown; choose from dense, exact"),
        ("model=mistral8b", "model=mistral8b: no such group file; choose bundled, mistral7b"),
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
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, line):
    with pytest.raises(UserError, match=line) as caught:
        check_policies(load_config(None, [override]))
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.yaml: no such configuration file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("cluster: [k: 3")
    with pytest.raises(UserError, match="broken.yaml: not readable as YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 3\n")
    with pytest.raises(UserError, match="list.yaml: contains no keys"):
        load_config(tmp_path / "list.yaml")


def test_help_lists_keys_and_groups_and_print_config_stops_there():
    shown = tiny.command("train.py", "--help")
    assert shown.returncode == 0
    for expected in (
        "cluster.k=256",
        "Clusters in a codebook",
        "model=bundled|mistral7b",
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
        (["speed=true"], "model.device_map=auto: speed=True needs the model on one device; leave one of the two out"),
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

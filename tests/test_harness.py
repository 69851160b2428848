"""lm-evaluation-harness with the model `apc`: a run or a shared result under a policy."""

import functools
import json
import os
import subprocess
import sys

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import apc
import tiny
import train
from apc import __main__ as apc_main
from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.commands import lm_eval as lm_eval_command
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.bundled import bundled_model
from apc.data.models import load_model
from apc.share.harness import SparseLM
from apc.utils.errors import UserError
from apc.utils.hub import hub_offline

CLOZE = """task: local_cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{start}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tiny.make_workplace(tmp_path_factory.mktemp("harness"))
    changes = {"policies": "[dense,oracle,predicted]", "monitor.windows": 0}
    train.train(load_config(None, tiny.tiny_overrides(folder, **changes)))
    words = (folder / "score.txt").read_text().split()[:240]
    lines = [
        {"start": " ".join(words[i : i + 12]), "ends": [f" {words[i + 12]}", f" {words[i + 13]}"], "right": i // 20 % 2}
        for i in range(0, 200, 20)
    ]
    write_tasks(folder, lines)
    apc.export(folder / "runs" / "run", folder / "shared", "predicted")
    return folder


def write_tasks(folder, lines):
    """Two tasks on the same lines: which end is likelier, and the perplexity of the starts."""
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("cloze", CLOZE), ("text", ROLLING)):
        (tasks / f"{name}.yaml").write_text(text.format(file=tasks / "lines.jsonl"))


def command_words(folder, arguments):
    """The words of `apc` that score the model `apc` on both tasks."""
    words = ["lm-eval", "run", "--model", "apc", "--model_args", arguments, "--tasks", "local_cloze,local_text"]
    words += ["--include_path", str(folder / "tasks"), "--device", "cpu", "--batch_size", "2"]
    return [*words, "--output_path", str(folder / "out" / "results.json")]


def harness(folder, arguments):
    """The results of both tasks by the command, in a process of its own."""
    words = ["-m", "apc", *command_words(folder, arguments)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    (written,) = (folder / "out").glob("results*.json")
    return figures_of(json.loads(written.read_text())["results"])


def figures_of(results):
    """The figures of tasks by task and name."""
    return {
        (task, name): value
        for task, named in results.items()
        for name, value in named.items()
        if isinstance(value, float) and "stderr" not in name
    }


def test_the_dense_model_scores_as_the_harness_own(workplace):
    model = HFLM(pretrained=str(workplace / "model"), dtype="float32", device="cpu", batch_size=2)
    own = figures_of({task: scored(model, workplace, task) for task in ("local_cloze", "local_text")})
    dense = harness(workplace, f"checkpoint={workplace / 'runs' / 'run'},policy=dense")
    assert dense == own and len(own) == 4


def test_a_shared_result_scores_as_its_run(workplace):
    run = scored(SparseLM(str(workplace / "runs" / "run"), "predicted", device="cpu"), workplace, "local_text")
    given = {"checkpoint": str(workplace / "shared"), "model": str(workplace / "model"), "device": "cpu"}
    assert scored(SparseLM(**given), workplace, "local_text") == run
    by_kernel = scored(SparseLM(**given, kernel="torch"), workplace, "local_text")
    assert by_kernel["word_perplexity,none"] == pytest.approx(run["word_perplexity,none"], rel=1e-4)
    assert scored(SparseLM(**given, policy="dense"), workplace, "local_text") != run


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"checkpoint": ""}, "no checkpoint; give a run or a shared result: --model_args checkpoint=runs/x"),
        ({"checkpoint": "run", "polcy": "x"}, "polcy: not an argument of the model apc; choose checkpoint, policy"),
        ({"checkpoint": "nothing"}, "nothing: no such folder, and not a hub id"),
        ({"checkpoint": "run", "policy": "x"}, "policy x: unknown; choose dense"),
        ({"checkpoint": "run", "policy": "soft", "kernel": "x"}, "kernel=x: choose auto"),
        ({"checkpoint": "run", "model": "x"}, "model=x: .* is a run, which names its model; leave model out"),
        (
            {"checkpoint": "shared", "policy": "oracle"},
            "policy=oracle: .* was shared for predicted; choose it",
        ),
        ({"checkpoint": "shared"}, "the base model model was a folder; give it: model=FOLDER"),
    ],
)
def test_bad_arguments_are_one_line(workplace, arguments, problem):
    places = {"run": workplace / "runs" / "run", "shared": workplace / "shared"}
    given = arguments | {"checkpoint": str(places.get(arguments["checkpoint"], arguments["checkpoint"]))}
    with pytest.raises(UserError, match=problem) as caught:
        SparseLM(**given)
    assert "\n" not in str(caught.value)


@pytest.fixture
def local_tasks_only(monkeypatch):
    """The command does not look through the harness's own tasks, which takes seconds."""
    build = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", functools.partialmethod(build, include_defaults=False))


def test_a_bad_argument_ends_the_command(workplace, local_tasks_only, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["apc", *command_words(workplace, "checkpoint=nothing")])
    with hub_offline(True), pytest.raises(SystemExit) as ended:
        apc_main.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: nothing: no such folder")


@pytest.mark.parametrize(
    ("task", "problem"), [("x", "lm-eval: Tasks not found: x"), ("wikitext", "lm-eval: Couldn't reach .* on the Hub")]
)
def test_an_unknown_task_and_data_that_cannot_be_fetched_are_one_line(workplace, monkeypatch, request, task, problem):
    if task == "x":
        request.getfixturevalue("local_tasks_only")
    words = ["--model", "apc", "--model_args", f"checkpoint={workplace / 'runs' / 'run'}", "--tasks", task]
    monkeypatch.setattr(sys, "argv", ["apc lm-eval", "run", *words])
    with hub_offline(True), pytest.raises(UserError, match=problem):
        lm_eval_command.main()


def scored(model, folder, task):
    """A task's results for a model of the harness."""
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager)["results"][task]


def test_a_sparsified_model_can_be_handed_to_the_harness(workplace):
    """The example of the documentation."""
    run = apc.load_run(workplace / "runs" / "run")
    cfg = ModelConfig(path=str(workplace / "model"), device="cpu")
    model, tokenizer = load_model(cfg, torch.device("cpu"))
    apc.sparsify(model, run.codebook, run.predictor, "predicted")
    sparse = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2)
    ours = SparseLM(str(workplace / "runs" / "run"), "predicted", batch_size=2, device="cpu")
    assert scored(sparse, workplace, "local_text") == scored(ours, workplace, "local_text")


def test_the_example_scores_the_articles_of_a_local_wikitext(workplace, tmp_path):
    words = (workplace / "score.txt").read_text().split()
    articles = [f" = w{i} = \n {' '.join(words[i : i + 40])} , \n = = w3 = = \n {words[i + 40]} . " for i in range(3)]
    (tmp_path / "wiki.raw").write_text(" \n" + "\n".join(articles))
    tasks = str(tiny.ROOT / "examples" / "harness")
    manager = TaskManager(include_path=tasks, include_defaults=False, metadata={"file": str(tmp_path / "wiki.raw")})
    model = SparseLM(str(workplace / "runs" / "run"), "predicted", device="cpu")
    scored = lm_eval.simple_evaluate(model=model, tasks=["wikitext_local"], task_manager=manager)
    assert [sample["doc"]["page"] for sample in scored["samples"]["wikitext_local"]] == articles
    assert scored["results"]["wikitext_local"]["word_perplexity,none"] > 1
    with pytest.raises(UserError, match="file: no such file; name a text: --metadata file=wiki.test.raw"):
        TaskManager(include_path=tasks, include_defaults=False).load(["wikitext_local"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_the_harness_default_device_is_the_cpu(workplace):
    assert SparseLM(str(workplace / "runs" / "run"), "dense", device="cuda:0").device.type == "cpu"


def test_the_bundled_model_scores_as_the_harness_own(tmp_path):
    text = "The quick brown fox jumps over the lazy dog , and then it sleeps in the warm sun until the evening"
    words = text.split()
    lines = [{"start": " ".join(words[: 6 + i]), "ends": [f" {words[6 + i]}", " the"], "right": 0} for i in range(8)]
    write_tasks(tmp_path, lines)
    folder = bundled_model()
    sizes = json.loads((folder / "config.json").read_text())
    L, E, D = (sizes[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    masks = ops.pack(torch.arange(D) < D // 2).expand(L, 1, -1).contiguous()
    profiles, counts = torch.ones(L, 1, D, dtype=torch.float16), torch.ones(L, 1, dtype=torch.int64)
    book = SiteCodebook(masks, profiles, counts, masks[:, 0].clone(), torch.zeros(L))
    codebook = Codebook({"neuron": book}, {"neuron": D}, L, E, D, "layer", "energy", 0.5, "top", 0.5)
    base = {"path": "bundled", "name": "SmolLM2", "revision": None, "dtype": "float32", "weights": None}
    base |= {"ffn_bits": None, "ffn_group": 32, "ffn_spared": 16}
    facts = {
        "policy": "static",
        "seed": 0,
        "base_model": base,
        "license": None,
        "kernels": [],
        "conditions": {},
        "made": {},
    }
    apc.Result(codebook, None, facts | {"dense": None, "sparse": None}).save_pretrained(tmp_path / "shared")
    dense = SparseLM(str(tmp_path / "shared"), "dense", batch_size=2, device="cpu")
    own = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    for task in ("local_cloze", "local_text"):
        assert scored(dense, tmp_path, task) == scored(own, tmp_path, task)
    sparse = SparseLM(str(tmp_path / "shared"), batch_size=2, device="cpu")
    assert scored(sparse, tmp_path, "local_text") != scored(dense, tmp_path, "local_text")

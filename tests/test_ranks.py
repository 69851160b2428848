"""Clustering gives the same bits on any number of ranks, also after a kill and with another number of ranks."""

import os
import shutil
import signal

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException
from test_clustering import make_source

import tiny
from apc.cluster.algorithms import ALGORITHMS
from apc.collect.loader import BlockLoader, PatternDataModule
from apc.config.schema import ClusterConfig
from apc.run.callbacks import EndTogether, ResumePoint
from apc.run.trainer import SumsOnDevices
from apc.utils import distributed, signals
from apc.utils.errors import Terminated, UserError

# 2 layers and 9 windows (in one case 8), so ranks have uneven rows. The names say how clusters are shared out: uneven
# on 2 and 4 ranks, even, fewer than ranks.
CASES = {
    "binary-uneven": dict(k=7, weighting="binary"),
    "energy-pooled-uneven": dict(k=7, scope="pooled"),
    "magnitude-even": dict(k=4, weighting="magnitude"),
    "binary-fewer-than-ranks": dict(k=3, weighting="binary", scope="pooled"),
    "one-cluster": dict(k=1, weighting="binary", scope="pooled"),
    "empty-clusters": dict(k=40, weighting="binary", scope="pooled"),
    "k-majority": dict(k=9, weighting="binary", algorithm="k-majority", penalty=2),
    "brb-kmeans": dict(k=5, weighting="binary", algorithm="brb-kmeans"),
    "step": dict(k=6, schedule="step", windows=8),  # one to four ranks have the same blocks of 8 windows
}


BY_RANKS = {"apc-paper": dict(k=12, weighting="binary", algorithm="apc-paper")}  # depends on the number of ranks


class Saves(ResumePoint):
    """always: save at every chance; else only when a SIGTERM ends the training."""

    def __init__(self, path, every, always):
        super().__init__(path, every)
        self.always = always

    def _save(self, trainer, in_time=True):
        if self.always or not in_time:
            super()._save(trainer, in_time=False)


class EndedAt(Callback):
    """Ends a training before a block of a pass: by a kill, or by a SIGTERM to the last rank.

    place: (pass, block); None: never.
    """

    def __init__(self, place, asked):
        self.place, self.asked = place, asked

    def on_train_batch_start(self, trainer, module, batch, batch_index):
        if (trainer.current_epoch, batch_index) == self.place:
            if not self.asked:
                raise tiny.Killed
            if distributed.rank() == distributed.world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)


def cluster(options, checkpoint, place=None, asked=False, always=True, every=1, windows=9, max_epochs=6):
    """A rank's codebook tensors, buffers and history after a clustering, resumed from `checkpoint` if that exists."""
    options = dict(tolerance=0.0, max_epochs=max_epochs, windows=windows) | options
    source, ranks = make_source(prototypes=6, windows=options.pop("windows")), distributed.world_size()
    cfg = ClusterConfig(**options)
    module = ALGORITHMS[cfg.algorithm](cfg, source.info)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=SumsOnDevices() if ranks > 1 else "auto",
        max_epochs=max_epochs,
        logger=False,
        callbacks=[EndTogether(), Saves(checkpoint, every, always), EndedAt(place, asked)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = PatternDataModule(source, BlockLoader(source, module.fields(), 4, 0))
    with signals.training():
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=True)
    book = module.codebook({}).sites["neuron"].tensors()
    # `worst` differs between ranks, and `changed` covers the last pass only.
    buffers = {name: value for name, value in module.named_buffers() if not name.startswith(("worst", "changed"))}
    history = [{name: value for name, value in record.items() if name != "seconds"} for record in module.history]
    return {"book": book, "buffers": buffers, "history": history}


def clusterings(folder, ended, cases):
    """Clusters every case and saves the results in a file per rank."""
    before = signal.signal(signal.SIGTERM, signals.terminate)
    distributed.start(torch.device("cpu"))
    results = {}
    for name, options in cases.items():
        try:
            results[name] = cluster(options, folder / f"{name}.ckpt", **ended)
        except (tiny.Killed, SIGTERMException, Terminated):
            assert "place" in ended
    signal.signal(signal.SIGTERM, before)
    torch.save(results, folder / f"rank{distributed.rank()}.pt")


def run(ranks, folder, cases=CASES, **ended):
    folder.mkdir(exist_ok=True)
    if ranks > 1:
        tiny.in_ranks(ranks, clusterings, folder, ended, cases)
    else:
        clusterings(folder, ended, cases)


def results_of(folder, ranks):
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def same(result, expected):
    assert result["history"] == expected["history"]
    for kind in ("book", "buffers"):
        assert result[kind].keys() == expected[kind].keys()
        for name, value in result[kind].items():
            assert torch.equal(value, expected[kind][name]), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run(1, folder)
    return results_of(folder, 1)[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_ends_with_the_same_bits_and_so_does_one_that_resumes_its_checkpoint(tmp_path, alone, ranks):
    run(ranks, tmp_path)
    for results in results_of(tmp_path, ranks):
        for name in CASES:
            same(results[name], alone[name])
    run(1, tmp_path)  # as if the codebook was not written yet: it is made from the last pass's checkpoint
    for name, result in results_of(tmp_path, 1)[0].items():
        same(result, alone[name])


@pytest.mark.parametrize(("first", "then"), [(1, [2]), (2, [1, 2, 3])], ids=["begun-by-one", "begun-by-two"])
def test_a_kill_and_another_number_of_ranks_change_no_bit(tmp_path, alone, first, then):
    """9 windows in blocks of 4: three blocks for one rank, two for two and three ranks, so that each has a window."""
    assert all(len(alone[name]["history"]) > 1 for name in CASES if name != "one-cluster")
    begun = tmp_path / "begun"
    run(first, begun, place=(1, 0))
    assert len(list(begun.glob("*.ckpt"))) == len(CASES)
    for ranks in then:
        folder = shutil.copytree(begun, tmp_path / f"on-{ranks}")
        run(ranks, folder)
        for results in results_of(folder, ranks):
            for name in CASES:
                same(results[name], alone[name])


@pytest.fixture(scope="module")
def alone_on_8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone-on-8")
    run(1, folder, windows=8)
    return results_of(folder, 1)[0]


@pytest.mark.parametrize(
    ("first", "then", "place"),
    [(1, [2], (0, 1)), (2, [1], (0, 1)), (2, [3], (1, 1))],
    ids=["one-two", "two-one", "two-three"],
)
def test_a_kill_within_a_pass_changes_no_bit(tmp_path, alone_on_8, first, then, place):
    """8 windows in blocks of 4, the same for up to four ranks. All resume from a checkpoint after the first block."""
    begun = tmp_path / "begun"
    run(first, begun, place=place, windows=8)
    saved = [torch.load(path, weights_only=True) for path in begun.glob("*.ckpt")]
    assert len(saved) == len(CASES) and {each["PatternDataModule"]["position"] for each in saved} == {1}
    for ranks in then:
        folder = shutil.copytree(begun, tmp_path / f"on-{ranks}")
        run(ranks, folder, windows=8)
        for results in results_of(folder, ranks):
            for name in CASES:
                same(results[name], alone_on_8[name])


def test_an_algorithm_that_depends_on_the_number_of_ranks_also_resumes_within_a_pass(tmp_path):
    run(2, tmp_path / "whole", BY_RANKS, every=1000)
    run(2, tmp_path / "killed", BY_RANKS, place=(0, 1))
    run(2, tmp_path / "killed", BY_RANKS)
    for results, expected in zip(results_of(tmp_path / "killed", 2), results_of(tmp_path / "whole", 2), strict=True):
        assert len(results["apc-paper"]["history"]) > 2
        same(results["apc-paper"], expected["apc-paper"])


def test_a_sigterm_to_one_rank_ends_all_ranks_after_the_same_step(tmp_path, alone_on_8):
    """A signal at the end of the first pass ends them after the second pass's first block."""
    run(2, tmp_path, place=(0, 1), asked=True, windows=8)
    saved = [torch.load(path, weights_only=True) for path in tmp_path.glob("*.ckpt")]
    assert len(saved) == len(CASES) and {each["global_step"] for each in saved} == {3}
    run(2, tmp_path, windows=8)
    for results in results_of(tmp_path, 2):
        for name in CASES:
            same(results[name], alone_on_8[name])


def test_a_sigterm_in_the_last_step_leaves_a_checkpoint_too(tmp_path):
    case = {name: CASES[name] for name in ("binary-uneven", "energy-pooled-uneven")}
    run(2, tmp_path, case, place=(1, 1), asked=True, always=False, max_epochs=2)
    assert [torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("*.ckpt")] == [4, 4]
    run(2, tmp_path, case, max_epochs=2)
    run(1, tmp_path / "alone", case, max_epochs=2)
    for name in case:
        same(results_of(tmp_path, 2)[1][name], results_of(tmp_path / "alone", 1)[0][name])


def test_a_sigterm_ends_the_training_in_a_program_that_ignores_it(tmp_path):
    """As in a program of one's own under torchrun that calls the trainings."""
    tiny.in_ranks(2, with_sigterm_ignored, tmp_path)
    assert [torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("*.ckpt")] == [3]


def with_sigterm_ignored(folder):
    distributed.start(torch.device("cpu"))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with pytest.raises(SIGTERMException):
        cluster(CASES["binary-uneven"], folder / "one.ckpt", place=(0, 1), asked=True, windows=8)


def test_a_position_within_a_pass_over_other_blocks_is_refused(monkeypatch):
    source = make_source()
    begun = BlockLoader(source, ["patterns.neuron"], 4, 0)
    passed = iter(begun)
    next(passed)
    within = begun.progress()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    other = BlockLoader(source, ["patterns.neuron"], 4, 0)
    with pytest.raises(
        UserError, match="its blocks of text differ from those of 2 processes; start as many processes as before"
    ):
        other.resume(within)
    list(passed)
    other.resume(begun.progress())
    assert other.progress() == {"epoch": 1, "position": 0, "blocks": [2, 4]}

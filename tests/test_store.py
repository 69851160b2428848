"""A store returns the patterns that were collected, is reused for the same content, and names a damaged file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from apc import ops
from apc.collect import collect, store
from apc.collect.collector import HISTOGRAM_SHIFT, Collector
from apc.collect.loader import BlockLoader
from apc.collect.sharding import block_ranges
from apc.collect.store import PatternStore
from apc.commands import cache
from apc.config.schema import CollectConfig
from apc.data.ffn import find_ffns
from apc.data.hooks import FFNHooks
from apc.data.models import weights_digest
from apc.data.text import Windows, _digest
from apc.utils import distributed
from apc.utils.errors import UserError


def make_windows(count=7, seq_len=16, seed=0):
    tokens = torch.randint(0, tiny.VOCABULARY, (count, seq_len), generator=torch.Generator().manual_seed(seed))
    return Windows(tokens, "made", 1, _digest(tokens))


def run_collect(
    folder, model=None, windows=None, sites=("neuron",), active="threshold", storage="disk", with_hidden=True, **options
):
    model = model or tiny.make_model()
    cfg = CollectConfig(
        storage=storage, dir=str(folder), calibration_windows=options.pop("calibration_windows", 7), **options
    )
    collector = Collector(
        model, list(sites), torch.device("cpu"), batch_windows=2, thresholded=cfg.forward == "thresholded"
    )
    windows = windows or make_windows()
    identity = collect.pattern_identity(weights_digest(model), windows.digest, list(sites), active, 0.5, cfg)
    return collect.collect(cfg, collector, windows, active, 0.5, identity, with_hidden)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 20_000)  # several shards even for tiny models


def dense_values(model, windows):
    """Neurons [L, n, D] and FFN inputs [L, n, E], read with hooks of the test's own."""
    neurons, inputs, handles = [], [], []
    for ffn in find_ffns(model):
        handles.append(ffn.down.register_forward_pre_hook(lambda _m, args: neurons.append(args[0].flatten(0, 1))))
        handles.append(ffn.module.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].flatten(0, 1))))
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return torch.stack(neurons), torch.stack(inputs)


def test_batches_have_one_size_when_collecting_into_memory(tmp_path):
    """A GPU's rounding depends on the batch size. The next test shows that the padding changes no result."""
    model, shapes = tiny.make_model(), []
    model.model.register_forward_pre_hook(
        lambda _m, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    run_collect(tmp_path, model, storage="memory", batch_tokens=3 * 16)
    # two tokens as a check, then four passes for calibration and four for the patterns
    assert shapes == [(1, 2), *[(2, 16)] * 8]


@pytest.mark.parametrize("storage", ["disk", "memory"])
@pytest.mark.parametrize("active", ["threshold", "top"])
def test_collected_patterns_follow_the_definitions(tmp_path, storage, active):
    model, windows = tiny.make_model(), make_windows()
    source = run_collect(tmp_path, model, windows, active=active, storage=storage)
    neurons, inputs = dense_values(model, windows.tokens)
    importance = neurons.abs() * torch.stack([ffn.down.weight.norm(dim=0) for ffn in find_ffns(model)]).unsqueeze(1)
    block = source.block(0, 7, source.info.fields())
    patterns = ops.unpack(block.patterns["neuron"], 52)
    if active == "top":
        assert torch.equal(patterns, ops.top_mask(importance, 26))
    else:
        thresholds = source.info.rule.thresholds["neuron"]
        exact = importance.flatten(1).quantile(0.5, dim=1)
        assert ((thresholds / exact - 1).abs() < 2 ** -(23 - HISTOGRAM_SHIFT) + 0.01).all()
        assert torch.equal(patterns, importance >= thresholds.view(-1, 1, 1))
        assert 0.48 < patterns.double().mean() < 0.52
    restored = block.importance["neuron"].float() * block.scale["neuron"].unsqueeze(-1)
    assert ((restored - importance).abs() <= block.scale["neuron"].unsqueeze(-1) * 0.51).all()
    torch.testing.assert_close(block.hidden.float(), inputs, rtol=0.01, atol=0.01)
    assert torch.equal(source.info.activity["neuron"], patterns.sum(1))


def test_blocks_and_rows_agree_across_shards(tmp_path):
    source = run_collect(tmp_path)
    assert len(source._shards) > 2
    whole = source.block(0, 7, source.info.fields())
    for first, last in ((0, 1), (2, 6), (6, 7), (3, 3)):
        part = source.block(first, last, source.info.fields())
        for name, value in part.tensors().items():
            assert torch.equal(value, whole.tensors()[name][:, first * 16 : last * 16])
    layers, tokens = torch.randint(0, 3, (50,)), torch.randint(0, 7 * 16, (50,))
    for name, value in whole.tensors().items():
        assert torch.equal(source.rows(name, layers, tokens), value[layers, tokens])


def test_memory_and_disk_have_the_same_patterns(tmp_path):
    disk, memory = run_collect(tmp_path), run_collect(tmp_path, storage="memory")
    for name, value in disk.block(0, 7, disk.info.fields()).tensors().items():
        assert torch.equal(value, memory.block(0, 7, memory.info.fields()).tensors()[name])


def count_forwards(monkeypatch):
    calls = []
    original = Collector.block
    monkeypatch.setattr(
        Collector, "block", lambda self, *args, **more: calls.append(1) or original(self, *args, **more)
    )
    return calls


def test_the_same_content_is_collected_once_and_other_content_again(tmp_path, monkeypatch):
    calls = count_forwards(monkeypatch)
    run_collect(tmp_path)
    first = len(calls)
    assert first > 0
    run_collect(tmp_path)
    run_collect(tmp_path, with_hidden=False)  # a store with more fields serves
    assert len(calls) == first
    changed = tiny.make_model()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    for options in (
        dict(model=changed),
        dict(windows=make_windows(seed=1)),
        dict(active="top"),
        dict(sites=["gate"]),
        dict(calibration_windows=2),
    ):
        before = len(calls)
        run_collect(tmp_path, **options)
        assert len(calls) > before, options


def test_collecting_resumes_after_the_last_whole_shard(tmp_path, monkeypatch):
    whole = run_collect(tmp_path / "whole")
    original, written = store.StoreWriter.add, []

    def dying_add(self, block):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(block.first_window)
        original(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(store.StoreWriter, "add", dying_add)
        with pytest.raises(KeyboardInterrupt):
            run_collect(tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*/manifest.json"))
    calls = count_forwards(monkeypatch)
    again = run_collect(tmp_path / "killed")
    assert 0 < len(calls) < 7 - len(written)
    for name, value in whole.block(0, 7, whole.info.fields()).tensors().items():
        assert torch.equal(value, again.block(0, 7, again.info.fields()).tensors()[name])


def first_file(source, name="patterns"):
    return next(path for path in sorted(source.path.iterdir()) if name in path.name)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "truncated, or from another run"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])), "checksum"),
    ],
    ids=["missing", "truncated", "flipped-bit"],
)
def test_a_damaged_shard_is_named_and_collected_again_alone(tmp_path, damage, line, monkeypatch, capsys):
    source = run_collect(tmp_path)
    path = first_file(source)
    damage(path)
    with pytest.raises(UserError, match=line) as caught:
        run_collect(tmp_path)
    assert str(path) in str(caught.value) and f"apc cache repair {source.path.name} --dir {tmp_path}" in str(
        caught.value
    )
    before = json.loads((source.path / "manifest.json").read_text())["shards"]
    collected = []
    monkeypatch.setattr(
        store,
        "_write_array",
        lambda path, value, write=store._write_array: collected.append(path.name) or write(path, value),
    )
    cache.main(["repair", source.path.name, "--dir", str(tmp_path)])
    assert f"shards 0 of {len(before)} are damaged" in capsys.readouterr().out
    assert json.loads((run_collect(tmp_path).path / "manifest.json").read_text())["shards"] == before
    assert len(before) > 1 and {name[:5] for name in collected} == {
        "00000"
    }  # only the damaged shard was collected again


def test_a_damaged_manifest_is_named(tmp_path):
    source = run_collect(tmp_path)
    (source.path / "manifest.json").write_text('{"format": "apc-patterns", "ver')
    with pytest.raises(UserError, match="manifest.json: damaged"):
        PatternStore(source.path)
    (source.path / "manifest.json").write_text(json.dumps({"format": "apc-patterns", "version": 99}))
    with pytest.raises(UserError, match="a store of format 99, this program reads 2"):
        PatternStore(source.path)


def test_only_stores_are_repaired(tmp_path, monkeypatch):
    source = run_collect(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    partial = tmp_path / f"{source.path.name}.partial"
    partial.mkdir()
    for name in (".", "elsewhere", partial.name, "../x"):
        with pytest.raises(UserError, match="no such store in .*, or an interrupted one"):
            cache.main(["repair", name, "--dir", str(tmp_path)])
    manifest = json.loads((source.path / "manifest.json").read_text())
    (source.path / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    for read in (lambda: PatternStore(source.path), lambda: store.reopen(source.path)):
        with pytest.raises(UserError, match=r"a store of format 99, this program reads 2; .* prune"):
            read()
    (source.path / "manifest.json").unlink()
    (source.path / "manifest.json").mkdir()  # which can't be read as a file
    with pytest.raises(UserError, match=r"manifest.json: can't be read"):
        store.reopen(source.path)
    assert partial.is_dir() and first_file(source).is_file() and (tmp_path / "elsewhere").is_dir()


def test_a_resumed_store_is_verified_and_keeps_its_thresholds(tmp_path, monkeypatch):
    whole = run_collect(tmp_path / "whole")
    writes, write = [6], store._write_array

    def dying(path, value):
        writes[0] -= 1
        if writes[0] < 0:
            raise KeyboardInterrupt
        return write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_array", dying)
        with pytest.raises(KeyboardInterrupt):
            run_collect(tmp_path)
    (partial,) = tmp_path.glob("*.partial")
    shutil.copytree(partial, tmp_path / "kept")
    with monkeypatch.context() as patch:  # a new calibration would give other thresholds
        patch.setattr(Collector, "calibrate", lambda *args: {"neuron": torch.zeros(3)})
        source = run_collect(tmp_path)
    assert torch.equal(source.info.rule.thresholds["neuron"], whole.info.rule.thresholds["neuron"])
    assert torch.equal(
        source.block(0, 7, ["patterns.neuron"]).patterns["neuron"],
        whole.block(0, 7, ["patterns.neuron"]).patterns["neuron"],
    )
    assert not (source.path / store.THRESHOLDS).exists()

    shutil.rmtree(source.path)
    (tmp_path / "kept").rename(partial)
    damaged = next(iter(sorted(partial.glob("*-patterns*.npy"))))
    damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    with pytest.raises(UserError, match="its checksum differs from the manifest's"):
        run_collect(tmp_path)


def test_another_process_may_have_collected_meanwhile(tmp_path, monkeypatch):
    find, looks = store.find_store, []

    def late(folder, info):  # another process collects them between the first look and the lock
        looks.append(1)
        return None if len(looks) == 1 else find(folder, info)

    expected = run_collect(tmp_path)
    monkeypatch.setattr(collect, "find_store", late)
    monkeypatch.setattr(store, "_write_array", None)
    assert run_collect(tmp_path).path == expected.path and len(looks) == 2


def test_a_store_keeps_no_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", 1)
    source = run_collect(tmp_path, windows=make_windows(40, 4))
    before = len(list(Path("/proc/self/fd").iterdir()))
    again = PatternStore(source.path)
    again.block(0, 40, again.info.fields())
    again.rows("patterns.neuron", torch.zeros(40, dtype=torch.int64), torch.arange(40) * 4)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_too_little_room_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(UserError, match="the patterns need .* are free; make room, lower data.fit_windows"):
        run_collect(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".npy", ".json")]


def test_a_full_disk_keeps_whole_shards_and_no_partial_file(tmp_path, monkeypatch):
    original, left = store._write_array, [5]

    def full(path, value):
        if not left[0]:
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        left[0] -= 1
        return original(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_array", full)
        with pytest.raises(UserError, match="the disk is full; 1 of . shards are kept"):
            run_collect(tmp_path)
    partial = next(tmp_path.glob("*.partial"))
    assert not list(partial.glob("*.tmp")) and not list(partial.glob("00001-*"))
    assert run_collect(tmp_path).info.tokens == 7 * 16


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_activations_that_are_not_finite_name_layer_and_window(tmp_path, poison):
    model = tiny.make_model()
    original = model.model.layers[1].mlp.up_proj.forward
    calls = []

    def poisoned(hidden):
        calls.append(1)
        value = original(hidden)
        if len(calls) == 4:  # after the check of two tokens, the third pass: windows 4 and 5
            value[0, 3, 7] = poison
        return value

    model.model.layers[1].mlp.up_proj.forward = poisoned
    with pytest.raises(UserError, match=r"layer 1 \(model\.layers\.1\.mlp\), site neuron, windows 4, 5"):
        run_collect(tmp_path, model, active="top", storage="memory")


def test_importance_bins_are_2_to_the_minus_10_wide():
    values = torch.rand(10_000) + 0.1
    edges = ((values.view(torch.int32) >> HISTOGRAM_SHIFT) << HISTOGRAM_SHIFT).view(torch.float32)
    assert ((values - edges) / values).max() < 2**-10


def test_a_loader_yields_each_row_once_and_resumes_at_its_place(tmp_path):
    source = run_collect(tmp_path)
    for batch_tokens in (None, 10):
        loader = BlockLoader(source, ["patterns.neuron"], 2, seed=3, batch_tokens=batch_tokens)
        epochs = [[batch.positions.tolist() for batch in loader] for _ in range(2)]
        assert len(epochs[0]) == len(loader) and epochs[0] != epochs[1]
        assert all(sorted(sum(epoch, [])) == list(range(7 * 16)) for epoch in epochs)
        for stop in range(len(loader) + 1):
            first, second = (
                BlockLoader(source, ["patterns.neuron"], 2, seed=3, batch_tokens=batch_tokens) for _ in range(2)
            )
            iterator = iter(first)
            head = [next(iterator).positions.tolist() for _ in range(stop)]
            second.resume(first.progress())
            tail = [batch.positions.tolist() for batch in second]
            assert head + tail == epochs[0] if stop < len(loader) else tail == epochs[1]


@pytest.mark.parametrize(("windows", "each", "ranks"), [(9, 2, 1), (9, 2, 4), (9, 4, 4), (7, 8, 3), (4, 1, 4)])
def test_every_block_has_a_window_for_every_rank_and_every_window_a_rank(monkeypatch, windows, each, ranks):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    covered = []
    for first, last in block_ranges(windows, each):
        shares = [distributed.share(last - first, part, ranks) for part in range(ranks)]
        assert all(end > begin for begin, end in shares)
        covered += [first + window for begin, end in shares for window in range(begin, end)]
    assert covered == list(range(windows))


def test_fewer_windows_than_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 5)
    with pytest.raises(UserError, match="3 windows of text are too few for 5 processes"):
        block_ranges(3, 2)


def test_the_cache_lists_and_prunes(tmp_path, capsys):
    source = run_collect(tmp_path)
    cache.main(["--dir", str(tmp_path)])
    listed = capsys.readouterr().out
    assert source.path.name in listed and "112 tokens × 3 layers, neuron" in listed
    with pytest.raises(UserError, match="apc cache prune: names no store; give NAME, --partial or --all"):
        cache.main(["prune", "--dir", str(tmp_path)])
    with pytest.raises(UserError, match="nothing: no such store"):
        cache.main(["prune", "nothing", "--dir", str(tmp_path)])
    cache.main(["prune", source.path.name, "--dir", str(tmp_path)])
    assert not source.path.exists()


def test_a_thresholded_forward_sees_the_zeros_of_earlier_layers(tmp_path):
    model, sites = tiny.make_model(), ["gate", "up", "down"]
    dense = run_collect(tmp_path, model, sites=sites)
    zeroed = run_collect(tmp_path, model, sites=sites, forward="thresholded")
    assert zeroed.path != dense.path and zeroed.info.rule.thresholds.keys() == dense.info.rule.thresholds.keys()
    seen = {site: [[] for _ in range(3)] for site in sites}

    class Zeroing:
        def enter(self, layer, hidden):
            pass

        def visit(self, layer, site, values):
            active = values.abs() >= dense.info.rule.thresholds[site][layer]
            seen[site][layer].append(active.flatten(0, -2))
            return values * active

    hooks = FFNHooks(find_ffns(model), sites, Zeroing())
    with torch.inference_mode():
        for batch in make_windows(7).tokens.split(2):
            model.base_model(input_ids=batch, use_cache=False)
    hooks.remove()
    for site, layers in seen.items():
        expected = ops.pack(torch.stack([torch.cat(batches) for batches in layers]))
        assert torch.equal(zeroed.block(0, 7, [f"patterns.{site}"]).patterns[site], expected)
    assert not torch.equal(
        zeroed.block(0, 7, ["patterns.up"]).patterns["up"], dense.block(0, 7, ["patterns.up"]).patterns["up"]
    )
    with pytest.raises(UserError, match="collect.ffn_inputs=streamed runs the dense forward pass again"):
        CollectConfig(forward="thresholded", ffn_inputs="streamed")
    with pytest.raises(UserError, match="collect.forward=sparse: choose dense or thresholded"):
        CollectConfig(forward="sparse")


def test_bfloat16_survives_the_disk(tmp_path):
    source = run_collect(tmp_path)
    hidden = source.block(0, 7, ["hidden"]).hidden
    assert hidden.dtype == torch.bfloat16 and np.isfinite(hidden.float().numpy()).all()

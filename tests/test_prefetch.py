"""Prefetched blocks reach a GPU whole and in order, whichever are kept there; the codebook equals the CPU's."""

import contextlib

import pytest
import torch
from test_clustering import quiet_trainer

from apc import ops
from apc.cluster.lloyd import ClusteringModule
from apc.collect.loader import BlockLoader, PatternDataModule
from apc.collect.memory import ResidentPatterns
from apc.collect.patterns import ActiveRule, Block, PatternInfo
from apc.collect.prefetch import BlockStream
from apc.config.schema import ClusterConfig
from apc.utils.errors import UserError

LAYERS, WINDOWS, SEQ_LEN, D, HIDDEN = 3, 11, 64, 200, 24
RANGES = [(0, 3), (3, 4), (4, 9), (9, 11), (0, 3), (4, 9)]
gpu = pytest.mark.gpu
PLACES = ["cpu", pytest.param("locked", marks=gpu), pytest.param("cuda", marks=gpu)]


def make_source(place="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = WINDOWS * SEQ_LEN
    importance = (torch.rand(LAYERS, n, D, generator=generator).pow(3) * 255).to(torch.uint8)
    active = importance > 60
    info = PatternInfo(
        LAYERS,
        HIDDEN,
        D,
        WINDOWS,
        SEQ_LEN,
        {"neuron": D},
        ActiveRule("top", 0.5),
        True,
        True,
        {},
        {"neuron": active.sum(1)},
    )
    source = ResidentPatterns(
        info, list(range(WINDOWS)), torch.device("cuda" if place == "cuda" else "cpu"), locked=place == "locked"
    )
    hidden = torch.randn(LAYERS, n, HIDDEN, generator=generator).bfloat16()
    named = {
        "patterns.neuron": ops.pack(active),
        "importance.neuron": importance,
        "scale.neuron": torch.rand(LAYERS, n, generator=generator),
        "hidden": hidden,
    }
    source.add(Block.of_windows(named, range(WINDOWS), SEQ_LEN))
    return source


def test_info_gives_the_shape_and_type_of_each_field():
    source = make_source()
    for name, value in source.block(1, 4, source.info.fields()).tensors().items():
        assert source.info.field(name, 3 * SEQ_LEN) == (tuple(value.shape), value.dtype)


class HostStream:
    """A CUDA stream whose copies complete at once, to test without a GPU which blocks are kept and freed."""

    def record_event(self):
        return self

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: HostStream())
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda value: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: value)

    def stream(source, keep_bytes):
        blocks = BlockStream(source, source.info.fields(), None, keep_bytes)
        blocks.device, blocks._copies = torch.device("cpu"), HostStream()
        return blocks

    return stream


@pytest.mark.parametrize("keep_bytes", [0, 1 << 18, 1 << 30], ids=["nothing-kept", "some-kept", "all-kept"])
@pytest.mark.parametrize(
    "ranges",
    [RANGES, [(0, 3), (0, 3), (3, 4), (3, 4)], [(2, 2), (0, 11)]],
    ids=["again-later", "again-at-once", "empty"],
)
def test_kept_blocks_are_reused_and_released(without_a_gpu, ranges, keep_bytes):
    source = make_source()
    stream = without_a_gpu(source, keep_bytes)
    for _ in range(2):
        for _ in range(2):
            for (first, last), block in zip(ranges, stream.blocks(ranges), strict=True):
                expected = source.block(first, last, source.info.fields())
                assert torch.equal(block.positions, expected.positions)
                assert all(torch.equal(value, expected.tensors()[name]) for name, value in block.tensors().items())
        kept_bytes = sum(value.nbytes for block in stream._kept.values() for value in block.tensors().values())
        assert stream.keep_bytes == keep_bytes - kept_bytes >= 0
        if keep_bytes == 1 << 30:
            assert set(stream._kept) == set(ranges)
            read, source.block = source.block, None  # nothing is read again
            assert len(list(stream.blocks(ranges))) == len(ranges)
            source.block = read
        stream.release()
        assert stream.keep_bytes == keep_bytes and not stream._kept


class Failing:
    """A source that can't read blocks from some window on."""

    def __init__(self, source, from_window):
        self.info, self.from_window, self._source, self.resident = source.info, from_window, source, None

    def host_fields(self, fields):
        return fields

    def block(self, first, last, fields):
        if first >= self.from_window:
            raise UserError(f"window {first} cannot be read")
        return self._source.block(first, last, fields)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_a_read_error_is_raised_when_its_block_is_due(device):
    stream = BlockStream(Failing(make_source(), 3), ["patterns.neuron"], torch.device(device))
    blocks = stream.blocks([(0, 3), (3, 4), (4, 9)])
    assert next(blocks).tokens == 3 * SEQ_LEN
    with pytest.raises(UserError, match="window 3 cannot be read"):
        next(blocks)
    blocks = stream.blocks([(0, 3), (3, 4)])
    next(blocks)
    blocks.close()  # the error of a block that nobody needs is ignored


@pytest.mark.parametrize("stays", [True, False])
def test_derived_values_of_rows_that_stay_are_kept_until_release(stays):
    source = make_source()
    stream = BlockStream(source if stays else Failing(source, WINDOWS), ["patterns.neuron"])

    def count_derived():
        names = []
        for block in stream.blocks([(0, 3), (3, WINDOWS)]):
            names += [*block.derived]
            block.to("cpu").derived["totals"] = block.positions
        return len(names)

    assert [count_derived(), count_derived()] == [0, 2 * stays]
    stream.release()
    assert count_derived() == 0


@gpu
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("keep_bytes", [0, 1 << 18, 1 << 30], ids=["nothing-kept", "some-kept", "all-kept"])
def test_blocks_on_a_gpu_are_those_of_the_source(place, keep_bytes):
    source = make_source(place)
    fields = source.info.fields()
    stream = BlockStream(source, fields, torch.device("cuda", 0), keep_bytes)
    for _ in range(2):
        blocks = []
        for block in stream.blocks(RANGES):
            busy = torch.randn(2048, 2048, device="cuda")
            for _ in range(20):  # keeps the GPU behind the host, so that copies could overtake it
                busy = busy @ busy / 64
            blocks.append(block.to("cuda"))
        for (first, last), block in zip(RANGES, blocks, strict=True):
            expected = source.block(first, last, fields)
            assert torch.equal(block.positions.cpu(), expected.positions) and block.hidden.is_cuda
            for name, value in block.tensors().items():
                assert torch.equal(value.cpu(), expected.tensors()[name].cpu()), name
    assert (keep_bytes > stream.keep_bytes) == (keep_bytes > 0 and place != "cuda")
    stream.release()
    assert stream.keep_bytes == keep_bytes


@gpu
def test_a_stream_that_was_left_early_starts_again():
    source = make_source("locked")
    stream = BlockStream(source, ["patterns.neuron"], torch.device("cuda", 0), 1 << 16)
    next(iter(stream.blocks(RANGES)))
    for (first, last), block in zip(RANGES, stream.blocks(RANGES), strict=True):
        assert torch.equal(
            block.patterns["neuron"].cpu(), source.block(first, last, ["patterns.neuron"]).patterns["neuron"]
        )


def fit(source, device, keep_bytes=0, **options):
    module = ClusteringModule(ClusterConfig(**(dict(k=9, max_epochs=6, tolerance=0.0) | options)), source.info, 0)
    trainer = quiet_trainer(accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=6)
    loader = BlockLoader(source, module.fields(), 2, 0, device=torch.device(device), keep_bytes=keep_bytes)
    trainer.fit(module, datamodule=PatternDataModule(source, loader))
    return module.cpu()


@gpu
@pytest.mark.parametrize("scope", ["layer", "pooled"])
@pytest.mark.parametrize("weighting", ["binary", "magnitude", "energy"])
@pytest.mark.parametrize("schedule", ["epoch", "step"])
def test_the_codebook_is_the_same_on_a_gpu(weighting, scope, schedule):
    options = dict(weighting=weighting, scope=scope, schedule=schedule)
    expected = fit(make_source(), "cpu", **options)
    for place, keep_bytes in (("locked", 0), ("locked", 1 << 16), ("cpu", 1 << 30), ("cuda", 0)):
        module = fit(make_source(place), "cuda", keep_bytes, **options)
        for name, value in expected.named_buffers():
            assert torch.equal(value, module.get_buffer(name)), name

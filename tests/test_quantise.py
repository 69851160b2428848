"""FFN weights stored at a few bits: every weight is its group's nearest level, and all stored bits are counted."""

import copy
import itertools

import pytest
import torch

import tiny
from apc.config.load import load_config
from apc.config.schema import ModelConfig
from apc.data.ffn import find_ffns
from apc.data.models import load_model, weights_sample
from apc.data.quantise import Levels, mean_bits, nearest_levels, neuron_bits, neuron_rows, quantise_ffns, stored
from apc.utils.errors import UserError

D, E = 52, 32  # neurons and hidden size of `tiny.make_model`


def random_rows(rows=20, length=E, seed=0):
    values = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(-2, 2, rows).unsqueeze(1)


def random_levels(bits, group, rows=9, length=E, seed=0):
    """Levels, and indices k [rows, length] that reach the lowest and the highest level in every group."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows, -(-length // group)
    low, step = torch.randint(-127, 0, shape, generator=generator), torch.randint(1, 256, shape, generator=generator)
    low[:, 0], step[:, 0] = -127, 255
    row_low, row_step = torch.rand(2, rows, generator=generator).add(0.5).half()
    index = torch.randint(2**bits, (rows, length), generator=generator)
    for start in range(0, length, group):
        index[:, start], index[:, min(start + group, length) - 1] = 0, 2**bits - 1
    return Levels(bits, group, low.to(torch.int8), step.to(torch.uint8), row_low, row_step), index.float()


def slow_levels(levels, row, column):
    """All levels of one weight, lowest first, in Python's own numbers."""
    group = column // levels.group
    low = int(levels.low[row, group]) * float(levels.row_low[row]) / 127
    step = int(levels.step[row, group]) * float(levels.row_step[row]) / 255
    return [low + step * k for k in range(2**levels.bits)]


CASES = [(bits, group) for bits in (2, 3, 4, 6, 8) for group in (8, 12, 32)] + [(4, 1), (4, 31)]


@pytest.mark.parametrize(("bits", "group"), CASES)
def test_every_weight_becomes_its_groups_nearest_level(bits, group):
    rows = random_rows()
    levels = nearest_levels(rows, bits, group)
    values, index = levels.value(levels.index(rows)), levels.index(rows)
    for row, column in itertools.product(range(len(rows)), range(E)):
        each, weight = slow_levels(levels, row, column), float(rows[row, column])
        nearest = min(each, key=lambda level: abs(level - weight))  # noqa: B023
        assert abs(values[row, column] - weight) <= abs(nearest - weight) + 1e-6 * rows[row].abs().max()
        expected = pytest.approx(each[int(index[row, column])], abs=1e-6 * float(rows[row].abs().max()))
        assert values[row, column].item() == expected


@pytest.mark.parametrize(("bits", "group"), [(2, 8), (3, 12), (4, 15), (4, 32), (8, 6)])
def test_weights_that_lie_on_levels_keep_their_values(bits, group):
    levels, index = random_levels(bits, group)
    rows = levels.value(index)
    found = nearest_levels(rows, bits, group)
    assert torch.equal(levels.index(rows), index)
    assert torch.allclose(found.value(found.index(rows)), rows, atol=1e-6 * float(rows.abs().max()))


def stored_rows(symmetric, stored_group, dtype, rows=40, length=256):
    """Rows as other libraries store them at 4 bits, in groups with a bfloat16 scale; and each weight's scale."""
    groups = random_rows(rows, length, seed=3).unflatten(1, (-1, stored_group))
    least, most = groups.aminmax(dim=2, keepdim=True)
    widest = torch.maximum(-least, most) / 7.5 if symmetric else (most - least) / 15
    scale = widest.bfloat16().float()
    zero = -8.0 if symmetric else (least / scale).round()
    values = ((groups / scale - zero).round().clamp(0, 15) + zero) * scale
    return values.flatten(1).to(dtype).float(), scale.expand_as(groups).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("stored_group", "group"), [(128, 128), (128, 32), (64, 32), (32, 32)])
def test_weights_that_were_stored_at_4_bits_keep_their_levels(stored_group, group, symmetric, dtype):
    """Also where a group does not reach its lowest and highest level; low and step are rounded to 8 bits."""
    rows, scale = stored_rows(symmetric, stored_group, dtype)
    levels = nearest_levels(rows, 4, group)
    off = (levels.value(levels.index(rows)) - rows).abs()
    step, low = levels.units.unbind(1)
    bound = (15 * step + low).unsqueeze(1) / 2 + rows.abs().amax(1, keepdim=True) * 2**-8
    assert (off <= bound).all()
    assert (off / scale).square().mean().sqrt() < 0.03  # rounding costs 0.29 steps


def test_groups_and_rows_do_not_share_levels():
    rows = random_rows(4)
    rows[:, 12:24] = 0.001 * rows[:, 12:24] + rows[:, :1]  # the second group is narrow and lies elsewhere
    levels = nearest_levels(rows, 4, 12)
    assert levels.low.shape == levels.step.shape == (4, 3)  # 12, 12 and 8 weights
    assert (levels.step[:, 1] * 50 < levels.step[:, 0]).all()
    for row in range(4):
        alone = nearest_levels(rows[row : row + 1], 4, 12)
        assert torch.equal(alone.value(alone.index(rows[row : row + 1]))[0], levels.value(levels.index(rows))[row])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_squared_error_is_at_most_that_of_levels_from_least_to_most(bits):
    rows = random_rows(200)
    groups = rows.view(200, -1, 8)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (most - least) / (2**bits - 1)
    plain = (least + ((groups - least) / step).round() * step).view_as(rows)
    levels = nearest_levels(rows, bits, 8)
    error = (levels.value(levels.index(rows)) - rows).square().sum()
    # The lowest level and the spacing are rounded too, which shows at many bits only.
    assert error < (plain - rows).square().sum() * (1.3 if bits == 8 else 1)


@pytest.mark.parametrize("rows", [torch.zeros(3, 8), torch.full((3, 8), -2.5), torch.full((3, 8), 1e-9)])
def test_equal_weights_are_kept(rows):
    levels = nearest_levels(rows, 3, 4)
    assert torch.allclose(levels.value(levels.index(rows)), rows, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(("bits", "planes"), [(4, 4), (4, 3), (4, 2), (3, 1), (8, 5)])
def test_upper_planes_give_the_mean_of_the_levels_that_they_leave_possible(bits, planes):
    levels, index = random_levels(bits, 12)
    upper = levels.upper(index, planes)
    for row, column in itertools.product(range(len(index)), range(E)):
        each, k = slow_levels(levels, row, column), int(index[row, column])
        possible = [level for other, level in enumerate(each) if other >> (bits - planes) == k >> (bits - planes)]
        assert upper[row, column].item() == pytest.approx(sum(possible) / len(possible), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", list(tiny.EVERY_FAMILY))
def test_only_ffn_weights_change_and_spared_neurons_keep_theirs(family):
    model = tiny.make_model(family)
    before, ffns = copy.deepcopy(model), find_ffns(model)
    assert quantise_ffns(model, 3, group=8, spared=5) is model
    names = {name for name, value in before.named_parameters() if not torch.equal(value, model.get_parameter(name))}
    assert names and all(any(part in name for part in ("mlp", "fc", "moe", "dense", "feed")) for name in names)
    for ffn, old in zip(ffns, find_ffns(before), strict=True):
        D, peaks = old.width, old.down_matrix.detach().abs().amax(0)
        largest = sorted(range(D), key=lambda i: (-float(peaks[i]), i))[:5]  # noqa: B023
        assert stored(ffn).spared.nonzero().flatten().tolist() == sorted(largest)
        rest = [i for i in range(D) if i not in largest]
        for name, rows in neuron_rows(ffn).items():
            assert torch.equal(rows[largest], neuron_rows(old)[name][largest])
            assert all(len(set(group)) <= 8 for i in rest for group in rows[i].view(-1, 8).tolist())
            assert (rows[rest] != neuron_rows(old)[name][rest]).any()


def test_quantising_twice_is_quantising_once():
    once, twice = (tiny.make_model() for _ in range(2))
    quantise_ffns(once, 4, spared=3)
    quantise_ffns(quantise_ffns(twice, 4, spared=3), 4, spared=3)
    assert all(torch.equal(value, twice.get_parameter(name)) for name, value in once.named_parameters())
    with pytest.raises(UserError, match="already stored at 4 bits in groups of 32, with 3 neurons spared; load"):
        quantise_ffns(twice, 3, spared=3)


def test_stored_bits_count_weights_levels_and_spared_neurons():
    model = tiny.make_model()
    ffns = find_ffns(model)
    assert mean_bits(ffns) == 16 and neuron_bits(ffns[0]).tolist() == [16] * D
    quantise_ffns(model, 4, group=12, spared=2)
    row = (4 * E + 3 * (8 + 8) + 2 * 16) / E  # three groups, the last of 8 weights
    assert sorted(neuron_bits(ffns[1]).tolist()) == [row] * (D - 2) + [16, 16]
    assert mean_bits(ffns) == pytest.approx((row * (D - 2) + 32) / D)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_levels_are_found_again_in_weights_of_any_type(dtype, bits):
    model = tiny.make_model().to(getattr(torch, dtype))
    quantise_ffns(model, bits, spared=0)
    for ffn in find_ffns(model):
        for name, rows in neuron_rows(ffn).items():
            levels = stored(ffn).levels[name]
            assert torch.equal(levels.value(levels.index(rows)).to(rows.dtype), rows)


def test_a_copy_of_a_model_is_stored_as_the_model_is():
    model = quantise_ffns(tiny.make_model(), 4)
    assert mean_bits(find_ffns(copy.deepcopy(model))) == mean_bits(find_ffns(model)) < 16


def test_a_run_loads_the_same_bits_each_time(tmp_path):
    path = str(tiny.save_model(tmp_path / "model"))
    plain, first, second = (
        load_model(ModelConfig(path=path, device="cpu", ffn_bits=bits), torch.device("cpu"))[0] for bits in (None, 4, 4)
    )
    assert weights_sample(first) == weights_sample(second) != weights_sample(plain)
    quantise_ffns(plain, 4)
    assert weights_sample(first) == weights_sample(plain)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.ffn_bits=5"], "model.ffn_bits=5: choose 2, 3, 4, 6 or 8, or null for 16"),
        (["model.ffn_bits=4", "model.ffn_group=0"], "model.ffn_group must be at least 1, got 0"),
        (["model.ffn_bits=4", "model.ffn_spared=-1"], "model.ffn_spared must be at least 0, got -1"),
        (["model.ffn_bits=4", "speed=true"], "speed=true: kernels read weights of 16 bits, not of model.ffn_bits=4"),
    ],
)
def test_settings_that_make_no_sense_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        load_config(None, words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(group=64), "model.ffn_group=64: a row of the FFNs has 32 weights; lower it"),
        (dict(spared=53), "model.ffn_spared=53: the FFNs have 52 neurons; lower it"),
    ],
)
def test_settings_that_do_not_fit_the_ffns_are_refused(options, message):
    model = tiny.make_model()
    with pytest.raises(UserError, match=message):
        quantise_ffns(model, 4, **options)
    assert mean_bits(find_ffns(model)) == 16

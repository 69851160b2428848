"""Models stored at few bits by other libraries are read as plain ones, with the values that the formats stand for."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import apc
import tiny
from apc.config.schema import ModelConfig
from apc.data.dequantise import dequantise
from apc.data.ffn import find_ffns
from apc.data.models import load_model, weights_sample
from apc.utils.errors import UserError

E, D, GROUP = 128, 256, 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plain_model():
    return tiny.make_model(hidden_size=E, width=D, layers=2).to(torch.bfloat16)


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path | str):
    return load_model(ModelConfig(path=str(folder), device="cpu"), torch.device("cpu"))[0]


def tensors(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def set_packing(folder: Path, packing: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packing}))


def check_values(model, stored: dict, values) -> None:
    """Every projection is a plain layer with values(its name), rounded to the model's type; all else is as stored."""
    seen = 0
    for name, own in model.state_dict().items():
        assert type(own) is torch.Tensor and own.dtype == torch.bfloat16
        if name.endswith(tuple(f"{each}.weight" for each in PROJECTIONS)):
            assert own.equal(values(name.removesuffix(".weight")).to(torch.bfloat16)), name
            seen += 1
        else:
            assert own.equal(stored[name])
    assert seen == 2 * len(PROJECTIONS)
    assert all(type(ffn.down) is torch.nn.Linear for ffn in find_ffns(model))


def save_fp8(folder: Path) -> Path:
    """A model whose projections are float8 in blocks of 64 × 64, each with a factor, as DeepSeek stores them."""
    stored = tensors(save(plain_model(), folder))
    for name in [name for name in stored if name.endswith(tuple(f"{each}.weight" for each in PROJECTIONS))]:
        blocks = stored[name].float().unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
        scale = blocks.abs().amax((1, 3)) / 448
        packed = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        stored |= {name: packed, f"{name}_scale_inv": scale}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    set_packing(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]})
    return folder


def test_fp8_in_blocks(tmp_path):
    model, stored = load(save_fp8(tmp_path / "model")), tensors(tmp_path / "model")

    def values(name):
        scale = stored[f"{name}.weight_scale_inv"].repeat_interleave(64, 0).repeat_interleave(64, 1)
        return stored[f"{name}.weight"].float() * scale

    check_values(model, stored, values)


FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def test_mxfp4_experts(tmp_path):
    """Blocks of 32 numbers of 4 bits with a power of two, as gpt-oss stores its experts."""
    model = tiny.make_model("gpt_oss", hidden_size=64, width=32, layers=2).to(torch.bfloat16)
    stored, expected, generator = tensors(save(model, tmp_path)), {}, torch.Generator().manual_seed(0)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 126, blocks.shape[:3], generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = torch.tensor(FP4)[torch.stack([blocks & 15, blocks >> 4], dim=4).flatten(3).long()]
        expected[name] = (numbers * 2.0 ** (scales[..., None].float() - 127)).flatten(2).transpose(1, 2)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    set_packing(tmp_path, {"quant_method": "mxfp4"})
    loaded = load(tmp_path).state_dict()
    assert len(expected) == 4 and all(loaded[name].equal(values.bfloat16()) for name, values in expected.items())


INT_FORMATS = {
    "int4-symmetric": dict(num_bits=4, symmetric=True, strategy="group", group_size=GROUP),
    "int4-asymmetric": dict(num_bits=4, symmetric=False, strategy="group", group_size=GROUP),
    "int8-rows": dict(num_bits=8, symmetric=True, strategy="channel"),
    "int8-rows-and-inputs": dict(num_bits=8, symmetric=True, strategy="channel"),
}
ROUNDED_INPUTS = dict(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)


def save_compressed(folder: Path, bits: dict, inputs: dict | None = None) -> Path:
    """A model that compressed-tensors stores: `pack-quantized`, or `int-quantized` if inputs are rounded too."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model, highest = plain_model(), 2 ** (bits["num_bits"] - 1)
    scheme = {"targets": ["Linear"], "weights": {"type": "int", **bits}, "input_activations": inputs}
    settings = {"config_groups": {"all": scheme}, "ignore": ["lm_head"]}
    apply_quantization_config(model, QuantizationConfig.model_validate(settings))
    for module in model.modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        rows = module.weight.float().unflatten(1, (-1, bits.get("group_size", module.weight.shape[1])))
        if bits["symmetric"]:
            module.weight_scale.data.copy_(rows.abs().amax(-1) / (highest - 0.5))
            continue
        least, most = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
        module.weight_scale.data.copy_((most - least) / (2 * highest - 1))
        module.weight_zero_point.data.copy_((-highest - least / module.weight_scale.float()).round())
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save(model, folder)
    compressor.update_config(folder)
    return folder


def unpacked(words, bits, length):
    """Signed numbers that int32 words [R, S] hold, lowest bits first; [R, length]."""
    numbers = torch.stack([words >> shift & (2**bits - 1) for shift in range(0, 32, bits)], dim=2).flatten(1)
    return (numbers[:, :length] - 2 ** (bits - 1)).float()


@pytest.mark.parametrize("form", list(INT_FORMATS))
def test_compressed_tensors(tmp_path, form):
    pytest.importorskip("compressed_tensors")
    bits, inputs = INT_FORMATS[form], ROUNDED_INPUTS if form.endswith("inputs") else None
    model, stored = load(save_compressed(tmp_path / "model", bits, inputs)), tensors(tmp_path / "model")

    def values(name):
        if inputs:
            return stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float()
        R, length = stored[f"{name}.weight_shape"].tolist()
        scale, zero = stored[f"{name}.weight_scale"].float(), torch.zeros(())
        if not bits["symmetric"]:
            zero = unpacked(stored[f"{name}.weight_zero_point"].T, 4, R).T.unsqueeze(2)
        numbers = unpacked(stored[f"{name}.weight_packed"], bits["num_bits"], length).unflatten(1, (scale.shape[1], -1))
        return ((numbers - zero) * scale.unsqueeze(2)).flatten(1)

    check_values(model, stored, values)


def save_torchao(folder: Path, settings, change=lambda model: None) -> Path:
    from transformers import TorchAoConfig

    save(plain_model(), folder / "plain")
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=TorchAoConfig(settings))
    change(model)
    return save(model, folder / "model")


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_int8_rows_and_int4_groups(tmp_path, bits):
    quantization = pytest.importorskip("torchao.quantization")
    if bits == 8:
        settings = quantization.Int8WeightOnlyConfig()
    else:
        settings = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(GROUP))
    folder = save_torchao(tmp_path, settings)
    stored = tensors(folder)

    def values(name):
        scale = stored[f"{name}._weight_scale"].float()
        numbers = stored[f"{name}._weight_qdata"].float().unflatten(1, (scale.shape[1] if bits == 4 else 1, -1))
        return (numbers * scale.view(len(numbers), -1, 1)).flatten(1)

    check_values(load(folder), stored, values)


def int4_tensor(quantization, weight):
    """A weight as torchao's `Int4WeightOnlyConfig` stores it, which needs a GPU."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    least, most = groups.aminmax(dim=2)
    scale = (most - least) / 15
    numbers = ((groups - least[:, :, None]) / scale[:, :, None]).round().flatten(1).to(torch.int8) - 8
    pairs = numbers[:, ::2] & 15 | numbers[:, 1::2] << 4
    scale, zero = (each.T.contiguous().to(torch.bfloat16) for each in (scale, least + 8 * scale))
    return quantization.Int4Tensor(pairs, scale, zero, [1, GROUP], weight.shape), numbers


def test_torchao_int4_tensors(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    numbers = {}

    def change(model):
        for name, module in plain_model().named_modules():
            if name.endswith(PROJECTIONS):
                tensor, numbers[name] = int4_tensor(quantization, module.weight)
                model.get_submodule(name).weight = torch.nn.Parameter(tensor, requires_grad=False)
        model.config.quantization_config.quant_type = quantization.Int4WeightOnlyConfig(group_size=GROUP)

    folder = save_torchao(tmp_path, quantization.Int8WeightOnlyConfig(), change)
    stored = tensors(folder)

    def values(name):
        scale, zero = (stored[f"{name}._weight_{part}"].T.float().unsqueeze(2) for part in ("scale", "zero_point"))
        return (numbers[name].float().unflatten(1, (-1, GROUP)) * scale + zero).flatten(1)

    assert "Int4WeightOnlyConfig" in (folder / "config.json").read_text()
    check_values(load(folder), stored, values)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_int8_rows_and_nf4(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    save(plain_model(), tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    model, stored = load(save(model, tmp_path / "model")), tensors(tmp_path / "model")

    def values(name):
        data = stored[f"{name}.weight"]
        if bits == 8:
            return data * stored[f"{name}.SCB"][:, None] * 7.874015718698502e-3  # 1 / 127
        table, scale = stored[f"{name}.weight.quant_map"], stored[f"{name}.weight.absmax"]
        numbers = torch.stack([data.flatten() >> 4, data.flatten() & 15], dim=1).long().view(len(scale), -1)
        return (table[numbers] * scale[:, None]).view(model.get_submodule(name).weight.shape)

    check_values(model, stored, values)


PACKED = {
    "fp8": lambda folder, _: save_fp8(folder),
    "compressed_tensors": lambda folder, _: save_compressed(folder, INT_FORMATS["int4-asymmetric"]),
    "torchao.quantization": lambda folder, package: save_torchao(folder, package.Int8WeightOnlyConfig()),
}


@pytest.mark.parametrize("package", list(PACKED))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_type_is_that_of_all_weights(tmp_path, package, dtype):
    module = None if package == "fp8" else pytest.importorskip(package)
    cfg = ModelConfig(path=str(PACKED[package](tmp_path / "model", module)), device="cpu", dtype=dtype)
    model, own = load_model(cfg, torch.device("cpu"))[0], load(cfg.path)
    for name, value in model.named_parameters():
        assert value.dtype == getattr(torch, dtype)
        torch.testing.assert_close(value.bfloat16(), own.get_parameter(name), rtol=2**-7, atol=1e-7)


def test_a_run_of_a_packed_model_is_that_of_its_plain_copy(tmp_path):
    """train.py, a sparse model and a decoder."""
    tiny.make_text(tmp_path / "fit.txt", seed=1)
    tiny.make_text(tmp_path / "score.txt", words=600, seed=2)
    save(load(save_fp8(tmp_path / "model")), tmp_path / "copy")
    results = []
    for name in ("model", "copy"):
        words = tiny.tiny_overrides(tmp_path, **{"model.path": tmp_path / name, "run.name": name})
        done = tiny.command("train.py", *words)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / "runs" / name / "results.json").read_text()))
    assert results[0]["policies"] == results[1]["policies"]
    run, model, plain = apc.load_run(tmp_path / "runs" / "model"), load(tmp_path / "model"), load(tmp_path / "copy")
    assert weights_sample(model) == weights_sample(plain)
    tokens, decoded = torch.tensor([[3, 1, 4]]), []
    for each in (model, plain):
        apc.sparsify(each, run.codebook, run.predictor, "predicted", kernel="torch", strict=True)
        decoded.append(apc.GreedyDecoder(each, 1, 32).decode(tokens, 8))
    assert decoded[0].equal(decoded[1])


def test_a_packed_model_in_memory_is_named_and_can_be_unpacked(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    folder = save_torchao(tmp_path, quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UserError, match=r"^LlamaForCausalLM: its weights are packed \(torchao\); call apc\.deq"):
        find_ffns(model)
    assert apc.dequantise(model) is model and weights_sample(model) == weights_sample(load(folder))
    again = copy.deepcopy(model.state_dict())
    assert all(value.equal(again[name]) for name, value in dequantise(model).state_dict().items())
    by_hand = plain_model()  # its configuration does not say so
    quantization.quantize_(by_hand, quantization.Int8WeightOnlyConfig(), lambda _, name: name.endswith(PROJECTIONS))
    with pytest.raises(UserError, match=r"layers\.0\.mlp: its weights are packed \(torchao\); call apc\.dequantise"):
        find_ffns(by_hand)
    assert find_ffns(dequantise(by_hand))[1].down_matrix.equal(find_ffns(model)[1].down_matrix)


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("compressed-tensors", r"load it with from_pretrained\(…, quantization_config=CompressedTensorsConfig\(deq"),
        ("gguf", r"load it with from_pretrained\(…, quantization_config=GgufConfig\(dequantize=True\)\)$"),
        ("awq", r"load a float32, bfloat16 or float16 copy$"),
    ],
)
def test_a_model_in_memory_that_must_be_loaded_otherwise_says_how(method, advice):
    model = plain_model()
    model.config.quantization_config = {"quant_method": method}
    for call in (find_ffns, dequantise):
        with pytest.raises(UserError, match=rf"^Llama\w+: its weights are packed \({method}\); {advice}"):
            call(model)


def test_a_plain_model_stays_as_it_is():
    model = plain_model()
    before = list(model.parameters())
    assert all(one is other for one, other in zip(before, dequantise(model).parameters(), strict=True))


def test_layouts_that_torchao_can_not_unpack_are_refused():
    quantization = pytest.importorskip("torchao.quantization")
    model = plain_model()
    scales = torch.zeros(1024 // GROUP, D, 2, dtype=torch.bfloat16)
    tile = quantization.Int4TilePackedTo4dTensor(
        torch.zeros(D // 8, 8, 32, 4, dtype=torch.int32), scales, [1, GROUP], torch.Size((D, E))
    )
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(tile, requires_grad=False)
    problem = r"layers\.1\.mlp\.up_proj\.weight \(Int4TilePackedTo4dTensor\) is in a layout that torchao can't unpack;"
    with pytest.raises(UserError, match=problem):
        dequantise(model)
    tensor, _ = int4_tensor(quantization, plain_model().model.layers[1].mlp.up_proj.weight)
    tensor.act_pre_scale = torch.ones(E)
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(UserError, match=r"\(Int4Tensor\) has factors for its inputs \(act_pre_scale\)"):
        dequantise(model)


REFUSED = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4},
        "LlamaForCausalLM: its weights are packed (gptq), which can't be read; load a float32, bfloat16 or float16 "
        "copy, or one packed by compressed-tensors, fp8, mxfp4, torchao, bitsandbytes or in a .gguf file",
    ),
    "mixed": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}},
        },
        "LlamaForCausalLM: its weights are packed in 2 different ways (config_groups), and transformers unpacks only "
        "one; load a float32, bfloat16 or float16 copy",
    ),
    "reordered": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {"weights": {"num_bits": 4, "actorder": "group"}}},
        },
        "LlamaForCausalLM: its weights are packed in groups of columns out of order (actorder=group), which "
        "compressed-tensors no longer reads; load a float32, bfloat16 or float16 copy",
    ),
    "rotated": (
        {"quant_method": "compressed-tensors", "config_groups": {}, "transform_config": {"config_groups": {"a": 1}}},
        "LlamaForCausalLM: its weights are packed with inputs that are transformed too (transform_config), which is "
        "not supported; load a float32, bfloat16 or float16 copy",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
@pytest.mark.parametrize("flag", [(), ("--dry-run",)])
def test_what_can_not_be_read_is_refused_in_one_line(tmp_path, case, flag):
    packing, message = REFUSED[case]
    save(plain_model(), tmp_path / "model")
    set_packing(tmp_path / "model", packing)
    tiny.make_text(tmp_path / "fit.txt", seed=1)
    tiny.make_text(tmp_path / "score.txt", words=600, seed=2)
    done = tiny.command("train.py", *tiny.tiny_overrides(tmp_path), *flag)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {message}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", ["compressed-tensors", "torchao", "bitsandbytes"])
def test_a_missing_package_is_named(tmp_path, method, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    save(plain_model(), tmp_path / "model")
    set_packing(tmp_path / "model", {"quant_method": method})
    problem = (
        rf"its weights are packed \({method}\), and the package that reads them is missing; run pip install {method}$"
    )
    with pytest.raises(UserError, match=problem):
        load(tmp_path / "model")


def test_an_estimate_counts_the_plain_weights(tmp_path):
    save_fp8(tmp_path / "model")
    tiny.make_text(tmp_path / "fit.txt", seed=1)
    tiny.make_text(tmp_path / "score.txt", words=600, seed=2)
    done = tiny.command("train.py", *tiny.tiny_overrides(tmp_path), "--dry-run")
    assert done.returncode == 0, done.stderr

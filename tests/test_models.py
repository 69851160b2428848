"""Loading models; finding and hooking FFNs of several model families; errors name what is not supported."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    ViTConfig,
)

import families
import tiny
from apc import ops
from apc.collect.collector import Collector
from apc.collect.patterns import ActiveRule, Importance, by_ffn, quantise
from apc.config.schema import ModelConfig
from apc.data import hooks as hooks_module
from apc.data import models
from apc.data.ffn import check_calls, find_ffns
from apc.data.hooks import FFNHooks
from apc.data.models import load_model, resolve_device, weights_digest
from apc.estimate import estimate
from apc.utils.errors import UserError


class Recorder:
    def __init__(self, change=None):
        self.seen, self.inputs, self.change = {}, {}, change

    def enter(self, layer, hidden):
        self.inputs[layer] = hidden.clone()

    def visit(self, layer, site, values):
        self.seen[layer, site] = values.clone()
        return self.change(values) if self.change else None


def test_a_layer_that_runs_twice_or_never_is_an_error_that_names_it(tmp_path):
    model = tiny.make_model()
    ffns = find_ffns(model)
    check_calls(model, ffns)
    layers = model.model.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(UserError, match=r"Llama\w+: a forward pass runs model.layers.0.mlp 2 times"):
        check_calls(model, find_ffns(model))
    layers[1].mlp = ffns[1].module
    model.model.layers = torch.nn.ModuleList(layers[i] for i in (0, 2, 1))  # found in this order
    check_calls(model, find_ffns(model))
    with pytest.raises(UserError, match="does not run its layers in order"):
        check_calls(model, ffns)
    model.model.spare = ffns[0].module.__class__(model.config)
    with pytest.raises(UserError, match="a forward pass runs model.spare 0 times"):
        check_calls(model, find_ffns(model))


def test_a_looped_model_can_not_be_loaded(tmp_path):
    """Dory runs its layers twice; the check is part of loading, so every command refuses it."""
    families.build("dory").save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"Dory\w+: a forward pass runs model.layers.0.mlp 2 times; layers that are looped"
    ):
        load_model(ModelConfig(path=str(tmp_path), device="cpu"), torch.device("cpu"))


@pytest.mark.parametrize("shared", ["mlp.down_proj", "mlp.down_proj.weight"])
def test_ffns_that_share_a_linear_layer_or_its_weight_are_an_error_that_names_them(shared):
    model = tiny.make_model()
    place, _, name = shared.rpartition(".")
    first, last = (model.model.layers[layer].get_submodule(place) for layer in (0, 2))
    setattr(last, name, getattr(first, name))
    with pytest.raises(UserError, match=r"layers\.0\.mlp and model\.layers\.2\.mlp share a linear layer, which is not"):
        find_ffns(model)


def test_the_ffns_of_an_image_or_sound_encoder_in_the_decoder_are_left_alone():
    names = [ffn.name for ffn in find_ffns(families.build("phi4_multimodal"))]
    assert names == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_adapters_on_an_ffn_are_an_error_that_says_what_to_do():
    model = tiny.make_model()
    up = model.model.layers[1].mlp.up_proj
    up.base_layer = torch.nn.Identity()  # as PEFT's layers have one
    with pytest.raises(
        UserError,
        match=r"model.layers.1.mlp: its up_proj has an adapter \(torch.*Linear\), which masks would miss; merge",
    ):
        find_ffns(model)


@pytest.mark.parametrize("family", tiny.UNGATED_FAMILIES)
def test_hooks_see_an_ffn_without_a_gate(family):
    model = tiny.make_model(family)
    ffns, recorder = find_ffns(model), Recorder()
    assert not any(ffn.gated for ffn in ffns)
    hooks = FFNHooks(ffns, ["up", "neuron", "down"], recorder)
    with torch.no_grad():
        model(torch.arange(9)[None])
    hooks.remove()
    for layer, ffn in enumerate(ffns):
        up, down = ffn.up, ffn.down
        torch.testing.assert_close(recorder.seen[layer, "up"].flatten(0, -2), up(recorder.inputs[layer]).flatten(0, -2))
        torch.testing.assert_close(recorder.seen[layer, "down"], down(recorder.seen[layer, "neuron"]))
    values = recorder.seen[1, "neuron"].flatten(0, -2)
    alone = torch.stack([down_of(ffns[1], values * one).norm(dim=-1) for one in torch.eye(ffns[1].width)], dim=-1)
    torch.testing.assert_close(Importance(ffns)(1, "neuron", values), alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        UserError, match=r"sites=\['gate', 'up'\]: the model's FFNs have no gate; choose \[neuron\], or"
    ):
        FFNHooks(ffns, ["gate", "up"], recorder)


def down_of(ffn, values):
    """The down projection without its bias."""
    return ffn.down(values) - ffn.down(torch.zeros_like(values))


def weights_of(ffn):
    """(W_gate, W_up, W_down), fused or not."""
    if ffn.gate_up is not None:
        return *ffn.gate_up.weight.chunk(2), ffn.down.weight
    return ffn.gate.weight, ffn.up.weight, ffn.down.weight


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hooks_see_the_products_of_the_weights(family):
    model = tiny.make_model(family)
    ffns = find_ffns(model)
    recorder = Recorder()
    hooks = FFNHooks(ffns, ["gate", "up", "neuron", "down"], recorder)
    with torch.no_grad():
        model(torch.arange(9)[None])
    hooks.remove()
    for layer, ffn in enumerate(ffns):
        W_gate, W_up, W_down = weights_of(ffn)
        gate, up = recorder.inputs[layer] @ W_gate.T, recorder.inputs[layer] @ W_up.T
        act = getattr(ffn.module, "act_fn", None) or ffn.module.activation_fn
        for site, expected in dict(gate=gate, up=up, neuron=act(gate) * up, down=(act(gate) * up) @ W_down.T).items():
            torch.testing.assert_close(recorder.seen[layer, site], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("site", ["gate", "up", "neuron", "down"])
def test_values_that_a_visitor_returns_replace_the_site(family, site):
    model = tiny.make_model(family)
    recorder = Recorder()
    hooks = FFNHooks(find_ffns(model), [site], Recorder(change=torch.zeros_like))
    after = FFNHooks(find_ffns(model), ["down"], recorder)
    with torch.no_grad():
        model(torch.arange(9)[None])
    hooks.remove()
    after.remove()
    assert all(float(value.abs().max()) == 0 for (_, name), value in recorder.seen.items() if name == "down")


def test_importance_of_a_neuron_is_the_norm_of_its_output():
    model = tiny.make_model()
    ffns = find_ffns(model)
    values = torch.randn(5, ffns[1].width)
    expected = torch.stack(
        [(values[:, i : i + 1] * ffns[1].down.weight[:, i]).norm(dim=1) for i in range(ffns[1].width)], dim=1
    )
    torch.testing.assert_close(Importance(ffns)(1, "neuron", values), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(model_type="mamba", hidden_size=16, num_hidden_layers=1, vocab_size=11),
            "MambaForCausalLM: no FFN found",
        ),
    ],
    ids=["no-ffn"],
)
def test_an_unsupported_model_is_an_error_that_names_it(options, message):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    with pytest.raises(UserError, match=message):
        find_ffns(model)


def test_packed_weights_are_an_error_that_names_them():
    model = tiny.make_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UserError, match=r"Llama\w+: its weights are packed \(gptq\)"):
        find_ffns(model)
    del model.config.quantization_config
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(
        torch.zeros(32, 52, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp holds a Linear of torch\.uint8, packed weights"):
        find_ffns(model)


def test_the_digest_depends_on_the_weights_and_not_on_the_folder(tmp_path):
    digests = []
    for name in ("a", "b"):
        tiny.save_model(tmp_path / name)
        model, _ = load_model(ModelConfig(path=str(tmp_path / name), device="cpu"), torch.device("cpu"))
        digests.append(weights_digest(model))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-3
    assert digests[0] == digests[1] != weights_digest(model)


def test_a_missing_gpu_or_folder_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="model.device=cuda: this machine has 0 CUDA devices"):
        resolve_device("cuda")
    with pytest.raises(UserError, match=f"model.path={tmp_path}/none: no such folder"):
        load_model(ModelConfig(path=str(tmp_path / "none")), torch.device("cpu"))


def test_a_device_map_changes_no_pattern(tmp_path):
    """On this machine's GPUs, or on its CPU if it has none."""
    folder, device = tiny.save_model(tmp_path / "model"), resolve_device("auto")
    windows, books = torch.arange(64).view(2, 32), []
    for device_map in (None, "auto"):
        model, _ = load_model(ModelConfig(path=str(folder), device_map=device_map), device)
        books.append(
            Collector(model, ["neuron"], device)
            .block(windows, [0, 1], ActiveRule("top", 0.5), with_importance=True, with_hidden=True)
            .tensors()
        )
    assert all(torch.equal(value, books[1][name]) for name, value in books[0].items())


def test_hooks_see_layers_that_are_loaded_from_disk(tmp_path):
    """accelerate loads one layer from disk for its forward pass. Hooks work, but such a device map is an error."""
    model, recorders = tiny.make_model(), []
    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.layers.0": "cpu",
        "model.layers.2": "cpu",
    }
    for spread in (False, True):
        if spread:
            dispatch_model(model, places | {"model.layers.1": "disk"}, main_device="cpu", offload_dir=tmp_path)
        recorders.append(Recorder())
        hooks = FFNHooks(find_ffns(model), ["gate", "up", "neuron", "down"], recorders[-1])
        with torch.no_grad():
            model(torch.arange(9)[None])
        hooks.remove()
    assert all(torch.equal(value, recorders[1].seen[key]) for key, value in recorders[0].seen.items())
    with pytest.raises(
        UserError, match="no room for model.layers.1.* and 8 more parts of the model; use more GPUs or a smaller"
    ):
        models._check_map(model, torch.device("cpu"), torch.device("cpu"))


def test_visitors_get_all_layers_on_one_device(monkeypatch):
    """The device is `meta` here, so that any use of the values would fail."""
    model, seen = tiny.make_model(), []

    class Visitor:
        def enter(self, layer, hidden):
            seen.append(hidden.device.type)

        def visit(self, layer, site, values):
            seen.append(values.device.type)

    expected = model(torch.arange(9)[None]).logits
    monkeypatch.setattr(hooks_module, "first_device", lambda ffns: torch.device("meta"))
    hooks = FFNHooks(find_ffns(model), ["gate", "up", "neuron", "down"], Visitor())
    assert torch.equal(model(torch.arange(9)[None]).logits, expected) and seen == ["meta"] * 3 * 5
    hooks.remove()


def test_a_first_layer_on_another_device_is_an_error():
    with pytest.raises(UserError, match="the first layer is on cuda:0, in place of cuda:1; leave model.device=auto"):
        models._check_map(tiny.make_model(), torch.device("cuda", 0), torch.device("cuda", 1))


def load(folder):
    return load_model(ModelConfig(path=str(folder), device="cpu"), torch.device("cpu"))[0]


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def save_as(folder, auto_class):
    auto_class.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


INCOMPLETE = {
    "renamed-keys": (
        lambda folder: change_weights(folder, lambda kept: {f"other.{name}": value for name, value in kept.items()}),
        r"lack 30 of the 30 weights of LlamaForCausalLM: model.embed_tokens.weight, .*q_proj.weight, .* and 27 more",
    ),
    "one-weight": (
        lambda folder: change_weights(folder, lambda kept: {n: v for n, v in kept.items() if "1.mlp.up" not in n}),
        r"lack 1 of the 30 weights of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight; give a complete checkpoint",
    ),
    "layers": (
        lambda folder: change_config(folder, num_hidden_layers=4, layer_types=None),
        r"lack 9 of the 39 weights of LlamaForCausalLM: model.layers.3.self_attn.q_proj.weight, .* and 6 more",
    ),
    "classifier": (lambda folder: save_as(folder, AutoModelForSequenceClassification), "lack 1 .*: lm_head.weight;"),
    "no-head": (lambda folder: save_as(folder, AutoModel), "lack 1 of the 30 weights of .*: lm_head.weight;"),
    "shapes": (
        lambda folder: change_config(folder, intermediate_size=60),
        "9 of the 30 weights .* other shapes .*: .*0.mlp.gate_proj.weight is 52×32 in place of 60×32, .*6 more",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_checkpoint_without_all_weights_is_an_error_that_names_them(tmp_path, case, capfd):
    damage, line = INCOMPLETE[case]
    damage(tiny.save_model(tmp_path / "model"))
    capfd.readouterr()
    with pytest.raises(UserError, match=f"model.path={tmp_path}/model: .*{line}"):
        load(tmp_path / "model")
    assert "LOAD REPORT" not in capfd.readouterr().err  # transformers' table of the same


def test_tied_embeddings_and_buffers_of_older_files_are_not_missing_or_ignored(tmp_path, capfd):
    tied = tiny.save_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    model = load(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    older = tiny.save_model(tmp_path / "older")
    change_weights(older, lambda kept: kept | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load(older)
    assert "note:" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            lambda folder: change_config(folder, num_hidden_layers=2, layer_types=None),
            "model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
            "model.layers.2.mlp.gate_proj.weight and 6 more",
        ),
        (
            lambda folder: change_weights(folder, lambda kept: kept | {"q_proj.lora_A.weight": torch.ones(2, 32)}),
            "q_proj.lora_A.weight",
        ),
    ],
    ids=["more-layers", "lora"],
)
def test_a_note_names_the_tensors_that_a_model_ignores(tmp_path, change, names, capfd):
    change(tiny.save_model(tmp_path / "model"))
    load(tmp_path / "model")
    note = f"note: model.path={tmp_path}/model: LlamaForCausalLM ignores these tensors of its files: {names}"
    assert note in capfd.readouterr().err.splitlines()


def keep_only(folder, *names):
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def shard(folder, change):
    (folder / "model.safetensors").unlink()
    tiny.make_model().save_pretrained(folder, max_shard_size="20KB")
    change(folder)


REMOTE = {"AutoConfig": "configuration_zebra.Zebra", "AutoModelForCausalLM": "modeling_zebra.Zebra"}
DAMAGED = {
    "empty": (keep_only, "no config.json there; give a model folder"),
    "config-cut": (
        lambda folder: (folder / "config.json").write_text('{"model_type":'),
        "its configuration can't be loaded: It looks like the config file at .* is not a valid JSON file",
    ),
    "config-without-type": (lambda folder: change_config(folder, model_type=None), "Should have a `model_type` key"),
    "config-of-unknown-type": (lambda folder: change_config(folder, model_type="zebra"), "has model type `zebra`"),
    "config-of-another-kind": (
        lambda folder: change_config(folder, hidden_size="many"),
        "its configuration can't be loaded: .*'hidden_size' expected int, got str",
    ),
    "own-code": (
        lambda folder: change_config(folder, model_type="zebra", auto_map=REMOTE),
        "contains custom code .*; allow it with model.trust_remote_code=true",
    ),
    "tokenizer-missing": (
        lambda folder: keep_only(folder, "config.json", "model.safetensors"),
        "its tokenizer can't be loaded: Couldn't instantiate the backend tokenizer",
    ),
    "tokenizer-damaged": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'),
        "its tokenizer can't be loaded: ",
    ),
    "weights-missing": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights-are-a-pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        "its weights can't be loaded: SafetensorError: .*header",
    ),
    "weights-are-a-text": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "pytorch_model.bin").write_text("text")),
        "its weights can't be loaded: ",
    ),
    "shard-missing": (
        lambda folder: shard(folder, lambda folder: next(folder.glob("model-00002-*")).unlink()),
        "its weights can't be loaded: No such file or directory: .*model-00002-of-0000",
    ),
    "index-empty": (
        lambda folder: shard(
            folder, lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
        ),
        "its weights can't be loaded: ",
    ),
    "adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"holds an adapter \(adapter_config.json\); merge it into its base model",
    ),
    "vision": (
        lambda folder: ViTConfig(architectures=["ViTModel"]).save_pretrained(folder),
        r"ViTModel \(model_type vit\) is not a model that transformers' AutoModelForCausalLM loads; docs",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_folder_that_cannot_be_loaded_is_an_error_that_says_why(tmp_path, case):
    damage, line = DAMAGED[case]
    damage(tiny.save_model(tmp_path / "model"))
    with pytest.raises(UserError, match=f"^model.path={tmp_path}/model: .*{line}") as caught:
        load(tmp_path / "model")
    assert "\n" not in str(caught.value) and "hub" not in str(caught.value)


def test_only_a_model_of_the_hub_is_said_to_be_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(models.hub, "hub_reachable", lambda: False)
    with pytest.raises(
        UserError, match="model.path=no-such/model: .*not in the local cache, and the hub can't be reached"
    ):
        load("no-such/model")
    (tmp_path / "weights.bin").write_text("text")
    with pytest.raises(UserError, match="weights.bin: a file; give the model's folder"):
        load(tmp_path / "weights.bin")


def text_settings(**others):
    return {"hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 2} | others


def test_a_model_that_also_reads_images_runs_its_text_part_if_transformers_loads_it(tmp_path, capfd):
    folder = tiny.save_model(tmp_path / "model")
    text = text_settings(num_key_value_heads=1, head_dim=16, vocab_size=tiny.VOCABULARY + 1, pad_token_id=0)
    vision = text_settings(image_size=28, patch_size=14)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    model = load(folder)
    names = [ffn.name for ffn in find_ffns(model)]
    assert names == [f"model.language_model.layers.{layer}.mlp" for layer in range(2)]
    assert model(input_ids=torch.arange(9)[None], use_cache=False).logits.shape == (1, 9, tiny.VOCABULARY + 1)
    part = "also reads input other than text; only its text part runs"
    note = f"note: model.path={folder}: Gemma3ForConditionalGeneration {part}"
    assert note in capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("config", [LlavaConfig, Mistral3Config, Qwen2VLConfig, Qwen2_5_VLConfig])
def test_a_model_of_other_input_that_transformers_does_not_load_is_refused_by_name(tmp_path, config):
    folder, kind = tiny.save_model(tmp_path / "model"), config.__name__.replace("Config", "ForConditionalGeneration")
    config(architectures=[kind]).save_pretrained(folder)
    line = rf"^model.path={folder}: {kind} \(model_type {config.model_type}\) is not a model that transformers' "
    with pytest.raises(UserError, match=line):
        load(folder)
    with pytest.raises(UserError, match=line):
        estimate.read_shape(ModelConfig(path=str(folder)), ["neuron"])


@pytest.mark.parametrize("name", ["folder", "file.gguf"])
def test_a_model_that_may_not_be_read_is_an_error_of_one_line(name, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(UserError, match=rf"model.path=/closed/{name}: .*Permission denied: '/closed/{name}'"):
        load(f"/closed/{name}")


def experts_inputs(model, tokens):
    """What each layer's experts are called with: inputs [T, E] and the experts of each token [T, k]."""
    calls, handles = [], []
    for layer in model.model.layers:
        hook = lambda _module, inputs: calls.append(inputs[:2])  # noqa: E731
        handles.append(layer.mlp.experts.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return calls


def test_an_expert_has_the_rows_of_the_tokens_that_are_routed_to_it(tmp_path):
    """Patterns, importances and inputs of each expert, against its weights and the router's choice."""
    model, N, D = tiny.make_model("mixtral"), 4, 52
    windows = torch.randint(100, (3, 16), generator=torch.Generator().manual_seed(1))
    collector = Collector(model, ["neuron"], torch.device("cpu"), batch_windows=2)
    assert (collector.experts, collector.slots, len(collector.ffns)) == (N, 2, 3 * N)
    rule = ActiveRule("top", 0.5)
    stored = collector.block(windows, [0, 1, 2], rule, with_importance=True, with_hidden=True, padded=True)
    info = SimpleNamespace(experts=N, slots=2, layers=3 * N)
    block = by_ffn(stored, info)
    rows = 0
    for layer, (hidden, chosen) in enumerate(experts_inputs(model, windows)):
        experts = model.model.layers[layer].mlp.experts
        for expert in range(N):
            ffn, tokens = layer * N + expert, (chosen == expert).any(1).nonzero().flatten()
            real = block.positions[ffn] >= 0
            order = block.positions[ffn][real].argsort()
            assert torch.equal(block.positions[ffn][real][order], tokens)
            rows += len(tokens)
            gate, up = (hidden[tokens] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            norms = experts.down_proj[expert].norm(dim=0)
            importance = (torch.nn.functional.silu(gate) * up).abs() * norms
            quantised, scale = quantise(importance)
            close = (block.importance["neuron"][ffn][real][order].int() - quantised.int()).abs() <= 1
            assert close.all()
            torch.testing.assert_close(block.scale["neuron"][ffn][real][order], scale, rtol=1e-4, atol=1e-7)
            active = ops.unpack(block.patterns["neuron"][ffn][real][order], D)
            assert (active == rule.active(ffn, "neuron", importance)).float().mean() > 0.999
            torch.testing.assert_close(block.hidden[ffn][real][order].float(), hidden[tokens], rtol=0.01, atol=0.01)
            assert not block.patterns["neuron"][ffn][~real].any() and not block.hidden[ffn][~real].any()
    assert rows == 3 * 48 * 2


def test_experts_of_another_form_are_an_error_that_names_them():
    model = families.build("llama4_text")
    with pytest.raises(UserError, match=r"feed_forward.experts \(Llama4TextExperts\): experts of this form are"):
        find_ffns(model)
    model = tiny.make_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts._apply_gate = lambda values: torch.relu(values.chunk(2, dim=-1)[0])  # both ways: no difference
    check_calls(model, find_ffns(model))
    del experts._apply_gate
    own = experts.forward
    experts.forward = lambda *inputs: own(*inputs) * 1.1
    with pytest.raises(UserError, match=r"model.layers.1.mlp.experts.0 \(MixtralExperts\): it does more than apply"):
        check_calls(model, find_ffns(model))

"""Builds a tiny model with random weights for each causal language model that the installed transformers knows."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 15_000_000  # parameters of a model that counts as tiny
_SIZES = dict(
    vocab_size=64,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "hidden_size_global"), 32),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers", "n_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads", "n_heads"), 4
    ),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    num_key_value_heads=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    num_experts_per_tok=2,
    n_shared_experts=1,
    rotary_dim=8,
    vocab_size_per_layer_input=64,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=0,
    altup_num_inputs=2,
    laurel_rank=8,
    activation_sparsity_pattern=[0.9, 0.0],
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
)
# Each attempt changes other entries of a configuration, because families refuse different combinations.
_ATTEMPTS = (
    dict(head_dim=8, layer_types=2),
    dict(layer_types=2),
    dict(head_dim=8),
    dict(),
    dict(num_key_value_heads=4),
    dict(layer_types=["full_attention", "conv"]),
    dict(layers_block_type=["attention"] * 2),
    dict(is_decoder=True),
    dict(attention_types=[[["global"], 2]]),
)
# Families that cannot be built, and why.
REASONS = {
    "gemma3n": "its image encoder needs the package timm",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "it continues another model's hidden states and cache"
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "transformers does not build it from its configuration"),
}
# Entries that one family needs beyond `_SIZES`; a dictionary holds those of a part.
_MORE = {
    "bamba": dict(mamba_n_heads=8, attn_layer_indices=[1]),
    "blt": dict(encoder_hash_byte_group_vocab=64),
    "cohere_compass_text": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "dbrx": dict(attn_config=dict(rope_theta=10_000.0, kv_n_heads=2, clip_qkv=8.0)),
    "dots3_note_text": dict(num_key_value_heads=4, index_head_dim=8, index_n_heads=2),
    "granitemoehybrid": dict(mamba_n_heads=8, layer_types=["mamba", "attention"]),
    "longcat_flash": dict(num_key_value_heads=4, head_dim=8, zero_expert_num=2),
    "mamba2": dict(num_heads=8, head_dim=8),
    "reformer": dict(is_decoder=True, attn_layers=["local", "lsh"], attention_head_size=8, axial_pos_embds=False),
    "xmod": dict(is_decoder=True, default_language="en_XX"),
    **dict.fromkeys(
        ("zamba", "zamba2"),
        dict(layer_types=["hybrid"] * 2, layers_block_type=["hybrid"] * 2, num_key_value_heads=4),
    ),
    "zaya": dict(num_experts_per_tok=1),
}
_MORE["dots3_note"] = _MORE["dots3_note_text"] | dict(
    vision_config=dict(mlp_layer_types=["dense"] * 2, adapter_in_dim=32, adapter_out_dim=32),
    audio_config=dict(adapter_input_size=32, adapter_out_dim=32),
)


def build(model_type: str) -> torch.nn.Module:
    """A tiny model of this type. Raises the last attempt's error if none succeeds."""
    torch.manual_seed(0)
    for number, attempt in enumerate(_ATTEMPTS, start=1):
        try:
            return _build(model_type, attempt)
        except Exception:
            if number == len(_ATTEMPTS):
                raise
    raise AssertionError


def _keys(config) -> set[str]:
    """The entries of a configuration that can be set."""
    names = {*dir(config), *config.attribute_map}
    return {name for name in names if not isinstance(getattr(type(config), name, None), property)}


def _sizes(config) -> dict:
    keys = _keys(config)
    return {key: value for key, value in _SIZES.items() if key in keys}


def _build(model_type: str, attempt: dict) -> torch.nn.Module:
    kind = CONFIG_MAPPING[model_type]
    whole = kind()
    text = whole.get_text_config()
    more = _MORE.get(model_type, {})
    changes = _sizes(text)
    for key, value in attempt.items():
        if key in _keys(text):
            changes[key] = getattr(text, key)[:2] if value == 2 else value
    parts = {key: part for key, part in vars(whole).items() if isinstance(part, PreTrainedConfig)}
    changes |= {key: value for key, value in more.items() if key not in parts}
    if text is not whole:
        changes = {next(key for key, part in parts.items() if part is text): changes | {"model_type": text.model_type}}
    for key, part in parts.items():
        if part is not text:
            changes[key] = _sizes(part) | {"model_type": part.model_type} | more.get(key, {})
    config = kind(**changes)
    with torch.device("meta"):
        parameters = sum(value.numel() for value in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters:,} parameters")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.inference_mode():
        for value in model.parameters():
            if value.dim() > 1 and not value.any():  # xLSTM's gates, under which masks would change nothing
                value.normal_(std=0.02)
        model(input_ids=torch.arange(3, 11)[None], use_cache=False)
    return model

"""Builds a tiny model with random weights for each causal language model that the installed transformers knows."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 15_000_000  # parameters of a model that counts as tiny
_SIZES = dict(
    vocab_size=64,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers", "n_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads", "n_heads"), 4
    ),
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
# Each attempt changes more or fewer entries of a configuration: families refuse different combinations.
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


def _build(model_type: str, attempt: dict) -> torch.nn.Module:
    kind = CONFIG_MAPPING[model_type]
    whole = kind()
    text = whole.get_text_config()
    changes = {key: value for key, value in _SIZES.items() if hasattr(text, key)}
    for key, value in attempt.items():
        if hasattr(text, key):
            changes[key] = getattr(text, key)[:2] if value == 2 else value
    if text is not whole:
        key = next(key for key, value in vars(whole).items() if value is text)
        changes = {key: changes | {"model_type": text.model_type}}
        for other in ("vision_config", "audio_config"):
            if (part := getattr(whole, other, None)) is not None:
                sizes = {key: value for key, value in _SIZES.items() if hasattr(part, key)}
                changes[other] = sizes | {"model_type": part.model_type}
    config = kind(**changes)
    with torch.device("meta"):
        parameters = sum(value.numel() for value in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters:,} parameters")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 11)[None], use_cache=False)
    return model

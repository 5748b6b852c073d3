"""Tiny models with random weights, one per architecture: two to four layers, some 100 thousand parameters.

Names are those of the configuration's class without "Config". Not every release of transformers has all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf

COMMON = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TOKENS = {name: COMMON[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
GPT2_LIKE = {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.15}
ALL_HEADS = {**COMMON, "num_key_value_heads": 4}
HEAD_32 = {**COMMON, "head_dim": 32}
WINDOWED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 199,
    "hidden_size_per_layer_input": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LATENT = {
    **ALL_HEADS,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 16}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}

# Configuration class without "Config" -> its arguments.
ARGUMENTS: dict[str, dict[str, object]] = {
    # Full attention in all layers.
    "Apertus": COMMON,
    "Apertus1p5Text": COMMON,
    "Arcee": COMMON,
    "BioGpt": ALL_HEADS,
    "BitNet": COMMON,
    "Cohere": COMMON,
    "Doge": COMMON,
    "DiffLlama": COMMON,
    "Ernie4_5": {**COMMON, "head_dim": 16},
    "Exaone": COMMON,
    "GPT2": GPT2_LIKE,
    "GPTBigCode": GPT2_LIKE,
    "GPTNeoX": {name: value for name, value in COMMON.items() if name != "num_key_value_heads"},
    "Gemma": HEAD_32,
    "Glm": HEAD_32,
    "Glm4": HEAD_32,
    "Granite": COMMON,
    "GraniteMoe": {**COMMON, **LOCAL_EXPERTS},
    "Llama": COMMON,
    "MiniMaxM2": {**HEAD_32, **LOCAL_EXPERTS},
    "Ministral3": {**COMMON, "head_dim": 16},
    "Mistral": {**COMMON, "sliding_window": None},
    "Mixtral": {**COMMON, **LOCAL_EXPERTS},
    "Nemotron": COMMON,
    "OPT": {
        **TOKENS,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "init_std": 0.15,
    },
    "Olmo2": COMMON,
    "Olmoe": {**COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    "Persimmon": COMMON,
    "Phi": COMMON,
    "Phi3": COMMON,
    "Qwen2": COMMON,
    "Qwen2Moe": {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 32},
    "Qwen3": HEAD_32,
    "Qwen3Moe": {**HEAD_32, **EXPERTS},
    "SarvamMoE": {**COMMON, **ROUTED, "head_dim": 16, "num_experts": 4},
    "SeedOss": {**COMMON, "head_dim": 16},
    "SmolLM3": {**COMMON, "no_rope_layers": [1, 0]},
    "StableLm": COMMON,
    "Starcoder2": COMMON,
    # Their own attention, which transformers' interface does not reach.
    "Bloom": {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.15},
    "CodeGen": {**GPT2_LIKE, "rotary_dim": 8},
    "Falcon": {name: value for name, value in COMMON.items() if name != "num_key_value_heads"},
    "GPTJ": {**GPT2_LIKE, "rotary_dim": 8},
    "Mpt": {
        **TOKENS,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "initializer_range": 0.15,
        "use_cache": True,
    },
    # Windows and chunks beside full attention; soft caps and sinks among them.
    "Cohere2": {**COMMON, **WINDOWED},
    "Exaone4": {**COMMON, **WINDOWED},
    "Gemma2": {**HEAD_32, **WINDOWED},
    "Gemma3Text": {**HEAD_32, **WINDOWED},
    "GptOss": {**HEAD_32, **WINDOWED, **LOCAL_EXPERTS},
    "Llama4Text": {
        **COMMON,
        **LOCAL_EXPERTS,
        "head_dim": 16,
        "attention_chunk_size": 32,
        "intermediate_size_mlp": 64,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "Olmo3": {**COMMON, **WINDOWED},
    # Layers that read the keys and values of others.
    "Gemma3nText": {
        **HEAD_32,
        **SHARED,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "Gemma4Text": {**HEAD_32, **SHARED, "global_head_dim": 32},
    # Layers that are run several times, each pass with keys and values of its own.
    "Dory": {
        **COMMON,
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_loops": 3,
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Inkling2LoopText": {
        **COMMON,
        "unpadded_vocab_size": 199,
        "num_hidden_layers": 4,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 3,
        "n_layers_per_attn_res_block": 1,
        "head_dim": 16,
        "swa_head_dim": 16,
        "sliding_window_size": 16,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    },
    # Multi-head latent attention.
    "DeepseekV2": {**LATENT, **ROUTED},
    "DeepseekV3": {**LATENT, **ROUTED},
    "Glm4MoeLite": {**LATENT, **ROUTED},
    "MiniCPM3": LATENT,
    "SarvamMLA": {**LATENT, **ROUTED},
    "Youtu": LATENT,
    # The same with sparse attention by an index.
    "DeepseekV32": {**LATENT, **ROUTED, **INDEXED},
    "GlmMoeDsa": {**LATENT, **ROUTED, **INDEXED},
    # Linear attention, state spaces and convolutions beside full attention.
    "Bamba": {**COMMON, **MAMBA, "attn_layer_indices": [1]},
    "FalconH1": {**HEAD_32, **MAMBA, "mamba_d_ssm": 128},
    "GraniteMoeHybrid": {
        **COMMON,
        **MAMBA,
        **LOCAL_EXPERTS,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 32,
    },
    "Jamba": {
        **COMMON,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "LaraMini": {
        **COMMON,
        **DELTA,
        **EXPERTS,
        "shared_expert_intermediate_size": 32,
        "head_dim": 16,
        "sliding_window": 16,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
    },
    "Lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "NemotronH": {
        **HEAD_32,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "use_mamba_kernels": False,
    },
    "OlmoHybrid": {**COMMON, **DELTA, "linear_num_value_heads": 2},
    "Qwen3Next": {**HEAD_32, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 32},
    "Qwen3_5Text": {**HEAD_32, **DELTA},
    "Zamba2": {
        **COMMON,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "mamba", "hybrid"],
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_d_state": 8,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
        "adapter_rank": 8,
    },
}

# Where transformers' `sdpa` attention, in some releases, forgets soft caps.
EAGER = {"Gemma2"}


def is_known(name: str) -> bool:
    """Whether this release of transformers has the architecture."""
    return hasattr(tf, f"{name}Config")


def tiny(name: str, dtype: torch.dtype = torch.float32, **changed: object) -> tf.PreTrainedModel:
    """The model of that architecture in evaluation mode, the same weights every time."""
    make: Callable[..., tf.PretrainedConfig] = getattr(tf, f"{name}Config")
    config = make(**{**ARGUMENTS[name], **changed})
    torch.manual_seed(sum(map(ord, name)))
    attention = "eager" if name in EAGER else None
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()

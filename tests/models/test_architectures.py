"""Architectures built tiny from their configurations, against plain PEFT at every rank.

`make test` takes a sample, `make nightly` all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prelort.adapters import ScaleRule, peft_folder
from prelort.adapters.initial import fresh
from prelort.config import LoraSettings, check
from prelort.models import base
from prelort.models.lora import ADAPTER, attach, extract, install
from prelort.models.targets import stacked
from prelort.tasks import get
from prelort.training.preflight import check_model, rehearse
from prelort.training.runtime import ModelRuntime
from prelort.training.truncation import Truncation
from tiny_models import LABELS, logits, ragged_examples, token_batch, trained_adapter

WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
KV = {**WIDTHS, **IDS, "num_key_value_heads": 2}
HEADS = {**KV, "head_dim": 8}
MOE = {**HEADS, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 32}
SSM = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **IDS}
D_MODEL = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    **IDS,
}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
MOBILE = {"intra_bottleneck_size": 32, "pad_token_id": 0}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0}
PAIRS = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
MODERN = {"cls_token_id": 1, "sep_token_id": 1, "global_attn_every_n_layers": 2}
DEEPSEEK = {
    **{key: value for key, value in MOE.items() if key != "head_dim"},
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "num_experts": 4,
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
GEMMA3N = {
    "vocab_size_per_layer_input": 300,
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {**WIDTHS, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")

Case = tuple[str, dict[str, Any]]
CAUSAL: dict[str, Case] = {
    "mixtral": ("MixtralConfig", {**KV, "num_local_experts": 4}),
    "mamba": ("MambaConfig", SSM),
    "gemma3n": ("Gemma3nTextConfig", {**HEADS, **GEMMA3N}),
    "mistral": ("MistralConfig", HEADS),
    "qwen2": ("Qwen2Config", KV),
    "qwen3": ("Qwen3Config", {**HEADS, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {**HEADS, "sliding_window": 16}),
    "phi3": ("Phi3Config", KV),
    "opt": ("OPTConfig", {**WIDTHS, **IDS, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXConfig", {**WIDTHS, **IDS}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **IDS}),
    "falcon": ("FalconConfig", {**WIDTHS, **IDS}),
    "llama4": (
        "Llama4TextConfig",
        {
            **HEADS,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 48,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**MOE, "num_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "olmoe": ("OlmoeConfig", {**KV, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "falcon_mamba": ("FalconMambaConfig", SSM),
    "jamba": ("JambaConfig", {**KV, **JAMBA}),
    "olmo2": ("Olmo2Config", KV),
    "granite": ("GraniteConfig", KV),
    "lfm2": ("Lfm2Config", KV),
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": {**HEADS, "sliding_window": 16, "vocab_size": 300},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
}
CLASSIFIERS: dict[str, Case] = {
    "modernbert": ("ModernBertConfig", {**WIDTHS, **IDS, **MODERN}),
    "t5": ("T5Config", {**D_MODEL, **IDS, "decoder_start_token_id": 0}),
    "distilbert": ("DistilBertConfig", {**DISTIL, "pad_token_id": 0}),
    "bart": ("BartConfig", BART),
    "roberta": ("RobertaConfig", {**WIDTHS, **IDS}),
    "albert": ("AlbertConfig", {**WIDTHS, **IDS, "embedding_size": 16}),
    "deberta": ("DebertaV2Config", {**WIDTHS, **PAIRS, "pad_token_id": 0}),
    "electra": ("ElectraConfig", {**WIDTHS, **IDS, "embedding_size": 16}),
    "mpnet": ("MPNetConfig", {**WIDTHS, **IDS}),
    "xlnet": ("XLNetConfig", XLNET),
    "mobilebert": ("MobileBertConfig", {**WIDTHS, "embedding_size": 32, **MOBILE}),
    "bigbird": ("BigBirdConfig", {**WIDTHS, **IDS}),
    "canine": ("CanineConfig", {**WIDTHS, "num_hash_buckets": 64, "pad_token_id": 0}),
    "qwen3": ("Qwen3Config", HEADS),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}),
}
SAMPLE = 3
"""So many of each kind are in `make test`."""


def cases() -> list[Any]:
    return [
        pytest.param(kind, *case, dtype, id=f"{name}-{kind}-{dtype}", marks=marks)
        for kind, table in (("causal", CAUSAL), ("classification", CLASSIFIERS))
        for index, (name, case) in enumerate(table.items())
        for dtype in ("float32", "bfloat16")
        if (name, dtype) != ("xlnet", "bfloat16")  # which transformers itself cannot run
        for marks in [
            [] if index < SAMPLE and (dtype == "float32" or index == 0) else [pytest.mark.nightly]
        ]
    ]


@pytest.mark.parametrize("kind, config, values, dtype", cases())
def test_plain_peft_computes_each_prefix_of_what_learns_here(
    kind: str, config: str, values: dict[str, Any], dtype: str, tmp_path: Path, tokenizer: Any
) -> None:
    """On a base that a user loads anew: what the checkpoint lacks is drawn otherwise there.

    A mixture's experts are adapted too.
    """
    causal = kind == "causal"
    torch.manual_seed(0)
    built = getattr(transformers, config)(**{"vocab_size": len(tokenizer), **values})
    auto: Any = AutoModelForCausalLM if causal else transformers.AutoModel
    auto.from_config(built).to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    labels = () if causal else LABELS
    settings = check(
        {
            "model": {"name": str(tmp_path / "base"), "device": "cpu", "dtype": dtype},
            "task": "causal-lm" if causal else "classification",
            "data": {"max_length": 32},
            "method": {"objective": "step"},
        }
    )
    new = base.new_modules(settings.model, kind, labels)
    loaded = base.load_model(settings.model, kind, labels, pad_id=0)
    check_model(settings, loaded, kind)
    experts = [e for e in EXPERTS if any(name.endswith(f".{e}") for name in stacked(loaded))]
    model = attach(loaded, LoraSettings(target_parameters=experts), 4, kind, new).eval()
    rule = ScaleRule("constant", 0.5)
    runtime = ModelRuntime(model, Truncation(model, rule), get(settings.task), 0, tokenizer)
    # An encoder-decoder classifies by its end token (1).
    ending = [1] if built.is_encoder_decoder else []
    folder = Path("bert" if not causal else "llama")
    examples = [
        type(e)([*e.input_ids, *ending], e.labels if not causal else [*e.input_ids])
        for e in ragged_examples(folder)
    ]
    rehearse(settings, runtime, fresh(extract(model, rule), 0), examples)
    adapter = trained_adapter(model)
    batch = token_batch()
    if ending:
        batch = {key: value[:1] for key, value in batch.items()}
        batch["input_ids"][:, -1] = 1
    seen = []
    for rank in (1, 2, 4):
        install(model, adapter.prefix(rank))
        with runtime.truncation.fused(model):
            seen.append(logits(model, batch).float())
        peft_folder.save(adapter.prefix(rank), tmp_path / str(rank), model.peft_config[ADAPTER])
        torch.manual_seed(rank)
        kinds: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        more = {} if causal else {"num_labels": len(labels)}
        anew = kinds.from_pretrained(tmp_path / "base", dtype=dtype, **more)
        anew.config.pad_token_id = 0
        plain = PeftModel.from_pretrained(anew, tmp_path / str(rank)).eval()
        off = (logits(plain, batch).float() - seen[-1]).norm() / seen[-1].norm()
        assert off < (1e-4 if dtype == "float32" else 5e-2), rank
    assert float((seen[0] - seen[-1]).norm() / seen[-1].norm()) > 5e-2

"""Tiny, randomly initialized models of many architectures, with inputs; built once, then copied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from helpers.models import adapter_on, logits
from lora_lightning.lora import Adapter
from lora_lightning.lora.module_index import head_modules

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
# The names that most configs share.
USUAL = {
    **SMALL,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
GROUPED = {**USUAL, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
SEQ2SEQ = {
    **SMALL,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
MODERNBERT = {"eos_token_id": 2, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

CAUSAL, SEQUENCE_TO_SEQUENCE = "CAUSAL_LM", "SEQ_2_SEQ_LM"
CLASSIFIER, MASKED = "SEQ_CLS", None


def _model(model_class: type, config_class: type, settings: dict[str, Any], **more: Any):
    def build() -> nn.Module:
        return model_class(config_class(**{**settings, **more}))

    return build


# Name -> task type (as PEFT calls it) and the function that builds it.
ARCHITECTURES: dict[str, tuple[str | None, Callable[[], nn.Module]]] = {
    "gpt2": (CAUSAL, _model(tf.GPT2LMHeadModel, tf.GPT2Config, GPT2)),
    "gpt2-classifier": (
        CLASSIFIER,
        _model(tf.GPT2ForSequenceClassification, tf.GPT2Config, GPT2, pad_token_id=0),
    ),
    "gptj": (CAUSAL, _model(tf.GPTJForCausalLM, tf.GPTJConfig, GPT2, rotary_dim=4)),
    "gpt-neox": (CAUSAL, _model(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, USUAL)),
    "llama": (CAUSAL, _model(tf.LlamaForCausalLM, tf.LlamaConfig, GROUPED)),
    "llama-classifier": (
        CLASSIFIER,
        _model(tf.LlamaForSequenceClassification, tf.LlamaConfig, GROUPED),
    ),
    "qwen2": (
        CAUSAL,
        _model(tf.Qwen2ForCausalLM, tf.Qwen2Config, GROUPED, tie_word_embeddings=True),
    ),
    "qwen3": (CAUSAL, _model(tf.Qwen3ForCausalLM, tf.Qwen3Config, GROUPED, head_dim=8)),
    "qwen3-classifier": (
        CLASSIFIER,
        _model(tf.Qwen3ForSequenceClassification, tf.Qwen3Config, GROUPED, head_dim=8),
    ),
    "mistral": (CAUSAL, _model(tf.MistralForCausalLM, tf.MistralConfig, GROUPED)),
    "mixtral": (
        CAUSAL,
        _model(tf.MixtralForCausalLM, tf.MixtralConfig, GROUPED, num_local_experts=2),
    ),
    "qwen2-moe": (CAUSAL, _model(tf.Qwen2MoeForCausalLM, tf.Qwen2MoeConfig, GROUPED, **EXPERTS)),
    "gpt-oss": (
        CAUSAL,
        _model(
            tf.GptOssForCausalLM,
            tf.GptOssConfig,
            GROUPED,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
    ),
    "gemma": (CAUSAL, _model(tf.GemmaForCausalLM, tf.GemmaConfig, GEMMA)),
    "gemma2": (CAUSAL, _model(tf.Gemma2ForCausalLM, tf.Gemma2Config, GEMMA)),
    "gemma3": (CAUSAL, _model(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, GEMMA)),
    "phi": (CAUSAL, _model(tf.PhiForCausalLM, tf.PhiConfig, USUAL)),
    "phi3": (CAUSAL, _model(tf.Phi3ForCausalLM, tf.Phi3Config, GROUPED)),
    "opt": (
        CAUSAL,
        _model(tf.OPTForCausalLM, tf.OPTConfig, USUAL, ffn_dim=48, word_embed_proj_dim=16),
    ),
    "falcon": (CAUSAL, _model(tf.FalconForCausalLM, tf.FalconConfig, USUAL)),
    "bloom": (
        CAUSAL,
        _model(tf.BloomForCausalLM, tf.BloomConfig, USUAL, n_layer=2, n_head=4, hidden_size=32),
    ),
    "stablelm": (CAUSAL, _model(tf.StableLmForCausalLM, tf.StableLmConfig, GROUPED)),
    "t5": (
        SEQUENCE_TO_SEQUENCE,
        _model(tf.T5ForConditionalGeneration, tf.T5Config, T5),
    ),
    "mt5": (
        SEQUENCE_TO_SEQUENCE,
        _model(tf.MT5ForConditionalGeneration, tf.MT5Config, T5, **GATED),
    ),
    "bart": (
        SEQUENCE_TO_SEQUENCE,
        _model(tf.BartForConditionalGeneration, tf.BartConfig, SEQ2SEQ, scale_embedding=True),
    ),
    "bart-classifier": (
        CLASSIFIER,
        _model(tf.BartForSequenceClassification, tf.BartConfig, SEQ2SEQ, eos_token_id=2),
    ),
    "pegasus": (
        SEQUENCE_TO_SEQUENCE,
        _model(tf.PegasusForConditionalGeneration, tf.PegasusConfig, SEQ2SEQ),
    ),
    "bert": (CLASSIFIER, _model(tf.BertForSequenceClassification, tf.BertConfig, USUAL)),
    "bert-masked": (MASKED, _model(tf.BertForMaskedLM, tf.BertConfig, USUAL)),
    "roberta": (CLASSIFIER, _model(tf.RobertaForSequenceClassification, tf.RobertaConfig, USUAL)),
    "distilbert": (
        CLASSIFIER,
        _model(
            tf.DistilBertForSequenceClassification,
            tf.DistilBertConfig,
            SMALL,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
        ),
    ),
    "deberta": (
        CLASSIFIER,
        _model(tf.DebertaForSequenceClassification, tf.DebertaConfig, USUAL, **DEBERTA),
    ),
    "deberta-v2": (
        CLASSIFIER,
        _model(tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config, USUAL, **DEBERTA),
    ),
    "electra": (
        CLASSIFIER,
        _model(tf.ElectraForSequenceClassification, tf.ElectraConfig, USUAL, embedding_size=16),
    ),
    "modernbert": (
        CLASSIFIER,
        _model(tf.ModernBertForSequenceClassification, tf.ModernBertConfig, USUAL, **MODERNBERT),
    ),
    "albert": (
        CLASSIFIER,
        _model(tf.AlbertForSequenceClassification, tf.AlbertConfig, USUAL, embedding_size=16),
    ),
    "mpnet": (CLASSIFIER, _model(tf.MPNetForSequenceClassification, tf.MPNetConfig, USUAL)),
}

# Whose first layer, or shared expert, has linear layers with the names of experts'.
DENSE_TOO: dict[str, tuple[str | None, Callable[[], nn.Module]]] = {
    "qwen3-moe": (
        CAUSAL,
        _model(
            tf.Qwen3MoeForCausalLM,
            tf.Qwen3MoeConfig,
            GROUPED,
            head_dim=8,
            mlp_only_layers=[0],
            **EXPERTS,
        ),
    ),
    "deepseek-v3": (
        CAUSAL,
        _model(tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config, USUAL, **LATENT),
    ),
}


@dataclass
class Case:
    """A base model, which is never changed, and inputs for it."""

    task_type: str | None
    base: nn.Module
    inputs: dict[str, Tensor]

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def logits(self, model: nn.Module) -> Tensor:
        inputs = {name: tensor for name, tensor in self.inputs.items() if name != "input_ids"}
        return logits(model, self.inputs["input_ids"], **inputs)

    def adapter(self, model: nn.Module | None = None, **settings) -> Adapter:
        """Return an adapter on a copy of the base, or on a model, that trains a classifier too."""
        model = self.copy() if model is None else model
        heads = head_modules(model) if self.task_type == CLASSIFIER else []
        return adapter_on(model, **{"modules_to_save": heads, **settings})


@cache
def case(name: str) -> Case:
    task_type, build = {**ARCHITECTURES, **DENSE_TOO}[name]
    torch.manual_seed(0)
    model = build().eval()
    widen(model)
    ids = torch.randint(3, VOCABULARY, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "bart-classifier":  # it classifies the state at the end-of-sequence token
        ids[:, -1] = 2
    if task_type == SEQUENCE_TO_SEQUENCE:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 5))
    return Case(task_type, model, inputs)


def widen(model: nn.Module) -> None:
    """Draws the linear weights wide enough that every layer has a say in the logits.

    The usual first values, N(0, 0.02), are so small at this width that a mistake in an adapter
    would drown in rounding.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            nn.init.normal_(module.weight, std=0.15)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif "Router" in type(module).__name__ or "Experts" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.15)

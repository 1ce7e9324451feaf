"""Tiny models of random weights, one for each family the hook is tried on."""

import copy

import torch
import transformers as tf

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 512}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(kind, config, implementation):
    """The same weights for every implementation."""
    torch.manual_seed(7)
    # A model writes its implementation into its configuration.
    model = kind._from_config(copy.deepcopy(config), attn_implementation=implementation)
    # Fresh weights are so small that attention is nearly uniform: larger ones make it matter.
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def decoders():
    window = {**GROUPED, "sliding_window": 9}
    return {
        "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**GROUPED, **TOKENS)),
        "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**GROUPED, **TOKENS, head_dim=16)),
        "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**window, **TOKENS)),
        "gemma2": (
            tf.Gemma2ForCausalLM,
            tf.Gemma2Config(**window, **TOKENS, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=2.0),
        ),
        "gemma3": (
            tf.Gemma3ForCausalLM,
            tf.Gemma3TextConfig(
                **window,
                **TOKENS,
                head_dim=16,
                query_pre_attn_scalar=16,
                layer_types=["sliding_attention", "full_attention"],
            ),
        ),
        "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, **TOKENS)),
        "gpt-oss": (
            tf.GptOssForCausalLM,
            tf.GptOssConfig(
                **window,
                **TOKENS,
                head_dim=16,
                num_local_experts=2,
                num_experts_per_tok=1,
                layer_types=["sliding_attention", "full_attention"],
            ),
        ),
    }


def encoders():
    bert = {**SMALL, "vocab_size": 97, "max_position_embeddings": 512, "pad_token_id": 0}
    return {
        "bert": (tf.BertModel, tf.BertConfig(**bert)),
        "roberta": (tf.RobertaModel, tf.RobertaConfig(**bert)),
        "modernbert": (
            tf.ModernBertModel,
            tf.ModernBertConfig(
                **{**bert, "num_hidden_layers": 4},
                local_attention=12,
                global_attn_every_n_layers=2,
                cls_token_id=1,
                sep_token_id=2,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
    }


#: Families whose logits SDPA cannot compute.
EAGER = {"gemma2", "gpt-oss"}


def oracle(name):
    return "eager" if name in EAGER else "sdpa"

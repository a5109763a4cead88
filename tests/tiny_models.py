"""Tiny random models of many families of Transformers, without dropout, and batches for them."""

import torch
from torch import nn

import transformers

V = 120
TOKENS = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
BOTH = {
    "d_model": 32,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    "decoder_start_token_id": 0,
    "dropout": 0.0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, **NO_DROPOUT}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 32,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

# The model's class, its config's class, and the options that matter here.
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "final_logit_softcapping": 3.0}),
    "recurrent-gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {**DECODER, "logits_soft_cap": 5.0, "lru_width": 32, "num_hidden_layers": 3, "attention_dropout": 0.0},
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**DECODER, "logit_scale": 0.0625}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**DECODER, "logits_scaling": 6.0}),
    "phi": ("PhiForCausalLM", "PhiConfig", DECODER),  # whose head has a bias
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", {**OPT, "dropout": 0.0}),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert-decoder": ("BertLMHeadModel", "BertConfig", {**BERT, "is_decoder": True}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "dropout_rate": 0.0}),
    "t5-untied": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "dropout_rate": 0.0, "tie_word_embeddings": False, "scale_decoder_outputs": False},
    ),
    "marian": ("MarianMTModel", "MarianConfig", BOTH),
    "bart": ("BartForConditionalGeneration", "BartConfig", BOTH),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**BOTH, **WHISPER}),
}


def make(name, **options):
    """A model of a family, seeded, its head spread so that caps and scales matter."""
    torch.manual_seed(0)
    model, config, own = FAMILIES[name]
    model = getattr(transformers, model)(getattr(transformers, config)(**{**TOKENS, **own, **options}))
    head = model.get_output_embeddings()
    nn.init.normal_(head.weight, std=1.0)
    if head.bias is not None:
        nn.init.normal_(head.bias)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def tokens(rows=2, length=7):
    """Ids of words, none of them a special one."""
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(1))


def batch(name, rows=2, length=7):
    """Inputs of a model and labels, some of which are ignored."""
    ids = tokens(rows, length)
    labels = ids.clone()
    labels[0, 2:4] = -100
    if name == "whisper":
        return {
            "input_features": torch.randn(rows, 8, 20, generator=torch.Generator().manual_seed(2)),
            "labels": labels,
        }
    return {"input_ids": ids, "labels": labels}

"""The table of golden cases: which architecture, at which shape, stored how.

Shapes are odd on purpose: heads of 10, 12 or 24, hidden sizes that are no multiple of 16, windows just below, at and
above a block of 16, numbers of experts and of chosen ones that divide nothing.
"""

import dataclasses


@dataclasses.dataclass
class Case:
    """One checkpoint."""

    # Class in transformers, which is also the name in `architectures` unless there is a wrapper.
    model: str
    # Fields of its configuration.
    fields: dict
    # Type of the stored weights.
    dtype: str = "float32"
    # `generate`, `embed` or `rerank`.
    task: str = "generate"
    # Tokens of the prompts.
    lengths: tuple = (41, 23, 6)
    # Number of files.
    shards: int = 1
    # Tied, and the file stores the head instead of the embedding table.
    only_head: bool = False
    # `rope_theta`, `rope_scaling` and `torch_dtype`, as before transformers 5.
    old_spelling: bool = False
    # The same weights as GGUF too.
    gguf: bool = False
    # Experts as transformers keeps them in memory: one tensor for all.
    fused: bool = False
    # The architecture whose text part this is, as (name, model type, beginnings of names).
    wrapper: tuple = ()
    # Another beginning of the tensors' names, as pairs.
    rename: tuple = ()
    # Files of sentence-transformers: (pooling mode, normalised).
    pooling: tuple = ()
    # Token ids whose logits are the answer of a causal reranker.
    tokens: tuple = ()
    # Fields that published configurations do not have.
    drop: tuple = ()
    # Heads of single layers as transformers writes them when it saves a model again.
    per_layer: bool = False
    # Fields that only the file has.
    add: dict = dataclasses.field(default_factory=dict)


def rope(**scaling):
    return dict({"rope_theta": 10000.0, "rope_type": "default"}, **scaling)


def shape(hidden, heads, kv_heads, head_dim, layers=2, **more):
    """The fields that nearly all families share."""
    return dict(hidden_size=hidden, intermediate_size=28, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=61, max_position_embeddings=96, **more)


LLAMA = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=61, max_position_embeddings=96)
# A small base, so that the ramp of YaRN has some of the few frequencies on it.
YARN = rope(rope_theta=100.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=24)
PATTERN = ["sliding_attention", "full_attention"]

DENSE = {
    "llama-mha-tied": Case("LlamaForCausalLM", dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True)),
    "llama-gqa-bias": Case("LlamaForCausalLM", dict(LLAMA, hidden_size=36, num_attention_heads=6, head_dim=10,
                                                    attention_bias=True, mlp_bias=True, vocab_size=97), "bfloat16"),
    "llama-mqa-bf16": Case("LlamaForCausalLM", dict(LLAMA, num_attention_heads=8, num_key_value_heads=1, head_dim=16,
                                                    rms_norm_eps=1e-5), "bfloat16"),
    "llama-llama3": Case("LlamaForCausalLM", dict(LLAMA, hidden_size=40, head_dim=10, rope_parameters=rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)), "bfloat16", gguf=True),
    "llama-linear": Case("LlamaForCausalLM", dict(LLAMA, rope_parameters=rope(rope_type="linear", factor=4.0)),
                         "bfloat16", old_spelling=True),
    "llama-yarn": Case("LlamaForCausalLM", dict(LLAMA, head_dim=10, rope_parameters=YARN), "bfloat16", gguf=True),
    "llama-sharded": Case("LlamaForCausalLM", dict(LLAMA, num_hidden_layers=3), "bfloat16", shards=3),
    "llama-only-head": Case("LlamaForCausalLM", dict(LLAMA, tie_word_embeddings=True), "float16", only_head=True),
    "mistral-window": Case("MistralForCausalLM", dict(LLAMA, sliding_window=7, head_dim=12), "bfloat16"),
    "qwen2": Case("Qwen2ForCausalLM", dict(LLAMA, tie_word_embeddings=True), "bfloat16", gguf=True),
    "qwen2-mixed-window": Case("Qwen2ForCausalLM", dict(LLAMA, num_hidden_layers=3, use_sliding_window=True,
                                                        sliding_window=5, max_window_layers=1), "bfloat16"),
    "qwen3": Case("Qwen3ForCausalLM", dict(LLAMA, head_dim=16, rope_parameters=rope(rope_theta=1e6)), "bfloat16",
                  gguf=True),
    "mistral3": Case("MistralForCausalLM", shape(36, 6, 2, 10, sliding_window=None, rope_parameters=rope(
        rope_theta=1e6)), "bfloat16",
        wrapper=("Mistral3ForConditionalGeneration", "mistral3", "language_model.model.", "language_model.lm_head.")),
    "ministral3": Case("Ministral3ForCausalLM", shape(36, 6, 2, 16, rope_parameters=rope(
        rope_theta=100.0, rope_type="yarn", factor=6.0, original_max_position_embeddings=16, beta_fast=2.0,
        beta_slow=0.25, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3)), "bfloat16"),
    "ministral3-wrapper": Case("Ministral3ForCausalLM", shape(
        32, 4, 1, 12, tie_word_embeddings=True, rope_parameters=rope(
            rope_type="yarn", factor=12.0, original_max_position_embeddings=8, beta_fast=32.0, beta_slow=1.0,
            mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)), "bfloat16",
        wrapper=("Mistral3ForConditionalGeneration", "mistral3", "language_model.model.", "language_model.lm_head.")),
    "phi3": Case("Phi3ForCausalLM", dict(LLAMA, hidden_size=40, sliding_window=17, rope_parameters=rope()),
                 "bfloat16"),
    "phi3-longrope-short": Case("Phi3ForCausalLM", dict(
        LLAMA, num_key_value_heads=1, max_position_embeddings=64, original_max_position_embeddings=64,
        partial_rotary_factor=0.75, tie_word_embeddings=True, rope_parameters=rope(
            rope_type="longrope", short_factor=[1.0, 1.3, 2.2], long_factor=[2.0, 4.0, 7.0],
            attention_factor=1.19)), "bfloat16", old_spelling=True),
    "phi3-longrope-long": Case("Phi3ForCausalLM", dict(
        LLAMA, hidden_size=48, num_key_value_heads=4, max_position_embeddings=96, original_max_position_embeddings=5,
        partial_rotary_factor=0.5, rope_parameters=rope(
            rope_type="longrope", short_factor=[1.0, 1.1, 1.3], long_factor=[1.5, 2.0, 3.0])),
        "bfloat16", old_spelling=True),
    "granite": Case("GraniteForCausalLM", dict(LLAMA, hidden_size=36, num_attention_heads=6, tie_word_embeddings=True,
                                               embedding_multiplier=3.0, logits_scaling=2.5, residual_multiplier=0.6,
                                               attention_multiplier=0.3), "bfloat16"),
    "granite-bias": Case("GraniteForCausalLM", dict(LLAMA, attention_bias=True, mlp_bias=True,
                                                    embedding_multiplier=12.0, logits_scaling=4.0,
                                                    residual_multiplier=0.22, attention_multiplier=0.125,
                                                    num_key_value_heads=1), "bfloat16"),
    "olmo2": Case("Olmo2ForCausalLM", dict(LLAMA, hidden_size=40, num_key_value_heads=4, rms_norm_eps=1e-6),
                  "bfloat16"),
    "olmo2-gqa": Case("Olmo2ForCausalLM", dict(LLAMA, hidden_size=36, num_attention_heads=6, num_hidden_layers=3),
                      "bfloat16"),
    "smollm3": Case("SmolLM3ForCausalLM", dict(LLAMA, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 1],
                                               tie_word_embeddings=True), "bfloat16"),
    "smollm3-interval": Case("SmolLM3ForCausalLM", dict(LLAMA, hidden_size=24, num_attention_heads=6,
                                                        num_hidden_layers=3, no_rope_layer_interval=2,
                                                        attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
                             "bfloat16"),
    "apertus": Case("ApertusForCausalLM", dict(LLAMA, hidden_size=36, num_attention_heads=6, rope_parameters=rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)), "bfloat16"),
    "apertus-tied": Case("ApertusForCausalLM", dict(LLAMA, num_hidden_layers=3, num_key_value_heads=1,
                                                    tie_word_embeddings=True, rope_parameters=rope()), "bfloat16"),
    "cohere2": Case("Cohere2ForCausalLM", dict(LLAMA, hidden_size=36, num_attention_heads=6, num_hidden_layers=3,
                                               sliding_window=5, sliding_window_pattern=2, logit_scale=0.25,
                                               tie_word_embeddings=True, rope_parameters=rope()), "bfloat16"),
    "cohere2-block": Case("Cohere2ForCausalLM", dict(LLAMA, num_hidden_layers=4, sliding_window=16,
                                                     logit_scale=0.5, attention_bias=True,
                                                     rope_parameters=rope(rope_theta=5e4)), "bfloat16"),
    "glm4": Case("Glm4ForCausalLM", shape(36, 6, 2, 12, rope_parameters=rope()), "bfloat16"),
    "glm4-partial": Case("Glm4ForCausalLM", shape(28, 4, 1, 16, layers=3, attention_bias=False,
                                                  partial_rotary_factor=0.25, tie_word_embeddings=True), "bfloat16",
                         old_spelling=True),
}

EXPERTS = dict(moe_intermediate_size=12, num_experts=5, num_experts_per_tok=3)

MOE = {
    "qwen3moe": Case("Qwen3MoeForCausalLM", shape(28, 6, 2, 10, layers=3, mlp_only_layers=[1], decoder_sparse_step=1,
                                                  norm_topk_prob=True, **EXPERTS), "bfloat16", shards=2),
    "qwen3moe-fused": Case("Qwen3MoeForCausalLM", shape(32, 4, 4, 12, decoder_sparse_step=2, norm_topk_prob=False,
                                                        tie_word_embeddings=True, **EXPERTS), "bfloat16", fused=True),
    "mixtral": Case("MixtralForCausalLM", dict(LLAMA, intermediate_size=20, head_dim=10, num_local_experts=5,
                                               num_experts_per_tok=2, sliding_window=None), "bfloat16"),
    "mixtral-window": Case("MixtralForCausalLM", dict(LLAMA, hidden_size=36, num_attention_heads=6,
                                                      intermediate_size=12, head_dim=12, num_local_experts=3,
                                                      num_experts_per_tok=1,
                                                      sliding_window=16, tie_word_embeddings=True), "bfloat16"),
    "gptoss": Case("GptOssForCausalLM", dict(
        shape(28, 6, 2, 10, layers=3), intermediate_size=14, num_local_experts=5, num_experts_per_tok=3,
        sliding_window=7, swiglu_limit=1.5, rope_parameters=rope(
            rope_theta=100.0, rope_type="yarn", factor=4.0, beta_fast=4.0, beta_slow=1.0, truncate=False,
            original_max_position_embeddings=64)), "bfloat16", old_spelling=True, drop=("swiglu_alpha",)),
    "gptoss-mqa": Case("GptOssForCausalLM", dict(
        shape(40, 4, 1, 24, layers=2), intermediate_size=10, num_local_experts=4, num_experts_per_tok=4,
        sliding_window=17, attention_bias=True, rope_parameters=rope(
            rope_type="yarn", factor=8.0, beta_fast=8.0, beta_slow=2.0, truncate=False,
            original_max_position_embeddings=16)), "bfloat16", drop=("swiglu_alpha", "swiglu_limit")),
    "deepseek": Case("DeepseekV3ForCausalLM", dict(
        LLAMA, hidden_size=28, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=3, q_lora_rank=20,
        kv_lora_rank=18, qk_rope_head_dim=8, qk_nope_head_dim=10, v_head_dim=12, n_routed_experts=6, n_group=3,
        topk_group=2, num_experts_per_tok=3, n_shared_experts=2, moe_intermediate_size=10, first_k_dense_replace=1,
        routed_scaling_factor=1.7, num_nextn_predict_layers=0, rms_norm_eps=1e-5, rope_parameters=rope(
            rope_theta=100.0, rope_type="yarn", factor=6.0, original_max_position_embeddings=32, beta_fast=4.0,
            beta_slow=1.0, mscale=0.7, mscale_all_dim=1.0)), "bfloat16", old_spelling=True,
        add={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}),
    "deepseek-plain-query": Case("DeepseekV3ForCausalLM", dict(
        LLAMA, num_attention_heads=5, num_key_value_heads=5, q_lora_rank=None, kv_lora_rank=14, qk_rope_head_dim=6,
        qk_nope_head_dim=12, v_head_dim=8, n_routed_experts=5, n_group=1, topk_group=1, num_experts_per_tok=2,
        n_shared_experts=1, moe_intermediate_size=12, first_k_dense_replace=0, norm_topk_prob=False,
        routed_scaling_factor=2.5, num_nextn_predict_layers=0, rope_interleave=False, attention_bias=True,
        rope_parameters=rope()), "bfloat16", shards=2),
}

GEMMA2 = dict(sliding_window=7, query_pre_attn_scalar=12, attn_logit_softcapping=2.5, final_logit_softcapping=5.0)
GEMMA3_ROPE = {"sliding_attention": rope(), "full_attention": rope(rope_theta=1e5, rope_type="linear", factor=3.0)}
GEMMA4_ROPE = {"sliding_attention": rope(),
               "full_attention": rope(rope_theta=1e5, rope_type="proportional", partial_rotary_factor=0.25)}
GEMMA4_WRAPPER = ("Gemma4ForConditionalGeneration", "gemma4", "model.language_model.", "lm_head.")

GEMMA = {
    "gemma2": Case("Gemma2ForCausalLM", shape(36, 6, 2, 10, layers=3, **GEMMA2), "bfloat16"),
    "gemma2-block": Case("Gemma2ForCausalLM", shape(40, 4, 4, 16, layers=2, **dict(
        GEMMA2, sliding_window=16, attn_logit_softcapping=None, tie_word_embeddings=False)), "bfloat16"),
    "gemma2-embed": Case("Gemma2Model", shape(36, 6, 2, 12, layers=2, **dict(GEMMA2, sliding_window=9)), "bfloat16",
                         task="embed", pooling=("lasttoken", True)),
    "gemma3": Case("Gemma3ForCausalLM", shape(36, 6, 2, 10, layers=3, sliding_window=5, layer_types=[
        "sliding_attention", "sliding_attention", "full_attention"], query_pre_attn_scalar=13,
        rope_parameters=GEMMA3_ROPE), "bfloat16"),
    "gemma3-wrapper": Case("Gemma3ForCausalLM", shape(
        28, 4, 1, 24, layers=3, sliding_window=17, sliding_window_pattern=2, query_pre_attn_scalar=24,
        rope_parameters=GEMMA3_ROPE), "bfloat16", old_spelling=True,
        wrapper=("Gemma3ForConditionalGeneration", "gemma3", "language_model.model.", "language_model.lm_head.")),
    "gemma4": Case("Gemma4ForCausalLM", shape(
        28, 4, 4, 10, layers=3, layer_types=["sliding_attention", "full_attention", "full_attention"],
        sliding_window=7, global_head_dim=24, num_global_key_value_heads=2, attention_k_eq_v=True,
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=5, top_k_experts=3,
        moe_intermediate_size=12, final_logit_softcapping=5.0, rope_parameters=GEMMA4_ROPE), "bfloat16"),
    "gemma4-wrapper": Case("Gemma4ForCausalLM", shape(
        28, 6, 2, 16, layers=4, layer_types=PATTERN * 2, sliding_window=16, global_head_dim=12,
        num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0,
        rope_parameters=GEMMA4_ROPE), "bfloat16", wrapper=GEMMA4_WRAPPER),
    "gemma4-own-values": Case("Gemma4ForCausalLM", shape(
        32, 4, 1, 12, layers=2, layer_types=PATTERN, sliding_window=17, global_head_dim=16, attention_k_eq_v=False,
        hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=1,
        moe_intermediate_size=10, rope_parameters=GEMMA4_ROPE), "bfloat16", wrapper=GEMMA4_WRAPPER),
    "gemma4-shared-kv": Case("Gemma4ForCausalLM", shape(
        28, 4, 2, 10, layers=5, layer_types=["sliding_attention", "full_attention", "sliding_attention",
                                             "sliding_attention", "full_attention"],
        sliding_window=6, global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=2,
        use_double_wide_mlp=True, rope_parameters=GEMMA4_ROPE), "bfloat16", per_layer=True),
}

DELTA = dict(linear_conv_kernel_dim=4, linear_key_head_dim=8, linear_value_head_dim=6, linear_num_key_heads=2,
             linear_num_value_heads=4)
DELTA_LENGTHS = (53, 32, 7)
HYBRID = ["linear_attention", "full_attention"]
MROPE = rope(partial_rotary_factor=0.5, mrope_interleaved=True, mrope_section=[2, 1, 1])

HYBRIDS = {
    "qwen3next": Case("Qwen3NextForCausalLM", shape(
        24, 3, 1, 16, layers=4, layer_types=HYBRID * 2, shared_expert_intermediate_size=14, norm_topk_prob=True,
        **EXPERTS, **DELTA), "bfloat16", lengths=DELTA_LENGTHS, drop=("layer_types",),
        add={"full_attention_interval": 2}),
    "qwen3next-dense-layer": Case("Qwen3NextForCausalLM", shape(
        32, 4, 1, 12, layers=3, layer_types=["linear_attention", "linear_attention", "full_attention"],
        shared_expert_intermediate_size=10, norm_topk_prob=False, mlp_only_layers=[1], tie_word_embeddings=True,
        partial_rotary_factor=0.5, **EXPERTS, **dict(DELTA, linear_conv_kernel_dim=3, linear_num_key_heads=3,
                                                     linear_num_value_heads=3, linear_value_head_dim=10)),
        "bfloat16", lengths=DELTA_LENGTHS),
    "qwen3_5": Case("Qwen3_5ForCausalLM", shape(28, 6, 2, 16, layers=4, layer_types=HYBRID * 2,
                                                rope_parameters=MROPE, **DELTA), "bfloat16", lengths=DELTA_LENGTHS),
    "qwen3_5-wrapper": Case("Qwen3_5ForCausalLM", shape(
        32, 4, 4, 8, layers=3, layer_types=["linear_attention", "linear_attention", "full_attention"],
        tie_word_embeddings=True, rope_parameters=dict(MROPE, partial_rotary_factor=0.25, mrope_section=[1, 0, 0]),
        **dict(DELTA, linear_num_value_heads=6, linear_key_head_dim=6)), "bfloat16", lengths=DELTA_LENGTHS,
        wrapper=("Qwen3_5ForConditionalGeneration", "qwen3_5", "model.language_model.", "lm_head.")),
    "qwen3_5moe": Case("Qwen3_5MoeForCausalLM", shape(
        40, 4, 1, 16, layers=2, layer_types=HYBRID, shared_expert_intermediate_size=12, rope_parameters=MROPE,
        **EXPERTS, **DELTA), "bfloat16", lengths=DELTA_LENGTHS),
    "qwen3_5moe-wrapper": Case("Qwen3_5MoeForCausalLM", shape(
        28, 6, 2, 12, layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
        shared_expert_intermediate_size=14, rope_parameters=dict(
            MROPE, partial_rotary_factor=0.5, mrope_section=[1, 1, 1]),
        **dict(EXPERTS, num_experts_per_tok=2), **DELTA),
        "bfloat16", lengths=DELTA_LENGTHS, shards=2, fused=True,
        wrapper=("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", "model.language_model.", "lm_head.")),
}

XLMR = dict(vocab_size=71, hidden_size=36, num_hidden_layers=2, num_attention_heads=6, intermediate_size=44,
            max_position_embeddings=60, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=0,
            eos_token_id=2)

POOLING = {
    "xlmr-embed": Case("XLMRobertaModel", XLMR, "bfloat16", task="embed", pooling=("cls", True)),
    "xlmr-types": Case("XLMRobertaModel", dict(XLMR, hidden_size=40, num_attention_heads=4, type_vocab_size=2,
                                               pad_token_id=0, bos_token_id=1), "float16", task="embed",
                       pooling=("mean", False)),
    "xlmr-rerank": Case("XLMRobertaForSequenceClassification", dict(XLMR, num_labels=1), "bfloat16", task="rerank"),
    "xlmr-labels": Case("XLMRobertaForSequenceClassification", dict(XLMR, hidden_size=24, num_attention_heads=3,
                                                                    num_labels=3), "float32", task="rerank"),
    "qwen3-embed": Case("Qwen3ForCausalLM", shape(36, 6, 2, 10, tie_word_embeddings=True), "bfloat16", task="embed",
                        rename=(("model.", ""),), pooling=("lasttoken", True)),
    "qwen3-rerank": Case("Qwen3ForCausalLM", shape(40, 4, 1, 16, layers=3, tie_word_embeddings=True), "bfloat16",
                         task="rerank", tokens=(17, 44)),
    "qwen3-rerank-untied": Case("Qwen3ForCausalLM", shape(32, 4, 4, 12), "bfloat16", task="rerank", tokens=(50, 9)),
}

CASES = {**DENSE, **MOE, **GEMMA, **HYBRIDS, **POOLING}

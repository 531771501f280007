"""Writes a model as repositories publish it: configuration, safetensors, GGUF, and sentence-transformers' files."""

import copy
import json
import pathlib
import tempfile

import gguf
import torch
from safetensors.torch import load_file, save_file

# Kept apart from `torch.float32`, which means double while make.py computes.
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Written by transformers into every configuration, and without meaning for the numbers.
NOISE = ("transformers_version", "_name_or_path", "id2label", "label2id")


def old_rope(config):
    """The spelling before transformers 5."""
    config["torch_dtype"] = config.pop("dtype")
    parameters = config.pop("rope_parameters")
    if "full_attention" in parameters:
        local, parameters = parameters["sliding_attention"], parameters["full_attention"]
        config["rope_local_base_freq"] = local["rope_theta"]
        config.pop("layer_types", None)
    config["rope_theta"] = parameters.pop("rope_theta")
    part = parameters.pop("partial_rotary_factor", None)
    if part is not None:
        config["partial_rotary_factor"] = part
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else dict(parameters, type=kind)


def config_json(model, case):
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {k: v for k, v in config.items() if k not in NOISE and k not in case.drop}
    # What transformers derives is not in published files; those have the fields that it was derived from.
    if not case.per_layer and config.pop("per_layer_config", None) is not None:
        config.update({k: case.fields.get(k) for k in ("global_head_dim", "num_global_key_value_heads")})
    for field in ("sliding_window_pattern", "num_labels"):
        if field in case.fields:
            config[field] = case.fields[field]
    if "num_labels" in case.fields:
        config.pop("num_labels")
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(case.fields["num_labels"])}
    config.update(case.add)
    config["architectures"] = [case.model]
    config["dtype"] = case.dtype
    if case.old_spelling:
        old_rope(config)
    if case.wrapper:
        del config["architectures"]
        outer = {"architectures": [case.wrapper[0]], "model_type": case.wrapper[1], "text_config": config,
                 "vision_config": {"hidden_size": 8, "num_hidden_layers": 1, "model_type": "none"}}
        outer["tie_word_embeddings"] = config["tie_word_embeddings"]
        outer["eos_token_id"] = config.pop("eos_token_id")
        config = outer
    return json.dumps(config, indent=1, sort_keys=True) + "\n"


def published(model, case):
    """The tensors under the names of published files."""
    stored = TYPES[case.dtype]
    if case.fused:
        tensors = {k: v.detach().to(stored) for k, v in model.state_dict().items()}
    else:
        with tempfile.TemporaryDirectory() as folder:
            copy.deepcopy(model).to(stored).save_pretrained(folder)
            files = sorted(pathlib.Path(folder).glob("*.safetensors"))
            tensors = {k: v for file in files for k, v in load_file(file).items()}
    if getattr(model.config, "tie_word_embeddings", False) and "lm_head.weight" in model.state_dict():
        if case.only_head:
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight", None)
            if tensors["lm_head.weight"] is None:
                tensors["lm_head.weight"] = model.lm_head.weight.detach().to(stored)
        else:
            tensors.pop("lm_head.weight", None)
    pairs = case.rename
    if case.wrapper:
        pairs = (("model.", case.wrapper[2]), ("lm_head.", case.wrapper[3]))
        tower = "model.visual." if "Qwen" in case.model else "vision_tower."
        tensors[tower + "patch_embed.weight"] = torch.zeros(2, 3, dtype=stored)
        tensors["multi_modal_projector.weight"] = torch.zeros(2, 2, dtype=stored)

    def name(old):
        for a, b in pairs:
            if old.startswith(a) and "visual" not in old:
                return b + old[len(a):]
        return old

    return {name(k): v.clone().contiguous() for k, v in tensors.items()}


def save_weights(directory, model, case):
    tensors = published(model, case)
    if case.shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(case.shards):
        file = f"model-{i + 1:05}-of-{case.shards:05}.safetensors"
        part = names[i::case.shards]
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map.update({n: file for n in part})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def save_pooling(directory, hidden, pooling):
    """What sentence-transformers writes beside a model."""
    mode, normalised = pooling
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    modules += [("2", "2_Normalize", "Normalize")] if normalised else []
    listed = [{"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
              for i, path, kind in modules]
    (directory / "modules.json").write_text(json.dumps(listed, indent=1) + "\n")
    config = {"word_embedding_dimension": hidden}
    for name in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"):
        config[f"pooling_mode_{name}"] = name.removesuffix("_token").removesuffix("_tokens") == mode
    folder = directory / "1_Pooling"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


GGUF_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_PARTS[part]}.{kind}"


def pairwise(tensor, heads):
    """The order of rows that converters give to q and k of Llama."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def save_gguf(path, model, arch):
    """The same weights as GGUF, in f32 (f16 cannot hold every bf16 value)."""
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    out = gguf.GGUFWriter(str(path), arch)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_key_length(head_dim)
    out.add_value_length(head_dim)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(c.rope_parameters["rope_theta"])
    out.add_vocab_size(c.vocab_size)
    out.add_tokenizer_model("llama")
    out.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    out.add_token_scores([0.0] * c.vocab_size)
    out.add_token_types([1] * c.vocab_size)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    kind = c.rope_parameters["rope_type"]
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](c, "cpu")
        plain = 1.0 / c.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
        out.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    elif kind == "yarn":
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(c.rope_parameters["factor"])
        out.add_rope_scaling_orig_ctx_len(c.rope_parameters["original_max_position_embeddings"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        tensor = tensor.detach().float()
        if arch == "llama" and "q_proj" in name:
            tensor = pairwise(tensor, c.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            tensor = pairwise(tensor, c.num_key_value_heads)
        out.add_tensor(gguf_name(name), tensor.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()

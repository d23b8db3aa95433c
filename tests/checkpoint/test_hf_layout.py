"""`config.json` and tensor names as published and as transformers writes them."""

import dataclasses
import json

import pytest
import torch
import transformers

from rrt.checkpoint.hf_config import model_config_from_hf, model_config_to_hf
from rrt.checkpoint.hf_layout import HEAD_KEYS, constant_keys, tensor_table
from rrt.checkpoint.presets import PRESETS, preset
from rrt.errors import UserError
from rrt.model.config import ModelConfig

# Whole files, with every key that the published repositories carry.
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}
TINYLLAMA = {
    "_name_or_path": "TinyLlama-1.1B",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
PYTHIA_1B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "classifier_dropout": 0.1,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_dropout": 0.0,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 16,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPTNeoXTokenizer",
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
PUBLISHED = {"gemma-2b": GEMMA_2B, "tinyllama-1.1b": TINYLLAMA, "pythia-1b": PYTHIA_1B}
BASE = {"gemma": GEMMA_2B, "llama": TINYLLAMA, "gpt_neox": PYTHIA_1B}


def read(data):
    return model_config_from_hf(data, "config.json")


def refusal(data):
    with pytest.raises(UserError) as error:
        read(data)
    assert "\n" not in str(error.value)
    return str(error.value)


def without(data, *keys):
    return {key: value for key, value in data.items() if key not in keys}


def written_by_transformers(data, tmp_path):
    """Rewrite `data` as the installed transformers does."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(data))
    transformers.AutoConfig.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    return json.loads((tmp_path / "new" / "config.json").read_text())


def assert_same_meaning(ours: ModelConfig, theirs: transformers.PreTrainedConfig):
    for name, hf_name in {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
    }.items():
        assert getattr(ours, name) == getattr(theirs, hf_name), name
    is_neox = ours.family == "gpt_neox"
    assert theirs.model_type == ours.family
    assert ours.norm_eps == (theirs.layer_norm_eps if is_neox else theirs.rms_norm_eps)
    assert ours.num_kv_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rotary_fraction == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert ours.parallel_residual == getattr(theirs, "use_parallel_residual", False)
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(ours.activation, ours.activation)
    assert theirs.hidden_act == activation


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_mean_the_facts_and_what_transformers_makes_of_them(name, tmp_path):
    ours = read(PUBLISHED[name])
    assert ours == preset(name)
    current = written_by_transformers(PUBLISHED[name], tmp_path)
    assert "rope_parameters" in current and "dtype" in current
    assert read(current) == ours
    assert_same_meaning(ours, transformers.AutoConfig.from_pretrained(tmp_path / "old"))


def test_facts_of_the_three_families():
    gemma, llama, neox = (read(BASE[family]) for family in BASE)
    assert (gemma.activation, gemma.norm_type, gemma.scale_embeddings, gemma.tie_embeddings) == (
        ("gelu_tanh", "rmsnorm_1p", True, True)
    )
    assert (llama.activation, llama.norm_type, llama.rope_theta, llama.head_dim) == ("silu", "rmsnorm", 10000.0, 64)
    assert (neox.activation, neox.norm_type, neox.rotary_dim, neox.gated_mlp) == ("gelu", "layernorm", 64, False)
    assert neox.use_bias and neox.parallel_residual and not (gemma.use_bias or llama.parallel_residual)


@pytest.mark.parametrize("family", BASE)
@pytest.mark.parametrize("complete", [False, True])
def test_a_config_written_by_the_installed_transformers_is_read(family, complete):
    options = dict(num_attention_heads=16, hidden_size=64, tie_word_embeddings=True, eos_token_id=[3, 4])
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": 777.0}
    if family == "gpt_neox":
        options["rope_parameters"]["partial_rotary_factor"] = 0.5
    theirs = transformers.AutoConfig.for_model(family, **options)
    ours = read(theirs.to_dict() if complete else theirs.to_diff_dict())
    assert (ours.rope_theta, ours.tie_embeddings, ours.eos_token_id) == (777.0, True, 3)
    assert_same_meaning(dataclasses.replace(ours, eos_token_id=[3, 4]), theirs)


@pytest.mark.parametrize(
    ("data", "theta", "fraction"),
    [
        (without(GEMMA_2B, "rope_theta"), 10000.0, 1.0),
        (TINYLLAMA | {"rope_theta": 5e5}, 5e5, 1.0),
        (TINYLLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, 1.0),
        (TINYLLAMA | {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 500000}}, 5e5, 1.0),
        (TINYLLAMA | {"rope_parameters": None}, 10000.0, 1.0),
        (TINYLLAMA | {"rope_scaling": {"rope_type": "default"}}, 10000.0, 1.0),
        (without(PYTHIA_1B, "rotary_pct", "rotary_emb_base"), 10000.0, 0.25),
        (PYTHIA_1B | {"rotary_pct": 1.0, "rotary_emb_base": 500}, 500.0, 1.0),
        (
            without(PYTHIA_1B, "rotary_pct", "rotary_emb_base")
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 600.0, "partial_rotary_factor": 0.5}},
            600.0,
            0.5,
        ),
        (without(PYTHIA_1B, "rotary_pct") | {"partial_rotary_factor": 0.5}, 10000.0, 0.5),
    ],
)
def test_rotary_settings_are_found_where_either_version_puts_them(data, theta, fraction):
    config = read(data)
    assert (config.rope_theta, config.rotary_fraction) == (theta, fraction)


@pytest.mark.parametrize(
    "change",
    [{}, {"hidden_activation": "gelu_pytorch_tanh"}, {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": None}],
)
def test_gemma_gelu_is_always_the_tanh_form(change):
    assert read(without(GEMMA_2B, "hidden_activation") | change).activation == "gelu_tanh"
    assert read(GEMMA_2B | change).activation == "gelu_tanh"


def test_dtype_under_either_name_and_generation_settings_are_no_matter():
    renamed = without(GEMMA_2B, "torch_dtype") | {"dtype": "bfloat16"}
    assert read(renamed) == read(GEMMA_2B | {"do_sample": False, "typical_p": 1.0, "gradient_checkpointing": True})


@pytest.mark.parametrize(
    ("family", "change", "parts"),
    [
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            ["'rope_scaling'", '"linear"', "implemented"],
        ),
        ("gpt_neox", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'rope_scaling'", "dynamic"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["'rope_parameters.rope_type'", "yarn"]),
        ("llama", {"rope_parameters": {"factor": 8.0, "rope_type": "llama3"}}, ["'rope_parameters.factor'"]),
        ("gemma", {"rope_parameters": {"rope_type": "dynamic"}}, ["'rope_parameters.rope_type'", '"dynamic"']),
        (
            "llama",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            ["partial_rotary_factor'", "0.5", "1.0 for"],
        ),
        ("llama", {"partial_rotary_factor": 0.5}, ["'partial_rotary_factor'", "0.5", "1.0"]),
        ("llama", {"rope_parameters": [1]}, ["'rope_parameters'", "[1]", "an object"]),
        ("gemma", {"rope_parameters": {"rope_theta": 5.0}}, ["'rope_parameters.rope_theta'", "5.0", "'rope_theta'"]),
        ("gpt_neox", {"partial_rotary_factor": 0.5}, ["'partial_rotary_factor'", "0.5", "0.25", "'rotary_pct'"]),
        ("llama", {"rotary_emb_base": 5}, ["'rotary_emb_base'", "LlamaForCausalLM"]),
        ("gpt_neox", {"rotary_pct": 1.5}, ["'rotary_pct'", "1.5"]),
        ("gpt_neox", {"rotary_pct": 0}, ["'rotary_pct'", "0"]),
        ("llama", {"sliding_window": 4096}, ["'sliding_window'", "4096", "null"]),
        ("llama", {"attention_bias": True}, ["'attention_bias'", "true", "false"]),
        ("llama", {"mlp_bias": True}, ["'mlp_bias'", "true", "false"]),
        ("gpt_neox", {"attention_bias": False}, ["'attention_bias'", "false", "true for gpt_neox"]),
        ("gemma", {"use_bidirectional_attention": True}, ["'use_bidirectional_attention'"]),
        ("llama", {"attention_dropout": 0.1}, ["'attention_dropout'", "0.1", "0"]),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ["'quantization_config'", "gptq", "null"]),
        ("llama", {"model_type": "qwen2"}, ["'model_type'", "qwen2", "gemma, llama, gpt_neox"]),
        ("llama", {"model_type": "mistral"}, ["'model_type'", "mistral"]),
        ("gemma", {"model_type": "gemma2"}, ["'model_type'", "gemma2"]),
        ("gemma", {"model_type": None}, ["'model_type'", "null"]),
        ("gemma", {"model_type": ["gemma"]}, ["'model_type'", '["gemma"]']),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ["'architectures'", "LlamaForCausalLM"]),
        ("llama", {"architectures": "LlamaForCausalLM"}, ["'architectures'", '["LlamaForCausalLM"]']),
        ("llama", {"experts": 8}, ["'experts'", "not known", "if the field does not change the model, delete it"]),
        ("llama", {"a\nb": 8}, [r"'a\nb'", "not known"]),
        ("gpt_neox", {"num_key_value_heads": 2}, ["'num_key_value_heads'", "not known"]),
        ("llama", {"hidden_size": "2048"}, ["'hidden_size'", '"2048"', "an integer"]),
        ("llama", {"hidden_size": 2048.0}, ["'hidden_size'", "2048.0", "an integer"]),
        ("llama", {"num_hidden_layers": True}, ["'num_hidden_layers'", "true", "an integer"]),
        ("llama", {"rms_norm_eps": "1e-5"}, ["'rms_norm_eps'", '"1e-5"', "a number"]),
        ("llama", {"tie_word_embeddings": 1}, ["'tie_word_embeddings'", "1", "true or false"]),
        ("llama", {"eos_token_id": "</s>"}, ["'eos_token_id'", '"</s>"']),
        ("llama", {"eos_token_id": []}, ["'eos_token_id'", "[]"]),
        ("llama", {"hidden_act": "relu"}, ["'hidden_act'", '"relu"', "silu"]),
        ("llama", {"hidden_act": ["silu"]}, ["'hidden_act'", '["silu"]']),
        ("gemma", {"hidden_act": "relu"}, ["'hidden_act'", '"relu"']),
        ("gemma", {"hidden_activation": "gelu"}, ["'hidden_activation'", '"gelu"', "gelu_pytorch_tanh"]),
        ("llama", {"num_attention_heads": 48}, ["'num_attention_heads'", "48", "a divisor of hidden_size = 2048"]),
        ("llama", {"hidden_size": 2050, "head_dim": 64}, ["32", "a divisor of hidden_size = 2050"]),
        ("llama", {"hidden_size": 2050, "head_dim": None}, ["32", "a divisor of hidden_size = 2050"]),
        ("gpt_neox", {"hidden_size": 2050}, ["'num_attention_heads'", "a divisor of hidden_size = 2050"]),
        ("llama", {"num_key_value_heads": 5}, ["'num_key_value_heads'", "5", "a divisor of num_attention_heads = 32"]),
        ("llama", {"num_hidden_layers": 0}, ["'num_hidden_layers'", "0", "a positive number"]),
        ("llama", {"num_attention_heads": 0}, ["'num_attention_heads'", "0", "a positive number"]),
        ("llama", {"num_key_value_heads": -4}, ["'num_key_value_heads'", "-4", "a positive number"]),
        ("gemma", {"head_dim": 0}, ["'head_dim'", "0", "a positive number"]),
        ("gemma", {"vocab_size": -1}, ["'vocab_size'", "-1", "a positive number"]),
        ("gpt_neox", {"layer_norm_eps": 0}, ["'layer_norm_eps'", "0", "a positive number"]),
        ("llama", {"rms_norm_eps": float("nan")}, ["'rms_norm_eps'", "nan", "a positive number"]),
    ],
)
def test_unimplemented_features_and_wrong_fields_are_refused_by_name(family, change, parts):
    message = refusal(BASE[family] | change)
    assert message.startswith("config.json: field ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("family", BASE)
@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
)
def test_missing_required_fields_are_named(family, key):
    assert refusal(without(BASE[family], key)) == f"config.json: missing field '{key}'; expected an integer"


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma", {}),
        ("gemma", {"num_kv_heads": 8, "head_dim": 40, "tie_embeddings": False, "rope_theta": 123.5}),
        ("llama", {}),
        ("llama", {"num_kv_heads": 1, "tie_embeddings": True, "norm_eps": 3e-6, "activation": "gelu"}),
        ("llama", {"head_dim": 96, "rope_theta": 5e5, "bos_token_id": None, "pad_token_id": 0}),
        ("gpt_neox", {}),
        ("gpt_neox", {"rotary_fraction": 1.0, "rope_theta": 77.0, "parallel_residual": False}),
        ("gpt_neox", {"tie_embeddings": True, "activation": "gelu_tanh", "eos_token_id": None}),
    ],
)
def test_a_written_config_reads_back_and_means_the_same_to_transformers(family, change, tmp_path):
    config = dataclasses.replace(read(BASE[family]), **change)
    data = model_config_to_hf(config, "float16")
    assert model_config_from_hf(json.loads(json.dumps(data)), "config.json") == config
    (tmp_path / "config.json").write_text(json.dumps(data))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert_same_meaning(config, theirs)
    assert theirs.dtype == torch.float16
    # Transformers before version 5 reads these where they used to be.
    assert data.get("rope_theta", data.get("rotary_emb_base")) == config.rope_theta
    assert family != "gpt_neox" or data["rotary_pct"] == config.rotary_fraction


@pytest.mark.parametrize(
    ("family", "change", "name"),
    [
        ("llama", {"use_bias": True}, "use_bias"),
        ("llama", {"rotary_fraction": 0.5}, "rotary_fraction"),
        ("gpt_neox", {"num_kv_heads": 2}, "num_kv_heads"),
        ("gemma", {"norm_type": "rmsnorm"}, "norm_type"),
    ],
)
def test_a_model_that_the_layout_cannot_hold_is_not_written(family, change, name):
    config = dataclasses.replace(read(BASE[family]), **change)
    with pytest.raises(UserError, match=f"config.json of .*: field '{name}': found .* expected .* for this family"):
        model_config_to_hf(config, "float32")


@pytest.mark.parametrize("name", PRESETS)
def test_tensor_table_is_transformers_state_dict_one_to_one(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name]))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    config = preset(name)
    # Transformers 5 calls every head lm_head in memory; files keep the published name, and none if it is tied.
    head = shapes.pop("lm_head.weight")
    if not config.tie_embeddings:
        shapes[HEAD_KEYS[config.family][0]] = head
    table = tensor_table(config)
    assert [entry.key for entry in table] == list(dict.fromkeys(entry.key for entry in table))
    assert {entry.key: entry.shape for entry in table} == shapes


def test_constant_keys_are_those_of_the_models_layers():
    neox = constant_keys(dataclasses.replace(read(PYTHIA_1B), num_layers=2))
    assert set(neox) == {"gpt_neox.rotary_emb.inv_freq"} | {
        f"gpt_neox.layers.{depth}.attention.{name}"
        for depth in range(2)
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
    }
    llama = constant_keys(read(TINYLLAMA))
    assert {"model.layers.21.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"} < set(llama)

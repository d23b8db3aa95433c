"""`config.json` and tensor names as published and as transformers writes them."""

import dataclasses
import json

import pytest
import torch
import transformers

from rrt.checkpoint.families import FAMILIES
from rrt.checkpoint.hf_config import model_config_from_hf, model_config_to_hf
from rrt.checkpoint.hf_layout import constant_keys, tensor_table
from rrt.checkpoint.presets import PRESETS, preset
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RopeScaling

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
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2_5_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "gemma-2b": GEMMA_2B,
    "tinyllama-1.1b": TINYLLAMA,
    "pythia-1b": PYTHIA_1B,
    "llama-3.2-1b": LLAMA_3_2_1B,
    "smollm2-135m": SMOLLM2_135M,
    "mistral-7b": MISTRAL_7B,
    "qwen2.5-0.5b": QWEN2_5_HALF_B,
    "qwen3-0.6b": QWEN3_0_6B,
}
BASE = {
    "gemma": GEMMA_2B,
    "llama": TINYLLAMA,
    "mistral": MISTRAL_7B,
    "qwen2": QWEN2_5_HALF_B,
    "qwen3": QWEN3_0_6B,
    "gpt_neox": PYTHIA_1B,
}
LLAMA3_SCALING = LLAMA_3_2_1B["rope_scaling"]


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
        "pad_token_id": "pad_token_id",
    }.items():
        assert getattr(ours, name) == getattr(theirs, hf_name), name
    ends = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (ends if isinstance(ends, list) else [] if ends is None else [ends])
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert (ours.qkv_bias, ours.mlp_bias) == (
        ours.family == "qwen2" or getattr(theirs, "attention_bias", False),
        ours.family == "gpt_neox" or getattr(theirs, "mlp_bias", False),
    )
    rope = dict(theirs.rope_parameters)
    scaling = ours.rope_scaling
    assert rope["rope_type"] == ("default" if scaling is None else scaling.kind)
    if scaling is not None:
        named = {key: value for key, value in dataclasses.asdict(scaling).items() if value is not None}
        assert {key: rope[key] for key in named if key != "kind"} | {"kind": rope["rope_type"]} == named
    is_neox = ours.family == "gpt_neox"
    assert theirs.model_type == ours.family
    assert ours.norm_eps == (theirs.layer_norm_eps if is_neox else theirs.rms_norm_eps)
    assert ours.num_kv_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
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


def test_facts_of_the_families():
    gemma, llama, neox = (read(BASE[family]) for family in ("gemma", "llama", "gpt_neox"))
    assert (gemma.activation, gemma.norm_type, gemma.scale_embeddings, gemma.tie_embeddings) == (
        ("gelu_tanh", "rmsnorm_1p", True, True)
    )
    assert (llama.activation, llama.norm_type, llama.rope_theta, llama.head_dim) == ("silu", "rmsnorm", 10000.0, 64)
    assert (neox.activation, neox.norm_type, neox.rotary_dim, neox.gated_mlp) == ("gelu", "layernorm", 64, False)
    assert neox.qkv_bias and neox.out_bias and neox.mlp_bias and neox.parallel_residual
    assert not (gemma.qkv_bias or gemma.mlp_bias or llama.parallel_residual)
    qwen2, qwen3, mistral = (read(BASE[family]) for family in ("qwen2", "qwen3", "mistral"))
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.num_heads * qwen3.head_dim) == (False, True, 2048)
    assert (mistral.max_position_embeddings, mistral.sliding_window, mistral.context_length) == (32768, 4096, 4096)
    assert (qwen2.sliding_window, qwen2.context_length) == (None, 32768)
    assert read(LLAMA_3_2_1B).rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("family", BASE)
@pytest.mark.parametrize("complete", [False, True])
def test_a_config_written_by_the_installed_transformers_is_read(family, complete):
    options = dict(num_attention_heads=16, hidden_size=64, tie_word_embeddings=True, eos_token_id=[3, 4])
    if family != "gpt_neox":
        options["num_key_value_heads"] = 4
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": 777.0}
    if family == "gpt_neox":
        options["rope_parameters"]["partial_rotary_factor"] = 0.5
    theirs = transformers.AutoConfig.for_model(family, **options)
    ours = read(theirs.to_dict() if complete else theirs.to_diff_dict())
    assert (ours.rope_theta, ours.tie_embeddings, ours.eos_token_ids) == (777.0, True, (3, 4))
    assert_same_meaning(ours, theirs)


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


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("off", [{}, None, {"type": "default", "factor": 1.0}, {"rope_type": "linear", "factor": 1.0}])
def test_scalings_that_change_nothing_are_none(where, off):
    assert read(TINYLLAMA | {where: off}) == read(TINYLLAMA)


@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"linear": {"factor": 4}}, RopeScaling("linear", 4.0)),
        ({"llama3": without(LLAMA3_SCALING, "rope_type")}, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
    ],
)
def test_scalings_are_read_under_old_and_new_names(name, data, expected):
    ((kind, values),) = data.items()
    old = {"rope_scaling": {name: kind, **values}}
    current = {"rope_parameters": {name: kind, "rope_theta": 10000.0, **values}}
    for change in (old, current, old | current):
        assert read(TINYLLAMA | change).rope_scaling == expected


@pytest.mark.parametrize(
    ("family", "change", "window"),
    [
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 512}, 512),
        ("qwen2", {"sliding_window": 512}, None),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True}, None),  # from layer 24 of 24 on
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 0}, 512),
        ("qwen3", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 0}, 512),
        ("qwen3", {"sliding_window": None, "layer_types": ["full_attention"] * 28}, None),
        (
            "qwen3",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 28,
            },
            64,
        ),
    ],
)
def test_windows_count_where_layers_use_them(family, change, window):
    config = read(BASE[family] | change)
    assert config.sliding_window == window
    assert config.context_length == (window or config.max_position_embeddings)


@pytest.mark.parametrize(
    ("value", "ends"),
    [(2, (2,)), ([2, 3], (2, 3)), ([2], (2,)), (None, ()), (-1, ()), ([None], ()), ([], ()), ([2, None], (2,))],
)
def test_all_end_tokens_are_kept(value, ends):
    config = read(TINYLLAMA | {"eos_token_id": value})
    assert config.eos_token_ids == ends
    written = model_config_to_hf(config, "float32")["eos_token_id"]
    assert written == (list(ends) if len(ends) > 1 else ends[0] if ends else None)


def test_values_that_change_nothing_are_no_matter():
    harmless = {"layer_types": ["full_attention"] * 22, "quantization_config": {}, "attention_dropout": 0.1}
    scaling = {"rope_scaling": {"rope_type": "default", "beta_fast": None}}
    assert read(TINYLLAMA | harmless | scaling) == read(TINYLLAMA)
    assert read(without(QWEN2_5_HALF_B, "sliding_window") | {"use_sliding_window": True, "max_window_layers": 0}) == (
        dataclasses.replace(read(QWEN2_5_HALF_B), sliding_window=4096)
    )


def test_minus_one_means_no_such_token():
    config = read(TINYLLAMA | {"pad_token_id": -1, "bos_token_id": -1})
    assert (config.pad_token_id, config.bos_token_id) == (None, None)


def test_weights_that_transformers_read_from_a_gguf_are_plain_weights(caplog):
    trace = {"dequantize": False, "gguf_file": "model.Q4_1.gguf", "quant_method": "gguf"}
    assert read(TINYLLAMA | {"quantization_config": trace}) == read(TINYLLAMA)
    assert "'quantization_config'" in caplog.text


def test_unknown_fields_are_ignored_with_one_warning_that_lists_them(caplog):
    extra = {
        "unsloth_version": "2024.9",
        "unsloth_fixed": True,
        "_model_name_or_path": "x",
        "transformers.js_config": {"dtype": {}},
        "is_llama_config": True,
    }
    where = "somewhere/config.json"
    for _ in range(2):
        assert model_config_from_hf(TINYLLAMA | extra, where) == read(TINYLLAMA)
    (record,) = caplog.records
    assert record.getMessage() == (
        "somewhere/config.json: ignored fields that are not known to change the model: '_model_name_or_path', "
        "'is_llama_config', 'transformers.js_config', 'unsloth_fixed', 'unsloth_version'"
    )


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_published_files_without_oddities_load_without_a_warning(published, caplog):
    read(without(published, "is_llama_config", "use_mrope"))
    assert not caplog.records


def test_heads_need_not_add_up_to_the_width_where_their_own_is_given():
    config = read(TINYLLAMA | {"hidden_size": 36, "num_attention_heads": 8, "head_dim": 8})
    assert (config.hidden_size, config.num_heads, config.head_dim) == (36, 8, 8)


def test_dtype_under_either_name_and_generation_settings_are_no_matter():
    renamed = without(GEMMA_2B, "torch_dtype") | {"dtype": "bfloat16"}
    assert read(renamed) == read(GEMMA_2B | {"do_sample": False, "typical_p": 1.0, "gradient_checkpointing": True})


@pytest.mark.parametrize(
    ("family", "change", "parts"),
    [
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            ["'rope_scaling.rope_type'", '"yarn"', "one of default, linear, llama3", "implemented"],
        ),
        ("gpt_neox", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'rope_scaling.type'", "dynamic"]),
        ("llama", {"rope_scaling": {"factor": 2.0}}, ["'rope_scaling.rope_type'", "null", "beside 'factor'"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, ["'rope_scaling.factor'", '"2"', "a number"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, ["'rope_scaling.factor'", "0", "positive"]),
        ("llama", {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1}}, ["'rope_scaling.high_freq_factor'"]),
        ("llama", {"rope_scaling": LLAMA3_SCALING | {"beta_fast": 32}}, ["'rope_scaling.beta_fast'", "no such field"]),
        (
            "llama",
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 3.0},
            },
            ["'rope_scaling'", "3.0", "as in 'rope_parameters'"],
        ),
        ("llama", {"rope_interleaved": True}, ["'rope_interleaved'", "true", "false", "not implemented for llama"]),
        ("llama", {"max_position_embeddings": None}, ["'max_position_embeddings'", "null", "an integer"]),
        ("mistral", {"attention_bias": True}, ["'attention_bias'", "true", "false for mistral"]),
        ("qwen2", {"attention_bias": False}, ["'attention_bias'", "false", "true for qwen2"]),
        ("qwen2", {"layer_types": ["linear_attention"]}, ["'layer_types'", "linear_attention", "full_attention"]),
        ("qwen2", {"layer_types": [{}]}, ["'layer_types'", "{}", "full_attention"]),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 20},
            ["'max_window_layers'", "20", "windows in all layers, or in none"],
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 12},
            ["'layer_types'", "windows in all layers, or in none"],
        ),
        ("llama", {"layer_types": ["sliding_attention"] * 22}, ["'layer_types'", "sliding_attention"]),
        ("mistral", {"sliding_window": 0}, ["'sliding_window'", "0", "a positive number"]),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "m.M"}}, ["'auto_map'", "code of its own"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["'rope_parameters.rope_type'", "yarn"]),
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
        ("llama", {"rotary_emb_base": 5}, ["'rotary_emb_base'", "not implemented for llama"]),
        ("gpt_neox", {"rotary_pct": 1.5}, ["'rotary_pct'", "1.5"]),
        ("gpt_neox", {"rotary_pct": 0}, ["'rotary_pct'", "0"]),
        ("llama", {"sliding_window": 4096}, ["'sliding_window'", "4096", "null"]),
        ("gpt_neox", {"mlp_bias": False}, ["'mlp_bias'", "false", "true for gpt_neox"]),
        ("gemma", {"use_bidirectional_attention": True}, ["'use_bidirectional_attention'"]),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ["'quantization_config'", "gptq", "null"]),
        ("llama", {"model_type": "qwen2"}, ["'architectures'", "LlamaForCausalLM", "Qwen2ForCausalLM"]),
        ("llama", {"model_type": "phi3"}, ["'model_type'", "phi3", "gemma, llama, mistral, qwen2, qwen3, gpt_neox"]),
        ("gemma", {"model_type": "gemma2"}, ["'model_type'", "gemma2"]),
        ("gemma", {"model_type": None}, ["'model_type'", "null"]),
        ("gemma", {"model_type": ["gemma"]}, ["'model_type'", '["gemma"]']),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ["'architectures'", "LlamaForCausalLM"]),
        ("llama", {"architectures": "LlamaForCausalLM"}, ["'architectures'", '["LlamaForCausalLM"]']),
        ("llama", {"num_local_experts": 8}, ["'num_local_experts'", "8", "or no such field"]),
        ("llama", {"hidden_size": "2048"}, ["'hidden_size'", '"2048"', "an integer"]),
        ("llama", {"hidden_size": 2048.0}, ["'hidden_size'", "2048.0", "an integer"]),
        ("llama", {"num_hidden_layers": True}, ["'num_hidden_layers'", "true", "an integer"]),
        ("llama", {"rms_norm_eps": "1e-5"}, ["'rms_norm_eps'", '"1e-5"', "a number"]),
        ("llama", {"tie_word_embeddings": 1}, ["'tie_word_embeddings'", "1", "true or false"]),
        ("llama", {"eos_token_id": "</s>"}, ["'eos_token_id'", '"</s>"']),
        ("llama", {"hidden_act": "relu"}, ["'hidden_act'", '"relu"', "silu"]),
        ("llama", {"hidden_act": ["silu"]}, ["'hidden_act'", '["silu"]']),
        ("gemma", {"hidden_act": "relu"}, ["'hidden_act'", '"relu"']),
        ("gemma", {"hidden_activation": "gelu"}, ["'hidden_activation'", '"gelu"', "gelu_pytorch_tanh"]),
        ("llama", {"num_attention_heads": 48}, ["'num_attention_heads'", "48", "a divisor of hidden_size = 2048"]),
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
        ("llama", {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 4096), "eos_token_ids": (2, 3)}),
        ("llama", {"rope_scaling": RopeScaling("linear", 2.5), "qkv_bias": True, "out_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("mistral", {"sliding_window": None, "head_dim": 96}),
        ("qwen2", {"eos_token_ids": (5, 6)}),
        ("qwen2", {"sliding_window": 77}),
        ("qwen3", {"qkv_bias": True, "out_bias": True}),
        ("llama", {"head_dim": 96, "rope_theta": 5e5, "bos_token_id": None, "pad_token_id": 0}),
        ("gpt_neox", {}),
        ("gpt_neox", {"rotary_fraction": 1.0, "rope_theta": 77.0, "parallel_residual": False}),
        ("gpt_neox", {"tie_embeddings": True, "activation": "gelu_tanh", "eos_token_ids": ()}),
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
        ("llama", {"qkv_bias": True}, "out_bias"),
        ("mistral", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"qk_norm": True}, "qk_norm"),
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
        shapes[FAMILIES[config.family].head_keys[0]] = head
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

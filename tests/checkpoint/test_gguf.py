"""Models in GGUF files: what transformers or the model that a file was written from computes, or one line why not."""

import json
import struct
import sys

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType

from rrt.checkpoint import gguf_tensors
from rrt.checkpoint.gguf_config import gguf_model_config
from rrt.checkpoint.source import load_model, open_source
from rrt.common.gguf_file import GGUFFile
from rrt.common.provenance import fingerprint
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.folding.unroll import export
from rrt.model.config import RecursiveConfig, RopeScaling
from tests.util.gguf_files import write_gguf
from tests.util.models import ALL_FAMILIES, make_hf_model
from tests.util.real import real_gguf

# Row widths that Q4_0 and Q8_0 can store; biases where a Llama has them.
SIZES = dict(num_layers=2, hidden_size=64, intermediate_size=96)
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
VARIANTS = {
    **{family: (family, {"head_dim": 16}) for family in ALL_FAMILIES if family != "gpt_neox"},
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5},
        },
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LINEAR}),
    "llama-3": ("llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
}
# What transformers reads rightly: Gemma and GPT-NeoX it does not read, of Qwen3 not the width of heads, of Llama
# neither biases nor scaled rotary frequencies.
READ_BY_TRANSFORMERS = ("llama", "qwen2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {name: make_hf_model(root / name, family, **SIZES | options) for name, (family, options) in VARIANTS.items()}


def logits(model, length=24):
    ids = torch.randint(0, 151, (2, length), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


def assert_close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def refusal(path):
    with pytest.raises(UserError) as error:
        open_source(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_computes_what_the_model_does_that_it_was_written_from(bases, tmp_path, name):
    path = write_gguf(tmp_path / "model.gguf", bases[name])
    source, base = open_source(path), open_source(bases[name])
    ours, theirs = (dict(vars(opened.model)) for opened in (source, base))
    if name == "mistral":  # stored as a Llama
        ours["family"] = "mistral"
    # Which token a text ends with is the tokenizer's, of which these files have none.
    for key in ("bos_token_id", "eos_token_ids", "pad_token_id"):
        del ours[key], theirs[key]
    assert ours == theirs and source.dtype == torch.float32
    model = load_model(path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32)
    assert_close(logits(model), logits(expected))


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
@pytest.mark.parametrize("storage", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_a_file_computes_what_transformers_computes_from_it(bases, tmp_path, name, storage):
    path = write_gguf(tmp_path / "model.gguf", bases[name], storage)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert_close(logits(load_model(path, torch.float32)), logits(expected))


def test_k_quants_are_read(tmp_path):
    base = make_hf_model(tmp_path / "base", "llama", num_layers=1, hidden_size=256, intermediate_size=256)

    def store(fields, tensors):
        random = np.random.default_rng(0)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                blocks = random.integers(0, 256, (tensor.shape[0], tensor.shape[1] // 256, 144), dtype=np.uint8)
                # The first four bytes of a block of Q4_K are two float16 scales.
                blocks[..., :4] = np.array([2e-4, 1e-3], np.float16).view(np.uint8)
                tensors[name] = blocks.reshape(tensor.shape[0], -1)

    path = write_gguf(tmp_path / "model.gguf", base, "Q4_K", change=store)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert_close(logits(load_model(path)), logits(expected))


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32)],
)
def test_the_dtype_is_that_of_the_matrices(bases, tmp_path, storage, dtype):
    path = write_gguf(tmp_path / "model.gguf", bases["llama"], storage)
    assert open_source(path).dtype == dtype
    assert {parameter.dtype for parameter in load_model(path).parameters()} == {dtype}


def test_dequantising_in_parts_changes_nothing(bases, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", bases["gpt_neox"], "Q8_0")
    whole = load_model(path).state_dict()
    monkeypatch.setattr(gguf_tensors, "_SLAB", 200)
    monkeypatch.setattr(gguf_tensors, "_CHUNK", 100)
    assert all(torch.equal(whole[name], value) for name, value in load_model(path).state_dict().items())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_recovered(tmp_path, factor):
    scaling = _LLAMA3 | {"factor": factor, "original_max_position_embeddings": 8192}
    options = dict(num_layers=1, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=128)
    base = make_hf_model(tmp_path / "base", "llama", rope_parameters=scaling, **options)
    model = gguf_model_config(GGUFFile(write_gguf(tmp_path / "model.gguf", base)))
    assert model.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)


def test_fields_that_llama_cpp_leaves_out_have_its_defaults(bases, tmp_path):
    def change(fields, tensors):
        for key in ("head_count_kv", "key_length", "value_length"):
            del fields[f"llama.attention.{key}"]
        for key in ("vocab_size", "rope.freq_base", "rope.dimension_count"):
            del fields[f"llama.{key}"]
        fields |= {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}

    base = make_hf_model(tmp_path / "mha", "llama", num_key_value_heads=4, **SIZES)
    model = open_source(write_gguf(tmp_path / "model.gguf", base, change=change)).model
    assert (model.num_kv_heads, model.head_dim, model.vocab_size, model.rope_theta) == (4, 16, 151, 10000.0)
    assert model.eos_token_ids == (2, 5) and model.norm_eps == 1e-6


def test_a_sliding_window_makes_a_mistral(bases, tmp_path):
    window = {"llama.attention.sliding_window": 128}
    path = write_gguf(tmp_path / "model.gguf", bases["mistral"], change=lambda fields, _: fields.update(window))
    model = open_source(path).model
    assert (model.family, model.sliding_window, model.context_length) == ("mistral", 128, 128)


def test_unknown_fields_are_named_in_one_warning(bases, tmp_path, caplog):
    extra = {"llama.new_thing": 3, "general.name": "x", "llama.expert_count": 0, "llama.rope.scaling.type": "none"}
    path = write_gguf(tmp_path / "model.gguf", bases["llama"], change=lambda fields, _: fields.update(extra))
    open_source(path), open_source(path)
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "ignored fields that are not known to change the model: 'llama.new_thing'"
    ]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("general.architecture", "falcon", "found 'falcon'; expected one of llama, gemma, qwen2, qwen3, gptneox"),
        ("split.count", 3, "found 3; expected a model in one file: `llama-gguf-split --merge` of llama.cpp joins"),
        ("llama.expert_count", 8, "found 8; expected 0, or no such field: it is not implemented"),
        ("llama.rope.scaling.type", "yarn", "found 'yarn'; expected none or linear: no other is implemented"),
        ("llama.rope.dimension_count", 8, "found 8; expected 16, the width of a head"),
        ("llama.attention.value_length", 8, "found 8; expected 16, the width of queries and keys"),
        ("llama.block_count", "two", "found 'two'; expected an integer"),
        ("llama.attention.head_count", [4, 4], "found [4, 4]; expected an integer"),
        ("llama.attention.head_count_kv", 3, "field 'num_kv_heads': found 3; expected a divisor of num_heads = 4"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(bases, tmp_path, key, value, expected):
    path = write_gguf(tmp_path / "m.gguf", bases["llama"], change=lambda fields, _: fields.update({key: value}))
    found = refusal(path)
    assert expected in found and (key in found or "num_kv_heads" in found)


def test_a_missing_field_is_named(bases, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", bases["llama"], change=lambda fields, _: fields.pop("llama.block_count"))
    assert refusal(path) == "missing field 'llama.block_count'; expected an integer"


def test_tensors_are_missing_unexpected_or_misshaped_by_name(bases, tmp_path):
    def change(fields, tensors):
        tensors["blk.0.attn_q.weight"] = tensors["blk.0.attn_q.weight"][:32]
        del tensors["blk.1.ffn_up.weight"]
        tensors["blk.2.attn_norm.weight"] = np.ones(64, np.float32)

    found = refusal(write_gguf(tmp_path / "m.gguf", bases["llama"], change=change))
    assert found == (
        "tensors do not match the metadata: 'blk.0.attn_q.weight': found shape [32, 64], expected [64, 64]; "
        "'blk.1.ffn_up.weight': missing, expected shape [96, 64]; "
        "'blk.2.attn_norm.weight': found shape [64], expected no such tensor"
    )


def test_divisors_of_rotary_frequencies_that_are_not_llama_3_s_are_refused(bases, tmp_path):
    def change(fields, tensors):
        tensors["rope_freqs.weight"] = np.linspace(1, 9, 8, dtype=np.float32)

    found = refusal(write_gguf(tmp_path / "m.gguf", bases["llama"], change=change))
    assert found.startswith("tensor 'rope_freqs.weight': found divisors of the rotary frequencies that are not Llama 3")


def test_a_storage_that_the_package_cannot_dequantise_is_refused(bases, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", bases["llama"])
    content = bytearray(path.read_bytes())
    name = b"blk.0.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8
    for code, shown in ((int(GGMLQuantizationType.Q8_K), "Q8_K"), (99, "type 99")):
        content[place : place + 4] = struct.pack("<I", code)
        path.write_bytes(content)
        assert f"tensor 'blk.0.attn_q.weight': found storage {shown}, which the package gguf cannot" in refusal(path)


def test_files_that_are_not_whole_are_refused(bases, tmp_path):
    content = write_gguf(tmp_path / "whole.gguf", bases["llama"]).read_bytes()
    path = tmp_path / "m.gguf"
    for length, expected in (
        (0, "not a GGUF file: found b'' at its beginning; expected b'GGUF'"),
        (20, "truncated: found 20 bytes; expected 24 or more"),
        (100, "truncated or damaged: found 100 bytes; its header needs more"),
        (700, "truncated or damaged: found 700 bytes; its header needs more"),
        (len(content) - 40, f"truncated: found {len(content) - 40} bytes; expected {len(content)} or more, as tensor "),
    ):
        path.write_bytes(content[:length])
        assert refusal(path).startswith(expected), length


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"GGUF\x01\0\0\0", "found GGUF version 1; expected 2 or 3"),
        (b"GGUF\0\0\0\x03", "big-endian GGUF file; expected a little-endian one"),
        (b"PK\x03\x04....", "not a GGUF file: found b'PK\\x03\\x04' at its beginning; expected b'GGUF'"),
        (b"version https://git-lfs.github.com", "not a GGUF file: found a git-lfs pointer at its beginning; expected"),
    ],
)
def test_other_formats_are_refused(tmp_path, start, expected):
    path = tmp_path / "model.gguf"
    path.write_bytes(start + bytes(64))
    assert refusal(path).startswith(expected)


def test_a_missing_file_is_named(tmp_path):
    assert refusal(tmp_path / "model.gguf") == "no such file"


def test_a_missing_package_is_one_line(bases, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", bases["llama"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal(path) == "reading GGUF needs the package gguf; install it with: pip install gguf"


def test_a_file_under_another_name_is_read(bases, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", bases["llama"]).rename(tmp_path / "weights.bin")
    assert open_source(path).model.num_layers == 2


def test_a_folded_file_is_the_folded_base(bases, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", bases["qwen2"])
    recursion = RecursiveConfig(num_loops=2)
    convert(path, tmp_path / "from-gguf", recursion)
    convert(bases["qwen2"], tmp_path / "from-hf", recursion)
    ours, theirs = load_model(tmp_path / "from-gguf"), load_model(tmp_path / "from-hf")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    provenance = json.loads((tmp_path / "from-gguf" / "provenance.json").read_text())
    assert provenance["parent"] == {"path": str(path), "sha256": fingerprint(path)}


def test_an_exported_file_is_the_directory_it_was_written_from(bases, tmp_path):
    export(write_gguf(tmp_path / "model.gguf", bases["gpt_neox"]), tmp_path / "out")
    ours, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
        for directory in (tmp_path / "out", bases["gpt_neox"])
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.real
def test_a_real_file_is_what_transformers_reads(tmp_path):
    path = real_gguf()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert_close(logits(load_model(path), 200), logits(theirs, 200))

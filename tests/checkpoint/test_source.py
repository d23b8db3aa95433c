"""Models from HF directories and our own checkpoints: the same whatever the layout, or refused in one line."""

import dataclasses
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rrt.checkpoint.format import CheckpointConfig, write_checkpoint
from rrt.checkpoint.hf_config import model_config_from_hf
from rrt.checkpoint.hf_layout import tensor_table
from rrt.checkpoint.source import load_model, open_source
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from tests.util.models import ALL_FAMILIES, make_hf_model

LAYOUTS = ("safetensors", "safetensors-shards", "bin", "bin-shards", "legacy-bin")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A two-layer fp32 base of each family, as transformers writes it."""
    root = tmp_path_factory.mktemp("bases")
    return {family: make_hf_model(root / family, family, num_layers=2) for family in ALL_FAMILIES}


def tensors_of(directory):
    return load_file(directory / "model.safetensors")


def write_weights(directory, tensors, layout="safetensors"):
    """Write the weight files of an HF directory in one of LAYOUTS."""
    single = "model.safetensors" if layout.startswith("safetensors") else "pytorch_model.bin"
    if not layout.endswith("-shards"):
        return write_file(directory / single, tensors, legacy=layout == "legacy-bin")
    keys, index = list(tensors), {}
    for number in range(3):
        name = single.replace(".", f"-0000{number + 1}-of-00003.")
        write_file(directory / name, {key: tensors[key] for key in keys[number::3]})
        index |= dict.fromkeys(keys[number::3], name)
    (directory / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_file(path, tensors, legacy=False):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)


def variant(base, out, change=lambda tensors: tensors, layout="safetensors", **config):
    """Copy `base` with other tensors, fields of config.json, or layout."""
    out.mkdir(parents=True)
    data = json.loads((base / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(data))
    tensors = tensors_of(base)
    write_weights(out, change(tensors) or tensors, layout)
    return out


def refusal(directory, **options):
    with pytest.raises(UserError) as error:
        load_model(directory, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same_parameters(found, expected):
    pairs = zip(found.named_parameters(), expected.named_parameters(), strict=True)
    for (name, parameter), (expected_name, expected_parameter) in pairs:
        assert name == expected_name and parameter.dtype == expected_parameter.dtype
        assert torch.equal(parameter, expected_parameter), name


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_layout_gives_bitwise_the_same_model(bases, family, tmp_path):
    expected = load_model(bases[family])
    for layout in LAYOUTS:
        assert_same_parameters(load_model(variant(bases[family], tmp_path / layout, layout=layout)), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_an_old_config_and_a_current_one_give_transformers_logits(bases, family, tmp_path):
    """Rotary settings where transformers before version 5 wrote them, and at values that show."""
    config = json.loads((bases[family] / "config.json").read_text())
    rope = config.pop("rope_parameters")
    assert rope["rope_type"] == "default"
    if family == "gpt_neox":
        config |= {"rotary_emb_base": 300, "rotary_pct": 0.5}
    else:
        config |= {"rope_theta": 300.0, "rope_scaling": None}
    if family == "gemma":
        config |= {"hidden_act": "gelu", "hidden_activation": None}
    config["torch_dtype"] = config.pop("dtype")
    old, current = tmp_path / "old", tmp_path / "current"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(config))
    write_weights(old, tensors_of(bases[family]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(old).eval()
    theirs.save_pretrained(current)
    input_ids = torch.randint(0, 151, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = theirs(input_ids).logits
    for directory in (old, current):
        error = (load_model(directory)(input_ids) - expected).abs().max() / expected.abs().max()
        assert error < 2e-5
    plain = load_model(bases[family])(input_ids)
    assert (plain - expected).abs().max() / expected.abs().max() > 1e-3


def test_all_wrong_tensors_are_listed_in_one_line(bases, tmp_path):
    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.2.extra"] = torch.zeros(3)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(80, 31)
        tensors["lm_head.weight"] = torch.zeros(151, 32, dtype=torch.int8)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 32).to(torch.float8_e4m3fn)

    directory = variant(bases["llama"], tmp_path / "one", damage)
    floats = "expected bfloat16 or float16 or float32 or float64"
    assert refusal(directory) == (
        f"{directory / 'model.safetensors'}: tensors do not match config.json: "
        "'model.layers.0.mlp.up_proj.weight': found shape [80, 31], expected [80, 32]; "
        f"'model.layers.1.mlp.up_proj.weight': found dtype float8_e4m3fn, {floats}; "
        "'model.norm.weight': missing, expected shape [32]; "
        f"'lm_head.weight': found dtype int8, {floats}; "
        "'model.layers.2.extra': found shape [3], expected no such tensor"
    )
    message = refusal(variant(bases["llama"], tmp_path / "bin", damage, layout="bin"))
    assert message.startswith(f"{tmp_path / 'bin' / 'pytorch_model.bin'}: tensors do not match config.json: ")
    assert message.count(";") == 4
    sharded = variant(bases["llama"], tmp_path / "shards", damage, layout="safetensors-shards")
    message, index = refusal(sharded), json.loads((sharded / "model.safetensors.index.json").read_text())
    assert message.startswith(f"{sharded / 'model.safetensors.index.json'}: tensors do not match config.json: ")
    assert f"'lm_head.weight' in {index['weight_map']['lm_head.weight']}: found dtype int8" in message


def test_a_long_list_is_cut(bases, tmp_path):
    message = refusal(variant(bases["llama"], tmp_path / "short", num_hidden_layers=4))
    assert message.count("missing") == 8 and message.endswith("; and 10 more")


def with_constants(family, dtype):
    def change(tensors):
        for depth in range(2):
            if family == "gpt_neox":
                prefix = f"gpt_neox.layers.{depth}.attention"
                tensors[f"{prefix}.bias"] = torch.ones(1, 1, 16, 16).tril().to(dtype)
                tensors[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
                tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(2)
            else:
                tensors[f"model.layers.{depth}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["gpt_neox.rotary_emb.inv_freq" if family == "gpt_neox" else "model.rotary_emb.inv_freq"] = torch.ones(4)

    return change


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("family", "dtype", "named"),
    [
        ("gpt_neox", torch.bool, "7 constant tensors (attention.bias, attention.masked_bias, attention.rotary_emb"),
        ("gpt_neox", torch.uint8, "7 constant tensors (attention.bias, attention.masked_bias, attention.rotary_emb"),
        ("llama", torch.float32, "3 constant tensors (model.rotary_emb.inv_freq, self_attn.rotary_emb.inv_freq)"),
    ],
)
def test_constants_of_old_checkpoints_are_skipped_and_named_in_the_log(
    bases, family, dtype, named, layout, tmp_path, caplog
):
    directory = variant(bases[family], tmp_path / "old", with_constants(family, dtype), layout=layout)
    with caplog.at_level(logging.INFO, logger="rrt.checkpoint.source"):
        model = load_model(directory)
    assert_same_parameters(model, load_model(bases[family]))
    (record,) = caplog.records
    assert f"skipped {named}" in record.getMessage() and "\n" not in record.getMessage()


def test_the_constants_of_other_layers_or_families_are_unexpected(bases, tmp_path):
    def beyond(tensors):
        tensors["gpt_neox.layers.2.attention.bias"] = torch.ones(1, dtype=torch.bool)

    assert "'gpt_neox.layers.2.attention.bias': found shape [1], expected no such tensor" in refusal(
        variant(bases["gpt_neox"], tmp_path / "beyond", beyond)
    )
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in refusal(
        variant(bases["gpt_neox"], tmp_path / "other", with_constants("llama", torch.float32))
    )


@pytest.mark.parametrize("layout", ["safetensors", "safetensors-shards", "bin"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 70, 150])
def test_a_value_that_is_not_finite_is_refused_at_load_by_tensor_and_file(bases, tmp_path, layout, bad, row):
    def spoil(tensors):
        tensors["model.embed_tokens.weight"][row, row % 32] = bad

    directory = variant(bases["llama"], tmp_path / "bad", spoil, layout)
    (place,) = (
        path
        for path in directory.glob("*.*")
        if path.suffix in (".safetensors", ".bin")
        and (layout != "safetensors-shards" or "model.embed_tokens.weight" in load_file(path))
    )
    message = f"{place}: tensor 'model.embed_tokens.weight': found NaN or infinity; expected finite values"
    for dtype in (None, torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(UserError) as error:
            load_model(directory, dtype)
        assert str(error.value) == message


def test_parts_of_a_fused_tensor_and_our_own_checkpoints_are_checked_too(bases, tmp_path):
    def spoil(tensors):
        tensors["gpt_neox.layers.1.attention.query_key_value.bias"][-1] = math.nan

    with pytest.raises(UserError, match=r"model\.safetensors: tensor 'gpt_neox\.layers\.1\.attention\.query_key_val"):
        load_model(variant(bases["gpt_neox"], tmp_path / "fused", spoil))
    convert(bases["llama"], tmp_path / "ours", RecursiveConfig(num_loops=2, lora_rank=LoraRanks(q=2)))
    tensors = tensors_of(tmp_path / "ours")
    tensors["stack.layers.0.attn.q.lora_a"][1, 1, 1] = math.inf
    save_file(tensors, tmp_path / "ours" / "model.safetensors")
    for num_loops in (None, 2):
        with pytest.raises(
            UserError, match=r"model\.safetensors: tensor 'stack\.layers\.0\.attn\.q\.lora_a': found NaN"
        ):
            load_model(tmp_path / "ours", num_loops=num_loops)
    load_model(tmp_path / "ours", num_loops=1)  # without the loop of that value


def test_values_beyond_the_dtype_that_was_chosen_are_refused(bases, tmp_path):
    def enlarge(tensors):
        tensors["model.norm.weight"][3] = -1e5

    directory = variant(bases["llama"], tmp_path / "large", enlarge)
    load_model(directory, torch.bfloat16)
    with pytest.raises(
        UserError, match=r"tensor 'model\.norm\.weight': found 1e\+05; expected at most 6\.55e\+04 for float"
    ):
        load_model(directory, torch.float16)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_tied_head_that_is_stored_too_must_equal_the_embedding(bases, layout, tmp_path):
    def stored_head(change):
        def add(tensors):
            tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"].clone())

        return add

    def last_bit(head):
        head[-1, -1] += 1e-6
        return head

    equal = variant(bases["gemma"], tmp_path / "equal", stored_head(lambda head: head), layout=layout)
    assert_same_parameters(load_model(equal), load_model(bases["gemma"]))
    differs = "'lm_head.weight' differs from 'model.embed_tokens.weight'; expected them equal, as config.json says"
    for name, change in {"bit": last_bit, "dtype": lambda head: head.half()}.items():
        directory = variant(bases["gemma"], tmp_path / name, stored_head(change), layout=layout)
        assert differs in refusal(directory)
    directory = variant(bases["gemma"], tmp_path / "shape", stored_head(lambda head: head[:3].clone()), layout=layout)
    assert "'lm_head.weight': found shape [3, 32], expected [151, 32]" in refusal(directory)


def test_a_state_dict_of_transformers_saved_as_it_is_loads(bases, tmp_path):
    """Transformers 5 calls GPT-NeoX's head lm_head in memory."""
    for family in ALL_FAMILIES:
        directory = tmp_path / family
        directory.mkdir()
        shutil.copy(bases[family] / "config.json", directory)
        model = transformers.AutoModelForCausalLM.from_pretrained(bases[family])
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
        assert_same_parameters(load_model(directory), load_model(bases[family]))


def test_unusable_directories_are_refused(bases, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == f"{tmp_path / 'empty' / 'config.json'}: no such file"
    (tmp_path / "file").write_text("x")
    expected = "expected an HF model directory, a GGUF file or a checkpoint"
    assert refusal(tmp_path / "file") == f"{tmp_path / 'file'}: is a file; {expected}"
    assert refusal(tmp_path / "absent") == f"{tmp_path / 'absent'}: no such directory; {expected}"
    shutil.copy(bases["llama"] / "config.json", tmp_path / "empty")
    assert refusal(tmp_path / "empty").startswith(f"{tmp_path / 'empty'}: no weights; expected model.safetensors")
    (tmp_path / "empty" / "config.json").write_text('{"format": "other"}')
    assert "field 'model_type': found null; expected gemma, llama, mistral, qwen2, qwen3, gpt_neox" in refusal(
        tmp_path / "empty"
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_stored_one_unless_asked(bases, stored, tmp_path):
    directory = variant(bases["llama"], tmp_path / "x", lambda t: {key: value.to(stored) for key, value in t.items()})
    model = load_model(directory)
    assert open_source(directory).dtype == stored
    assert {parameter.dtype for parameter in model.parameters()} == {stored}
    wide = load_model(directory, torch.float64)
    assert_same_parameters(wide, model.double())


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_parameters_go_to_the_device(bases, device):
    model = load_model(bases["gpt_neox"], torch.bfloat16, device)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, torch.bfloat16)}


def test_an_hf_directory_has_one_loop(bases):
    assert load_model(bases["llama"], num_loops=1).recursion == RecursiveConfig()
    assert refusal(bases["llama"], num_loops=2) == (
        f"num_loops: found 2; {bases['llama']} has 1: expected 1 to 1 "
        "(fold a vanilla model with python -m rrt.convert first)"
    )


RELAXED = {
    "recursive": dict(num_loops=2),
    "relaxed": dict(num_loops=4, lora_rank=LoraRanks(q=3, kv=5, out=0, ffn=7), exit_loops=(0, 1, 2)),
    "untied": dict(num_loops=2, lora_rank=LoraRanks.uniform(2), untie_norms=True),
    "prefix": dict(num_loops=4, prefix_length=3, untie_norms=True),
}


def write_native(out, base, recursion, dtype=torch.float32):
    """Write a checkpoint of ours like `base`, with four layers and random parameters; returns its model."""
    config = dataclasses.replace(open_source(base).model, num_layers=4)
    model = RecursiveTransformer(config, RecursiveConfig(**recursion)).to(dtype).eval()
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with write_checkpoint(out, CheckpointConfig(config, model.recursion, dtype), {}) as writer:
        for name, parameter in model.named_parameters():
            writer.add(name, parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("recursion", RELAXED.values(), ids=RELAXED)
def test_fewer_loops_than_stored_equal_the_exit_after_them(bases, family, recursion, tmp_path):
    model = write_native(tmp_path / "checkpoint", bases[family], recursion)
    input_ids = torch.randint(0, 151, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(load_model(tmp_path / "checkpoint")(input_ids), model(input_ids))
    for num_loops in range(1, model.recursion.num_loops + 1):
        short = load_model(tmp_path / "checkpoint", num_loops=num_loops)
        assert short.recursion.num_loops == num_loops
        assert short.config.num_layers == num_loops * len(model.stack.layers)
        assert all(loop < num_loops - 1 for loop in short.recursion.exit_loops)
        assert torch.equal(short(input_ids), model(input_ids, exit_loop=num_loops - 1))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma", "gpt_neox"])
def test_fewer_loops_take_the_lora_of_their_exit_into_the_head(bases, family, tmp_path):
    recursion = dict(num_loops=4, head_lora_rank=3, exit_loops=(0, 1, 2))
    model = write_native(tmp_path / "checkpoint", bases[family], recursion, torch.float64)
    input_ids = torch.randint(0, 151, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(load_model(tmp_path / "checkpoint")(input_ids, exit_loop=2), model(input_ids, exit_loop=2))
    for num_loops in range(1, 4):
        short = load_model(tmp_path / "checkpoint", num_loops=num_loops)
        assert (short.recursion.head_lora_rank, short.recursion.exit_loops) == (0, ())
        expected = model(input_ids, exit_loop=num_loops - 1)
        torch.testing.assert_close(short(input_ids), expected, rtol=0, atol=1e-12)
    plain = load_model(tmp_path / "checkpoint", num_loops=4)
    assert torch.equal(plain(input_ids), model(input_ids))


def test_fewer_loops_are_refused_where_the_last_of_them_has_a_translator(bases, tmp_path):
    model = write_native(tmp_path / "checkpoint", bases["llama"], dict(num_loops=4, exit_translators=True))
    assert_same_parameters(load_model(tmp_path / "checkpoint", num_loops=4), model)
    assert refusal(tmp_path / "checkpoint", num_loops=2) == (
        f"num_loops: found 2; {tmp_path / 'checkpoint'} has 4 and exit translators, which a last loop cannot have: "
        "expected 4, or exit there: exit_loop=1"
    )


@pytest.mark.parametrize("num_loops", [0, -1, 5])
def test_loops_out_of_range_are_refused(bases, num_loops, tmp_path):
    write_native(tmp_path / "checkpoint", bases["llama"], RELAXED["relaxed"])
    message = f"num_loops: found {num_loops}; {tmp_path / 'checkpoint'} has 4: expected 1 to 4"
    assert refusal(tmp_path / "checkpoint", num_loops=num_loops) == message


def test_our_checkpoints_convert_dtype_on_loading(bases, tmp_path):
    model = write_native(tmp_path / "checkpoint", bases["gemma"], RELAXED["untied"], torch.bfloat16)
    assert_same_parameters(load_model(tmp_path / "checkpoint"), model)
    assert_same_parameters(load_model(tmp_path / "checkpoint", torch.float32), model.float())


def test_every_tensor_of_our_checkpoints_is_accounted_for(bases, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    write_native(checkpoint, bases["llama"], RELAXED["relaxed"])
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    del tensors["stack.layers.0.mlp.up.lora_a"]
    tensors["embed"] = tensors["embed"].half()
    tensors["stack.layers.0.attn.q.lora_b"] = tensors["stack.layers.0.attn.q.lora_b"][:2].clone()
    tensors["stack.layers.1.attn_norm.weight"] = torch.ones(32)
    save_file(tensors, weights)
    assert refusal(checkpoint) == (
        f"{weights}: tensors do not match config.json: 'embed': found dtype float16, expected float32; "
        "'stack.layers.0.attn.q.lora_b': found shape [2, 32, 3], expected [4, 32, 3]; "
        "'stack.layers.0.mlp.up.lora_a': missing, expected shape [4, 7, 32]; "
        "'stack.layers.1.attn_norm.weight': found shape [32], expected no such tensor"
    )


def test_damaged_checkpoints_of_ours_are_refused(bases, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    write_native(checkpoint, bases["llama"], RELAXED["recursive"])
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal(checkpoint).startswith(f"{weights}: damaged or truncated safetensors file (")
    weights.unlink()
    assert refusal(checkpoint).startswith(f"{checkpoint}: no weights; expected model.safetensors")
    (checkpoint / "config.json").unlink()
    assert refusal(checkpoint) == f"{checkpoint / 'config.json'}: no such file"


# Runs in a process of its own, each case in a child. VmHWM counts mapped file pages too; 5 in clear_refs resets it.
_MEASURE = """
import json, os, sys, torch
from rrt.checkpoint.source import load_model

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def measure(warm_up, directory, dtype):
    load_model(warm_up, dtype)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    model = load_model(directory, dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"size": size, "peak": status("VmHWM") - before}), flush=True)

for layout in sys.argv[2:]:
    for dtype in (torch.bfloat16, torch.float32):
        if (child := os.fork()) == 0:
            measure(f"{sys.argv[1]}/small-{layout}", f"{sys.argv[1]}/large-{layout}", dtype)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's resettable peak memory")
def test_peak_memory_of_loading_is_at_most_1_2_times_the_model(bases, tmp_path):
    """Gemma-like and tied, fp32, 170 MB of which the embedding is 20 %."""
    layouts = ("safetensors", "bin")
    sizes = dict(vocab_size=16384, hidden_size=512, intermediate_size=2048, num_hidden_layers=9, head_dim=128)
    for name, changes in (("large", sizes), ("small", {"num_hidden_layers": 1})):
        config = json.loads((bases["gemma"] / "config.json").read_text()) | changes
        table = tensor_table(model_config_from_hf(config, name))
        tensors = {entry.key: torch.full(entry.shape, 0.5) for entry in table}
        for layout in layouts:
            directory = tmp_path / f"{name}-{layout}"
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps(config))
            write_weights(directory, tensors, layout)
    command = [sys.executable, "-c", _MEASURE, tmp_path, *layouts]
    root = Path(__file__).resolve().parents[2]
    lines = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    shutil.rmtree(tmp_path)
    assert len(lines) == 4
    for found in map(json.loads, lines):
        assert found["size"] > 80e6
        assert 0.9 * found["size"] < found["peak"] <= 1.2 * found["size"], lines

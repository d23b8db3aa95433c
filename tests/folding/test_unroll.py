"""Unrolled export: transformers loads it without complaint and computes what our model computes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rrt.checkpoint.format import CheckpointConfig, write_checkpoint
from rrt.checkpoint.hf_config import model_config_from_hf
from rrt.checkpoint.source import load_model, open_source
from rrt.checkpoint.tensor_files import TensorFiles
from rrt.common.provenance import make_provenance
from rrt.data.tokenizer import load_tokenizer
from rrt.export import main
from rrt.folding.conversion import convert
from rrt.folding.unroll import export, prepare_export, run_export
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.meta import meta_model
from tests.util.commands import run_main
from tests.util.models import ALL_FAMILIES, MIXED_RANKS, make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer

RECURSIVE = {
    "recursive": RecursiveConfig(num_loops=2, init="stepwise"),
    "relaxed": RecursiveConfig(num_loops=3, init="average", lora_rank=LoraRanks(q=4, kv=0, out=3, ffn=9)),
    "sequence": RecursiveConfig(num_loops=3, sharing="sequence", lora_rank=LoraRanks.uniform(4), untie_norms=True),
    "cycle-rev": RecursiveConfig(num_loops=2, sharing="cycle-rev", lora_rank=LoraRanks.uniform(4), untie_norms=True),
    "mixed": RecursiveConfig(num_loops=2, init="average", lora_rank=MIXED_RANKS),
    "untied": RecursiveConfig(num_loops=2, init="average", lora_rank=LoraRanks.uniform(5), untie_norms=True),
}


def random_checkpoint(base, out, recursion, dtype=torch.float32):
    """Write a checkpoint whose every parameter is random, as after training: LoRA B and norms included."""
    config = open_source(base).model
    generator = torch.Generator().manual_seed(0)
    provenance = make_provenance("test", None)
    with write_checkpoint(out, CheckpointConfig(config, recursion, dtype), provenance) as writer:
        for name, parameter in meta_model(config, recursion).named_parameters():
            scale = 0.3 if "norm" in name or name.endswith("bias") else 0.12
            writer.add(name, scale * torch.randn(parameter.shape, generator=generator) + ("norm.weight" in name))
    return out


def load_in_transformers(directory, dtype=torch.float32):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("recursion", RECURSIVE.values(), ids=RECURSIVE)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_transformers_computes_our_logits_from_the_export(bases, family, recursion, tmp_path):
    checkpoint = random_checkpoint(bases[family], tmp_path / "checkpoint", recursion)
    export(checkpoint, tmp_path / "hf")
    input_ids = torch.randint(0, 151, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = load_model(checkpoint)(input_ids)
    found = load_in_transformers(tmp_path / "hf")(input_ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    # Our own loader reads the export too.
    assert (load_model(tmp_path / "hf")(input_ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_vanilla_round_trip_is_bit_for_bit(family, dtype, tmp_path):
    base = make_hf_model(tmp_path / "base", family, dtype=dtype, num_layers=2)
    convert(base, tmp_path / "vanilla", RecursiveConfig())
    export(tmp_path / "vanilla", tmp_path / "back")
    export(base, tmp_path / "direct")
    expected = load_file(base / "model.safetensors")
    for directory in (tmp_path / "back", tmp_path / "direct"):
        found = load_file(directory / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype == dtype
            assert torch.equal(found[key], tensor), key
        configs = [json.loads((d / "config.json").read_text()) for d in (base, directory)]
        assert model_config_from_hf(configs[0], "base") == model_config_from_hf(configs[1], "export")
        ours, theirs = (transformers.AutoConfig.from_pretrained(d).to_dict() for d in (directory, base))
        for key in (*"architectures model_type dtype rope_parameters hidden_act tie_word_embeddings".split(),):
            assert ours.get(key) == theirs.get(key), key


def test_relaxed_weights_are_summed_in_fp32_and_rounded_once(bases, tmp_path):
    recursion = RecursiveConfig(num_loops=2, init="average", lora_rank=LoraRanks.uniform(6))
    checkpoint = random_checkpoint(bases["gpt_neox"], tmp_path / "checkpoint", recursion, torch.bfloat16)
    export(checkpoint, tmp_path / "hf")
    export(checkpoint, tmp_path / "wide", dtype=torch.float32)
    source, found = open_source(checkpoint), load_file(tmp_path / "hf" / "model.safetensors")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    for depth in range(6):
        name = f"stack.layers.{depth % 3}.mlp.up"
        weight, lora_a, lora_b = (source.get(f"{name}.{leaf}").double() for leaf in ("weight", "lora_a", "lora_b"))
        expected = weight + lora_b[depth // 3] @ lora_a[depth // 3]
        key = f"gpt_neox.layers.{depth}.mlp.dense_h_to_4h.weight"
        assert found[key].dtype == torch.bfloat16 and wide[key].dtype == torch.float32
        torch.testing.assert_close(wide[key].double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[key], wide[key].to(torch.bfloat16))


def test_tokenizer_config_and_provenance_come_along(tmp_path):
    base = make_hf_model(tmp_path / "base", "gpt_neox", vocab_size=448, num_layers=2)
    make_bpe_tokenizer(base)
    convert(base, tmp_path / "recursive", RecursiveConfig(num_loops=2))
    export(tmp_path / "recursive", tmp_path / "hf")
    assert load_tokenizer(tmp_path / "hf").sha256 == load_tokenizer(base).sha256
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("x = 1").input_ids == load_tokenizer(base).encode("x = 1")
    provenance = json.loads((tmp_path / "hf" / "provenance.json").read_text())
    assert provenance["stage"] == "export" and provenance["parent"]["path"] == str(tmp_path / "recursive")


def test_a_chat_and_generation_go_on_as_on_the_base(tmp_path):
    base = make_hf_model(tmp_path / "base", "llama", vocab_size=448, num_layers=2)
    make_bpe_tokenizer(base, "llama")
    (base / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "do_sample": True, "top_k": 7}))
    convert(base, tmp_path / "recursive", RecursiveConfig(num_loops=2))
    export(tmp_path / "recursive", tmp_path / "hf")
    assert load_tokenizer(tmp_path / "recursive").stop_ids == load_tokenizer(tmp_path / "hf").stop_ids == (2, 5)
    expected, found = (transformers.AutoTokenizer.from_pretrained(path) for path in (base, tmp_path / "hf"))
    chat = [{"role": "user", "content": "x = 1"}]
    ids = found.apply_chat_template(chat, return_dict=False)
    assert ids == expected.apply_chat_template(chat, return_dict=False)
    ours = load_tokenizer(tmp_path / "hf")
    assert found.apply_chat_template(chat, tokenize=False) == ours.apply_chat_template(chat) == "<s>x = 1</s>"
    generation = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config
    assert (generation.eos_token_id, generation.top_k) == ([2, 5], 7)


def test_several_eos_become_a_generation_config_where_the_base_has_none(tmp_path):
    base = make_hf_model(tmp_path / "base", "llama", vocab_size=448, num_layers=2)
    make_bpe_tokenizer(base, "llama")
    (base / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((base / "config.json").read_text())
    for eos, expected in ((2, None), ([2, 5], {"bos_token_id": 1, "eos_token_id": [2, 5]})):
        (base / "config.json").write_text(json.dumps(config | {"bos_token_id": 1, "eos_token_id": eos}))
        export(base, tmp_path / "hf", overwrite=True)
        path = tmp_path / "hf" / "generation_config.json"
        assert (json.loads(path.read_text()) if path.exists() else None) == expected
        assert load_tokenizer(tmp_path / "hf").stop_ids == load_tokenizer(base).stop_ids
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == [2, 5]


def test_shards_and_index_load_in_transformers(bases, tmp_path):
    prepared = prepare_export(bases["gpt_neox"], tmp_path / "hf")
    run_export(prepared, max_shard_bytes=50_000)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    load_in_transformers(tmp_path / "hf")
    files, single = TensorFiles(tmp_path / "hf"), load_file(bases["gpt_neox"] / "model.safetensors")
    assert all(torch.equal(files.get(key), tensor) for key, tensor in single.items())


def test_a_tied_layer_is_written_once_per_depth(bases, tmp_path):
    convert(bases["llama"], tmp_path / "recursive", RecursiveConfig(num_loops=6))
    export(tmp_path / "recursive", tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as stream:
        weights = [stream.get_tensor(f"model.layers.{depth}.mlp.up_proj.weight") for depth in range(6)]
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_command_says_what_it_does(bases, tmp_path, capsys, monkeypatch):
    convert(bases["llama"], tmp_path / "recursive", RecursiveConfig(num_loops=2))
    argv = ["--checkpoint", tmp_path / "recursive", "--out", tmp_path / "hf", "--dtype", "bfloat16"]
    code, stdout, stderr = run_main(main, argv, capsys, monkeypatch)
    assert (code, stderr) == (0, "")
    assert "2 loops x 3 layers" in stdout and "LlamaForCausalLM, 6 layers, 74.59 K parameters" in stdout
    assert "no tokenizer" in stdout and f"wrote {tmp_path / 'hf'}" in stdout
    assert open_source(tmp_path / "hf").dtype == torch.bfloat16


def test_bad_input_ends_with_one_line_and_leaves_nothing(bases, tmp_path, capsys, monkeypatch):
    prefix = random_checkpoint(bases["llama"], tmp_path / "prefix", RecursiveConfig(num_loops=2, prefix_length=3))
    big = random_checkpoint(bases["llama"], tmp_path / "big", RecursiveConfig(num_loops=2))
    weights = load_file(big / "model.safetensors")
    weights["stack.layers.1.mlp.up.weight"][0, 0] = 1e6
    save_file(weights, big / "model.safetensors")
    before = sorted(tmp_path.rglob("*"))
    cases = {
        "'recursive.prefix_length': found 3; expected 0: the HF layout has no place": ["--checkpoint", prefix],
        "no such directory": ["--checkpoint", tmp_path / "absent"],
        "already exists and is not empty": ["--out", prefix],
        "holds the checkpoint that is read": ["--out", big, "--overwrite"],
        "model.layers.1.mlp.up_proj.weight' is not finite in float16": ["--dtype", "float16"],
    }
    for message, flags in cases.items():
        argv = ["--checkpoint", big, "--out", tmp_path / "out", *flags]
        code, _, stderr = run_main(main, argv, capsys, monkeypatch)
        assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_terminated_command_leaves_nothing_behind(tmp_path):
    base = make_hf_model(tmp_path / "base", "llama", num_layers=8, hidden_size=512, intermediate_size=2048)
    convert(base, tmp_path / "recursive", RecursiveConfig(num_loops=2))
    command = [sys.executable, "-m", "rrt.export", "--checkpoint", tmp_path / "recursive", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (143, "interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "recursive"]

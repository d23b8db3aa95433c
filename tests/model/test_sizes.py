"""Sizes: the paper's parameter counts, the presets against transformers, K/V bytes and FLOPs by hand."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from rrt.checkpoint.hf_layout import tensor_table
from rrt.checkpoint.presets import PRESETS, preset, preset_dtype
from rrt.checkpoint.source import open_source
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.inspect import main
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.meta import parameter_shapes
from rrt.model.sizes import model_sizes, without_sharing
from tests.util.commands import run_main
from tests.util.models import FAMILIES, make_hf_model

# Non-embedding parameters in billions, as the paper prints them: (preset, loops): {rank: count}.
PAPER_COUNTS = {
    ("gemma-2b", 2): {0: 0.99, 64: 1.07, 128: 1.15, 256: 1.30, 512: 1.60},
    ("gemma-2b", 3): {0: 0.66, 64: 0.74, 128: 0.82, 256: 0.97, 512: 1.27},
    ("tinyllama-1.1b", 2): {0: 0.48, 64: 0.53, 128: 0.58, 256: 0.68, 512: 0.86},
    ("pythia-1b", 2): {0: 0.40, 64: 0.44, 128: 0.48, 256: 0.55, 512: 0.70},
}
MIXED_RANKS = {
    (128, 256, 128, 256): 1.28,
    (256, 128, 256, 256): 1.29,
    (256, 256, 256, 128): 1.18,
    (128, 128, 128, 64): 1.08,
}


def non_embedding_params(name, **recursion):
    return model_sizes(preset(name), RecursiveConfig(**recursion), torch.bfloat16).non_embedding_params


def as_printed(count):
    """Format `count` in billions as the paper does: two decimals, some of its rows rounded and some cut."""
    return round(count / 1e9, 2), count // 10**7 / 100


@pytest.mark.parametrize(("name", "num_loops"), PAPER_COUNTS)
def test_non_embedding_parameters_are_the_papers(name, num_loops):
    for rank, expected in PAPER_COUNTS[name, num_loops].items():
        found = non_embedding_params(name, num_loops=num_loops, lora_rank=LoraRanks.uniform(rank))
        assert expected in as_printed(found), (rank, found)


def test_mixed_ranks_are_the_papers():
    for ranks, expected in MIXED_RANKS.items():
        found = non_embedding_params("gemma-2b", num_loops=2, lora_rank=LoraRanks(*ranks))
        assert expected in as_printed(found), (ranks, found)


def test_low_rank_alone_has_as_many_parameters_as_the_folding_up_to_the_last_rank():
    for name in ("gemma-2b", "tinyllama-1.1b", "pythia-160m"):
        for loops, rank in ((2, 0), (2, 64)):
            model, folding = preset(name), RecursiveConfig(num_loops=loops, lora_rank=LoraRanks.uniform(rank))
            low_rank = without_sharing(model, folding)
            found, wanted = (model_sizes(model, each, torch.float32).total_params for each in (low_rank, folding))
            assert 0 <= 1 - found / wanted < 2e-4


def test_low_rank_alone_of_rank_1_counts_no_whole_weights_as_nothing():
    sizes = dict(hidden_size=24, num_layers=12, num_heads=4, num_kv_heads=4, head_dim=6, intermediate_size=64)
    model, folding = replace(preset("tinyllama-1.1b"), **sizes), RecursiveConfig(num_loops=12)
    low_rank = without_sharing(model, folding)
    found, wanted = (model_sizes(model, each, torch.float32).total_params for each in (low_rank, folding))
    assert found <= wanted
    assert min(low_rank.lora_rank.q, low_rank.lora_rank.kv, low_rank.lora_rank.out, low_rank.lora_rank.ffn) >= 1


def test_flops_of_low_rank_alone_are_those_of_two_products():
    model = preset("pythia-160m")
    low_rank = RecursiveConfig(lora_rank=LoraRanks(q=8, kv=0, out=8, ffn=8), low_rank_only=True)
    found, vanilla = (model_sizes(model, each, torch.float32, 1) for each in (low_rank, RecursiveConfig()))
    saved = 2 * 12 * (2 * (768 * 768 - 8 * 1536) + 2 * (768 * 3072 - 8 * 3840))
    assert found.flops_per_token["plain"] == found.flops_per_token["merged"]
    assert vanilla.flops_per_token["plain"] - found.flops_per_token["plain"] == saved
    assert found.merge_flops == 0 and found.lora_params == 12 * (2 * 8 * 1536 + 2 * 8 * 3840)


def test_base_models_are_the_papers():
    for name, non_embedding, embedding in (
        ("gemma-2b", 1.98, 0.52),
        ("tinyllama-1.1b", 0.97, 0.13),
        ("pythia-1b", 0.81, 0.21),
    ):
        sizes = model_sizes(preset(name), RecursiveConfig(), torch.bfloat16)
        assert non_embedding in as_printed(sizes.non_embedding_params)
        assert embedding in as_printed(sizes.embedding_params)


def test_base_models_have_the_published_numbers_of_parameters():
    for name, total in {
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "smollm2-135m": 134_515_008,
        "smollm2-360m": 361_821_120,
        "smollm2-1.7b": 1_711_376_384,
        "mistral-7b": 7_241_732_096,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "qwen3-0.6b": 596_049_920,
        "qwen3-1.7b": 1_720_574_976,
    }.items():
        assert model_sizes(preset(name), RecursiveConfig(), torch.bfloat16).total_params == total


def test_prefix_sizes_are_the_papers():
    for name, length, millions in (
        ("gemma-2b", 256, 9.4),
        ("gemma-2b", 512, 18.9),
        ("gemma-2b", 1024, 37.7),
        ("gemma-2b", 2048, 75.5),
        ("tinyllama-1.1b", 256, 11.5),
    ):
        recursion = RecursiveConfig(num_loops=2, prefix_length=length)
        assert round(model_sizes(preset(name), recursion, torch.bfloat16).prefix_params / 1e6, 1) == millions


def test_kinds_add_up_and_untied_norms_are_counted_per_depth():
    config = preset("gemma-2b")
    for untie_norms, norm_vectors in ((False, 2 * 9 + 1), (True, 2 * 18 + 1)):
        recursion = RecursiveConfig(
            num_loops=2, lora_rank=LoraRanks.uniform(8), prefix_length=4, untie_norms=untie_norms, exit_translators=True
        )
        sizes = model_sizes(config, recursion, torch.float32)
        kinds = ("embedding", "shared", "lora", "prefix", "translator", "norm")
        assert sum(getattr(sizes, f"{kind}_params") for kind in kinds) == sizes.total_params == sizes.bytes // 4
        assert sizes.translator_params == 2048 * 2048 + 2048
        assert sizes.norm_params == norm_vectors * 2048
    # 9 layers of q 2048 x 2048, k and v 256 x 2048, out 2048 x 2048, and three of 16384 x 2048.
    assert sizes.shared_params == 9 * 2048 * (2048 + 2 * 256 + 2048 + 3 * 16384)
    assert sizes.lora_params == 2 * 9 * 8 * (2 * 4096 + 2 * (2048 + 256) + 3 * (2048 + 16384))
    tied, untied = (
        model_sizes(preset("pythia-1b"), RecursiveConfig(num_loops=2, untie_norms=flag), torch.float16)
        for flag in (False, True)
    )
    biases = 8 * (3 * 2048 + 2048 + 8192 + 2048)
    assert tied.shared_params - untied.shared_params == biases
    assert untied.norm_params - tied.norm_params == 2 * biases + 8 * 4 * 2048


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma-2b", 2 * 18 * 1 * 256 * 2),
        ("tinyllama-1.1b", 2 * 22 * 4 * 64 * 4),
        ("pythia-1b", 2 * 16 * 8 * 256 * 2),
        ("pythia-410m", 2 * 24 * 16 * 64 * 2),
    ],
)
def test_kv_bytes_count_every_depth_whatever_the_loops(name, expected):
    for num_loops in (1, 2):
        sizes = model_sizes(preset(name), RecursiveConfig(num_loops=num_loops), preset_dtype(name))
        assert sizes.kv_bytes_per_token == expected


def test_flops_are_two_per_multiply_add_of_linears_lora_attention_and_head():
    config = preset("tinyllama-1.1b")
    recursion = RecursiveConfig(num_loops=2, lora_rank=LoraRanks(ffn=16))
    sizes = model_sizes(config, recursion, torch.float32, context=100)
    linears = 22 * 2048 * (2 * 2048 + 2 * 256 + 3 * 5632)
    attention = 22 * 2 * 2048 * 100
    head = 32000 * 2048
    lora = 22 * 3 * 16 * (2048 + 5632)
    assert sizes.flops_per_token == {
        "plain": 2 * (linears + attention + head + lora),
        "merged": 2 * (linears + attention + head),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_tensor_table_is_transformers_own_key_by_key(name):
    facts = {key: value for key, value in PRESETS[name].items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(PRESETS[name]["model_type"], **facts)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    if preset(name).tie_embeddings:
        del expected["lm_head.weight"]
    elif preset(name).family == "gpt_neox" and "lm_head.weight" in expected:
        # transformers 5 renames the head in memory; its files keep the published name.
        expected["embed_out.weight"] = expected.pop("lm_head.weight")
    assert {entry.key: entry.shape for entry in tensor_table(preset(name))} == expected


def test_every_target_of_the_tables_is_a_parameter_of_our_model():
    for name in PRESETS:
        targets = [target for entry in tensor_table(preset(name)) for target in entry.targets]
        assert sorted(targets) == sorted(parameter_shapes(preset(name), RecursiveConfig()))


def test_unknown_preset_is_refused_by_name():
    with pytest.raises(UserError, match=r"preset: found 'gemma-7b'; expected one of gemma-2b, tinyllama-1\.1b"):
        preset("gemma-7b")


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_counts_are_those_of_its_tensors(family, tmp_path, capsys, monkeypatch):
    base = make_hf_model(tmp_path / "base", family, dtype=torch.bfloat16)
    recursion = RecursiveConfig(num_loops=2, init="average", lora_rank=LoraRanks.uniform(20), untie_norms=True)
    convert(base, tmp_path / "relaxed", recursion)
    for directory in (base, tmp_path / "relaxed"):
        code, stdout, _ = run_main(main, ["--checkpoint", directory, "--json"], capsys, monkeypatch)
        found = json.loads(stdout)
        source = open_source(directory)
        tensors = {name: source.get(name) for name in parameter_shapes(source.model, source.recursion)}
        assert code == 0
        assert found["total_params"] == sum(tensor.numel() for tensor in tensors.values())
        assert found["lora_params"] == sum(tensor.numel() for name, tensor in tensors.items() if "lora" in name)
        assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
        assert found["dtype"] == "bfloat16" and found["model"]["family"] == family
    # A vanilla base with flags tells what convert would make of it.
    flags = ["--num-loops", 2, "--lora-rank", 20, "--untie-norms", "--json"]
    planned = json.loads(run_main(main, ["--checkpoint", base, *flags], capsys, monkeypatch)[1])
    assert {key: value for key, value in planned.items() if key != "recursive"} == {
        key: value for key, value in found.items() if key != "recursive"
    }


def test_command_prints_a_table(capsys, monkeypatch):
    argv = ["--preset", "gemma-2b", "--num-loops", 2, "--lora-rank", 64, "--lora-rank-ffn", 32]
    done = run_main(main, argv, capsys, monkeypatch)
    assert (done.code, done.err) == (0, "")
    for text in ("18 = 2 loops x 9 layers", "q 64, kv 64, out 64, ffn 32", "18.00 KiB", "524,288,000"):
        assert text in done.out


def test_ranks_are_capped_as_conversion_caps_them(capsys, monkeypatch):
    argv = ["--preset", "gemma-2b", "--num-loops", 2, "--lora-rank", 100_000, "--json"]
    found = json.loads(run_main(main, argv, capsys, monkeypatch)[1])
    ranks = {"q": 2048, "kv": 256, "out": 2048, "ffn": 2048}
    assert found["recursive"]["lora_rank"] == ranks | {"is_budget": False, "matrices": {}}


def test_dtype_and_context_change_bytes_and_flops(capsys, monkeypatch):
    argv = ["--preset", "pythia-160m", "--json"]
    half = json.loads(run_main(main, argv, capsys, monkeypatch)[1])
    full = json.loads(run_main(main, [*argv, "--dtype", "float32", "--context", 1], capsys, monkeypatch)[1])
    assert half["dtype"] == "float16" and full["bytes"] == 2 * half["bytes"]
    assert full["kv_bytes_per_token"] == 2 * half["kv_bytes_per_token"]
    assert half["flops_per_token"]["plain"] - full["flops_per_token"]["plain"] == 2 * 2 * 12 * 768 * 2047


def test_bad_input_ends_with_one_line(tmp_path, capsys, monkeypatch):
    base = make_hf_model(tmp_path / "base", "llama")
    convert(base, tmp_path / "recursive", RecursiveConfig(num_loops=2))
    cases = {
        "which does not divide the base's 18 layers": ["--preset", "gemma-2b", "--num-loops", 4],
        "'lora_rank.kv': found -2": ["--preset", "gemma-2b", "--lora-rank-kv", -2],
        "'prefix_length': found -1": ["--preset", "gemma-2b", "--prefix-length", -1],
        "context: found 0": ["--preset", "gemma-2b", "--context", 0],
        "no such directory": ["--checkpoint", tmp_path / "absent"],
        "is recursive already (num_loops = 2)": ["--checkpoint", tmp_path / "recursive", "--lora-rank", 4],
    }
    for message, argv in cases.items():
        code, stdout, stderr = run_main(main, argv, capsys, monkeypatch)
        assert (code, stdout) == (2, "") and message in stderr and stderr.count("\n") == 1, stderr

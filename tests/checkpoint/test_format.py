"""Our checkpoint directory: writing, strict reading, and the fingerprint."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rrt.checkpoint.format import CheckpointConfig, is_checkpoint, read_checkpoint_config, write_checkpoint
from rrt.checkpoint.source import load_model
from rrt.common.provenance import fingerprint, make_provenance
from rrt.errors import UserError
from rrt.model.config import LoraRanks, ModelConfig, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer

MODEL = ModelConfig(
    family="gpt_neox",
    vocab_size=50,
    hidden_size=16,
    num_layers=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    max_position_embeddings=64,
    activation="gelu",
    gated_mlp=False,
    norm_type="layernorm",
    norm_eps=1e-5,
    rope_theta=10000.0,
    rotary_fraction=0.25,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    parallel_residual=True,
    tie_embeddings=False,
    scale_embeddings=False,
    eos_token_ids=(0,),
)
EVERYTHING = RecursiveConfig(
    num_loops=2,
    init="average",
    norm_init="choice",
    lora_rank=LoraRanks(q=3, kv=2, out=0, ffn=4),
    lora_init="zero",
    untie_norms=True,
    prefix_length=3,
    exit_loops=(0,),
)


def random_model(recursion=EVERYTHING, seed=0):
    model = RecursiveTransformer(MODEL, recursion).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def write(out, model, dtype=torch.float32, **options):
    provenance = make_provenance("test", None)
    with write_checkpoint(out, CheckpointConfig(MODEL, model.recursion, dtype), provenance, **options) as writer:
        for name, parameter in model.named_parameters():
            writer.add(name, parameter)
    return out


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "checkpoint", random_model())


def edit(checkpoint, **changes):
    """Set fields of config.json; ``model__x=1`` reaches into an object, None removes."""
    path = checkpoint / "config.json"
    data = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, leaf = name.split("__")
        place = data[outer[0]] if outer else data
        if value is None:
            del place[leaf]
        else:
            place[leaf] = value
    path.write_text(json.dumps(data))


def test_a_checkpoint_comes_back_as_it_was_written(checkpoint):
    config = read_checkpoint_config(checkpoint / "config.json")
    assert config == CheckpointConfig(MODEL, EVERYTHING, torch.float32)
    data = json.loads((checkpoint / "config.json").read_text())
    assert is_checkpoint(data) and data["format_version"] == 2 and not is_checkpoint({"model_type": "llama"})
    model, loaded = random_model(), load_model(checkpoint)
    assert not loaded.training
    for (name, expected), (found_name, found) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == found_name and torch.equal(found, expected), name


def test_tensors_are_stored_once_under_the_models_names_in_the_checkpoints_dtype(tmp_path):
    model = random_model()
    out = write(tmp_path / "out", model, torch.bfloat16)
    stored = load_file(out / "model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == {
        key: tuple(parameter.shape) for key, parameter in model.named_parameters()
    }
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["embed"], model.embed.to(torch.bfloat16))
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "provenance.json"]


def test_provenance_says_where_it_comes_from(checkpoint, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/tool.py", "--name", "two words"])
    provenance = make_provenance("next", checkpoint, tokens=5)
    assert provenance["stage"] == "next" and provenance["tokens"] == 5
    assert provenance["parent"] == {"path": str(checkpoint), "sha256": fingerprint(checkpoint)}
    assert provenance["command"] == "tool.py --name 'two words'"
    assert json.loads((checkpoint / "provenance.json").read_text())["parent"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "field 'format_version': found 1; expected 2"),
        ({"format_version": None}, "field 'format_version': found None; expected 2"),
        ({"format_version": True}, "field 'format_version': found True; expected 2"),
        ({"extra": 1}, "unknown field 'extra'; expected format, format_version, dtype, model, recursive"),
        ({"dtype": "int8"}, "dtype: found 'int8'; expected one of float32"),
        ({"dtype": 16}, "field 'dtype': found 16; expected str"),
        ({"model": [1]}, "field 'model': found [1]; expected dict"),
        ({"recursive": None}, "field 'recursive': found None; expected dict"),
        ({"model__width": 3}, "unknown field 'model.width'; expected one of: family"),
        (
            {"model__family": "bert"},
            "field 'model.family': found 'bert'; expected one of 'gemma', 'llama', 'mistral', 'qwen2', 'qwen3', "
            "'gpt_neox'",
        ),
        ({"model__head_dim": None}, "missing field 'model.head_dim'"),
        ({"model__num_layers": 0}, "field 'num_layers': found 0; expected a positive number"),
        ({"recursive__num_loop": 2}, "unknown field 'recursive.num_loop'; expected one of: num_loops"),
        ({"recursive__num_loops": "2"}, "field 'recursive.num_loops': found '2'; expected int"),
        ({"recursive__num_loops": 3}, "field 'num_loops': found 3, which does not divide the base's 4 layers"),
        ({"recursive__lora_rank": {"q": -1}}, "field 'lora_rank.q': found -1; expected 0 (no LoRA) or more"),
        ({"recursive__exit_loops": [1]}, "field 'exit_loops': found 1; expected loops in [0, 1)"),
    ],
)
def test_wrong_fields_are_refused_by_name(checkpoint, changes, message):
    edit(checkpoint, **changes)
    with pytest.raises(UserError) as error:
        load_model(checkpoint)
    assert str(error.value).startswith(f"{checkpoint / 'config.json'}: {message}")
    assert "\n" not in str(error.value)


def test_large_checkpoints_are_sharded(checkpoint, tmp_path):
    shards = write(tmp_path / "shards", random_model(), max_shard_bytes=3000)
    assert len(list(shards.glob("model-*-of-*.safetensors"))) > 3
    assert not list(shards.glob("shard-*"))
    # As other tools read it: the index alone says which file holds a tensor.
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    whole = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(load_file(shards / index[key])[key], tensor) for key, tensor in whole.items())
    for expected, found in zip(load_model(checkpoint).parameters(), load_model(shards).parameters(), strict=True):
        assert torch.equal(found, expected)


def test_an_exception_leaves_nothing_behind(checkpoint, tmp_path):
    before = fingerprint(checkpoint)
    for out, overwrite in ((tmp_path / "fresh", False), (checkpoint, True)):
        config = CheckpointConfig(MODEL, EVERYTHING, torch.float32)
        with (
            pytest.raises(KeyboardInterrupt),
            write_checkpoint(out, config, {}, overwrite=overwrite, max_shard_bytes=100) as writer,
        ):
            writer.add("embed", torch.zeros(50, 16))
            writer.add("head", torch.zeros(50, 16))
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert fingerprint(checkpoint) == before


def test_an_existing_checkpoint_is_replaced_only_if_asked(checkpoint):
    with pytest.raises(UserError, match="already exists and is not empty"):
        write(checkpoint, random_model(seed=1))
    assert torch.equal(load_model(checkpoint).embed, random_model().embed)
    write(checkpoint, random_model(seed=1), overwrite=True)
    assert torch.equal(load_model(checkpoint).embed, random_model(seed=1).embed)


def test_the_fingerprint_changes_with_any_byte_of_weights_or_configuration(checkpoint, tmp_path):
    before = fingerprint(checkpoint)
    assert fingerprint(write(tmp_path / "again", random_model())) == before
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for position in (-1, len(content) // 2):
        content[position] ^= 1
        weights.write_bytes(content)
        assert fingerprint(checkpoint) != before
        content[position] ^= 1
    weights.write_bytes(content)
    (checkpoint / "provenance.json").write_text("{}")
    assert fingerprint(checkpoint) == before
    edit(checkpoint, model__rope_theta=20000.0)
    assert fingerprint(checkpoint) != before

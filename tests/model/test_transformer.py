"""The hand-written model against transformers on random weights, and against itself."""

import copy
import dataclasses

import pytest
import torch
import transformers

import rrt
from rrt.checkpoint.hf_config import model_config_from_hf
from rrt.checkpoint.hf_layout import tensor_table
from rrt.checkpoint.source import load_model, open_source
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.loop_linear import LoopLinear
from rrt.model.transformer import RecursiveTransformer
from rrt.ops import precision
from rrt.ops.precision import MIN_UPCAST_ROWS
from tests.util.models import MIXED_RANKS, VARIANTS, make_variant
from tests.util.pairwise import pairwise


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, tmp_path_factory):
    """(transformers' model, ours loaded from its directory), fp32."""
    hf = make_variant(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(directory)
    return hf, load_model(directory, torch.float32)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 255, 700])
def test_logits_equal_transformers(pair, length):
    hf, ours = pair
    input_ids = torch.randint(0, 151, (2, length), generator=torch.Generator().manual_seed(length))
    assert relative_error(ours(input_ids), hf(input_ids).logits) <= 2e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma-mqa", "llama-gqa", "neox-parallel", "qwen2", "qwen3"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_is_as_close_to_fp32_as_transformers_bf16(name, device, tmp_path):
    hf = make_variant(name)
    hf.save_pretrained(tmp_path)
    input_ids = torch.randint(0, 151, (2, 100), generator=torch.Generator().manual_seed(4)).to(device)
    hf = hf.to(device)
    exact = hf(input_ids).logits
    theirs = hf.to(torch.bfloat16)(input_ids).logits.float()
    ours = load_model(tmp_path, torch.bfloat16, device)(input_ids)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("name", ["llama-3", "llama-linear-scaling-biases", "mistral", "qwen2", "qwen3-biases"])
def test_gradients_equal_transformers(name, tmp_path):
    hf = make_variant(name)
    hf.save_pretrained(tmp_path)
    hf, ours = hf.double(), load_model(tmp_path, torch.float64)
    tokens = torch.randint(0, 151, (2, 33), generator=torch.Generator().manual_seed(2))
    for logits in (hf(tokens).logits, ours(tokens)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs = dict(hf.named_parameters())
    for entry in tensor_table(ours.config):
        for target in entry.targets:
            assert relative_error(ours.get_parameter(target).grad, theirs[entry.key].grad) <= 1e-5, (
                entry.key
            )  # its norms are in fp32


@torch.no_grad()
def test_texts_beyond_the_sliding_window_are_refused_and_those_within_it_equal_transformers(tmp_path):
    make_variant("mistral", sliding_window=16, max_position_embeddings=64).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(40)[None]
    assert ours.config.context_length == 16
    assert relative_error(ours(tokens[:, :16]), hf(tokens[:, :16]).logits) <= 2e-5
    with pytest.raises(rrt.UserError, match="found a text of 17 tokens; expected at most sliding_window = 16"):
        ours(tokens[:, :17])
    # Texts of 16 tokens in a row of 26.
    positions = torch.cat([torch.arange(16), torch.arange(6, 16)])[None]
    seen_until = torch.tensor([[26] * 6 + [16] * 10 + [26] * 10])
    packed = torch.cat([tokens[:, :16], tokens[:, 20:30]], dim=1)
    alone = torch.cat([tokens[:, :6], tokens[:, 20:30]], dim=1)
    found = ours(packed, positions=positions, seen_until=seen_until)
    assert relative_error(found[:, 16:], ours(alone)[:, 6:]) <= 1e-5
    with pytest.raises(rrt.UserError, match="found a text of 17 tokens"):
        ours(packed, positions=positions + 1, seen_until=seen_until)


def recursive_model(name="llama-gqa", seed=0, **recursion):
    """Make a recursive or relaxed model in fp64 whose every parameter is random, LoRA B and norms included."""
    config = model_config_from_hf(make_variant(name).config.to_dict() | {"architectures": None}, "test")
    model = RecursiveTransformer(config, RecursiveConfig(**recursion)).double().eval()
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


RELAXED = {
    "recursive": dict(num_loops=2),
    "relaxed": dict(num_loops=2, lora_rank=LoraRanks(q=3, kv=5, out=0, ffn=7)),
    "mixed": dict(num_loops=2, lora_rank=MIXED_RANKS),
    "untied": dict(num_loops=4, lora_rank=LoraRanks.uniform(2), untie_norms=True),
    "prefix": dict(num_loops=2, prefix_length=3),
}


@torch.no_grad()
@pytest.mark.parametrize("recursion", RELAXED.values(), ids=RELAXED)
@pytest.mark.parametrize("name", ["gemma-mqa", "llama-gqa", "neox-parallel", "qwen3-biases"])
def test_texts_that_share_their_beginning_in_one_row_equal_each_text_alone(name, recursion):
    model = recursive_model(name, **recursion)
    shared, *branches = torch.randint(0, 151, (18,), generator=torch.Generator().manual_seed(5)).split([7, 5, 6])
    owner = torch.tensor([0] * 7 + [1] * 5 + [2] * 6)
    positions = torch.cat([torch.arange(7), torch.arange(7, 12), torch.arange(7, 13)])[None]
    row = torch.cat([shared, *branches])[None]
    packed = model(row, seen_until=torch.tensor([[18] * 7 + [12] * 5 + [18] * 6]).int(), positions=positions)[0]
    for number, branch in enumerate(branches, start=1):
        alone = model(torch.cat([shared, branch])[None])[0]
        assert relative_error(packed[:7], alone[:7]) <= 1e-12
        assert relative_error(packed[owner == number], alone[7:]) <= 1e-12


LAYERS_OF = {"cycle": [0, 1, 0, 1], "sequence": [0, 0, 1, 1], "cycle-rev": [0, 1, 1, 0]}
LOOPS_OF = {"cycle": [0, 0, 1, 1], "sequence": [0, 1, 0, 1], "cycle-rev": [0, 0, 1, 1]}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sharing", "ranks"),
    [
        *(
            (name, "cycle", LoraRanks.uniform(4))
            for name in ("gemma-mqa", "llama-gqa", "neox-parallel", "qwen3-biases")
        ),
        *((name, "cycle", MIXED_RANKS) for name in ("gemma-mqa", "llama-gqa", "neox-parallel", "qwen3-biases")),
        *((name, "sequence", LoraRanks.uniform(4)) for name in ("llama-gqa", "neox-parallel")),
        *((name, "cycle-rev", MIXED_RANKS) for name in ("llama-gqa", "neox-parallel")),
    ],
    ids=str,
)
def test_looped_model_equals_the_vanilla_model_with_its_layers_unrolled(name, sharing, ranks):
    model = recursive_model(name, num_loops=2, sharing=sharing, lora_rank=ranks, untie_norms=True, prefix_length=3)
    vanilla = RecursiveTransformer(model.config, RecursiveConfig(prefix_length=3)).double().eval()
    for key, parameter in vanilla.named_parameters():
        if not key.startswith("stack.layers."):
            parameter.copy_(model.get_parameter(key))
            continue
        depth, rest = key.removeprefix("stack.layers.").split(".", 1)
        loop, layer = LOOPS_OF[sharing][int(depth)], LAYERS_OF[sharing][int(depth)]
        shared = model.get_parameter(f"stack.layers.{layer}.{rest}")
        if "norm" in rest or rest.endswith("bias"):
            parameter.copy_(shared[loop])
        else:
            module = model.get_submodule(f"stack.layers.{layer}.{rest.removesuffix('.weight')}")
            parameter.copy_(module.merged_weight(loop))
    input_ids = torch.randint(0, 151, (2, 9), generator=torch.Generator().manual_seed(6))
    assert relative_error(model(input_ids), vanilla(input_ids)) <= 1e-12


def test_sharing_in_sequence_has_no_exits():
    model = recursive_model(num_loops=2, sharing="sequence")
    input_ids = torch.arange(5)[None]
    for refused in (lambda: model(input_ids, exit_loop=0), lambda: model.hidden_states(input_ids, num_loops=1)):
        with pytest.raises(rrt.UserError, match=r"found .* with sharing 'sequence', which has no state between loops"):
            refused()
    assert torch.equal(model(input_ids, exit_loop=1), model(input_ids))
    reverse = recursive_model(num_loops=2, sharing="cycle-rev")
    assert torch.equal(reverse(input_ids, exit_loop=0), recursive_model(num_loops=2)(input_ids, exit_loop=0))


def test_lora_merges_from_the_rows_at_which_that_takes_fewer_flops():
    linear = LoopLinear(2048, 2048, num_loops=2, rank=64)
    assert (linear.should_merge(100), linear.merge) == (False, False)
    linear.merge = None
    assert [linear.should_merge(rows) for rows in (1365, 1366)] == [False, True]
    linear.merge = True
    assert linear.should_merge(1)


def test_products_of_emulated_bf16_are_those_of_fp32_rounded_once(monkeypatch):
    linear = LoopLinear(24, 40, num_loops=2, rank=3, bias=True)
    with torch.no_grad():
        for index, parameter in enumerate(linear.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(index))
    linear.bfloat16()
    x = torch.randn(MIN_UPCAST_ROWS, 24, generator=torch.Generator().manual_seed(5)).bfloat16()
    monkeypatch.setattr(precision, "_HAS_BF16_INSTRUCTIONS", False)
    for merge in (False, True):
        linear.merge = merge
        found = linear(x, 1)
        wide = copy.deepcopy(linear).float()
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wide(x.float(), 1).bfloat16())


@pytest.mark.parametrize("ranks", [LoraRanks.uniform(4), MIXED_RANKS], ids=str)
def test_merged_and_plain_lora_give_the_same_logits_and_gradients(ranks):
    results = []
    for merge in (False, True):
        model = recursive_model("neox-parallel", num_loops=2, lora_rank=ranks)
        model.set_merge(merge)
        input_ids = torch.randint(0, 151, (2, 9), generator=torch.Generator().manual_seed(7))
        logits = model(input_ids)
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    (plain, plain_grads), (merged, merged_grads) = results
    assert relative_error(merged, plain) <= 1e-12
    for name, gradient in plain_grads.items():
        assert relative_error(merged_grads[name], gradient) <= 1e-10, name


@torch.no_grad()
def test_prefix_vectors_change_every_position_and_see_no_later_token():
    model = recursive_model(num_loops=2, prefix_length=3)
    input_ids = torch.randint(0, 151, (1, 8), generator=torch.Generator().manual_seed(8))
    before = model(input_ids)
    model.stack.prefix.add_(0.5)
    assert (model(input_ids) - before).abs().amax(-1).min() > 1e-6
    changed = input_ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 151
    assert torch.equal(model(changed)[:, :-1], model(input_ids)[:, :-1])


@torch.no_grad()
def test_exit_loop_runs_fewer_loops_and_equals_the_hidden_state_through_norm_and_head():
    model = recursive_model(num_loops=4, lora_rank=LoraRanks.uniform(2))
    input_ids = torch.randint(0, 151, (2, 6), generator=torch.Generator().manual_seed(9))
    calls = []
    model.stack.layers[0].register_forward_hook(lambda *_: calls.append(1))
    exits = model.hidden_states(input_ids)
    assert len(exits) == 4 and len(calls) == 4
    calls.clear()
    assert torch.equal(model(input_ids, exit_loop=1), model.logits(exits[1]))
    assert len(calls) == 2
    for loop in (-1, 4):
        message = rf"exit_loop: found {loop}; expected a loop in \[0, 4\)"
        with pytest.raises(rrt.UserError, match=message):
            model(input_ids, exit_loop=loop)
        with pytest.raises(rrt.UserError, match=rf"num_loops: found {loop + 1}; expected 1 to 4"):
            model.hidden_states(input_ids, num_loops=loop + 1)


@torch.no_grad()
def test_the_heads_lora_serves_the_loops_before_the_last():
    model = recursive_model(num_loops=4, head_lora_rank=2)
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(2, 5, model.config.hidden_size, dtype=torch.float64, generator=generator)
    plain = torch.nn.functional.linear(model.norm(hidden), model.head_weight)
    assert torch.equal(model.logits(hidden), plain)
    assert torch.equal(model.logits(hidden, 3), plain)
    for loop in range(3):
        weight = model.head_weight + model.head_lora_b[loop] @ model.head_lora_a[loop]
        expected = torch.nn.functional.linear(model.norm(hidden), weight)
        torch.testing.assert_close(model.logits(hidden, loop), expected)
        assert (expected - plain).abs().max() > 1e-3
    input_ids = torch.randint(0, 151, (2, 6), generator=torch.Generator().manual_seed(9))
    assert torch.equal(model(input_ids, exit_loop=1), model.logits(model.hidden_states(input_ids)[1], 1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma-mqa", "llama-gqa", "neox-parallel"])
def test_an_exit_before_the_last_reads_its_translation_of_the_normed_state(name):
    model = recursive_model(name, num_loops=4, head_lora_rank=2, exit_translators=True)
    input_ids = torch.randint(0, 151, (2, 6), generator=torch.Generator().manual_seed(9))
    norm, weight, bias = model.norm, model.exit_translator_weight, model.exit_translator_bias
    assert len(weight) == len(bias) == 3
    states = model.hidden_states(input_ids)
    gain = norm.weight + (model.config.norm_type == "rmsnorm_1p")
    for loop, state in enumerate(states):
        centred = state - state.mean(-1, keepdim=True) if norm.bias is not None else state
        read = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * gain
        read = read if norm.bias is None else read + norm.bias
        lora = 0.0
        if loop < 3:
            read = torch.einsum("oi,bti->bto", weight[loop], read) + bias[loop]
            lora = model.head_lora_b[loop] @ model.head_lora_a[loop]
        torch.testing.assert_close(model(input_ids, exit_loop=loop), read @ (model.head_weight + lora).T)


@torch.no_grad()
def test_initial_translators_change_nothing():
    plain, translated = (recursive_model(num_loops=4, exit_translators=flag) for flag in (False, True))
    translated.init_weights(0)
    plain.init_weights(0)
    input_ids = torch.randint(0, 151, (2, 6), generator=torch.Generator().manual_seed(9))
    for loop in range(4):
        assert torch.equal(translated(input_ids, exit_loop=loop), plain(input_ids, exit_loop=loop))


@pairwise(
    name=["gemma-mqa", "llama-gqa", "neox-parallel", "neox-sequential"],
    recursion=RELAXED,
    checkpointing=["none", "layer", "loop"],
)
def test_states_of_selected_tokens_are_those_of_all(name, recursion, checkpointing):
    model = recursive_model(name, **recursion)
    model.stack.checkpointing = checkpointing
    input_ids = torch.randint(0, 151, (3, 7), generator=torch.Generator().manual_seed(8))
    places = torch.tensor([20, 0, 3, 3, 8])
    for num_loops in (1, None):
        everything = model.hidden_states(input_ids, num_loops=num_loops)
        few = model.hidden_states(input_ids, num_loops=num_loops, selected_tokens=places)
        assert len(few) == len(everything)
        assert all(torch.equal(one, other) for one, other in zip(few[:-1], everything[:-1], strict=True))
        assert few[-1].shape == (5, everything[-1].shape[-1])
        assert relative_error(few[-1], everything[-1].flatten(0, 1)[places]) <= 1e-12
    rows = {"seen_until": torch.tensor([7, 7, 5, 5, 5, 7, 7]).expand(3, 7).int()}
    rows["positions"] = torch.tensor([0, 1, 2, 3, 4, 2, 3]).expand(3, 7)
    packed = model.hidden_states(input_ids, **rows)
    few_packed = model.hidden_states(input_ids, selected_tokens=places, **rows)
    assert relative_error(few_packed[-1], packed[-1].flatten(0, 1)[places]) <= 1e-12
    parameters = [parameter for parameter in model.stack.parameters() if parameter.requires_grad]
    wanted, found = (
        torch.autograd.grad(states.square().sum(), parameters, allow_unused=True)
        for states in (everything[-1].flatten(0, 1)[places], few[-1])
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or relative_error(one, other) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("recursion", RELAXED.values(), ids=RELAXED)
def test_linears_give_each_row_its_own_loop(recursion):
    model = recursive_model("neox-parallel", **recursion)
    loops = torch.tensor([1, 0, 0, 1, 1], dtype=torch.int32)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    for linear in (model.stack.layers[0].attn.k, model.stack.layers[0].mlp.up):
        expected = torch.stack([linear(row, int(loop)) for row, loop in zip(x, loops, strict=True)])
        assert relative_error(linear(x, loops), expected) <= 1e-12


def test_num_loops_must_divide_the_layers():
    config = model_config_from_hf(make_variant("llama-gqa").config.to_dict(), "test")
    with pytest.raises(rrt.UserError, match=r"'num_loops': found 3.*4 layers; expected one of 1, 2, 4"):
        RecursiveTransformer(config, RecursiveConfig(num_loops=3))


def test_positions_and_seen_until_that_do_not_fit_are_refused():
    model = recursive_model(num_loops=2)
    input_ids = torch.zeros(1, 4, dtype=torch.long)
    for options in ({"positions": input_ids}, {"seen_until": input_ids}):
        [name] = options
        message = f"positions and seen_until: found {name} alone; expected both, or neither"
        with pytest.raises(rrt.UserError, match=message):
            model(input_ids, **options)
    with pytest.raises(rrt.UserError, match=r"seen_until: found shape \(1, 3\); expected \(1, 4\), as input_ids"):
        model(input_ids, positions=input_ids, seen_until=input_ids[:, :3])


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RecursiveConfig().num_loops = 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma-mqa", "llama-gqa"])
def test_lora_equals_peft_without_scaling(name, tmp_path):
    """An independent oracle: peft with alpha = rank, which makes its scale 1."""
    peft = pytest.importorskip("peft")
    hf = make_variant(name)
    hf.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    model = RecursiveTransformer(source.model, RecursiveConfig(lora_rank=LoraRanks.uniform(3))).eval()
    generator = torch.Generator().manual_seed(11)
    for key, parameter in model.named_parameters():
        is_lora = key.endswith(("lora_a", "lora_b"))
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) if is_lora else source.get(key))
    targets = {"attn.q": "self_attn.q_proj", "attn.out": "self_attn.o_proj", "mlp.down": "mlp.down_proj"}
    for layer in model.stack.layers:
        for linear in ("attn.k", "attn.v", "mlp.gate", "mlp.up"):
            layer.get_submodule(linear).lora_b.zero_()
    modules = [target.rpartition(".")[2] for target in targets.values()]
    adapted = peft.get_peft_model(hf, peft.LoraConfig(r=3, lora_alpha=3, target_modules=modules)).eval()
    for depth, layer in enumerate(model.stack.layers):
        for ours, theirs in targets.items():
            module = adapted.get_submodule(f"base_model.model.model.layers.{depth}.{theirs}")
            module.lora_A["default"].weight.copy_(layer.get_submodule(ours).lora_a[0])
            module.lora_B["default"].weight.copy_(layer.get_submodule(ours).lora_b[0])
    input_ids = torch.randint(0, 151, (2, 21), generator=generator)
    expected = adapted(input_ids).logits
    assert relative_error(model(input_ids), expected) <= 2e-5
    with adapted.disable_adapter():
        assert relative_error(adapted(input_ids).logits, expected) > 1e-2

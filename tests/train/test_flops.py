"""FLOPs of training, and the table of devices."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rrt.checkpoint.presets import preset
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from train.flops import peak_flops, training_flops_per_token

TINY = replace(preset("pythia-160m"), vocab_size=96, hidden_size=48, num_layers=4, num_heads=3, num_kv_heads=3,
               head_dim=16, intermediate_size=80)  # fmt: skip


def measured_flops(recursion: RecursiveConfig, batch: int, seq_len: int, merge: bool) -> float:
    """PyTorch's count for one forward and backward, per token, without attention (it lacks some of its kernels)."""
    model = RecursiveTransformer(TINY, recursion)
    model.init_weights(0)
    model.set_merge(merge)
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if "attention" not in str(op)) / (batch * seq_len)


def attention_flops(seq_len: int) -> float:
    """By hand, forward and backward, of scores and weighted sums: causal, (seq_len + 1) / 2 positions."""
    return 3 * 2 * 2 * TINY.num_layers * TINY.num_heads * TINY.head_dim * ((seq_len + 1) // 2)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("loops", "rank"), [(1, 0), (2, 0), (2, 5), (4, 16)])
def test_the_count_is_pytorchs_own_of_the_model_that_runs(loops: int, rank: int, merge: bool) -> None:
    recursion = RecursiveConfig(num_loops=loops, lora_rank=LoraRanks.uniform(rank))
    batch, seq_len = 2, 33
    counted = measured_flops(recursion, batch, seq_len, merge)
    expected = training_flops_per_token(TINY, recursion, seq_len, merged_over=batch * seq_len if merge else None)
    assert counted == pytest.approx(expected - attention_flops(seq_len), rel=1e-9)


def test_looping_saves_parameters_but_no_work() -> None:
    vanilla = training_flops_per_token(TINY, RecursiveConfig(), 64)
    assert training_flops_per_token(TINY, RecursiveConfig(num_loops=2), 64) == vanilla


def test_every_exit_adds_a_head_and_a_teacher_its_forward() -> None:
    recursion = RecursiveConfig(num_loops=2)
    one = training_flops_per_token(TINY, recursion, 64)
    two = training_flops_per_token(TINY, recursion, 64, exits=(0, 1))
    assert two - one == 3 * 2 * TINY.vocab_size * TINY.hidden_size
    taught = training_flops_per_token(TINY, recursion, 64, teacher=(TINY, RecursiveConfig()))
    assert taught == pytest.approx(one * 4 / 3)
    looped = RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(16))
    assert training_flops_per_token(TINY, recursion, 64, teacher=(TINY, looped)) > taught


def test_of_a_frozen_model_only_the_loras_on_the_head_have_a_backward() -> None:
    plain, lora = RecursiveConfig(num_loops=2), RecursiveConfig(num_loops=2, head_lora_rank=8)
    whole = training_flops_per_token(TINY, plain, 64) / 3
    forward = training_flops_per_token(replace(TINY, num_layers=2), RecursiveConfig(), 64) / 3  # of the first loop
    by_lora = 2 * 8 * (TINY.vocab_size + TINY.hidden_size)
    frozen = training_flops_per_token(TINY, lora, 64, exits=(0,), frozen=True)
    assert frozen == pytest.approx(forward + 3 * by_lora)
    assert training_flops_per_token(TINY, lora, 64, exits=(0,)) == pytest.approx(3 * (forward + by_lora))
    assert training_flops_per_token(TINY, lora, 64) == pytest.approx(3 * whole)  # the last loop has none


def test_translators_add_a_map_an_exit_and_a_frozen_backward_goes_through_the_head() -> None:
    plain, recursion = RecursiveConfig(num_loops=2), RecursiveConfig(num_loops=2, exit_translators=True)
    exit_alone = training_flops_per_token(TINY, plain, 64, exits=(0,)) / 3
    head, a_map = 2 * TINY.vocab_size * TINY.hidden_size, 2 * TINY.hidden_size**2
    assert training_flops_per_token(TINY, recursion, 64, exits=(0,)) == pytest.approx(3 * (exit_alone + a_map))
    frozen = training_flops_per_token(TINY, recursion, 64, exits=(0,), frozen=True)
    assert frozen == pytest.approx(exit_alone + a_map + head + a_map)
    last_alone = training_flops_per_token(TINY, plain, 64)
    assert training_flops_per_token(TINY, recursion, 64) == last_alone


def test_gemma_takes_about_six_flops_per_parameter_and_token() -> None:
    flops = training_flops_per_token(preset("gemma-2b"), RecursiveConfig(), 2048)
    assert flops == pytest.approx(6 * 2.506e9, rel=0.06)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name: str, teraflops: float) -> None:
    assert peak_flops(name) == teraflops * 1e12


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops("Tesla K80") is None
    assert peak_flops("NVIDIA L400") is None  # though L40 has one

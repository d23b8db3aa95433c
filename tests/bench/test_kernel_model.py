"""bench/kernel_model.py: loops found in machine code, the model's arithmetic, and measurements beside predictions."""

import argparse
import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch

from bench import kernel_instructions, kernel_model, kernel_resources, kernel_times
from bench.attention_cases import AttentionSpec
from bench.kernel_instructions import analyse, find_disassembler, parse_sass
from bench.kernel_model import PRESETS, ROWS
from bench.kernel_times import (
    DEVICES,
    FILLING_CYCLES,
    H200,
    HINT_CYCLES,
    LATENCY,
    Compiled,
    Shrink,
    Tables,
    Work,
    launch_times,
    predict_attention,
    predict_linear,
    predict_shrink,
)
from bench.linear_variants import projections
from rrt.checkpoint.presets import preset
from rrt.errors import UserError

NO_SCOREBOARD = 7


def sass(*lines: tuple[str, int, int, int]) -> str:
    """Make cuobjdump's listing of (instruction, stall count, scoreboard that it sets, mask of those it waits for)."""
    text = "\tcode for sm_90a\n\t\tFunction : _Z5hellov\n"
    for i, (instruction, stall, sets, waits) in enumerate(lines):
        control = stall << 41 | sets << 46 | NO_SCOREBOARD << 49 | waits << 52
        text += f"        /*{16 * i:04x}*/     {instruction} ;   /* 0x{0:016x} */\n       /* 0x{control:016x} */\n"
    return text


def loop_of(*lines: tuple[str, int, int, int]) -> kernel_instructions.KernelCode:
    ((arch, name), code), *_ = parse_sass(sass(*lines)).items()
    return analyse(arch, name, code)


ENTRY = ("MOV R1, c[0x0][0x28]", 2, 7, 0)
LOOP = [
    ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 3, 7, 0),
    ("LDS.128 R8, [R6]", 4, 1, 0),
    ("HMMA.16816.F32.BF16 R12, R8, R10, R12", 6, 7, 1 << 1),
]
EXIT = ("EXIT", 5, 7, 0)


def test_a_loop_without_mmas_takes_the_way_that_makes_use_of_its_loads():
    skipped = [("@P0 BRA 0x40", 5, 7, 0), ("SHFL.IDX PT, R3, R2, R1, 0x1f", 9, 1, 1)]
    found = loop_of(ENTRY, ("LDG.E.64 R2, [R4.64]", 3, 0, 0), *skipped, ("@!P1 BRA 0x10", 5, 7, 0), EXIT)
    assert (found.ldg, found.instructions, found.stalls) == (1, 4, 3 + 5 + 9 + 5)


def test_a_loop_counts_its_instructions_stalls_and_waits():
    found = loop_of(ENTRY, *LOOP, ("@!P0 BRA 0x10", 5, 7, 0), EXIT)
    assert (found.arch, found.instructions, found.stalls) == ("sm_90a", 4, 18)
    assert (found.hmma, found.lds, found.ldgsts, found.bar) == (1, 1, 1, 0)
    # The mma waits for the load, issued 3 cycles into the loop.
    assert found.cycles == 3 + kernel_instructions.LATENCIES["LDS"] + 6 + 5
    assert (found.entry_cycles, found.exit_cycles) == (2 + 3, 5)


def test_the_first_copy_waits_for_what_comes_before_it():
    load, wait = ("LDG.E R2, desc[UR8][R6.64]", 4, 0, 0), ("IADD3 R4, R2, R3, RZ", 5, 7, 1 << 0)
    begin = ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 3, 7, 0)
    found = loop_of(load, wait, begin, *LOOP, ("@!P0 BRA 0x30", 5, 7, 0), EXIT)
    assert found.copy_cycles == kernel_instructions.LOAD_LATENCIES["sm_90a"].memory + 5


def test_what_comes_before_the_wait_is_hidden():
    load, used = ("LDG.E R2, desc[UR8][R6.64]", 4, 0, 0), ("IADD3 R4, R2, R3, RZ", 5, 7, 1 << 0)
    hint, wait = ("UBLKPF.L2 [UR10], UR4", 1, 7, 0), ("ACQBULK", 1, 7, 0)
    found = loop_of(load, used, hint, wait, *LOOP, ("@!P0 BRA 0x40", 5, 7, 0), EXIT)
    found_page = kernel_instructions.LOAD_LATENCIES["sm_90a"].memory + 5
    assert (found.copy_cycles, found.entry_cycles, found.hint_cycles) == (1, 1 + 3, found_page + 1)
    # A kernel that copies first, and waits then, does all of that once it has been launched.
    copies_first = loop_of(load, used, LOOP[0], wait, *LOOP, ("@!P0 BRA 0x40", 5, 7, 0), EXIT)
    assert copies_first.copy_cycles == kernel_instructions.LOAD_LATENCIES["sm_90a"].memory + 5


def test_hints_come_behind_copies_and_before_the_wait():
    wait, copy, hint = (
        ("ACQBULK", 1, 7, 0),
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 3, 7, 0),
        ("UBLKPF.L2 [UR8], UR4", 8, 7, 0),
    )
    # A way around the wait, which comes first where the loops are read before; and one around the copy.
    ways = (("@P0 BRA 0x20", 5, 7, 0), wait, ("@P1 BRA 0x40", 5, 7, 0), copy, hint, wait)
    found = loop_of(*ways, *LOOP, ("@!P0 BRA 0x60", 5, 7, 0), EXIT)
    assert found.hint_cycles == 5 + 5 + 3 + 8


def test_what_follows_the_wait_behind_the_first_copies_is_timed_with_its_loads():
    load, used = ("LDG.E R2, desc[UR8][R6.64]", 4, 0, 0), ("IADD3 R4, R2, R3, RZ", 5, 7, 1 << 0)
    wait = ("ACQBULK", 1, 7, 0)
    found = loop_of(ENTRY, LOOP[0], wait, load, used, *LOOP, ("@!P0 BRA 0x50", 5, 7, 0), EXIT)
    assert found.wait_cycles == 1 + kernel_instructions.LOAD_LATENCIES["sm_90a"].far + 5 + 3
    assert loop_of(ENTRY, wait, LOOP[0], *LOOP, ("@!P0 BRA 0x30", 5, 7, 0), EXIT).wait_cycles == 0


def test_vectors_of_biases_are_not_waited_for_where_there_are_none():
    bias, used = ("@P1 LDG.E.128 R4, desc[UR8][R6.64]", 4, 0, 0), ("STG.E.128 desc[UR8][R6.64], R4", 9, 7, 1 << 0)
    assert loop_of(ENTRY, *LOOP, ("@!P0 BRA 0x10", 5, 7, 0), bias, used, EXIT).exit_cycles == 9 + 5


def test_after_the_last_bytes_have_come_a_part_of_a_turn_is_left():
    wait, values = ("DEPBAR.LE SB0, 0x1", 2, 7, 0), ("HMMA.16816.F32.BF16 R16, R8, R10, R16", 7, 7, 0)
    found = loop_of(ENTRY, wait, *LOOP, wait, values, ("@!P0 BRA 0x10", 5, 7, 0), EXIT)
    assert found.last_cycles == 2 + 7 + 5 < found.cycles
    assert loop_of(ENTRY, *LOOP, ("@!P0 BRA 0x10", 5, 7, 0), EXIT).last_cycles == 0


def test_a_kernel_that_only_adds_begins_where_it_has_waited():
    before, wait = ("IMAD R2, R2, R3, RZ", 13, 7, 0), ("ACQBULK", 1, 7, 0)
    load, add = ("LDG.E R2, desc[UR8][R6.64]", 4, 0, 0), ("FADD R2, R2, R3", 5, 7, 1 << 0)
    found = loop_of(before, wait, load, add, ("STG.E.U16 desc[UR8][R6.64], R2", 2, 7, 0), EXIT)
    assert (found.entry_cycles, found.copy_cycles) == (
        1 + kernel_instructions.LOAD_LATENCIES["sm_90a"].far + 5 + 2 + 5,
        0,
    )


def test_sums_of_a_row_kernel_take_no_way_through_shared_memory():
    skip, of_sum = ("@P1 BRA 0x80", 5, 7, 0), ("STG.E desc[UR8][R6.64], R12", 3, 7, 0)
    shared, result = ("STS [R6], R12", 6, 7, 0), ("STG.E.128 desc[UR8][R6.64], R12", 9, 7, 0)
    ends = [skip, of_sum, EXIT, shared, shared, result, EXIT]
    found = loop_of(ENTRY, *LOOP, ("@!P0 BRA 0x10", 5, 7, 0), *ends)
    assert (found.sums_cycles, found.exit_cycles) == (5 + 3 + 5, 5 + 2 * 6 + 9 + 5)


def test_what_lies_in_a_loop_of_its_own_is_no_part_of_a_turn():
    skip, again, back = ("@P1 BRA 0x70", 5, 7, 0), ("@P2 BRA 0x50", 9, 7, 1 << 2), ("@!P0 BRA 0x10", 5, 7, 0)
    found = loop_of(ENTRY, *LOOP, skip, ("LDG.E R20, [R22.64]", 4, 2, 0), again, back, EXIT)
    assert (found.instructions, found.ldg) == (5, 0)


def test_a_kernel_that_lets_the_next_one_start_before_it_waits_is_marked():
    early, late = ("PREEXIT", 1, 7, 0), ("ACQBULK", 1, 7, 0)
    assert loop_of(early, late, EXIT).triggers_early == 1
    assert loop_of(late, early, EXIT).triggers_early == 0


def test_a_missing_disassembler_is_one_line_that_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"--nvdisasm: found no .*pip install triton") as error:
        find_disassembler(tmp_path / "nvdisasm")
    assert "\n" not in str(error.value)


def test_the_committed_tables_are_of_the_same_kernels():
    code = kernel_instructions.parse_table(kernel_instructions.EXPECTED.read_text())
    _, resources = kernel_resources.parse_table(kernel_resources.EXPECTED.read_text())
    assert [(kernel.arch, kernel.name) for kernel in code] == [(kernel.arch, kernel.name) for kernel in resources]
    assert kernel_instructions.format_table(code) == kernel_instructions.EXPECTED.read_text()
    for kernel in code:
        assert kernel.stalls >= kernel.instructions * 0.9 and kernel.cycles >= kernel.stalls


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_committed_tilings_cover_every_case_and_are_those_of_today():
    wanted = {
        (device.multiprocessors, projection.outputs, projection.inputs, m)
        for device in DEVICES.values()
        for name in PRESETS
        for projection in projections(preset(name))
        for m in ROWS
    }
    assert Tables.read().tilings.keys() == wanted
    assert kernel_model.TILINGS.read_text().splitlines()[1:] == kernel_model.list_tilings().splitlines()


@pytest.fixture(scope="module")
def tables():
    return Tables.read()


@pytest.fixture
def kernel():
    code = kernel_instructions.KernelCode(
        "sm_90a",
        0,
        0,
        0,
        0,
        0,
        100,
        100,
        500,
        0,
        8,
        4,
        4,
        0,
        0,
        0,
        0,
        "loop_lora::row_kernel<BFloat16, 8, 2, 4, false>",
    )
    return Compiled(code, kernel_resources.Kernel("sm_90a", code.name, 64, 64 << 10, 128))


def test_a_stream_takes_its_slowest_limit(kernel):
    assert kernel.resources.blocks == 3
    memory = launch_times(H200, kernel, Work(132, 1, 1.0, 1e9))
    turn = 500 / H200.hertz  # which the last bytes take
    assert memory.bound == "memory" and memory.stream - turn == pytest.approx(1e9 / H200.copy)
    doubled = launch_times(H200, kernel, Work(132, 1, 1.0, 2e9))
    assert doubled.stream - turn == pytest.approx(2 * (memory.stream - turn))
    issue = launch_times(H200, kernel, Work(132, 50, 1.0, 1.0))
    assert issue.bound == "issue" and issue.stream == pytest.approx(50 * turn)
    # Three blocks share a multiprocessor and run beside each other; a fourth one is a second wave.
    assert launch_times(H200, kernel, Work(3 * 132, 50, 1.0, 1.0)).stream == pytest.approx(issue.stream)
    assert launch_times(H200, kernel, Work(4 * 132, 50, 1.0, 1.0)).stream == pytest.approx(2 * issue.stream)
    # By Little's law: 3 of 4 stages of 64 KiB are under way, and each takes a latency.
    latency = launch_times(H200, kernel, Work(1, 1, 480 << 10, 1.0))
    assert latency.bound == "latency" and latency.stream - turn == pytest.approx(10 * LATENCY)
    # Where few warps have more turns than others, what they share is busy for the mean.
    shared = replace(kernel, code=replace(kernel.code, instructions=300))
    uneven = launch_times(H200, shared, Work(3 * 132, 20, 1.0, 1.0, mean_turns=10))
    assert uneven.limits["issue"] == pytest.approx(max(20 * 500, 10 * 900) / H200.hertz)
    cache = launch_times(H200, kernel, Work(132, 1, 1e6, 1.0))
    assert cache.limits["cache"] == pytest.approx(132e6 / H200.cache)


def test_warps_that_share_a_scheduler_take_turns(kernel):
    busy = replace(kernel, code=replace(kernel.code, instructions=300))
    one, three = (launch_times(H200, busy, Work(n * 132, 10, 1.0, 1.0)).limits["issue"] for n in (1, 3))
    assert (one, three) == (pytest.approx(10 * 500 / H200.hertz), pytest.approx(10 * 900 / H200.hertz))


def test_where_one_block_fits_each_wave_ends_before_the_next_begins(kernel):
    alone = Compiled(
        replace(kernel.code, entry_cycles=1000, exit_cycles=500, ldgsts=0), replace(kernel.resources, registers=255)
    )
    alone = replace(alone, resources=replace(alone.resources, shared_bytes=150 << 10))
    assert alone.resources.blocks == 1
    work = Work(132, 5, 1e4, 1e6)
    one, two, four = (launch_times(H200, alone, replace(work, blocks=n * 132, memory_bytes=n * 1e6)) for n in (1, 2, 4))
    boundary, turns = 1500 / H200.hertz, 5 * 500 / H200.hertz
    assert one.stream == pytest.approx(turns)
    assert two.stream == pytest.approx(2 * turns + boundary)
    assert four.stream == pytest.approx(4 * turns + 3 * boundary)
    # Multiprocessors are in step at their second begin only, so that memory idles once.
    bound_by_memory = launch_times(H200, alone, Work(4 * 132, 1, 1e3, 1e9))
    assert bound_by_memory.stream == pytest.approx(1e9 / H200.copy + bound_by_memory.last_turn + boundary)
    # Two that run beside each other fill each other's gaps.
    assert launch_times(H200, kernel, Work(6 * 132, 1, 1e3, 1e9)).between == 0


NO_HINTS = kernel_instructions.KernelCode("sm_90a", *[0] * 16, "loop_lora::column_kernel<>")


def shrink_of(shared_bytes, blocks):
    resources = kernel_resources.Kernel("sm_90a", "loop_lora::column_kernel<>", 64, shared_bytes, 256)
    return Shrink(1e-6, Compiled(NO_HINTS, resources), blocks, 1e-6)


def test_product_blocks_find_less_room_beside_shrink(tables):
    columns = tables.find(H200, "loop_lora::column_kernel", tokens=32, shrink=0)
    rows = tables.find(H200, "loop_lora::row_kernel", tokens=32, warp_tiles=2, shrink=0)
    assert (columns.resources.blocks, rows.resources.blocks) == (1, 2)
    # 101,376 + 150,528 bytes are more than a multiprocessor has, 101,376 + 82,432 are not.
    assert shrink_of(101376, 16).room_beside(H200, columns) == 132 - 16
    assert shrink_of(101376, 16).room_beside(H200, rows) == 2 * 132 - 16
    assert shrink_of(101376, 2 * 132).room_beside(H200, rows) == 0
    assert shrink_of(1024, 16).room_beside(H200, columns) == Shrink().room_beside(H200, columns) == 132


def test_products_wait_for_room_beside_shrink(tables, monkeypatch):
    (out,) = (each for each in projections(preset("gemma-2b")) if each.name == "out")
    without: dict[int, float] = {}
    with_room: dict[int, float] = {}
    long_shrink = replace(shrink_of(101376, 16), seconds=4e-6, first_seconds=4e-6)
    monkeypatch.setattr(kernel_times, "predict_shrink", lambda *_: long_shrink)
    for seconds in (without, with_room):
        for m in (8, 32):
            seconds[m] = predict_linear(H200, tables, out, m, 64, 2, (16, 1)).seconds
        monkeypatch.setattr(Shrink, "room_beside", lambda _, device, kernel: 132 * kernel.resources.blocks)
    assert without[8] == with_room[8]  # 102,400 bytes twice
    assert without[32] > with_room[32]


@pytest.mark.parametrize("device", [DEVICES["h100"], H200], ids=lambda device: device.name)
@pytest.mark.parametrize("m", ROWS)
def test_shrink_is_shorter_where_it_fetches_before_it_waits(tables, monkeypatch, device, m):
    def seconds(ranks: int, loops: int) -> float:
        return predict_shrink(device, tables, ranks, 2048, m, loops, device.trigger).seconds

    before = seconds(192, 2), seconds(1536, 2)
    monkeypatch.setattr(kernel_times, "MAX_BYTES_IN_VAIN", -1)
    assert before[0] < seconds(192, 2) - 0.2e-6
    assert before[1] == seconds(1536, 2)  # too much might be of a loop that no row is of


def linear_terms(tables, name, tiling, m=32, **changed):
    """Predict a linear of Gemma's with the code of all kernels changed."""
    code = {key: replace(each, **changed) for key, each in tables.code.items()}
    (projection,) = (each for each in projections(preset("gemma-2b")) if each.name == name)
    return predict_linear(H200, replace(tables, code=code), projection, m, 64, 2, tiling).terms


def test_hints_of_shrink_keep_memory_busy_until_a_late_product_comes(tables):
    with_hints = linear_terms(tables, "down", (64, 4))
    without = linear_terms(tables, "down", (64, 4), hint_cycles=0)
    # 128 blocks ask for as many bytes as memory brings from an end to a late launch, or little less.
    gained = without["stream"] - with_hints["stream"]
    assert 0.9 * 1.5e-6 < gained <= 1.5e-6
    # A warp of shrink gives them one after the other, and waits only then.
    shrink = tables.find(H200, "loop_lora::column_kernel", tokens=16, parts=1, shrink=1).code
    given = (shrink.hint_cycles + 14 * FILLING_CYCLES + 16 * HINT_CYCLES) / H200.hertz
    assert with_hints["gap"] == pytest.approx(given + H200.launch)
    assert without["gap"] == pytest.approx(H200.trigger + H200.launch)


def test_hints_are_left_out_where_they_bring_nothing(tables):
    # The cache brings x meanwhile, for longer than memory brings W.
    assert linear_terms(tables, "out", (16, 1)) == linear_terms(tables, "out", (16, 1), hint_cycles=0)


@pytest.mark.parametrize("m", [1, 64])
def test_an_early_product_brings_the_x_of_its_rings_first(tables, m):
    (gate_up,) = (each for each in projections(preset("gemma-2b")) if each.name == "gate,up")
    kernel = tables.find(H200, "loop_lora::row_kernel", tokens=8 if m == 1 else 64, warp_tiles=2, shrink=0)
    x_bytes = 256 * kernel.bytes_under_way * m / (128 + kernel.arguments["tokens"])
    begin = predict_linear(H200, tables, gate_up, m, 0, 1, (128, 1)).terms["begin"]
    assert begin == pytest.approx(475 / H200.hertz + x_bytes / H200.cache)


GEMMA_HEADS = AttentionSpec(8, 1, 256, [], [], [], 256, 32, torch.bfloat16, torch.device("cpu"), 0, 0)


def decode_seconds(tables, count, context, **changed):
    """Predict decode on an H200 with the code of all kernels changed."""
    code = {key: replace(each, **changed) for key, each in tables.code.items()}
    return predict_attention(H200, replace(tables, code=code), GEMMA_HEADS, "decode", count, context, 1).seconds


def test_hints_keep_memory_busy_from_the_end_of_the_decode_before(tables):
    code = tables.find(H200, "kv_cache::decode_kernel", head_dim=256).code
    terms = predict_attention(H200, tables, GEMMA_HEADS, "decode", 32, 1024, 1).terms
    # Of few rows they bring every first turn; of many, as much as fits into the time until the wait is over.
    few = decode_seconds(tables, 12, 1024, hint_cycles=0) - decode_seconds(tables, 12, 1024)
    assert few == pytest.approx(12 * 8 * 4 * 16 * 2 * 256 * 2 / H200.copy)
    later = (code.hint_cycles - code.copy_cycles) / H200.hertz
    gained = decode_seconds(tables, 32, 1024, hint_cycles=0) - decode_seconds(tables, 32, 1024)
    assert gained == pytest.approx(terms["combine"] + terms["gap"] - later)
    # Where nothing is combined the wait is over before a slow hint, which then holds up its block.
    slow = decode_seconds(tables, 32, 128, hint_cycles=4000) - decode_seconds(tables, 32, 128, hint_cycles=0)
    assert slow == pytest.approx(4000 / H200.hertz - H200.trigger)


def test_combining_that_finds_no_room_beside_the_decode_starts_the_next_one_later(tables):
    decode = tables.find(H200, "kv_cache::decode_kernel", head_dim=256)
    combine = tables.find(H200, "kv_cache::combine_kernel", head_dim=256, at_once=8)
    assert combine.resources.blocks_beside(decode.resources) * 132 >= 32 * 8  # of 32 rows, eight heads
    large = {
        key: replace(each, registers=64) if "combine" in key[1] else each for key, each in tables.resources.items()
    }
    spec = (GEMMA_HEADS, "decode", 32, 1024, 1)
    late = predict_attention(H200, replace(tables, resources=large), *spec).seconds
    assert late - predict_attention(H200, tables, *spec).seconds == pytest.approx(H200.launch)


def test_combining_that_starts_late_leaves_hints_no_time(tables):
    late = [decode_seconds(tables, 32, 1024, triggers_early=0, hint_cycles=cycles) for cycles in (4000, 0)]
    assert late[0] - late[1] == pytest.approx(4000 / H200.hertz)


@pytest.mark.parametrize(("heads", "context", "share"), [(8, 64, 1), (8, 32, 0.5), (20, 64, 0.5)])
def test_hints_ask_for_what_a_first_turn_has_once(tables, heads, context, share):
    device, spec = replace(H200, trigger=9e-6), replace(GEMMA_HEADS, num_heads=heads)
    code = {key: replace(each, hint_cycles=0) for key, each in tables.code.items()}
    seconds = [
        predict_attention(device, each, spec, "decode", 1000, context, 1).seconds
        for each in (replace(tables, code=code), tables)
    ]
    blocks = 132 * tables.find(H200, "kv_cache::decode_kernel", head_dim=256).resources.blocks
    assert seconds[0] - seconds[1] == pytest.approx(share * blocks * 64 * 2 * 256 * 2 / H200.copy)


@pytest.mark.parametrize(
    ("context", "trips"), [(1024, 0), (1025, 1), (2048, 1), (4097, 2), (8192, 3), (8193, 2), (65536, 8)]
)
def test_combining_takes_one_trip_for_eight_pieces_and_then_one_for_each_8_or_32(tables, context, trips):
    slow = {key: replace(each, cycles=100_000) if "combine" in key[1] else each for key, each in tables.code.items()}
    none = {key: replace(each, cycles=0) if "combine" in key[1] else each for key, each in tables.code.items()}
    combine = [
        predict_attention(H200, replace(tables, code=code), GEMMA_HEADS, "decode", 1, context, 1).terms["combine"]
        for code in (slow, none)
    ]
    assert combine[0] - combine[1] == pytest.approx(trips * 100_000 / H200.hertz, rel=0.02)


def test_after_the_last_values_only_they_are_left_to_add(tables):
    kernel = tables.find(H200, "kv_cache::decode_kernel", head_dim=256)
    code, turn = kernel.code, launch_times(H200, kernel, Work(2 * 132, 1, 1.0, 1.0)).last_turn
    whole = decode_seconds(tables, 32, 4096, last_cycles=code.cycles)
    assert whole - decode_seconds(tables, 32, 4096) == pytest.approx(turn * (1 - code.last_cycles / code.cycles))


def arguments(**changed):
    values = {"rows": list(ROWS), "ranks": [0, 64, 512], "loops": 2, "prefill_rows": [1024, 8192]}
    return argparse.Namespace(**{**values, "attention_rows": [1, 32], "contexts": [128, 1024, 16384], **changed})


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
@pytest.mark.parametrize("name", PRESETS)
def test_predictions_are_above_the_floor_and_grow_with_the_work(tables, device, name):
    records = kernel_model.predict_all(device, tables, name, arguments())
    assert all(record["over_floor"] > 1 for record in records)
    assert all(sum(record["terms"].values()) == pytest.approx(record["seconds"]) for record in records)
    layers = {(record["rank"], record["rows"]): record["seconds"] for record in records if record["kind"] == "layer"}
    assert all(layers[0, m] < layers[64, m] < layers[512, m] for m in ROWS)
    assert all(record["best_seconds"] <= record["seconds"] for record in records if record["kind"] == "linear")
    for kind, count in (("decode", 1), ("decode", 32), ("prefill", 1)):
        times = [r["seconds"] for r in records if r["kind"] == kind and r["count"] == count]
        assert times == sorted(times)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
@pytest.mark.parametrize("tiling", [(16, 1), (128, 1), (128, 8)])
def test_more_rows_take_longer_in_the_same_tiles(tables, device, tiling):
    for projection in projections(preset("gemma-2b")):
        times = [predict_linear(device, tables, projection, m, 64, 1, tiling).seconds for m in ROWS]
        assert all(more > 0.9 * less for less, more in itertools.pairwise(times))


def test_faster_memory_is_never_slower(tables):
    for h100, h200 in zip(
        *(kernel_model.predict_all(DEVICES[name], tables, "gemma-2b", arguments()) for name in ("h100", "h200")),
        strict=True,
    ):
        assert h200["seconds"] <= h100["seconds"]


def test_measurements_stand_beside_their_predictions(tmp_path, monkeypatch, capsys):
    record = {"projection": "out", "rank": 64, "loops": 2, "rows": 8, "seconds": {"ours": {"median": 10e-6}}}
    attention = {"kind": "decode", "count": 32, "context": 1024, "seconds": {"ours": {"median": 20e-6}}}
    result = {"kind": "kernels", "shapes": "gemma-2b", "device": "cuda: NVIDIA H200", "linear": [record]}
    measured, out = tmp_path / "measured.json", tmp_path / "out.json"
    measured.write_text(json.dumps({**result, "attention": [attention]}))
    command = ["kernel_model.py", "--device", "h200", "--preset", "gemma-2b", "--measured", str(measured)]
    monkeypatch.setattr("sys.argv", [*command, "--json", str(out)])
    kernel_model.main()
    assert "measured/time" in capsys.readouterr().out
    found = [each for each in json.loads(out.read_text())["predictions"] if "measured_seconds" in each]
    assert [each["measured_seconds"] for each in found] == [10e-6, 20e-6]
    assert found[0]["projection"] == "out" and found[1]["kind"] == "decode"

    measured.write_text(json.dumps({**result, "shapes": "pythia-1b"}))
    with pytest.raises(UserError, match="found shapes of pythia-1b; expected gemma-2b"):
        kernel_model.main()
    measured.write_text(json.dumps({**result, "device": "cuda: NVIDIA A100"}))
    with pytest.raises(UserError, match="found device cuda: NVIDIA A100"):
        kernel_model.main()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rows", "7"], "--rows: found 7; expected some of 1 8 16 32 64"),
        (["--loops", "0"], "--loops: found 0; expected 1 or more"),
        (["--contexts", "0"], "--contexts: found 0; expected 1 or more"),
        (["--measured", "x.json"], "--measured: found with several devices or presets"),
        (["--write", "nowhere"], "--write: found no .*cu.o below nowhere"),
    ],
)
def test_bad_flags_are_named(monkeypatch, flags, message):
    monkeypatch.setattr("sys.argv", ["kernel_model.py", *flags])
    with pytest.raises(UserError, match=message):
        kernel_model.main()

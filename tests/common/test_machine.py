"""rrt/common/machine.py: processor and memory of the machine."""

from pathlib import Path

from rrt.common import machine


def test_memory_that_a_container_may_still_take_counts_the_cache_of_files_as_free(tmp_path: Path) -> None:
    for name, content in (
        ("memory.max", "1000\n"),
        ("memory.current", "700\n"),
        ("memory.stat", "anon 300\nfile 400\ninactive_file 250\nactive_file 150\n"),
    ):
        (tmp_path / name).write_text(content)
    assert machine._cgroup_free_bytes(tmp_path) == 1000 - 700 + 250


def test_intels_cpus_are_known_by_their_vendor_alone(monkeypatch):
    for fields, expected in (
        ({"vendor_id": "GenuineIntel"}, True),
        ({"vendor_id": "AuthenticAMD", "model name": "of Intel"}, False),
        ({}, False),
    ):
        monkeypatch.setattr(machine, "_first_cpu", lambda fields=fields: fields)
        assert machine.is_intel_cpu() is expected
        assert machine.cpu_info()["flags"] == [] and not machine.multiplies_bfloat16()

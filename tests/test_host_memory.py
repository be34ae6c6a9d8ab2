"""What a process may have of the host's memory, read from made-up systems."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remat import host_memory
from remat.host_memory import available_bytes, total_bytes

MIB = 2**20
MEMINFO = f"MemTotal:  {4096 * 1024} kB\nMemFree:  {100 * 1024} kB\nMemAvailable:  {3000 * 1024} kB\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system of 4 GiB, to write files into."""
    monkeypatch.setattr(host_memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path / "cgroup")
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": MIB, "SC_AVPHYS_PAGES": MIB // 2}
    monkeypatch.setattr(os, "sysconf_names", dict.fromkeys(sizes, 0))
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_in_the_page_cache_is_available(system: Path) -> None:
    write(system / "proc" / "meminfo", MEMINFO)
    assert (total_bytes(), available_bytes()) == (4096 * MIB, 3000 * MIB)


def test_a_system_without_proc(system: Path) -> None:
    assert available_bytes() == 2048 * MIB


def test_a_system_that_does_not_say_what_is_free(system: Path) -> None:
    del os.sysconf_names["SC_AVPHYS_PAGES"]
    assert available_bytes() == 4096 * MIB


@pytest.mark.parametrize("own", ["job", "", "elsewhere/job"])
@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "cache"),
    [
        ("0::/{}", "", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:/{}", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_cgroup_has_the_last_word(system: Path, own: str, line: str, folder: str, limit: str, used: str, cache: str) -> None:
    """Its own one, or that of one around it."""
    write(system / "proc" / "meminfo", MEMINFO)
    write(system / "proc" / "self" / "cgroup", f"3:cpu:/x\n{line.format(own)}\n")
    group = system / "cgroup" / folder / (own if own == "job" else "")
    write(group / limit, f"{1024 * MIB}\n")
    write(group / used, f"{600 * MIB}\n")
    write(group / "memory.stat", f"anon 3\n{cache} {200 * MIB}\n")
    assert (total_bytes(), available_bytes()) == (1024 * MIB, 624 * MIB)


def test_a_cgroup_without_a_limit(system: Path) -> None:
    write(system / "proc" / "meminfo", MEMINFO)
    write(system / "proc" / "self" / "cgroup", "0::/job\n")
    write(system / "cgroup" / "job" / "memory.max", "max\n")
    write(system / "cgroup" / "job" / "memory.current", f"{600 * MIB}\n")
    assert (total_bytes(), available_bytes()) == (4096 * MIB, 3000 * MIB)

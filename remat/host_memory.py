"""Host memory: what this process may have of it, and what of that is free. Of the system, and of the cgroups around the process
(in a container, of version 1 or 2), whichever has less."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_V2 = "memory.max", "memory.current", "inactive_file"


def total_bytes() -> int:
    """All memory that this process may have."""
    return min([_physical_bytes(), *(limit for limit, _ in _limits())])


def available_bytes() -> int:
    """What can be had without swapping. Where the system does not say (macOS), all that there is."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", _text(_PROC / "meminfo"), re.MULTILINE)
    if found is not None:
        free = int(found[1]) * 1024
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    else:
        free = _physical_bytes()
    return max(0, min([free, *(limit - used for limit, used in _limits())]))


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limits() -> Iterator[tuple[int, int]]:
    """The limit of each cgroup around this process, and what is used of it, but for file cache that the kernel can drop."""
    for line in _text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, (limit, used, cache) = (_CGROUPS / "memory", _V1) if controllers else (_CGROUPS, _V2)
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):  # a container may see itself as the root, whatever its path says
            amounts = _text(folder / limit), _text(folder / used)
            if folder.is_relative_to(root) and all(text.strip().isdecimal() for text in amounts):
                dropped = re.search(rf"^{cache} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                yield int(amounts[0]), int(amounts[1]) - (int(dropped[1]) if dropped is not None else 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not this system, or not this version
        return ""

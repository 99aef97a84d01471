"""How much memory is left to this process on its host."""

from pathlib import Path

import psutil

CONTROL_GROUPS = Path("/sys/fs/cgroup")
# Of control groups, second version and first: the limit, what counts towards it, and, in ``memory.stat``,
# what of that the kernel gives back when it is wanted.
KINDS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def free_host_bytes(groups: Path = CONTROL_GROUPS) -> int:
    """What the machine has available, or what the limit of this process's container leaves if that is less.

    ``groups``: where control groups are mounted; in a container its own is at the top.
    """
    free = int(psutil.virtual_memory().available)
    for limit, used, inactive in KINDS:
        try:
            most, there = ((groups / name).read_text().strip() for name in (limit, used))
            stat = (groups / limit).with_name("memory.stat").read_text()
            counts = dict(line.split() for line in stat.splitlines())
            left = int(most) - int(there) + int(counts.get(inactive, 0))
        except (OSError, ValueError):  # there is no such group, or, as "max" says, no limit
            continue
        free = min(free, max(0, left))
    return free

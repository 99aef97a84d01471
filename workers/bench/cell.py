"""What is compared: a policy, one of its ways to prefill, and how much of a prompt's KV it keeps. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyramidserve.errors import InvalidRequestError
from pyramidserve.types import Compression
from workers.policies import registry
from workers.policies.registry import policy_name, validate, versions


@dataclass(frozen=True)
class Cell:
    """A way to compress."""

    compression: Compression

    @property
    def name(self) -> str:
        """As in ``pyramid/evict@0.45``; of a policy that keeps everything its name alone."""
        keep, name = self.compression.kv_keep, policy_name(self.compression)
        return name if keep is None else f"{name}@{keep:g}"


# What the others are compared with: everything is kept.
BASELINE = Cell(Compression())


def all_cells(kv_keeps: Iterable[float], others: Sequence[str] = ()) -> list[Cell]:
    """All policies of ours and the enabled ``others``, in all their ways at all shares; the baseline first.

    Raises InvalidRequestError where a share cannot be.
    """
    shares = tuple(dict.fromkeys(kv_keeps))
    cells = []
    for name in versions(others):
        policy = registry.POLICIES[name]
        for share in (None,) if policy.keeps_all else shares:
            for prefill in policy.prefills or ("",):
                cells.append(Cell(Compression(name, prefill, share)))
    for cell in cells:
        validate(cell.compression)
    return sorted(cells, key=lambda cell: cell != BASELINE)


def chosen(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Those of ``cells`` that are named, and the baseline; all where there are no names.

    Raises InvalidRequestError where a name is none of theirs.
    """
    known = {cell.name: cell for cell in cells}
    for name in names:
        if name not in known:
            raise InvalidRequestError(
                f"--cells names {name!r}; there are {', '.join(known)}, and with --policies and --kv-keep "
                "others"
            )
    return [cell for cell in cells if not names or cell == BASELINE or cell.name in names]

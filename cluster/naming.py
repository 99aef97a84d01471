"""Names that are not known: what was written, where, and what was probably meant. Pure."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from pyramidserve.errors import ConfigurationError


def check_names(given: Iterable[object], known: Collection[str], place: str) -> None:
    """Raises ConfigurationError for the first of ``given`` that is not ``known``.

    ``place`` goes in front of it, as in ``applications[0].args.``.
    """
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            meant = f"; did you mean {near[0]}?" if near else ";"
            raise ConfigurationError(f"unknown setting {place}{name}{meant} known are {', '.join(known)}")

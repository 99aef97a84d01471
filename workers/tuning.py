"""Tuning that makes no sense is refused, by the room and the name of its value. Pure."""

from pyramidserve.errors import ConfigurationError


def check_tuning(room: str, tuning: object, *rules: tuple[str, bool, str]) -> None:
    """Raises ConfigurationError for the first of ``rules`` that does not hold.

    A rule is a field of ``tuning``, whether its value is sound, and what it must be.
    """
    for name, sound, values in rules:
        if not sound:
            raise ConfigurationError(f"{room}.{name} is {getattr(tuning, name)}; it must be {values}")

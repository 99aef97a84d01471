"""What users do: sessions of several turns, and when they come. Pure and seeded.

`python -m cluster.load.trace FILE` draws the sessions that lie beside this file as chat.json.
"""

import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pyramidserve.errors import InvalidRequestError

Arrivals = Literal["poisson", "bursty", "diurnal"]
# The conversations of the Azure trace in Patel et al., "Splitwise" (ISCA 2024): prompts of 1,020 tokens and
# answers of 129 at the median; two turns a session as in LMSYS-Chat-1M (Zheng et al., ICLR 2024). A turn's
# prompt is the history and a message, so the first messages make most of it.
SOURCE = "medians of Splitwise's conversations (ISCA 2024), turns of LMSYS-Chat-1M (ICLR 2024), log-normal"
FIRST_MESSAGE, NEXT_MESSAGE, ANSWER, THINKING = (850, 0.6), (60, 1.0), (129, 0.8), (10, 0.6)
MOST_TURNS, MOST_MESSAGE, MOST_ANSWER, MOST_THINKING = 6, 3000, 512, 40
# Of chat.json.
SESSIONS, SEED = 400, 1
# A bursty minute has ten seconds with six times the rate of the others; a diurnal "day" lasts ten minutes.
BURST_PERIOD, BURST_SECONDS, BURST_FACTOR = 60.0, 10.0, 6.0
DAY_SECONDS, DAY_SWING = 600.0, 0.8


@dataclass(frozen=True)
class Turn:
    """A message, the length of its answer, and the time until the message after it, in seconds."""

    message_tokens: int
    answer_tokens: int
    thinking: float


@dataclass(frozen=True)
class Session:
    """The turns of one user, in order."""

    turns: tuple[Turn, ...]

    def prompt_tokens(self, turn: int) -> int:
        """Tokens of the whole prompt of a turn: history and message."""
        history = sum(each.message_tokens + each.answer_tokens for each in self.turns[:turn])
        return history + self.turns[turn].message_tokens


def draw_sessions(count: int, seed: int) -> list[Session]:
    """Sessions with the statistics of SOURCE."""
    chance = random.Random(seed)

    def draw(median: float, sigma: float, least: int, most: int) -> int:
        return min(max(round(median * math.exp(chance.gauss(0, sigma))), least), most)

    sessions = []
    for _ in range(count):
        turns = 1
        while turns < MOST_TURNS and chance.random() < 0.5:
            turns += 1
        messages = [FIRST_MESSAGE] + [NEXT_MESSAGE] * (turns - 1)
        sessions.append(
            Session(
                tuple(
                    Turn(
                        draw(*message, 8, MOST_MESSAGE),
                        draw(*ANSWER, 8, MOST_ANSWER),
                        float(draw(*THINKING, 1, MOST_THINKING)),
                    )
                    for message in messages
                )
            )
        )
    return sessions


def write_trace(sessions: list[Session], file: Path) -> None:
    """Writes sessions where ``read_trace`` reads them."""
    turns = [[list(asdict(turn).values()) for turn in session.turns] for session in sessions]
    columns = list(Turn.__dataclass_fields__)
    file.write_text(json.dumps({"source": SOURCE, "columns": columns, "sessions": turns}) + "\n")


def read_trace(file: Path) -> list[Session]:
    """The sessions of a trace. Raises InvalidRequestError if it cannot be read."""
    try:
        told: dict[str, Any] = json.loads(file.read_text())
        return [Session(tuple(Turn(*turn) for turn in turns)) for turns in told["sessions"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError(f"the trace {str(file)!r} cannot be read: {error}") from error


def arrivals(kind: Arrivals, rate: float, seconds: float, seed: int) -> Iterator[float]:
    """When sessions come, in seconds from the start, ``rate`` a second on average."""
    chance = random.Random(seed)
    # Thinning of a Poisson process with the highest rate (Lewis and Shedler, 1979).
    most = rate * max(intensity(kind, moment / 10) for moment in range(round(DAY_SECONDS * 10)))
    now = 0.0
    while (now := now + chance.expovariate(most)) < seconds:
        if chance.random() * most < rate * intensity(kind, now):
            yield now


def intensity(kind: Arrivals, moment: float) -> float:
    """The rate at a moment over the mean rate."""
    if kind == "bursty":
        mean = (BURST_SECONDS * BURST_FACTOR + BURST_PERIOD - BURST_SECONDS) / BURST_PERIOD
        return (BURST_FACTOR if moment % BURST_PERIOD < BURST_SECONDS else 1.0) / mean
    if kind == "diurnal":
        return 1 - DAY_SWING * math.cos(2 * math.pi * moment / DAY_SECONDS)
    return 1.0


if __name__ == "__main__":
    write_trace(draw_sessions(SESSIONS, SEED), Path(sys.argv[1]))

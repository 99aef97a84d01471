"""How a model's authors would have its tokens drawn: its ``generation_config.json``."""

import json
from pathlib import Path

from pyramidserve.errors import CheckpointError
from pyramidserve.types import Sampling
from workers.model.config import GENERATION


def sampling_defaults(checkpoint: Path) -> Sampling:
    """What holds where a request is silent; greedy where the file is, or does not draw.

    Raises CheckpointError where a value is no number.
    """
    file = checkpoint / GENERATION
    said = json.loads(file.read_text()) if file.is_file() else {}

    def number(name: str, otherwise: float) -> float:
        value = said.get(name)
        if value is None:
            return otherwise
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{name} in {file} is {value!r}; it must be a number")
        return float(value)

    repetition = number("repetition_penalty", 1.0)
    if not said.get("do_sample"):
        return Sampling(repetition_penalty=repetition)
    return Sampling(
        temperature=number("temperature", 1.0),
        top_p=number("top_p", 1.0),
        top_k=int(number("top_k", 0)) or None,
        min_p=number("min_p", 0.0),
        repetition_penalty=repetition,
    )

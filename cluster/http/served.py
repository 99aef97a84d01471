"""What clients are told of the model that is served."""

from dataclasses import dataclass
from typing import Any

from pyramidserve.errors import InvalidRequestError

OWNER = "pyramidserve"


@dataclass(frozen=True)
class Served:
    """What clients are told of the model.

    Attributes:
        name: under which they ask for it.
        context: tokens of prompt and output together, at most.
        created: when it came, in seconds since 1970.
        layers: that it has.
    """

    name: str
    context: int
    created: int
    layers: int

    def about(self) -> dict[str, Any]:
        """As /v1/models has it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": OWNER,
            "max_model_len": self.context,
        }

    def check(self, asked: str | None) -> None:
        """Raises InvalidRequestError where another model is asked for."""
        if asked and asked != self.name:
            raise InvalidRequestError(
                f"model is {asked!r:.80}, and this serves {self.name!r}; ask for that, or name none",
                reason="model_not_found",
            )

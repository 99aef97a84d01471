"""When a reply ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyramidserve.integers import whole_number


@dataclass(frozen=True)
class Stopping:
    """When generation ends, besides the end-of-sequence token.

    Attributes:
        max_tokens: output tokens at most; None lets the server choose.
        stop: generation ends before the first of these in the text, or in what special tokens say; one text
            is taken as one.
        ignore_eos: go on after the end-of-sequence token.
        stop_token_ids: generation ends with the first of these; one id is taken as one.
        min_tokens: output tokens before which nothing of this ends it but ``max_tokens``.
        include_stop: the text has the stop string that ended it too.
    """

    max_tokens: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    include_stop: bool = False

    def __post_init__(self) -> None:
        """Makes tuples of what is given. A text is a sequence of its letters, which nobody means.

        Raises InvalidRequestError where an id is no whole number.
        """
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        ids = self.stop_token_ids
        ids = ids if isinstance(ids, Iterable) else (ids,)
        whole = tuple(whole_number("each id of stop_token_ids", each) for each in ids)
        object.__setattr__(self, "stop_token_ids", whole)

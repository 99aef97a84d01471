"""The attention of one layer of a prefill, fed with rows as they come."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from workers.backends.interface import Attention
from workers.device import to_device
from workers.execute.prompt import Prompt
from workers.kv.entry import Positions
from workers.model.rope import Rotation


class LayerAttention:
    """One layer's attention of prompts, fed with their rows in order.

    Attributes:
        spans: first and last row, excluded, of each sequence.
        out: [rows, heads * head size].
        observers: of each sequence, what its policy looks at.
    """

    out: torch.Tensor

    def __init__(
        self,
        attention: Attention,
        prompts: Sequence[Prompt],
        layer: int,
        reach: int,
        rows: tuple[int, ...],
        positions: Positions,
        last_rows: bool,
    ) -> None:
        """
        Args:
            layer: of the shard.
            reach: the newest positions that a row attends to, its own among them; 0: all.
            positions: input positions of the rows, int32, ascending in each sequence.
            last_rows: output of others is not needed.
        """
        self._attention, self._prompts, self._last_rows = attention, prompts, last_rows
        self._positions = positions
        self.observers = [
            prompt.observer(layer, count) for prompt, count in zip(prompts, rows, strict=True)
        ]
        self.spans = list(pairwise(accumulate(rows, initial=0)))
        pasts = [0 if prompt.past is None else prompt.past.tokens for prompt in prompts]
        # Of each sequence, where its past begins among all tokens, where its rows do, and where these end.
        begins = accumulate((past + count for past, count in zip(pasts, rows, strict=True)), initial=0)
        self._tokens = [
            (begin, begin + past, begin + past + count)
            for begin, past, count in zip(begins, pasts, rows, strict=False)
        ]
        # Of each row, the first token of its sequence that it attends to.
        self._starts = np.zeros(len(positions), dtype=np.int32) if reach else None
        for prompt, (first, end) in zip(prompts, self.spans, strict=True):
            if self._starts is not None:
                every = own = positions[first:end]
                if prompt.past is not None:
                    every = np.concatenate((prompt.past.positions[0], own))
                if prompt.plan.within_cache:
                    every = np.arange(own[-1] + 1 - len(every), own[-1] + 1)
                    own = every[len(every) - len(own) :]
                self._starts[first:end] = np.searchsorted(every, own - reach, side="right")

    def kv_of(self, number: int) -> torch.Tensor:
        """Keys and values of a sequence's past and rows, [tokens, 2, KV heads, head size]."""
        begin, _, end = self._tokens[number]
        return self._kv[begin:end]

    def attend(
        self, block: slice, query: torch.Tensor, kv: torch.Tensor, rotation: Rotation | None
    ) -> None:
        """Takes in the ``query`` and ``kv`` of the next rows, which ``rotation`` has turned."""
        if block.start == 0:
            self._kv = kv.new_empty(self._tokens[-1][2], *kv.shape[1:])
            for (begin, start, _), prompt in zip(self._tokens, self._prompts, strict=True):
                if prompt.past is not None:
                    self._kv[begin:start] = prompt.past.kv
            self.out = query.new_empty(self.spans[-1][1], query[0].numel())
        for number, (first, end) in enumerate(self.spans):
            observer = self.observers[number]
            start, stop = max(first, block.start), min(end, block.stop)
            if start >= stop:
                continue
            own = slice(start - block.start, stop - block.start)
            begin, rows_begin, _ = self._tokens[number]
            past = rows_begin - begin
            self._kv[rows_begin + start - first : rows_begin + stop - first] = kv[own]
            turned = None if rotation is None else (rotation[0][own], rotation[1][own])
            observer.take_queries(self._positions[start:stop], query[own], turned)
            if self._last_rows:
                start = max(start, end - max(1, observer.rows))
            if start >= stop:
                continue
            unseen, starts = self._unseen(start, stop, kv.device)
            self.out[start:stop] = observer.attend(
                self._attention,
                start - first,
                query[start - block.start : stop - block.start],
                self._kv[begin + unseen : begin + past + stop - first],
                unseen,
                starts,
            )

    def _unseen(self, start: int, stop: int, device: torch.device) -> tuple[int, torch.Tensor | None]:
        """Tokens before all that rows ``start`` to ``stop`` attend to, and behind them each's first."""
        if self._starts is None:
            return 0, None
        starts = self._starts[start:stop]
        return int(starts[0]), to_device(starts - starts[0], device)

"""Asks a server for the rest of a function, as OpenAI's clients ask."""

import uuid
from dataclasses import dataclass, replace
from typing import Any

from openai import AsyncOpenAI

from bench.humaneval.setting import Setting
from pyramidserve.errors import UnavailableError
from workers.bench.problems import Problem

# Behind the function: other code begins.
STOPS = ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("]


@dataclass(frozen=True)
class Reply:
    """What the model wrote, and what its receipt says; of two turns, the second's."""

    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    kv_keep_reached: float
    reused_tokens: int
    recalled_bytes: int


@dataclass(frozen=True)
class Asking:
    """A client of the ``model``, which writes at most ``max_tokens`` greedily."""

    client: AsyncOpenAI
    model: str
    max_tokens: int

    async def ask(self, problem: Problem, setting: Setting) -> Reply:
        """The rest of a function. Raises what the client does, and UnavailableError."""
        if setting.turns == 1:
            return await self._complete(problem.prompt, self.max_tokens, setting)
        session = f"{problem.name}-{uuid.uuid4().hex}"
        first = last = await self._complete(problem.prompt, 1, setting, session)
        if first.finish_reason == "length":
            last = await self._complete(problem.prompt + first.text, self.max_tokens - 1, setting, session)
            if not last.reused_tokens:
                raise UnavailableError(
                    f"{problem.name}: nothing was left of the first turn when the second one came; give "
                    "the server more kv_bytes and host_bytes"
                )
        await self.client.delete(f"/sessions/{session}", cast_to=object)
        return last if last is first else _joined(first, last)

    async def _complete(self, prompt: str, tokens: int, setting: Setting, session: str = "") -> Reply:
        extra: dict[str, Any] = {"compression": dict(setting.compression), "session_id": session or None}
        completion = await self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=tokens, temperature=0, stop=STOPS, extra_body=extra
        )
        (choice,), usage, more = completion.choices, completion.usage, completion.model_extra
        assert usage is not None
        assert more is not None
        receipt = more["pyramidserve"]
        return Reply(
            choice.text,
            choice.finish_reason,
            usage.prompt_tokens,
            usage.completion_tokens,
            receipt["kv_keep_reached"],
            receipt["reused_tokens"],
            receipt["recalled_bytes"],
        )


def _joined(first: Reply, last: Reply) -> Reply:
    """Two turns as one reply, cut where it would have been cut in one."""
    text = first.text + last.text
    end = min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))
    return replace(last, text=text[:end], output_tokens=first.output_tokens + last.output_tokens)

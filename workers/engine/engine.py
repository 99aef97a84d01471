"""The whole engine in one process: the same code as a cluster's, without Ray and gRPC."""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyramidserve.chat import NO_TOOLS, Chat
from pyramidserve.errors import ConfigurationError, RequestTooLargeError
from pyramidserve.prompt import Prompt, goes_on, read_prompt
from pyramidserve.tools import Tools, whole_calls
from pyramidserve.types import (
    Compression,
    Constraint,
    Event,
    Reply,
    Sampling,
    Started,
    Stopping,
    Tokens,
)
from workers.engine.conversations import Conversations
from workers.engine.loop import (
    EngineLoop,
    LoopEvent,
    SequenceBroken,
    SequenceFinished,
    SequenceTokens,
    SequenceTraced,
)
from workers.engine.pipeline import Connect, connect_local, pipeline_layout
from workers.engine.settings import EngineSettings, settings_of
from workers.engine.stage import StageConfig
from workers.model.checkpoint import EMBEDDED, resolve_checkpoint
from workers.model.config import ModelConfig, read_config
from workers.model.grammar import Grammars
from workers.model.tokenizer import Tokenizer, end_ids
from workers.policies.registry import span_floor
from workers.schedule.sequence import SequenceRequest
from workers.schedule.validation import lowered, settle
from workers.tools.settle import one_of, settle_tools

GREEDY, UNTIL_EOS, FULL = Sampling(), Stopping(), Compression()


@dataclass(frozen=True)
class EngineConfig(EngineSettings):
    """How to build an engine; see ``EngineSettings``.

    Attributes:
        checkpoint: see ``resolve_checkpoint``.
        boundaries: first layers of the shards behind the first; none: one shard.
        kv_bytes, host_bytes: of all shards together, divided between them by their layers.
        control_tokens_in_messages: see ``Tokenizer``.
    """

    checkpoint: str = EMBEDDED
    boundaries: tuple[int, ...] = ()
    kv_bytes: int = field(default=512 << 20, kw_only=True)
    host_bytes: int = field(default=512 << 20, kw_only=True)
    max_sessions: int = field(default=16, kw_only=True)
    control_tokens_in_messages: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class EngineRequest:
    """A request to the engine, as to the client SDK.

    Attributes:
        session_id: names a conversation; its next turn goes on with the KV that this one leaves.
        continue_final_message: whether the reply goes on with the last message; None: where that is the
            assistant's.
        given_output_ids: output that is given, and told with its log-probabilities; nothing ends it.
        constraint: what the text of the reply must be.
        tools: what the reply to a conversation may call.
    """

    prompt: Prompt
    sampling: Sampling = GREEDY
    stopping: Stopping = UNTIL_EOS
    compression: Compression = FULL
    resume_output_ids: tuple[int, ...] = ()
    session_id: str = ""
    continue_final_message: bool | None = None
    trace: bool = False
    given_output_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    tools: Tools = NO_TOOLS


class Engine:
    """Continuous batching over all shards of a model in this process. Not thread-safe.

    Attributes:
        facts: of all shards; ``stages`` are those of them that are in this process.
        conversations: what was said in as many sessions as may be parked.
    """

    def __init__(self, config: EngineConfig, connect: Connect = connect_local) -> None:
        """Loads the model; ``connect`` builds its shards.

        Raises CheckpointError or ConfigurationError.
        """
        checkpoint = resolve_checkpoint(config.checkpoint)
        self.model = read_config(checkpoint, config.max_model_len)
        self.tokenizer = Tokenizer(checkpoint, config.control_tokens_in_messages)
        connected = connect(_stage_configs(config, checkpoint, self.model))
        self.facts, self.stages = connected.facts, connected.stages
        layout = pipeline_layout(self.facts, self.model, config)
        ends = end_ids(self.model, self.tokenizer)
        self._grammars = Grammars(self.tokenizer, self.model.vocabulary, ends)
        self.loop = EngineLoop(layout, connected.pipeline, self.tokenizer, ends)
        self._waiting: deque[SequenceRequest] = deque()
        self._submitted = 0
        self.conversations = Conversations(config.max_sessions)

    def submit(self, request: EngineRequest) -> tuple[int, Started]:
        """Queues a request; returns its number and what a client is told first.

        Raises InvalidRequestError, or RequestTooLargeError when the pool could never hold it.
        """
        prompt, chat = read_prompt(request.prompt), None
        continues = goes_on(prompt, request.continue_final_message)
        if isinstance(prompt, str):
            prompt_ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, tuple):
            chat = Chat(prompt, continues, request.tools)
            prompt_ids = self.tokenizer.chat(chat, self.conversations.last_turn(request.session_id))
        else:
            prompt_ids = prompt
        calls, held = settle_tools(chat, self.tokenizer) if chat else (None, None)
        constraint = one_of(request.constraint, held)
        terms = settle(
            prompt_ids,
            request.sampling,
            request.stopping,
            request.compression,
            request.resume_output_ids,
            self.model,
            request.given_output_ids,
            self.facts[0].layout.kv_dtype,
        )
        floor = span_floor(terms.compression)
        instructions = self.tokenizer.instructions(chat, prompt_ids) if chat and floor else ()
        forced = max(request.resume_output_ids, request.given_output_ids, key=len)
        if constraint:
            self._grammars.check(constraint, request.resume_output_ids)
        self._submitted += 1
        sequence = SequenceRequest(
            sequence=self._submitted,
            request_id=str(self._submitted),
            prompt_ids=tuple(prompt_ids),
            sampling=terms.sampling,
            stopping=terms.stopping,
            compression=terms.compression,
            forced_output_ids=forced,
            untold=len(forced) - len(request.resume_output_ids),
            expected_tokens=terms.expected_tokens,
            session_id=request.session_id,
            trace=request.trace,
            constraint=constraint,
            calls=calls,
            instructions=instructions,
        )
        memory = self.loop.scheduler.memory
        if not terms.limited:
            sequence = lowered(sequence, memory.could_ever_hold)
        if not memory.could_ever_hold(sequence):
            raise RequestTooLargeError(
                f"the request needs {list(memory.growth(sequence).most)} pages of pools of "
                f"{list(memory.forecast.pages)}, and {memory.host_pages(sequence).tolist()} of the host's "
                f"{list(self.loop.scheduler.layout.host_pages)}; lower max_tokens or kv_keep, give the "
                "engine more kv_bytes or host_bytes, or ask for recall 'off'"
            )
        self._waiting.append(sequence)
        if chat and request.session_id and not request.resume_output_ids:
            self.conversations.begin(self._submitted, request.session_id, chat, sequence.prompt_ids)
        return self._submitted, Started(len(prompt_ids), terms.sampling.seed or 0)

    def step(self) -> list[LoopEvent]:
        """Admits what fits, in order, and advances by one step."""
        while self._waiting and self.loop.scheduler.memory.probably_fits(self._waiting[0]):
            self.loop.admit(self._waiting.popleft())
        self.loop.scheduler.queued = len(self._waiting)
        events = self.loop.advance()
        for event in events:
            self.conversations.take_down(event)
        return events

    def cancel(self, sequence: int) -> None:
        """Ends a request; what it held is free when ``idle`` says so."""
        self._waiting = deque(r for r in self._waiting if r.sequence != sequence)
        self.loop.cancel(sequence)
        self.conversations.cancel(sequence)

    def end_session(self, session_id: str) -> None:
        """Forgets a session, and frees what it has left for its next turn.

        Turns of it that wait or run go on, and leave nothing.
        """
        self.conversations.end(session_id)
        self.loop.end_session(session_id)
        self._waiting = deque(
            replace(each, session_id="") if each.session_id == session_id else each
            for each in self._waiting
        )
        while not (self.loop.idle or self.loop.scheduler.sequences):
            self.loop.advance()

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return self.loop.idle and not self._waiting

    def stream(self, request: EngineRequest) -> Generator[Event, None, None]:
        """Runs one request and yields its events. Closing the iterator cancels it.

        Raises EngineError where its logits are not finite, or its policy fails.
        """
        sequence, started = self.submit(request)
        try:
            yield started
            while not self.idle:
                for event in self.step():
                    if isinstance(event, SequenceTokens):
                        yield event.tokens
                    elif isinstance(event, SequenceFinished):
                        yield event.receipt
                    elif isinstance(event, SequenceBroken):
                        raise event.error(str(event.sequence))
        finally:
            self.cancel(sequence)
            while not self.idle:
                self.step()

    def generate(self, requests: Sequence[EngineRequest]) -> list[Reply]:
        """Runs requests together and returns their replies in order.

        Raises EngineError where logits of one are not finite or its policy fails, once others have ended.
        """
        return [run.reply for run in self.trace(requests)]

    def trace(self, requests: Sequence[EngineRequest]) -> list["TracedReply"]:
        """Like ``generate``, with what traced prefills kept."""
        numbers = [self.submit(request)[0] for request in requests]
        tokens: dict[int, list[Tokens]] = {number: [] for number in numbers}
        traced: dict[int, SequenceTraced] = {}
        finished: dict[int, SequenceFinished] = {}
        broken: list[SequenceBroken] = []
        while not self.idle:
            for event in self.step():
                if isinstance(event, SequenceTokens):
                    tokens[event.sequence].append(event.tokens)
                elif isinstance(event, SequenceTraced):
                    traced[event.sequence] = event
                elif isinstance(event, SequenceFinished):
                    finished[event.sequence] = event
                elif isinstance(event, SequenceBroken):
                    broken.append(event)
        if broken:
            raise broken[0].error(str(broken[0].sequence))
        return [
            TracedReply(
                Reply(
                    text="".join(part.text for part in tokens[number]),
                    token_ids=tuple(token for part in tokens[number] for token in part.token_ids),
                    receipt=finished[number].receipt,
                    logprobs=tuple(each for part in tokens[number] for each in part.logprobs),
                    tool_calls=whole_calls(call for part in tokens[number] for call in part.tool_calls),
                ),
                traced.get(number),
                finished[number].positions,
            )
            for number in numbers
        ]

    def check_integrity(self) -> None:
        """Raises IntegrityError unless all books balance."""
        self.loop.scheduler.check_integrity()
        for stage in self.stages:
            stage.cache.check_integrity()


@dataclass(frozen=True)
class TracedReply:
    """A reply, and what its prefill kept if that was asked for.

    ``positions``: of what each layer had when it ended, int32 [sets, tokens]; empty where it was not.
    """

    reply: Reply
    traced: SequenceTraced | None
    positions: tuple[npt.NDArray[np.int32], ...] = ()


def _stage_configs(config: EngineConfig, checkpoint: Path, model: ModelConfig) -> list[StageConfig]:
    layers = model.layers
    bounds, settings = (0, *config.boundaries, layers), settings_of(config)
    if any(end <= first for first, end in pairwise(bounds)):
        raise ConfigurationError(
            f"boundaries are {list(config.boundaries)}, for {len(bounds) - 1} shards of at least a layer, "
            f"but {config.checkpoint} has {model.summary}; give ascending ones from 1 to {layers - 1}"
        )

    def share(first: int, end: int) -> EngineSettings:
        kv, host = ((end - first) * size // layers for size in (config.kv_bytes, config.host_bytes))
        return replace(settings, kv_bytes=kv, host_bytes=host)

    return [StageConfig(checkpoint, *layers_of, share(*layers_of)) for layers_of in pairwise(bounds)]

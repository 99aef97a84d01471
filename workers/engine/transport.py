"""Steps between the shards of a gang: a ring of processes over torch.distributed point-to-point."""

import pickle
import struct
import threading
from collections import deque
from datetime import timedelta
from queue import Empty, SimpleQueue

import torch
import torch.distributed as distributed
from torch.distributed import Store  # type: ignore[attr-defined]

from workers.engine.interleave import Interleave, OnAdvance, Work, unobserved
from workers.engine.pipeline import Outcome
from workers.engine.stage import Stage, StageFacts
from workers.schedule.scheduler import steps_at_most
from workers.schedule.step import Step

# Every step is at most three messages: lead, rest of the header, tensor.
MESSAGES_PER_STEP = 3
# Every message begins with one tensor of this size: lengths, then as much of the header as fits.
LEAD_BYTES = 4096
_LENGTHS = struct.Struct("<QQQB")
_DTYPES = (torch.int64, torch.float32, torch.bfloat16, torch.float16)
# A follower waits for work as long as it takes; a dead peer shows as a closed connection.
NEVER = timedelta(days=3650)


class Ring:
    """A gang's processes, each sending to the next rank and the last to rank 0.

    Sends do not block: their buffers are kept for as many steps as a scheduler ever has under way. What
    comes in is taken by a thread of its own, as gloo cannot say whether something has come. Used by one
    thread.
    """

    def __init__(self, store: Store, rank: int, size: int, device: torch.device) -> None:
        """Joins the gang; returns when all are there."""
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=NEVER)
        self.rank, self.size = rank, size
        self._device = device
        self._depth = MESSAGES_PER_STEP * steps_at_most(size)
        self._sent: deque[tuple[distributed.Work, torch.Tensor]] = deque()
        self._arrived: SimpleQueue[Work | Exception] = SimpleQueue()
        self._receiver = threading.Thread(target=self._receive_all, name="ring", daemon=True)

    def gather_facts(self, own: StageFacts) -> tuple[StageFacts, ...]:
        """What all shards say of themselves, in order of rank; call it before ``receive``."""
        facts: list[StageFacts | None] = [None] * self.size
        distributed.all_gather_object(facts, own)
        return tuple(fact for fact in facts if fact is not None)

    def send(self, step: Step, tensor: torch.Tensor) -> None:
        """Sends a step to the next rank; ``tensor`` must not be changed any more."""
        # Peers of a gang trust each other, as in torch.distributed's own object collectives.
        header = pickle.dumps(step, protocol=5)
        columns = tensor.shape[1] if tensor.dim() == 2 else 0
        lengths = _LENGTHS.pack(len(header), len(tensor), columns, _DTYPES.index(tensor.dtype))
        message = lengths + header
        lead = torch.zeros(LEAD_BYTES, dtype=torch.uint8)
        first = min(len(message), LEAD_BYTES)
        lead[:first] = torch.frombuffer(bytearray(message[:first]), dtype=torch.uint8)
        self._send(lead)
        if len(message) > LEAD_BYTES:
            self._send(torch.frombuffer(bytearray(message[LEAD_BYTES:]), dtype=torch.uint8))
        if tensor.numel():
            self._send(tensor.contiguous())

    def receive(self, wait: bool) -> Work | None:
        """The next step from the rank before; None if there is none and ``wait`` is false.

        Raises RuntimeError when a peer is gone.
        """
        if self._receiver.ident is None:
            self._receiver.start()
        try:
            arrived = self._arrived.get(block=wait)
        except Empty:
            return None
        if isinstance(arrived, Exception):
            raise arrived
        return arrived

    def _receive_all(self) -> None:
        try:
            while True:
                self._arrived.put(self._receive_step())
        except Exception as error:  # raised to whoever waits
            self._arrived.put(error)

    def _receive_step(self) -> Work:
        lead = self._receive(torch.empty(LEAD_BYTES, dtype=torch.uint8))
        raw = lead.numpy().tobytes()
        size, rows, columns, dtype = _LENGTHS.unpack_from(raw)
        header = raw[_LENGTHS.size : _LENGTHS.size + size]
        if len(header) < size:
            rest = self._receive(torch.empty(size - len(header), dtype=torch.uint8))
            header += rest.numpy().tobytes()
        step: Step = pickle.loads(header)
        shape = (rows, columns) if columns else (rows,)
        # Token ids travel in host memory, hidden states in the device's.
        device = self._device if columns else torch.device("cpu")
        tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=device)
        return step, self._receive(tensor) if tensor.numel() else tensor

    def _send(self, tensor: torch.Tensor) -> None:
        work = distributed.isend(tensor, (self.rank + 1) % self.size)
        assert work is not None
        self._sent.append((work, tensor))
        while len(self._sent) > self._depth:
            self._sent.popleft()[0].wait()

    def _receive(self, tensor: torch.Tensor) -> torch.Tensor:
        distributed.recv(tensor, (self.rank - 1) % self.size)
        return tensor


class RingPipeline:
    """The head's view of a gang: its own shard first, the others down the ring."""

    def __init__(self, stage: Stage, ring: Ring, on_advance: OnAdvance = unobserved) -> None:
        """``on_advance``: see ``Interleave``; of the head's own shard."""
        self._own, self._ring = Interleave(stage, on_advance), ring

    def submit(self, step: Step, tokens: torch.Tensor) -> None:
        self._own.add(step, tokens)

    def collect(self) -> Outcome:
        while True:
            if arrived := self._ring.receive(wait=self._own.idle):
                step, tokens = arrived
                return step, tuple(tokens.tolist())
            if done := self._own.advance():
                self._ring.send(*done)


def follow(stage: Stage, ring: Ring) -> None:
    """The life of a shard behind the first: run what comes and send it on, until a peer is gone."""
    steps = Interleave(stage)
    while True:
        while arrived := ring.receive(wait=steps.idle):
            steps.add(*arrived)
        if done := steps.advance():
            ring.send(*done)

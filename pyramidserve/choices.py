"""Several replies to one prompt: each is a request of its own."""

from collections.abc import Sequence

from pyramidserve.v1 import inference_pb2 as pb

# That are asked for at once; each is one of the queue.
MOST_CHOICES = 128


def choice_names(name: str, count: int) -> list[str]:
    """The ``request_id`` of each of ``count`` choices that are asked for under one name."""
    return [name] if count == 1 else [f"{name}-{number}" for number in range(count)]


def choices_of(request: pb.GenerateRequest, names: Sequence[str]) -> list[pb.GenerateRequest]:
    """A request for each of ``names``, as ``request`` has it.

    The first is the turn of its session; the others have none, and each is drawn with the next seed.
    """
    choices = []
    for number, name in enumerate(names):
        own = pb.GenerateRequest()
        own.CopyFrom(request)
        own.request_id = name
        if number:
            own.session_id = ""
            if request.sampling.HasField("seed"):
                own.sampling.seed = (request.sampling.seed + number) % 2**63
        choices.append(own)
    return choices

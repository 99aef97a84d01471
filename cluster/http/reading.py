"""Bodies of requests, read within bounds."""

from functools import partial
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from cluster.front.front import Front
from cluster.front.reading import SHORT_BYTES
from cluster.http.errors import wrong_body
from pyramidserve.errors import InvalidRequestError, RequestCancelledError

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], front: Front, tenant: str, most: int) -> Body:
    """The JSON of a request of at most ``most`` bytes.

    Raises InvalidRequestError, or RequestCancelledError where the client has gone.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise InvalidRequestError(
            f"the content type is {media!r:.40}; send application/json", reason="not_json"
        )
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise InvalidRequestError(
                    f"the body has more than {most} bytes; shorten the request", reason="message_too_large"
                )
    except ClientDisconnect as gone:
        raise RequestCancelledError("the client went before the whole body was there") from gone
    read = partial(kind.model_validate_json, bytes(body))
    try:
        # A long one would keep all streams waiting.
        return read() if len(body) <= SHORT_BYTES else await front.read(tenant, len(body), read)
    except ValidationError as error:
        raise wrong_body(error) from None

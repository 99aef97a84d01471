"""The routes of the HTTP API."""

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from cluster.front.front import Front
from cluster.http.answer import Answer, Call
from cluster.http.asking import (
    Asked,
    asked_in_chat,
    asked_in_completion,
    new_name,
    prompts_of,
)
from cluster.http.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from cluster.http.chat_shape import ChatShape
from cluster.http.choice import Choice
from cluster.http.cluster_shape import cluster_shape
from cluster.http.completion_shape import CompletionShape
from cluster.http.errors import response_of
from cluster.http.page import page_routes
from cluster.http.reading import Body, read_body
from cluster.http.reply import Names, Reply
from cluster.http.response_asking import asked_in_response
from cluster.http.response_bodies import ResponseBody
from cluster.http.responses import ResponseReply
from cluster.http.served import Served
from cluster.http.text import Text
from cluster.http.unsupported import refuse_unsupported
from workers.policies.registry import offered

PACKAGE = "pyramidserve"
SCHEMAS = "#/components/schemas/{model}"
BODIES = (ChatBody, CompletionBody, ResponseBody, TokenizeBody, DetokenizeBody)

Endpoint = Callable[[Request], Awaitable[Response]]


class Api:
    """The endpoints; what they raise is answered in OpenAI's shape."""

    def __init__(self, front: Front, text: Text, served: Served, most_bytes: int) -> None:
        self._front, self._text, self._served, self._most_bytes = front, text, served, most_bytes

    def application(self) -> ASGIApp:
        """All routes, with their description at /openapi.json, and the page for browsers."""
        # FastAPI describes the routes, and does not serve them: what it does at each call is not needed.
        self._description = FastAPI(title="PyramidServe", version=version(PACKAGE))
        routes = list[BaseRoute]()
        for method, path, endpoint, body in (
            ("POST", "/v1/chat/completions", self.chat, ChatBody),
            ("POST", "/v1/completions", self.complete, CompletionBody),
            ("POST", "/v1/responses", self.respond, ResponseBody),
            ("POST", "/tokenize", self.tokenize, TokenizeBody),
            ("POST", "/detokenize", self.detokenize, DetokenizeBody),
            ("GET", "/v1/models", self.models, None),
            ("GET", "/v1/models/{name:path}", self.model, None),
            ("DELETE", "/v1/sessions/{name:path}", self.end_session, None),
            ("GET", "/v1/cluster", self.cluster, None),
            ("GET", "/tokenizer_info", self.tokenizer_info, None),
            ("GET", "/health", self.health, None),
            ("GET", "/-/healthz", self.health, None),
            ("GET", "/version", self.version, None),
            ("GET", "/openapi.json", self.openapi, None),
        ):
            routes.append(Route(path, self._refusing(endpoint), methods=[method]))
            self._description.add_api_route(
                path,
                endpoint,
                methods=[method],
                openapi_extra={"requestBody": _described(body)} if body else None,
                response_class=Response,
                summary=endpoint.__doc__,
                name=endpoint.__name__,
            )
        routes += page_routes()
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_route})

    async def chat(self, request: Request) -> Response:
        """Replies to a conversation."""
        tenant, body = await self._read(request, ChatBody)
        name = body.request_id or new_name("chatcmpl")
        shape = ChatShape(self._text.piece)
        return self._answer(request, tenant, name, body, asked_in_chat(body, name), shape)

    async def complete(self, request: Request) -> Response:
        """Goes on with prompts."""
        tenant, body = await self._read(request, CompletionBody)
        name = body.request_id or new_name("cmpl")
        if body.echo and body.logprobs is not None:
            return await self._score(request, tenant, name, body)
        prompts = prompts_of(body) if body.echo else ()
        echoed = [each if isinstance(each, str) else self._text.decode(each) for each in prompts]
        shape = CompletionShape(self._text.piece, echoed)
        return self._answer(request, tenant, name, body, asked_in_completion(body, name, ()), shape)

    async def _score(self, request: Request, tenant: str, name: str, body: CompletionBody) -> Response:
        """Goes on with prompts whose own log-probabilities are told too."""
        prompts = prompts_of(body)

        def encode() -> list[list[int]]:
            return [self._text.encode(each) for each in prompts]

        ids = await self._front.read(tenant, _size(request), encode)
        asked = asked_in_completion(body, name, ids)
        unscored = [each[: body.score_from or 1] for each in ids]
        echoed = [self._text.decode(each) for each in unscored]
        shape = CompletionShape(self._text.piece, echoed, unscored)
        return self._answer(request, tenant, name, body, asked, shape)

    async def respond(self, request: Request) -> Response:
        """Replies to a conversation, as OpenAI's newer API has it."""
        tenant, body = await self._read(request, ResponseBody)
        name = new_name("resp")
        reply = ResponseReply(Names(name, self._served.name), body, self._text.piece)
        call = Call(request.url.path, tenant, name, body.deadline)
        return Answer(self._front, call, [asked_in_response(body, name)], reply, bool(body.stream))

    async def tokenize(self, request: Request) -> Response:
        """The ids of a text, or of a conversation in the model's template."""
        tenant, body = await self._read(request, TokenizeBody)
        ids = await self._front.read(tenant, _size(request), lambda: self._text.ids_of(body))
        return JSONResponse({"count": len(ids), "max_model_len": self._served.context, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        tenant, body = await self._read(request, DetokenizeBody)
        text = await self._front.read(tenant, _size(request), lambda: self._text.decode(body.tokens))
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """What programs that tokenise by themselves must know."""
        self._identify(request)
        return JSONResponse(self._text.about())

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        self._identify(request)
        return JSONResponse({"object": "list", "data": [self._served.about()]})

    async def model(self, request: Request) -> Response:
        """One model."""
        self._identify(request)
        self._served.check(request.path_params["name"])
        return JSONResponse(self._served.about())

    async def end_session(self, request: Request) -> Response:
        """Forgets a session, and frees what it holds."""
        name = request.path_params["name"]
        turns = self._front.end_session(self._identify(request), name)
        return JSONResponse({"id": name, "object": "session", "deleted": True, "turns": turns})

    async def cluster(self, request: Request) -> Response:
        """What waits and runs, what the pools of all pipelines hold, and which policies there are."""
        self._identify(request)
        more = {"model": self._served.name, "policies": offered()}
        return JSONResponse(cluster_shape(self._front.state()) | more)

    async def health(self, request: Request) -> Response:
        """200 while a pipeline is there, else 503."""
        return Response(status_code=200 if self._front.serving else 503)

    async def version(self, request: Request) -> Response:
        """Of this software."""
        return JSONResponse({"version": version(PACKAGE)})

    async def openapi(self, request: Request) -> Response:
        """This description."""
        self._identify(request)
        _, bodies = models_json_schema([(body, "validation") for body in BODIES], ref_template=SCHEMAS)
        described = self._description.openapi()
        return JSONResponse(described | {"components": {"schemas": bodies["$defs"]}})

    def _refusing(self, endpoint: Endpoint) -> Endpoint:
        async def answered(request: Request) -> Response:
            try:
                return await endpoint(request)
            except Exception as raised:
                # Whose call it is may be what is wrong.
                return response_of(self._front.refusal(raised, request.url.path, {}))

        return answered

    def _identify(self, request: Request) -> str:
        return self._front.identify(request.headers.get("authorization", ""))

    async def _read(self, request: Request, kind: type[Body]) -> tuple[str, Body]:
        tenant = self._identify(request)
        body = await read_body(request, kind, self._front, tenant, self._most_bytes)
        self._served.check(getattr(body, "model", None))
        refuse_unsupported(body)
        return tenant, body

    def _answer(
        self,
        request: Request,
        tenant: str,
        name: str,
        body: ChatBody | CompletionBody,
        asked: list[Asked],
        shape: ChatShape | CompletionShape,
    ) -> Answer:
        choices = [Choice(index, each.prompt, each.given) for index, each in enumerate(asked)]
        options = body.stream_options
        reply = Reply(
            Names(name, self._served.name),
            shape,
            choices,
            with_usage=bool(options and options.include_usage),
            continuously=bool(options and options.continuous_usage_stats),
            layers=self._served.layers if options and options.continuous_kv_tokens else 0,
        )
        call = Call(request.url.path, tenant, name, body.deadline)
        return Answer(self._front, call, asked, reply, bool(body.stream))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path} is no route of this API; /openapi.json has them all"
    told = {"message": message, "type": "invalid_request_error", "param": None, "code": "no_such_route"}
    return JSONResponse({"error": told}, error.status_code, error.headers)


def _described(body: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": SCHEMAS.format(model=body.__name__)}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _size(request: Request) -> int:
    return int(request.headers.get("content-length", "0") or 0)

"""What every wire of a router calls: who asks, whether it can be, and what follows."""

import json
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from cluster.admit.request import ValidatedRequest
from cluster.front.reading import Reading, Result
from cluster.front.refusal import refusal
from cluster.front.tenants import Tenants
from cluster.route.live import Follower
from cluster.route.router import Router
from pyramidserve.errors import PyramidServeError
from pyramidserve.types import ClusterState
from pyramidserve.v1 import inference_pb2 as pb
from pyramidserve.wire import messages_from_chat
from workers.model.transcript import Transcript


class Front:
    """The one way in. All methods are for one event loop; tokenising goes on beside it."""

    def __init__(
        self,
        router: Router,
        validate: Callable[[pb.GenerateRequest, Transcript | None], ValidatedRequest],
        tenants: Tenants,
    ) -> None:
        """``validate`` runs in another thread, as tokenising takes long; see ``Reading``."""
        self._router, self._validate, self._tenants = router, validate, tenants
        self._reading = Reading()

    @property
    def model(self) -> str:
        """The checkpoint that is served."""
        return self._router.model

    @property
    def serving(self) -> bool:
        """Whether a pipeline is attached."""
        return self._router.serving

    def identify(self, authorization: str) -> str:
        """The tenant behind the value of an authorization header. Raises UnauthenticatedError."""
        return self._tenants.identify(authorization)

    async def begin(
        self,
        tenant: str,
        request: pb.GenerateRequest,
        seconds_left: float = math.inf,
        salt: str | None = None,
    ) -> Follower:
        """Validates and queues a request; close the follower in any case.

        Args:
            tenant: who asks, as ``identify`` knows.
            seconds_left: when the client gives up.
            salt: the conversation goes on from the tenant's of this salt in which all of it was said but
                what is new, if there is one; None: a session is what its ``session_id`` says.

        Raises what ``validate`` and ``Router.submit`` raise.
        """
        session_id, owner = _own(tenant, request.session_id), ""
        if salt is not None and not session_id and request.HasField("chat"):
            owner = json.dumps([tenant, salt])
            known = self._router.conversation(owner, messages_from_chat(request.chat))
            session_id = known or _own(tenant, f"~{uuid.uuid4().hex}")
        last = self._router.last_turn(session_id) if session_id else None
        work = partial(self._validate, request, last)
        validated = await self._reading.read(tenant, request.ByteSize(), work)
        validated = replace(validated, session_id=session_id, owner=owner)
        return self._router.submit(validated, tenant, seconds_left)

    async def read(self, tenant: str, size: int, work: Callable[[], Result]) -> Result:
        """What ``work`` makes of ``size`` bytes of a tenant's, in turn with others."""
        return await self._reading.read(tenant, size, work)

    def refusal(self, error: Exception, call: str, ids: Mapping[str, str]) -> PyramidServeError:
        """The error that the caller of ``call`` is told; logs and counts it."""
        told = refusal(error, call, ids)
        self._router.metrics.failed(ids.get("tenant", ""), told.reason)
        return told

    def session_of(self, tenant: str, follower: Follower) -> str:
        """By which name the tenant can end the session that a request is a turn of; "": there is none."""
        return follower.session_id.removeprefix(f"{tenant}/")

    def end_session(self, tenant: str, session_id: str) -> int:
        """Forgets a tenant's session; returns its turns. Raises UnknownSessionError."""
        return self._router.end_session(_own(tenant, session_id))

    def state(self) -> ClusterState:
        """A snapshot of the cluster."""
        return self._router.state()


def _own(tenant: str, session_id: str) -> str:
    """The name of a tenant's session that no other tenant's has."""
    return f"{tenant}/{session_id}" if tenant and session_id else session_id

"""Puts a new deployment in the place of the one that serves, so that no stream is lost.

Serve knows an application by its name, and so do those who deploy files with its own command: a rollout
ends with the new version under the name of the old one. While the names change hands a stand-in of the
new version serves; each router listens on the port before the one before it drains.
"""

from ray.serve.schema import ServeApplicationSchema

from cluster.config import ClusterConfig
from cluster.deploy import deployed
from cluster.deploy.deployment import Deployment, Progress
from cluster.deploy.readiness import await_ready
from cluster.deploy.serving import NODES_SECONDS, joined
from pyramidserve.errors import ConfigurationError
from workers import ray_private
from workers.rendezvous import take_over_key

# At which clients call.
CLIENTS_PORTS = {"router_port", "http_port"}


def stand_in_name(name: str) -> str:
    """Of the application that serves while ``name`` changes hands."""
    return f"{name}-stand-in"


def roll_out(deployment: Deployment, address: str, progress: Progress) -> None:
    """Deploys beside what serves, lets the new router take over its port, then lets the old one drain.

    Streams that the old one does not end within its ``drain_seconds`` go on at the new one, with what
    it serves. Needs room for both at once. When the new one does not come up, or the rollout is
    interrupted before the old one drains, the old one goes on alone; later, the rollout is finished.

    Args:
        deployment: its name must be that of the one that serves, its router must have the same port.
        address: of the Ray cluster; "auto": the only one on this machine.

    Raises ConfigurationError when nothing of that name is served there, or at another port, or the new one
    does not come up.
    """
    with joined(address, progress):
        application = deployed.application_of(deployment)
        name, there = application.name, deployed.look()
        old, stand_in = there.is_ours(name), there.is_ours(stand_in_name(name))
        check_successor(there, name, deployment.config)
        rollout = _Rollout(application, deployment.config, progress)
        if old:
            if stand_in:  # of a rollout that was lost with its machine
                rollout.withdraw()
            rollout.stand_in()
        try:
            rollout.settle()
        except KeyboardInterrupt:
            progress(f"the old {name} has gone already; the rollout is finished first")
            rollout.settle()
            raise


def check_successor(there: deployed.Deployed, name: str, new: ClusterConfig) -> None:
    """Raises ConfigurationError unless one of that name serves where clients would find the new one."""
    old = [each for each in (name, stand_in_name(name)) if there.is_ours(each)]
    if not old:
        others = there.ours()
        served = f"served are {', '.join(others)}" if others else "nothing of ours is served there"
        raise ConfigurationError(
            f"no application of ours is named {name}: {served}; name the one to be replaced in the file, "
            "or use `pyramidserve serve`"
        )
    places = deployed.places(there.configs[old[0]])
    for name in CLIENTS_PORTS & places.keys():
        (host, port), place = places[name], new.places.get(name)
        if place != (host, port):
            would = f"would listen on {place[0]}:{place[1]}" if place else f"would have no {name}"
            raise ConfigurationError(
                f"the new router {would}, and {old[0]} is on {host}:{port}; give the same {name} and "
                "router_host, as clients go on calling there"
            )


class _Rollout:
    """One rollout; each step may be done again after it was interrupted."""

    def __init__(
        self, application: ServeApplicationSchema, config: ClusterConfig, progress: Progress
    ) -> None:
        self._application, self._config, self._progress = application, config, progress
        self._name = application.name
        self._stand_in = application.model_copy(update={"name": stand_in_name(application.name)})
        self._seconds = NODES_SECONDS + config.drain_seconds
        self._old_has_gone = False

    def stand_in(self) -> None:
        """Brings the new version up beside the old one, which drains only if this returns."""
        try:
            self._bring(self._stand_in, f"deploying the new {self._name} beside the old one")
        except BaseException:
            self._progress(f"taking the new {self._name} away again; the old one goes on")
            self.withdraw()
            raise

    def settle(self) -> None:
        """Lets the old version drain and gives the new one its name for good, in the stand-in's place."""
        if not self._old_has_gone:
            self._progress(f"the new {self._name} serves; the old one drains")
            deployed.take_away(self._name)
            deployed.await_gone(self._name, self._seconds)
            self._old_has_gone = True
        try:
            self._bring(self._application, f"giving the new version the name {self._name}")
        except ConfigurationError as error:
            deployed.take_away(self._name)
            raise ConfigurationError(
                f"{error.message}; {self._stand_in.name} serves meanwhile: mend that and roll out again"
            ) from error
        self.withdraw()

    def withdraw(self) -> None:
        """Takes the stand-in away, and ends the taking over."""
        deployed.take_away(self._stand_in.name)
        deployed.await_gone(self._stand_in.name, self._seconds)
        for each in (self._name, self._stand_in.name):
            ray_private.delete(take_over_key(each))

    def _bring(self, application: ServeApplicationSchema, what: str) -> None:
        self._progress(what)
        ray_private.put(take_over_key(application.name), b"1")
        deployed.put(application)
        await_ready(application.name, self._config, NODES_SECONDS)

"""What Flower's server answers under ``/cluster``. What asks Redis runs on Flower's threads, off the event loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from ipaddress import ip_address
from typing import Any

from celery.utils.nodenames import gethostname
from flower.views import BaseHandler
from tornado.ioloop import IOLoop
from tornado.routing import URLSpec
from tornado.web import HTTPError, RequestHandler, StaticFileHandler, authenticated

from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import ClusterError, JobNotFound, NodeNotFound, UnavailableError
from cluster_tasks.flower.sharing import SharedSnapshot
from cluster_tasks.flower.snapshot import Snapshots
from cluster_tasks.model import check_node_id

logger = logging.getLogger(__name__)

STATIC = str(files("cluster_tasks.flower").joinpath("static"))
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'self'"
)
"""No script but Flower's and ours, and no page of others around the buttons."""

NEEDS_LOGIN = (
    "a Flower without a login answers by the address or name of its host only, and %r is neither: give it a login, by "
    "--basic-auth or --auth, or CLUSTER_FLOWER_PASSWORD for that of cluster-tasks up, or say "
    "FLOWER_UNAUTHENTICATED_API=true if a proxy before it asks for one"
)


def page_handlers(cluster: Cluster) -> list[URLSpec]:
    """Return what Flower has to be given for the page of a cluster. Does no I/O."""
    snapshot = SharedSnapshot(Snapshots(cluster).take, cluster.clock)
    shared = {"cluster": cluster, "snapshot": snapshot}
    return [
        URLSpec(r"/cluster", PageHandler, name="cluster"),
        URLSpec(r"/cluster/snapshot", SnapshotHandler, shared),
        URLSpec(r"/cluster/nodes/([^/]+)/(drain|resume)", NodeHandler, shared),
        URLSpec(r"/cluster/quarantine/([^/]+)/(retry|drop)", QuarantineHandler, shared),
        URLSpec(r"/cluster/static/(.*)", OurFileHandler, {"path": STATIC}, name="cluster_static"),
    ]


class PageHandler(BaseHandler):  # type: ignore[misc]  # Flower has no types.
    """The page itself; what it shows it asks for."""

    @authenticated
    def get(self) -> None:
        """Answer with HTML."""
        self.set_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        self.render("cluster.html", read_only=self.application.options.read_only)


class OurFileHandler(StaticFileHandler):
    """Scripts and styles. Browsers ask whether theirs are the latest: parts of two releases do not fit together."""

    def set_extra_headers(self, path: str) -> None:
        """Add what a file is sent with."""
        self.set_header("Cache-Control", "no-cache")
        self.set_header("X-Content-Type-Options", "nosniff")


class _JSONHandler(BaseHandler):  # type: ignore[misc]  # Flower has no types.
    """Answers in JSON, errors too, and sends nobody to a form: a script asks."""

    def initialize(self, cluster: Cluster, snapshot: SharedSnapshot) -> None:
        self.cluster, self.snapshot = cluster, snapshot

    def prepare(self) -> None:
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.set_header("Cache-Control", "no-store")
        if not self.current_user:
            raise HTTPError(403, "log in to Flower first")
        options, name = self.application.options, self.request.host_name
        # Who has told Flower that a proxy asks for the login has told us, too.
        if not (options.basic_auth or options.auth or self.unauthenticated_api or _is_of_this_host(name)):
            raise HTTPError(403, NEEDS_LOGIN, name)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        if status_code == 401:
            # Flower asks the browser for a password.
            super().write_error(status_code, **kwargs)
            return
        _, exc, _ = kwargs.get("exc_info", (None, None, None))
        told = exc.get_message() if isinstance(exc, HTTPError) else ""
        self.finish(json.dumps({"error": told or self._reason}))


class SnapshotHandler(_JSONHandler):
    """How the cluster stands."""

    async def get(self) -> None:
        """Answer with a snapshot, or with 503 if Redis does not answer."""
        answer = await self.snapshot.get()
        self.set_status(answer.status)
        self.set_header("Vary", "Accept-Encoding")
        if "gzip" in self.request.headers.get("Accept-Encoding", ""):
            self.set_header("Content-Encoding", "gzip")
            self.finish(answer.compressed)
        else:
            self.finish(answer.body)

    def compute_etag(self) -> None:
        """Each is another: to hash it is of no use."""


class _ActionHandler(_JSONHandler):
    """Does something, for whoever is logged in, asked by our page and nobody else's."""

    def prepare(self) -> None:
        super().prepare()
        if self.application.options.read_only:
            raise HTTPError(403, "Flower is in read-only mode")

    def check_xsrf_cookie(self) -> None:
        super().check_xsrf_cookie()
        # Flower does without the token where it has no login, or one that browsers send by themselves.
        RequestHandler.check_xsrf_cookie(self)

    async def _do(self, words: str, action: Callable[[], Any]) -> None:
        """Run an action and tell of its end, or why it was refused."""
        try:
            told = await IOLoop.current().run_in_executor(None, action)
        except ClusterError as exc:
            raise HTTPError(_status(exc), "%s", exc) from exc
        finally:
            self.snapshot.expire()
        who = self.current_user if isinstance(self.current_user, str) else "a user"
        logger.warning("%s at %s has asked for it: %s", who, self.request.remote_ip, words)
        self.finish(json.dumps(told))


class NodeHandler(_ActionHandler):
    """Drains a node, and resumes it."""

    async def post(self, node_id: str, verb: str) -> None:
        """Answer when it is done; what a drained node runs goes on."""
        try:
            check_node_id(node_id)
        except ValueError as exc:
            raise HTTPError(400, "%s", exc) from None
        await self._do(f"{verb} {node_id}", lambda: self._drain(node_id) if verb == "drain" else self._resume(node_id))

    def _drain(self, node_id: str) -> dict[str, Any]:
        self.cluster.refuse_coordinator(node_id)
        return {"node": node_id, "handed_over": self.cluster.drain(node_id).listed}

    def _resume(self, node_id: str) -> dict[str, Any]:
        self.cluster.refuse_coordinator(node_id)
        self.cluster.resume(node_id)
        return {"node": node_id}


class QuarantineHandler(_ActionHandler):
    """Sends a job of the quarantine again, or forgets it."""

    async def post(self, job_id: str, verb: str) -> None:
        """Answer when it is done, with the id of the new job if there is one."""
        await self._do(f"{verb} {job_id}", lambda: self._retry(job_id) if verb == "retry" else self._drop(job_id))

    def _retry(self, job_id: str) -> dict[str, Any]:
        return {"job": job_id, "sent_as": self.cluster.quarantine.retry(job_id)}

    def _drop(self, job_id: str) -> dict[str, Any]:
        self.cluster.quarantine.drop(job_id)
        return {"job": job_id}


def _is_of_this_host(name: str) -> bool:
    """Whether a name in an address is none that a page of others can have: who owns a domain may lead it here."""
    with suppress(ValueError):
        ip_address(name.strip("[]"))
        return True
    own = gethostname().lower()
    return name in ("localhost", own, own.partition(".")[0])


def _status(exc: ClusterError) -> int:
    if isinstance(exc, NodeNotFound | JobNotFound):
        return 404
    return 503 if isinstance(exc, UnavailableError) else 409

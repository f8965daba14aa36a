"""The cluster's API as services ask it: JSON in and out, every request bounded, every refusal named. Blocking: for threads.

The only module that knows the kubernetes package, of which it uses the way in: certificates, tokens that change, the connection pool.
"""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import urllib3

from services.chassis.listwatch import Event, Expired, Freshness, Kind, Pace, Unreachable, follow

__all__ = ["Api", "Body", "Feed", "NoCluster", "Refused", "connect"]

log = logging.getLogger(__name__)

Body = dict[str, Any]
Query = Sequence[tuple[str, str]]

CONNECT_S, ANSWER_S = 3.0, 10.0
WATCH_S = 50  # the server ends a watch then; a list follows (R10)
SILENCE_S = 53.0  # of a watch whose other end is gone
CHUNK = 65_536
SAID = 300  # characters of a refusal that are kept
AWAY = frozenset({408, 429, 500, 502, 503, 504})


class NoCluster(ValueError):
    """No cluster to ask: not inside one, and no kubeconfig that works."""


def connect(why: str = "a cluster is needed") -> Any:
    """A kubernetes.client.ApiClient of the cluster this process runs in, else of the one KUBECONFIG names.

    Args:
        why: what a cluster is needed for, to begin the sentence of the error.

    Raises:
        NoCluster: there is neither.
    """
    from kubernetes import client, config  # half a second, and only for those who have a cluster

    settings = client.Configuration()
    try:
        try:
            config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        except config.ConfigException:
            # Named here: the package reads the variable once, when it is first imported.
            config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError) as error:
        raise NoCluster(f"{why}, but there is no cluster to ask: {error}") from error
    settings.retries = 0  # its own would hide an outage, and hammer (R10)
    settings.connection_pool_maxsize = 16
    return client.ApiClient(settings)


class Refused(Exception):
    """The API server understood and said no."""

    def __init__(self, status: int, says: str) -> None:
        """`says`: for an operator."""
        super().__init__(f"HTTP {status}: {says}"[:SAID])
        self.status = status


@dataclass(eq=False)
class Api:
    """One API server. `client` is a kubernetes.client.ApiClient whose retries are off. Safe from several threads."""

    client: Any
    pace: Pace = field(default_factory=Pace)

    def ask(self, method: str, path: str, body: Body | None = None, query: Query = (), *, kind: str = "application/json") -> Body:
        """Send a command.

        Raises:
            Refused: for good, with its status.
            Unreachable: no answer, or not now; it may have been done all the same. Through an outage one command a second is tried.
        """
        if not self.pace.go():
            raise Unreachable("the cluster's API does not answer")
        try:
            with self.open(method, path, query, body, ANSWER_S, kind) as response:
                found: Body = json.loads(response.data)
        except Refused:
            self.pace.answered()
            raise
        except Unreachable as error:
            self.pace.failed(error.retry_after_s)
            raise
        self.pace.answered()
        return found

    def find(self, path: str) -> Body | None:
        """An object, or None where there is none."""
        try:
            return self.ask("GET", path)
        except Refused as error:
            if error.status == 404:
                return None
            raise

    def apply(self, path: str, body: Body, manager: str) -> Body:
        """Server-side apply without force: twice the same changes nothing, and another's field is a 409."""
        query = (("fieldManager", manager), ("force", "false"))
        return self.ask("PATCH", path, body, query, kind="application/apply-patch+yaml")

    def delete(self, path: str, uid: str, propagation: str) -> None:
        """Delete this very object; one that is gone, or another by now, is as good."""
        body = {"propagationPolicy": propagation, "preconditions": {"uid": uid}}
        try:
            self.ask("DELETE", path, body)
        except Refused as error:
            if error.status not in (404, 409):
                raise

    @contextlib.contextmanager
    def open(self, method: str, path: str, query: Query, body: Body | None, answer_s: float, kind: str) -> Iterator[Any]:
        """One response, closed afterwards. Raises as `ask` does, and Expired."""
        where = f"{path}?{urlencode(query)}" if query else path
        headers = {"Accept": "application/json"} | ({"Content-Type": kind} if body is not None else {})
        method, url, headers, *_ = self.client.param_serialize(method, where, header_params=headers, auth_settings=["BearerToken"])
        text = None if body is None else json.dumps(body)
        if kind == "application/json":
            text = body  # type: ignore[assignment]  # the client writes this kind itself
        try:
            response = self.client.call_api(method, url, headers, text, _request_timeout=(CONNECT_S, answer_s)).response
            try:
                if response.status >= 400:
                    raise _error(response.status, response.data.decode(errors="replace"), response.headers.get("Retry-After"))
                yield response
            finally:
                response.close()
        except (urllib3.exceptions.HTTPError, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}"[:SAID]) from error

    def close(self) -> None:
        """Close the connections."""
        self.client.rest_client.pool_manager.clear()


@dataclass(eq=False)
class Feed:
    """The objects of one kind in one namespace that a label may mark, followed on a thread. `view` is a snapshot."""

    api: Api
    path: str  # of the collection
    selector: str = ""
    changed: Callable[[], None] = lambda: None  # called on the thread with each new view in place
    fresh: Freshness = field(default_factory=Freshness)
    view: Mapping[str, Body] = field(default_factory=dict)  # by uid
    listed: bool = False  # whether there is a view at all
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _open: Any = None  # the response that a watch reads

    def start(self) -> None:
        """Follow until `stop`."""
        # A daemon: a read that waits for a silent server must not hold up the exit.
        self._thread = threading.Thread(target=self._run, name=f"watch {self.what}", daemon=True)
        self._thread.start()

    def stop(self, within_s: float = 0.0) -> bool:
        """End, a watch that waits included, waiting for it `within_s`; whether it has ended. Safe to repeat."""
        self._stopped.set()
        if (response := self._open) is not None:
            with contextlib.suppress(ValueError, RuntimeError, OSError, AttributeError):  # it ended meanwhile
                response.shutdown()
        if self._thread is None:
            return True
        self._thread.join(within_s)
        return not self._thread.is_alive()

    @property
    def what(self) -> str:
        """For an operator."""
        *_, namespace, kind = self.path.split("/")
        return f"{kind} in {namespace}"

    def _run(self) -> None:
        follow(
            self._list,
            self._watch,
            self._seen,
            stopped=self._stopped,
            heard=self._heard,
            failed=self._failed,
            pace=self.api.pace,
        )

    def _seen(self, view: Mapping[str, Body]) -> None:
        self.view, self.listed = dict(view), True
        self.changed()

    def _heard(self) -> None:
        if self.fresh.trouble:
            log.info("%s can be read again", self.what)
        self.fresh.heard()

    def _failed(self, error: Exception) -> None:
        if self._stopped.is_set():
            return  # we cut it off ourselves
        if str(error) != self.fresh.trouble:
            log.warning("%s cannot be read: %s; what was last seen stays", self.what, error)
        self.fresh.failed(error)

    @property
    def _marked(self) -> Query:
        return (("labelSelector", self.selector),) if self.selector else ()

    def _list(self) -> tuple[dict[str, Body], str]:
        with _told(), self.api.open("GET", self.path, self._marked, None, ANSWER_S, "") as response:
            found = json.loads(response.data)
        return {each["metadata"]["uid"]: each for each in found.get("items") or ()}, found["metadata"]["resourceVersion"]

    def _watch(self, version: str) -> Iterator[Event[Body]]:
        query = (
            *self._marked, ("watch", "true"), ("resourceVersion", version), ("allowWatchBookmarks", "true"),
            ("timeoutSeconds", str(WATCH_S)),
        )  # fmt: skip
        with _told(), self.api.open("GET", self.path, query, None, SILENCE_S, "") as response:
            self._open = response
            try:
                for line in _lines(response):
                    told, thing = (event := json.loads(line))["type"], event["object"]
                    if told == "ERROR":
                        raise _error(int(thing.get("code") or 500), str(thing.get("message") or ""), None)
                    metadata = thing["metadata"]
                    yield Event(Kind(told), metadata.get("uid", ""), thing, metadata.get("resourceVersion", ""))
            finally:
                self._open = None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """To one who follows, a refusal is an outage: rights may be given back. So is what no cluster would say."""
    try:
        yield
    except Refused as error:
        raise Unreachable(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise Unreachable(f"not an answer of a cluster: {type(error).__name__}") from error


def _lines(response: Any) -> Iterator[bytes]:
    rest = b""
    for chunk in response.stream(CHUNK, decode_content=False):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line.strip())


def _error(status: int, said: str, retry_after: str | None) -> Exception:
    with contextlib.suppress(ValueError, AttributeError):
        said = str(json.loads(said).get("message") or said)
    if status == 410:
        return Expired(said[:SAID])
    if status in AWAY:
        return Unreachable(f"HTTP {status}: {said}"[:SAID], float(retry_after) if retry_after and retry_after.isdigit() else None)
    return Refused(status, said)

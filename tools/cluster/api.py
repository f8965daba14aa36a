"""As much of a Kubernetes client as the harness needs: JSON over one kept connection a thread, and watches. Nothing to install."""

import base64
import contextlib
import http.client
import json
import ssl
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

TIMEOUT_SECONDS = 10.0
WATCH_SECONDS = 60  # then list again: a lost event costs one round

Body = dict[str, Any]


class ApiFailed(RuntimeError):
    """The server said no; `status` is its HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:500]}")
        self.status = status


class Api:
    """Calls with the rights of one kubeconfig that we wrote ourselves.

    Args:
        keep: one connection a thread stays open between calls, until the process ends.
    """

    def __init__(self, kubeconfig: Path, keep: bool = False) -> None:
        self._keep = keep
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        server = urlsplit(cluster["server"])
        self._host, self._port = server.hostname or "", server.port or 443
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=authority)
        with tempfile.NamedTemporaryFile() as pair:  # ssl reads a client's certificate from files only
            pair.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
            pair.flush()
            self._tls.load_cert_chain(pair.name)
        self._kept = threading.local()

    def get(self, path: str) -> Body:
        """One object or list."""
        return self._json("GET", path)

    def create(self, path: str, body: Body) -> Body:
        """A new object in the collection `path`."""
        return self._json("POST", path, body)

    def merge(self, path: str, body: Body) -> Body:
        """A merge patch of one object, or of its status."""
        return self._json("PATCH", path, body, "application/merge-patch+json")

    def delete(self, path: str, body: Body | None = None) -> Body:
        """Delete one object."""
        return self._json("DELETE", path, body or {})

    def ready(self) -> bool:
        """Whether the server answers and says that it is ready."""
        try:
            self._call("GET", "/readyz", None, "")
        except (OSError, http.client.HTTPException, ApiFailed):
            return False
        return True

    def follow(self, path: str) -> Iterator[tuple[str, Body]]:
        """List, then watch for at most `WATCH_SECONDS`: (ADDED, MODIFIED or DELETED, object).

        Raises:
            ApiFailed, OSError, http.client.HTTPException: list again after any of them.
        """
        listed = self.get(path)
        for item in listed["items"]:
            yield "ADDED", item
        query = urlencode({"watch": 1, "resourceVersion": listed["metadata"]["resourceVersion"], "timeoutSeconds": WATCH_SECONDS})
        connection = self._connect(WATCH_SECONDS + TIMEOUT_SECONDS)
        try:
            connection.request("GET", f"{path}?{query}")
            response = connection.getresponse()
            if response.status != 200:
                raise ApiFailed(response.status, response.read().decode(errors="replace"))
            while line := response.readline():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiFailed(event["object"].get("code", 0), json.dumps(event["object"]))
                yield event["type"], event["object"]
        finally:
            connection.close()

    def _json(self, method: str, path: str, body: Body | None = None, content: str = "application/json") -> Body:
        answer: Body = json.loads(self._call(method, path, body, content))
        return answer

    def _call(self, method: str, path: str, body: Body | None, content: str) -> str:
        payload = None if body is None else json.dumps(body)
        headers = {"Content-Type": content} if content else {}
        kept: http.client.HTTPSConnection | None = getattr(self._kept, "connection", None)
        if kept:
            # The server may have closed it meanwhile, which is no failure: a fresh one's word counts.
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self._spoken(kept, method, path, payload, headers)
            kept.close()
            self._kept.connection = None
        fresh = self._connect(TIMEOUT_SECONDS)
        try:
            said = self._spoken(fresh, method, path, payload, headers)
            if self._keep:
                self._kept.connection = fresh
            return said
        finally:
            if not self._keep:
                fresh.close()

    def _spoken(self, connection: http.client.HTTPSConnection, method: str, path: str, payload: str | None, headers: dict[str, str]) -> str:
        connection.request(method, path, payload, headers)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
        if response.status >= 300:
            raise ApiFailed(response.status, text)
        return text

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._tls)

"""A server on the loopback interface that answers what W&B's client asks while it logs, syncs and saves a report. It keeps what came."""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Loopback:
    """Runs by id, artifacts, reports and every operation that was asked, in order."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.views: dict[str, dict[str, Any]] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.other: list[str] = []
        self.streamed: list[dict[str, Any]] = []
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self._answer({})

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._answer({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if "graphql" not in self.path and "file_stream" not in self.path:
                    loopback.other.append(self.path)
                    self._answer({})
                    return
                if "file_stream" in self.path:
                    loopback.streamed.append(json.loads(body))
                    self._answer({})
                    return
                request = json.loads(body)
                found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
                name = found.group(1) if found else request["query"][:60]
                loopback.operations.append(name)
                self._answer({"data": loopback.answer(name, request["query"], request.get("variables") or {})})

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, name: str, query: str, variables: dict[str, Any]) -> Any:
        """What the service would say to an operation."""
        entity = {"id": "e", "name": "someone"}
        project = {
            "id": base64.b64encode(b"Project:v1:p:someone").decode(),
            "name": "p",
            "entity": entity,
            "internalId": "1",
        }
        if name == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], {})
            inserted = not run
            run.update({key: value for key, value in variables.items() if value is not None})
            bucket = {
                "id": f"id-{variables['name']}", "name": variables["name"], "displayName": variables.get("displayName"),
                "description": "", "config": variables.get("config") or "{}", "sweepName": None, "historyLineCount": 0,
                "project": project,
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if name in ("Viewer", "GetViewer"):
            return {
                "viewer": {
                    "id": "u", "entity": "someone", "username": "someone", "flags": "{}", "admin": False, "email": "", "name": "someone",
                    "teams": {"edges": []}, "deletedAt": None, "apiKeys": {"edges": []},
                }
            }  # fmt: skip
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if name == "ArtifactType":
            return {"project": {"artifact": None}}
        if name == "CreateArtifact":
            self.artifacts.append(variables.get("input", variables))
            artifact = {
                "id": f"a{len(self.artifacts)}", "digest": "d", "state": "COMMITTED", "aliases": [],
                "artifactSequence": {"id": "s", "latestArtifact": None, "name": "n"},
            }  # fmt: skip
            return {"createArtifact": {"artifact": artifact}}
        if name == "upsertView" or "upsertView" in query:
            given, day = variables, "2026-01-01T00:00:00Z"
            self.views[str(given.get("id") or given.get("name"))] = given
            view = {
                "id": "view1", "type": given.get("type"), "name": given.get("name"), "displayName": given.get("displayName"),
                "description": given.get("description"), "spec": given.get("spec"), "updatedAt": day, "createdAt": day,
                "project": project, "user": None,
            }  # fmt: skip
            return {"upsertView": {"view": view, "inserted": True}}
        if "models" in query or name == "GetProjects":
            edges = [
                {
                    "node": {**project, "entityName": "someone", "createdAt": "", "isBenchmark": False, "user": None},
                    "cursor": "",
                }
            ]
            return {"models": {"edges": edges, "pageInfo": {"endCursor": "", "hasNextPage": False}}}
        if "project" in query.lower() and name.startswith(("Project", "Get")):
            return {"project": {**project, "run": None}}
        if name in ("ServerInfo", "ServerFeatures", "ServerFeaturesQuery"):
            return {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}
        if name == "RunResumeStatus":
            run = self.runs.get(variables.get("name", ""))
            if not run:
                return {"model": {**project, "bucket": None}}
            bucket = {
                "id": f"id-{variables['name']}", "name": variables["name"], "summaryMetrics": "{}", "displayName": run.get("displayName"),
                "logLineCount": 0, "historyLineCount": 0, "eventsLineCount": 0, "historyTail": "[]", "eventsTail": "[]",
                "config": run.get("config") or "{}", "tags": run.get("tags") or [], "wandbConfig": '{"t": 1}',
            }  # fmt: skip
            return {"model": {**project, "bucket": bucket}}
        self.unknown.append(name)
        return {}

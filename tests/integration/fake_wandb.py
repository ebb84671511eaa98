"""A local imitation of what of the W&B server's GraphQL API `vgr-compare` asks for; it keeps the reports sent to it."""

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER = {"id": "u", "entity": "team", "username": "me", "name": "Me", "email": "me@b", "admin": False, "flags": "{}",
        "deletedAt": None, "teams": {"edges": []}, "apiKeys": {"edges": []}}  # fmt: skip


def node(run):
    """A run as the server tells it: id, name, group, config and rows of its history."""
    return {
        "projectId": "1", "id": run["id"], "name": run["id"], "displayName": run["name"], "group": run["group"],
        "jobType": run.get("job", "train"), "config": json.dumps({k: {"value": v} for k, v in run["config"].items()}),
        "tags": [], "sweepName": None, "state": "finished", "commit": None, "readOnly": False, "description": "",
        "createdAt": "2026-01-01T00:00:00Z", "heartbeatAt": "2026-01-01T00:00:00Z", "notes": "",
        "historyLineCount": len(run["rows"]), "user": {"name": "Me", "username": "me"}, "summaryMetrics": "{}",
        "systemMetrics": "{}", "historyKeys": {"lastStep": len(run["rows"]) - 1, "sets": [], "keys": {}},
        "parquetHistory": {"liveData": [], "parquetUrls": []},
    }  # fmt: skip


def answer(operation, variables, runs, reports):
    if operation == "upsertView":
        reports.append(variables)
        project = {"id": "P", "name": variables["projectName"], "entityName": variables["entityName"]}
        view = {"id": "VmlldzoxMjM=", "type": "runs", "name": variables["name"], "project": project,
                "displayName": variables["displayName"], "description": "", "spec": variables["spec"],
                "updatedAt": "2026-01-01T00:00:00Z"}  # fmt: skip
        return {"upsertView": {"view": view, "inserted": True}}
    chosen = runs
    if operation == "Runs":
        asked = json.loads(variables["filters"])
        chosen = [run for run in runs if asked.get("group", run["group"]) == run["group"]]
    edges = [{"node": node(run), "cursor": str(i)} for i, run in enumerate(chosen)]
    project = {"id": "P", "internalId": "1", "name": "vgr", "entityName": "team", "runCount": len(edges),
               "readOnly": False, "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": USER,
               "runs": {"edges": edges, "pageInfo": {"endCursor": "", "hasNextPage": False}}}  # fmt: skip
    named = next((run for run in runs if run["id"] in (variables.get("name"), variables.get("run"))), None)
    named = named or next((run for run in runs if run["id"] == variables.get("runName")), None)
    if named is not None:
        first, last = variables.get("minStep", 0), variables.get("maxStep", len(named["rows"]))
        rows = [json.dumps({**row, "_step": i}) for i, row in enumerate(named["rows"]) if first <= i < last]
        project["run"] = {**node(named), "history": rows}
    projects = {"edges": [{"node": {k: v for k, v in project.items() if k != "runs"}, "cursor": "0"}],
                "pageInfo": {"endCursor": "", "hasNextPage": False}}  # fmt: skip
    server = {"features": [], "cliVersionInfo": {"max_cli_version": "9"}, "latestLocalVersionInfo": None}
    return {"viewer": USER, "project": project, "models": projects, "serverInfo": server}


@contextlib.contextmanager
def serving(runs, reports=None, asked=None):
    """Its address while the block runs. runs: of `node`; reports: a list that what is published comes into."""
    reports, asked = [] if reports is None else reports, [] if asked is None else asked

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not self.path.endswith("/graphql"):  # what the client says of itself
                self.do_GET()
                return
            told = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", told["query"])[1]
            asked.append(operation)
            data = json.dumps({"data": answer(operation, told.get("variables") or {}, runs, reports)}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.send_response(404)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

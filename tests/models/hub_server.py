"""A hub of one's own: what the real client of ``huggingface_hub`` asks for when it uploads a folder and fetches a snapshot."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by name: commits, each with its files, the newest last."""

    def __init__(self):
        self.repositories, self.asked = {}, []

    def files(self, name, revision="main"):
        commits = self.repositories[name]
        return commits[-1] if revision == "main" else next(files for files in commits if commit_of(files) == revision)

    def commit(self, name, lines):
        files = dict(self.repositories[name][-1])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                files.pop(line["value"]["path"])
        self.repositories[name].append(files)
        return commit_of(files)


def commit_of(files):
    """The name of a commit: what is in it."""
    told = json.dumps({name: hashlib.sha1(content).hexdigest() for name, content in sorted(files.items())})
    return hashlib.sha1(told.encode()).hexdigest()


def handler_of(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, code, body=b"", headers=()):
            body = json.dumps(body).encode() if not isinstance(body, bytes) else body
            self.send_response(code)
            for name, value in {"Content-Length": len(body), **dict(headers)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self):
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

        def do_GET(self):
            hub.asked.append(f"{self.command} {self.path}")
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "models"]:
                self.tell("/".join(parts[2:4]), parts[4:])
            else:
                self.send_file("/".join(parts[:2]), *parts[3:])

        do_HEAD = do_GET

        def tell(self, name, rest):
            if name not in hub.repositories:
                return self.missing()
            revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
            try:
                files = hub.files(name, revision)
            except StopIteration:
                return self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            if rest[:1] == ["tree"]:
                entries = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in sorted(files)]
                return self.answer(200, entries)
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self.answer(200, {"id": name, "sha": commit_of(files), "siblings": siblings, "private": False})

        def send_file(self, name, revision, path):
            files = hub.files(name, revision)
            etag = hashlib.sha1(files[path]).hexdigest()
            self.answer(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(files)})

        def do_POST(self):
            hub.asked.append(f"{self.command} {self.path}")
            content = self.rfile.read(int(self.headers["Content-Length"]))
            parts = urlsplit(self.path).path.strip("/").split("/")
            name = "/".join(parts[2:4])
            if parts == ["api", "repos", "create"]:
                fields = json.loads(content)
                name = f"{fields.get('organization') or 'me'}/{fields['name']}"
                hub.repositories.setdefault(name, [{}])
                return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name})
            if parts[4:5] == ["preupload"]:
                paths = [file["path"] for file in json.loads(content)["files"]]
                return self.answer(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
            if parts[4:5] == ["commit"]:
                commit = hub.commit(name, [json.loads(line) for line in content.splitlines()])
                url = f"http://{self.headers['Host']}/{name}/commit/{commit}"
                return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
            return self.answer(404, {"error": f"nothing is known of {self.path}"})

    return Handler


@contextmanager
def serving(hub):
    """The hub's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

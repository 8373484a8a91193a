"""A stand-in for Google Cloud Storage on this machine, and a client for it in the place of gcsfs.

It speaks as much of the service's JSON interface as TensorStore asks for, and is an object store: no folders, no
renaming, no appending. It cannot show how the service itself behaves under load.
"""

import contextlib
import http.server
import io
import itertools
import json
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import fsspec
from etils.epath import backend


class Store(http.server.ThreadingHTTPServer):
    """The service: objects by name, each with a generation that every write raises."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("localhost", 0), Requests)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.lock = threading.Lock()
        self.generations = itertools.count(1)
        self.refused_agent = "nobody"
        """Requests from a program with this in its name are refused."""
        self.url = f"http://localhost:{self.server_port}"

    def names(self, prefix: str) -> list[str]:
        """Return the names of the objects with a prefix, in the order in which they were written."""
        with self.lock:
            found = [(generation, name) for name, (generation, _) in self.objects.items() if name.startswith(prefix)]
        return [name for _, name in sorted(found)]

    def content(self, name: str) -> bytes:
        return self.objects[name][1]

    def put(self, name: str, content: bytes) -> None:
        self.objects[name] = next(self.generations), content


class Requests(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one packet: its parts would wait for each other
    disable_nagle_algorithm = True
    server: Store

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, content: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def describe(self, name: str) -> dict[str, str]:
        generation, content = self.server.objects[name]
        return {"name": name, "size": str(len(content)), "generation": str(generation)}

    def handle_object(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(address.path.partition("/o/")[2])
        query = dict(urllib.parse.parse_qsl(address.query))
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refused_agent in self.headers["User-Agent"]:
            self.answer(403)
            return
        with self.server.lock:
            if self.command == "POST":
                self.write(query["name"], query, content)
            elif self.command == "GET" and not name:
                self.list_objects(query)
            elif name not in self.server.objects:
                self.answer(404)
            elif self.command == "DELETE":
                del self.server.objects[name]
                self.answer(200)
            elif query.get("alt") == "media":
                self.read(name, query)
            else:
                self.answer(200, json.dumps(self.describe(name)).encode())

    do_GET = do_POST = do_DELETE = handle_object

    def write(self, name: str, query: dict[str, str], content: bytes) -> None:
        present = str(self.server.objects.get(name, (0, b""))[0])
        if query.get("ifGenerationMatch", present) != present:
            self.answer(412)
            return
        self.server.put(name, content)
        self.answer(200, json.dumps(self.describe(name)).encode())

    def list_objects(self, query: dict[str, str]) -> None:
        first, end = query.get("startOffset", ""), query.get("endOffset", chr(0x10FFFF))
        prefix = query.get("prefix", "")
        names = [name for name in sorted(self.server.objects) if first <= name < end and name.startswith(prefix)]
        self.answer(200, json.dumps({"items": [self.describe(name) for name in names]}).encode())

    def read(self, name: str, query: dict[str, str]) -> None:
        generation, content = self.server.objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            self.answer(304, b"", x_goog_generation=str(generation))
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            self.answer(200, content, x_goog_generation=str(generation))
            return
        first, size = int(part[1]), len(content)
        last = min(int(part[2] or size), size - 1)
        self.answer(
            206,
            content[first : last + 1],
            x_goog_generation=str(generation),
            Content_Range=f"bytes {first}-{last}/{size}",
        )


class Client(fsspec.AbstractFileSystem):
    """A client of the stand-in, as gcsfs is one of the service."""

    protocol = ("gcs", "gs")
    cachable = False

    def request(self, method: str, path: str, content: bytes | None = None) -> bytes:
        request = urllib.request.Request(os.environ["TENSORSTORE_GCS_HTTP_URL"] + path, content, method=method)
        try:
            with urllib.request.urlopen(request) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            error.close()
            raise {404: FileNotFoundError, 403: PermissionError}[error.code](path) from None

    def address(self, path: str) -> str:
        bucket, _, name = self._strip_protocol(path).partition("/")
        return f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        bucket, _, name = path.partition("/")
        prefix = urllib.parse.quote(f"{name}/" if name else "")
        items = json.loads(self.request("GET", f"/storage/v1/b/{bucket}/o?prefix={prefix}"))["items"]
        below = [item["name"].removeprefix(f"{name}/") for item in items]
        sizes = {f"{path}/{rest}": int(item["size"]) for rest, item in zip(below, items, strict=True)}
        entries = {
            full: {"name": full, "type": "file" if full in sizes else "directory", "size": sizes.get(full, 0)}
            for full in sorted({f"{path}/{rest.split('/')[0]}" for rest in below})
        }
        if not entries:
            entries = {path: self.info_of_object(path)}
        return list(entries.values()) if detail else list(entries)

    def info_of_object(self, path: str) -> dict[str, Any]:
        item = json.loads(self.request("GET", self.address(path)))
        return {"name": self._strip_protocol(path), "type": "file", "size": int(item["size"])}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        try:
            return self.info_of_object(path)
        except FileNotFoundError:
            self.ls(path)
            return {"name": self._strip_protocol(path), "type": "directory", "size": 0}

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        if mode == "rb":
            return io.BytesIO(self.request("GET", f"{self.address(path)}?alt=media"))
        assert mode == "wb", "objects cannot be appended to"
        return Upload(self, path)

    def upload(self, path: str, content: bytes) -> None:
        bucket, _, name = self._strip_protocol(path).partition("/")
        name = urllib.parse.quote(name, safe="")
        self.request("POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}", content)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        if not self.isdir(path1):
            self.upload(path2, self.request("GET", f"{self.address(path1)}?alt=media"))

    def _rm(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # a folder ends with its last object
            self.request("DELETE", self.address(path))

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        pass  # an object store has no folders to make

    makedirs = mkdir


class Upload(io.BytesIO):
    """A file that becomes an object when it is closed."""

    def __init__(self, client: Client, path: str) -> None:
        super().__init__()
        self._client, self._path = client, path

    def close(self) -> None:
        if not self.closed:
            self._client.upload(self._path, self.getvalue())
        super().close()


def use_stand_in() -> None:
    """Make fsspec and etils take `Client` for gs:// addresses."""
    for name in Client.protocol:
        fsspec.register_implementation(name, Client, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()

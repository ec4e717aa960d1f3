"""Requests whose target names a server, as those to a proxy do: `GET http://name:port/path`.

The request is then for that name, and the header Host is to be ignored (RFC 9112, 3.2.2). uvicorn keeps only the path
of such a target, so that checks of Host would see a meaningless value.
"""

from urllib.parse import urlsplit

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Targeted(HttpToolsProtocol):
    """uvicorn's connection, with the target's name as Host."""

    def on_headers_complete(self) -> None:
        if not self.url.startswith(b"/"):
            named = urlsplit(self.url).netloc.rpartition(b"@")[2]
            hosts = [header for header in self.headers if header[0] == b"host"]
            if named and len(hosts) == 1:  # several are left for `gateway.origins` to refuse
                self.headers.remove(hosts[0])
                self.headers.append((b"host", named))
        super().on_headers_complete()

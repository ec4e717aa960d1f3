"""Requests whose target names a server, as those to a proxy do: `GET http://name:port/path`.

That name is then whom the request is for, and the header Host, whatever it says, is not (RFC 9112, 3.2.2). uvicorn
keeps the path of such a target only, so that whoever looks at Host would look at something that means nothing.
"""

from urllib.parse import urlsplit

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Targeted(HttpToolsProtocol):
    """uvicorn's connection, in which Host is always whom the request is for."""

    def on_headers_complete(self) -> None:
        if not self.url.startswith(b"/"):
            named = urlsplit(self.url).netloc.rpartition(b"@")[2]
            hosts = [header for header in self.headers if header[0] == b"host"]
            if named and len(hosts) == 1:  # several are for whoever looks at them to refuse
                self.headers.remove(hosts[0])
                self.headers.append((b"host", named))
        super().on_headers_complete()

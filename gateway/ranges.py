"""A file's bytes over HTTP: whole, or the requested range (RFC 9110, section 14), in chunks."""

import base64
import re
from email.utils import formatdate
from typing import Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from knapper.exchange import ListedObject, Opened

_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Unsatisfiable(Exception):
    """The range begins past the end."""


def range_of(header: str | None, size: int) -> tuple[int, int] | None:
    """The requested range as (begin, end), `end` excluded; None for the whole file: without a header, or with one that
    may be ignored, such as several ranges or other units. Raises Unsatisfiable."""
    match = _RANGE.fullmatch(header.replace(" ", "")) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        begin, end = max(0, size - int(last)), size
    else:
        begin, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return None
    if begin >= size or begin >= end:
        raise Unsatisfiable
    return begin, end


def respond(request: Request, opened: Opened, filename: str) -> Response:
    """200, 206, 304 or 416. `filename`: the name in Content-Disposition. Reads the file in chunks, then closes it."""
    entry = opened.entry
    headers = _headers(entry, filename)
    sent, tag = request.headers, headers["ETag"]
    if tag in [etag.strip() for etag in sent.get("if-none-match", "").split(",")]:
        opened.close()
        return Response(status_code=304, headers=headers)
    unchanged = sent.get("if-range", tag) == tag  # else the file was replaced, and the client wants all of it
    try:
        requested = range_of(sent.get("range") if unchanged else None, entry.size)
    except Unsatisfiable:
        opened.close()
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{entry.size}"})
    begin, end = requested or (0, entry.size)
    headers["Content-Length"] = str(end - begin)
    if requested is not None:
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{entry.size}"
    status = 200 if requested is None else 206
    if request.method == "HEAD":
        opened.close()
        return Response(status_code=status, headers=headers)
    return StreamingResponse(opened.read(begin, end), status_code=status, headers=headers)


def _headers(entry: ListedObject, filename: str) -> dict[str, str]:
    digest = {}
    if entry.sha256:
        whole = base64.b64encode(bytes.fromhex(entry.sha256)).decode()
        digest["Repr-Digest"] = f"sha-256=:{whole}:"  # RFC 9530: of the whole file, also for a range
    return {
        "ETag": f'"{entry.generation}"',
        "Accept-Ranges": "bytes",
        "Last-Modified": formatdate(entry.modified_at, usegmt=True),
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f'attachment; filename="{filename}"',
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, no-cache",
        **digest,
    }

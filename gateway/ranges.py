"""A file's bytes over HTTP: whole, or the range that is asked for (RFC 9110, section 14), in pieces."""

import base64
import re
from email.utils import formatdate
from typing import Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from knapper.exchange import ListedObject, Opened

_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Unsatisfiable(Exception):
    """The range begins behind the end."""


def range_of(header: str | None, size: int) -> tuple[int, int] | None:
    """(begin, end) of what is asked for, `end` not among it; None for all: without a header, or with one that may be
    ignored, as several ranges and other units may. Raises Unsatisfiable."""
    found = _RANGE.fullmatch(header.replace(" ", "")) if header else None
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        begin, end = max(0, size - int(last)), size
    else:
        begin, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return None
    if begin >= size or begin >= end:
        raise Unsatisfiable
    return begin, end


def answer(request: Request, opened: Opened, filename: str) -> Response:
    """200, 206, 304 or 416. `filename`: what a browser saves it as. It is read in pieces, and closed in the end."""
    entry = opened.entry
    headers = _headers(entry, filename)
    asked, tag = request.headers, headers["ETag"]
    if tag in [each.strip() for each in asked.get("if-none-match", "").split(",")]:
        opened.close()
        return Response(status_code=304, headers=headers)
    unchanged = asked.get("if-range", tag) == tag  # else it is another file by now, and all of it is wanted
    try:
        part = range_of(asked.get("range") if unchanged else None, entry.size)
    except Unsatisfiable:
        opened.close()
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{entry.size}"})
    begin, end = part or (0, entry.size)
    headers["Content-Length"] = str(end - begin)
    if part is not None:
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{entry.size}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        opened.close()
        return Response(status_code=status, headers=headers)
    return StreamingResponse(opened.read(begin, end), status_code=status, headers=headers)


def _headers(entry: ListedObject, filename: str) -> dict[str, str]:
    digest = {}
    if entry.sha256:
        whole = base64.b64encode(bytes.fromhex(entry.sha256)).decode()
        digest["Repr-Digest"] = f"sha-256=:{whole}:"  # RFC 9530: of the whole file, also with a range of it
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

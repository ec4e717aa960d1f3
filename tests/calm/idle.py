"""A server that does nothing: its latency meanwhile is that of the machine. `uvicorn tests.calm.idle:app`."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


async def healthz(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


app = Starlette(routes=[Route("/api/v1/healthz", healthz)])

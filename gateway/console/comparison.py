"""Several runs and jobs on one chart."""

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from gateway.console.pages import Viewer, page, render
from knapper import limits
from knapper.errors import InvalidField
from knapper.jobs import listings


async def show(request: Request, viewer: Viewer) -> Response:
    """`of`: runs by their ids, and jobs by their names."""
    names = list(dict.fromkeys(request.query_params.getlist("of")))
    if len(names) > limits.console_compared_max:
        raise InvalidField("of", f"{len(names)} runs and jobs", f"at most {limits.console_compared_max}")
    compared = [await _described(viewer, name) for name in names]
    return render(request, viewer, "compare.html", compared=compared)


async def _described(viewer: Viewer, name: str) -> dict[str, str]:
    """Raises NotFound, also for another tenant's."""
    if ":train:" in name:
        spec = await viewer.gateway.lookups.spec(name, viewer.tenant)
        return {"name": spec.run, "what": spec.base_model, "page": f"/runs/{quote(spec.run)}"}
    start = (await listings.newest(viewer.gateway.store, viewer.tenant, name)).start
    return {"name": start.job, "what": "job", "page": f"/jobs/{start.job}"}


ROUTES = [page("/compare", show)]

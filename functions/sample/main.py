"""sample: tokens and log-probabilities of (adapter, prompt, parameters, seed); for a job, its rollouts.

Stateless and deterministic.
"""

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from knapper.errors import KnapperError
from knapper.events import cloudevents
from knapper.events.function_key import FunctionKey
from knapper.observability import traces
from knapper.serving import gates, http, jobs, metrics_page, progress
from knapper.serving.sampler import served
from knapper.wire import proto, sample_requests
from knapper.wire.progress import DEVICE_S, FRAMES, SAMPLER

gates.sampler()  # before the port binds: the first request finds the weights, or the reason why they are missing
key = FunctionKey(jobs.job_services().store)


@functions_framework.aio.http
async def sample(request: Request) -> Response:
    if metrics_page.is_scrape(request):
        return metrics_page.respond()
    try:
        body = await http.authenticated_body(request, key)
        if cloudevents.is_event(request.headers):
            event = cloudevents.decode(request.headers, body)
            with traces.span("sample", event.traceparent, subject=event.subject):
                await jobs.sample(event)
            return http.durable()
        call = sample_requests.decode(body, sample_requests.SampleCall)
        model = served()
        http.expect_model(call.base_model, model.base_model, str(model.directory))
        sample_request = call.sample(request.headers.get("knapper-tenant", ""))
        if call.stream:
            frames = progress.frames(model.sampler, sample_request)
            first = await http.while_connected(request, anext(frames))  # an invalid request decides the status
            headers = {SAMPLER: model.sampled_by}
            return StreamingResponse(progress.stream(first, frames), headers=headers, media_type=FRAMES)
        output = await http.while_connected(request, model.sampler.sample(sample_request))
    except KnapperError as error:
        return http.error(error)
    headers = {DEVICE_S: repr(output.device_s), SAMPLER: model.sampled_by}
    return Response(proto.encode_sample_response(output), media_type="application/x-protobuf", headers=headers)

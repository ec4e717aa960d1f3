"""sample: tokens and log-probabilities of (adapter, prompt, parameters, seed); for a job, its rollouts.

Keeps nothing; repeats give the same.
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
from knapper.wire.progress import DEVICE_S, FRAMES

gates.sampler()  # before the port binds: the weights are there when the first request comes, or why they are not
key = FunctionKey(jobs.services().store)


@functions_framework.aio.http
async def sample(request: Request) -> Response:
    if metrics_page.asked(request):
        return metrics_page.answer()
    try:
        body = await http.admitted(request, key)
        if cloudevents.sent(request.headers):
            event = cloudevents.decode(request.headers, body)
            with traces.span("sample", event.traceparent, subject=event.subject):
                await jobs.sample(event)
            return http.durable()
        call = sample_requests.decode(body, sample_requests.SampleCall)
        own = served()
        http.expect_model(call.base_model, own.base_model, str(own.directory))
        asked = call.sample(request.headers.get("knapper-tenant", ""))
        if call.stream:
            frames = progress.frames(own.sampler, asked)
            first = await http.while_connected(request, anext(frames))  # what cannot be asked is said by the status
            return StreamingResponse(progress.stream(first, frames), media_type=FRAMES)
        output = await http.while_connected(request, own.sampler.sample(asked))
    except KnapperError as error:
        return http.error(error)
    headers = {DEVICE_S: repr(output.device_s)}
    return Response(proto.encode_sample_response(output), media_type="application/x-protobuf", headers=headers)

"""sample: tokens and log-probabilities of (adapter, prompt, parameters, seed). Keeps nothing; repeats give the same."""

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from knapper.errors import KnapperError
from knapper.serving import answers, progress
from knapper.serving.engine import engine
from knapper.wire import proto, sample_requests
from knapper.wire.progress import FRAMES

engine()  # under ASGI this module is imported before the port binds: the weights are there when the first request comes


@functions_framework.aio.http
async def sample(request: Request) -> Response:
    try:
        call = sample_requests.decode(await answers.body(request), sample_requests.SampleCall)
        answers.expect_model(call.base_model, engine().base_model)
        if call.stream:
            frames = progress.frames(engine().sampler, call.sample())
            first = await answers.while_connected(request, anext(frames))  # what cannot be asked is said by the status
            return StreamingResponse(progress.stream(first, frames), media_type=FRAMES)
        output = await answers.while_connected(request, engine().sampler.sample(call.sample()))
    except KnapperError as error:
        return answers.error(error)
    return Response(proto.encode_sample_response(output), media_type="application/x-protobuf")

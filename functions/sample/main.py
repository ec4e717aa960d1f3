"""sample: tokens and log-probabilities of (adapter, prompt, parameters, seed). Keeps nothing; repeats give the same."""

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response

from knapper.errors import KnapperError
from knapper.serving import answers
from knapper.serving.engine import engine
from knapper.wire import proto, requests

engine()  # under ASGI this module is imported before the port binds: the weights are there when the first request comes


@functions_framework.aio.http
async def sample(request: Request) -> Response:
    try:
        call = requests.decode(await answers.body(request), requests.SampleCall)
        answers.expect_model(call.base_model, engine().base_model)
        output = await answers.while_connected(request, engine().sampler.sample(call.sample()))
    except KnapperError as error:
        return answers.error(error)
    return Response(proto.encode_sample_response(output), media_type="application/x-protobuf")

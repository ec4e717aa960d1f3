"""What a kill of the server costs: nothing that it had accepted, if it is durable."""

from tinker import types

from knapper.referee.court import Court, Floats, NotTried, Observation, check, expect_equal, forward, texts

_STEPS = 6
_KILLED_AT = (2, 4)


def _losses(court: Court, *, killed: bool) -> Floats:
    """The log-probabilities after some steps, of which two have their requests under way when the server dies."""
    training = court.run(seed=9)
    for n in range(_STEPS):
        passed = training.forward_backward(texts(2, seed=70 + n), "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=1e-3))
        if killed and n in _KILLED_AT and court.kill is not None:
            court.kill()
        passed.result()
        stepped.result()
    return forward(training, texts(2, seed=70))


@check("durability", "a run under kills comes to where it comes without them")
def kills(court: Court) -> Observation:
    if court.kill is None:
        raise NotTried("no command was given that kills the server: --kill")
    calm = _losses(court, killed=False)
    return expect_equal(court, calm, _losses(court, killed=True), f"{_STEPS} steps, two kills")


@check("durability", "what was saved before a kill is there after it")
def saved(court: Court) -> Observation:
    if court.kill is None:
        raise NotTried("no command was given that kills the server: --kill")
    path = court.saved("referee-kept")
    before = forward(court.trained, texts(2))
    court.kill()
    again = court.service.create_training_client_from_state(path).result()
    return expect_equal(court, before, forward(again, texts(2)), "the state of before")

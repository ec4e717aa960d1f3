"""A session whose heartbeats all come to the gateway that does not keep its samples."""

from pathlib import Path

from gateway import periodic_tasks
from knapper import limits
from knapper.store.directory import DirectoryStore
from tests.conformance.gateways import Front, app_of
from tests.gateway.running import serve
from tests.gateway.saved import Clock
from tests.gateway.test_admission import sampled
from tests.gateway.test_sampling import asample, sampler, until

SOME_S = 0.8 * limits.session_timeout_s


def test_samples_live_while_their_client_polls_anywhere_and_end_when_it_falls_silent(
    tmp_path: Path, clock: Clock
) -> None:
    front, own = Front(), Clock()
    with (
        serve(app_of(front)) as (address, _),
        sampled(own, DirectoryStore(tmp_path), holder_address=address) as (a, upstream),
        sampled(clock, DirectoryStore(tmp_path), holder_address="http://127.0.0.1:9", model=None) as (b, _),
    ):
        front.target, upstream.open = a.url, False
        session = a.session()
        promised = a.post("asample", asample(sampler(a, session)))
        poll = {"request_id": promised["request_id"]}
        for _ in range(3):
            own.at += SOME_S
            b.post("session_heartbeat", {"session_id": session})
            b.post("retrieve_future", poll, status=408)
            a.run(periodic_tasks.tick(a.parts))
        assert upstream.cancelled == 0, "its gateway heard of it by the polls alone"
        own.at += 1.5 * limits.session_timeout_s
        b.post("session_heartbeat", {"session_id": session})
        a.run(periodic_tasks.tick(a.parts))
        until(lambda: upstream.cancelled == 1)
        b.post("retrieve_future", poll, status=410)

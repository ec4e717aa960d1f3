"""Names: the forms that are given out, and that nothing else is taken for one."""

import pytest

from knapper import ids, limits
from knapper.errors import InvalidField, NotFound
from knapper.ids import EpisodeName, RunId, SamplerId, SessionId, TinkerPath

SESSION = SessionId("ses-" + "0123456789abcdef" * 2)
RUN = RunId(f"{SESSION}:train:7")
MOST = "9" * 18


@pytest.mark.parametrize("number", ["0", "1", "10", "907", MOST])
def test_what_is_given_out_is_known_again(number: str) -> None:
    assert ids.session_id(SESSION) == SESSION
    assert ids.is_session(SESSION)
    assert (
        ids.run_id(f"{SESSION}:train:{number}") == ids.make_run_id(SESSION, int(number)) == f"{SESSION}:train:{number}"
    )
    sampler = f"{SESSION}:sample:{number}"
    assert ids.sampler_id(sampler) == ids.make_sampler_id(SESSION, int(number)) == sampler
    assert ids.session_of(RunId(f"{SESSION}:train:{number}")) == ids.session_of(SamplerId(sampler)) == SESSION


WRONG_SESSIONS = [
    "",
    "ses-",
    SESSION[:-1],
    SESSION + "0",
    SESSION.upper(),
    "x" + SESSION,
    SESSION + "\n",
    SESSION[:-1] + "g",
]
WRONG_NUMBERS = ["", "-1", "01", "00", "1" + "0" * 18, " 1", "1 ", "1\n", "1.0", "x", "١"]


@pytest.mark.parametrize("session", WRONG_SESSIONS)
def test_no_other_session_was_ever_given_out(session: str) -> None:
    assert not ids.is_session(session)
    for check, name in (
        (ids.session_id, session),
        (ids.run_id, f"{session}:train:0"),
        (ids.sampler_id, f"{session}:sample:0"),
    ):
        with pytest.raises(NotFound, match="does not exist; create one"):
            check(name)
    assert ids.parse_training_request_id(f"{session}:train:0:1") is None


@pytest.mark.parametrize("number", WRONG_NUMBERS)
def test_no_other_number_was_ever_given_out(number: str) -> None:
    with pytest.raises(NotFound, match="training run"):
        ids.run_id(f"{SESSION}:train:{number}")
    with pytest.raises(NotFound, match="sampler"):
        ids.sampler_id(f"{SESSION}:sample:{number}")
    assert ids.parse_training_request_id(f"{RUN}:{number}") is None


def test_runs_and_samplers_are_told_apart() -> None:
    with pytest.raises(NotFound):
        ids.run_id(f"{SESSION}:sample:0")
    with pytest.raises(NotFound):
        ids.sampler_id(f"{SESSION}:train:0")


@pytest.mark.parametrize("seq", [0, 1, 12, 10**17, int(MOST)])
def test_a_training_request_says_its_run_and_its_number(seq: int) -> None:
    assert ids.make_training_request_id(RUN, seq) == f"{RUN}:{seq}"
    assert ids.parse_training_request_id(f"{RUN}:{seq}") == (RUN, seq)


@pytest.mark.parametrize("value", ["", RUN, "s-" + "0" * 32, f"{RUN}:1:2", f"x{RUN}:1", f"{RUN}:1x"])
def test_nothing_else_is_a_training_request(value: str) -> None:
    assert ids.parse_training_request_id(value) is None


@pytest.mark.parametrize("name", ["a", "Z", "0", "a.b", "a_b-c.d", "x" * limits.name_chars_max])
def test_checkpoints_have_plain_names(name: str) -> None:
    assert ids.checkpoint_name(name) == name
    for kind in ("weights", "sampler_weights", "external_weights"):
        path = f"tinker://{RUN}/{kind}/{name}"
        found = TinkerPath.parse(path)
        assert (found.run, found.kind, found.name, str(found)) == (RUN, kind, name, path)


@pytest.mark.parametrize(
    "name", ["", ".a", "-a", "_a", "a/b", "a b", "a\n", "é", "a\x00", "x" * (limits.name_chars_max + 1)]
)
def test_no_other_name_is_a_checkpoint_s(name: str) -> None:
    with pytest.raises(InvalidField, match=r"^path is .*allowed: 1 to 128 letters.*Give the checkpoint a plain name"):
        ids.checkpoint_name(name)
    with pytest.raises(InvalidField, match=r"^name is"):
        ids.checkpoint_name(name, "name")


@pytest.mark.parametrize(
    "path",
    [
        "", "tinker://", RUN, f"{RUN}/weights/a", f"tinker://{RUN}/weights", f"tinker://{RUN}/weights/a/b", f"tinker://{RUN}/w/a",
        f"Tinker://{RUN}/weights/a", f"xtinker://{RUN}/weights/a", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_no_other_form_is_a_path_and_the_field_is_named(path: str) -> None:
    with pytest.raises(
        InvalidField, match=r"^path is .*allowed: tinker://<run>/<weights\|sampler_weights\|external_weights>/<name>"
    ):
        TinkerPath.parse(path)
    with pytest.raises(InvalidField, match=r"^source_path is"):
        TinkerPath.parse(path, "source_path")


def test_a_path_of_a_run_that_cannot_be_does_not_exist() -> None:
    with pytest.raises(NotFound, match="training run"):
        TinkerPath.parse("tinker://x/weights/a")
    with pytest.raises(InvalidField, match=r"^source_path is"):
        TinkerPath.parse(f"tinker://{RUN}/weights/.a", "source_path")


def test_numbers_in_names_sort_as_numbers() -> None:
    assert ids.number(0) == "0" * 20
    assert ids.number(12) == "00000000000000000012"
    assert ids.number(10**20 - 1) == "9" * 20
    for wrong in (-1, 10**20):
        with pytest.raises(ValueError, match=str(wrong)):
            ids.number(wrong)


@pytest.mark.parametrize(
    "value", ["", "/", "a/", "/a", "-", "a/-", "..", "a/../b", "a/b/c", "ä", "a b", "a\0", "x" * 129]
)
def test_no_other_form_is_an_episode_s(value: str) -> None:
    with pytest.raises(InvalidField, match="GROUP/EPISODE"):
        EpisodeName.parse(value)


def test_episodes_are_read_as_they_are_written() -> None:
    for value in ("a", "g/a", "G.1/a_b-C", "x" * 128):
        assert str(EpisodeName.parse(value)) == value

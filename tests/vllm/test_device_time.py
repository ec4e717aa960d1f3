"""Active sequences divide the time; their parts add up to it."""

from knapper.vllm.device_time import DeviceTime


def test_time_is_divided_over_the_texts_that_are_under_way() -> None:
    now = 100.0
    shares = DeviceTime(lambda: now)
    first = shares.begin()
    now += 4
    second = shares.begin()
    now += 6
    assert first() == 4 + 3
    now += 1
    assert second() == 3 + 1
    assert shares.device_s == 11
    now += 50  # no active sequence
    third = shares.begin()
    now += 2
    assert shares.device_s == 13
    assert third() == 2

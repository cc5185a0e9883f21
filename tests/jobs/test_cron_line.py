"""When a cron line fires, also where clocks jump: forwards, backwards, by an hour and by half of one."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.bad_field import BadField
from jobs.cron_line import CronLine


def fires(line: str, zone: str, after: str, count: int) -> list[str]:
    """The next `count` times after `after` (UTC), as the zone's clocks show them."""
    made = CronLine.of(line, zone)
    moment = datetime.fromisoformat(after).replace(tzinfo=UTC).timestamp()
    shown: list[str] = []
    for _ in range(count):
        following = made.next_after(moment)
        assert following is not None
        assert following > moment
        moment = following
        shown.append(datetime.fromtimestamp(moment, made.zone).strftime("%d %H:%M %z"))
    return shown


@pytest.mark.parametrize(
    ("line", "zone", "after", "expected"),
    [
        # 2027-03-28 in Berlin: 02:00 becomes 03:00. What would fall between fires once, at the first moment after.
        ("30 2 * * *", "Europe/Berlin", "2027-03-27", ["27 02:30 +0100", "28 03:00 +0200", "29 02:30 +0200"]),
        ("*/15 2 * * *", "Europe/Berlin", "2027-03-27T22", ["28 03:00 +0200", "29 02:00 +0200"]),
        ("30 2,3 * * *", "Europe/Berlin", "2027-03-27T22", ["28 03:00 +0200", "28 03:30 +0200"]),
        ("0 2,3 * * *", "Europe/Berlin", "2027-03-27T22", ["28 03:00 +0200", "29 02:00 +0200"]),
        ("0 */2 * * *", "Europe/Berlin", "2027-03-27T22:59", ["28 00:00 +0100", "28 03:00 +0200", "28 04:00 +0200"]),
        # 2027-10-31 in Berlin: 03:00 becomes 02:00. What there is twice fires at its first occurrence.
        ("30 2 * * *", "Europe/Berlin", "2027-10-30", ["30 02:30 +0200", "31 02:30 +0200", "01 02:30 +0100"]),
        ("30 2 * * *", "Europe/Berlin", "2027-10-31T00:59", ["01 02:30 +0100"]),
        ("30 2 * * *", "Europe/Berlin", "2027-10-31T01:15", ["01 02:30 +0100"]),
        ("0,30 2 * * *", "Europe/Berlin", "2027-10-30T22", ["31 02:00 +0200", "31 02:30 +0200", "01 02:00 +0100"]),
        ("0 3 * * *", "Europe/Berlin", "2027-10-30T22", ["31 03:00 +0100", "01 03:00 +0100"]),
        # Every hour is every hour that passes.
        ("0 * * * *", "Europe/Berlin", "2027-10-30T23:30", ["31 02:00 +0200", "31 02:00 +0100", "31 03:00 +0100"]),
        ("30 * * * *", "Europe/Berlin", "2027-03-28T00", ["28 01:30 +0100", "28 03:30 +0200"]),
        # Lord Howe moves by half an hour: 2027-10-03 02:00 becomes 02:30, 2027-04-04 02:00 becomes 01:30.
        ("15 2 * * *", "Australia/Lord_Howe", "2027-10-01T20", ["03 02:30 +1100", "04 02:15 +1100"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2027-04-02T20", ["04 01:45 +1100", "05 01:45 +1030"]),
        ("15,45 1 * * *", "Australia/Lord_Howe", "2027-04-03T14:20", ["04 01:45 +1100", "05 01:15 +1030"]),
        ("*/30 * * * *", "Australia/Lord_Howe", "2027-04-03T14:29", ["04 01:30 +1100", "04 01:30 +1030"]),
        ("34 * * * *", "Australia/Lord_Howe", "2023-09-30T15:05", ["01 02:34 +1100", "01 03:34 +1100"]),
        ("52 * * * *", "Australia/Lord_Howe", "2022-04-02T14", ["03 01:52 +1100", "03 01:52 +1030"]),
        # Calendar.
        ("0 22 * * MON-FRI", "UTC", "2027-01-08T23", ["11 22:00 +0000", "12 22:00 +0000"]),
        ("0 0 29 2 *", "UTC", "2027-01-01", ["29 00:00 +0000"]),
        ("0 0 L * *", "UTC", "2027-02-01", ["28 00:00 +0000", "31 00:00 +0000"]),
    ],
)  # fmt: skip
def test_times(line: str, zone: str, after: str, expected: list[str]) -> None:
    assert fires(line, zone, after, len(expected)) == expected


@pytest.mark.parametrize(
    ("line", "zone", "param"),
    [
        ("", "UTC", "cron"),
        ("* * * *", "UTC", "cron"),
        ("* * * * * *", "UTC", "cron"),
        ("@daily", "UTC", "cron"),
        ("60 * * * *", "UTC", "cron"),
        ("0 24 * * *", "UTC", "cron"),
        ("5-1 * * * *", "UTC", "cron"),
        ("*/0 * * * *", "UTC", "cron"),
        ("0 0 31 2 *", "UTC", "cron"),
        ("0 0 30 2 *", "UTC", "cron"),
        ("1," * 60 + "1 * * * *", "UTC", "cron"),
        ("0 2 * * *", "", "time_zone"),
        ("0 2 * * *", "Europe/Nowhere", "time_zone"),
        ("0 2 * * *", "../../etc/passwd", "time_zone"),
        ("0 2 * * *", "europe/berlin", "time_zone"),
        ("0 2 * * *", "+01:00", "time_zone"),
    ],
)
def test_what_is_no_line_or_no_zone(line: str, zone: str, param: str) -> None:
    with pytest.raises(BadField) as caught:
        CronLine.of(line, zone)
    assert caught.value.param == param


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text("0123456789*/,-#LWAFIMNOR²", min_size=1, max_size=6), min_size=5, max_size=5))
def test_any_text_is_a_line_or_a_bad_field(fields: list[str]) -> None:
    try:
        line = CronLine.of(" ".join(fields), "Europe/Berlin")
    except BadField:
        return
    following = line.next_after(1.8e9)
    assert following is not None
    assert following > 1.8e9


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 59),
    st.integers(0, 23),
    st.sampled_from(["Europe/Berlin", "Australia/Lord_Howe", "America/St_Johns"]),
    st.integers(1_798_761_600, 1_830_297_600),  # 2027
)
def test_every_reading_fires_once_a_day(minute: int, hour: int, zone: str, start: int) -> None:
    line = CronLine.of(f"{minute} {hour} * * *", zone)
    moment, days = float(start), []
    for _ in range(3):
        following = line.next_after(moment)
        assert following is not None
        assert 0 < following - moment <= 25 * 3600
        # One second later is not the same time again, and one second earlier it was still to come.
        assert line.next_after(following - 1) == following
        moment = following
        days.append(datetime.fromtimestamp(moment, line.zone).toordinal())
    assert days == [days[0], days[0] + 1, days[0] + 2]

"""CronLine: when a schedule fires, as instants, in a time zone whose clocks jump.

Owns the five fields and the rule for jumps. The fields and their calendar are cronsim's, walked on the wall clock
without a zone; what a wall clock reading means as an instant is decided here: a reading that exists twice is its
first occurrence, one that a jump leaves out is the first moment after the jump, and readings that fall on one
moment fire once. So every reading fires exactly once a day. A line whose hour is `*` means every hour that passes,
not every reading: it fires whenever the wall clock shows it, so twice where the clock does, and not where it never
does. Knows no database and asks no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from jobs.bad_field import BadField

MAX_LINE_CHARS: Final = 100
_MINUTE: Final = timedelta(minutes=1)
_JUMP: Final = timedelta(hours=3)  # of a clock, at most


@dataclass(frozen=True, slots=True)
class CronLine:
    """`text`: minute, hour, day of the month, month, day of the week, as Vixie cron reads them."""

    text: str
    zone: ZoneInfo

    @classmethod
    def of(cls, text: str, zone_name: str) -> CronLine:
        """Raises `BadField` for `cron` or `time_zone`."""
        # Not merely tried: ZoneInfo would open any file below its folders that the name spells.
        if zone_name not in available_timezones():
            raise BadField("time_zone", "must be an IANA time zone, such as Europe/Berlin or UTC")
        line = cls(text, ZoneInfo(zone_name))
        if len(text) > MAX_LINE_CHARS or len(text.split()) != 5:
            raise BadField(
                "cron",
                f"must be five fields in at most {MAX_LINE_CHARS} characters: minute, hour, day of the month, month, "
                "day of the week",
            )
        try:
            CronSim(text, datetime(2000, 1, 1))
        except CronSimError as error:
            raise BadField("cron", f"cannot be read: {str(error).lower()}") from None
        if line.next_after(datetime(2000, 1, 1, tzinfo=UTC).timestamp()) is None:
            raise BadField("cron", "names a day that never comes")
        return line

    def next_after(self, moment: float) -> float | None:
        """The first time to fire strictly after `moment`, both unix seconds; None when there is none in 50 years."""
        wall = datetime.fromtimestamp(moment, self.zone).replace(tzinfo=None)
        if self.text.split()[1] == "*":
            return self._shown_after(moment, wall)
        for reading in CronSim(self.text, wall):
            if (instant := self._instant(reading)) > moment:
                return instant
        return None

    def _shown_after(self, moment: float, wall: datetime) -> float | None:
        """The first instant after `moment`, which is `wall` on the clock, that the line names on the clock."""
        first: datetime | None = None
        for reading in CronSim(self.text, wall - _JUMP):
            if first is not None and reading > first.replace(tzinfo=None) + _JUMP:
                break  # whatever jumps lie between, it comes later
            for fold in (0, 1):
                shown = reading.replace(tzinfo=self.zone, fold=fold)
                later = shown.timestamp() > moment and (
                    first is None or shown.timestamp() < first.timestamp()
                )
                if later and self._exists(shown):
                    first = shown
        return None if first is None else first.timestamp()

    def _instant(self, reading: datetime) -> float:
        """Of a wall clock reading without a zone."""
        instant = reading.replace(tzinfo=self.zone, fold=0)
        while not self._exists(instant):
            reading += _MINUTE
            instant = reading.replace(tzinfo=self.zone, fold=0)
        return instant.timestamp()

    def _exists(self, shown: datetime) -> bool:
        """Whether the clock ever shows that."""
        return shown.astimezone(UTC).astimezone(self.zone).replace(tzinfo=None) == shown.replace(tzinfo=None)

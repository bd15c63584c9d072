"""When a source looks for files: at an interval or by a cron expression, in UTC. Ticks that were missed are one."""

from datetime import datetime, timedelta

from cronsim import CronSim

from millrace_ingestion.sources.specs import FileSpec


def next_look(spec: FileSpec, last: datetime | None, now: datetime) -> datetime | None:
    """When to look next; `now` when that is overdue, None when there is no schedule and there was a look.

    Args:
        spec: the schedule.
        last: when the last look ended.
        now: the time.
    """
    if last is None:
        return now
    if spec.cron:
        # A tick that came while nobody looked makes one look, however many there were.
        return max(now, next(CronSim(spec.cron, last)))
    if spec.interval_s:
        return max(now, last + timedelta(seconds=spec.interval_s))
    return None

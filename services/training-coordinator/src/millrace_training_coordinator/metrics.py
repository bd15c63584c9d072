"""Prometheus metrics of the coordinator."""

from prometheus_client import Counter, Gauge, Histogram

RUNS = Gauge("millrace_training_runs", "Runs kept, by state.", ["state"])
RUNS_ENDED = Counter("millrace_training_runs_ended_total", "Runs that ended.", ["pipeline", "state"])
STAGE_SECONDS = Histogram(
    "millrace_training_stage_seconds",
    "Time from the start to the end of one attempt of a stage, as the coordinator saw it.",
    ["pipeline", "stage", "outcome"],
    buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14_400, 86_400),
)
RETRIES = Counter("millrace_training_stage_retries_total", "Attempts after a failed one.", ["pipeline", "stage"])
RECOVERED = Counter(
    "millrace_training_stages_recovered_total", "Attempts found after a restart: running, ended or lost.", ["found"]
)
RETRAIN = Counter(
    "millrace_training_retrain_findings_total",
    "Drift findings by what became of them: started, or why they were ignored.",
    ["verdict"],
)
WATCHERS = Gauge("millrace_training_watchers", "WatchRun streams that are open.")

"""Panels of the chart's dashboards, by dashboard. A panel is a question and the queries that answer it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    """The question it answers."""
    queries: tuple[tuple[str, str], ...]
    """PromQL and legend; `HERE` is written as `%%`."""
    unit: str = "short"
    """Grafana's name of the unit."""
    kind: str = "timeseries"
    """Grafana's name of the panel."""


def _rate(metric: str, by: str, more: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{%%{more}}}[$__rate_interval]))"


def _quantile(share: float, metric: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by ({by}, le) (rate({metric}_bucket{{%%}}[$__rate_interval])))"


_RESULT_HITS = _rate("millrace_gateway_result_cache_total", "model, version", ',outcome="hit"')
# By the labels that the pod monitor takes from model servers' pods.
_SERVED = "millrace_dev_model, millrace_dev_version"
_TRITON_HITS = _rate("nv_cache_num_hits_per_model", _SERVED)
_TRITON_MISSES = _rate("nv_cache_num_misses_per_model", _SERVED)

TRAFFIC = (
    Panel(
        "How many requests does each version answer?",
        ((_rate("millrace_gateway_requests_total", "model, version"), "{{model}} {{version}}"),),
        "reqps",
    ),
    Panel(
        "What share of them fails?",
        (
            (
                f"{_rate('millrace_gateway_errors_total', 'model, version')} / {_rate('millrace_gateway_requests_total', 'model, version')}",
                "{{model}} {{version}}",
            ),
        ),
        "percentunit",
    ),
    Panel(
        "How long do model servers take?",
        tuple(
            (
                _quantile(share, "millrace_gateway_model_seconds", "model, version"),
                f"{{{{model}}}} {{{{version}}}} p{round(share * 100)}",
            )
            for share in (0.5, 0.99)
        ),
        "s",
    ),
    Panel(
        "Which weights are in force?",
        (("avg by (model, version, role) (millrace_gateway_weight_percent{%%})", "{{model}} {{version}} {{role}}"),),
        "percent",
    ),
    Panel(
        "How many servers does each version have?",
        (("min by (model, version) (millrace_gateway_endpoints{%%})", "{{model}} {{version}}"),),
    ),
    Panel("Do all gateways hold the same routes?", (("millrace_gateway_routes_generation{%%}", "{{pod}}"),)),
    Panel(
        "Does the prediction log keep up?",
        (
            (_rate("millrace_gateway_predictions_logged_total", "pod"), "{{pod}} logged"),
            (_rate("millrace_gateway_predictions_dropped_total", "pod"), "{{pod}} lost"),
        ),
        "ops",
    ),
    Panel(
        "Which calls are turned away, and why?",
        ((_rate("millrace_gateway_refused_total", "model, reason, priority"), "{{model}} {{reason}} {{priority}}"),),
        "reqps",
    ),
    Panel(
        "How many requests may each version have under way?",
        (
            (
                "sum by (model, version, priority) (millrace_gateway_concurrency_limit{%%})",
                "{{model}} {{version}} {{priority}}",
            ),
        ),
    ),
    Panel(
        "How fast is each version while nothing waits?",
        (("avg by (model, version) (millrace_gateway_baseline_seconds{%%})", "{{model}} {{version}}"),),
        "s",
    ),
    Panel(
        "How old are the token issuer's keys?",
        (("time() - (millrace_gateway_issuer_keys_timestamp_seconds{%%} > 0)", "{{pod}}"),),
        "s",
    ),
    Panel(
        "What share of predictions is answered from the result cache?",
        (
            (
                f"{_RESULT_HITS} / {_rate('millrace_gateway_result_cache_total', 'model, version')}",
                "{{model}} {{version}}",
            ),
        ),
        "percentunit",
    ),
    Panel(
        "What share of calls is answered from Triton's own cache?",
        ((f"{_TRITON_HITS} / ({_TRITON_HITS} + {_TRITON_MISSES})", "{{millrace_dev_model}} {{millrace_dev_version}}"),),
        "percentunit",
    ),
    Panel(
        "Do gateways see the cluster's endpoints?",
        (("min by (pod) (millrace_gateway_endpoint_watch_connected{%%})", "{{pod}}"),),
    ),
)
SLEEP = (
    Panel(
        "Which versions are asleep?",
        (("max by (deployment, version) (millrace_rollout_asleep{%%}) == 1", "{{deployment}} {{version}}"),),
        kind="state-timeline",
    ),
    Panel(
        "How many calls wait for a version to wake?",
        (
            ("sum by (pod) (millrace_gateway_held_calls{%%})", "{{pod}}"),
            (_rate("millrace_gateway_held_calls_refused_total", "reason"), "refused: {{reason}}"),
        ),
    ),
    Panel(
        "How long does a wake take?",
        (
            (_quantile(0.5, "millrace_gateway_wake_seconds", "model"), "{{model}} median"),
            (_quantile(0.95, "millrace_gateway_wake_seconds", "model"), "{{model}} p95"),
        ),
        "s",
    ),
    Panel(
        "What do models in pools do?",
        (("sum by (pool, state) (millrace_rollout_pool_models{%%})", "{{pool}} {{state}}"),),
    ),
    Panel(
        "How full are pools?",
        (("max by (pool, kind) (millrace_rollout_pool_bytes{%%})", "{{pool}} {{kind}}"),),
        "bytes",
    ),
    Panel(
        "How often do models give way to others?",
        (
            (_rate("millrace_rollout_pool_evictions_total", "pool"), "{{pool}} gave way"),
            (_rate("millrace_rollout_pool_loads_total", "pool"), "{{pool}} loaded"),
        ),
        "ops",
    ),
    Panel(
        "How long does a model wait for a place in its pool?",
        ((_quantile(0.95, "millrace_rollout_pool_wait_seconds", "pool"), "{{pool}} p95"),),
        "s",
    ),
)
ROLLOUTS = (
    Panel(
        "In which phase is each deployment?",
        (("millrace_rollout_phase{%%} == 1", "{{deployment}} {{phase}}"),),
        kind="state-timeline",
    ),
    Panel(
        "Which weights are wanted?",
        (("max by (deployment, version) (millrace_rollout_weight_percent{%%})", "{{deployment}} {{version}}"),),
        "percent",
    ),
    Panel(
        "What do gates say?",
        (
            (
                "sum by (deployment, gate, verdict) (increase(millrace_rollout_gate_verdicts_total{%%}[$__rate_interval]))",
                "{{deployment}} {{gate}} {{verdict}}",
            ),
        ),
    ),
    Panel(
        "How many servers are ready?",
        (("max by (deployment, version) (millrace_rollout_servers_ready{%%})", "{{deployment}} {{version}}"),),
    ),
    Panel("How many gateways count?", (("max(millrace_rollout_gateways{%%})", "gateways"),)),
    Panel("How long is one look at everything?", (("max(millrace_rollout_tick_seconds{%%})", "tick"),), "s"),
    Panel(
        "Does evidence come?",
        ((_rate("millrace_rollout_poll_failures_total", "source"), "{{source}} without answer"),),
        "ops",
    ),
    Panel(
        "Does reconciling fail?",
        ((_rate("millrace_rollout_tick_failures_total", "deployment"), "{{deployment}}"),),
        "ops",
    ),
)
DATA = (
    Panel(
        "How many records land?",
        ((_rate("millrace_ingestion_records_total", "contract, result"), "{{contract}} {{result}}"),),
        "ops",
    ),
    Panel(
        "Why are records refused?",
        ((_rate("millrace_ingestion_rejected_total", "contract, reason"), "{{contract}} {{reason}}"),),
        "ops",
    ),
    Panel(
        "How long is a commit to the lake?",
        ((_quantile(0.99, "millrace_ingestion_commit_seconds", "contract"), "{{contract}} p99"),),
        "s",
    ),
    Panel("How much waits in ingestion?", (("sum(millrace_ingestion_queued_batches{%%})", "batches"),)),
    Panel(
        "How fresh are online features?",
        ((_quantile(0.99, "millrace_feature_freshness_seconds", "namespace"), "p99"),),
        "s",
    ),
    Panel(
        "How far behind is the online store?",
        (("max by (contract) (millrace_feature_lag_messages{%%})", "{{contract}}"),),
    ),
    Panel(
        "How many rows are read online?",
        ((_rate("millrace_feature_read_rows_total", "feature_service"), "{{feature_service}}"),),
        "ops",
    ),
    Panel(
        "What state are read values in?",
        ((_rate("millrace_feature_read_features_total", "feature_service, status"), "{{feature_service}} {{status}}"),),
        "ops",
    ),
)
FEATURES = (
    Panel(
        "What share of batches is readable within a second?",
        (
            (
                "1 - millrace:feature_freshness_slow:ratio_rate5m{%%}",
                "{{contract}}",
            ),
        ),
        "percentunit",
    ),
    Panel(
        "How much of the month's allowance burns?",
        (
            ("millrace:feature_freshness_slow:ratio_rate1h{%%} / 0.01", "{{contract}} 1 h"),
            ("millrace:feature_freshness_slow:ratio_rate6h{%%} / 0.01", "{{contract}} 6 h"),
        ),
    ),
    Panel(
        "How old is an event when it can be read?",
        (
            (_quantile(0.5, "millrace_feature_event_freshness_seconds", "contract"), "{{contract}} p50"),
            (_quantile(0.99, "millrace_feature_event_freshness_seconds", "contract"), "{{contract}} p99"),
        ),
        "s",
    ),
    Panel(
        "How far behind is each contract?",
        (("max by (contract) (millrace_feature_lag_messages{%%})", "{{contract}} messages"),),
    ),
    Panel(
        "What share of served values is not what the lake says?",
        (
            (
                (
                    'sum by (feature) (increase(millrace_feature_consistency_values_total{%%,outcome!="equal"}[1h]))'
                    " / sum by (feature) (increase(millrace_feature_consistency_values_total{%%}[1h]))"
                ),
                "{{feature}}",
            ),
        ),
        "percentunit",
    ),
    Panel(
        "How are they different?",
        (
            (
                _rate("millrace_feature_consistency_values_total", "outcome", ',outcome!="equal"'),
                "{{outcome}}",
            ),
        ),
        "ops",
    ),
    Panel(
        "How far apart are the numbers (SMAPE)?",
        (
            (
                (
                    "sum by (feature) (increase(millrace_feature_consistency_error_total{%%}[1h]))"
                    " / sum by (feature) (increase(millrace_feature_consistency_pairs_total{%%}[1h]))"
                ),
                "{{feature}}",
            ),
        ),
    ),
    Panel(
        "Does the check keep up?",
        (
            (_rate("millrace_feature_consistency_samples_total", "result"), "{{result}}"),
            ("max(millrace_feature_consistency_waiting{%%})", "waiting"),
        ),
    ),
    Panel(
        "What do checks hold back?",
        (
            (
                _rate("millrace_ingestion_records_total", "contract, result", ',result=~"rejected|quarantined"'),
                "{{contract}} {{result}}",
            ),
        ),
        "ops",
    ),
    Panel(
        "Are records applied again or unreadable?",
        (
            (_rate("millrace_feature_repeated_batches_total", "contract"), "{{contract}} repeated"),
            (_rate("millrace_feature_bad_messages_total", "contract"), "{{contract}} unreadable"),
        ),
        "ops",
    ),
)
QUALITY = (
    Panel(
        "Which checks fail?",
        (
            (
                _rate("millrace_ingestion_check_failures_total", "contract, subject, check, policy"),
                "{{contract}} {{subject}} {{check}} ({{policy}})",
            ),
        ),
        "ops",
    ),
    Panel(
        "What share of each column is missing?",
        (
            (
                (
                    f"{_rate('millrace_ingestion_column_nulls_total', 'contract, column')} / "
                    f"({_rate('millrace_ingestion_column_nulls_total', 'contract, column')} + "
                    f"{_rate('millrace_ingestion_column_values_total', 'contract, column')})"
                ),
                "{{contract}} {{column}}",
            ),
        ),
        "percentunit",
    ),
    Panel(
        "What is the mean of each column?",
        (("max by (contract, column) (millrace_ingestion_column_mean{%%})", "{{contract}} {{column}}"),),
    ),
    Panel(
        "How many different values does each column have?",
        (("max by (contract, column) (millrace_ingestion_column_distinct{%%})", "{{contract}} {{column}}"),),
    ),
    Panel(
        "What comes from sources?",
        ((_rate("millrace_ingestion_source_records_total", "source, result"), "{{source}} {{result}}"),),
        "ops",
    ),
    Panel(
        "How far behind is each source?",
        (("max by (source) (millrace_ingestion_source_lag{%%})", "{{source}}"),),
    ),
    Panel(
        "Why do sources fail?",
        ((_rate("millrace_ingestion_source_troubles_total", "source, reason"), "{{source}} {{reason}}"),),
        "ops",
    ),
    Panel(
        "How late do the rows of joins land?",
        tuple(
            (
                _quantile(share, "millrace_ingestion_join_freshness_seconds", "source"),
                f"{{{{source}}}} p{round(share * 100)}",
            )
            for share in (0.5, 0.95)
        ),
        "s",
    ),
    Panel(
        "What do joins make?",
        ((_rate("millrace_ingestion_join_rows_total", "source, result"), "{{source}} {{result}}"),),
        "ops",
    ),
    Panel(
        "Which records come too late to count?",
        ((_rate("millrace_feature_late_records_total", "view"), "{{view}}"),),
        "ops",
    ),
)
LEARNING = (
    Panel(
        "How many predictions and outcomes come in?",
        (
            (_rate("millrace_drift_predictions_total", "namespace"), "predictions"),
            (_rate("millrace_drift_outcomes_joined_total", "namespace"), "with outcome"),
        ),
        "ops",
    ),
    Panel("What is found?", (("sum by (kind) (increase(millrace_drift_findings_total{%%}[1h]))", "{{kind}}"),)),
    Panel("How far behind is the drift monitor?", (("max by (topic) (millrace_drift_lag{%%})", "{{topic}}"),)),
    Panel("How many predictions wait for an outcome?", (("max(millrace_drift_unjoined{%%})", "waiting"),)),
    Panel("How do training runs stand?", (("max by (state) (millrace_training_runs{%%})", "{{state}}"),)),
    Panel(
        "How long do stages take?",
        ((_quantile(0.5, "millrace_training_stage_seconds", "stage"), "{{stage}} median"),),
        "s",
    ),
    Panel(
        "Which stages are tried again?",
        ((_rate("millrace_training_stage_retries_total", "pipeline, stage"), "{{pipeline}} {{stage}}"),),
        "ops",
    ),
    Panel(
        "What becomes of findings?",
        (("sum by (verdict) (increase(millrace_training_retrain_findings_total{%%}[1h]))", "{{verdict}}"),),
    ),
)
SERVICES = (
    Panel(
        "How many calls does each service answer?",
        ((_rate("millrace_rpc_server_duration_seconds_count", "job"), "{{job}}"),),
        "reqps",
    ),
    Panel(
        "Which calls fail?",
        (
            (
                _rate(
                    "millrace_rpc_server_duration_seconds_count", "job, method, code", ',code!~"OK|CANCELLED|NOT_FOUND"'
                ),
                "{{job}} {{method}} {{code}}",
            ),
        ),
        "reqps",
    ),
    Panel(
        "How long do calls take?",
        ((_quantile(0.99, "millrace_rpc_server_duration_seconds", "job"), "{{job}} p99"),),
        "s",
    ),
    Panel("Do workers fail?", ((_rate("millrace_worker_failures_total", "job, worker"), "{{job}} {{worker}}"),), "ops"),
    Panel(
        "What moves on the bus?",
        (
            (_rate("millrace_bus_messages_published_total", "topic"), "{{topic}} in"),
            (_rate("millrace_bus_messages_consumed_total", "topic"), "{{topic}} out"),
        ),
        "ops",
    ),
    Panel("Do facts wait to be published?", (("max by (job) (millrace_outbox_pending{%%})", "{{job}}"),)),
)
DASHBOARDS = {
    "traffic": ("Millrace: traffic", TRAFFIC),
    "rollouts": ("Millrace: rollouts", ROLLOUTS),
    "sleep": ("Millrace: sleeping and pooled models", SLEEP),
    "data": ("Millrace: records and features", DATA),
    "quality": ("Millrace: sources and quality", QUALITY),
    "features": ("Millrace: freshness and consistency", FEATURES),
    "learning": ("Millrace: drift and training", LEARNING),
    "services": ("Millrace: services", SERVICES),
}

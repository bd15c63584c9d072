"""Settings of the training coordinator."""

import os
from typing import Literal

from millrace_kit.settings import ServiceSettings
from pydantic import Field

from millrace_training_coordinator.cluster_settings import KubernetesSettings


class TrainingSettings(ServiceSettings):
    """What the coordinator keeps, how much of the machine its stages may use, and every limit."""

    database_url: str = "sqlite:///.millrace/training/training.sqlite"
    """SQLAlchemy URL of the runs: `sqlite:///…` on one machine, `postgresql+psycopg://…` in a cluster."""
    work_dir: str = ".millrace/training/work"
    """Folder of code trees, attempts, logs and kept outputs; one coordinator at a time owns it."""
    lock_file: str = ""
    """Lock file of the environment stages run in, hashed into every run's record; empty records none."""
    ingestion_address: str = "127.0.0.1:7401"
    """Ingestion service, handed to stages."""
    feature_address: str = "127.0.0.1:7402"
    """Feature service, handed to stages."""
    registry_address: str = "127.0.0.1:7403"
    """Registry, handed to stages."""
    drift_address: str = "127.0.0.1:7406"
    """Drift monitor, handed to stages."""
    training_address: str = ""
    """This coordinator as stages reach it; empty takes `listen`."""
    kubernetes: KubernetesSettings | None = None
    """With it stages are Jobs of a cluster, and `cpus`, `memory_mib`, `gpus`, `orphan_grace_s` have no meaning; without it they
    are processes of this machine."""
    cpus: float = Field(default=float(os.cpu_count() or 1), gt=0, le=1024)
    """CPUs that running stages may claim together; a stage that does not fit waits. Default: those of the machine."""
    memory_mib: int = Field(default=65_536, ge=64)
    """Memory that running stages may claim together, in MiB."""
    gpus: int = Field(default=0, ge=0, le=64)
    """GPUs (device 0 upwards) that stages may claim; the others see none."""
    max_active_runs: int = Field(default=8, ge=1, le=1000)
    """Runs whose stages are started; later runs stay PENDING."""
    max_queued_runs: int = Field(default=1000, ge=1, le=100_000)
    """Runs that are not finished; the next StartRun gets RESOURCE_EXHAUSTED."""
    max_timeout_s: float = Field(default=86_400.0, gt=0)
    """Longest `timeout_s` a manifest may ask for."""
    retry_backoff_s: float = Field(default=1.0, ge=0, le=3600)
    """Wait before the first retry of a stage; it doubles with each further one."""
    retry_backoff_max_s: float = Field(default=60.0, ge=0, le=3600)
    """Longest wait before a retry."""
    stop_grace_s: float = Field(default=5.0, ge=0, le=300)
    """Time between asking a stage's processes to end (SIGTERM) and ending them (SIGKILL)."""
    orphan_grace_s: float = Field(default=300.0, ge=0, le=86_400)
    """How long stages run on without a coordinator, to be adopted by the next one, before they end themselves."""
    on_stop: Literal["auto", "terminate", "keep"] = "auto"
    """What an orderly stop does to running stages: end them, to run again later, or leave them for the next coordinator; `auto`
    ends processes of this machine and leaves Jobs of a cluster."""
    log_limit_mib: int = Field(default=64, ge=1, le=4096)
    """Largest log of one attempt; the rest is dropped and the log says so."""
    output_limit_mib: int = Field(default=4096, ge=1)
    """Largest declared output of a stage."""
    code_limit_mib: int = Field(default=64, ge=1, le=4096)
    """Largest unpacked code tree."""
    keep_finished_runs: int = Field(default=100, ge=1, le=100_000)
    """Finished runs whose logs and working files stay; records and outputs of older ones stay too."""
    max_watchers: int = Field(default=64, ge=1, le=10_000)
    """WatchRun streams at once; the next one gets RESOURCE_EXHAUSTED."""
    retrain_min_interval_s: float = Field(default=0.0, ge=0)
    """Least wall time between two retraining runs of a pipeline, on top of the manifest's cooldown in event time."""
    default_deadline_s: float = Field(default=3600.0, gt=0, le=3600)
    """Deadline of a call whose client set none; long, because Reproduce waits for a whole run."""

"""Settings of the registry."""

from pathlib import Path

from millrace_kit.settings import ServiceSettings
from pydantic import Field


class RegistrySettings(ServiceSettings):
    """Where models and their files are kept."""

    database_url: str = ""
    """SQLAlchemy URL of the database (`postgresql+psycopg://…`); empty is the file `registry.sqlite` in `state_dir`."""
    artifacts_url: str = ""
    """fsspec URL of the artifact store (`file:///…`, `s3://…`); readers use the same one. Empty is the folder `artifacts` in
    `state_dir`."""
    max_artifact_mib: int = Field(default=16_384, ge=1)
    """Largest single artifact accepted, in MiB; larger files belong into shards."""
    max_versions_per_model: int = Field(default=5_000, ge=1, le=100_000)
    """Versions one model may have; a list of them must fit one message."""
    max_models: int = Field(default=10_000, ge=1, le=1_000_000)
    """Models the registry takes."""

    def database(self) -> str:
        """The database's URL with the default filled in."""
        return self.database_url or f"sqlite:///{Path(self.state_dir).absolute() / 'registry.sqlite'}"

    def artifacts(self) -> str:
        """The artifact store's URL with the default filled in."""
        return self.artifacts_url or (Path(self.state_dir).absolute() / "artifacts").as_uri()

"""The same definitions as a Feast registry file, written by Feast itself, so that Feast's own tools can read them.

`feast --chdir <state_dir>/feast feature-views list` works on the result.
"""

from pathlib import Path
from uuid import uuid4

from millrace_kit.errors import InvalidArgumentError

from millrace_feature.canonical import FIELD
from millrace_feature.feast_import import import_feast

_CONFIG = """# Written by the feature service; a view of its definitions for Feast's own tools.
project: {project}
provider: local
registry: registry.db
entity_key_serialization_version: 3
online_store: null
"""


def write_feast_files(folder: Path, project: str, registry: bytes) -> None:
    """Write `registry.db` and `feature_store.yaml` into `folder`, each whole or not at all.

    Raises:
        InvalidArgumentError: Feast refuses one of the objects.
    """
    import_feast()
    from feast import Entity, FeatureView
    from feast.data_source import DataSource
    from feast.feature_service import FeatureService
    from feast.infra.registry.registry import Registry
    from feast.on_demand_feature_view import OnDemandFeatureView
    from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto
    from feast.repo_config import RegistryConfig
    from feast.stream_feature_view import StreamFeatureView

    content = RegistryProto.FromString(registry)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".registry.{uuid4().hex}.db"
    try:
        target = Registry(project, RegistryConfig(path=str(scratch), cache_ttl_seconds=0), None)
        for entity in content.entities:
            target.apply_entity(Entity.from_proto(entity), project, commit=False)
        for source in content.data_sources:
            target.apply_data_source(DataSource.from_proto(source), project, commit=False)
        for view in content.feature_views:
            target.apply_feature_view(FeatureView.from_proto(view), project, commit=False)
        for view in content.stream_feature_views:
            target.apply_feature_view(StreamFeatureView.from_proto(view), project, commit=False)
        for view in content.on_demand_feature_views:
            target.apply_feature_view(OnDemandFeatureView.from_proto(view), project, commit=False)
        for service in content.feature_services:
            target.apply_feature_service(FeatureService.from_proto(service), project, commit=False)
        target.commit()
        scratch.replace(folder / "registry.db")
    except OSError:
        raise
    except Exception as error:  # whatever Feast's validation raises
        raise InvalidArgumentError(FIELD, f"Feast refuses it: {type(error).__name__}: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
    config = folder / f".config.{uuid4().hex}"
    config.write_text(_CONFIG.format(project=project), encoding="utf-8")
    config.replace(folder / "feature_store.yaml")

"""A Feast repository as one message: what `millrace features apply` sends to the feature service.

Needs Feast on the client's side (`pip install feast==0.67.0`); nothing else of the SDK does. Parsing a repository runs its Python
files, as `feast apply` does.
"""

import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

CONFIG_FILE = "feature_store.yaml"
_GENERATED = (
    "entities",
    "data_sources",
    "feature_views",
    "stream_feature_views",
    "on_demand_feature_views",
    "feature_services",
)


def registry_from_repo(path: Path) -> tuple[str, bytes]:
    """Parse the Feast repository at `path` with Feast's own parser.

    Returns:
        The project's name and a serialized `feast.core.Registry`, the same bytes for the same files: objects are sorted, and hold
        neither times nor paths of this machine.

    Raises:
        FileNotFoundError: `path` holds no `feature_store.yaml`.
        ValueError: the file names no project, or an object is of a kind the feature service does not take.
    """
    root = path.resolve()
    config = yaml.safe_load((root / CONFIG_FILE).read_text(encoding="utf-8"))
    project = config.get("project") if isinstance(config, dict) else None
    if not isinstance(project, str) or not project:
        raise ValueError(f"{root / CONFIG_FILE} names no project")
    contents = _parse(root)
    if contents.label_views:
        raise ValueError("label views are not supported")
    _refuse_lost_aggregations(contents.feature_views)
    from feast.protos.feast.core.Registry_pb2 import Registry

    registry = Registry(registry_schema_version="1")
    for kind in _GENERATED:
        protos = []
        for item in getattr(contents, kind):
            if item.name == "__dummy":
                continue
            if kind == "on_demand_feature_views" and getattr(item.feature_transformation, "udf", None) is not None:
                _forget_place(item.feature_transformation.udf, root)
            with _sorted_globals():
                proto = item.to_proto()
            _forget_times(proto)
            if kind == "stream_feature_views":  # Feast writes their fields in the order of a Python set
                fields = sorted(proto.spec.features, key=lambda f: f.name)
                del proto.spec.features[:]
                proto.spec.features.extend(fields)
            protos.append(proto)
        protos.sort(key=lambda p: p.name if kind == "data_sources" else p.spec.name)
        getattr(registry, kind).extend(protos)
    for permission in sorted(contents.permissions, key=lambda p: str(p.name)):
        proto = permission.to_proto()
        _forget_times(proto)
        registry.permissions.append(proto)
    return project, registry.SerializeToString(deterministic=True)


def _refuse_lost_aggregations(views: list[Any]) -> None:
    """Refuse batch views with aggregations.

    Feast 0.67 loses them where a BatchFeatureView is written to a registry, so what came back would be another view.
    """
    for view in views:
        if getattr(view, "aggregations", None):
            raise ValueError(
                f"{type(view).__name__} {view.name!r} has aggregations, which Feast loses in its registry; make it a StreamFeatureView with "
                "a PushSource over the same batch source"
            )


def _parse(root: Path) -> Any:
    """Run Feast's parser with `root` importable, and forget the repository's modules afterwards so that it can be read again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import os

        from feast.repo_operations import get_repo_files, parse_repo, py_path_to_module

        # Again: Feast's modules put their own filters in front while they are imported.
        warnings.simplefilter("ignore")
        before = Path.cwd()
        sys.path.insert(0, str(root))
        os.chdir(root)  # Feast derives module names from paths relative to the working directory
        try:
            for file in get_repo_files(root):
                sys.modules.pop(py_path_to_module(file), None)
            importlib.invalidate_caches()
            return parse_repo(root)
        finally:
            os.chdir(before)
            sys.path.remove(str(root))


def _forget_times(message: Any) -> None:
    """Clear every `meta` of a Feast message, however deep: it holds the time the object was made."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.name == "meta":
            message.ClearField("meta")
        elif field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is not None:
                for item in value.values():
                    _forget_times(item)
        elif field.is_repeated:
            for item in value:
                _forget_times(item)
        else:
            _forget_times(value)


@contextmanager
def _sorted_globals() -> Iterator[None]:
    """Let dill pickle the globals a function uses in sorted order; its own order changes with every process."""
    import dill.detect

    original = dill.detect.globalvars

    def ordered(*arguments: Any, **options: Any) -> dict[str, Any]:
        return dict(sorted(original(*arguments, **options).items()))

    dill.detect.globalvars = ordered
    try:
        yield
    finally:
        dill.detect.globalvars = original


def _forget_place(function: types.FunctionType, root: Path) -> None:
    """Replace the absolute path inside the function's code by the path in the repository."""

    def moved(code: types.CodeType) -> types.CodeType:
        place = Path(code.co_filename)
        name = place.relative_to(root).as_posix() if place.is_relative_to(root) else place.name
        constants = tuple(moved(c) if isinstance(c, types.CodeType) else c for c in code.co_consts)
        return code.replace(co_filename=name, co_consts=constants)

    function.__code__ = moved(function.__code__)

"""Data contracts as YAML files."""

from pathlib import Path

import yaml
from google.protobuf.json_format import ParseDict, ParseError
from millrace_api.ingestion.v1.ingestion_pb2 import DataContract
from millrace_kit.errors import InvalidArgumentError

_TYPES = {name: f"COLUMN_TYPE_{name.upper()}" for name in ("string", "int64", "double", "bool", "timestamp")}


def load_contract(path: Path) -> DataContract:
    """Read a contract: the fields of `DataContract`, with types as `string`, `int64`, `double`, `bool`, `timestamp`.

    Raises:
        InvalidArgumentError: the file is not a contract; the message names the file and the field.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise InvalidArgumentError(path.name, "needs a mapping with name and columns")
    for index, column in enumerate(raw.get("columns") or ()):
        if isinstance(column, dict) and column.get("type") in _TYPES:
            column["type"] = _TYPES[column["type"]]
        elif isinstance(column, dict) and column.get("type") not in _TYPES.values():
            raise InvalidArgumentError(f"{path.name}: columns[{index}].type", f"is none of {', '.join(_TYPES)}")
    try:
        return ParseDict(raw, DataContract())
    except ParseError as error:
        raise InvalidArgumentError(path.name, str(error)) from error

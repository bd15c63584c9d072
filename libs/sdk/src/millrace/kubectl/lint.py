"""`kubectl millrace lint`: what the API server would refuse, told with the field's name, before anything is applied."""

from collections.abc import Iterator
from typing import Any

import yaml
from millrace_kit.cel_rules import check_rule
from millrace_kit.errors import InvalidArgumentError

from millrace.kubectl import schema
from millrace.kubectl.cluster import GROUP, KIND, Cluster, ClusterError
from millrace.kubectl.schema import Finding

MAX_DOCUMENTS = 1000


def lint(text: str, definition: schema.Schema) -> Iterator[Finding]:
    """Findings of every ModelDeployment in a file; other kinds are left to their owners.

    Args:
        text: YAML or JSON, any number of documents.
        definition: the CRD.
    """
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        yield Finding("", f"is not YAML: {' '.join(str(error).split())}")
        return
    if len(documents) > MAX_DOCUMENTS:
        yield Finding("", f"has {len(documents)} documents; {MAX_DOCUMENTS} are the most that are looked at")
        return
    mine = [(number, one) for number, one in enumerate(documents, 1) if one is not None]
    if not any(_is_ours(one) for _, one in mine):
        yield Finding("kind", f"no document is a {KIND} of {GROUP}")
    for number, document in mine:
        prefix = f"document {number}: " if len(mine) > 1 else ""
        for found in _document(document, definition):
            yield Finding(f"{prefix}{found.field}", found.message)


def on_server(text: str, cluster: Cluster) -> Iterator[Finding]:
    """What the API server of a cluster says to each ModelDeployment; nothing is kept there.

    Raises:
        ClusterError: it was not reached, or this user may not ask.
    """
    for document in yaml.safe_load_all(text):
        if not _is_ours(document):
            continue
        try:
            cluster.dry_run(document)
        except ClusterError as error:
            if error.status not in {400, 422}:
                raise
            yield from (Finding(field, message) for field, message in error.causes or (("", error.message),))


def _is_ours(document: Any) -> bool:
    if not isinstance(document, dict):
        return False
    return document.get("kind") == KIND and str(document.get("apiVersion", "")).startswith(f"{GROUP}/")


def _document(document: Any, definition: schema.Schema) -> Iterator[Finding]:
    if not isinstance(document, dict):
        yield Finding("", "is no object")
        return
    if not _is_ours(document):
        return
    version = str(document["apiVersion"]).partition("/")[2]
    wanted = schema.schema_of(definition, version)
    if wanted is None:
        yield Finding("apiVersion", f"version {version!r} is not known")
        return
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not metadata.get("name"):
        yield Finding("metadata.name", "is required")
    if "status" in document:
        yield Finding("status", "is the controller's; leave it out")
    yield from schema.findings({key: value for key, value in document.items() if key != "status"}, wanted)
    yield from _routing_rules(document)


def _routing_rules(document: dict[str, Any]) -> Iterator[Finding]:
    """What the controller would say of the rules' language, of which the CRD knows nothing."""
    found: Any = document
    for key in ("spec", "routing", "rules"):
        found = found.get(key) if isinstance(found, dict) else None
    for index, rule in enumerate(found if isinstance(found, list) else ()):
        when = rule.get("when") if isinstance(rule, dict) else None
        if isinstance(when, str) and when:
            field = f"spec.routing.rules[{index}].when"
            try:
                check_rule(when, field)
            except InvalidArgumentError as error:
                yield Finding(field, error.message.removeprefix(f"{field}: "))

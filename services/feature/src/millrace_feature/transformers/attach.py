"""From the tag of a feature service to what its vector holds.

A Feast FeatureService with the tag `millrace.transformers: encoding@3` (several: separated by commas) holds, in this order, its own
features without those the transformers take, and then the outputs of each transformer as `encoding__<output>`. Tags pass through Feast's
registry unchanged, and Feast's own tools see which views the service is made of. `name@<digest>` pins by content.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from millrace_kit.errors import InvalidArgumentError

from millrace_feature.plan import Transform
from millrace_feature.transformers.artifact import Artifact

FIELD = "feast_registry"
TRANSFORMERS_TAG = "millrace.transformers"
SELECTION_TAG = "millrace.selection"
"""`name@version` of a selection: of the vector only what it selected is kept."""
MAX_TRANSFORMERS = 16
_REFERENCE = re.compile(r"([a-z0-9][a-z0-9_-]{0,62})@([1-9]\d{0,8}|[0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted transformer as a service names it."""

    name: str
    artifact: Artifact


@dataclass(frozen=True, slots=True)
class Pinned:
    """Where references of tags lead; each raises NotFoundError for what does not exist."""

    transformer: Callable[[str, str], Artifact]
    """By name and version or digest."""
    selection: Callable[[str, str], tuple[str, Sequence[str]]]
    """(digest, selected features) by name and version or digest."""


class Attachments:
    """What the tags of one feature service name."""

    def __init__(self, service: str, tags: Mapping[str, str], pinned: Pinned | None) -> None:
        self._service = service
        self.digests: list[str] = []
        """Digest of everything named: definitions that name other content are other definitions."""
        references = [r.strip() for r in tags.get(TRANSFORMERS_TAG, "").split(",") if r.strip()]
        chosen = tags.get(SELECTION_TAG, "").strip()
        if (references or chosen) and pinned is None:
            raise self._wrong("names fitted content, which cannot be looked up here")
        if len(references) > MAX_TRANSFORMERS:
            raise self._wrong(f"names more than {MAX_TRANSFORMERS} transformers")
        self._fitted: list[Fitted] = []
        self._kept: frozenset[str] | None = None
        for reference in references:
            name, version = self._split(reference, TRANSFORMERS_TAG)
            if any(name == fitted.name for fitted in self._fitted):
                raise self._wrong(f"names transformer {name!r} twice")
            assert pinned is not None
            self._fitted.append(Fitted(name, pinned.transformer(name, version)))
            self.digests.append(self._fitted[-1].artifact.digest)
        if chosen:
            assert pinned is not None
            digest, features = pinned.selection(*self._split(chosen, SELECTION_TAG))
            self._kept = frozenset(features)
            self.digests.append(digest)

    @property
    def inputs(self) -> frozenset[str]:
        """`view__feature` of everything a transformer takes: it may be a text, and leaves the vector."""
        return frozenset(name for fitted in self._fitted for name in fitted.artifact.inputs)

    def applied(self, places: Mapping[str, tuple[str, str]], used: Sequence[str]) -> tuple[list[str], list[Transform]]:
        """(names of the vector, transforms to run last).

        Args:
            places: (view alias, feature) of the service's features by `alias__feature`, in vector order.
            used: names of its views and on-demand views.

        Raises:
            InvalidArgumentError: a transformer takes a feature the service does not hold, or a selection names one it does not have.
        """
        transforms: list[Transform] = []
        names = [name for name in places if name not in self.inputs]
        for fitted in self._fitted:
            if fitted.name in used:
                raise self._wrong(f"uses a view that is called like transformer {fitted.name!r}")
            if missing := [name for name in fitted.artifact.inputs if name not in places]:
                raise self._wrong(f"lacks {missing[0]!r}, which transformer {fitted.name!r} takes")
            inputs = tuple(places[name] for name in fitted.artifact.inputs)
            transforms.append(
                Transform(
                    fitted.name,
                    inputs,
                    (),
                    fitted.artifact.outputs,
                    singleton=False,
                    body=fitted.artifact.content,
                    fitted=True,
                )
            )
            names += [f"{fitted.name}__{output}" for output in fitted.artifact.outputs]
        if self._kept is not None:
            if missing := sorted(self._kept - set(names)):
                raise self._wrong(f"lacks {missing[0]!r}, which its selection holds")
            names = [name for name in names if name in self._kept]
        return names, transforms

    def _split(self, reference: str, tag: str) -> tuple[str, str]:
        found = _REFERENCE.fullmatch(reference)
        if found is None:
            raise self._wrong(f"has tag {tag} with {reference!r}, which is not of the form name@version")
        return found.group(1), found.group(2)

    def _wrong(self, problem: str) -> InvalidArgumentError:
        return InvalidArgumentError(FIELD, f"feature service {self._service!r} {problem}")

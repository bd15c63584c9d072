"""Who may use what was learned from a training set: who may read offline what the set was made of.

What is learned tells about the rows: categories, means, quantiles.
"""

import asyncio

import grpc.aio
from millrace_api.feature.v1 import feature_pb2
from millrace_kit.errors import NotFoundError

from millrace_feature.catalog import Catalog
from millrace_feature.versioning.access import Access, AccessDeniedError, Caller
from millrace_feature.versioning.servicer import caller_of


class Rights:
    """Asks the permissions in force about training sets."""

    def __init__(self, access: Access, catalog: Catalog) -> None:
        self._access = access
        self._catalog = catalog

    async def check(self, context: grpc.aio.ServicerContext, training_set: str) -> None:
        """Refuse unless the caller may read what the set was made of.

        Raises:
            AccessDeniedError: a feature or a service of it is not allowed.
            NotFoundError: there is no such set.
        """
        if not self._access.is_open:
            await asyncio.to_thread(self._check, caller_of(context), training_set)

    async def allowed(self, context: grpc.aio.ServicerContext, training_sets: set[str]) -> set[str]:
        """Those of the sets that the caller may read."""
        if self._access.is_open:
            return training_sets
        return await asyncio.to_thread(self._allowed, caller_of(context), training_sets)

    def _allowed(self, caller: Caller, training_sets: set[str]) -> set[str]:
        found = set()
        for digest in training_sets:
            try:
                self._check(caller, digest)
            except (AccessDeniedError, NotFoundError):
                continue
            found.add(digest)
        return found

    def _check(self, caller: Caller, training_set: str) -> None:
        request = feature_pb2.TrainingSet.FromString(self._catalog.training_set(training_set)).request
        if request.feature_service:
            self._access.check(caller, "read_offline", "FeatureService", request.feature_service)
        if request.features:
            self._access.check_features(caller, request.features)

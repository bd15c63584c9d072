"""Search among embeddings."""

from collections.abc import Mapping, Sequence

import grpc
from millrace_api.feature.v1 import feature_pb2 as feature
from millrace_api.feature.v1 import search_pb2 as search
from millrace_api.feature.v1.search_pb2_grpc import VectorServiceStub
from millrace_kit.errors import InvalidArgumentError

from millrace.transport import call
from millrace.values import Scalar, to_values

METRICS: Mapping[str, search.DistanceMetric.ValueType] = {
    "": search.DISTANCE_METRIC_UNSPECIFIED,
    "L2": search.DISTANCE_METRIC_L2,
    "cosine": search.DISTANCE_METRIC_COSINE,
    "inner_product": search.DISTANCE_METRIC_INNER_PRODUCT,
}


def search_request(
    view: str,
    query: Sequence[float],
    *,
    top_k: int = 10,
    feature_name: str = "",
    metric: str = "",
    features: Sequence[str] = (),
    with_vectors: bool = False,
    among: Sequence[Mapping[str, Scalar | None]] = (),
) -> search.SearchVectorsRequest:
    """The request of `VectorArea.search`, for the asyncio client.

    Raises:
        InvalidArgumentError: there is no such metric.
    """
    if metric not in METRICS:
        raise InvalidArgumentError("metric", f"{metric!r} is none of L2, cosine and inner_product")
    return search.SearchVectorsRequest(
        view=view,
        feature=feature_name,
        query=query,
        top_k=top_k,
        metric=METRICS[metric],
        features=features,
        with_vectors=with_vectors,
        among=[feature.EntityRow(values=to_values(row)) for row in among],
    )


class VectorArea:
    """The entities of a view whose embeddings are nearest to a vector."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = VectorServiceStub(channel)

    def search(
        self,
        view: str,
        query: Sequence[float],
        *,
        top_k: int = 10,
        feature_name: str = "",
        metric: str = "",
        features: Sequence[str] = (),
        with_vectors: bool = False,
        among: Sequence[Mapping[str, Scalar | None]] = (),
    ) -> search.SearchVectorsResponse:
        """The `top_k` entities nearest to `query`, nearest first, exactly.

        Args:
            view: a feature view.
            query: as many numbers as the embedding has.
            top_k: 1 to 1000.
            feature_name: the embedding; empty takes the view's only one with a `vector_index`.
            metric: `L2`, `cosine` or `inner_product`; empty takes the embedding's own.
            features: features of the view that hits carry.
            with_vectors: whether hits carry the embedding.
            among: join keys of the only entities to look at; empty looks at all.

        Raises:
            MillraceError: INVALID_ARGUMENT with the field's name; UNAVAILABLE while the vectors are being indexed.
        """
        request = search_request(
            view,
            query,
            top_k=top_k,
            feature_name=feature_name,
            metric=metric,
            features=features,
            with_vectors=with_vectors,
            among=among,
        )
        answer: search.SearchVectorsResponse = call(self.stub.SearchVectors, request)
        return answer

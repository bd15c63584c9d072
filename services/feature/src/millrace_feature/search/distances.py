"""Distances between a vector and many, and how far a quick product may be from the true one."""

import numpy as np
from numpy.typing import NDArray

from millrace_feature.plan import Metric
from millrace_feature.tiles import Floats
from millrace_feature.vectors import Numbers


def distances(vectors: Numbers, query: Floats, metric: Metric) -> Floats:
    """Distance of each row of `vectors` (shape [rows, length]) from `query`, in float64; the smaller, the nearer.

    L2 is Euclidean, cosine is 1 minus the cosine (1 where a vector is all zeros), inner_product is minus the product.
    """
    rows = np.asarray(vectors, np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if metric == "L2":
            found: Floats = np.sqrt(np.square(rows - query).sum(axis=1))
            return found
        products: Floats = (rows * query).sum(axis=1)
        if metric == "inner_product":
            return 0.0 - products
        # Two roots, whose product neither overflows nor vanishes where the square would.
        sizes = np.sqrt(np.square(rows).sum(axis=1)) * np.sqrt(np.square(query).sum())
        cosines: Floats = np.divide(products, sizes, out=np.zeros_like(products), where=sizes > 0)
        return 1.0 - cosines


def bounds(products: Floats, sizes: Floats, query: Floats, metric: Metric, unit: float) -> tuple[Floats, Floats]:
    """(lower, upper) bounds of something that grows with the distance.

    Args:
        products: inner products with the query as the processor summed them, in whatever order.
        sizes: Euclidean lengths of the vectors.
        query: the vector.
        metric: of the distance.
        unit: rounding unit of the products' numbers.
    """
    length = len(query)
    size = float(np.sqrt(np.square(query).sum()))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        # The bound of any order of summation, with room for the query's own rounding and for products too small for a number.
        slack = 1.01 * (length + 8) * unit * sizes * size + length * 2.0**-148
        if metric == "inner_product":
            scores = -products
        elif metric == "L2":
            scores = sizes * sizes - 2.0 * products + size * size
            slack = 2.0 * slack + 1e-12 * (sizes * sizes + size * size)
        else:
            scale = sizes * size
            scores = -np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
            slack = np.divide(slack, scale, out=np.zeros_like(products), where=scale > 0) + 1e-12
        lower, upper = scores - slack, scores + slack
    strange: NDArray[np.bool_] = ~(np.isfinite(lower) & np.isfinite(upper))
    if strange.any():  # an overflow says nothing
        lower[strange], upper[strange] = -np.inf, np.inf
    return lower, upper

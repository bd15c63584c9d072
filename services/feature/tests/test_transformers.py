"""Fitted transformers: the same answers as scikit-learn, the same bits for one row as for many, and nothing that depends on the process."""

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from millrace_feature.transformers.applying import fitted_folds, folds_of, transformed
from millrace_feature.transformers.artifact import SpecificationError, from_content, specification
from millrace_feature.transformers.fitting import fit

ROWS = 500
START = datetime(2024, 1, 1, tzinfo=UTC)
WORDS = "late gate crew fuel storm delay tow radar slot bag".split()  # noqa: SIM905


def training_table(rows: int = ROWS, seed: int = 7) -> pa.Table:
    rng = np.random.default_rng(seed)
    numbers = rng.normal(50, 12, rows)
    return pa.table(
        {
            "event_time": pa.array([START + timedelta(minutes=i) for i in range(rows)], pa.timestamp("us", tz="UTC")),
            "id": [f"r{i}" for i in range(rows)],
            "v__x": pa.array(numbers, mask=rng.random(rows) < 0.1),
            "v__y": rng.lognormal(1, 0.7, rows),
            "v__n": rng.integers(0, 4, rows).astype(float),
            "v__city": pa.array(
                rng.choice(["ams", "ber", "cph", "dub"], rows, p=[0.5, 0.3, 0.15, 0.05]), mask=rng.random(rows) < 0.05
            ),
            "v__note": [" ".join(rng.choice(WORDS, rng.integers(0, 9))) for _ in range(rows)],
            "v__at": pa.array(
                [START + timedelta(hours=int(h)) for h in rng.integers(0, 9000, rows)], pa.timestamp("us", tz="UTC")
            ),
            "late": rng.random(rows) < 0.3,
        }
    )


TABLE = training_table()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("set") / "data.parquet"
    pq.write_table(TABLE, place, row_group_size=128)
    return place


def fitted(path: Path, *steps):
    given = [
        specification(i, kind, inputs, output, parameters) for i, (kind, inputs, output, parameters) in enumerate(steps)
    ]
    return fit(path, given, training_set="0" * 64, join_column="id", label_column="late")


def columns(table: pa.Table = TABLE) -> dict[str, list]:
    return {name: table.column(name).to_pylist() for name in table.column_names}


def matrix(artifact, table: pa.Table = TABLE, folds=None) -> np.ndarray:
    found = transformed(artifact, columns(table), folds)
    return np.stack([found[name] for name in artifact.outputs], axis=1)


def numbers(*names: str) -> np.ndarray:
    return np.stack([np.asarray(TABLE.column(n).to_pandas(), float) for n in names], axis=1)


def same(found: np.ndarray, wanted, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(found, np.asarray(wanted, float), rtol=tolerance, atol=tolerance)


def test_scaling_is_that_of_scikit_learn(path) -> None:
    from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler

    both = numbers("v__x", "v__y")
    inputs = ["v__x", "v__y"]
    same(matrix(fitted(path, ("standard", inputs, "", {}))), StandardScaler().fit_transform(both))
    moved = MinMaxScaler((-1, 2), clip=True).fit_transform(both)
    same(matrix(fitted(path, ("minmax", inputs, "", {"low": -1, "high": 2, "clip": True}))), moved)
    robust = RobustScaler(quantile_range=(10, 90)).fit_transform(both)
    same(matrix(fitted(path, ("robust", inputs, "", {"low": 10, "high": 90}))), robust)


def test_powers_are_those_of_scikit_learn(path) -> None:
    from sklearn.preprocessing import PowerTransformer

    wanted = PowerTransformer("box-cox", standardize=False).fit(numbers("v__y"))
    artifact = fitted(path, ("boxcox", ["v__y"], "", {}))
    assert artifact.states[0]["inputs"][0]["power"] == pytest.approx(wanted.lambdas_[0], abs=1e-6)
    same(matrix(artifact), wanted.transform(numbers("v__y")), 1e-5)
    same(matrix(fitted(path, ("log", ["v__y"], "", {}))), np.log1p(numbers("v__y")))


@pytest.mark.parametrize("strategy", ["mean", "median", "most_frequent"])
def test_gaps_are_filled_as_by_scikit_learn(path, strategy) -> None:
    from sklearn.impute import SimpleImputer

    wanted = SimpleImputer(strategy=strategy, add_indicator=True).fit_transform(numbers("v__x"))
    same(matrix(fitted(path, ("impute", ["v__x"], "", {"strategy": strategy, "indicator": True}))), wanted)


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
@pytest.mark.parametrize("encode", ["ordinal", "onehot"])
def test_bins_are_those_of_scikit_learn(path, strategy, encode) -> None:
    from sklearn.preprocessing import KBinsDiscretizer

    peer = KBinsDiscretizer(
        7, strategy=strategy, encode="onehot-dense" if encode == "onehot" else encode,
        quantile_method="averaged_inverted_cdf", subsample=None,
    )  # fmt: skip
    found = matrix(fitted(path, ("bin", ["v__y"], "", {"strategy": strategy, "encode": encode, "bins": 7})))
    same(found, peer.fit_transform(numbers("v__y")))


def cities() -> np.ndarray:
    return np.array([[c if c is not None else np.nan] for c in TABLE.column("v__city").to_pylist()], object)


def test_categories_are_those_of_scikit_learn(path) -> None:
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder

    artifact = fitted(path, ("onehot", ["v__city"], "", {}))
    assert artifact.outputs == (
        "v__city=ams", "v__city=ber", "v__city=cph", "v__city=dub", "v__city=<missing>",
    )  # fmt: skip
    peer = OneHotEncoder(sparse_output=False, handle_unknown="ignore").fit(cities())
    same(matrix(artifact), peer.transform(cities()))
    seen = transformed(artifact, {"v__city": ["zrh", "ams"]})
    same(np.stack(list(seen.values()), axis=1), peer.transform([["zrh"], ["ams"]]))
    same(matrix(fitted(path, ("ordinal", ["v__city"], "", {}))), OrdinalEncoder().fit_transform(cities()))


def test_rare_categories_share_an_output(path) -> None:
    from sklearn.preprocessing import OneHotEncoder

    artifact = fitted(path, ("onehot", ["v__city"], "", {"min_rows": 60, "unknown": "other"}))
    peer = OneHotEncoder(sparse_output=False, handle_unknown="infrequent_if_exist", min_frequency=60).fit(cities())
    assert artifact.outputs[-1] == "v__city=<other>"
    same(matrix(artifact), peer.transform(cities()))
    same([[c[0] for c in transformed(artifact, {"v__city": ["zrh"]}).values()]], peer.transform([["zrh"]]))


@pytest.mark.parametrize("smooth", ["auto", 10.0, 0.0])
def test_target_encoding_is_that_of_scikit_learn(path, smooth) -> None:
    from sklearn.preprocessing import TargetEncoder

    label = np.asarray(TABLE.column("late").to_pylist(), int)
    artifact = fitted(path, ("target", ["v__city", "v__n"], "", {"smooth": smooth, "folds": 4}))
    both = np.column_stack([cities(), numbers("v__n").astype(object)])
    same(matrix(artifact), TargetEncoder(smooth=smooth, target_type="binary").fit(both, label).transform(both), 1e-9)
    # Out of fold: what scikit-learn gives when fitted without the row's fold.
    folds = fitted_folds(artifact, TABLE.column("id").to_pylist(), [artifact.origin.first_us] * ROWS)
    part = np.array(folds) % 4
    wanted = np.zeros((ROWS, 2))
    for fold in range(4):
        peer = TargetEncoder(smooth=smooth, target_type="binary").fit(both[part != fold], label[part != fold])
        wanted[part == fold] = peer.transform(both[part == fold])
    same(matrix(artifact, folds=folds), wanted, 1e-9)


def test_a_fitted_rows_own_label_does_not_reach_its_features(path, tmp_path) -> None:
    folds = [int(f) for f in folds_of(TABLE.column("id").to_pylist())]
    before = matrix(fitted(path, ("target", ["v__city"], "", {"smooth": 5.0})), folds=folds)
    for row in (0, 17, 400):
        label = TABLE.column("late").to_pylist()
        label[row] = not label[row]
        place = tmp_path / "other.parquet"
        pq.write_table(TABLE.set_column(TABLE.column_names.index("late"), "late", pa.array(label)), place)
        after = matrix(fitted(place, ("target", ["v__city"], "", {"smooth": 5.0})), folds=folds)
        same(after[row], before[row])
        assert not np.array_equal(after, before, equal_nan=True)


def test_hashing_is_that_of_scikit_learn(path) -> None:
    from sklearn.feature_extraction import FeatureHasher

    artifact = fitted(path, ("hash", ["v__city", "v__n"], "h", {"buckets": 16}))
    rows = [
        {"v__n": n, **({"v__city": c} if c is not None else {})}
        for c, n in zip(TABLE.column("v__city").to_pylist(), TABLE.column("v__n").to_pylist(), strict=True)
    ]
    same(matrix(artifact), FeatureHasher(16).transform(rows).toarray())


@pytest.mark.parametrize("parameters", [{}, {"ngrams": [1, 2], "norm": "none"}, {"analyzer": "char", "ngrams": [2, 3], "idf": False},
                                        {"signed": False, "sublinear": True}])  # fmt: skip
def test_texts_are_those_of_scikit_learn(path, parameters) -> None:
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    notes = TABLE.column("v__note").to_pylist()
    counts = HashingVectorizer(
        n_features=32, ngram_range=tuple(parameters.get("ngrams", (1, 1))), analyzer=parameters.get("analyzer", "word"),
        alternate_sign=parameters.get("signed", True), norm=None,
    ).transform(notes)  # fmt: skip
    counts.eliminate_zeros()
    norm = None if parameters.get("norm") == "none" else "l2"
    peer = TfidfTransformer(
        norm=norm, use_idf=parameters.get("idf", True), sublinear_tf=parameters.get("sublinear", False)
    )
    artifact = fitted(path, ("tfidf", ["v__note"], "", {"buckets": 32, **parameters}))
    same(matrix(artifact), peer.fit_transform(counts).toarray())


def test_dates_turn(path) -> None:
    artifact = fitted(path, ("date", ["v__at"], "at", {"parts": ["hour", "month"]}))
    found = transformed(artifact, {"v__at": [datetime(2024, 7, 1, 6, tzinfo=UTC), None, 0.0]})
    assert found["at_hour_sin"][0] == 1
    assert found["at_month_cos"][0] == -1
    assert math.isnan(found["at_hour_sin"][1])
    assert (found["at_hour_sin"][2], found["at_hour_cos"][2]) == (0, 1)


CHAIN = (
    ("impute", ["v__x"], "filled", {"strategy": "median"}),
    ("standard", ["filled"], "x", {}),
    ("bin", ["filled"], "x_bin", {"bins": 4, "encode": "onehot"}),
    ("boxcox", ["v__y"], "", {}),
    ("log", ["v__n"], "n_log", {"offset": 0.5}),
    ("frequency", ["v__city"], "city_share", {}),
    ("target", ["v__city"], "city_late", {}),
    ("standard", ["city_late"], "", {}),
    ("onehot", ["v__city"], "", {"unknown": "other"}),
    ("hash", ["v__city", "v__n"], "h", {"buckets": 8}),
    ("tfidf", ["v__note"], "", {"buckets": 16, "ngrams": [1, 2]}),
    ("date", ["v__at"], "", {"parts": ["minute", "hour", "day_of_week", "day_of_month", "month", "day_of_year"]}),
    ("keep", ["v__n"], "", {}),
)


@pytest.fixture(scope="module")
def chain(path):
    return fitted(path, *CHAIN)


def test_steps_take_what_earlier_steps_made(chain) -> None:
    assert chain.inputs == ("v__x", "v__y", "v__n", "v__city", "v__note", "v__at")
    assert "filled" not in chain.outputs
    assert chain.outputs[:6] == ("x", "x_bin_bin0", "x_bin_bin1", "x_bin_bin2", "x_bin_bin3", "v__y")
    found = transformed(chain, columns())
    assert not np.isnan(found["x"]).any()
    assert abs(found["x"].mean()) < 1e-9


def test_content_gives_the_same_transformer_and_the_same_bytes(chain, path) -> None:
    again = from_content(chain.content)
    assert (again.digest, again.outputs, again.inputs) == (chain.digest, chain.outputs, chain.inputs)
    assert fitted(path, *CHAIN).content == chain.content
    assert matrix(again).tobytes() == matrix(chain).tobytes()
    assert json.loads(chain.content)["origin"]["rows"] == ROWS


CELLS = st.fixed_dictionaries(
    {
        "v__x": st.none() | st.floats(-1e9, 1e9),
        "v__y": st.none() | st.floats(-5, 1e6),
        "v__n": st.none() | st.integers(0, 9),
        "v__city": st.none() | st.sampled_from(["ams", "ber", "zrh", ""]) | st.text(max_size=4),
        "v__note": st.none() | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join) | st.text(max_size=30),
        "v__at": st.none() | st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CELLS, min_size=1, max_size=40))
def test_one_row_and_many_rows_give_the_same_bits(chain, rows) -> None:
    together = transformed(chain, {name: [row[name] for row in rows] for name in chain.inputs})
    for i, row in enumerate(rows):
        alone = transformed(chain, {name: [row[name]] for name in chain.inputs})
        for name in chain.outputs:
            assert alone[name].tobytes() == together[name][i : i + 1].tobytes(), name


def test_batches_of_any_size_fit_the_same(path, tmp_path, monkeypatch) -> None:
    from millrace_feature.transformers import fitting

    steps = [s for s in CHAIN if s[0] in {"impute", "bin", "boxcox", "frequency", "onehot", "tfidf", "robust"}]
    whole = fitted(path, *steps)
    monkeypatch.setattr(fitting, "BATCH_ROWS", 37)
    assert fitted(path, *steps).content == whole.content


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (("scale", ["v__x"], "", {}), "none of"),
        (("standard", ["v__z"], "", {}), "'v__z' is no feature"),
        (("standard", ["v__city"], "", {}), "needs numbers, not str"),
        (("standard", ["v__x"], "", {"mean": True}), "mean"),
        (("tfidf", ["v__x"], "", {}), "needs texts"),
        (("boxcox", ["v__n"], "", {}), "all above 0"),
        (("bin", ["v__x"], "", {"edges": [3, 2]}), "ascend"),
        (("standard", ["late"], "", {}), "no feature"),
        (("hash", ["v__x", "v__y"], "", {}), "output name"),
        (("standard", [], "", {}), "1 to"),
    ],
)
def test_what_cannot_be_is_refused_by_step(path, step, problem) -> None:
    with pytest.raises(SpecificationError, match=problem):
        fitted(path, step)


def test_two_outputs_of_one_name_are_refused(path) -> None:
    with pytest.raises(SpecificationError, match="exists already"):
        fitted(path, ("standard", ["v__y"], "", {}), ("log", ["v__x"], "v__y", {}))


def test_an_unknown_category_can_be_an_error(path) -> None:
    artifact = fitted(path, ("onehot", ["v__city"], "", {"unknown": "error"}))
    with pytest.raises(ValueError, match="'zrh', which was not fitted"):
        transformed(artifact, {"v__city": ["ams", "zrh"]})

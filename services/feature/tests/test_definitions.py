"""Compiling Feast objects: what is accepted, what is refused and how, and what the hash depends on."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from millrace_feature.compiler import compile_registry
from millrace_feature.feast_files import write_feast_files
from millrace_feature.feast_import import import_feast
from millrace_feature.plan import WindowView, from_json, to_json
from millrace_kit.errors import InvalidArgumentError

SERVICE = Path(__file__).parents[1]


def test_the_flights_repository_compiles_in_the_order_it_names(flights_registry) -> None:
    definitions = compile_registry("flights", flights_registry).definitions
    (service,) = definitions.services
    assert service.features[:7] == tuple(
        f"schedule__{name}"
        for name in (
            "carrier_code", "origin_code", "dest_code", "minute_of_day", "day_of_week", "distance_miles", "scheduled_minutes",
        )
    )  # fmt: skip
    assert [f.split("__")[0] for f in service.features[7:16]] == ["origin_weather"] * 9
    assert service.features[16] == "origin_delays__arr_delay_mean_1h"
    assert service.join_keys == ("carrier", "dest", "origin", "tailnum")
    assert definitions.event_time("outcomes") == "landed_at"
    view = definitions.view("route_delays")
    assert isinstance(view, WindowView)
    assert (view.join_keys, view.hop_us, view.contract) == (("origin", "dest"), 300_000_000, "outcomes")


def test_plans_survive_being_stored(small_objects, make_registry) -> None:
    definitions = compile_registry("p", make_registry(small_objects())).definitions
    assert from_json(to_json(definitions)) == definitions


def test_the_hash_follows_meaning_not_bytes(small_objects, make_registry) -> None:
    objects = small_objects()
    first = compile_registry("p", make_registry(objects))
    assert compile_registry("p", make_registry(reversed(objects))).definitions.digest == first.definitions.digest
    # What is kept compiles to the same again.
    assert compile_registry("p", first.registry).definitions == first.definitions
    assert compile_registry("q", make_registry(objects)).definitions.digest != first.definitions.digest
    assert (
        compile_registry("p", make_registry(small_objects((10, 60, 65)))).definitions.digest != first.definitions.digest
    )


CODE = """
import sys
sys.path.insert(0, {tests!r})
import conftest
from pathlib import Path
from millrace_feature.compiler import compile_registry
text = Path(conftest.REPO).read_text().replace({old!r}, {new!r})
path = Path({folder!r}) / "features.py"
path.write_text(text)
print(compile_registry("flights", conftest.load_repo(path)[1]).definitions.digest)
"""


def digest_in_new_process(folder: Path, old: str = "", new: str = "") -> str:
    folder.mkdir()
    code = CODE.format(tests=str(SERVICE / "tests"), old=old or "\0", new=new, folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_the_hash_is_the_same_in_every_process_and_sees_a_changed_constant(tmp_path) -> None:
    first = digest_in_new_process(tmp_path / "a")
    assert digest_in_new_process(tmp_path / "b") == first
    # A constant the on-demand function uses, outside the function's own text.
    assert digest_in_new_process(tmp_path / "c", "MILES_PER_MINUTE = 7.7", "MILES_PER_MINUTE = 7.8") != first


def test_what_cannot_be_computed_is_named(small_objects, make_registry) -> None:
    import_feast()
    from datetime import timedelta

    from feast.aggregation import Aggregation

    def refused(change) -> str:
        objects = small_objects()
        change(next(o for o in objects if getattr(o, "name", "") == "by_user"))
        with pytest.raises(InvalidArgumentError) as caught:
            compile_registry("p", make_registry(objects))
        assert caught.value.field == "feast_registry"
        return caught.value.message

    def aggregation(**fields):
        base = {
            "column": "amount", "function": "count", "time_window": timedelta(minutes=10), "slide_interval": timedelta(minutes=5),
            "name": "amount_count_10m",
        }  # fmt: skip
        return lambda view: view.aggregations.__setitem__(0, Aggregation(**{**base, **fields}))

    assert "count_distinct" in refused(aggregation(function="count_distinct"))
    assert "whole slide_intervals" in refused(aggregation(time_window=timedelta(minutes=12)))
    assert "whole slide_intervals" in refused(aggregation(slide_interval=timedelta(minutes=3)))
    assert "approx_count_distinct" in refused(aggregation(function="p101"))
    assert "amount_count_10m" in refused(aggregation(function="approx_percentile(1.5)"))
    assert "millrace.head" in refused(lambda view: view.tags.update({"millrace.head": "7m"}))
    assert "millrace.late_by" in refused(lambda view: view.tags.update({"millrace.late_by": "soon"}))
    assert "created_timestamp_column" in refused(lambda view: view.tags.update({"millrace.late_by": "2h"}))
    assert "needs a column" in refused(aggregation(column=""))
    assert "no aggregation of that name" in refused(lambda view: view.aggregations.pop(0))
    assert "entities" in refused(lambda view: view.entities.clear())

    objects = [o for o in small_objects() if getattr(o, "name", "") != "newest"]
    with pytest.raises(InvalidArgumentError, match="newest"):
        compile_registry("p", make_registry(objects))


def test_functions_slides_heads_and_late_bounds_are_compiled(small_objects, make_registry) -> None:
    import_feast()
    from datetime import timedelta

    from feast.aggregation import Aggregation

    minutes = {"p99.9": 15, "approx_percentile(0.5)": 10, "stddev": 30, "approx_count_distinct": 60}
    objects = small_objects()
    view = next(o for o in objects if getattr(o, "name", "") == "by_both")
    view.aggregations = [
        Aggregation(column="amount", function=f, time_window=timedelta(minutes=m), name=f"amount_{n}_10m")
        for (f, m), n in zip(minutes.items(), ("count", "sum", "mean", "min"), strict=True)
    ]  # no slide: windows that tumble
    view.features = [f for f in view.features if f.name != "amount_max_10m"]
    objects = [o for o in objects if type(o).__name__ != "FeatureService"]
    view.tags = {"millrace.head": "1m", "millrace.late_by": "2h"}
    view.stream_source.batch_source.created_timestamp_column = "came"
    view.batch_source.created_timestamp_column = "came"
    compiled = compile_registry("p", make_registry(objects)).definitions.view("by_both")
    assert isinstance(compiled, WindowView)
    assert {a.function: a.slide_us for a in compiled.aggregates} == {
        "p99.9": 900_000_000, "p50": 600_000_000, "std": 1_800_000_000, "distinct": 3_600_000_000
    }  # fmt: skip
    assert (compiled.hop_us, compiled.head_us) == (300_000_000, 60_000_000)
    assert (compiled.arrived_at, compiled.late_us) == ("came", 7_200_000_000)


def test_a_text_feature_is_refused_in_the_vector(small_objects, make_registry) -> None:
    import_feast()
    from feast import FeatureService

    objects = small_objects()
    newest = next(o for o in objects if getattr(o, "name", "") == "newest")
    with pytest.raises(InvalidArgumentError, match=r"newest\.note"):
        compile_registry("p", make_registry([*objects, FeatureService(name="other", features=[newest[["note"]]])]))


def test_an_alias_and_renamed_join_keys(small_objects, make_registry) -> None:
    import_feast()
    from feast import FeatureService

    objects = small_objects()
    newest = next(o for o in objects if getattr(o, "name", "") == "newest")[["amount"]]
    twice = FeatureService(
        name="twice", features=[newest, newest.with_name("friend").with_join_key_map({"user": "friend_id"})]
    )
    definitions = compile_registry("p", make_registry([*objects, twice])).definitions
    service = definitions.service("twice")
    assert service is not None
    assert service.features == ("newest__amount", "friend__amount")
    assert service.join_keys == ("friend_id", "user")
    assert dict(definitions.key_types)["friend_id"] == "string"


def test_feast_reads_what_is_written(tmp_path, flights_registry) -> None:
    compiled = compile_registry("flights", flights_registry)
    write_feast_files(tmp_path, "flights", compiled.registry)
    from feast.infra.registry.registry import Registry
    from feast.repo_config import RegistryConfig

    registry = Registry("flights", RegistryConfig(path=str(tmp_path / "registry.db")), None)
    assert registry.get_feature_service("flight_delay", "flights").name == "flight_delay"
    names = {view.name for view in registry.list_stream_feature_views("flights")}
    assert names == {v.name for v in compiled.definitions.views} - {"origin_weather"}


def test_groups_change_with_what_they_hold_only(small_objects, make_registry) -> None:
    view = compile_registry("p", make_registry(small_objects())).definitions.view("by_user")
    assert isinstance(view, WindowView)
    assert dataclasses.replace(view, name="other").group == view.group
    assert dataclasses.replace(view, hop_us=60_000_000).group != view.group
    assert dataclasses.replace(view, join_keys=("shop",)).group != view.group

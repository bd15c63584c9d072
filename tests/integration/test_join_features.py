"""Records into two contracts, a join, a windowed view on its rows: the value served is the value of the training set."""

import asyncio
import random
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from click.testing import CliRunner
from millrace import Client, Endpoints
from millrace.cli.main import main
from millrace.feast_repo import registry_from_repo
from millrace.values import to_timestamp, to_values
from millrace_api.feature.v1 import feature_pb2
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_feature.app import build as build_feature
from millrace_feature.settings import FeatureSettings
from millrace_ingestion.app import build as build_ingestion
from millrace_ingestion.settings import IngestionSettings
from millrace_kit.clock import FakeClock
from millrace_kit.server import running
from millrace_kit.settings import BusSettings

from tests.stack import eventually

START = datetime(2026, 3, 1, tzinfo=UTC)
REPO = """
from datetime import timedelta
from feast import Entity, FeatureService, Field, FileSource, PushSource, StreamFeatureView, ValueType
from feast.aggregation import Aggregation
from feast.types import Float64, Int64, String

lake = FileSource(name="seen_lake", path="millrace://seen", timestamp_field="joined_at")
seen = PushSource(name="seen", batch_source=lake)
moments = FileSource(name="moments", path="millrace://moments", timestamp_field="at")
user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
interest = StreamFeatureView(
    name="interest", entities=[user], source=seen, timestamp_field="joined_at",
    schema=[
        Field(name="user", dtype=String), Field(name="shown_6h", dtype=Int64), Field(name="clicked_6h", dtype=Float64),
        Field(name="spent_6h", dtype=Float64),
    ],
    aggregations=[
        Aggregation(column="matched", function=function, time_window=timedelta(hours=6), slide_interval=timedelta(minutes=5), name=name)
        for function, name in (("count", "shown_6h"), ("sum", "clicked_6h"))
    ] + [
        Aggregation(column="price", function="sum", time_window=timedelta(hours=6), slide_interval=timedelta(minutes=5), name="spent_6h")
    ],
)
interests = FeatureService(name="interests", features=[interest])
"""
JOIN = {
    "name": "seen",
    "contract": "seen",
    "join": {
        "kind": "JOIN_KIND_LEFT", "left": "impressions", "right": "clicks", "keys": [{"left": "impression_id"}],
        "afterS": 1800, "latenessS": 60,
    },
}  # fmt: skip


def contract(name: str, event_id: str, *more: pb.Column) -> pb.DataContract:
    names = dict.fromkeys([event_id, "impression_id", "user"])
    columns = [pb.Column(name=one, type=pb.COLUMN_TYPE_STRING) for one in names]
    columns.append(pb.Column(name="at", type=pb.COLUMN_TYPE_TIMESTAMP))
    return pb.DataContract(
        name=name, columns=[*columns, *more], event_id_column=event_id, event_time_column="at", key_columns=["user"]
    )


CONTRACTS = [
    contract("impressions", "impression_id"),
    contract("clicks", "click_id", pb.Column(name="price", type=pb.COLUMN_TYPE_DOUBLE)),
    contract("moments", "moment_id", pb.Column(name="bought", type=pb.COLUMN_TYPE_BOOL)),
]


def events() -> tuple[list[dict], list[dict]]:
    draw = random.Random(7)
    impressions = [
        {"impression_id": f"i{n}", "user": f"u{n % 5}", "at": START + timedelta(minutes=n)} for n in range(600)
    ]
    clicks = [
        {
            "click_id": f"c{one['impression_id']}",
            "impression_id": one["impression_id"],
            "user": one["user"],
            # Some too late for the bound: their impression stays without a click.
            "at": one["at"] + timedelta(seconds=draw.randrange(1, 2200)),
            "price": float(draw.randrange(1, 9)),
        }
        for one in impressions
        if draw.random() < 0.4
    ]
    return impressions, sorted(clicks, key=lambda one: one["at"])


async def test_a_view_on_a_join_has_one_value_online_and_offline(tmp_path: Path) -> None:
    bus = BusSettings(path=str(tmp_path / "bus.sqlite"))
    places = {"lake_url": str(tmp_path / "lake"), "bus": bus, "drain_s": 0}
    ingestion = IngestionSettings(state_dir=str(tmp_path / "ingestion"), source_poll_s=0.1, **places)
    feature = FeatureSettings(
        state_dir=str(tmp_path / "feature"), training_sets_url=str(tmp_path / "sets"), fetch_wait_s=0.02,
        default_deadline_s=120, **places,
    )  # fmt: skip
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "feature_store.yaml").write_text("project: shop\nprovider: local\nregistry: r.db\n")
    (repo / "features.py").write_text(REPO)
    (tmp_path / "join.yaml").write_text(yaml.safe_dump(JOIN))
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(running(await build_ingestion(ingestion), ingestion))
        second = await stack.enter_async_context(running(await build_feature(feature, clock=FakeClock()), feature))
        environment = {"MILLRACE_INGESTION_ADDRESS": first, "MILLRACE_FEATURE_ADDRESS": second}
        await asyncio.to_thread(follow, tmp_path, environment)


def follow(folder: Path, environment: dict[str, str]) -> None:
    impressions, clicks = events()
    with Client(Endpoints.from_environment(environment)) as client:
        for one in CONTRACTS:
            client.ingestion.register_contract(one)
        added = CliRunner().invoke(main, ["ingest", "sources", "add", "-f", str(folder / "join.yaml")], env=environment)
        assert (added.exit_code, added.stdout) == (0, "source/seen registered (version 1)\n"), added.output
        client.features.apply(*registry_from_repo(folder / "repo"))
        for part in range(4):
            for name, rows in (("impressions", impressions), ("clicks", clicks)):
                size = len(rows) // 4 + 1
                list(
                    client.ingestion.write_table(
                        name, pa.Table.from_pylist(rows[part * size :][:size]), source=f"app{part}"
                    )
                )
        ends = [max(one["at"] for one in rows) for rows in (impressions, clicks)]
        over = min(ends) - timedelta(seconds=1860)
        last = max(one["at"] for one in impressions if one["at"] <= over)

        def settled() -> bool | None:
            (found,) = client.sources.list("seen")
            caught_up = found.status.lag == 0 and found.status.join.settled.ToDatetime(UTC) >= last
            landed = client.ingestion.table("seen").rows == found.status.accepted
            return (caught_up and landed) or None

        eventually("the join has settled", settled)
        listed = CliRunner().invoke(main, ["ingest", "sources", "list", "seen"], env=environment)
        assert "impressions" in listed.stdout
        assert "join" in listed.stdout

        def followed() -> bool | None:
            (found,) = [one for one in client.features.progress().contracts if one.contract == "seen"]
            return (found.end_offset > 0 and found.next_offset >= found.end_offset) or None

        eventually("the rows are served", followed)
        at = START + timedelta(hours=7)
        moments = [
            {"moment_id": f"m{n}", "impression_id": f"m{n}", "user": f"u{n}", "at": at, "bought": bool(n % 2)}
            for n in range(5)
        ]
        list(client.ingestion.write_table("moments", pa.Table.from_pylist(moments), source="app"))
        built = client.features.build_training_set(
            feature_service="interests", entity_contract="moments", label_contract="moments",
            join_column="moment_id", label_column="bought",
        )  # fmt: skip
        rows = client.features.load_training_set(built).to_pylist()
        assert len(rows) == len(moments)
        online = client.features.online(
            feature_pb2.GetOnlineFeaturesRequest(
                feature_service="interests",
                rows=[feature_pb2.EntityRow(values=to_values({"user": one["user"]})) for one in moments],
                event_time=to_timestamp(at),
            )
        )
        names = list(built.feature_names)
        for moment, vector in zip(moments, online.vectors, strict=True):
            (offline,) = [row for row in rows if row["moment_id"] == moment["moment_id"]]
            served = dict(zip(names, vector.values, strict=True))
            assert served == {name: offline[name] for name in names}
            assert served == expected(impressions, clicks, moment["user"], at)


def expected(impressions: list[dict], clicks: list[dict], user: str, at: datetime) -> dict[str, float]:
    """By a plain loop over what was written."""
    partner = {one["impression_id"]: one for one in clicks}
    bound = timedelta(seconds=1800)
    shown = clicked = spent = 0.0
    for one in impressions:
        click = partner.get(one["impression_id"])
        found = click is not None and click["at"] <= one["at"] + bound
        known = click["at"] if found else one["at"] + bound
        if one["user"] == user and at - timedelta(hours=6) <= known < at:
            shown, clicked = shown + 1, clicked + found
            spent += click["price"] if found else 0.0
    assert 0 < clicked < shown
    return {
        "interest__shown_6h": shown,
        "interest__clicked_6h": pytest.approx(clicked),
        "interest__spent_6h": pytest.approx(spent),
    }

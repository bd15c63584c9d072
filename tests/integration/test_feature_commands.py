"""`millrace features fit|transformers|select|selections` against a real feature service and a real Feast repository."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
from click.testing import CliRunner, Result
from deltalake import write_deltalake
from millrace import Client, Endpoints
from millrace.cli.main import main
from millrace.feast_repo import registry_from_repo
from millrace_feature.app import build
from millrace_feature.settings import FeatureSettings
from millrace_kit.clock import FakeClock
from millrace_kit.server import running
from millrace_kit.settings import BusSettings

REPO = """
from datetime import timedelta
from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, String

orders = FileSource(name="orders", path="millrace://orders", timestamp_field="at")
returns = FileSource(name="returns", path="millrace://returns", timestamp_field="at")
user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
last_order = FeatureView(
    name="last_order", entities=[user], ttl=timedelta(days=9), source=orders,
    schema=[Field(name="user", dtype=String), Field(name="shop", dtype=String), Field(name="price", dtype=Float64)],
)
plain = FeatureService(name="plain", features=[last_order[["price"]]])
"""
TAGGED = '{} = FeatureService(name="{}", features=[last_order], tags={})\n'
FIT = """
name: encoding
training: {entity_contract: orders, label_contract: returns, join_column: order_id, label_column: back}
steps:
  - {kind: onehot, inputs: last_order__shop, max_categories: 8}
  - {kind: standard, inputs: [last_order__price]}
"""


def land(lake: Path) -> None:
    draw, start = random.Random(1), datetime(2024, 1, 1, tzinfo=UTC)
    orders = [
        {"order_id": f"o{i}", "at": start + timedelta(minutes=i), "user": f"u{i % 9}", "price": draw.uniform(1, 90),
         "shop": draw.choice(["books", "shoes", "toys"])}
        for i in range(400)
    ]  # fmt: skip
    returns = [
        {
            "order_id": o["order_id"],
            "at": o["at"] + timedelta(days=1),
            "back": (o["shop"] == "shoes") != (draw.random() < 0.1),
        }
        for o in orders
    ]
    write_deltalake(str(lake / "orders"), pa.Table.from_pylist(orders))
    write_deltalake(str(lake / "returns"), pa.Table.from_pylist(returns))


async def test_from_a_repository_to_a_narrow_encoded_vector(tmp_path: Path) -> None:
    land(tmp_path / "lake")
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "feature_store.yaml").write_text("project: shop\nprovider: local\nregistry: r.db\n")
    (repo / "features.py").write_text(REPO)
    (tmp_path / "fit.yaml").write_text(FIT)
    settings = FeatureSettings(
        state_dir=str(tmp_path / "state"), lake_url=str(tmp_path / "lake"), training_sets_url=str(tmp_path / "sets"),
        bus=BusSettings(path=str(tmp_path / "bus.sqlite")), fetch_wait_s=0.02, drain_s=0, default_deadline_s=120,
    )  # fmt: skip
    async with running(await build(settings, clock=FakeClock()), settings) as address:

        def cli(*arguments: str) -> Result:
            environment = {"MILLRACE_FEATURE_ADDRESS": address}
            return CliRunner().invoke(main, ["features", *arguments], env=environment)

        def run() -> None:
            with Client(Endpoints.from_environment({"MILLRACE_FEATURE_ADDRESS": address})) as client:
                client.features.apply(*registry_from_repo(repo))
                fitted = cli("fit", str(tmp_path / "fit.yaml"))
                assert (fitted.exit_code, fitted.stdout) == (0, "encoding@1\n"), fitted.output
                assert cli("fit", str(tmp_path / "fit.yaml")).stdout == "encoding@1\n"
                assert "onehot, standard" in cli("transformers").stdout
                with (repo / "features.py").open("a") as file:
                    file.write(TAGGED.format("full", "full", {"millrace.transformers": "encoding@1"}))
                client.features.apply(*registry_from_repo(repo))
                built = client.features.build_training_set(
                    feature_service="full", entity_contract="orders", label_contract="returns",
                    join_column="order_id", label_column="back",
                )  # fmt: skip
                assert built.feature_names[0] == "encoding__last_order__shop=books"
                chosen = cli("select", "few", "--training-set", built.digest, "--keep", "1")
                assert chosen.exit_code == 0, chosen.output
                first = chosen.stdout.splitlines()[1].split()
                assert first[:2] == ["encoding__last_order__shop=shoes", "yes"]
                assert "few@1" in cli("selections").stdout
                assert "not among the best 1" in cli("selections", "few", "--version", "1").stdout
                with (repo / "features.py").open("a") as file:
                    tags = {"millrace.transformers": "encoding@1", "millrace.selection": "few@1"}
                    file.write(TAGGED.format("narrow", "narrow", tags))
                client.features.apply(*registry_from_repo(repo))
                services = {s.name: list(s.features) for s in client.features.definitions().feature_services}
                assert services["narrow"] == ["encoding__last_order__shop=shoes"]
                wrong = cli("select", "few", "--training-set", "0" * 64)
                assert wrong.exit_code == 1
                assert "training set" in wrong.output

        await asyncio.to_thread(run)

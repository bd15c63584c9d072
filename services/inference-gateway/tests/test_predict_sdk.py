"""Predictions through the SDK and the command line, many at once."""

import asyncio
import json

import models
import pytest
from gateway import MODEL, arm, gateway, route
from millrace_api.prediction.v1 import prediction_pb2

pytest.importorskip("millrace", reason="the SDK asks")


async def test_the_sdk_and_the_command_line() -> None:
    from click.testing import CliRunner
    from millrace import Client, aio
    from millrace.cli import main
    from millrace.endpoints import Endpoints

    async with gateway() as (g, rollout), models.serving(models.Model("1.0.0")) as address:
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        at = Endpoints.from_environment({"MILLRACE_GATEWAY_ADDRESS": g.public})
        rows: list[dict[str, float]] = [{"a": 1.0}, {"b": 1.0}, {"a": 3.0, "c": 4.0}]

        def shown(answers: dict[int, object]) -> list[object]:
            found = (answers[index] for index in range(3))
            return [list(a.outputs) if isinstance(a, prediction_pb2.PredictResponse) else a.reason for a in found]

        wanted = [[1.0], "INVALID_FIELD", [7.0]]
        async with aio.Client(at) as client:
            assert shown(dict(enumerate(await client.predict_batch(MODEL, rows, subjects=["x", "y", "z"])))) == wanted
            assert shown({index: answer async for index, answer in client.predict_stream(MODEL, rows)}) == wanted
            with pytest.raises(ValueError, match="1 subjects for 3 rows"):
                await client.predict_batch(MODEL, rows, subjects=["x"])

        def blocking() -> None:
            with Client(at) as client:
                assert shown(dict(enumerate(client.predictions.predict_batch(MODEL, rows)))) == wanted
                assert shown(dict(client.predictions.stream(MODEL, rows))) == wanted

        await asyncio.to_thread(blocking)

        def command(*arguments: str, given: str = ""):
            environment = {"MILLRACE_GATEWAY_ADDRESS": g.public}
            return CliRunner().invoke(main, ["predict", MODEL, *arguments], input=given, env=environment)

        one = await asyncio.to_thread(command, "-i", "a=2.5", "-o", "json")
        assert (one.exit_code, json.loads(one.stdout)["outputs"]) == (0, [2.5])
        many = await asyncio.to_thread(command, "--rows", "-", given="\n".join(map(json.dumps, rows)))
        assert many.exit_code == 1
        assert "b had no value" in many.stdout
        assert "inputs.a: join key" in many.stdout
        assert (await asyncio.to_thread(command)).exit_code == 2

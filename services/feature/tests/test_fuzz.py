"""Random bytes to every method: refused or answered, never a crash, never INTERNAL."""

import random

import grpc
import grpc.aio

METHODS = (
    "ApplyDefinitions",
    "GetDefinitions",
    "GetOnlineFeatures",
    "BuildTrainingSet",
    "GetTrainingSet",
    "GetProgress",
)
FINE = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAVAILABLE,
}


async def test_random_messages(world, small_objects, make_registry) -> None:
    from millrace_api.feature.v1 import feature_pb2 as pb

    chance = random.Random(5)
    registry = make_registry(small_objects())
    async with world.serve() as stub:
        for number in range(240):
            if number == 120:
                await stub.ApplyDefinitions(pb.ApplyDefinitionsRequest(project="p", feast_registry=registry))
            name = METHODS[number % len(METHODS)]
            kind = getattr(pb, f"{name}Request")
            request = kind()
            for field in kind.DESCRIPTOR.fields:
                if field.type == field.TYPE_STRING and not field.is_repeated and chance.random() < 0.7:
                    setattr(request, field.name, chance.choice(["main", "p", "events", "\0", "x" * 5000, "é"]))
            if name == "ApplyDefinitions":
                broken = bytearray(registry)
                for _ in range(chance.randrange(1, 30)):
                    broken[chance.randrange(len(broken) // 4)] = chance.randrange(256)
                request.project = chance.choice(["p", "", "X Y"])
                request.feast_registry = chance.choice(
                    [bytes(broken[: chance.randrange(2000)]), chance.randbytes(40), b""]
                )
            if name == "GetOnlineFeatures":
                for _ in range(chance.randrange(3)):
                    row = request.rows.add()
                    for key in ("user", "shop", "limit", "asked_at"):
                        if chance.random() < 0.8:
                            setattr(row.values[key], *chance.choice(
                                [("string_value", "u"), ("int64_value", -1 << 63), ("double_value", float("inf")), ("bool_value", True)]
                            ))  # fmt: skip
                request.event_time.seconds = chance.choice([0, -(1 << 62), 1 << 40, 1_367_409_600, -62135596800])
                request.event_time.nanos = chance.choice([0, -5, 2_000_000_000])
            try:
                await getattr(stub, name)(request)
            except grpc.aio.AioRpcError as error:
                if error.code() not in FINE:
                    raise

"""A caller's key by baggage: one arm for it, by whichever protocol and service the call comes."""

import asyncio
from urllib.parse import quote

import models
from gateway import CANDIDATE, MODEL, arm, gateway, route
from hypothesis import given
from hypothesis import strategies as st
from load import infer_request
from millrace_api.prediction.v1 import prediction_pb2
from millrace_inference_gateway.caller_key import BAGGAGE, key_of, with_key

printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64)
member = st.from_regex(r"[a-z]{1,5}=[a-z0-9]{0,5}(;p=1)?", fullmatch=True)


@given(st.lists(member, max_size=4), printable, st.integers(0, 4))
def test_a_key_comes_back_and_other_members_stay(others: list[str], key: str, place: int) -> None:
    found = with_key(",".join(others).encode(), key)
    assert key_of(found) == key
    assert with_key(found, key) == found
    assert found.decode().split(",")[: len(others)] == others
    moved = [*others[:place], f" millrace.sticky = {quote(key, safe='')};x=y", *others[place:]]
    assert key_of(",".join(moved).encode()) == key
    assert key_of(with_key(",".join(moved).encode(), "other")) == "other"


def test_what_is_no_key_is_none() -> None:
    for text in (
        b"",
        b"millrace.sticky=",
        b"millrace.sticky=%00",
        b"a=b",
        b"xmillrace.sticky=1",
        b"\xff=,=",
        b"millrace.sticky=" + b"a" * 257,
    ):
        assert key_of(text) == ""


async def test_one_arm_by_every_way() -> None:
    one, two = models.Model("1.0.0"), models.Model("1.1.0")
    async with gateway() as (g, rollout), models.serving(one) as first, models.serving(two) as second:
        arms = [arm("1.0.0", first, weight=50), arm("1.1.0", second, weight=50, role=CANDIDATE)]
        await rollout.in_force(rollout.set(route(*arms)))
        infer = g.public_channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", request_serializer=lambda m: m.SerializeToString()
        )

        async def by_v2(*metadata: tuple[str, str]) -> str:
            pending = infer(infer_request(), metadata=metadata, timeout=5)
            await pending
            return dict(await pending.initial_metadata())["x-millrace-version"]

        async def by_predict(sticky: str, *metadata: tuple[str, str]) -> str:
            asked = prediction_pb2.PredictRequest(model=MODEL, sticky_key=sticky, subject="somebody")
            asked.inputs["a"].double_value = 1.0
            return (await g.predictions.Predict(asked, metadata=metadata, timeout=5)).version

        seen = set()
        for number in range(24):
            key = f"user {number}/ä"[: 8 + number % 3] if number % 4 else f"u{number}"
            key = key.encode("ascii", "ignore").decode().strip()
            baggage = ("baggage", f"a=b, millrace.sticky={quote(key, safe='')};p=1,c=d")
            found = await asyncio.gather(
                by_v2(("x-user", key)),
                by_v2(baggage),
                by_v2(baggage, ("x-millrace-model", MODEL)),
                by_predict(key),
                by_predict("", baggage),
                # What the call says itself comes first.
                by_v2(("x-user", key), ("baggage", "millrace.sticky=other")),
                by_predict(key, ("baggage", "millrace.sticky=other")),
            )
            assert len(set(found)) == 1, (key, found)
            seen.update(found)
        assert seen == {"1.0.0", "1.1.0"}
        # And on to the model server, for whatever that calls.
        await by_predict("k1")
        served = [m.metadata["baggage"] for m in (one, two) if "millrace.sticky=k1" in m.metadata.get("baggage", "")]
        assert served == ["millrace.sticky=k1"]
        assert BAGGAGE == b"baggage"

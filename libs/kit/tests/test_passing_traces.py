"""Traces in a process that exports none."""

import pytest
from millrace_kit.passing_traces import PassingTracers
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

PARENT = "00-" + "a" * 32 + "-" + "b" * 16


def passed_on() -> str:
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier["traceparent"]


@pytest.mark.parametrize("flags", ["01", "00"])
def test_a_callers_trace_and_its_decision_are_passed_on(flags: str) -> None:
    tracer = PassingTracers(1.0).get_tracer("test")
    context = TraceContextTextMapPropagator().extract({"traceparent": f"{PARENT}-{flags}", "tracestate": "a=b"})
    with tracer.start_as_current_span("call", context) as span:
        version, trace_id, span_id, found = passed_on().split("-")
        assert (version, trace_id, found) == ("00", "a" * 32, flags)
        assert span_id != "b" * 16
        assert span.get_span_context().trace_state["a"] == "b"
        with tracer.start_as_current_span("inner"):
            assert passed_on().split("-")[1:3] != [trace_id, span_id]
            assert passed_on().split("-")[1] == trace_id
        assert passed_on().split("-")[2] == span_id
    assert not trace.get_current_span().get_span_context().is_valid


def test_the_share_of_new_traces_is_what_others_are_told() -> None:
    def recorded(ratio: float) -> int:
        tracer = PassingTracers(ratio).get_tracer("test")
        return sum(tracer.start_span("x").get_span_context().trace_flags.sampled for _ in range(400))

    assert (recorded(0.0), recorded(1.0)) == (0, 400)
    assert 100 < recorded(0.5) < 300


def test_errors_pass_through_and_end_the_span() -> None:
    tracer = PassingTracers(1.0).get_tracer("test")
    with pytest.raises(KeyError), tracer.start_as_current_span("call"):
        raise KeyError("x")
    assert not trace.get_current_span().get_span_context().is_valid

"""What `millrace predict` notes beside an answer."""

from google.protobuf import json_format
from millrace.cli.predictions import _cells
from millrace_api.prediction.v1.prediction_pb2 import PredictResponse


def test_an_answer_says_who_had_a_part_in_it() -> None:
    fields = {
        "predictionId": "p",
        "version": "1.0.0",
        "outputs": [0.25],
        "parts": [{"model": "large", "version": "2.1.0", "predictionId": "q", "outputs": [0.5]}],
        "leftOutModels": ["expert"],
        "missingFeatures": ["a", "b"],
        "defaultedFeatures": ["b"],
    }
    answer = json_format.ParseDict(fields, PredictResponse())
    assert _cells(answer) == (
        "0.25",
        "1.0.0",
        "p",
        "a had no value; b has its default; with large 2.1.0; without expert, which did not answer",
    )

"""What ingestion reads by itself, and where a producer's own batches ended."""

from collections.abc import Sequence
from pathlib import Path

import grpc
import yaml
from google.protobuf.json_format import ParseDict, ParseError
from millrace_api.ingestion.v1 import sources_pb2 as pb
from millrace_api.ingestion.v1.sources_pb2_grpc import SourceServiceStub
from millrace_kit.errors import InvalidArgumentError

from millrace.transport import call


def load_source(path: Path) -> pb.Source:
    """Read a source from a YAML file: the fields of `Source`.

    Raises:
        InvalidArgumentError: the file is no source; the message names the file and the field.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InvalidArgumentError(path.name, f"is no YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidArgumentError(path.name, "needs a mapping with name, contract, and kafka, files or join")
    try:
        return ParseDict(raw, pb.Source())
    except ParseError as error:
        raise InvalidArgumentError(path.name, str(error)) from None


class SourcesArea:
    """Registers sources and looks after them."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = SourceServiceStub(channel)

    def register(self, source: pb.Source) -> pb.RegisterSourceResponse:
        """Register a source, or find the equal one; it starts at once."""
        answer: pb.RegisterSourceResponse = call(self.stub.RegisterSource, pb.RegisterSourceRequest(source=source))
        return answer

    def list(self, name: str = "") -> Sequence[pb.SourceWithStatus]:
        """Every source, or the one of that name, with how it is doing."""
        answer: pb.ListSourcesResponse = call(self.stub.ListSources, pb.ListSourcesRequest(name=name))
        return answer.sources

    def pause(self, name: str) -> None:
        """Stop reading until it is resumed."""
        call(self.stub.PauseSource, pb.PauseSourceRequest(name=name))

    def resume(self, name: str) -> None:
        """Read on; what failed is tried again."""
        call(self.stub.ResumeSource, pb.ResumeSourceRequest(name=name))

    def run(self, name: str) -> None:
        """Look for new files now."""
        call(self.stub.RunSource, pb.RunSourceRequest(name=name))

    def remove(self, name: str) -> None:
        """Forget a source; what it landed stays."""
        call(self.stub.RemoveSource, pb.RemoveSourceRequest(name=name))

    def position(self, contract: str, source: str) -> int:
        """Offset of the last batch of a producer that landed; 0 for none."""
        answer: pb.GetPositionResponse = call(
            self.stub.GetPosition, pb.GetPositionRequest(contract=contract, source=source)
        )
        return answer.offset

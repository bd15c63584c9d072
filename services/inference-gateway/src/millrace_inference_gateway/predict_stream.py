"""Many predictions on one call, several under way at once."""

import asyncio
from collections.abc import AsyncIterator

from millrace_api.prediction.v1 import prediction_pb2
from millrace_kit.errors import MillraceError

from millrace_inference_gateway.convert import failure_of
from millrace_inference_gateway.predict_rows import Caller
from millrace_inference_gateway.predictor import Predictor


async def predict_stream(
    predictor: Predictor,
    requests: AsyncIterator[prediction_pb2.PredictStreamRequest],
    caller: Caller,
    max_calls: int,
) -> AsyncIterator[prediction_pb2.PredictStreamResponse]:
    """Answers in the order in which they are ready; at most `max_calls` are under way, further requests are not read until one ends."""
    answers: asyncio.Queue[prediction_pb2.PredictStreamResponse | None] = asyncio.Queue()
    places = asyncio.Semaphore(max_calls)

    async def answer(request: prediction_pb2.PredictStreamRequest) -> None:
        try:
            response = await predictor.predict(request.request, caller)
            result = prediction_pb2.PredictResult(response=response)
        except MillraceError as error:
            result = failure_of(error)
        await answers.put(prediction_pb2.PredictStreamResponse(call_id=request.call_id, result=result))

    async def read() -> None:
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                # Given back when the answer has been taken, so that a reader who is slow is not read from.
                await places.acquire()
                group.create_task(answer(request))

    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda _task: answers.put_nowait(None))
    try:
        while (found := await answers.get()) is not None:
            yield found
            places.release()
        try:
            await reading
        except BaseExceptionGroup as errors:  # of the task group; one is what the caller is told
            raise errors.exceptions[0] from None
    finally:
        reading.cancel()

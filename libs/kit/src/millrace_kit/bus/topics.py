"""Names of the topics; their values are messages of `millrace_api/events/v1`."""

PREDICTIONS = "millrace.predictions"
MODELS = "millrace.models"
TRAINING = "millrace.training"
DRIFT = "millrace.drift"


def records_topic(contract: str) -> str:
    """Topic of the records that follow `contract`."""
    return f"millrace.records.{contract}"


def dead_letters_topic(contract: str) -> str:
    """Topic of the records that `contract` refused, as they came; their headers are those of Kafka Connect."""
    return f"millrace.dead-letters.{contract}"

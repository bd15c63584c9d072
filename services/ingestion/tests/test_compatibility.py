"""Which contract may follow which, mode by mode, and the command that asks before it registers."""

import grpc
import pytest
from millrace_api.ingestion.v1 import ingestion_pb2 as pb
from millrace_ingestion.compatibility import check_evolution
from millrace_ingestion.contract_messages import contract_from
from millrace_ingestion.contracts import Contract
from millrace_kit.errors import FailedPreconditionError

from .harness import Client, contract, lines, row
from .test_contracts import error_of, register

STRING, INT64, DOUBLE = pb.COLUMN_TYPE_STRING, pb.COLUMN_TYPE_INT64, pb.COLUMN_TYPE_DOUBLE
MODES = ("UNSPECIFIED", "BACKWARD", "FORWARD", "FULL", "NONE")
LOOSER, TIGHTER, NEITHER, BOTH = {"UNSPECIFIED", "BACKWARD", "NONE"}, {"FORWARD", "NONE"}, {"NONE"}, set(MODES)


def known(mode: str = "UNSPECIFIED", **columns) -> Contract:
    message = contract(**columns)
    message.compatibility = pb.Compatibility.Value(f"COMPATIBILITY_{mode}")
    return contract_from(message, "contract")


def taken(versions: list[Contract], new: Contract) -> bool:
    try:
        check_evolution(versions, new)
    except FailedPreconditionError:
        return False
    return True


@pytest.mark.parametrize(
    ("before", "after", "modes"),
    [
        ({}, {"gate": {"type": STRING, "nullable": True}}, BOTH),
        ({}, {"gate": {"type": STRING}}, TIGHTER),
        ({}, {"seats": None}, BOTH - {"UNSPECIFIED"}),
        ({"gate": {"type": STRING}}, {"gate": None}, {"BACKWARD", "NONE"}),
        ({}, {"carrier": {"nullable": True}}, LOOSER),
        ({}, {"delay": {"nullable": False}}, TIGHTER),
        ({}, {"delay": {"min": -101}}, LOOSER),
        ({}, {"delay": {"max": 2999}}, TIGHTER),
        ({}, {"delay": {"max": None}}, LOOSER),
        ({}, {"seats": {"max": 9}}, TIGHTER),
        ({}, {"delay": {"min": -101, "max": 2999}}, NEITHER),
        ({}, {"carrier": {"pattern": ""}}, LOOSER),
        ({}, {"carrier": {"pattern": "[A-Z]{2}"}}, NEITHER),
        ({}, {"carrier": {"allowed": ["UA"]}}, TIGHTER),
        ({"seats": {"allowed_numbers": [1]}}, {"seats": {"allowed_numbers": [1, 2]}}, LOOSER),
        ({"seats": {"allowed_numbers": [1]}}, {"seats": {"allowed_numbers": [2]}}, NEITHER),
        ({}, {"carrier": {"max_length": 2}}, TIGHTER),
        ({}, {"seats": {"unique": True}}, TIGHTER),
        ({"delay": {"max_null_rate": 0.1}}, {"delay": {"max_null_rate": 0.2}}, LOOSER),
        ({}, {"delay": {"policies": {"range": pb.CHECK_POLICY_WARN}}}, LOOSER),
        ({"delay": {"policies": {"range": pb.CHECK_POLICY_WARN}}}, {"delay": {"policies": {}}}, TIGHTER),
        ({}, {"seats": {"type": DOUBLE}}, set()),
        ({}, {"SEATS": {"type": INT64, "nullable": True}, "seats": None}, set()),
        # A rename.
        ({}, {"chairs": {"type": INT64, "nullable": True, "min": 1}, "seats": None}, set()),
    ],
)  # fmt: skip
def test_what_each_mode_allows(before: dict, after: dict, modes: set[str]) -> None:
    new = known(**{**before, **after})
    assert {mode for mode in MODES if taken([known(mode, **before)], new)} == modes


def test_transitive_modes_look_at_every_version() -> None:
    first = known(delay={"max": 10})
    second = known("BACKWARD_TRANSITIVE", delay={"max": None, "min": None})
    third = known("BACKWARD_TRANSITIVE", delay={"max": None, "min": None}, gate={"type": STRING, "nullable": True})
    assert taken([first, second], third)
    loose = known("FORWARD_TRANSITIVE", delay={"max": 3001})
    assert taken([known("FORWARD", delay={"max": 3002}), loose], known(delay={"max": 3001}))
    assert not taken([known("FORWARD", delay={"max": 3000}), loose], known(delay={"max": 3001}))


def test_a_column_does_not_come_back_with_another_type() -> None:
    before, without = known("NONE"), known("NONE", seats=None)
    again = known(seats={"type": STRING, "min": None, "nullable": True})
    with pytest.raises(FailedPreconditionError) as caught:
        check_evolution([before, without], again)
    assert caught.value.metadata["column"] == "seats"
    assert taken([before, without], known("NONE"))


def test_a_refused_rename_says_what_to_do() -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        check_evolution([known("NONE")], known(chairs={"type": INT64, "nullable": True, "min": 1}, seats=None))
    assert "add 'chairs' beside it" in caught.value.message


async def test_a_check_changes_nothing_and_says_what_a_registration_would(client: Client) -> None:
    tighter = contract(delay={"max": 9})
    answer = await client.stub.CheckContract(pb.CheckContractRequest(contract=tighter))
    assert (answer.compatible, answer.subject, answer.newest_version) == (False, "delay", 1)
    assert [(c.subject, c.change, c.backward, c.forward) for c in answer.changes] == [
        ("delay", "max is tighter", False, True)
    ]
    assert (await error_of(register(client, tighter))).metadata["column"] == "delay"
    # The mode is a property of the newest version: it is changed first, by itself.
    free = contract()
    free.compatibility = pb.COMPATIBILITY_NONE
    assert (await register(client, free)).contract.version == 2
    assert (await client.stub.CheckContract(pb.CheckContractRequest(contract=tighter))).compatible
    assert (await register(client, tighter)).contract.version == 3
    first = (await client.stub.GetContract(pb.GetContractRequest(name="flights", version=1))).contract
    assert (first.version, first.columns[3].max) == (1, 3000)
    error = await error_of(client.stub.GetContract(pb.GetContractRequest(name="flights", version=9)))
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert (await client.stub.CheckContract(pb.CheckContractRequest(contract=contract("new")))).newest_version == 0


async def test_records_land_after_a_column_was_removed_and_came_back(client: Client) -> None:
    free = contract()
    free.compatibility = pb.COMPATIBILITY_NONE
    await register(client, free)
    await client.write(1, lines(row("a")))
    without = contract(seats=None)
    without.compatibility = pb.COMPATIBILITY_NONE
    await register(client, without)
    await client.write(2, lines(row("b")))
    await register(client, free)
    await client.write(3, lines(row("c")))
    table = client.lake().sort_by("event_id")
    assert table["seats"].to_pylist() == [7, None, 7]

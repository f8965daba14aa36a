import pytest

from services.chassis.errors import FieldInvalid, GateNotPassed
from services.finetune.registry import Aim, Evidence, aimed, check_gate, imagined, needs_gate


def test_a_share_leaves_the_stable_version_and_all_takes_its_place() -> None:
    assert aimed(None, 1, 100) == Aim(1)
    assert aimed(Aim(1), 2, 100) == Aim(2)
    assert aimed(Aim(1), 2, 10) == Aim(1, 2, 10)
    assert aimed(Aim(1, 2, 10), 2, 50) == Aim(1, 2, 50)
    assert aimed(Aim(1, 2, 10), 3, 5) == Aim(1, 3, 5)
    assert aimed(Aim(1, 2, 10), 1, 100) == Aim(1)
    assert Aim(1, 2, 10).shares() == ((1, 90), (2, 10))
    assert Aim(1).shares() == ((1, 100),)


def test_a_share_of_nothing_and_beside_itself_is_refused() -> None:
    with pytest.raises(FieldInvalid):
        aimed(None, 1, 10)
    with pytest.raises(FieldInvalid):
        aimed(Aim(1), 1, 10)


def test_T11_only_going_back_to_the_stable_version_needs_no_gate() -> None:
    split = Aim(1, 2, 10)
    assert needs_gate(None, Aim(1))
    assert needs_gate(Aim(1), Aim(2))
    assert needs_gate(Aim(1), split)
    assert needs_gate(split, Aim(1, 2, 11))
    assert needs_gate(split, Aim(2))
    assert needs_gate(split, Aim(1, 3, 10))
    assert not needs_gate(split, Aim(1, 2, 5))
    assert not needs_gate(split, Aim(1))
    assert not needs_gate(Aim(1), Aim(1))


def evidence(**changed: object) -> Evidence:
    said = {"uid": "e", "state": "PASSED", "candidate": 2, "current": 1, "alias": "prod"}
    return Evidence(**(said | changed))  # type: ignore[arg-type]


def test_T11_only_a_passed_evaluation_of_this_move_opens_the_gate() -> None:
    check_gate(evidence(), Aim(1), 2, "prod")
    check_gate(evidence(), Aim(1, 2, 10), 2, "prod")
    check_gate(evidence(current=None), None, 2, "prod")
    for wrong in (
        None, evidence(state="NOT_PASSED"), evidence(state="RUNNING"), evidence(state="FAILED"), evidence(candidate=3),
        evidence(current=4), evidence(current=None), evidence(alias="canary"),
    ):  # fmt: skip
        with pytest.raises(GateNotPassed):
            check_gate(wrong, Aim(1), 2, "prod")
    with pytest.raises(GateNotPassed):
        check_gate(evidence(), None, 2, "prod")


def test_a_move_is_shown_without_being_made() -> None:
    row = {"name": "prod", "uid": "u", "revision": 3, "target": 1, "split": None, "split_percent": None}
    assert imagined(row, "prod", Aim(1, 2, 10)) == row | {"split": 2, "split_percent": 10}
    assert imagined(None, "beta", Aim(1))["name"] == "beta"

import pytest

from services.chassis.errors import ModelCapability, ResourceNotFound
from services.gateway.catalog import Catalog, Served, require

GEMMA = Served("models/gemma", "d1", 32_768, frozenset({"GENERATE"}))
QWEN = Served("models/qwen", "d2", 40_960)


def catalog(**replicas: Served) -> Catalog:
    made = Catalog()
    for name, served in replicas.items():
        made.serves(name, served)
    return made


def test_a_name_resolves_to_what_a_replica_serves() -> None:
    assert catalog(a=GEMMA, b=QWEN).resolve("models/qwen") is QWEN


def test_A10_an_unknown_name_and_a_hidden_one_look_the_same() -> None:
    known = catalog(a=GEMMA, b=QWEN)
    with pytest.raises(ResourceNotFound) as unknown:
        known.resolve("models/none", ("models/gemma",))
    with pytest.raises(ResourceNotFound) as hidden:
        known.resolve("models/qwen", ("models/gemma",))
    assert str(unknown.value) == str(hidden.value) and unknown.value.metadata == hidden.value.metadata


def test_a_keys_list_narrows_what_is_listed() -> None:
    known = catalog(a=QWEN, b=GEMMA)
    assert known.visible() == [GEMMA, QWEN]
    assert known.visible(("models/qwen",)) == [QWEN]


def test_F33_while_two_digests_share_a_name_the_commoner_answers() -> None:
    newer = Served("models/gemma", "d9", 32_768)
    known = catalog(a=GEMMA, b=GEMMA, c=newer)
    assert known.resolve("models/gemma") is GEMMA
    known.serves("b", newer)
    assert known.resolve("models/gemma") is newer
    assert known.replicas("d9") == {"b", "c"}


def test_a_forgotten_replica_takes_its_model_along() -> None:
    known = catalog(a=GEMMA)
    known.forget("a")
    known.forget("a")
    with pytest.raises(ResourceNotFound):
        known.resolve("models/gemma")


def test_a_missing_capability_is_named() -> None:
    require(GEMMA, "GENERATE")
    with pytest.raises(ModelCapability) as refused:
        require(GEMMA, "EXPLAIN")
    assert refused.value.metadata["capability"] == "EXPLAIN"

from dataclasses import replace

import pytest

from services.chassis.errors import ModelCapability, ModelNotServed, ResourceNotFound
from services.gateway.catalog import Catalog, Served, require
from services.gateway.meanings import Target

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


def test_the_last_replica_to_leave_takes_its_model_along_once_it_is_installed_no_more() -> None:
    known = catalog(a=GEMMA)
    known.forget("a")
    known.forget("a")
    assert known.resolve("models/gemma") is GEMMA and not known.empty, "it may be asleep"
    assert known.replicas(GEMMA.digest) == frozenset()
    known.keep_asleep(["models/other"])
    with pytest.raises(ResourceNotFound):
        known.resolve("models/gemma")


def test_a_replica_that_wakes_describes_its_model_anew() -> None:
    known = catalog(a=GEMMA)
    known.forget("a")
    known.serves("b", replace(GEMMA, digest="0f" * 32))
    assert known.resolve("models/gemma").digest == "0f" * 32 and known.base("models/gemma", GEMMA.digest) is None


def test_the_last_replica_of_old_weights_leaves_nothing_while_the_name_is_served() -> None:
    known = catalog(a=GEMMA, b=replace(GEMMA, digest="0f" * 32))
    known.forget("a")
    assert known.resolve("models/gemma").digest == "0f" * 32 and known.base("models/gemma", GEMMA.digest) is None


def test_a_missing_capability_is_named() -> None:
    require(GEMMA, "GENERATE")
    with pytest.raises(ModelCapability) as refused:
        require(GEMMA, "EXPLAIN")
    assert refused.value.metadata["capability"] == "EXPLAIN"


def version(capabilities: frozenset[str] = frozenset(), digest: str = GEMMA.digest) -> Target:
    return Target("projects/acme/models/m/versions/3", GEMMA.name, digest, "ad" * 32, capabilities)


def test_a_version_is_its_base_with_an_adapter() -> None:
    served = catalog(a=GEMMA, b=QWEN).tuned(version())
    assert (served.name, served.base, served.shared) == ("projects/acme/models/m/versions/3", GEMMA.name, GEMMA.name)
    assert (served.digest, served.adapter, served.context_tokens) == (GEMMA.digest, "ad" * 32, GEMMA.context_tokens)
    assert served.capabilities == GEMMA.capabilities and GEMMA.shared == GEMMA.name


def test_a_version_with_a_head_classifies_and_writes_nothing() -> None:
    base = replace(GEMMA, capabilities=frozenset({"GENERATE", "CLASSIFY_ZERO_SHOT", "EMBED", "EXPLAIN", "CLASSIFY_TUNED"}))
    known = catalog(a=base)
    assert known.tuned(version(frozenset({"CLASSIFY_TUNED"}))).capabilities == {"CLASSIFY_TUNED", "EMBED", "EXPLAIN"}
    assert known.tuned(version()).capabilities == base.capabilities - {"CLASSIFY_TUNED"}


def test_a_version_of_a_base_that_is_gone_is_not_served() -> None:
    with pytest.raises(ModelNotServed):
        catalog(a=QWEN).tuned(version())
    with pytest.raises(ModelNotServed):  # the name is there, its weights are others
        catalog(a=GEMMA).tuned(version(digest="00" * 32))


def test_a_base_is_found_by_name_and_by_weights() -> None:
    newer = replace(GEMMA, digest="d9")
    known = catalog(a=GEMMA, b=GEMMA, c=newer)
    assert known.base(GEMMA.name) == known.base(GEMMA.name, GEMMA.digest) == GEMMA
    assert known.base(GEMMA.name, "d9") == newer
    assert known.base("models/none") is None and known.base(GEMMA.name, "00") is None
    assert catalog().empty and not known.empty

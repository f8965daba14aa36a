"""What own names mean, and for how long: pure, with the time as a number."""

from collections import Counter

from services.gateway.meanings import FRESH_S, KNOWN_S, MODELS, NAMES_A_MODEL, Meaning, Meanings, Target, model_of, pick

MODEL = "projects/acme/models/m"
PROD = f"{MODEL}/aliases/prod"


def target(version: int, percent: int = 100) -> Target:
    return Target(f"{MODEL}/versions/{version}", "models/base", "b" * 64, f"{version}" * 64, percent=percent)


def split(percent: int, alias: str = PROD) -> Meaning:
    return Meaning((target(1, 100 - percent), target(2, percent)), alias)


def test_a_split_is_kept_within_a_percent() -> None:
    for percent in (1, 10, 50, 90):
        drawn = Counter(pick(split(percent), f"user-{n}").version[-1] for n in range(20_000))
        assert abs(drawn["2"] / 200 - percent) < 1.2


def test_the_same_key_gets_the_same_version_and_more_percent_takes_none_back() -> None:
    users = [f"user-{n}" for n in range(2_000)]
    before: set[str] = set()
    for percent in (1, 5, 20, 60, 99):
        newer = {user for user in users if pick(split(percent), user).version.endswith("2")}
        assert newer == {user for user in users if pick(split(percent), user).version.endswith("2")}
        assert before < newer
        before = newer


def test_two_aliases_draw_apart() -> None:
    users = [f"user-{n}" for n in range(4_000)]
    both = sum(pick(split(50), user) == pick(split(50, f"{MODEL}/aliases/test"), user) for user in users)
    assert 0.4 < both / len(users) < 0.6


def test_one_target_needs_no_key() -> None:
    assert pick(Meaning((target(3),)), "") == target(3)


def test_F15_fresh_for_seconds_and_believed_for_minutes() -> None:
    known = Meanings()
    known.learn("uid", PROD, split(10), 100.0)
    assert known.fresh("uid", PROD, 100.0 + FRESH_S * 0.99) == split(10)
    assert known.fresh("uid", PROD, 100.0 + FRESH_S) is None
    assert known.last("uid", PROD, 100.0 + KNOWN_S * 0.99) == split(10)
    assert known.last("uid", PROD, 100.0 + KNOWN_S) is None


def test_A10_a_name_is_known_to_its_project_alone() -> None:
    known = Meanings()
    known.learn("uid", PROD, split(10), 0.0)
    assert known.fresh("other", PROD, 0.0) is None and known.last("other", PROD, 0.0) is None
    known.moved("other", MODEL, 9)
    known.erased("other", f"{MODEL}/versions/1", "1" * 64)
    assert known.fresh("uid", PROD, 0.0) == split(10)


def test_a_move_makes_every_name_of_the_model_stale_and_no_other() -> None:
    known = Meanings()
    names = [MODEL, PROD, f"{MODEL}/versions/1"]
    for name in (*names, f"{MODEL}2"):
        known.learn("uid", name, Meaning((target(1),), sequence=4), 0.0)
    known.moved("uid", MODEL, 5)
    assert [known.fresh("uid", name, 0.0) for name in names] == [None] * 3
    assert all(known.last("uid", name, 0.0) for name in names)  # still what it meant, should finetune be away
    assert known.fresh("uid", f"{MODEL}2", 0.0) is not None


def test_an_answer_that_was_on_its_way_when_the_alias_moved_is_not_fresh() -> None:
    known = Meanings()
    known.moved("uid", MODEL, 7)
    known.learn("uid", PROD, Meaning((target(1),), PROD, sequence=6), 0.0)
    assert known.fresh("uid", PROD, 0.0) is None
    known.learn("uid", PROD, Meaning((target(2),), PROD, sequence=7), 0.0)
    assert known.fresh("uid", PROD, 0.0) is not None


def test_what_is_erased_is_not_believed_either() -> None:
    known = Meanings()
    known.learn("uid", PROD, split(10), 0.0)
    known.learn("uid", MODEL, Meaning((target(3),)), 0.0)
    known.erased("uid", f"{MODEL}/versions/2", "2" * 64)
    assert known.last("uid", PROD, 0.0) is None and known.last("uid", MODEL, 0.0) is not None


def test_the_names_kept_are_bounded() -> None:
    known = Meanings()
    for number in range(MODELS + 10):
        known.learn("uid", f"{MODEL}{number}", Meaning((target(1),)), 0.0)
    assert known.last("uid", f"{MODEL}0", 0.0) is None and known.last("uid", f"{MODEL}{MODELS}", 0.0) is not None
    for number in range(1, NAMES_A_MODEL + 10):
        known.learn("uid", f"{MODEL}/versions/{number}", Meaning((target(1),)), 0.0)
    kept = [known.last("uid", f"{MODEL}/versions/{number}", 0.0) is not None for number in range(1, NAMES_A_MODEL + 10)]
    assert sum(kept) == NAMES_A_MODEL and kept[-1]


def test_a_forgotten_name_means_nothing() -> None:
    known = Meanings()
    known.learn("uid", PROD, split(10), 0.0)
    known.forget("uid", PROD)
    known.forget("uid", PROD)
    assert known.last("uid", PROD, 0.0) is None


def test_the_model_of_a_name() -> None:
    assert {model_of(name) for name in (MODEL, PROD, f"{MODEL}/versions/12")} == {MODEL}

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.finetune.trainer import measures


def drawn(heat, count=20_000, labels=4):
    """Logits whose softmax, divided by `heat`, is the truth."""
    torch.manual_seed(1)
    logits = 2 * torch.randn(count, labels)
    return logits * heat, torch.multinomial(torch.softmax(logits, 1), 1)[:, 0]


@pytest.mark.parametrize("heat", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(heat):
    logits, labels = drawn(heat)
    found = measures.temperature(logits, labels)
    assert found == pytest.approx(heat, rel=0.03)
    assert measures.calibration_error(logits, labels, found) < 0.015
    if heat != 1.0:
        assert measures.calibration_error(logits, labels) > 0.05


@given(st.lists(st.tuples(st.lists(st.floats(-20, 20), min_size=3, max_size=3), st.integers(0, 2)), min_size=1, max_size=20))
def test_no_other_temperature_has_less_loss(rows):
    logits, labels = torch.tensor([row for row, _ in rows]), torch.tensor([label for _, label in rows])

    def loss(heat):
        return float(torch.nn.functional.cross_entropy(logits.double() / heat, labels))

    found = measures.temperature(logits, labels)
    assert 0.049 < found < 20.1
    assert loss(found) <= min(loss(heat) for heat in (0.05, 0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 10.0, 20.0)) + 1e-6


def test_calibration_error_by_hand():
    logits = torch.log(torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7]], dtype=torch.float64))
    # Confidence 0.8 twice, right once: 0.6 off by rows; 0.7 once, right: 0.3.
    assert measures.calibration_error(logits, torch.tensor([0, 1, 1])) == pytest.approx((0.6 + 0.3) / 3)


def test_accuracy_and_f1_agree_with_scikit():
    from sklearn.metrics import accuracy_score, f1_score

    torch.manual_seed(2)
    logits, labels = torch.randn(60, 5), torch.randint(4, (60,))
    guessed = logits.argmax(1)
    assert measures.accuracy(logits, labels) == pytest.approx(accuracy_score(labels, guessed))
    assert measures.macro_f1(logits, labels) == pytest.approx(f1_score(labels, guessed, average="macro"))
    assert measures.majority([0, 0, 1]) == pytest.approx(2 / 3)


def test_without_rows_there_is_no_temperature_to_find():
    assert measures.temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)) == 1.0

"""The eager backend with adapters: each token's own, whatever the company, and nothing left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from services.inference.engine.eager import EagerBackend
from services.inference.engine.lora import LONG
from services.inference.engine.runner import pack
from services.inference.engine.step import Row
from tests.inference.engine import tiny, tuned
from tests.inference.engine.tiny import DEVICE, prompts

LENGTHS = (LONG + 9, 3, LONG - 1, 1, 40)


class House:
    def __init__(self, directory: Path) -> None:
        tiny.save("qwen2", directory)  # its projections have biases, which a gain must not touch
        self.model = tiny.reference(directory)
        settings = tiny.settings(directory, adapter_slots=4)
        self.backend = EagerBackend.load(directory, settings, torch.device(DEVICE), torch.float32)
        self.tuned = {
            "plain": tuned.peft(self.model, 1),
            "dora": tuned.peft(self.model, 2, ("q_proj", "down_proj"), dora=True),
            "wide": tuned.peft(self.model, 3, ("v_proj", "up_proj"), rank=19, rslora=True),
        }

    def install(self, **slots: int) -> None:
        for name, slot in slots.items():
            self.backend.install(slot, self.backend.prepare(tuned.weights(self.tuned[name])))

    def states(self, *rows: tuple[list[int], int]) -> list[torch.Tensor]:
        """Of every token of each (tokens, slot)."""
        blocks = [range(4 * n, 4 * n + 4) for n in range(len(rows))]
        batch, spans = pack(
            [Row(n, tokens, 0, list(blocks[n]), pool=True, adapter=slot) for n, (tokens, slot) in enumerate(rows)], self.backend.device
        )
        states = self.backend.forward(batch).cpu()
        return [states[first:end] for first, end in spans]

    def wanted(self, name: str, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            answer: Any = (self.tuned[name] if name else self.model)(torch.tensor([tokens]), output_hidden_states=True)
        return answer.hidden_states[-1][0]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def house(loaded: House) -> Any:
    yield loaded
    for slot in range(1, 5):
        loaded.backend.install(slot, None)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_each_row_of_a_mixed_step_is_its_own_adapters(house: House) -> None:
    """Long and short rows, two rows of one adapter, slots side by side and apart."""
    house.install(plain=1, dora=2, wide=4)
    names = ("plain", "dora", "", "wide", "plain")
    slots = {"": 0, "plain": 1, "dora": 2, "wide": 4}
    for order in ((0, 1, 2, 3, 4), (3, 0, 4, 2, 1)):
        rows = [(tokens, name) for tokens, name in zip(prompts(LENGTHS), [names[place] for place in order], strict=True)]
        for (tokens, name), states in zip(rows, house.states(*((tokens, slots[name]) for tokens, name in rows)), strict=True):
            close(states, house.wanted(name, tokens))


def test_a_slot_takes_another_adapter_and_keeps_nothing_of_the_first(house: House) -> None:
    tokens = prompts((12,))[0]
    for name in ("wide", "plain", "dora", "wide"):
        house.install(**{name: 1})
        close(house.states((tokens, 1))[0], house.wanted(name, tokens))
    house.backend.install(1, None)
    close(house.states((tokens, 1))[0], house.wanted("", tokens))


def test_a_step_of_the_base_alone_is_bit_for_bit_what_it_was(tmp_path: Path) -> None:
    fresh = House(tmp_path)
    rows = [(tokens, 0) for tokens in prompts(LENGTHS)]
    before = fresh.states(*rows)
    fresh.install(plain=1, dora=2, wide=3)
    assert all(torch.equal(one, other) for one, other in zip(before, fresh.states(*rows), strict=True))


def test_a_step_that_raises_leaves_no_adapter_to_the_next(house: House) -> None:
    house.install(plain=1)
    with pytest.raises(RuntimeError), house.backend.lora.adapting(torch.ones(3, dtype=torch.int32)):
        raise RuntimeError
    tokens = prompts((12,))[0]
    close(house.states((tokens, 0))[0], house.wanted("", tokens))


def test_targets_are_the_linear_layers_by_their_path_in_the_causal_model(house: House) -> None:
    wanted = {name for name, each in house.model.named_modules() if isinstance(each, torch.nn.Linear)} - {"lm_head"}
    assert set(house.backend.targets) == wanted
    path = "model.layers.1.mlp.up_proj"
    assert torch.equal(house.backend.base(path).cpu(), dict(house.model.named_modules())[path].weight)

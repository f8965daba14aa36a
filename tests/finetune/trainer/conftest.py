import pytest
import torch

from tests.finetune.trainer import world


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return world.base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def one_thread():
    """Two cores are shared, and a tiny model gains nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

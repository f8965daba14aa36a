from dataclasses import replace

import pytest

from services.chassis.errors import ResourceNotFound
from services.finetune.servicers.model_aliases import ALIAS_NAME, MODEL_NAME, VERSION_NAME
from services.finetune.servicers.resources import own
from tests.finetune.adapters import called, tenant

TITLES = "projects/news/models/titles"


def test_A10_a_keys_list_of_models_hides_every_other_model_and_what_belongs_to_it() -> None:
    with called(replace(tenant("news"), models=(TITLES,))):
        assert own(TITLES, MODEL_NAME) == ("titles",)
        assert own(f"{TITLES}/versions/3", VERSION_NAME) == ("titles", "3")
        assert own(f"{TITLES}/aliases/prod", ALIAS_NAME) == ("titles", "prod")
        for name, shape in (("", MODEL_NAME), ("/versions/3", VERSION_NAME), ("/aliases/prod", ALIAS_NAME)):
            with pytest.raises(ResourceNotFound):
                own(f"projects/news/models/secret{name}", shape)


def test_a_list_of_one_alias_is_not_one_of_its_model() -> None:
    with called(replace(tenant("news"), models=(f"{TITLES}/aliases/prod",))):
        assert own(f"{TITLES}/aliases/prod", ALIAS_NAME) == ("titles", "prod")
        with pytest.raises(ResourceNotFound):
            own(f"{TITLES}/versions/3", VERSION_NAME)


def test_a_key_without_a_list_sees_its_projects_models_and_no_others() -> None:
    with called(tenant("news")):
        assert own(TITLES, MODEL_NAME) == ("titles",)
        with pytest.raises(ResourceNotFound):
            own("projects/other/models/titles", MODEL_NAME)

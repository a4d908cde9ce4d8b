"""Which of the served models a request names: the base model or one of its adapters.

A name in `model` and one in `adapter_id` mean the same adapter. Knows no API's shape.
"""

from __future__ import annotations

import msgspec

from tgi_cli.errors import InvalidRequest, ModelNotFound
from tgi_cli.serve.frontdoor import FrontDoor
from tgi_cli.serve.keys import Served

#: Names that stand for "the model of this server": TGI's, and huggingface_hub's for a bare URL.
PLACEHOLDERS = ("tgi", "dummy")


class ChosenModel(msgspec.Struct, frozen=True):
    """`name` is what the answer says; `adapter` is empty for the base model."""

    name: str
    adapter: str = ""


def chosen_model(
    door: FrontDoor, served: Served, model: str | None, adapter_id: str | None = None
) -> ChosenModel:
    """Accept no name, the usual placeholders, the model's names and those of its adapters.

    Raises:
        ModelNotFound: any other name; says which adapters are loaded.
        InvalidRequest: `model` and `adapter_id` name two adapters.
    """
    named = "" if is_base(model, served) else chosen_adapter(door, model, "model", served)
    asked = chosen_adapter(door, adapter_id, "adapter_id", served)
    if named and asked and named != asked:
        raise InvalidRequest(
            f"`model` names the adapter `{named}` and `adapter_id` names `{asked}`",
            param="adapter_id",
        )
    adapter = named or asked
    return ChosenModel(adapter or served.name, adapter)


def is_base(model: str | None, served: Served) -> bool:
    """Whether a name in `model` stands for the base model."""
    return model in (None, "", *PLACEHOLDERS, served.name, served.model_id)


def chosen_adapter(door: FrontDoor, name: str | None, field: str, served: Served) -> str:
    """The adapter that a field names, empty if it names none. Raises `ModelNotFound`."""
    if not name:
        return ""
    names = [adapter.name for adapter in door.facts.adapters]
    if name in names:
        return name
    if field == "model":
        known = f"this server has `{served.name}`"
        if names:
            known += f" and the adapters {_listed(names)}"
        raise ModelNotFound(f"the model `{name}` does not exist here; {known}", param=field)
    known = f"this server has {_listed(names)}" if names else "this server has none"
    hint = None if names else "adapters are loaded with --lora-adapters when the server starts"
    raise ModelNotFound(
        f"the adapter `{name}` does not exist here; {known}", hint=hint, param=field
    )


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

"""Model routes: the models that jobs may name, as OpenAI lists them.

Owns the HTTP side. A model is there while a live worker serves it, or because this deployment is configured for it.
"""

from __future__ import annotations

import time
from typing import Literal

from fastapi import APIRouter, Depends

from api.auth import BEARER
from api.errors import model_not_found
from api.parameters import refuse_query
from api.schemas import REFUSALS, Object
from api.services import Services


class ModelObject(Object):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nightpress"


class ModelList(Object):
    object: Literal["list"] = "list"
    data: list[ModelObject]


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        prefix="/v1/models",
        tags=["models"],
        dependencies=[Depends(BEARER), Depends(refuse_query)],
        responses=REFUSALS,
    )
    configured = services.settings.served_model
    started = int(time.time())

    def models() -> list[ModelObject]:
        since = {configured: started} if configured else {}
        since |= {model: int(at) for model, at in services.reads.models().items()}
        return [ModelObject(id=model, created=at) for model, at in sorted(since.items())]

    @router.get("")
    def list_models() -> ModelList:
        """All of them: one page."""
        return ModelList(data=models())

    @router.get("/{model_id:path}")  # the name of a model may hold slashes
    def get_model(model_id: str) -> ModelObject:
        for model in models():
            if model.id == model_id:
                return model
        raise model_not_found(model_id)

    return router

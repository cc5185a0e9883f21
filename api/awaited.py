"""Awaited jobs: one job of a request that is answered like OpenAI's, on its way into SQL.

Owns what such routes ask before anything is accepted: whether the same request came before, and whether anybody
serves its model. How the answer is waited for is `api.waits`'s.
"""

from __future__ import annotations

from api.errors import model_not_found
from api.services import Services
from jobs.audience import Audience
from jobs.body import JobBody
from jobs.idempotency import Submit
from jobs.tenants import Owner
from jobs.terms import Terms, Tier


def accept_awaited(
    services: Services, owner: Owner, body: JobBody, submit: Submit | None, audience: Audience, tier: Tier
) -> str:
    """Put the job into SQL and wake its workers at once; its id. Raises `ApiError` 404 for a model that nobody
    serves, and what `Intake.accept_one` raises."""
    if (known := services.intake.accepted_before(submit, owner)) is not None:
        return known
    (body,) = services.intake.name_models([body])
    model = str(body.model)
    if model != services.settings.served_model and model not in services.reads.models():
        raise model_not_found(model)
    job_id = services.intake.accept_one(body, owner, submit, terms=Terms(tier=tier), audience=audience)
    services.wake_workers([model])
    return job_id

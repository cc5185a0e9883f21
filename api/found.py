"""Found: a job or a batch by the id in a path, of one tenant, or a 404.

Owns the look before the look-up: what can be no id is not looked for, and another tenant's is answered like none.
"""

from __future__ import annotations

from api.batch_objects import BatchObject, batch_object
from api.errors import not_found
from api.job_objects import JobObject, job_object
from api.parameters import is_id
from api.services import Services
from jobs.batch_reads import BatchView
from jobs.reads import JobView


def find_job(services: Services, tenant: str, job_id: str) -> JobView:
    """Raises `ApiError` 404."""
    job = services.reads.job(job_id, tenant=tenant) if is_id(job_id) else None
    if job is None:
        raise not_found("job", job_id)
    return job


def find_batch(services: Services, tenant: str, batch_id: str) -> BatchView:
    """Raises `ApiError` 404."""
    batch = services.batch_reads.batch(batch_id, tenant=tenant) if is_id(batch_id) else None
    if batch is None:
        raise not_found("batch", batch_id)
    return batch


def show_job(services: Services, tenant: str, job_id: str) -> JobObject:
    """As clients see it, with its forecast. Raises `ApiError` 404."""
    job = find_job(services, tenant, job_id)
    return job_object(job, services.forecasts.of_job(job))


def show_batch(services: Services, tenant: str, batch_id: str) -> BatchObject:
    """As clients see it, with its forecast. Raises `ApiError` 404."""
    batch = find_batch(services, tenant, batch_id)
    return batch_object(batch, services.forecasts.of_batch(batch))

"""Builds the job of one request from its fields, the settings and the directory of models."""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from openai_api.completions.continuable import keeps_numbers, may_yield
from queue_schemas import BrokerUnavailable, Job, JobMetadata, OnLoss, Pool, Tenant, new_job_id
from queue_schemas.persisted_output import request_digest
from scheduling.affinity import adapter_digest
from scheduling.service_tiers import place_of_request

from ..model_directory import check_model
from ..queue_link import QueueLink
from ..settings import RouterSettings
from .request_fields import RequestFields
from .rules import Deadline


class JobBuilder:
    """Builds the jobs of one Router."""

    def __init__(self, settings: RouterSettings, link: QueueLink) -> None:
        self._settings = settings
        self._link = link

    def knows(self, model: Pool) -> bool:
        """Whether a job for ``model`` can be queued without looking for who serves it."""
        entry = self._link.directory.pools.get(model)
        return entry is not None and (entry.workers > 0 or entry.takes_requests(self._settings.on_no_worker))

    async def find(self, model: Pool) -> None:
        """Raise ``ModelNotFound``, ``NoWorker`` or ``BrokerUnavailable`` if a job for ``model`` cannot be queued."""
        link = self._link
        link.ready_queue()
        if self.knows(model):
            return
        directory = link.directory if model in link.directory.pools else await link.fresh_directory()
        if model not in directory.pools and link.reasons:
            why = f"the list of models cannot be read: {link.reasons[0]}; try again shortly"
            raise BrokerUnavailable(why, public=why)
        check_model(model, directory, self._settings.on_no_worker)

    def build(
        self,
        *,
        tenant: Tenant,
        path: str,
        body: bytes,
        content_type: str,
        fields: RequestFields,
        deadline: Deadline,
        on_loss: OnLoss,
        idempotency_key: str = "",
        persisted: bool = False,
        background: bool = False,
        tier: str = "",
        request_id: str = "",
        traceparent: str = "",
        headers: Mapping[str, str] | None = None,
        affinity: str = "",
    ) -> Job:
        """The job of a request with ``fields``. One that is not ``persisted`` is answered to this Router. ``affinity``:
        the digests of its prefix; ``tier``: its service tier (:mod:`scheduling.service_tiers`).

        Raises ``BrokerUnavailable``.
        """
        settings, link = self._settings, self._link
        if on_loss == "continue" and not fields.continuable:
            on_loss = "restart"
        queue = link.ready_queue()
        lane, band = place_of_request(tier, fields.priority, settings.highest_band_of(tenant), background=background)
        is_yielding = background and _goes_on(path, body, content_type, fields, on_loss)
        pool = link.directory.pools.get(fields.model)
        if settings.affinity and pool is not None and pool.card.get("parent"):
            affinity += adapter_digest(fields.model)
        return Job(
            id=new_job_id(queue.shard_of(fields.model)),
            tenant=tenant,
            model=fields.model,
            path=path,
            body=body,
            content_type=content_type,
            lane=lane,
            band=band,
            yields=settings.max_yields if is_yielding else 0,
            stream=fields.stream,
            persisted=persisted,
            ttl_ms=deadline.limit_ms,
            deadline_from=deadline.description,
            max_attempts=settings.max_attempts,
            on_loss=on_loss,
            reply_to="" if persisted else link.session_id,
            traceparent=traceparent,
            headers=headers or {},
            idempotency_key=idempotency_key,
            request_id=request_id,
            region=settings.region,
            remote_after_ms=self._remote_after_ms(fields.model),
            affinity=affinity,
            cost_estimate=fields.cost,
            weight=settings.weight_of(tenant),
        )

    def _remote_after_ms(self, model: str) -> int:
        """How long only this region's workers may take the job; 0 if there are none."""
        settings = self._settings
        local = settings.region != "" and self._link.directory.serves_in(model, settings.region)
        return settings.region_remote_after_ms if local else 0


def _goes_on(path: str, body: bytes, content_type: str, fields: RequestFields, on_loss: OnLoss) -> bool:
    """Whether the answer of a background request can go on behind what was said of it."""
    if fields.stream:
        return on_loss == "continue"
    is_form = content_type[:19].lower() == "multipart/form-data"
    return not is_form and keeps_numbers(body) and may_yield(path, orjson.loads(body))


def job_metadata_of(
    job: Job, fields: RequestFields, *, resumable: bool = False, note: bytes = b"", request: str = ""
) -> JobMetadata:
    """What a Router needs to relay the answer of a persisted ``job`` again. ``request`` is the digest of what the
    client sent, if the job does not contain all of it."""
    return JobMetadata(
        path=job.path,
        stream=job.stream,
        on_loss=job.on_loss,
        include_usage=fields.usage,
        choices=fields.choices,
        request_id=job.request_id,
        request_digest=request or request_digest(job),
        resumable=resumable,
        note=note,
    )

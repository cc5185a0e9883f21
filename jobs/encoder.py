"""Encoder: claimed jobs turned into requests, several at a time.

Owns what of a claim becomes what of a request. A text that cannot be encoded costs the others nothing. Refuses to
know why jobs were claimed (`jobs.claimer`) and how text becomes tokens (`jobs.requests`).
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.reasoning import ReasoningFormat
from engine.request import Request, RequestId
from engine.tokenizer import Tokenizer
from jobs.audience import Audience
from jobs.body import JobBody
from jobs.claims import Claim
from jobs.requests import all_or_each, prompts_of, request_of
from jobs.settings import Settings


class Encoder:
    def __init__(
        self, tokenizer: Tokenizer, settings: Settings, reasoning: ReasoningFormat | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._reasoning = reasoning

    def encode(self, claims: Sequence[Claim]) -> list[Request | BaseException]:
        """What each of these jobs asks of the engine, or why it cannot be asked."""
        return all_or_each(self._encode, claims)

    def _encode(self, claims: Sequence[Claim]) -> list[Request]:
        bodies = [JobBody.model_validate(claim.body) for claim in claims]
        prompts = prompts_of(bodies, self._tokenizer)
        return [
            request_of(
                RequestId(claim.job_id, claim.fence),
                body,
                prompt,
                seed=claim.seed,
                settings=self._settings,
                tenant=claim.tenant,
                priority=claim.tier,
                turn=claim.turn,
                generated=claim.generated,
                stream=claim.audience == Audience.TEXT,
                reasoning=self._reasoning,
            )
            for claim, body, prompt in zip(claims, bodies, prompts, strict=True)
        ]

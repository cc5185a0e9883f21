"""Admission: which requests can run on an engine at all, and how long their samples may get.

Owns the refusals that depend on sizes (of the context, of the KV memory, of an answer's frame), and those of
checkpoints that a request could not have left behind. It asks `vocabulary` for those that depend on tokens. Knows no
other request and no page: what waits or runs changes nothing, so what is refused once would be refused always.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model_config import ModelConfig
from engine.request import Rejected, Request
from engine.vocabulary import check_vocabulary
from engine.wire import check_answer_fits


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_model_len`: tokens of a prompt and its answer; `num_slots`: tokens that all pages hold."""

    model: ModelConfig
    max_model_len: int
    num_slots: int

    def admit(self, request: Request) -> int:
        """How many tokens each sample may get. Raises `Rejected` for what cannot run here."""
        num_prompt, sampling = len(request.prompt_token_ids), request.sampling
        if not num_prompt:
            raise Rejected("invalid_request", "the prompt is empty: at least one token is needed")
        if sampling.seed is None:
            raise Rejected("invalid_request", "the request carries no seed")
        check_vocabulary(request, self.model.vocab_size, self.model.eos_token_ids)
        check_generated(request)
        max_tokens = self._most(request, self._room(request))
        # the last token drawn is never computed: it needs no slot
        if num_prompt + max_tokens - 1 > self.num_slots:
            raise Rejected(
                "kv_capacity_exceeded",
                f"a prompt of {num_prompt} and an output of {max_tokens} tokens need more KV memory than the"
                f" {self.num_slots} tokens this engine has",
            )
        check_answer_fits(request, max_tokens)
        return max_tokens

    def _room(self, request: Request) -> int:
        """Tokens that the context has behind the prompt."""
        num_prompt, min_tokens = len(request.prompt_token_ids), request.sampling.min_tokens
        room = self.max_model_len - num_prompt
        if room < 1:
            raise Rejected(
                "context_length_exceeded",
                f"the prompt has {num_prompt} tokens; this model takes at most {self.max_model_len - 1}"
                " and needs room for one more",
            )
        if min_tokens > room:
            raise Rejected(
                "context_length_exceeded",
                f"min_tokens: the context leaves room for {room} tokens after the prompt",
            )
        return room

    def _most(self, request: Request, room: int) -> int:
        """What is asked for, as far as the context allows; who asks for nothing gets no more than the pages hold."""
        sampling = request.sampling
        if sampling.max_tokens is not None:
            return min(sampling.max_tokens, room)
        held = self.num_slots + 1 - len(request.prompt_token_ids)
        return min(room, max(held, sampling.min_tokens, 1))


def check_generated(request: Request) -> None:
    """Raises `Rejected` for a checkpoint that this request could not have left behind."""
    sampling, num_scored = request.sampling, len(request.prompt_token_ids) - 1
    if request.generated and len(request.generated) != sampling.n:
        raise Rejected(
            "invalid_checkpoint", f"generated: must have one entry for each of {sampling.n} samples"
        )
    for index, sample in enumerate(request.generated):
        wanted = 0 if sampling.logprobs is None else len(sample.token_ids)
        if len(sample.logprobs) != wanted:
            raise Rejected("invalid_checkpoint", f"generated: {wanted} logprobs are needed for these tokens")
        most = num_scored if index == 0 and sampling.prompt_logprobs is not None else 0
        least = most if sample.token_ids else 0
        if not least <= len(sample.prompt_logprobs) <= most:
            raise Rejected(
                "invalid_checkpoint",
                f"generated: {least} to {most} prompt_logprobs are needed in the entry of sample {index}",
            )

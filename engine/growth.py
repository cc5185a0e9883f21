"""Growth: what a request has made, told in parts as it is made, and the parts put together.

Owns the rule that any unbroken beginning of the parts is a checkpoint (`Request.generated`): a part that was lost
costs the tokens behind it and nothing else, one that came twice does no harm. Knows neither pipes nor SQL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.request import Begins, Generated, RequestId, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What a request has made since it was last told of: sample k, from its generated token `starts[k]` on. Logprobs
    of the prompt come with parts that begin at 0. `begins`: as the request said, for those who read along."""

    id: RequestId
    starts: tuple[int, ...]
    generated: tuple[Generated, ...]
    begins: Begins = "answer"


def join(growths: Sequence[Growth]) -> tuple[Generated, ...]:
    """Parts in their order put together; those from the first gap on are left out."""
    made: list[tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]] = []
    for growth in growths:
        made = made or [([], [], []) for _ in growth.starts]
        if len(growth.starts) != len(made):
            break
        if any(start > len(tokens) for start, (tokens, _, _) in zip(growth.starts, made, strict=True)):
            break
        for start, more, (tokens, logprobs, of_prompt) in zip(
            growth.starts, growth.generated, made, strict=True
        ):
            tokens[start:] = more.token_ids
            logprobs[start:] = more.logprobs
            of_prompt[:] = more.prompt_logprobs or of_prompt
    return tuple(
        Generated(token_ids=tuple(tokens), logprobs=tuple(logprobs), prompt_logprobs=tuple(of_prompt))
        for tokens, logprobs, of_prompt in made
    )


def size_of(generated: Iterable[Generated]) -> int:
    """Tokens of all samples."""
    return sum(len(sample.token_ids) for sample in generated)

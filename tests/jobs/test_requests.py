"""Requests made several at a time are those that each body gives alone; one that cannot be made harms no other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.checkpoint import Checkpoint
from engine.tokenizer import Tokenizer
from jobs.body import JobBody
from jobs.requests import all_or_each, prompt_of, prompts_of
from tests.support.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.open(Checkpoint.open(str(write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model"))))


def body_of(text: str | None) -> JobBody:
    """A prompt; None: a chat."""
    if text is not None:
        return JobBody(model="tiny", prompt=text)
    return JobBody.model_validate({"model": "tiny", "messages": [{"role": "user", "content": "Who?"}]})


@pytest.mark.parametrize("texts", [[], ["a", "b c"], [None, "a", None, " ", "bb"], [None]])
def test_prompts_keep_their_order(tokenizer: Tokenizer, texts: list[str | None]) -> None:
    bodies = [body_of(text) for text in texts]
    assert prompts_of(bodies, tokenizer) == [prompt_of(body, tokenizer) for body in bodies]


def test_a_chat_tells_its_template_what_it_is_told(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    template = "{{ messages[0].content }}{% if enable_thinking is false %} now{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.open(Checkpoint.open(str(folder)))
    told = body_of(None).model_copy(update={"chat_template_kwargs": {"enable_thinking": False, "unread": 1}})
    prompts = prompts_of([body_of(None), told, body_of("Who? now")], tokenizer)
    assert [tokenizer.decode(prompt) for prompt in prompts] == ["Who?", "Who? now", "Who? now"]
    refused = told.model_copy(
        update={"chat_template_kwargs": {"bos_token": "a"}}
    )  # of another version's check
    with pytest.raises(ValueError, match=r"chat_template_kwargs\.bos_token: "):
        prompt_of(refused, tokenizer)


def test_what_cannot_be_made_harms_no_other() -> None:
    calls: list[list[int]] = []

    def inverses(items: Sequence[int]) -> list[float]:
        calls.append(list(items))
        return [1 / item for item in items]

    assert all_or_each(inverses, [1, 2]) == [1.0, 0.5]
    assert calls == [[1, 2]]
    first, error, last = all_or_each(inverses, [1, 0, 4])
    assert (first, type(error), last) == (1.0, ZeroDivisionError, 0.25)
    assert calls[1:] == [[1, 0, 4], [1], [0], [4]]
    assert all_or_each(inverses, []) == []

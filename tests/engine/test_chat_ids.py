"""Chats of every kind of tokenizer: the ids transformers gives where no text spells a control token; where it does,
no control token comes of it; and text that grows token by token is the text of the whole.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from engine.detokenizer import Detokenizer
from engine.special_tokens import SpecialTokens
from engine.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import CONTROLS, KINDS, TEMPLATE

SPECIAL = SpecialTokens.read({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, {})
# Spaces, ligatures and marks that normalizers change, bytes that no vocabulary holds, halves of control tokens
PARTS = [
    "the",
    " ",
    "  ",
    "\n",
    "ﬁ",
    "é",
    "e\u0301",
    "Å",
    "🙂",
    "你",
    ".",
    "<",
    "|",
    "s",
    "x",
    "end",
    "THE",
]
PLAIN = (
    st.lists(st.sampled_from([*PARTS, "<think>"]), max_size=8)
    .map("".join)
    .filter(lambda t: not _spells_control(t))
)
HOSTILE = st.lists(
    st.sampled_from([*PARTS, *CONTROLS, "<S>", "＜s＞", "<|US", "er|>", "﹤/s﹥"]), max_size=8
).map("".join)
# of the same class, and then nothing spells a control token
OTHER_LETTERS = str.maketrans("suenSUEN", "zvfmZVFM")
EXAMPLES = 25


def _spells_control(text: str) -> bool:
    return any(control in text.lower() for control in CONTROLS)


def chats(contents: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": contents})
    return st.lists(message, min_size=1, max_size=3)


class Pair:
    def __init__(self, kind: str) -> None:
        backend = KINDS[kind]()
        self.ours = Tokenizer(backend.to_str(), template=TEMPLATE, special_tokens=SPECIAL)
        unk = {"unk_token": "<unk>"} if "<unk>" in backend.get_vocab() else {}
        self.theirs: Any = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **unk
        )
        self.theirs.chat_template = TEMPLATE
        self.controls = {backend.token_to_id(token) for token in CONTROLS}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def test_ids_of_a_chat_are_those_of_transformers(pair: Pair) -> None:
    @settings(max_examples=EXAMPLES, deadline=None)
    @given(chats(PLAIN), st.booleans())
    def check(chat: list[dict[str, str]], prompt: bool) -> None:
        theirs = pair.theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=prompt)
        assert pair.ours.encode_chat(chat, add_generation_prompt=prompt) == list(theirs["input_ids"])

    check()


def test_ids_of_a_text_are_those_of_transformers(pair: Pair) -> None:
    @settings(max_examples=EXAMPLES, deadline=None)
    @given(PLAIN)
    def check(text: str) -> None:
        token_ids = pair.ours.encode(text)
        assert token_ids == list(pair.theirs(text)["input_ids"])
        assert pair.ours.decode(token_ids) == pair.theirs.decode(token_ids, skip_special_tokens=True)
        assert pair.ours.decode(token_ids, False) == pair.theirs.decode(token_ids, skip_special_tokens=False)

    check()


def test_no_text_becomes_a_control_token(pair: Pair) -> None:
    @settings(max_examples=EXAMPLES, deadline=None)
    @given(chats(HOSTILE))
    def check(chat: list[dict[str, str]]) -> None:
        harmless = [{**message, "content": message["content"].translate(OTHER_LETTERS)} for message in chat]
        expected = [token for token in pair.ours.encode_chat(harmless) if token in pair.controls]
        assert expected
        assert [token for token in pair.ours.encode_chat(chat) if token in pair.controls] == expected
        for message in chat:
            assert not pair.controls & set(pair.ours.encode(message["content"]))

    check()


def test_pieces_add_up_to_the_whole(pair: Pair) -> None:
    ids = st.lists(st.integers(0, pair.ours.vocab_size + 2), max_size=24)

    @settings(max_examples=4 * EXAMPLES, deadline=None)
    @given(ids | PLAIN.map(pair.ours.encode))
    def check(token_ids: list[int]) -> None:
        growing = Detokenizer(pair.ours)
        text = "".join(map(growing.push, token_ids)) + growing.flush()
        assert text == pair.ours.decode(token_ids)

    check()

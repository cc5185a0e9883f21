"""Tiny models that think aloud: tokenizers with the marks of Qwen3 and of gpt-oss, and a checkpoint with the former.

A random model does not close a reasoning by itself: a bias on `</think>` makes it do so, somewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tests.support.tiny import CHAT_TEMPLATE, VOCAB_SIZE, write_tiny_llama

THINK = ("<think>", "</think>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>")
OPEN_ID, CLOSE_ID = VOCAB_SIZE, VOCAB_SIZE + 1  # of the checkpoint below
# as Qwen3's: nothing is said of thinking unless there is to be none
CHOICE = "{% if add_generation_prompt and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
# as DeepSeek-R1's: the reasoning is opened in the prompt
OPENED = (
    "{% if add_generation_prompt and enable_thinking is not false %}{{ '<think>\\n' }}{% endif %}" + CHOICE
)


def with_marks(tokenizer: Tokenizer, marks: tuple[str, ...], *, special: bool) -> Tokenizer:
    """`special`: whether the tokenizer's file calls them control tokens, as gpt-oss's does and Qwen3's does not."""
    added = [AddedToken(mark, special=special, normalized=False) for mark in marks]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def write_thinking_llama(folder: Path, *, ending: str = OPENED, **sizes: Any) -> Path:
    """`ending`: of its chat template."""
    write_tiny_llama(folder, vocab_size=VOCAB_SIZE + 2, **sizes)
    path = folder / "tokenizer.json"
    tokenizer = with_marks(Tokenizer.from_file(str(path)), THINK, special=False)
    assert [tokenizer.token_to_id(mark) for mark in THINK] == [OPEN_ID, CLOSE_ID]
    tokenizer.save(str(path))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = CHAT_TEMPLATE + ending
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder

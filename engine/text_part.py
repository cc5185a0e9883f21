"""The text model inside a checkpoint of a model that sees or hears as well.

Owns which fields of such a `config.json` are the text model's, and which of the tensors are. Whoever sends text alone
to such a model meets nothing else of it, so it is run as the text model that it contains; its towers are not read.
Knows no architecture by name (`families` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.model_config import Storage, UnsupportedCheckpoint

# where both say it, the whole model's counts
_OUTER = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id")
_TOWERS = r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector)\."

TEXT_STORAGE = Storage(
    names=(
        (r"^model\.language_model\.", "model."),
        (r"^language_model\.model\.", "model."),  # as transformers 4 wrote it
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
    derived=_TOWERS,
)


def text_fields(config: Mapping[str, Any], kinds: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The kind of the text model, and its fields. They are in `text_config`, or, as Qwen's were first published,
    beside the others.

    `kinds`: what its `model_type` may be, the first where it is left out. Raises KeyError where there are no fields,
    `UnsupportedCheckpoint` for a text model of another kind.
    """
    text = config.get("text_config")
    if text is None:
        if "hidden_size" not in config:
            raise KeyError("text_config")
        return kinds[0], dict(config)
    if not isinstance(text, Mapping):
        raise UnsupportedCheckpoint(
            f"config.json has a value of the wrong kind: text_config must be an object, not {text!r}"
        )
    kind = text.get("model_type", kinds[0])
    if kind not in kinds:
        raise UnsupportedCheckpoint(
            f"text_config: model_type {kind!r} is not supported here; allowed: {', '.join(kinds)}"
        )
    outer = {name: config[name] for name in _OUTER if config.get(name) is not None}
    return kind, {**text, **outer, **_tied(config, text)}


def _tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 asks the whole model's config.json, whose default earlier versions left in files of models that
    are tied; so there a false does not count where the text model says true."""
    name = "tie_word_embeddings"
    said = [where[name] for where in (config, text) if where.get(name) is not None]
    return {name: next((one for one in said if one is not False), False)} if said else {}


def rotated_by_one_position(config: Mapping[str, Any]) -> dict[str, Any]:
    """Multimodal rotary embedding (Wang et al. 2024, Qwen2-VL) gives a token a time, a height and a width. Those of
    text are one number, its position, so what is left is the usual rotation by it."""
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        said = config.get(name)
        if isinstance(said, Mapping) and "mrope" in (said.get("rope_type"), said.get("type")):
            found[name] = {**said, "rope_type": "default", "type": "default"}
    return found

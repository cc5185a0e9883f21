"""Foreign modules: a model of transformers' own code, configured and filled from a checkpoint, strictly.

Owns what is asked of transformers' loading: nothing from the network, no code from a checkpoint's repository, no
tensor left over or missing. Knows no attention and no pages (`fallback`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any

import torch

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.plug import plain_name


def configuration(checkpoint: Checkpoint) -> Any:
    """transformers' own configuration, of an architecture that it knows as a causal language model.

    Raises `UnsupportedCheckpoint` for one that it does not, or whose code lies in the checkpoint's repository.
    """
    import transformers

    name = checkpoint.config.architecture
    known = f"transformers {transformers.__version__}"
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # its errors share no base class
        written = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in written:
            raise UnsupportedCheckpoint(
                f"{name}: auto_map: {known} does not know it, and code from a checkpoint's repository is never run"
            ) from error
        what = str(error).strip().split("\n")[0]
        raise UnsupportedCheckpoint(f"{name}: {known} cannot read its config.json: {what}") from error
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None or model_class.__name__ != name:
        raise UnsupportedCheckpoint(
            f"{name}: {known} knows no such causal language model for model_type {config.model_type}"
        )
    return config


def loaded_module(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The module, in host memory; every tensor of the file used, and every parameter filled.

    Raises `UnsupportedCheckpoint` naming a tensor that is missing, not known or of another shape.
    """
    from transformers import AutoModelForCausalLM

    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            attn_implementation=plain_name(),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported instead, with their names
        )
    except Exception as error:  # its errors share no base class
        raise UnsupportedCheckpoint(f"{checkpoint.path} cannot be loaded: {error}") from error
    for kind, what in (("missing_keys", "is missing"), ("unexpected_keys", "is not known")):
        if report[kind]:
            raise UnsupportedCheckpoint(f"{checkpoint.path}: tensor {min(report[kind])} {what}")
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise UnsupportedCheckpoint(
            f"{checkpoint.path}: tensor {name} has shape {tuple(found)}, not {tuple(wanted)}"
        )
    if report["error_msgs"]:
        raise UnsupportedCheckpoint(f"{checkpoint.path} cannot be loaded: {report['error_msgs'][0]}")
    return module.requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice: what matters is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""The weights that everybody gets: a GGUF checkpoint as plain bfloat16 matrices in safetensors, with its tokenizer.

`python copy_model.py GGUF FOLDER`, in this project's environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(source: Path, folder: Path) -> None:
    file = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(dtype=torch.bfloat16, quantization_config=unpacked, **file)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the copy is plain
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**file).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

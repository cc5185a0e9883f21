"""The plain copy of the weights as an OpenVINO model, not quantised, with its tokenizer.

`python export_openvino.py MODEL FOLDER`, in an environment with optimum-intel.
"""

from __future__ import annotations

import sys

from optimum.exporters.openvino import main_export  # type: ignore[import-not-found]
from optimum.intel import OVConfig  # type: ignore[import-not-found]


def main(model: str, folder: str) -> None:
    main_export(
        model,
        folder,
        task="text-generation-with-past",
        library_name="transformers",
        ov_config=OVConfig(dtype="bf16"),
        convert_tokenizer=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

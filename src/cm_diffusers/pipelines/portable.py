"""What the libraries save, fit to be shared: readable by older releases of theirs, without places of this machine."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def nest_text_encoders(folder: Path) -> None:
    """Name the weights of a pipeline's CLIP text encoders as every release of transformers knows them.

    From 5.6 on transformers leaves `text_model.` out of the names; older ones then load random weights, with no more
    than a warning. All load names that have it.
    """
    for weights in folder.glob("text_encoder*/model.safetensors"):
        state = load_file(weights)
        if any(name.startswith("embeddings.") for name in state):
            save_file({f"text_model.{name}": value for name, value in state.items()}, weights, {"format": "pt"})


def forget_origin(folder: Path) -> None:
    """Leave out of a pipeline's or model's configs where it was loaded from."""
    for path in (*folder.glob("model_index.json"), *folder.rglob("config.json")):
        content = json.loads(path.read_text("utf-8"))
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")

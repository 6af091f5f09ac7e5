"""What the libraries save, fit to be shared: the same whenever it is saved, read by older releases, without places of this machine."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cm_diffusers.models import two_times


PACKAGE, OWN_CODE = (
    two_times.__name__.partition(".")[0],
    "cm_diffusers_two_times",
)  # a library, and what takes its place
LENGTH = 8  # bytes, little-endian, before the header of a safetensors file


def make_portable(folder: Path) -> None:
    """Mends the folder of a pipeline: what its index names, and nothing else that lies there."""
    carry_code(folder)
    parts = [folder / name for name in json.loads((folder / "model_index.json").read_text("utf-8"))]
    nest_text_encoders(folder)
    forget_origin([folder / "model_index.json", *(path for part in parts for path in part.glob("*.json"))])
    weights = [path for part in parts for path in part.glob("*.safetensors")]
    sort_headers(weights)
    for path in weights:  # which safetensors lets only the owner read
        path.chmod(folder.stat().st_mode & 0o666)


def carry_code(folder: Path) -> None:
    """Lay the code of a network of ours beside its weights, where diffusers alone looks for it by the name in the index."""
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    for name, entry in index.items():
        if entry == [PACKAGE, two_times.TwoTimeUNet2DModel.__name__]:
            entry[0] = OWN_CODE
            shutil.copy(two_times.__file__, folder / name / f"{OWN_CODE}.py")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def by_class(index: dict[str, Any]) -> dict[str, Any]:
    """The content of model_index.json with this package in the place of its code."""
    ours = (name for name, entry in index.items() if isinstance(entry, list) and entry[0] == OWN_CODE)
    return index | {name: [PACKAGE, index[name][1]] for name in ours}


def nest_text_encoders(folder: Path) -> None:
    """Name the weights of a pipeline's CLIP text encoders as every release of transformers knows them.

    From 5.6 on transformers leaves `text_model.` out of the names; older ones then load random weights, with no more
    than a warning. All load names that have it.
    """
    for weights in folder.glob("text_encoder*/model*.safetensors"):
        state = load_file(weights)
        if any(name.startswith("embeddings.") for name in state):
            save_file({f"text_model.{name}": value for name, value in state.items()}, weights, {"format": "pt"})


def forget_origin(paths: Iterable[Path]) -> None:
    """Leave out of settings where they were loaded from, and of tokenizers how they were called last."""
    for path in paths:
        if path.name in FORGOTTEN:
            content = json.loads(path.read_text("utf-8"))
            FORGOTTEN[path.name](content)
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _without(*names: str) -> Callable[[dict[str, Any]], None]:
    def forget(content: dict[str, Any]) -> None:
        for name in names:
            content.pop(name, None)

    return forget


FORGOTTEN = {  # file -> what makes its content the same whatever was done before
    "model_index.json": _without("_name_or_path"),
    "config.json": _without("_name_or_path"),
    "tokenizer_config.json": _without("is_local", "local_files_only"),
    "tokenizer.json": lambda content: content.update(truncation=None, padding=None),  # every call says them anew
}


def sort_headers(paths: Iterable[Path]) -> None:
    """Bring the metadata of safetensors files into one order: the library's changes from one run to the next."""
    for path in paths:
        with path.open("r+b") as file:
            size = int.from_bytes(file.read(LENGTH), "little")
            header = json.loads(file.read(size))
            if "__metadata__" in header:
                header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(content) <= size:  # as what the library writes is
                file.seek(LENGTH)
                file.write(content.ljust(size))

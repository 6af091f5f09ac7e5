"""The record of a student in a pipeline: part of its config, and beside its weights wherever it is saved."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline

from cm_diffusers.record import RECORD, Record, write_record


class RecordedMixin:
    """`record` of a pipeline whose config has the field, so that it survives whatever the config survives."""

    @property
    def record(self) -> Record | None:
        """How the student was made; None where the checkpoint does not tell."""
        entry = self.config.get("record")
        return entry and Record.of(entry)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """As in diffusers.

        Raises:
            ValueError: It is a folder that lacks the weights of a part that the caller does not give; or a `base_model`
                is given.
        """
        refuse_base_model(kwargs)
        check_has_weights(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_config(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Saves the record along, which diffusers lets happen between the weights and an upload."""
        super().save_config(save_directory, *args, **kwargs)
        if self.record is None:
            (Path(save_directory) / RECORD).unlink(missing_ok=True)
        else:
            write_record(self.record, Path(save_directory))


def of_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say where on the Hub and in the cache a file is."""
    names = ("token", "revision", "cache_dir", "local_files_only")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def refuse_base_model(kwargs: Collection[str]) -> None:
    """
    Args:
        kwargs: Of `from_pretrained`; diffusers passes over what it does not know.

    Raises:
        ValueError: A base model is among them, which only clips take.
    """
    if "base_model" in kwargs:
        raise ValueError(
            "base_model is taken by ConsistencyVideoPipeline alone; leave it out, or, for a LoRA, load that base model "
            "and call load_lora_weights."
        )


def check_has_weights(source: str | Path, given: Collection[str] = ()) -> None:
    """A folder of a pipeline has a file of weights beside the settings of each network.

    Args:
        source: Folder or Hub id; only folders are looked into.
        given: Names of parts that are not needed.

    Raises:
        ValueError: A network has none.
    """
    folder = Path(source)
    index = DiffusionPipeline.load_config(folder) if (folder / "model_index.json").is_file() else {}
    parts = set(index) - set(given)
    networks = [path.parent for path in sorted(folder.glob("*/config.json")) if path.parent.name in parts]
    if lacking := [path.name for path in networks if all(file.suffix == ".json" for file in path.iterdir())]:
        raise ValueError(
            f"{str(source)!r} has no weights for {', '.join(lacking)}; make or download them, its README.md may say how."
        )

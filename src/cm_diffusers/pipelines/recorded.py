"""The record of a student in a pipeline: part of its config, and beside its weights wherever it is saved."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from cm_diffusers.record import RECORD, Record, write_record


class RecordedMixin:
    """`record` of a pipeline whose config has the field, so that it survives whatever the config survives."""

    @property
    def record(self) -> Record | None:
        """How the student was made; None where the checkpoint does not tell."""
        entry = self.config.get("record")
        return entry and Record(**{field.name: entry[field.name] for field in fields(Record)})

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

"""The record of a student in a pipeline: part of its config, and beside its weights wherever it is saved."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import nn

from cm_diffusers.errors import UserError
from cm_diffusers.models.stored import check_stored
from cm_diffusers.models.teachers import check_finite
from cm_diffusers.pipelines.layouts import check_weight_files
from cm_diffusers.pipelines.manners import refuse_contradiction
from cm_diffusers.pipelines.portable import by_class, make_portable
from cm_diffusers.pipelines.stock import saved_stock, stock_index
from cm_diffusers.places import public
from cm_diffusers.record import RECORD, Record, write_record


PROVENANCE = "training.json"


class RecordedMixin:
    """`record` of a pipeline whose config has the field, so that it survives whatever the config survives.

    A pipeline is saved as publishing saves it: diffusers alone loads it where one of its classes samples the student.
    """

    _network, _record = "unet", "record"  # names of a part and of a config's field

    @property
    def record(self) -> Record | None:
        """How the student was made; None where the checkpoint does not tell."""
        entry = self.config.get(self._record)
        return entry and Record.of(entry)

    @record.setter
    def record(self, value: Record | None) -> None:
        self.register_to_config(**{self._record: value and asdict(value)})

    @property
    def student(self) -> nn.Module | None:
        """The network that was trained."""
        return getattr(self, self._network, None)

    @property
    def training(self) -> dict[str, Any] | None:
        """The content of `training.json`; kept with the network, so every pipeline that shares it knows."""
        return getattr(self.student, "_training", None)

    @training.setter
    def training(self, value: dict[str, Any] | None) -> None:
        if self.student is not None:
            self.student._training = value

    def _take_record(self, source: str | Path, record: Record, given: Mapping[str, Any]) -> None:
        """
        Args:
            source: Where the record lies.
            given: Arguments of `from_pretrained`; a network among them is not the one that the record is of.

        Raises:
            ValueError: The record does not fit the network.
        """
        self.record = record
        if given.get(self._network) is None:
            refuse_contradiction(source, record, self.student)
            self.training = read_training(source, **of_hub(given))

    def stock_class(self) -> type[DiffusionPipeline] | None:
        """The class of diffusers that loads and samples it; None where there is none."""
        return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """As in diffusers.

        Raises:
            ValueError: It lacks weights of a part that the caller does not give, or has quantized ones, or some that are not
                finite; or a `base_model` is given.
        """
        refuse_base_model(kwargs)
        source = pretrained_model_name_or_path
        check_has_weights(source, kwargs)
        if variant := check_weight_files(source, kwargs):
            kwargs["variant"] = variant
        pipe = super().from_pretrained(source, **kwargs)
        if kwargs.get("use_safetensors") and kwargs.get("quantization_config") is None:
            where = {name: kwargs.get(name) for name in ("variant", "revision", "cache_dir")}
            check_stored(pipe, source, **where, given=kwargs)
        check_finite(str(source), pipe)
        return pipe

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in diffusers, but a network of a class of ours is of that class, whose code beside the weights is not run."""
        return by_class(super()._dict_from_json_file(*args, **kwargs))

    def check_saveable(self) -> None:
        """Raises ValueError where the folder of a pipeline cannot hold what it is."""

    def describe(self, folder: Path, name: str) -> None:
        """Writes the card and what else publishing puts beside the weights; `cm_diffusers.registration` brings it."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, as a folder that needs no package but that where one of its classes samples the student.

        Beside the weights lie the record, and the card and `training.json` where it is known how they were trained. A
        scheduler of ours is saved as the stock one nearest to it, which carries its fields.

        Raises:
            ValueError: A LoRA is on the network, and not in its weights; text encoders save theirs.
        """
        self.check_saveable()
        with saved_stock(self):
            super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """As in diffusers; what cannot be saved is refused before a repository is made."""
        self.check_saveable()
        return super().push_to_hub(*args, **kwargs)

    def save_config(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Saves what lies beside the weights, which diffusers lets happen between these and an upload."""
        super().save_config(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if kind := self.stock_class():
            index = folder / self.config_name
            content = stock_index(json.loads(index.read_text("utf-8")), kind)
            index.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        make_portable(folder)
        if self.record is None:
            (folder / RECORD).unlink(missing_ok=True)
        else:
            base = self.record.base_model  # as seen from the folder it was loaded from
            write_record(replace(self.record, base_model=public(base) if base.startswith("..") else base), folder)
        self.describe(folder, str(folder))

    def _upload_folder(self, working_dir: str | Path, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, with a card that names the repository in the place of an empty one."""
        self.describe(Path(working_dir), repo_id)
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)


def read_training(source: str | Path, **hub: Any) -> dict[str, Any] | None:
    """The content of `training.json` in a student's folder or Hub repository; None where there is none to be read."""
    try:
        here = Path(source).exists()
        path = Path(source, PROVENANCE) if here else Path(hf_hub_download(str(source), PROVENANCE, **hub))
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, HfHubHTTPError, EntryNotFoundError, HFValidationError):
        return None
    return content if isinstance(content, dict) else None


def of_hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
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
        raise UserError(
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
        raise UserError(
            f"{str(source)!r} has no weights for {', '.join(lacking)}; make or download them, its README.md may say how."
        )

"""Folders and repositories that are no pipeline, or another kind than the one they are loaded with: what to do instead."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from cm_diffusers.models.stored import only_variant, weights_by_variant
from cm_diffusers.pipelines.lora import Source


IMAGES, CLIPS = "ConsistencyPipeline", "ConsistencyVideoPipeline"
ARGUMENTS = {  # class of a model that is alone -> who takes it, and as what
    "UNet2DConditionModel": (IMAGES, "unet"),
    "UNetMotionModel": (CLIPS, "unet"),
    "AutoencoderKL": (IMAGES, "vae"),
    "AutoencoderTiny": (IMAGES, "vae"),
    "MotionAdapter": (CLIPS, "motion_adapter"),
    "ControlNetModel": (CLIPS, "controlnet"),
}


def is_pipeline(source: Source, hub: Mapping[str, Any], has_record: bool) -> bool:
    """Whether it has a model_index.json; or, so that diffusers says why not, where that cannot be found out.

    Args:
        hub: As for `hf_hub_download`.
        has_record: Where a record is, and no index within reach, it is a LoRA.
    """
    path = Path(source)
    if path.exists():
        return path.is_file() or (path / "model_index.json").is_file()
    try:
        return bool(hf_hub_download(str(source), "model_index.json", **hub))
    except EntryNotFoundError as error:
        return not has_record and isinstance(error, LocalEntryNotFoundError)
    except (HfHubHTTPError, HFValidationError):
        return True


def refuse_part(source: Source, hub: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: It is one model alone; says how a pipeline is made with it.
    """
    for folder in ("", "unet"):
        kind = _class_of(source, folder, hub)
        if kind in ARGUMENTS:
            pipe, argument = ARGUMENTS[kind]
            inside = f", subfolder={folder!r}" if folder else ""
            raise ValueError(
                f"{str(source)!r} holds a {kind} alone; load the base model with it: {pipe}.from_pretrained(BASE_MODEL, "
                f"{argument}={kind}.from_pretrained({str(source)!r}{inside}))."
            )


def _class_of(source: Source, folder: str, hub: Mapping[str, Any]) -> str | None:
    try:
        here, name = Path(source).exists(), f"{folder}/config.json".lstrip("/")
        path = Path(source, name) if here else Path(hf_hub_download(str(source), name, **hub))
        return json.loads(path.read_text("utf-8")).get("_class_name")
    except (OSError, ValueError, HfHubHTTPError, EntryNotFoundError, HFValidationError):
        return None


def check_index(
    pipeline: type[DiffusionPipeline], source: Source, index: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """A pipeline's index has what the class needs.

    Args:
        index: The content of model_index.json; empty where it cannot be read.
        given: Parts that the caller gives.

    Raises:
        ValueError: It lacks a part, or its network is of another kind.
    """
    if not index:
        return
    kind, takes_motion = index.get("_class_name"), "motion_adapter" in pipeline._get_signature_keys(pipeline)[0]
    has = {name for name, entry in index.items() if isinstance(entry, list)} | set(given)
    network = (index.get("unet") or [None, None])[1] if given.get("unet") is None else None
    if network == "UNetMotionModel" and not takes_motion:
        raise ValueError(f"{str(source)!r} is a {kind}, which makes clips; load it with {CLIPS}.")
    lacking = [name for name in ("unet", "vae", "scheduler") if name not in has]
    if not has & {"text_encoder", "text_encoder_2"}:
        lacking.append("text_encoder")
    if lacking or network not in (None, "UNet2DConditionModel", "UNetMotionModel"):
        reason = f"without {', '.join(lacking)}" if lacking else f"whose network is a {network}"
        raise ValueError(
            f"{str(source)!r} is a {kind} {reason}; {pipeline.__name__} takes pipelines of Stable Diffusion's parts, so give "
            "such a one."
        )


def check_weight_files(source: Source, given: Mapping[str, Any]) -> str | None:
    """The variant that a folder of a pipeline is read as: the one that was asked for, or that some part has alone.

    Args:
        source: Folder or Hub id; only folders are looked into.
        given: The arguments of `from_pretrained`.

    Raises:
        ValueError: Only safetensors may be read, and a part has none of that variant.
    """
    variant = given.get("variant")
    if not given.get("use_safetensors") or not (Path(source) / "model_index.json").is_file():
        return variant
    parts = set(DiffusionPipeline.load_config(source)) - set(given)
    folders = [path.parent for path in sorted(Path(source).glob("*/config.json")) if path.parent.name in parts]
    variant = variant or only_variant(folders)
    files = {folder.name: found for folder in folders if (found := weights_by_variant(folder))}
    lacking = [name for name, found in files.items() if not _safe(found, (variant, None))]
    if lacking:
        others = sorted({other for name in lacking for other in files[name] if other and _safe(files[name], [other])})
        advice = (
            f"say which you want: variant={others[0]!r}"
            if others
            else "pickles can hold code that loading would run; say use_safetensors=False if you trust them"
        )
        named = f" but of {', '.join(others)}" if others else " but pickles"
        raise ValueError(f"{str(source)!r} has no safetensors{named} for {', '.join(lacking)}; {advice}.")
    return variant


def for_base(base: Source, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments that a LoRA or motion adapter is loaded with, those for its base model.

    The revision is not its own, and the variant only where it has that.
    """
    folders = [path.parent for path in Path(base).glob("*/config.json")] if Path(base).is_dir() else []
    lacks = folders and not any(kwargs.get("variant") in weights_by_variant(folder) for folder in folders)
    return {k: value for k, value in kwargs.items() if k != "revision" and not (k == "variant" and lacks)}


def _safe(files: Mapping[str | None, Collection[str]], variants: Collection[str | None]) -> bool:
    return any(".safetensors" in files.get(variant, ()) for variant in variants)

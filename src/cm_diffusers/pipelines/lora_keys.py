"""The layers of a LoRA file under the names of the networks they are for, whatever names the file gives them."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cm_diffusers.errors import UserError
from cm_diffusers.models.ldm_layout import unet_name


KEY = re.compile(
    r"(?P<layer>.+?)[._](?:lora(?:_linear_layer)?[._](?P<half>A|B|down|up)(?:\.[^.]+)?\.(?P<kind>weight|bias)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.[^.]+)*)|(?P<alpha>alpha))"
)
PART_OF = (  # what a name begins with -> the part of a pipeline it is for
    (re.compile(r"(lora_te2|text_encoder_2)[._]"), "text_encoder_2"),
    (re.compile(r"(lora_te1?|text_encoder)[._]"), "text_encoder"),
    (re.compile(r"transformer\."), "transformer"),
    (re.compile(r"(lora_unet|unet|(model[._])?diffusion_model)[._]"), "unet"),
)
WRAPPED = re.compile(r"base_model[._]model[._]")  # what `get_peft_model` puts before every name
OF_UNET = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|(time|add)_embedding|input_blocks|middle_block|output_blocks)[._]"
)
TITLES = {"unet": "UNet"}
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # of older diffusers


class Layers(NamedTuple):
    """What a LoRA has for one network, by PEFT's names.

    Attributes:
        tensors: "<layer>.lora_A.weight" and the like.
        config: Fields of a `LoraConfig` that put it on.
        scales: Of each layer, which the result is multiplied by; None where the file's own config says.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    scales: dict[str, float | None]


@dataclass
class _Layer:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None


def lora_layers(
    state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None, networks: Mapping[str, nn.Module | None]
) -> dict[str, Layers]:
    """What a LoRA has for each network, every key converted by itself and none left over.

    Args:
        state: Tensors by any of the names in use: of PEFT, diffusers, kohya or Stability, or several of these.
        metadata: Fields of `LoraConfig`, with the part's name before each, as diffusers keeps them in a file.
        networks: By name of the part; None for one that the pipeline does not have.

    Raises:
        ValueError: It does not fit, has values that are not finite, or tensors that no layer takes.
    """
    tables = {part: _names(part, network) for part, network in networks.items() if network is not None}
    found: dict[str, dict[str, _Layer]] = {}
    left = []
    for key, value in state.items():
        match = KEY.fullmatch(key)
        if match is None:
            left.append(key)
            continue
        part, name = _place(match["layer"], key)
        if networks.get(part) is None:
            raise UserError(f"The LoRA has layers for {part}, which this pipeline does not have; it is for another.")
        path = _found(name, part, tables[part])
        _take(found.setdefault(part, {}).setdefault(path, _Layer()), match, key, value)
    if not found:
        _refuse_foreign(next(iter(state), None))
    left += [f"{part}.{path} without both halves" for part, ones in found.items() for path in _halved(ones)]
    if left:
        raise UserError(
            f"The LoRA holds {len(left)} entries that no layer can be made of, such as {left[0]!r}; get it whole, and as a "
            "plain LoRA of lora_down and lora_up, or lora_A and lora_B."
        )
    return {part: _fitted(part, ones, networks[part], metadata) for part, ones in found.items()}


def adaptable(network: nn.Module) -> dict[str, nn.Module]:
    """Its linear and convolutional layers by name, as they are below the LoRAs that are on it."""
    layers, inside = {}, ()
    for name, module in network.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            layers[name], inside = module.get_base_layer(), f"{name}."
        elif isinstance(module, nn.Linear | nn.Conv2d):
            layers[name] = module
    return layers


def _names(part: str, network: nn.Module) -> dict[str, str]:
    """Path of each layer by its names with underscores alone, by which kohya and all others agree."""
    names = {}
    for path in adaptable(network):
        names[path.replace(".", "_")] = path
    for path in list(names.values()):
        for other in _stability(path, network) if part == "unet" else _of_text(path) if part != "transformer" else ():
            names.setdefault(other.replace(".", "_"), path)
    return names


def _stability(path: str, unet: nn.Module) -> list[str]:
    others = [path.removesuffix(".0")] if path.endswith("to_out.0") else []
    if "motion_modules" in path or not isinstance(unet.config.layers_per_block, int):
        return others
    try:
        return [*others, unet_name(f"{path}.weight", unet.config).removesuffix(".weight")]
    except (ValueError, KeyError, IndexError):
        return others


def _of_text(path: str) -> list[str]:
    """transformers from 5.6 on leaves `text_model.` out of its names."""
    plain = path.removeprefix("text_model.")
    stem, _, last = plain.rpartition(".")
    old = [f"{stem}.{OLD_TEXT[last]}"] if last in OLD_TEXT else []
    return [f"{prefix}{name}" for name in (plain, *old) for prefix in ("", "text_model.")]


def _place(layer: str, key: str) -> tuple[str, str]:
    """The part that a layer is for, and its name there."""
    part, name = None, layer
    while True:
        bare = WRAPPED.sub("", name, count=1) if WRAPPED.match(name) else name
        for pattern, of in PART_OF:
            if part is None and pattern.match(bare):
                part, bare = of, pattern.sub("", bare, count=1)
        if bare == name:
            break
        name = bare
    if part is None and not OF_UNET.match(name):
        _refuse_foreign(key)
    return part or "unet", name


def _refuse_foreign(key: str | None) -> None:
    raise UserError(f"This LoRA has no layer for a UNet or a text encoder; its layers are like {key!r}.")


def _found(name: str, part: str, names: Mapping[str, str]) -> str:
    flat = name.replace(".", "_")
    for candidate in (flat, flat.replace("_processor_", "_")):
        if candidate in names:
            return names[candidate]
    raise UserError(f"This LoRA is for another architecture: the {TITLES.get(part, part)} has no layer {name!r}.")


def _take(layer: _Layer, match: re.Match, key: str, value: Tensor) -> None:
    """
    Raises:
        ValueError: The tensor is not finite, no number, or there twice with other values.
    """
    if not value.float().isfinite().all():
        raise UserError(f"The LoRA holds values that are not finite, in {key!r}; get it anew.")
    if match["alpha"]:
        if value.numel() != 1 or layer.alpha not in (None, value.item()):
            raise UserError(f"The LoRA says more than one alpha with {key!r}; get it anew.")
        layer.alpha = value.item()
        return
    if match["magnitude"]:
        name = "lora_magnitude_vector.weight"
        if match["magnitude"] == "dora_scale" and len(value) != value.numel():
            raise UserError(
                f"The DoRA scales the features that layers read ({key!r}), not those they give; get it anew so."
            )
    else:
        name = f"lora_{'A' if match['half'] in ('A', 'down') else 'B'}.{match['kind']}"
    if not value.is_floating_point():
        raise UserError(f"The LoRA is quantized ({key!r} is {value.dtype}); get it in float32, float16 or bfloat16.")
    former = layer.tensors.setdefault(name, value)
    if former.shape != value.shape or not former.equal(value):
        raise UserError(f"The LoRA holds a layer twice, with other values in {key!r}; get it anew.")


def _halved(layers: Mapping[str, _Layer]) -> list[str]:
    wanted = {"lora_A.weight", "lora_B.weight"}
    return [path for path, layer in layers.items() if not wanted <= set(layer.tensors)]


def _fitted(part: str, layers: Mapping[str, _Layer], network: nn.Module, metadata: Mapping[str, Any] | None) -> Layers:
    modules, tensors = adaptable(network), {}
    for path, layer in layers.items():
        for name, value in layer.tensors.items():
            title = TITLES.get(part, part)
            tensors[f"{path}.{name}"] = _shaped(path, name, value, modules[path], title)
        down, up = (tensors[f"{path}.lora_{half}.weight"] for half in "AB")
        if len(down) != up.shape[1]:
            raise UserError(
                f"The halves of the LoRA's layer {path!r} have ranks {len(down)} and {up.shape[1]}; get it anew."
            )
    ranks = {path: len(tensors[f"{path}.lora_A.weight"]) for path in layers}
    told = {k.removeprefix(f"{part}."): v for k, v in (metadata or {}).items() if k.startswith(f"{part}.")}
    alphas = {path: layer.alpha for path, layer in layers.items()}
    says = bool(told) and all(alpha is None for alpha in alphas.values())
    alphas = {path: ranks[path] if alpha is None else alpha for path, alpha in alphas.items()}
    config = {
        **(told if says else _pattern("lora_alpha", "alpha_pattern", alphas)),
        **_pattern("r", "rank_pattern", ranks),
    }
    if told.get("use_dora") and not any("magnitude" in name for name in tensors):
        raise UserError(
            f"The LoRA is a DoRA by its config, and lacks the scales of its layers in the {part}; get it whole."
        )
    config |= {"target_modules": list(layers), **_all_or_none(part, layers)}
    scales = {path: None if says else alphas[path] / ranks[path] for path in layers}
    return Layers(tensors, config, scales)


def _pattern(name: str, pattern: str, values: Mapping[str, float]) -> dict[str, Any]:
    """The most frequent value, and for which layers it is another."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return {name: usual, pattern: {path: value for path, value in values.items() if value != usual}}


def _all_or_none(part: str, layers: Mapping[str, _Layer]) -> dict[str, bool]:
    """What PEFT can give to all layers of a LoRA, or to none.

    Raises:
        ValueError: Some have it.
    """
    fields = {}
    for name, tensor in (("use_dora", "lora_magnitude_vector.weight"), ("lora_bias", "lora_B.bias")):
        has = [tensor in layer.tensors for layer in layers.values()]
        if any(has) and not all(has):
            raise UserError(
                f"The LoRA has {tensor} for {sum(has)} of its {len(has)} layers in the {TITLES.get(part, part)}, which cannot "
                "be loaded; get it with that of every layer, or of none."
            )
        fields[name] = all(has)
    return fields


def _shaped(path: str, name: str, value: Tensor, module: nn.Module, title: str) -> Tensor:
    """The tensor as the layer's kind takes it: a convolution of one pixel is a linear layer.

    Raises:
        ValueError: It is of another size.
    """
    linear = isinstance(module, nn.Linear)
    gives, reads = (module.out_features, module.in_features) if linear else module.weight.shape[:2]
    if name == "lora_magnitude_vector.weight":
        if value.numel() != gives:
            raise UserError(
                f"This DoRA is for another architecture: its layer {path!r} scales {value.numel()} features, the {title}'s "
                f"gives {gives}."
            )
        return value.reshape(-1) if linear else value.reshape(1, -1, 1, 1)
    if name == "lora_B.bias":
        return value
    if value.ndim not in (2, 4):
        raise UserError(f"The LoRA's layer {path!r} has a half of the shape {tuple(value.shape)}; get it anew.")
    down = name == "lora_A.weight"
    found, wanted = (value.shape[1], reads) if down else (len(value), gives)
    if found != wanted:
        raise UserError(
            f"This LoRA is for another architecture: its layer {path!r} {'reads' if down else 'gives'} {found} features, "
            f"the {title}'s {wanted}."
        )
    kernel = () if linear else tuple(module.kernel_size) if down else (1, 1)
    if value.shape[2:].numel() == 1 and all(side == 1 for side in kernel):
        value = value.reshape(*value.shape[:2], *kernel)
    if tuple(value.shape[2:]) != kernel:
        raise UserError(
            f"This LoRA is for another architecture: its layer {path!r} has a kernel {tuple(value.shape[2:])}, the {title}'s "
            f"{kernel}."
        )
    return value

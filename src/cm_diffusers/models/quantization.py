"""A frozen base in fewer bits below adapters, as diffusers quantizes it while it loads."""

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from cm_diffusers.errors import UserError


QUANTIZATIONS = ("bnb_8bit", "bnb_4bit", "torchao_int8")
BITS = {"bnb_8bit": 8.0, "torchao_int8": 8.0, "bnb_4bit": 4.5}  # a weight: NF4 has a float32 scale for each 64


def quantization_config(kind: str, dtype: torch.dtype, *networks: str) -> PipelineQuantizationConfig | None:
    """What `from_pretrained` of a pipeline is told; None for "no".

    Args:
        kind: "no", or one of `QUANTIZATIONS`.
        dtype: To compute in.
        networks: Names of the parts that are quantized.
    """
    if kind == "no":
        return None
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(networks, _config(kind, dtype)))


def _config(kind: str, dtype: torch.dtype) -> QuantizationConfigMixin:
    if kind == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bnb_4bit":  # as QLoRA (2305.14314), section 3, without its second quantization
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def check_quantization(kind: str, lora: bool, cast: str) -> None:
    """
    Args:
        kind: See `quantization_config`.
        lora: Whether adapters train.
        cast: What the rest of the network is kept in: "no", "bf16" or "fp16".

    Raises:
        ValueError: It would train what is quantized, the rest would be in another precision, or there is no GPU for it.
    """
    if kind == "no":
        return
    flag = f"--quantize_teacher {kind}"
    if not lora:
        raise UserError(f"{flag} keeps weights that cannot train and a full student is a copy of them: add --lora.")
    if cast == "no" or (kind == "torchao_int8" and cast != "bf16"):
        raise UserError(
            f"{flag} needs what is not quantized in half precision, but --cast_teacher is {cast}: give --cast_teacher bf16 "
            "and --mixed_precision bf16."
        )
    if kind.startswith("bnb") and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise UserError(
            f"{flag} needs a GPU, but torch {torch.__version__} finds none: take torchao_int8, or leave it out."
        )

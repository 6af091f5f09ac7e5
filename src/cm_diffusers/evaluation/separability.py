"""How well a linear probe tells generated images from real ones: where best, there is the best critic (2112.09130)."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from cm_diffusers.data.shards import row_ranges
from cm_diffusers.errors import UserError
from cm_diffusers.evaluation.candidates import Candidate, check_output
from cm_diffusers.evaluation.reference import USUAL_SIDE, Reference, ReferenceConfig, load_reference
from cm_diffusers.evaluation.sampling import generate, load_pipeline
from cm_diffusers.markdown import cell
from cm_diffusers.models.vision_critic import FeatureNetwork, load_backbone
from cm_diffusers.ranges import check_ranges


@dataclass
class RankingConfig:
    """Which networks to try on which student."""

    pipeline: str = HfArg(help="The student: a pipeline's folder or Hub id, or the folder of a published LoRA.")
    backbones: list[str] = HfArg(help="Folders or Hub ids of networks, as for --critic_backbone of distill_scott.py.")
    num_images: int = HfArg(
        default=1000, help="Real images, and as many generated for their captions; half are held out."
    )
    num_inference_steps: int = HfArg(default=1, help="Steps of the student; a critic sees its single steps.")
    guidance_scale: float | None = HfArg(
        default=None, help="Guidance scale; what the student's record recommends if absent."
    )
    seed: int = HfArg(default=0, help="Image i starts from seed + i; the seed also decides what is held out.")
    eval_batch_size: int = HfArg(default=32, help="Images drawn or looked at at once.")
    dtype: Literal["float32", "float16", "bfloat16"] = HfArg(default="float32", help="Precision of the student.")
    output_dir: str = HfArg(default="runs/critics", help="Where table.md and table.json go.")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Separability:
    """One network's row of the table.

    Attributes:
        backbone: Its folder or Hub id.
        features: Numbers the probe sees of an image.
        accuracy: Of the probe on held-out images, half of them real; 0.5 is chance.
        cross_entropy: There, in nats; ln 2 = 0.693 says nothing.
    """

    backbone: str
    features: int
    accuracy: float
    cross_entropy: float


def rank_backbones(config: RankingConfig, data: ReferenceConfig) -> list[Separability]:
    """A row for each backbone, the most accurate first.

    Raises:
        ValueError: A backbone, the student or the data cannot be read, or there is no guidance scale, or no place for
            the results.
    """
    check_output(config.output_dir)
    student = Candidate.of(config.pipeline)
    guidance = guidance_of(config, student)
    student.check_steps([config.num_inference_steps])
    device, networks = PartialState().device, [load_backbone(name) for name in config.backbones]
    side = data.resolution or student.side or USUAL_SIDE
    reference = load_reference(replace(data, resolution=side), config.num_images)
    for network in networks:
        network.to(device)

    def see(images: Tensor) -> Tensor:
        return torch.cat([pooled_features(network, images) for network in networks], dim=1)

    real, fake = real_and_generated(config, reference, side, guidance, see, device)
    widths = [sum(network.widths) for network in networks]
    found = zip(config.backbones, real.split(widths, dim=1), fake.split(widths, dim=1), strict=True)
    rows = [Separability(name, ours.shape[1], *probe(ours, theirs, config.seed)) for name, ours, theirs in found]
    return sorted(rows, key=lambda row: (-row.accuracy, row.cross_entropy))


def guidance_of(config: RankingConfig, student: Candidate) -> float:
    """That it is sampled with.

    Raises:
        ValueError: Neither flag nor record tells.
    """
    if config.guidance_scale is None and student.record is None:
        raise UserError(f"{config.pipeline} has no record that recommends a guidance scale: give --guidance_scale.")
    return student.record.recommended_guidance_scale if config.guidance_scale is None else config.guidance_scale


def real_and_generated(
    config: RankingConfig,
    reference: Reference,
    resolution: int,
    guidance: float,
    see: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """What `see` makes of both, (N, D) each, as the critic meets them: decoded from latents, and with the same rounding.

    Args:
        see: Takes batches of images (B, 3, R, R) in [0, 1], none of which is kept, and gives (B, D).
    """
    dtype, size, prompts = getattr(torch, config.dtype), config.eval_batch_size, reference.prompts
    pipe = load_pipeline(config.pipeline, dtype, device)
    parts, vae = tqdm(row_ranges(len(prompts), size), desc="real images", leave=False), pipe.vae.float()
    real = torch.cat([see(through_vae(vae, reference.pictures[part])) for part in parts])
    vae.type(dtype)  # without the warning of `to`
    seeds, steps = range(config.seed, config.seed + len(prompts)), config.num_inference_steps
    fake, _ = generate(pipe, prompts, seeds, steps, guidance, size, resolution, see)
    return real, fake


@torch.no_grad()
def through_vae(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], encoded (as the posterior's mean) and decoded again, rounded to 8 bits."""
    latents = vae.encode(images.to(vae.device) * 2 - 1).latent_dist.mode()
    return ((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).cpu() * 255).round() / 255


@torch.no_grad()
def pooled_features(network: FeatureNetwork, images: Tensor) -> Tensor:
    """Mean over each feature map, of all levels (B, D), on the CPU, of images (B, 3, H, W) in [0, 1]."""
    maps = network(images.to(network.mean.device))
    return torch.cat([m.mean(dim=(2, 3)) for m in maps], dim=1).cpu()


def probe(real: Tensor, fake: Tensor, seed: int = 0) -> tuple[float, float]:
    """Accuracy, and cross-entropy in nats, of a logistic regression on one half, measured on the other.

    Args:
        real, fake: Features (N, D); rows i of both, which share a caption, are on the same side.
        seed: Decides which half is held out.
    """
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    (held_real, real), (held_fake, fake) = (
        rows.double()[order].tensor_split([len(order) // 2]) for rows in (real, fake)
    )
    std, mean = torch.std_mean(torch.cat([real, fake]), dim=0, correction=0)
    scale = std.clamp(min=1e-8)

    def prepared(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.cat([torch.ones(len(one)), torch.zeros(len(other))]).double()
        return (torch.cat([one, other]) - mean) / scale, labels

    x, y = prepared(held_real, held_fake)
    weight, bias = logistic_regression(*prepared(real, fake))
    logits = x @ weight + bias
    accuracy = ((logits > 0) == y.bool()).double().mean().item()
    return accuracy, binary_cross_entropy_with_logits(logits, y).item()


def logistic_regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (D,) and bias () that minimise the sum of cross-entropies plus `|weights|^2 / 2`.

    Args:
        x: Standardised features (N, D) in float64.
        y: Labels (N,), 0 or 1.
    """
    weight, bias = (torch.zeros(shape, dtype=x.dtype, requires_grad=True) for shape in (x.shape[1], ()))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-6, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="sum") + weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def write_ranking(config: RankingConfig, data: ReferenceConfig, rows: list[Separability]) -> str:
    """Writes `table.md` and `table.json` into `config.output_dir`; returns the Markdown table."""
    folder, setting = Path(config.output_dir), {"student": asdict(config), "reference": asdict(data)}
    folder.mkdir(parents=True, exist_ok=True)
    table, numbers = ranking_table(config, rows), {"setting": setting, "rows": [asdict(row) for row in rows]}
    for name, text in (("table.md", table), ("table.json", json.dumps(numbers, indent=1) + "\n")):
        aside = folder / f".{name}.partial"
        aside.write_text(text, "utf-8")
        os.replace(aside, folder / name)
    return table


def ranking_table(config: RankingConfig, rows: list[Separability]) -> str:
    """The rows in Markdown, and what their numbers depend on."""
    lines = ["| backbone | features | accuracy, % | cross-entropy |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {cell(r.backbone)} | {r.features} | {100 * r.accuracy:.1f} | {r.cross_entropy:.3f} |" for r in rows]
    error = 50 / config.num_images**0.5  # half of both kinds is held out: so many throws of a fair coin
    return "\n".join(lines) + (
        f"\n\nLinear probe on {config.num_images} real images, passed through the VAE, and as many of {config.pipeline}, "
        f"NFE {config.num_inference_steps}, seed {config.seed}; half held out. Chance is 50 % and 0.693, give or take "
        f"{error:.1f} %. The first is the one for --critic_backbone.\n"
    )

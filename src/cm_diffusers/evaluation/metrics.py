"""Distances between sets of features, and how well images agree with their prompts."""

import math
import re
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor
from transformers.models.clip.modeling_clip import CLIPOutput

from cm_diffusers.errors import UserError


NEIGHBOURS = 5  # k of the neighbour metrics
CHUNK = 1024  # features that are compared, or added up in float64, at once
ALONE = {"sync_on_compute": False}  # torchmetrics would wait for other processes, which need not measure
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # 2401.09603, section 4
Clip = tuple[CLIPModel, CLIPProcessor]
WORD = r"[^\W_]+(?:-[^\W_]+)*"


class _Features(nn.Identity):
    """Lets a torchmetrics image metric take features (N, D) for images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features (N, D) and (M, D), in float64; biased upwards in N, M."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Features(real.shape[1]), **ALONE)
    for features, is_real in ((real, True), (fake, False)):
        for part in features.split(CHUNK):
            metric.update(part.cpu().double(), real=is_real)
    return metric.compute().item()


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased squared MMD, cubic kernel (KID).

    Args:
        real: Features (N, D).
        fake: Features (M, D).
        subsets: Number of random subsets (always the same ones).
        subset_size: Samples a subset, at most half of the smaller set: subsets that are the set itself do not differ.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, min(len(real), len(fake)) // 2)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.default_generator.manual_seed(0)  # torch.manual_seed would re-seed those of all GPUs, too
        metric = KernelInceptionDistance(_Features(real.shape[1]), subsets=subsets, subset_size=size, **ALONE)
        metric.update(real.cpu().double(), real=True)
        metric.update(fake.cpu().double(), real=False)
        mean, std = metric.compute()
    return mean.item(), std.item()


def gaussian_discrepancy(real: Tensor, fake: Tensor) -> float:
    """1000 times the squared MMD of embeddings (N, D) and (M, D), kernel `exp(-|x - y|^2 / 200)`: CMMD of CLIP's (2401.09603).

    Means over all pairs, as published numbers have it: biased upwards by less than 20 / N + 20 / M for unit vectors.
    """
    real, fake = real.cpu().double(), fake.cpu().double()

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        rows = [torch.exp(torch.cdist(part, b).square() / (-2 * CMMD_SIGMA**2)).mean(1) for part in a.split(CHUNK)]
        return torch.cat(rows).mean()

    squared = mean_kernel(real, real) + mean_kernel(fake, fake) - 2 * mean_kernel(real, fake)
    return CMMD_SCALE * squared.item()


def neighbour_metrics(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage (Naeem et al. 2020) of `fake` (M, D) against `real` (N, D).

    A ball reaches from a sample to its k-th nearest neighbour of the same set.

    Raises:
        ValueError: if a set has no more than k samples.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"Neighbour metrics with k={k} need more than {k} images, got {len(real)} and {len(fake)}.")
    real, fake = real.float(), fake.float()
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    recalled, covered, hits = [], [], torch.zeros(len(fake), device=fake.device)
    for part, radius in zip(real.split(CHUNK), real_radius.split(CHUNK), strict=True):
        distance = _distances(part, fake)
        inside = distance < radius[:, None]
        hits += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distance < fake_radius).any(1))
    return {
        "precision": (hits > 0).float().mean().item(),
        "recall": torch.cat(recalled).float().mean().item(),
        "density": (hits.mean() / k).item(),
        "coverage": torch.cat(covered).float().mean().item(),
    }


def coverage_ceiling(num_real: int, num_fake: int, k: int = NEIGHBOURS) -> float:
    """Expected coverage when both sets come from one law: 1 - prod_j (N - j) / (N - j + M), j = 1 ... k."""
    missed = 1.0
    for j in range(1, k + 1):
        missed *= (num_real - j) / (num_real - j + num_fake)
    return 1 - missed


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance (N,) to the k-th nearest other sample; the nearest of all is the sample itself."""
    return torch.cat([_distances(part, features).kthvalue(k + 1, dim=1).values for part in features.split(CHUNK)])


def vendi_score(features: Tensor) -> float:
    """Effective number of distinct samples among features (n, D): exp of the entropy of the cosine kernel over n."""
    unit = F.normalize(features.cpu().double(), dim=1)
    spectrum = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp(min=0)
    return torch.special.entr(spectrum).sum().exp().item()


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean of 1 - cosine over the pairs of features (n, D), n at least 2: 0 where all are alike."""
    unit = F.normalize(features.cpu().double(), dim=1)
    count = len(unit)
    return 1 - ((unit @ unit.T).sum().item() - count) / (count * (count - 1))


def prompt_vendi_score(features: Tensor, prompts: Sequence[str], images_per_prompt: int = 10) -> float | None:
    """Mean Vendi score of groups of `images_per_prompt` images of one prompt, in their order; None if there is none."""
    scores, rows_of = [], {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    for rows in rows_of.values():
        groups = [features[rows[i : i + images_per_prompt]] for i in range(0, len(rows), images_per_prompt)]
        scores += [vendi_score(group) for group in groups if len(group) == images_per_prompt]
    return sum(scores) / len(scores) if scores else None


def label_in_prompt(prompt: str, labels: Sequence[str]) -> int | None:
    """Index of the longest label that the prompt names; None if there is none.

    Labels are found as whole words: no "ant" is in "an elephant", and no "shirt" in "a T-shirt". Case does not count,
    and an underscore is a space.
    """
    words = _words(prompt)
    found = [label for label in labels if _words(label).strip() and _words(label) in words]
    return list(labels).index(max(found, key=len)) if found else None


def _words(text: str) -> str:
    """The text's words in lower case, each between two spaces; a hyphen inside is part of a word."""
    return f" {' '.join(re.findall(WORD, text.casefold()))} "


def agreements(logits: Tensor, labels: Sequence[int | None]) -> Tensor:
    """Whether the strongest logit (N, K) of each image is its prompt's label, 1.0 or 0.0 (N,); NaN where that is None."""
    wanted = torch.tensor([-1 if label is None else label for label in labels], device=logits.device)
    return (logits.argmax(1) == wanted).float().masked_fill(wanted < 0, torch.nan)


def prompt_agreement(logits: Tensor, labels: Sequence[int | None]) -> float | None:
    """Fraction of images whose strongest logit (N, K) is their prompt's label; None-labelled images do not count."""
    mean = agreements(logits, labels).nanmean().item()
    return None if math.isnan(mean) else mean


def load_clip(model_id: str, device: torch.device | str = "cpu") -> Clip:
    """In float32, to be read only.

    Raises:
        ValueError: It cannot be loaded.
    """
    try:
        model = CLIPModel.from_pretrained(model_id, use_safetensors=True, dtype=torch.float32)
        return model.eval().to(device), CLIPProcessor.from_pretrained(model_id)
    except (OSError, ImportError) as error:
        raise UserError(f"CLIP model {model_id!r} could not be loaded; give a Hub id or a local folder.") from error


@torch.no_grad()
def _through_clip(clip: Clip, images: Tensor, prompts: Sequence[str], batch_size: int = 32) -> Iterator[CLIPOutput]:
    """The outputs of batches of images (N, 3, H, W) in [0, 1], on the model's device; N prompts, or one."""
    model, processor = clip
    for start in tqdm(range(0, len(images), batch_size), "CLIP", leave=False):
        pixels = list((images[start : start + batch_size] * 255).round().byte().cpu())
        text = list(prompts if len(prompts) == 1 else prompts[start : start + batch_size])
        inputs = processor(images=pixels, text=text, return_tensors="pt", padding=True, truncation=True)
        yield model(**inputs.to(model.device))


def clip_embeddings(clip: Clip, images: Tensor) -> Tensor:
    """Unit vectors (N, D) of images (N, 3, H, W) in [0, 1], on the CPU; `clip` as `load_clip` gives it."""
    return torch.cat([output.image_embeds.cpu() for output in _through_clip(clip, images, [""])])


def clip_scores(clip: Clip, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """100 * cosine (N,) between the CLIP embeddings of images (N, 3, H, W) in [0, 1] and of their prompts, on the CPU.

    Own code: torchmetrics 1.9's CLIPScore fails with transformers 5, and runs remote code for some model names.
    """
    outputs = _through_clip(clip, images, prompts)
    return torch.cat([100 * (output.image_embeds * output.text_embeds).sum(1).cpu() for output in outputs])

"""Distances between sets of features, and how well images agree with their prompts."""

import re
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor


NEIGHBOURS = 5  # k of the neighbour metrics
WORD = r"[^\W_]+(?:-[^\W_]+)*"


class _Features(nn.Identity):
    """Lets a torchmetrics image metric take features (N, D) for images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features (N, D) and (M, D), in float64; biased upwards in N, M."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Features(real.shape[1]))
    metric.update(real.cpu().double(), real=True)
    metric.update(fake.cpu().double(), real=False)
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
        metric = KernelInceptionDistance(_Features(real.shape[1]), subsets=subsets, subset_size=size)
        metric.update(real.cpu().double(), real=True)
        metric.update(fake.cpu().double(), real=False)
        mean, std = metric.compute()
    return mean.item(), std.item()


def neighbour_metrics(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage (Naeem et al. 2020) of `fake` (M, D) against `real` (N, D).

    A ball reaches from a sample to its k-th nearest neighbour of the same set.

    Raises:
        ValueError: if a set has no more than k samples.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"Neighbour metrics with k={k} need more than {k} images, got {len(real)} and {len(fake)}.")
    real, fake = real.float(), fake.float()
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    recalled, covered, hits = [], [], torch.zeros(len(fake), device=fake.device)
    for part, radius in zip(real.split(1024), real_radius.split(1024), strict=True):
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
    return torch.cat([_distances(part, features).kthvalue(k + 1, dim=1).values for part in features.split(1024)])


def vendi_score(features: Tensor) -> float:
    """Effective number of distinct samples among features (n, D): exp of the entropy of the cosine kernel over n."""
    unit = F.normalize(features.cpu().double(), dim=1)
    spectrum = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp(min=0)
    return torch.special.entr(spectrum).sum().exp().item()


def prompt_vendi_score(features: Tensor, prompts: Sequence[str], images_per_prompt: int = 10) -> float | None:
    """Mean Vendi score of groups of `images_per_prompt` images of one prompt, in their order; None if there is none."""
    scores = []
    for prompt in dict.fromkeys(prompts):
        rows = [i for i, other in enumerate(prompts) if other == prompt]
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


def prompt_agreement(logits: Tensor, labels: Sequence[int | None]) -> float | None:
    """Fraction of images whose strongest logit (N, K) is their prompt's label; None-labelled images do not count."""
    known = [i for i, label in enumerate(labels) if label is not None]
    if not known:
        return None
    wanted = torch.tensor([labels[i] for i in known], device=logits.device)
    return (logits[known].argmax(1) == wanted).float().mean().item()


def load_clip(model_id: str) -> tuple[CLIPModel, CLIPProcessor]:
    """In float32.

    Raises:
        ValueError: It cannot be loaded.
    """
    try:
        model = CLIPModel.from_pretrained(model_id, use_safetensors=True, dtype=torch.float32)
        return model, CLIPProcessor.from_pretrained(model_id)
    except (OSError, ImportError) as error:
        raise ValueError(f"CLIP model {model_id!r} could not be loaded; give a Hub id or a local folder.") from error


@torch.no_grad()
def clip_score(images: Tensor, prompts: Sequence[str], model_id: str, batch_size: int = 32) -> float:
    """Mean of 100 * cosine between the CLIP embeddings of images (N, 3, H, W) in [0, 1] and of their prompts.

    Own code: torchmetrics 1.9's CLIPScore fails with transformers 5, and runs remote code for some model names.

    Raises:
        ValueError: if the CLIP model cannot be loaded.
    """
    model, processor = load_clip(model_id)
    model.to(images.device).eval()
    total = 0.0
    for start in tqdm(range(0, len(images), batch_size), "CLIP score", leave=False):
        pixels = list((images[start : start + batch_size] * 255).round().byte().cpu())
        text = list(prompts[start : start + batch_size])
        inputs = processor(images=pixels, text=text, return_tensors="pt", padding=True, truncation=True)
        output = model(**inputs.to(images.device))
        total += (output.image_embeds * output.text_embeds).sum().item()
    return 100 * total / len(images)

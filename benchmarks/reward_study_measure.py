"""What models draw before and after reward fine-tuning, and what that is worth."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from diffusers import DDIMScheduler, DiffusionPipeline
from reward_study_report import Setting
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import parse_configs
from cm_diffusers.evaluation.compared import wanted_labels
from cm_diffusers.evaluation.features import classify, extract_features, load_extractor
from cm_diffusers.evaluation.metrics import frechet_distance, prompt_agreement, prompt_vendi_score
from cm_diffusers.evaluation.reference import ReferenceConfig, load_reference
from cm_diffusers.evaluation.report import hardware, replace_file
from cm_diffusers.evaluation.sampling import generate, load_pipeline
from cm_diffusers.places import public
from cm_diffusers.rewards import load_reward


SAMPLES = "samples.safetensors"


@dataclass
class SamplingConfig:
    """What is drawn."""

    feature_extractor: str = HfArg(help="Folder of a saved ImageClassifier.")
    num_images: int = HfArg(default=1000, help="Images, each for the caption of one real image.")
    seed: int = HfArg(default=0, help="Image i starts from seed + i.")
    eval_batch_size: int = HfArg(default=100, help="Images drawn at once.")


class Start(NamedTuple):
    """What is tuned, and how it is sampled.

    Attributes:
        source: Folder or Hub id of a pipeline.
        eta: Of DDIM, for a diffusion model; a student has its own scheduler.
    """

    source: str
    guidance_scale: float
    eta: float | None = None


class Measuring:
    """Images of the reference's captions, from the same noise whatever draws them.

    Args:
        evaluation: Flags of `SamplingConfig` and `ReferenceConfig`.
    """

    def __init__(self, evaluation: str) -> None:
        config, data = parse_configs((SamplingConfig, ReferenceConfig), __doc__, shlex.split(evaluation))
        self.evaluation, self.config, self.device = evaluation, config, PartialState().device
        self.extractor = load_extractor(config.feature_extractor, self.device)
        self.reference = load_reference(data, config.num_images)
        self.labels = wanted_labels(self.extractor, self.reference)
        self.real = extract_features(self.extractor, self.reference.images)
        where = data.dataset_name or data.train_data_dir
        extractor = public(config.feature_extractor)
        self.setting = Setting(config.num_images, config.seed, extractor, public(where), hardware())

    def images(self, folder: Path, start: Start, steps: int, tuned: Path | None = None) -> Tensor:
        """Images `(N, 3, H, W)` as first drawn, which are kept in the folder with their origin.

        Args:
            folder: Where they are kept.
            start: What draws, or what it was tuned from.
            steps: To draw with.
            tuned: What a training of it ended with.

        Raises:
            ValueError: They were drawn otherwise than the study now says.
        """
        path = folder / SAMPLES
        wanted = json.dumps({"start": start._asdict(), "steps": steps, "evaluation": self.evaluation})
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            images = (self._draw(stock_pipeline(start, tuned), start, steps) * 255).round().byte()
            replace_file(path, lambda aside: save_file({"images": images}, aside, {"origin": wanted}))
        with safe_open(path, "pt") as file:
            found = file.metadata()["origin"]
            images = file.get_tensor("images") / 255
        if found != wanted:
            raise ValueError(f"{path} was made by {found}, but the study now says {wanted}: delete it.")
        return images

    def quality(self, images: Tensor, reward: str) -> dict[str, float | None]:
        """The mean of a reward over images `(N, 3, H, W)`, and what it does not see."""
        worth, prompts, size = load_reward(reward).to(self.device), self.reference.prompts, self.config.eval_batch_size
        starts = range(0, len(images), size)
        found = [worth(images[i : i + size].to(self.device), prompts[i : i + size]).detach() for i in starts]
        features = extract_features(self.extractor, images)
        return {
            "reward": sum(part.double().sum().item() for part in found) / len(images),
            "agreement": prompt_agreement(classify(self.extractor, features), self.labels),
            "vendi": prompt_vendi_score(features, prompts),
            "fid": frechet_distance(self.real, features),
        }

    def _draw(self, pipe: DiffusionPipeline, start: Start, steps: int) -> Tensor:
        seeds = range(self.config.seed, self.config.seed + self.config.num_images)
        how = steps, start.guidance_scale, self.config.eval_batch_size
        return generate(pipe.to(self.device), self.reference.prompts, seeds, *how, eta=start.eta)[0]


def stock_pipeline(start: Start, tuned: Path | None = None) -> DiffusionPipeline:
    """Of diffusers: the start, or what became of it."""
    if start.eta is None:
        return load_pipeline(str(tuned or start.source))
    pipe = load_pipeline(start.source)
    if tuned is not None:
        pipe.load_lora_weights(tuned, use_safetensors=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe

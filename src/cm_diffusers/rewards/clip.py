"""CLIP and what was made of it: CLIP score, PickScore (2305.01569), HPSv2 (2306.09341), the LAION aesthetic score."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from cm_diffusers.errors import UserError, readable
from cm_diffusers.rewards.networks import folded_head, read_weights
from cm_diffusers.rewards.open_clip import from_open_clip
from cm_diffusers.rewards.preparation import Preparation


CLIP = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICK_SCORE = "yuvalkirstain/PickScore_v1"
HPS = "xswu/HPSv2"
HPS_FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
AESTHETIC = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")  # sac+logos+ava1-l14-linearMSE
PERCENT = 100.0  # scale of the CLIP score


class Towers(nn.Module):
    """Both towers of a CLIP model.

    Args:
        model: The network.
        tokenizer: Of its text tower.
        prepare: Images `(B, 3, H, W)` in [0, 1] -> what its image tower sees.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, prepare: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.prepare = model, tokenizer, prepare

    def images(self, images: Tensor) -> Tensor:
        """Embeddings `(B, D)` of norm 1 of images `(B, 3, H, W)` in [0, 1], with their gradient."""
        return normalize(projected(self.model.get_image_features(pixel_values=self.prepare(images))), dim=1)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """Embeddings `(B, D)` of norm 1; long prompts are cut."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        found = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return normalize(projected(found), dim=1)


def projected(found: Tensor | ModelOutput) -> Tensor:
    """Embeddings `(B, D)` in what CLIP's `get_*_features` return: transformers 4 a tensor, 5 an output."""
    return found if isinstance(found, Tensor) else found.pooler_output


class Agreement(nn.Module):
    """Scaled cosine of image and prompt."""

    def __init__(self, towers: Towers, scale: float) -> None:
        super().__init__()
        self.towers, self.scale = towers, scale

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.scale * (self.towers.images(images) * self.towers.texts(prompts)).sum(1)


class Aesthetic(nn.Module):
    """A linear function of the image's embedding."""

    def __init__(self, towers: Towers, head: nn.Linear) -> None:
        super().__init__()
        self.towers, self.head = towers, head

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.towers.images(images)).squeeze(1)


def load_towers(source: str, revision: str | None = None, processor: str | None = None) -> Towers:
    """A CLIP model of transformers in safetensors.

    Args:
        source: Folder or Hub id.
        revision: Of the Hub repository.
        processor: Folder or Hub id of tokenizer and image processor; by default, those of `source`.

    Raises:
        ValueError: One of them cannot be loaded.
    """
    with readable(f"The CLIP model {source} (a folder, or a Hub id)"):
        options = {"revision": revision, "dtype": torch.float32}
        return _towers(CLIPModel.from_pretrained(source, use_safetensors=True, **options), processor or source)


def _towers(model: CLIPModel, processor: str) -> Towers:
    prepare = Preparation.of(AutoImageProcessor.from_pretrained(processor))
    return Towers(model, AutoTokenizer.from_pretrained(processor), prepare)


def load_clip_score(source: str = CLIP, revision: str | None = None) -> Agreement:
    """100 cos, as `evaluation.metrics.clip_scores`."""
    return Agreement(load_towers(source, revision), PERCENT)


def load_pick_score(source: str = PICK_SCORE, revision: str | None = None) -> Agreement:
    """exp(logit_scale) cos: about 20."""
    towers = load_towers(source, revision, CLIP_H if source == PICK_SCORE else None)
    return Agreement(towers, towers.model.logit_scale.exp().item())


def load_hps(file: str, source: str = HPS, revision: str | None = None) -> Agreement:
    """cos: about 0.3; images that are not square are cropped, where the authors' code pads.

    Args:
        file: Name of the checkpoint, as open_clip saves one.
        source: Folder or Hub id where it is, or the checkpoint itself.
        revision: Of the Hub repository.

    Raises:
        ValueError: The checkpoint, or the configuration of its architecture, cannot be loaded.
    """
    with readable(f"The HPSv2 checkpoint {file} of {source} (a file, a folder, or a Hub id)"):
        tensors = from_open_clip(read_weights(source, file, revision))
        options = {"config": CLIPConfig.from_pretrained(CLIP_H), "dtype": torch.float32, "output_loading_info": True}
        model, report = CLIPModel.from_pretrained(None, state_dict=tensors, **options)
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"it lacks {len(missing)} of the weights of {CLIP_H}, such as {missing[0]}")
        return Agreement(_towers(model, CLIP_H), 1.0)


def load_aesthetic(source: str = AESTHETIC[0], revision: str | None = None) -> Aesthetic:
    """From about 1 to 10: the LAION aesthetic predictor, version 2.

    Args:
        source: Folder or Hub id where the head is, or its file.
        revision: Of the Hub repository.

    Raises:
        ValueError: The head, or CLIP, cannot be loaded.
    """
    with readable(f"The aesthetic head {source} (a file, a folder, or a Hub id)"):
        head = folded_head(read_weights(source, AESTHETIC[1], revision))
    return Aesthetic(load_towers(CLIP), head)

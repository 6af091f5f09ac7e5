"""ImageReward (2304.05977): what people prefer, by a BLIP whose text tower looks at the image."""

from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.blip.modeling_blip_text import BlipTextModel

from cm_diffusers.errors import readable
from cm_diffusers.rewards.networks import folded_head, read_weights
from cm_diffusers.rewards.preparation import Preparation


IMAGE_REWARD = ("THUDM/ImageReward", "ImageReward.pt")
TOKENIZER = "bert-base-uncased"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the scores that it was trained on
VISION = BlipVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
    layer_norm_eps=1e-6,
)
TEXT = BlipTextConfig(num_attention_heads=12, encoder_hidden_size=1024)
RENAMED = {  # BLIP's image tower, the authors' names and those of transformers
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.proj.": ".self_attn.projection.",
    ".attn.qkv.": ".self_attn.qkv.",
}


class ImageReward(nn.Module):
    """Standardised score of image and prompt.

    Args:
        tensors: The published weights, by the authors' names.
        tokenizer: Of the text tower.
        vision: Configuration of the image tower.
        text: Configuration of the text tower.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        vision: BlipVisionConfig = VISION,
        text: BlipTextConfig = TEXT,
    ) -> None:
        super().__init__()
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.vision.load_state_dict({_renamed(k): v for k, v in _below("blip.visual_encoder.", tensors).items()})
        self.text.load_state_dict(_below("blip.text_encoder.", tensors))
        self.head = folded_head(_below("mlp.", tensors))
        self.tokenizer = tokenizer
        self.prepare = Preparation(
            vision.image_size, (vision.image_size,) * 2, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD), "bicubic"
        )

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Rewards `(B,)`, about -2 to 2, of images `(B, 3, H, W)` in [0, 1]; long prompts are cut."""
        seen = self.vision(pixel_values=self.prepare(images)).last_hidden_state
        options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **options).to(images.device)
        read = self.text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0]).squeeze(1) - MEAN) / STD


def load_image_reward(source: str = IMAGE_REWARD[0], revision: str | None = None) -> ImageReward:
    """
    Args:
        source: Folder or Hub id where the weights are, or their file.
        revision: Of the Hub repository.

    Raises:
        ValueError: The weights, or the tokenizer, cannot be loaded.
    """
    with readable(f"ImageReward {source} (a file, a folder, or a Hub id)"):
        return ImageReward(read_weights(source, IMAGE_REWARD[1], revision), AutoTokenizer.from_pretrained(TOKENIZER))


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    found.pop("embeddings.position_ids", None)  # counted, not learnt
    return found


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return f"post_layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name

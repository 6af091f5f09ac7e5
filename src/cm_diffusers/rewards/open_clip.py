"""Weights of an open_clip model under the names of transformers' CLIPModel."""

from torch import Tensor


RENAMED = {  # in this order
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.": ".self_attn.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # spelled so there
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
TRANSPOSED = ("visual.proj", "text_projection")


def from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights for `CLIPModel`, which has query, key and value apart."""
    found = {}
    for name, value in tensors.items():
        theirs, value = _renamed(name), value.T.contiguous() if name in TRANSPOSED else value
        if ".in_proj_" in theirs:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                found[theirs.replace(".in_proj_", f".{part}_proj.")] = third.contiguous()
        else:
            found[theirs] = value
    return found


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name

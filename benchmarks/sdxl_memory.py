"""Peak memory of distilling a Stable Diffusion XL shaped teacher: LoRA against the full network.

The teacher is random and has SDXL's layout with fewer channels; memory does not depend on what the weights say.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from reporting import write_report
from train_step import BenchmarkConfig, measure_memory
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.report import hardware


@dataclass
class MemoryConfig:
    """The size of the teacher and of a step."""

    channels: int = HfArg(default=80, help="Channels of the first level; SDXL has 320.")
    resolution: int = HfArg(default=128, help="Side of the images, in pixels.")
    train_batch_size: int = HfArg(default=1, help="Images per step.")
    lora_rank: int = HfArg(default=16, help="Rank of the adapters; SDXL's LCM-LoRA has 64 on four times the channels.")
    num_threads: int = HfArg(default=2, help="Threads of torch on a CPU.")
    output_dir: str = HfArg(default="runs/benchmark_sdxl_memory", help="Where sdxl_memory.md and .json go.")


CONFIGS = (MemoryConfig,)


def sdxl_shaped(channels: int, tokenizer: str) -> StableDiffusionXLPipeline:
    """SDXL's blocks: no attention at the first level, 2 and 10 transformer layers at the others."""
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=64, max_position_embeddings=tokens.model_max_length, bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(channels, 2 * channels, 4 * channels), norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(1, 2, 4), cross_attention_dim=128,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=channels // 5 * 4,
        projection_class_embeddings_input_dim=64 + 6 * (channels // 5 * 4),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=8, scaling_factor=0.13025,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    towers = CLIPTextModel(text), CLIPTextModelWithProjection(text)
    return StableDiffusionXLPipeline(vae, *towers, tokens, tokens, unet, scheduler)


def one_image(folder: Path, resolution: int) -> Path:
    folder.mkdir()
    Image.effect_noise((resolution, resolution), 60).convert("RGB").save(folder / "0.png")
    (folder / "0.txt").write_text("a photo of a bag", "utf-8")
    return folder


def measure(config: MemoryConfig) -> dict[str, float]:
    """Parameters of the UNet in millions, and peak MiB: "idle" holds the teacher alone."""
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name)
        pipe = sdxl_shaped(config.channels, "assets/fashion_teacher/tokenizer")
        pipe.save_pretrained(workdir / "teacher")
        parameters = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
        del pipe
        step = BenchmarkConfig(
            str(workdir / "teacher"), str(one_image(workdir / "images", config.resolution)), config.resolution, 1,
            config.train_batch_size, lora_rank=config.lora_rank, memory_steps=2, num_threads=config.num_threads,
        )  # fmt: skip
        return {"parameters": parameters} | measure_memory(step, workdir)


def as_table(config: MemoryConfig, found: dict[str, float]) -> str:
    lines = ["| distillation | peak, MiB | above the teacher alone, MiB | copies of the UNet above it |"]
    lines.append("| --- | ---: | ---: | ---: |")
    weights = found["parameters"] * 1e6 * 4 / 2**20
    for kind in ("full", "lora"):
        above = found[kind] - found["idle"]
        lines.append(f"| {kind} | {found[kind]:.0f} | {above:.0f} | {above / weights:.2f} |")
    setting = f"UNet of {found['parameters']:.0f} M parameters ({weights:.0f} MiB in float32), {config.resolution} px, batch {config.train_batch_size}, rank {config.lora_rank}, {hardware()}."
    return "\n".join(lines) + f"\n\nFull over LoRA: {found['full'] / found['lora']:.2f}. {setting}\n"


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    torch.set_num_threads(config.num_threads)
    found = measure(config)
    table = as_table(config, found)
    write_report(Path(config.output_dir), "sdxl_memory", table, {"setting": asdict(config), "found": found})
    print(table)


if __name__ == "__main__":
    run(main)

"""Peak memory of an LCM-LoRA of a network of Stable Diffusion 1.5's size on a CPU (Linux), by how the base is kept.

The teacher is random: memory does not depend on what the weights say. It takes 4.2 GB of disk while this runs.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from reporting import write_report
from sdxl_memory import one_image
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.report import hardware


ROOT = Path(__file__).parents[1]
SETTINGS = {  # the rows
    "base in float32": [],
    "base in bfloat16": ["--cast_teacher_unet", "bf16"],
    "base in bfloat16, gradient checkpointing": ["--cast_teacher_unet", "bf16", "--gradient_checkpointing"],
}


@dataclass
class LoraMemoryConfig:
    """A step, and where its measure goes."""

    resolution: int = HfArg(default=256, help="Side of the images, in pixels.")
    train_batch_size: int = HfArg(default=1, help="Images per step.")
    max_train_steps: int = HfArg(default=2, help="Steps of each run.")
    lora_rank: int = HfArg(default=64, help="Rank of the adapters.")
    teacher_dir: str | None = HfArg(default=None, help="Keep the random teacher there, or take it from there.")
    only: list[str] | None = HfArg(default=None, help="Rows to measure; all if not given.")
    output_dir: str = HfArg(default="runs/benchmark_lora_memory", help="Where lora_memory.md and .json go.")


CONFIGS = (LoraMemoryConfig,)


def random_teacher(folder: Path) -> None:
    """Configs of Stable Diffusion 1.5; the letters of the bundled teacher's tokenizer, and as many words as there."""
    blocks = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, down_block_types=blocks,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(blocks)),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
    )  # fmt: skip
    letters = AutoTokenizer.from_pretrained(ROOT / "assets" / "fashion_teacher" / "tokenizer").get_vocab()
    words = letters | {f"unused-{index}": index for index in range(len(letters), 49408)}
    tokens = CLIPTokenizer(vocab=words, merges=[], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(vae, CLIPTextModel(text), tokens, unet, scheduler, **parts).save_pretrained(folder)


@contextmanager
def teacher(folder: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        if not (place / "model_index.json").is_file():
            random_teacher(place)
        yield place


def peak(command: list[str]) -> dict[str, float]:
    """Of a process, in GiB: resident, and what of it is not pages of a mapped file, which the system may drop and read again."""
    found = {"VmHWM": 0.0, "RssAnon": 0.0}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            for name in found:
                if kibibytes := re.search(rf"{name}:\s+(\d+)", status):
                    found[name] = max(found[name], int(kibibytes[1]) / 2**20)
            time.sleep(0.05)
    finally:
        process.kill()
    if process.returncode:
        raise ValueError(f"A run ended with {process.returncode}; its error stands above.")
    return found


def measure(config: LoraMemoryConfig) -> dict[str, dict[str, float]]:
    found = {}
    with teacher(config.teacher_dir) as folder, tempfile.TemporaryDirectory() as name:
        data = one_image(Path(name) / "images", config.resolution)
        for row, flags in SETTINGS.items():
            if config.only is None or row in config.only:
                words = {
                    "pretrained_teacher_model": folder, "train_data_dir": data, "latent_cache_dir": f"{name}/cache",
                    "output_dir": f"{name}/{len(found)}", "resolution": config.resolution, "lora_rank": config.lora_rank,
                    "train_batch_size": config.train_batch_size, "max_train_steps": config.max_train_steps,
                    "mixed_precision": "bf16", "report_to": "none",
                }  # fmt: skip
                given = [word for key, value in words.items() for word in (f"--{key}", str(value))]
                script = str(ROOT / "training" / "distill_lcm.py")
                found[row] = peak([sys.executable, script, "--lora", *given, *flags])
    return found


def as_table(config: LoraMemoryConfig, found: dict[str, dict[str, float]]) -> str:
    lines = ["| LoRA of Stable Diffusion 1.5 | peak, GiB | without mapped files, GiB |", "| --- | ---: | ---: |"]
    lines += [f"| {row} | {of['VmHWM']:.2f} | {of['RssAnon']:.2f} |" for row, of in found.items()]
    setting = f"{config.resolution} px, batch {config.train_batch_size}, rank {config.lora_rank}, autocast in bfloat16"
    mapped = "A float32 base is used where its file is mapped, so the last column lacks it."
    return "\n".join(lines) + f"\n\nRandom weights in float32 files, {setting}, AdamW, {hardware()}. {mapped}\n"


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    found = measure(config)
    table = as_table(config, found)
    write_report(Path(config.output_dir), "lora_memory", table, {"setting": asdict(config), "found": found})
    print(table)


if __name__ == "__main__":
    run(main)

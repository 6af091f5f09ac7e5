"""Videos longer than the clips of a student: how far they drift from their first frame, by the way they are made.

Every way draws the same prompts from the same seeds. Prompts are those of things that stay in view, which bounce or
rotate; content is compared where they stay upright, too.
"""

import runpy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import AnimateDiffPipeline
from matplotlib.figure import Figure
from reporting import write_report
from torch import Tensor
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from cm_diffusers import ConsistencyVideoPipeline
from cm_diffusers.data.moving_articles import MOST_FRAMES
from cm_diffusers.data.video import VideoDataConfig
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation import motion
from cm_diffusers.evaluation.candidates import check_output
from cm_diffusers.evaluation.features import extract_features, load_extractor
from cm_diffusers.evaluation.metrics import frechet_distance
from cm_diffusers.evaluation.real_clips import RealClips, load_real_clips
from cm_diffusers.evaluation.report import filled_columns, hardware, headed, write_plot
from cm_diffusers.evaluation.video_report import Shown, write_animation
from cm_diffusers.evaluation.video_sampling import load_video_pipeline
from cm_diffusers.places import public


FILES = Path(__file__).resolve().parent.parent / "pipelines"
PER_ARTICLE, STAYING = 6, 2  # of the built-in clips with an article, those that stay in view
COLUMNS = {  # key of a row -> heading and format
    "way": ("", "{}"),
    "calls": ("clips a step", "{}"),
    "content_drift": ("content drift", "{:.3f}"),
    "colour_drift": ("colour drift", "{:.3f}"),
    "seams": ("change at seams / elsewhere", "{:.2f}"),
    "static_rate": ("static", "{:.3f}"),
    "fd_frames": ("{distance} of frames", "{:.2f}"),
    "seconds": ("s/video", "{:.2f}"),
}
Draw = Callable[[list[str], range], Tensor]


@dataclass
class LongVideoConfig:
    """What is drawn, and how it is measured."""

    student: str = HfArg(
        default="runs/animatelcm_student_fashion/student", help="Folder or Hub id of a video student."
    )
    moving_articles: str = HfArg(default="assets/fashion_captioned/test", help="Images that real clips are made of.")
    feature_extractor: str = HfArg(default="assets/fashion_classifier", help="Folder of a saved ImageClassifier.")
    num_frames: int = HfArg(default=32, help="Frames of a video.")
    clip_frames: int = HfArg(default=8, help="Frames that the network sees at once.")
    num_inference_steps: int = HfArg(default=4, help="Steps.")
    num_videos: int = HfArg(default=96, help="Videos drawn in each way.")
    seed: int = HfArg(default=0, help="Video i starts from seed + i.")
    batch_size: int = HfArg(default=8, help="Videos drawn at once.")
    crop_zoom: float = HfArg(default=1.3, help="How much frames are enlarged about the thing before it is compared.")
    num_shown: int = HfArg(default=2, help="Videos of each way in the animation.")
    output_dir: str = HfArg(default="assets/results/long_video", help="Where tables, plot and animation go.")


CONFIGS = (LongVideoConfig,)


def ways(config: LongVideoConfig) -> dict[str, tuple[int, Draw]]:
    """By name: how many clips the network sees in each step, and (prompts, seeds) -> videos (B, F, 3, R, R)."""
    pipe = ConsistencyVideoPipeline.from_pipe(load_video_pipeline(config.student))
    parts = {name: pipe.components[name] for name in AnimateDiffPipeline._get_signature_keys(AnimateDiffPipeline)[0]}
    N, F, half = config.clip_frames, config.num_frames, config.clip_frames // 2

    def of_file(name: str, **arguments: object) -> Draw:
        (cls,) = (value for key, value in runpy.run_path(str(FILES / f"{name}.py")).items() if key.startswith("Video"))
        return drawing(cls(**parts), config, clip_frames=N, **arguments)

    def free_noise(pipe: AnimateDiffPipeline, kind: str) -> Draw:
        draw = drawing(pipe, config)

        def one_by_one(prompts: list[str], seeds: range) -> Tensor:
            pipe.enable_free_noise(context_length=N, context_stride=half, noise_type=kind)
            try:
                return torch.cat([draw([text], range(i, i + 1)) for text, i in zip(prompts, seeds, strict=True)])
            finally:
                pipe.disable_free_noise()

        return one_by_one

    apart, overlapping = -(-F // N), -(-(F - N) // half) + 1
    bridged = 1 + 2 * -(-(F - N) // (N - N * 3 // 8))
    stock = AnimateDiffPipeline(**parts)
    return {
        "independent clips": (apart, of_file("video_co_denoising", stride=N)),
        "independent clips, shared noise": (apart, of_file("video_co_denoising", stride=N, share_noise=True)),
        "co-denoising": (overlapping, of_file("video_co_denoising", stride=half)),
        "co-denoising, shared noise": (overlapping, of_file("video_co_denoising", stride=half, share_noise=True)),
        "look-back": (bridged, of_file("video_look_back")),
        "FreeNoise, noise of the start shared": (overlapping, free_noise(stock, "shuffle_context")),
        "FreeNoise, noise shared in all steps": (overlapping, free_noise(pipe, "shuffle_context")),
    }


def drawing(pipe: AnimateDiffPipeline, config: LongVideoConfig, **arguments: object) -> Draw:
    pipe.set_progress_bar_config(disable=True)
    shape = {"num_frames": config.num_frames, "num_inference_steps": config.num_inference_steps, "guidance_scale": 1.0}

    def draw(prompts: list[str], seeds: range) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        lists = prompts, generators
        prompt, generator = lists if len(prompts) > 1 else (prompts[0], generators[0])  # FreeNoise takes no lists
        return pipe(prompt, generator=generator, output_type="pt", **shape, **arguments).frames

    return draw


def real_clips(config: LongVideoConfig) -> RealClips:
    """As long as built-in clips can be, of things that stay in view."""
    count = config.num_videos * PER_ARTICLE // STAYING
    data = VideoDataConfig(
        moving_articles=config.moving_articles, num_clips=count, sample_n_frames=min(config.num_frames, MOST_FRAMES),
        sample_stride=1, resolution=32,
    )  # fmt: skip
    clips = load_real_clips(data, count, 1)[0]
    staying = [motion.direction_in_prompt(caption) is None for caption in clips.captions]
    return replace(clips, rows=[row for row, stays in zip(clips.rows, staying, strict=True) if stays])


class LongVideoComparison:
    """Measures videos against real clips; `rows`, the distance of each frame to the first, and what is shown."""

    def __init__(self, config: LongVideoConfig) -> None:
        self.config, self.extractor = config, load_extractor(config.feature_extractor, "cpu")
        clips = real_clips(config)
        self.prompts = clips.captions
        self.upright = torch.tensor([not motion.is_turning(prompt) for prompt in self.prompts])
        self.rows: list[dict] = []
        self.distances: dict[str, list[float]] = {}
        self.shown: list[Shown] = []
        real = torch.cat([batch for batch, _ in clips.batches(config.batch_size)])
        self.threshold = motion.static_threshold(motion.frame_change(real))
        self.real = self._frames(real)
        self._measure(f"real clips of {real.shape[1]} frames", real)

    def draw(self, name: str, calls: int, draw: Draw) -> None:
        size, videos, started = self.config.batch_size, [], time.perf_counter()
        for start in tqdm(range(0, len(self.prompts), size), desc=name):
            prompts = self.prompts[start : start + size]
            first = self.config.seed + start
            videos.append((draw(prompts, range(first, first + len(prompts))) * 255).round() / 255)
        seconds = (time.perf_counter() - started) / len(self.prompts)
        videos = torch.cat(videos)
        self.shown.append(Shown(name, name, videos[: self.config.num_shown]))
        self._measure(
            name, videos, calls=calls, seconds=seconds, fd_frames=frechet_distance(self.real, self._frames(videos))
        )

    def _measure(self, name: str, videos: Tensor, **found: float) -> None:
        content = self._features(motion.centred(videos[self.upright], self.config.crop_zoom))
        distances = motion.content_distances(content).mean(0)
        self.distances[name] = distances.tolist()
        self.rows.append(
            {
                "way": name,
                "content_drift": distances.mean().item(),
                "colour_drift": motion.colour_drift(videos).mean().item(),
                "seams": seams(videos, self.config.clip_frames),
                "static_rate": (motion.frame_change(videos) < self.threshold).float().mean().item(),
                **found,
            }
        )

    def _frames(self, videos: Tensor) -> Tensor:
        """Features (N, D) of some frames of each."""
        return self._features(videos[:, motion.spread_frames(videos.shape[1], self.config.clip_frames)]).flatten(0, 1)

    def _features(self, videos: Tensor) -> Tensor:
        return extract_features(self.extractor, videos.flatten(0, 1)).unflatten(0, videos.shape[:2])


def seams(videos: Tensor, clip_frames: int) -> float:
    """Mean change from one frame to the next where a clip ends, over that elsewhere: 1 where no seam is seen."""
    change = videos.diff(dim=1).abs().mean((0, 2, 3, 4))
    at_seam = (torch.arange(len(change)) + 1) % clip_frames == 0
    return (change[at_seam].mean() / change[~at_seam].mean()).item()


def markdown(rows: list[dict], config: LongVideoConfig) -> str:
    return (
        f"{filled_columns(rows, headed(COLUMNS, config.feature_extractor))}\n\n{config.num_videos} videos of {config.num_frames} frames from {config.student}, which sees "
        f"{config.clip_frames} at once; {config.num_inference_steps} steps, seeds from {config.seed}. Content drift: mean "
        f"cosine distance to the first frame, features of {config.feature_extractor}, of things that stay upright. Seams are "
        f"between frames {config.clip_frames} and {config.clip_frames + 1} and so on. FreeNoise draws one video at a time, "
        f"the others {config.batch_size}. {hardware()}.\n"
    )


def plot(distances: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in distances.items():
        style = {"color": "grey", "linestyle": ":"} if name.startswith("real") else {}
        axes.plot(range(2, len(values) + 2), values, label=name, **style)
    axes.set(xlabel="frame", ylabel="content: distance to the first frame")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    check_output(config.output_dir)
    found = ways(config)  # a student that cannot be loaded is found before clips are measured
    folder, comparison = Path(config.output_dir), LongVideoComparison(config)
    for name, (calls, draw) in found.items():
        comparison.draw(name, calls, draw)
    table = markdown(comparison.rows, config)
    numbers = {
        "setting": {key: public(value) for key, value in asdict(config).items()},
        "rows": comparison.rows,
        "distances": comparison.distances,
    }
    write_report(folder, "long_video", table, numbers)
    write_plot(folder / "plot.png", plot(comparison.distances), 120)
    write_animation(folder / "long_video.gif", comparison.shown, comparison.prompts[: config.num_shown])
    print(table)


if __name__ == "__main__":
    run(main)

"""What a step of diffusers' LCM example costs: nothing cached, guidance in two passes, optimizer and EMA one tensor at a time.

A loop of our own that makes the same passes in the same order as that example; the arithmetic between them is
cm_diffusers'. Its images are decoded beforehand, which the example does in worker processes: an advantage for it.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cm_diffusers.data.preprocessing import View, decode_image, preprocess
from cm_diffusers.data.sources import DataConfig, load_image_text
from cm_diffusers.diffusion.denoisers import as_denoiser
from cm_diffusers.diffusion.distances import huber
from cm_diffusers.diffusion.guidance import guidance_embedding
from cm_diffusers.diffusion.preconditioning import lcm_scalings
from cm_diffusers.diffusion.process import DiscreteVP, Prediction, append_dims, diffuse
from cm_diffusers.diffusion.solvers import ddim_step
from cm_diffusers.diffusion.times import solver_grid
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.models.students import frozen_copy, make_student
from cm_diffusers.objectives.lcm import LCMConfig


Examples = Iterator[tuple[Tensor, list[str]]]


def pixel_batches(data: DataConfig, batches: int, device: torch.device) -> Examples:
    """Images `(B, 3, R, R)` and captions of the first `batches` batches, again and again."""
    rows = load_image_text(data)
    size, kept = data.train_batch_size, []
    for k in range(batches):
        records = [rows[i % len(rows)] for i in range(k * size, (k + 1) * size)]
        images = [preprocess(decode_image(record[data.image_column]), data, View()) for record in records]
        captions = [record[data.caption_column] for record in records]
        kept.append((torch.stack(images).to(device), [c if isinstance(c, str) else c[0] for c in captions]))
    while True:
        yield from kept


def encode_prompts(pipe: DiffusionPipeline, captions: list[str]) -> Tensor:
    """Embeddings `(B, L, D)`."""
    ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return pipe.text_encoder(ids.to(pipe.device))[0]


class ReferenceLCM:
    """The example's training loop for the full student.

    Args:
        pipe: The teacher.
        examples: See `pixel_batches`.
        dtype: Of autocast; None runs in float32.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        examples: Examples,
        method: LCMConfig,
        optim: OptimConfig,
        dim: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.pipe, self.examples, self.method, self.optim, self.dim = pipe, examples, method, optim, dim
        self.process = DiscreteVP.from_scheduler(pipe.scheduler)
        self.grid = solver_grid(self.process.num_train_timesteps, method.num_ddim_timesteps)
        self.student = make_student(pipe.unet, dim)
        self.target = frozen_copy(self.student)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=optim.learning_rate, fused=False)
        self.autocast = partial(torch.autocast, pipe.device.type, dtype=dtype, enabled=dtype is not None)
        with torch.no_grad():
            self.empty = encode_prompts(pipe, [""])

    def step(self) -> None:
        pixels, captions = next(self.examples)
        with torch.no_grad(), self.autocast():
            x0 = self.pipe.vae.encode(pixels).latent_dist.sample() * self.pipe.vae.config.scaling_factor
            states = encode_prompts(self.pipe, captions)
        with self.autocast():
            loss = self.loss(x0.float(), states)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average(0.95)

    def loss(self, x0: Tensor, states: Tensor) -> Tensor:
        t = self.grid[torch.randint(len(self.grid), (len(x0),))]
        s = (t - int(self.grid[0]) - 1).clamp(min=0)
        w = torch.empty(len(x0), device=x0.device).uniform_(self.method.w_min, self.method.w_max)
        x_t = diffuse(self.process, x0, torch.randn_like(x0), t)
        embedding = guidance_embedding(w, self.dim)
        online = self.consistency(self.student, x_t, t, states, embedding)
        with torch.no_grad():
            x_s = ddim_step(self.guided(states, w), self.process, x_t, t, s)
            target = self.consistency(self.target, x_s, s, states, embedding)
        return huber(online, target).mean()

    def guided(self, states: Tensor, w: Tensor) -> Callable[[Tensor, Tensor], Prediction]:
        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            network = self.denoiser(self.pipe.unet)
            conditional = network(x_t, t, {"encoder_hidden_states": states})
            unconditional = network(x_t, t, {"encoder_hidden_states": self.empty.expand_as(states)})
            pairs = zip(conditional, unconditional, strict=True)
            return Prediction(*(c + append_dims(w, c) * (c - u) for c, u in pairs))

        return denoise

    def consistency(self, network: nn.Module, x_t: Tensor, t: Tensor, states: Tensor, embedding: Tensor) -> Tensor:
        x0 = self.denoiser(network)(x_t, t, {"encoder_hidden_states": states, "timestep_cond": embedding}).x0
        c_skip, c_out = lcm_scalings(t, self.method.timestep_scaling_factor)
        return append_dims(c_skip, x_t) * x_t + append_dims(c_out, x_t) * x0

    def denoiser(self, network: nn.Module) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Prediction]:
        return as_denoiser(network, self.process, self.pipe.scheduler.config.prediction_type)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        for mine, theirs in zip(self.target.parameters(), self.student.parameters(), strict=True):
            mine.mul_(decay).add_(theirs, alpha=1 - decay)

"""What processes that train together do: `distributed_worker.py FOLDER` starts one, two, three, and two.

The two write what they found to `rank-<n>.safetensors`: with whole networks and, below `sharded/`, with networks in parts.
"""

import os
import sys
from functools import partial
from itertools import count
from pathlib import Path

import sharding_worker
import torch
import torch._dynamo  # once, and not in each fork
from diffusers import UNet2DModel
from processes import together
from safetensors.torch import save_file
from scripts import image_folder, models_folder
from torch import Tensor, nn
from toys import ToyConfig, ToyObjective, source, toy_network, toy_networks, toy_trainer

from cm_diffusers.diffusion.trigflow import TrigFlowView
from cm_diffusers.diffusion.views import EDMView
from cm_diffusers.engine.optimizers import OptimConfig
from cm_diffusers.engine.parts import whole
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.objectives.ct import CTConfig, CTObjective
from cm_diffusers.objectives.scm import SCMConfig, SCMObjective
from cm_diffusers.types import Batch, Loss, Networks


SETTINGS = {"checkpointing_steps": 2, "export_ema_decay": 0.9, "gradient_accumulation_steps": 2}
OPTIM = OptimConfig(learning_rate=1e-2, adam_epsilon=1e-3)


class Watching(ToyObjective):
    """Keeps the data and the loss of every micro-batch of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.losses = [], []

    def __call__(self, nets, batch, progress) -> Loss:
        loss = super().__call__(nets, batch, progress)
        self.inputs.append(batch.x0)
        self.losses.append(loss.value.detach())
        return loss


class Duel:
    """A student that learns through the critic, and a critic that looks at the student: both graphs in both turns."""

    config = ToyConfig()

    def __init__(self) -> None:
        self.players = {"student": self.student, "critic": self.critic}

    def student(self, nets: Networks, batch, progress) -> Loss:
        return Loss(nets.critic(nets.student(batch.x0)).square().mean(), {})

    def critic(self, nets: Networks, batch, progress) -> Loss:
        return Loss((nets.critic(nets.student(batch.x0)) - batch.cond["goal"]).square().mean(), {})


def state(trainer) -> dict[str, Tensor]:
    found = {"student": trainer.student.state_dict(), "target": trainer.nets.target.state_dict()}
    found["export_ema"] = trainer.averages.state()["export_ema"]
    return {f"{name}/{key}": whole(value) for name, values in found.items() for key, value in values.items()}


def full_run(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    objective, reported = Watching(), []
    trainer = toy_trainer(
        folder / "whole",
        toy_networks(0, dropout=0.5),
        objective,
        OPTIM,
        callbacks=[lambda _, loss: reported.append(loss.value)],
        **SETTINGS,
    )
    trainer.fit(source(4, rank, ranks))
    seen = {
        "inputs": torch.cat(objective.inputs),
        "losses": torch.stack(objective.losses),
        "reported": torch.stack(reported),
    }
    return state(trainer) | seen


def resumed_run(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    checkpoint = str(folder / "whole" / "checkpoint-2")
    nets = toy_networks(9, dropout=0.5)
    trainer = toy_trainer(folder / "resumed", nets, Watching(), OPTIM, resume_from_checkpoint=checkpoint, **SETTINGS)
    trainer.fit(source(4, rank, ranks))
    return {f"resumed/{name}": value for name, value in state(trainer).items()}


def half_batches(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    trainer = toy_trainer(folder / "halves", optim=OPTIM)
    trainer.fit(source(4, rank, ranks))
    return {f"halves/{name}": whole(value) for name, value in trainer.student.state_dict().items()}


def two_players(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    nets = Networks(toy_network(0), critic=toy_network(1))
    toy_trainer(folder / "duel", nets, Duel(), OPTIM).fit(source(4, rank, ranks))
    return {f"duel/{name}": whole(value) for name, value in nets.critic.state_dict().items()}


class ToItself(CTObjective):
    """Consistency of a point with itself: the loss is 0 exactly, if both sides draw the same dropout masks."""

    def grid(self, progress) -> Tensor:
        return torch.ones(2, dtype=torch.float64)


def shared_masks(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(
        8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, dropout=0.5, add_attention=False, **blocks
    )
    losses = []
    trainer = toy_trainer(
        folder / "masks",
        Networks(unet.train()),
        ToItself(CTConfig(), EDMView(0.5, "adm")),
        OPTIM,
        callbacks=[lambda trainer, loss: losses.append(loss.value)],
        max_train_steps=2,
        gradient_checkpointing=True,
    )
    trainer.fit(lambda start: (Batch(torch.randn(4, 1, 8, 8)) for _ in count(start)))
    with torch.no_grad():
        outputs = [unet.train()(torch.ones(1, 1, 8, 8), 0.0).sample for _ in range(2)]
    return {"masks/loss": torch.stack(losses), "masks/differ": (outputs[0] != outputs[1]).any()}


class Jump(nn.Module):
    """A network in TrigFlow's coordinates."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layers = toy_network(seed, dropout=0.5)

    def forward(self, shown: Tensor, told: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.layers(shown) * torch.cos(told)[:, None],)


def matched(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    """sCM passes the student for a tangent, then twice with a gradient: for the loss, and for samples that are matched."""
    nets = Networks(WithTimeWeight(Jump(0)), teacher=Jump(1).eval().requires_grad_(False), critic=Jump(0).eval())
    objective = SCMObjective(SCMConfig(tangent_warmup_steps=1), TrigFlowView(0.5), dmd_weight=0.1)
    batches = source(4, rank, ranks)
    trainer = toy_trainer(folder / "matched", nets, objective, OPTIM, gradient_accumulation_steps=2)
    trainer.fit(lambda start: (Batch(batch.x0) for batch in batches(start)))
    found = {one.name: one.raw.state_dict() for one in trainer.players}
    return {f"matched/{name}/{key}": whole(v) for name, values in found.items() for key, v in values.items()}


TOYS = (full_run, resumed_run, half_batches, two_players, shared_masks, matched)


def place() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def toys(folder: Path, prefix: str, settings: dict[str, str], runs: tuple = TOYS) -> dict[str, Tensor]:
    found = {}
    with sharding_worker.launched(settings):
        for run in runs:
            found |= run(folder / prefix, *place())
    return {f"{prefix}{name}": value for name, value in found.items()}


def of_networks(folder: Path, rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    """By name: of whole networks and of such in parts, where they can be compared."""
    work, found = sharding_worker, {}
    for name, settings in (("whole", {}), ("parts", work.SHARDED)):
        with work.launched(settings):
            at = folder / name
            seed = rank if name == "parts" else 0  # the first process's weights count
            found[f"{name}/full"] = work.distilled(at / "full", rank, "full", seed)
            with work.launched(work.LARGE):
                found[f"{name}/lora"] = work.distilled(at / "lora", rank, "lora", seed)
            found[f"{name}/tangents"] = work.tangents(at / "tangents", rank)
            found[f"{name}/rewarded"] = work.rewarded(at / "rewarded")
            found[f"{name}/motion"] = work.motion(at / "motion", rank)
            found[f"{name}/diverged"] = work.diverged(at / "diverged", rank, ranks)
            found[f"{name}/best"] = work.best(at / "best", rank, ranks)
            work.drawn(at / "drawn")
    with work.launched(work.SHARDED):
        found["bf16"] = work.rounded(folder / "bf16", rank)
        found["full disk"] = work.without_room(folder / "full disk", rank, ranks)
        found["1 to 2"] = work.moved(folder / "2", rank, ranks, folder / "1" / "checkpoint-1", 2)
    found["parts to whole"] = work.moved(folder / "2 whole", rank, ranks, folder / "2" / "checkpoint-2", 3)
    with work.launched(work.HYBRID):
        found["whole to hybrid"] = work.moved(folder / "hybrid 2", rank, ranks, folder / "2 whole" / "checkpoint-3", 4)
    return found


def pair(folder: Path) -> None:
    rank, ranks = place()
    found = toys(folder, "", {}) | toys(folder, "sharded/", sharding_worker.SHARDED)
    found |= toys(folder, "hybrid/", sharding_worker.HYBRID, (full_run,))
    with sharding_worker.as_on_gpus():
        found |= toys(folder, "forced/", sharding_worker.SHARDED, (full_run, two_players))
    for name, values in of_networks(folder / "networks", rank, ranks).items():
        found |= {f"networks/{name}/{key}": value for key, value in values.items()}
    save_file({name: value.detach().clone() for name, value in found.items()}, folder / f"rank-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def alone(folder: Path) -> None:
    sharding_worker.moved(folder / "networks" / "1", 0, 1, None, 1)
    image_folder(models_folder(folder / "networks" / "models") / "data")


def scripted(folder: Path) -> None:
    with sharding_worker.launched(sharding_worker.SHARDED):
        sharding_worker.script(folder / "networks" / "script", folder / "networks" / "models")


def three(folder: Path) -> None:
    rank, ranks = place()
    with sharding_worker.launched(sharding_worker.SHARDED):
        checkpoint = folder / "networks" / "2" / "checkpoint-2"
        found = sharding_worker.moved(folder / "networks" / "3", rank, ranks, checkpoint, 3)
    save_file(found, folder / f"three-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def main() -> None:
    for number, act in ((1, alone), (2, pair), (3, three), (2, scripted)):
        together(number, partial(act, Path(sys.argv[1])))


if __name__ == "__main__":
    main()

"""Two processes on this machine: equal weights, different data, and the same run as one process makes; also with networks in parts."""

import json
import shutil
from pathlib import Path

import pytest
import sharding_worker
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from distributed_worker import OPTIM, Duel, Jump
from processes import run_worker
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from toys import ToyObjective, assert_same, forget_accelerate, rows, source, stored, tensors, toy_network, toy_trainer

from cm_diffusers.engine.checkpoints import read_checkpoint
from cm_diffusers.types import Networks


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where `distributed_worker.py` left the results of its processes: one, two, then three."""
    folder = tmp_path_factory.mktemp("distributed")
    run_worker("distributed_worker.py", folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]


def part(found: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if name.startswith(prefixes)}


@pytest.mark.parametrize("name", ["student/", "target/", "export_ema/", "resumed/", "halves/", "duel/", "matched/"])
def test_ranks_hold_the_same_weights(ranks, name) -> None:
    assert_same(part(ranks[1], name), part(ranks[0], name))


def test_student_and_target_draw_the_same_dropout_masks(ranks) -> None:
    """On every rank, with gradient checkpointing; and without rewinding two passes differ."""
    for found in ranks:
        assert found["masks/loss"].tolist() == [0.0, 0.0]
        assert found["masks/differ"].item()


def test_ranks_share_the_data(ranks) -> None:
    """4 steps of 2 micro-batches of 4 rows each: batch k of all ranks is rows 8k to 8k + 7."""
    for rank, found in enumerate(ranks):
        expected = [rows(8 * k + 4 * rank, 8 * k + 4 * rank + 4).x0 for k in range(8)]
        assert torch.equal(found["inputs"], torch.cat(expected))


def test_the_reported_loss_is_the_mean_over_ranks(ranks) -> None:
    assert not torch.equal(ranks[0]["losses"], ranks[1]["losses"])
    mean = torch.stack([found["losses"] for found in ranks]).mean(0).unflatten(0, (4, 2)).mean(1)
    for found in ranks:
        torch.testing.assert_close(found["reported"], mean)


def test_resume_is_bit_exact(folder, ranks) -> None:
    assert_same(tensors(folder / "resumed" / "checkpoint-4"), tensors(folder / "whole" / "checkpoint-4"))
    for found in ranks:
        whole = part(found, "student/", "target/", "export_ema/")
        assert_same({name.removeprefix("resumed/"): v for name, v in part(found, "resumed/").items()}, whole)


def test_a_checkpoint_of_two_processes_does_not_continue_in_one(folder, tmp_path) -> None:
    checkpoint = str(folder / "halves" / "checkpoint-4")
    with pytest.raises(ValueError, match="num_processes was 2, now 1"):
        toy_trainer(tmp_path, optim=OPTIM, resume_from_checkpoint=checkpoint)


def test_two_processes_are_one_with_a_double_batch(tmp_path, ranks) -> None:
    trainer = toy_trainer(tmp_path, optim=OPTIM)
    trainer.fit(source(8))
    halves = {name.removeprefix("halves/"): value for name, value in part(ranks[0], "halves/").items()}
    torch.testing.assert_close(halves, dict(trainer.student.state_dict()), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(halves["0.weight"], toy_network()[0].weight, atol=1e-3), "it has moved"


def test_two_players_in_two_processes_are_two_in_one(tmp_path, ranks) -> None:
    nets = Networks(toy_network(0), critic=toy_network(1))
    toy_trainer(tmp_path, nets, Duel(), OPTIM).fit(source(8))
    found = {
        name.rsplit("module.", 1)[-1].removeprefix("duel/"): value for name, value in part(ranks[0], "duel/").items()
    }
    torch.testing.assert_close(found, dict(nets.critic.state_dict()), rtol=1e-5, atol=1e-7)


def test_students_of_scm_and_their_fake_scores_learn(ranks) -> None:
    start = Jump(0).state_dict()
    for name in ("matched/student/network.", "matched/critic/"):
        found = part(ranks[0], name)
        assert found.keys() == {f"{name}{key}" for key in start}
        assert not any(torch.equal(found[f"{name}{key}"], value) for key, value in start.items())


def below(found: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What is named so, without it."""
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


@pytest.mark.parametrize("mode", ["sharded", "forced", "hybrid"])
def test_networks_in_parts_are_the_whole_ones(ranks, mode) -> None:
    """Dropout, EMA target, published average and accumulation, up to the order of sums; on the way of GPUs, and in copies."""
    for found in ranks:
        mine = below(found, f"{mode}/")
        whole = {name: found[name if name in found else name.replace("/", "/module.", 1)] for name in mine}
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-6)


def test_a_resume_in_parts_and_the_way_of_gpus_are_bit_exact(ranks) -> None:
    for found in ranks:
        straight = below(found, "sharded/")
        weights = part(straight, "student/", "target/", "export_ema/")
        assert_same(below(straight, "resumed/"), weights)
        assert_same(part(below(found, "forced/"), *weights), weights)
    for name in ("student/", "target/", "export_ema/", "duel/", "matched/"):
        assert_same(part(ranks[1], f"sharded/{name}"), part(ranks[0], f"sharded/{name}"))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_students_and_critics_in_parts_learn_the_same(ranks, kind) -> None:
    """20 steps of a UNet with teacher, EMA target and a critic on the teacher's features, or of a LoRA that is its own teacher."""
    for found in ranks:
        whole, parts = (below(found, f"networks/{name}/{kind}/") for name in ("whole", "parts"))
        begun = {name.replace("module.", ""): value for name, value in below(whole, "begun/").items()}
        assert_same(below(parts, "begun/"), begun)  # though the second process began without weights, or with others
        assert whole["losses"].shape == (20, 2)
        torch.testing.assert_close(parts["losses"], whole["losses"], rtol=0, atol=1e-6)
        assert (whole["losses"][0] - whole["losses"][-1]).abs().min() > 1e-3, "both have learned"
        sizes = {
            name: value.item() / whole[name].item() for name, value in parts.items() if "bytes/" in name and value
        }
        assert sizes.keys() >= {"bytes/student", "bytes/optimizer"}
        assert max(sizes.values()) <= 0.52
        assert kind == "lora" or sizes.keys() >= {"bytes/target", "bytes/teacher"}


@pytest.mark.parametrize("name", ["motion", "rewarded"])
def test_motion_and_rewards_in_parts_are_learnt_the_same(ranks, name) -> None:
    """20 steps of AnimateLCM's motion modules; 20 updates of RLCM, on roll-outs of its own."""
    for found in ranks:
        whole, parts = (below(found, f"networks/{place}/{name}/") for place in ("whole", "parts"))
        assert whole["losses"].shape == (20,)
        torch.testing.assert_close(parts["losses"], whole["losses"], rtol=0, atol=1e-6)
        assert whole.get("moved", torch.ones(1)).max() > 1e-4
        sizes = {key: value.item() / whole[key].item() for key, value in parts.items() if "bytes/" in key}
        assert max(sizes.values(), default=0) <= 0.52
        assert name == "rewarded" or sizes.keys() >= {
            f"bytes/{one}" for one in ("student", "target", "teacher", "optimizer")
        }


def test_what_is_published_of_parts_is_whole_and_by_its_name(folder) -> None:
    at = folder / "networks"
    for place in ("whole", "parts"):
        assert (
            json.loads((at / place / "full/exported/config.json").read_text())["_class_name"] == "UNet2DConditionModel"
        )
    names = ["full/exported/diffusion_pytorch_model", "lora/exported/pytorch_lora_weights"]
    names += [
        f"{kind}/{name}" for kind in ("full", "lora") for name in ("averages/step-20/0.1", "snapshots/step-10/student")
    ]
    for name in names:
        whole, parts = (load_file(at / place / f"{name}.safetensors") for place in ("whole", "parts"))
        assert len(whole) > 0
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert UNet2DConditionModel.from_pretrained(at / "parts/full/exported").config.block_out_channels == [8, 16]


def test_a_grid_of_parts_is_the_same_picture(folder) -> None:
    drawn = [folder / "networks" / place / "drawn/samples/step-000000.png" for place in ("whole", "parts")]
    assert len({path.read_bytes() for path in drawn}) == 1


def test_a_script_publishes_what_it_trained_in_parts(folder) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder / "networks/script/pipeline", use_safetensors=True)
    assert type(pipe.unet) is UNet2DConditionModel
    assert (folder / "networks/script/samples/step-000002.png").is_file()
    assert {path.name[:8] for path in (folder / "networks/script/checkpoint-2").glob("student*")} == {"student-"}
    first, second = (json.loads((folder / f"networks/held-{rank}.json").read_text()) for rank in (0, 1))
    assert min(first[name] for name in ("student", "target", "teacher")) > 0
    assert second == dict.fromkeys(first, 0), "it loads no network"


def test_roll_outs_derivatives_and_the_best_weights_of_parts(ranks) -> None:
    for found in ranks:
        whole, parts = (below(found, f"networks/{name}/") for name in ("whole", "parts"))
        for name in ("tangents/", "rewarded/", "best/"):
            assert_close_to_the_whole(below(parts, name), below(whole, name), name)


def assert_close_to_the_whole(parts: dict[str, Tensor], whole: dict[str, Tensor], name: str) -> None:
    assert parts.keys() == whole.keys()
    assert parts or name == "best/"  # of the first process alone
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_weights_travel_in_half_precision_and_times_do_not(ranks) -> None:
    for found in ranks:
        seen = below(found, "networks/bf16/")
        assert seen["weight"].dtype == torch.bfloat16
        assert seen["master"].dtype == torch.float32
        assert torch.equal(seen["told"], torch.tensor([437.0, 0.002]))
        assert seen["critic"].abs().max() > 0, "it learns, though its first pass found it frozen"
        assert seen["sample"].isfinite().all()


@pytest.mark.parametrize("place", ["whole", "parts"])
def test_a_loss_that_is_no_number_on_one_process_ends_all(ranks, place) -> None:
    for found in ranks:
        seen = below(found, f"networks/{place}/diverged/")
        assert torch.equal(seen["before"], seen["after"])


def test_a_full_disk_of_one_process_ends_all_and_leaves_nothing_half(folder) -> None:
    run = folder / "networks" / "full disk"
    assert sorted(path.name for path in run.iterdir() if path.name != ".lock") == ["checkpoint-2", "run.json"]
    read_checkpoint(run / "checkpoint-2")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1/checkpoint-1", "1 to 2"),
        ("2/checkpoint-2", "parts to whole"),
        ("2 whole/checkpoint-3", "whole to hybrid"),
        ("2/checkpoint-2", "three"),
    ],
)
def test_a_checkpoint_is_the_same_for_any_number_of_processes(folder, ranks, written, read) -> None:
    expected, places = stored(folder / "networks" / written), [f"networks/{read}/"] * 2
    found = [below(rank, name) for rank, name in zip(ranks, places, strict=True)]
    if read == "three":
        found = [load_file(folder / f"three-{rank}.safetensors") for rank in range(3)]
    for one in found:
        assert_same(one, expected)


@pytest.mark.parametrize("name", ["2/checkpoint-2", "3/checkpoint-3", "hybrid 2/checkpoint-4"])
def test_one_process_goes_on_from_parts(folder, tmp_path, caplog, name) -> None:
    checkpoint = folder / "networks" / name
    found = sharding_worker.moved(tmp_path, 0, 1, checkpoint, int(name[-1]))
    assert_same(found, stored(checkpoint))
    assert "each process draws noise and times of its own" in caplog.text
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}


def test_other_processes_with_another_batch_are_refused(folder, tmp_path) -> None:
    checkpoint, objective = folder / "networks/2/checkpoint-2", ToyObjective(sharding_worker.Sized(train_batch_size=4))
    words = "num_processes was 2, now 1, train_batch_size was 6, now 4.*x gradient_accumulation_steps, 12"
    with pytest.raises(ValueError, match=words):
        toy_trainer(tmp_path, objective=objective, resume_from_checkpoint=str(checkpoint), export_ema_decay=0.9)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: (c / "target-00002-of-00002.safetensors").unlink(), "target-00002-of-00002.* is damaged: it is not there"),
        (lambda c: (c / "student-00001-of-00002.safetensors").write_bytes(b""), "student-00001-of-00002.* it has 0 bytes"),
        (lambda c: unlist(c, "export_ema-00002-of-00002.safetensors"), r"0.weight has the shape \(4, 4\), not \(8, 4\)"),
        (lambda c: other(c, "export_ema-00002-of-00002.safetensors"), "of 0.bias it has not each slice once"),
        (lambda c: (c / "state.json").write_text("{"), "state.json is damaged"),
    ],
)  # fmt: skip
def test_damage_of_a_part_is_one_sentence(folder, tmp_path, damage, words) -> None:
    copy = shutil.copytree(folder / "networks/2/checkpoint-2", tmp_path / "checkpoint-2")
    damage(copy)
    with pytest.raises(ValueError, match=words) as refused:
        sharding_worker.moved(tmp_path / "run", 0, 1, copy, 2)
    assert "\n" not in str(refused.value)


def unlist(checkpoint: Path, name: str) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    del state["files"][name]
    (checkpoint / "state.json").write_text(json.dumps(state))


def other(checkpoint: Path, name: str) -> None:
    """The first part's copy in place of the second's."""
    state = json.loads((checkpoint / "state.json").read_text())
    shutil.copy(checkpoint / name.replace("00002-of", "00001-of"), checkpoint / name)
    state["files"][name] = (checkpoint / name).stat().st_size
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_a_file_of_other_processes_does_not_count(folder, tmp_path) -> None:
    source, copy = folder / "networks/2/checkpoint-2", tmp_path / "checkpoint-2"
    shutil.copytree(source, copy)
    shutil.copy(source / "student-00002-of-00002.safetensors", copy / "student-00003-of-00003.safetensors")
    assert_same(stored(copy), stored(source))


def test_torch_reads_the_parts_as_its_own(folder, tmp_path) -> None:
    for path in (folder / "networks/2/checkpoint-2").glob("student-*"):
        shutil.copy(path, tmp_path)
    expected = below(stored(folder / "networks/2/checkpoint-2"), "student/")
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert_same(found, expected)

"""Rewards as judges of a sweep know what their numbers depend on."""

from pathlib import Path

import pytest
import torch

from cm_diffusers.errors import UserError
from cm_diffusers.models.classifier import ImageClassifier
from cm_diffusers.tasks.fronts import reward_judges


CPU = torch.device("cpu")


def test_a_reward_is_known_by_its_weights_and_called_without_folders(tmp_path: Path) -> None:
    network = ImageClassifier(labels=["bag", "coat"], channels=(4, 8), image_size=8, num_features=6).eval()
    network.save_pretrained(tmp_path / "net")
    name = f"classifier:{tmp_path / 'net'}"
    (judge,), (again,) = (reward_judges([name], CPU).values() for _ in range(2))
    assert list(reward_judges([name, "jpeg_compressibility"], CPU)) == ["classifier:net", "jpeg_compressibility"]
    assert judge.digest == again.digest
    network.head.weight.data[0, 0] += 1
    network.save_pretrained(tmp_path / "net")
    assert reward_judges([name], CPU)["classifier:net"].digest != judge.digest
    images, prompts = torch.rand(2, 3, 8, 8), ["a bag", "a coat"]
    network.head.weight.data[0, 0] -= 1
    torch.testing.assert_close(judge(images, prompts), network(images).log_softmax(1).diagonal())
    assert reward_judges(["jpeg_compressibility"], CPU)["jpeg_compressibility"].digest == "jpeg_compressibility"


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="Two columns of --rewards would be called classifier:net: leave one out"):
        reward_judges(["classifier:/a/net", "classifier:/b/net"], CPU)

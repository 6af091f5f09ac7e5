"""Teachers that may be distilled already, as far as their names tell."""

import pytest

from cm_diffusers.tasks.text_to_image_checks import warn_of_guidance


@pytest.mark.parametrize(
    ("path", "w_max", "word"),
    [
        ("Tongyi-MAI/Z-Image-Turbo", 4.0, "turbo"),
        ("models/stable-diffusion-3.5-large-turbo", 14.0, "turbo"),
        ("ByteDance/SDXL-Lightning", 7.0, "lightning"),
        ("stabilityai/sdxl-turbo", 0.0, None),
        ("Tongyi-MAI/Z-Image", 4.0, None),
        ("turbo/Z-Image", 4.0, None),
    ],
)
def test_a_name_of_few_steps_is_a_warning_where_guidance_would_come_on_top(
    path: str, w_max: float, word: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_guidance(path, w_max)
    assert caplog.messages == (
        []
        if word is None
        else [
            f"{path} calls itself {word}, and nothing in its config says more: if it was distilled to few steps, guidance is "
            f"in its weights, and w up to {w_max:g} comes on top. Give the model that it came from, or guidance 0."
        ]
    )

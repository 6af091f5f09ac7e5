"""What transformers says at import about a backend that makes no difference is not shown; the rest is."""

import inspect
import logging

import transformers
from packaging.version import Version
from transformers.utils import import_utils

import cm_diffusers  # noqa: F401  (silences it)
from cm_diffusers.quiet import TRANSFORMERS


def shown(text: str) -> bool:
    record = logging.LogRecord(TRANSFORMERS, logging.WARNING, "", 0, text, None, None)
    return bool(logging.getLogger(TRANSFORMERS).filter(record))


def test_only_what_no_user_can_act_on_is_silenced() -> None:
    if Version(transformers.__version__) >= Version("5.24"):  # of the constraints; older ones do not say it
        assert "requires torchvision (not installed); falling back" in inspect.getsource(import_utils)
    assert import_utils.logger.name == TRANSFORMERS
    assert not shown(
        "`CLIPImageProcessor` requires torchvision (not installed); falling back to `CLIPImageProcessorPil`"
    )
    assert shown("a file is missing")

"""Reading how a student was made."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from cm_diffusers.record import RECORD


def read_record(source: str) -> dict[str, Any]:
    """The record of a folder or Hub repository; {} where there is none, or none in reach."""
    path = Path(source) / RECORD
    if not Path(source).exists():
        try:
            path = Path(hf_hub_download(source, RECORD))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
            return {}
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}

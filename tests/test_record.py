"""What counts as a record, and what as having none."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from cm_diffusers import record as module
from cm_diffusers.record import RECORD, read_record, write_record


STUDENT = Path(__file__).parents[1] / "assets" / "fashion_lcm"


def answer(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None))


def uncached(cause: Exception) -> LocalEntryNotFoundError:
    """How `hf_hub_download` reports most errors."""
    error = LocalEntryNotFoundError("Cannot find the requested files.")
    error.__cause__ = cause
    return error


def answering(monkeypatch, error: Exception) -> None:
    def download(*args, **options):
        raise error

    monkeypatch.setattr(module, "hf_hub_download", download)


@pytest.mark.parametrize(
    "error",
    [
        answer(RemoteEntryNotFoundError, 404),
        answer(RepositoryNotFoundError, 401),  # what the Hub says of a repository that is not there
        uncached(OfflineModeIsEnabled("offline")),
        uncached(ConnectionError("unplugged")),
        LocalEntryNotFoundError("local_files_only"),
    ],
    ids=repr,
)
def test_no_record(error: Exception, monkeypatch) -> None:
    answering(monkeypatch, error)
    assert read_record("someone/student") is None


@pytest.mark.parametrize("name", ["runs/x/pipeline", "/nowhere/student", "../student"])
def test_what_is_no_hub_id_has_no_record(name: str) -> None:
    assert read_record(name) is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (answer(HfHubHTTPError, 503), 503),
        (uncached(answer(HfHubHTTPError, 503)), 503),
        (answer(HfHubHTTPError, 401), 401),
        (answer(GatedRepoError, 403), 403),
    ],
    ids=repr,
)
def test_a_hub_that_does_not_answer_is_no_missing_record(error: Exception, status: int, monkeypatch) -> None:
    answering(monkeypatch, error)
    with pytest.raises(ValueError, match=rf"'someone/student' has a cm_diffusers.json \(status {status}\); try again"):
        read_record("someone/student")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": "embeded"}, "guidance must be one of embedded, distilled, none, got 'embeded'"),
        ({"w_min": "x"}, r"must be finite and w_min at most w_max, got \('x', 4.0, 3.0\)"),
        ({"w_max": float("nan")}, "must be finite"),
        ({"recommended_guidance_scale": None}, "must be finite"),
        ({"w_min": 5.0}, r"w_min at most w_max, got \(5.0, 4.0, 3.0\)"),
        ({"recommended_num_inference_steps": 0}, "a whole number of at least 1, got 0"),
        ({"recommended_num_inference_steps": 2.5}, "a whole number of at least 1, got 2.5"),
        ({"scheduler": "LCMScheduler"}, "scheduler must be a dict, got 'LCMScheduler'"),
    ],
)
def test_a_wrong_record_says_what_is_wrong(change: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps(asdict(read_record(STUDENT)) | change))
    with pytest.raises(ValueError, match=f"is not a record of cm_diffusers.*{message}"):
        read_record(tmp_path)


def test_a_record_is_written_aside(tmp_path: Path, monkeypatch) -> None:
    record = read_record(STUDENT)
    write_record(record, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]
    monkeypatch.setattr(module.os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_record(read_record(STUDENT.with_name("fashion_lcm_lora")), tmp_path)
    assert read_record(tmp_path) == record

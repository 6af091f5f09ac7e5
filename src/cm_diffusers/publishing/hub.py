"""Sharing a result on the Hub: find out that it cannot work before training, and never lose the local result."""

import glob
import json
import logging
import shlex
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from transformers.hf_argparser import HfArg

from cm_diffusers.engine.own_files import files_in, foreign_files, is_result_file
from cm_diffusers.errors import UserError
from cm_diffusers.places import public
from cm_diffusers.publishing.provenance import is_path
from cm_diffusers.record import RECORD, read_record


logger = logging.getLogger(__name__)

NAMED = 10  # files that are left out, in the line that tells of them
WAITS = (2.0, 8.0, 30.0)  # seconds before each further try
CONNECTION = (HTTPError, ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
FAILURES = (HTTPError, OSError, RuntimeError)  # of httpx (1.x) or httpx2, of files and sockets, of the Xet library


@dataclass
class HubConfig:
    """Sharing the result on the Hugging Face Hub."""

    push_to_hub: bool = HfArg(default=False, help="Upload the result when training has ended.")
    hub_model_id: str | None = HfArg(
        default=None, help='Repository, "name" or "user/name"; the name of the output folder if absent.'
    )
    hub_private_repo: bool = HfArg(default=False, help="Create the repository private.")
    hub_token: str | None = HfArg(
        default=None,
        repr=False,
        help="Token with write access. Better: `hf auth login`, or HF_TOKEN in the environment.",
    )


def check_hub(config: HubConfig, output_dir: str | Path, report_to: str = "none") -> str | None:
    """Creates the repository and makes sure that it can be written to, before hours are spent; main process only.

    Args:
        output_dir: Its name is that of the repository unless the config gives one.
        report_to: Tracker of the run.

    Returns:
        The full id of the repository, "user/name"; None if nothing is to be pushed.

    Raises:
        ValueError: No token or a wrong one, no permission, no network, an impossible name, a public repository where
            a private one was asked for; or a token on the command line that the tracker would record.
    """
    if not config.push_to_hub or not PartialState().is_main_process:
        return None
    if config.hub_token and report_to == "wandb":
        raise UserError(
            "--hub_token would be recorded by wandb with the command line; use `hf auth login` or HF_TOKEN instead."
        )
    if not (config.hub_token or get_token()):
        raise UserError("--push_to_hub needs a token; get one with `hf auth login`, or set HF_TOKEN.")
    wanted = config.hub_model_id or Path(output_dir).resolve().name
    try:
        return _writable_repo(wanted, config)
    except (*FAILURES, HFValidationError) as error:
        raise UserError(f"--push_to_hub would fail: {_reason(error, wanted)}") from error


def _writable_repo(wanted: str, config: HubConfig) -> str:
    api = HfApi(token=config.hub_token)
    # None leaves an organisation's own choice; an existing repository keeps its visibility
    repo_id = api.create_repo(wanted, private=config.hub_private_repo or None, exist_ok=True).repo_id
    api.auth_check(repo_id, write=True)  # create_repo is content to find the repository
    if config.hub_private_repo and not api.model_info(repo_id).private:
        raise UserError(
            f"--hub_private_repo: {repo_id} exists already and is public; make it private in its settings on the Hub, "
            "or give another --hub_model_id."
        )
    return repo_id


def push_folder(folder: str | Path, repo_id: str, config: HubConfig) -> str:
    """Uploads a finished folder; what is there already is not sent again.

    Args:
        folder: A pipeline or LoRA folder. Only what publishing writes goes up, see `own_files.is_result_file`; a line
            tells what else stays. Where the record names a base model by its path on this machine, the uploaded one has
            the path's last part.
        repo_id: What `check_hub` returned.

    Returns:
        The address of the repository.

    Raises:
        ValueError: It failed, for good or after several tries. The folder is untouched.
    """
    _warn_of_local_base(Path(folder), repo_id)
    if others := foreign_files(Path(folder), is_result_file):
        more = "" if len(others) <= NAMED else f" and {len(others) - NAMED} more"
        logger.info("Not uploaded, as no script of this package wrote it: %s%s.", ", ".join(others[:NAMED]), more)
    waits = iter(WAITS)
    while True:
        try:
            _upload(Path(folder), repo_id, HfApi(token=config.hub_token))
            return f"{constants.ENDPOINT}/{repo_id}"
        except FAILURES as error:
            wait = next(waits, None) if _transient(error) else None
            if wait is None:
                raise UserError(_push_again(folder, repo_id, error)) from error
            logger.warning("Upload failed: %s Next try in %g s.", _reason(error, repo_id), wait)
            time.sleep(wait)


def _upload(folder: Path, repo_id: str, api: HfApi) -> None:
    names, target = set(files_in(folder)), {"repo_id": repo_id, "commit_message": "Upload by cm_diffusers"}
    if record := _public_record(folder):
        names.remove(RECORD)
        api.upload_file(path_or_fileobj=record, path_in_repo=RECORD, **target)
    ours = [glob.escape(name) for name in sorted(names) if is_result_file(name)]
    api.upload_folder(folder_path=folder, allow_patterns=ours, **target)


def _public_record(folder: Path) -> bytes | None:
    """The record without a path of this machine; None where it can go up as it is."""
    record = read_record(folder)
    if record is None or public(record.base_model) == record.base_model:
        return None
    content = json.loads((folder / RECORD).read_text("utf-8"))
    return (json.dumps(content | {"base_model": public(record.base_model)}, indent=2) + "\n").encode()


def _warn_of_local_base(folder: Path, repo_id: str) -> None:
    record = read_record(folder)
    if record is not None and is_path(record.base_model):
        logger.warning(
            "The record says that the base model is %s, which others do not have; if it is on the Hub, name it: %s",
            record.base_model,
            _share(folder, repo_id, "--base_model", "ID"),
        )


def _share(folder: str | Path, repo_id: str, *more: str) -> str:
    flags = ["--folder", str(folder), "--push_to_hub", "--hub_model_id", repo_id, *more]
    return f"`{shlex.join(['python', 'training/share.py', *flags])}`"


def _push_again(folder: str | Path, repo_id: str, error: Exception) -> str:
    return f"{_reason(error, repo_id)} The result lies untouched in {folder}; push it again with {_share(folder, repo_id)}."


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _transient(error: Exception) -> bool:
    """Whether a later try may succeed: the connection broke, or the server was busy or broken."""
    status = _status(error)
    if status is None:
        return not (constants.HF_HUB_OFFLINE or _is_of_a_file(error))
    return status in (408, 429) or status >= 500


def _is_of_a_file(error: Exception) -> bool:
    return isinstance(error, OSError) and not isinstance(error, CONNECTION)


def _reason(error: Exception, repo_id: str) -> str:
    """One sentence, never with a token in it."""
    status = _status(error)
    if isinstance(error, HFValidationError):
        return f"--hub_model_id {repo_id} is no name for a repository; give letters, digits, '-', '_' and '.'."
    if status == 401:
        return "the Hub does not accept the token; make one with write access and `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return (
            f"the token may not write to {repo_id}; make one with write access to it, or give another --hub_model_id."
        )
    if status == 404:
        return f"there is no repository {repo_id} that the token may see; check --hub_model_id and the token."
    if status is not None:
        return f"the Hub answered with status {status} for {repo_id}: {error.server_message or 'no reason given'}."
    if _is_of_a_file(error):
        return f"{error.filename or 'a file'} cannot be used: {error.strerror or error}."
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it to push."
    return f"the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__})."

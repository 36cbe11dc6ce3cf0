"""The hub: whether a run may upload to it, and the upload at the end."""

import logging
from typing import Any

from sd_vae.errors import UserError

from .config_extras import ReportConfig
from .run_folder import RunResult

__all__ = ["push", "require_login"]

logger = logging.getLogger(__name__)


def require_login(report: ReportConfig) -> None:
    """Check before a run begins that its result can be uploaded when it ends.

    Raises:
        UserError: The hub is out of reach, or knows nobody by the token that is stored here.
    """
    if report.push_to_hub is None:
        return
    api, errors = _hub()
    try:
        api.whoami()
    except errors as error:
        raise UserError(
            f"report.push_to_hub is {report.push_to_hub}, and the hub does not let this machine in: {_reason(error)}; "
            "log in with `hf auth login`, or leave report.push_to_hub out."
        ) from error


def push(report: ReportConfig, result: RunResult) -> None:
    """Upload a finished VAE, where it is asked for, from the process that wrote it.

    Raises:
        UserError: It did not arrive; the folder is as it was.
    """
    if report.push_to_hub is None or not result.report:
        return
    vae = result.vae
    api, errors = _hub()
    try:
        api.create_repo(report.push_to_hub, private=report.hub_private, exist_ok=True)
        api.upload_folder(repo_id=report.push_to_hub, folder_path=str(vae), commit_message="Upload VAE")
    except errors as error:
        raise UserError(
            f"cannot upload to {report.push_to_hub}: {_reason(error)}; the run is finished and its VAE is whole, "
            f"upload it later: hf upload {report.push_to_hub} {vae}."
        ) from error
    logger.info("uploaded to %s", report.push_to_hub)


def _hub() -> tuple[Any, tuple[type[Exception], ...]]:
    """The hub's interface, and what it raises when it cannot."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The bases are OSError and the error of the HTTP library, which changes with the hub's version.
    return HfApi(), (*HfHubHTTPError.__bases__, OSError, HFValidationError)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__

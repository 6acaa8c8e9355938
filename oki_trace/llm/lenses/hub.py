"""Fetches the files of a lens from the hub, or from its cache."""

from __future__ import annotations

import re
from pathlib import Path

from oki_trace.errors import ModelError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[^/\\]+)*")
# Jacobian lenses are in model repositories, the Tuned Lenses of their authors in a space.
_REPOSITORIES = ("model", "space")
_TUNED_FILES = ("config.json", "params.pt")


def fetch(source: str) -> Path:
    """The file or folder that ``OWNER/NAME[/PATH]`` names, in the hub's cache.

    A path that ends in .pt is a Jacobian lens; any other is the folder of a Tuned Lens. With
    HF_HUB_OFFLINE only the cache is looked at. Raises ModelError.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"There is no {source} here (looked in {Path.cwd()}). Check the path; a lens on the "
            "hub is named owner/name/path."
        )
    owner, name, *rest = source.split("/")
    inside = "/".join(rest)
    if inside.endswith(".pt"):
        wanted = [inside]
    else:
        wanted = [f"{inside}/{file}" if inside else file for file in _TUNED_FILES]
    reason: Exception | None = None
    for kind in _REPOSITORIES:
        try:
            files = [
                Path(hf_hub_download(f"{owner}/{name}", file, repo_type=kind)) for file in wanted
            ]
        # Of the hub (not there, no access), of the network, of the cache.
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            reason = reason or error
            continue
        return files[0] if inside.endswith(".pt") else files[0].parent
    line = str(reason).strip().partition("\n")[0]
    raise ModelError(
        f"The lens {source} cannot be fetched from the hub ({type(reason).__name__}: {line}). Name "
        "it as owner/name/path, or download it and name the file."
    ) from reason

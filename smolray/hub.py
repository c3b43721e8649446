"""Sends an exported folder to the hub, as a new commit of a model repository.

In: a folder, local or s3://. Out: the URL of the commit. The token comes from the caller, never from a setting:
settings are stored and shown.
"""

import tempfile
from pathlib import Path

from smolray import storage


class HubError(RuntimeError):
    """The hub could not be reached, or refused; the folder of the export is unchanged."""


def push_folder(
    folder: str, repo: str, private: bool, token: str, endpoint: str | None = None, revision: str | None = None
) -> str:
    """Create the model repository and the branch `revision` where they do not exist; upload a folder as one commit.

    Raises HubError.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(endpoint=endpoint, token=token, library_name="smolray")
    with tempfile.TemporaryDirectory() as copy:
        for file in storage.list_files(folder):
            Path(copy, file.base_name).write_bytes(storage.read_bytes(storage.join(folder, file.base_name)))
        try:
            api.create_repo(repo, private=private or None, exist_ok=True)
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, folder_path=copy, commit_message="Trained with smolray", revision=revision
            )
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx2.HTTPError, OSError) as error:
            words = " ".join(str(error).split())[:500]
            raise HubError(f"{repo} was not pushed: {words}; the export is in {folder}: push it again") from None
    return str(done.commit_url)

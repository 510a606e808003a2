"""This file alone imports huggingface_hub, which timm brings along: it uploads an exported folder."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from ccmim_fast.errors import ConfigError, MachineError, one_line


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is OWNER/NAME."""
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII):
        raise ConfigError(f"--push={name!r:.100}: must be OWNER/NAME, such as me/vit-base-ccmim")


def to_upload(folder: Path) -> list[tuple[str, int]]:
    """Return names and bytes of what lies in `folder`."""
    return [(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]


def push(folder: Path, name: str, private: bool) -> str:
    """Upload `folder` as the model OWNER/NAME; returns its address. Raises MachineError: no login, right or network."""
    hub = HfApi()
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Weights exported by ccmim_fast")
    except LocalTokenNotFoundError:
        raise MachineError(f"--push={name}: not logged in; hf auth login, then the same command") from None
    except (HfHubHTTPError, OSError) as error:
        raise MachineError(f"--push={name}: not uploaded: {one_line(error, 300)}; {folder} is whole") from None
    return f"https://huggingface.co/{name}"

"""Finished steps of a long conversion, kept beside its output so that an interrupted one goes on."""

import errno
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rrt.common.files import explain_no_space, fsync, read_json, write_json
from rrt.errors import UserError

_FINGERPRINT_FILE = "fingerprint.json"


class Workspace:
    """Named sets of tensors in a directory, each there whole or not at all.

    Args:
        directory: made if it is absent.
        fingerprint: everything that the steps depend on, hashed.
        is_shared: refuse a directory that holds other steps, which is else emptied.
    """

    def __init__(self, directory: Path, fingerprint: str, *, is_shared: bool = False) -> None:
        self.directory = directory
        path = directory / _FINGERPRINT_FILE
        if directory.exists() and not path.is_file() and any(directory.iterdir()):
            raise UserError(f"{directory}: is not of a conversion; expected no such directory: move it away")
        before = read_json(path).get("fingerprint") if path.is_file() else None
        if path.is_file() and before != fingerprint:
            if is_shared and before is not None:
                raise UserError(
                    f"{directory}: holds statistics of another base, text, metric, kind of device or version of the "
                    "code; expected those of this conversion: name another directory, or delete it"
                )
            self._clear()
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, {"fingerprint": fingerprint})

    def has(self, name: str) -> bool:
        """Tell whether the step `name` is finished."""
        return self._path(name).is_file()

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep the result of the step `name`."""
        path = self._path(name)
        partial = path.with_suffix(".partial")
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with explain_no_space(path, sum(tensor.nbytes for tensor in contiguous.values())):
            try:
                save_file(contiguous, partial)
            except SafetensorError as error:  # the operating system's, in the library's own words
                found = re.search(r"\(os error (\d+)\)", str(error))
                raise OSError(int(found[1]) if found else errno.EIO, str(error), str(path)) from None
            fsync(partial)
        partial.rename(path)

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read what `save` kept."""
        return load_file(self._path(name), device=str(device))

    def drop(self, name: str) -> None:
        """Delete a step's result, whose space others need."""
        self._path(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete everything, the fingerprint last: what an interruption leaves is still known as a workspace."""
        self._clear()
        shutil.rmtree(self.directory)

    def _clear(self) -> None:
        # Of no conversion from now on: what an interruption leaves lacks steps that later ones rest on.
        write_json(self.directory / _FINGERPRINT_FILE, {"fingerprint": None})
        for path in self.directory.iterdir():
            if path.name != _FINGERPRINT_FILE:
                path.unlink()

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

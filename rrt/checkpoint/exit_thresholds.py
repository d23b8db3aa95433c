"""Calibrated exits of a checkpoint: the file `exit_thresholds.json` beside `config.json`.

A token exits after loop i, before the last, if the top-1 probability of that loop's logits is at least
`thresholds[i]`; null never exits there. `eval/exits.py --calibrate` writes the file:

    {"format": "rrt-exit-thresholds", "version": 1,
     "checkpoint_sha256": "...",                        of the weights and config.json that were measured
     "num_loops": 2, "data": "...", "tokens": 123,      calibrated on
     "calibrations": [{"agreement": 0.95,               wanted: share of early exits whose token is full depth's
                       "thresholds": [0.83],            one for each loop before the last
                       "measured_agreement": 0.951,     of early exits, on tokens that were not calibrated on
                       "mean_loops": 1.3}, ...]}        per token, on the same

The file is no part of the checkpoint's fingerprint; but thresholds of other weights are refused.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rrt.common.files import read_json, write_json
from rrt.common.provenance import fingerprint
from rrt.errors import UserError

FILE_NAME = "exit_thresholds.json"
FORMAT = "rrt-exit-thresholds"
VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """Thresholds for a wanted agreement, and their results on held-back tokens (None: no token exited early)."""

    agreement: float
    thresholds: tuple[float | None, ...]
    measured_agreement: float | None
    mean_loops: float


def save_exit_thresholds(
    checkpoint: str | Path, num_loops: int, calibrations: list[Calibration], **details: Any
) -> Path:
    """Write the file into `checkpoint`, in place of an earlier one; `details` (data, tokens) are added as they are."""
    path = Path(checkpoint) / FILE_NAME
    value = {"format": FORMAT, "version": VERSION, "checkpoint_sha256": fingerprint(Path(checkpoint))}
    value |= {"num_loops": num_loops, **details, "calibrations": [asdict(entry) for entry in calibrations]}
    write_json(path, value)
    return path


def load_exit_thresholds(checkpoint: str | Path, agreement: float) -> tuple[float | None, ...]:
    """Read the thresholds [B - 1] calibrated for `agreement`; see the head of this file.

    Raises:
        UserError: no or a damaged file, another format or version, weights other than those that were calibrated,
            or an agreement that was not.
    """
    path = Path(checkpoint) / FILE_NAME
    if not path.exists():
        raise UserError(f"{path}: no such file; python eval/exits.py --calibrate {agreement:g} writes it")
    value = read_json(path)
    if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        found = f"{value.get('format')!r} version {value.get('version')!r}"
        raise UserError(f"{path}: found {found}; expected {FORMAT!r} version {VERSION}")
    if value.get("checkpoint_sha256") != fingerprint(Path(checkpoint)):
        raise UserError(f"{path}: was calibrated on other weights; run eval/exits.py --calibrate on this checkpoint")
    try:
        calibrations = [
            Calibration(**{**entry, "thresholds": tuple(entry["thresholds"])}) for entry in value["calibrations"]
        ]
        lengths = {len(entry.thresholds) for entry in calibrations}
        if lengths != {int(value["num_loops"]) - 1}:
            raise ValueError(f"thresholds for {lengths} loops")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); calibrate again") from None
    for entry in calibrations:
        if entry.agreement == agreement:
            return entry.thresholds
    found = ", ".join(str(entry.agreement) for entry in calibrations)
    raise UserError(f"{path}: agreement: found {found}; expected {agreement}: calibrate for it")

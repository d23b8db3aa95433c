"""Recordings of every loop's prediction at every token of a corpus's samples.

A directory holds `meta.json` and parts of `SAMPLES_PER_PART` samples in order, each written whole (`part-00000.npz`),
so that an interrupted recording resumes where it stopped; each part holds the digest of its samples' tokens, so that
it resumes with the same data only. A sample is one document, cut at the context's length.
Shapes: S samples, N tokens of all samples one after the other, B loops.
"""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rrt.common.files import atomic_file, read_json, write_json
from rrt.errors import UserError

FORMAT = "rrt-trajectories"
VERSION = 2
SAMPLES_PER_PART = 64
META_FILE = "meta.json"


@dataclass(frozen=True)
class Trajectories:
    """Predictions of all loops over some samples, of a part or of a whole recording.

    Attributes:
        lengths: int32 [S], tokens of each sample.
        top_tokens_agree: bool [B, N], true where a loop's most probable token is the last loop's.
        confidence: fp32 [B - 1, N], probability of each earlier loop's most probable token.
        loss: [B, N], nats; only fp16 in files, for curves.
    """

    lengths: npt.NDArray[np.int32]
    top_tokens_agree: npt.NDArray[np.bool_]
    confidence: npt.NDArray[np.float32]
    loss: npt.NDArray[np.floating]

    @property
    def num_loops(self) -> int:
        return self.top_tokens_agree.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.top_tokens_agree.shape[1]

    def oracle_exits(self) -> npt.NDArray[np.int64]:
        """Return the oracle's exit [N] of each token: the earliest loop that predicts the last loop's token."""
        return self.top_tokens_agree.argmax(0)

    def samples(self, chosen: slice) -> "Trajectories":
        """Return the trajectories of the samples in a slice."""
        picked = np.zeros(len(self.lengths), dtype=bool)
        picked[chosen] = True
        tokens = np.repeat(picked, self.lengths)
        per_token = (self.top_tokens_agree, self.confidence, self.loss)
        return Trajectories(self.lengths[picked], *(values[:, tokens] for values in per_token))


@dataclass(frozen=True)
class Totals:
    """Totals over all tokens.

    Attributes:
        loss: fp64 [B], nats, not rounded to fp16.
        pair_agreement: int64 [B, B], how often two loops predict the same token.
    """

    loss: npt.NDArray[np.float64]
    pair_agreement: npt.NDArray[np.int64]


class Recording:
    """A directory of trajectories, opened to be filled or read.

    Raises:
        UserError: `directory` is a file, holds something else, or a recording of other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        meta = {"format": FORMAT, "version": VERSION, **settings}
        path = directory / META_FILE
        if path.is_file():
            found = read_json(path)
            for name in [*meta, *found]:
                if found.get(name) != meta.get(name):
                    raise UserError(
                        f"{path}: field {name!r}: found {found.get(name)!r}; expected {meta.get(name)!r}: go on with "
                        "the same settings or name another directory"
                    )
        elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"{directory}: exists and is no recording; name another directory")
        else:
            write_json(path, meta)

    def path(self, part: int) -> Path:
        return self.directory / f"part-{part:05d}.npz"

    def has(self, part: int, digest: str) -> bool:
        """Return True if a part is recorded.

        Raises:
            UserError: it is recorded from samples with another digest.
        """
        path = self.path(part)
        if not path.is_file():
            return False
        with _open_part(path) as file:
            if str(file["digest"]) != digest:
                raise UserError(f"{path}: was recorded from other samples; expected the same data: name another --out")
        return True

    def write(self, part: int, digest: str, samples: Trajectories, totals: Totals) -> None:
        """Write one part; it appears whole."""
        with atomic_file(self.path(part)) as stream:
            np.savez(
                stream,
                digest=digest,
                lengths=samples.lengths,
                top_tokens_agree=np.packbits(samples.top_tokens_agree, axis=1),
                confidence=samples.confidence,
                loss=samples.loss.astype(np.float16),
                loss_sum=totals.loss,
                pair_agreement=totals.pair_agreement,
            )


def read_trajectories(directory: str | Path) -> tuple[Trajectories, Totals, dict[str, Any]]:
    """Read all samples recorded so far, their totals, and the recording's settings.

    Raises:
        UserError: no recording, an empty or a damaged one, or one with a part missing in the middle.
    """
    directory = Path(directory)
    meta = read_json(directory / META_FILE)
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        found = f"{meta.get('format')!r} version {meta.get('version')!r}"
        raise UserError(f"{directory / META_FILE}: found {found}; expected {FORMAT!r} version {VERSION}: record again")
    samples, totals = [], []
    for number, path in enumerate(sorted(directory.glob("part-*.npz"))):
        if path.name != f"part-{number:05d}.npz":
            raise UserError(f"{directory}: part-{number:05d}.npz is missing; run eval/exits.py again to make it")
        part, part_totals = _read_part(path)
        samples.append(part)
        totals.append(part_totals)
    if not samples:
        raise UserError(f"{directory}: found no finished part; run eval/exits.py again")
    names = ("lengths", "top_tokens_agree", "confidence", "loss")
    joined = Trajectories(*(np.concatenate([getattr(part, name) for part in samples], axis=-1) for name in names))
    return joined, Totals(sum(part.loss for part in totals), sum(part.pair_agreement for part in totals)), meta


def digest_samples(samples: Sequence[npt.NDArray[np.integer]]) -> str:
    """Return the SHA-256 over the lengths and tokens of samples."""
    digest = hashlib.sha256(np.array([len(tokens) for tokens in samples], dtype="<i8").tobytes())
    for tokens in samples:
        digest.update(tokens.astype("<i8").tobytes())
    return digest.hexdigest()


def _read_part(path: Path) -> tuple[Trajectories, Totals]:
    with _open_part(path) as file:
        tokens = int(file["lengths"].sum())
        agree = np.unpackbits(file["top_tokens_agree"], axis=1, count=tokens).astype(bool)
        samples = Trajectories(file["lengths"], agree, file["confidence"], file["loss"])
        return samples, Totals(file["loss_sum"], file["pair_agreement"])


@contextmanager
def _open_part(path: Path) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
    """Open a part, whose arrays are read on access; raise `UserError` if they are damaged."""
    try:
        with np.load(path) as file:
            yield file
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and run eval/exits.py again") from None

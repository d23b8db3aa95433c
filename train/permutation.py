"""Pseudo-random numbers and permutations, computed from a key and never stored."""

import hashlib

_MASK = 2**64 - 1
_ROUNDS = 16  # so many that even the smallest permutations are all equally likely


def keyed_uint64s(*key: int, count: int) -> list[int]:
    """Compute `count` numbers of 64 bits that depend on every number of the key."""
    digest = hashlib.shake_128(",".join(map(str, key)).encode()).digest(8 * count)
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(count)]


class Permutation:
    """The numbers from 0 to `size` - 1 in an order that the key decides; each takes microseconds and no memory.

    A Feistel network permutes the numbers of as many bits as `size` needs: the two halves of the bits are in turn
    xored with a keyed hash of the other half, which is invertible. A result outside the range goes through the network
    again until it falls inside (cycle walking), less than once on average.
    """

    def __init__(self, size: int, *key: int) -> None:
        assert size > 0
        self._size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits = (bits + 1) // 2
        self._low_mask, self._high_mask = 2**self._low_bits - 1, 2 ** (bits - self._low_bits) - 1
        self._keys = keyed_uint64s(*key, count=_ROUNDS)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(index)
        value = self._permuted(index)
        while value >= self._size:
            value = self._permuted(value)
        return value

    def _permuted(self, value: int) -> int:
        high, low = value >> self._low_bits, value & self._low_mask
        for number, key in enumerate(self._keys):
            if number % 2:
                low ^= _mixed(high + key) & self._low_mask
            else:
                high ^= _mixed(low + key) & self._high_mask
        return high << self._low_bits | low


def _mixed(value: int) -> int:
    """Hash 64 bits so that each bit depends on all of `value`'s (the finalizer of SplitMix64)."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31

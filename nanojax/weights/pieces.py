"""How is text cut into SentencePiece-like pieces?  Merge neighbours by score, bytes as the fallback.

The algorithm of SentencePiece's BPE, llama2.c and llama.cpp's `llama` vocabularies: start from characters (or the
bytes of a character that is no piece), then merge the neighbouring pair whose union scores best, leftmost first,
until no union is a piece.  A heap of candidate pairs makes it O(n log n).
"""

import heapq
from collections.abc import Callable, Mapping, Sequence, Set


def piece_encoder(
    token_bytes: Sequence[bytes],
    scores: Sequence[float],
    mergeable: Set[int],
    byte_ids: Mapping[int, int],
    prefix_space: bool,
) -> Callable[[str], Sequence[int]]:
    """Encoder text -> ids.

    mergeable: ids that text may match; control and byte tokens are not among them.
    byte_ids: byte -> id for characters that are no piece; a byte without an id is left out.
    prefix_space: whether a non-empty text gets a space in front.
    """
    id_of: dict[bytes, int] = {}
    for token_id in sorted(mergeable):
        id_of.setdefault(token_bytes[token_id], token_id)

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for char in (" " + text) if prefix_space and text else text:
            raw = char.encode()
            ids.extend([id_of[raw]] if raw in id_of else (byte_ids[byte] for byte in raw if byte in byte_ids))
        return _merge(ids, token_bytes, scores, id_of)

    return encode


def _merge(
    ids: list[int], token_bytes: Sequence[bytes], scores: Sequence[float], id_of: Mapping[bytes, int]
) -> list[int]:
    """Merges `ids` by score.  `ids` is consumed: it holds -1 where the left neighbour has taken a token in."""
    after = list(range(1, len(ids) + 1))
    before = list(range(-1, len(ids) - 1))
    candidates: list[tuple[float, int, int, int, int]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(ids):
            union = id_of.get(token_bytes[ids[left]] + token_bytes[ids[right]])
            if union is not None:
                heapq.heappush(candidates, (-scores[union], left, ids[left], ids[right], union))

    for left in range(len(ids) - 1):
        offer(left, left + 1)
    while candidates:
        _, left, left_id, right_id, union = heapq.heappop(candidates)
        right = after[left]
        if ids[left] != left_id or right >= len(ids) or ids[right] != right_id:
            continue
        ids[left], ids[right] = union, -1
        after[left] = after[right]
        if after[left] < len(ids):
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [token_id for token_id in ids if token_id >= 0]

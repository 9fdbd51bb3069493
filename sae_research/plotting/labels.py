"""Where to write the names of points so that they cover neither points nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    width: float
    height: float

    @property
    def middle(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.bottom + self.height / 2

    def overlap(self, other: Box) -> float:
        """Area shared with another box."""
        across = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        up = min(self.bottom + self.height, other.bottom + other.height) - max(self.bottom, other.bottom)
        return max(across, 0.0) * max(up, 0.0)


# right, left, above, below and the diagonals: where the label's box sits against the point
_DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_REACHES = (1.0, 2.2, 3.6)


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    radius: float,
    taken: Sequence[Box] = (),
) -> list[Box]:
    """A box for each label, in pixels: the nearest free place around its point, tried in a fixed order.

    `radius` is the markers' size, `taken` holds what else must stay readable. Where every place is covered
    the least covered one is used.
    """
    markers = [Box(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in points]
    placed: list[Box] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        costs = {
            box: 2 * (width * height - box.overlap(frame)) + sum(box.overlap(other) for other in (*markers, *placed, *taken))
            for box in _candidates(x, y, width, height, radius)
        }
        placed.append(min(costs, key=lambda box: round(costs[box], 6)))
    return placed


def _candidates(x: float, y: float, width: float, height: float, radius: float) -> list[Box]:
    boxes = []
    for reach in _REACHES:
        gap = radius * 1.45 * reach
        for across, up in _DIRECTIONS:
            slant = 0.7 if across and up else 1.0
            left = x + across * gap * slant - width * (1 - across) / 2
            bottom = y + up * gap * slant - height * (1 - up) / 2
            boxes.append(Box(left, bottom, width, height))
    return boxes

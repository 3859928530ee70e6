"""What the configurations of networks with levels, each at half the resolution of the one before, work out alike."""

from __future__ import annotations

__all__ = ["Levels"]


class Levels:
    """Of a frozen dataclass that has these fields."""

    image_size: int | tuple[int, int] | None
    in_channels: int
    channels: int
    multipliers: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) that the network is made for."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an input; ValueError for a network that is made for no size."""
        if self.size is None:
            raise ValueError(f"{type(self).__name__}.image_size must be given, got None")
        return self.in_channels, *self.size

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

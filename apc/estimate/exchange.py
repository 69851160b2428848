"""What the ranks send each other in a pass of clustering, and how long that would take: a model of rings, not a measurement.

A ring passes each tensor on in as many parts as there are ranks, so a rank sends (ranks - 1) / ranks of its bytes in a reduce-scatter or an
all-gather, and twice that in an all-reduce, which is one after the other. Time is bytes over the speed of the slowest link: what it takes to
begin, and other traffic on the links, are not in it.
"""

from dataclasses import dataclass

GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Links:
    """Bytes/s that each GPU can send: to others of its host, and to other hosts, through an adapter of its own."""

    within: float = 450e9  # NVLink 4 of an H100, one direction, by its data sheet
    between: float = 50e9  # an adapter of 400 Gbit/s for each GPU

    def bandwidth(self, ranks: int) -> float:
        """Bytes/s of a rank in rings over so many. Between hosts as many rings run as a host has adapters, each through another one."""
        return self.within if ranks <= GPUS_PER_HOST else min(self.within, self.between * GPUS_PER_HOST)


H100 = Links()


@dataclass(frozen=True)
class Exchange:
    """Bytes of a rank's tensors that are exchanged in a pass: to reduce-scatter, to all-gather (as all have them then), to all-reduce."""

    scattered: int = 0
    gathered: int = 0
    reduced: int = 0

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a pass."""
        return (ranks - 1) / ranks * (self.scattered + self.gathered + 2 * self.reduced)

    def seconds(self, ranks: int, links: Links = H100) -> float:
        return self.sent(ranks) / links.bandwidth(ranks)


def iteration_seconds(alone: float, exchange: Exchange, ranks: int, links: Links = H100) -> float:
    """A pass on so many ranks, where one takes `alone` seconds: as if all that it does were shared out evenly, and the exchange came on top."""
    return alone / ranks + exchange.seconds(ranks, links)

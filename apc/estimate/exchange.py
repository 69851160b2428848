"""The bytes that ranks send each other in a pass of clustering, and the seconds this takes: a model, no measurement.

The model is a ring that passes on each tensor in parts, one per rank. So a rank sends (ranks - 1) / ranks of the
tensor's bytes in a reduce-scatter or an all-gather, and twice that in an all-reduce, which is a reduce-scatter followed
by an all-gather. The time is bytes divided by the speed of the slowest link, without latency and other traffic.
"""

from dataclasses import dataclass

GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Links:
    """Bytes/s that each GPU can send within its host, and to other hosts through an adapter of its own."""

    within: float = 450e9  # NVLink 4 of an H100, one direction, from its data sheet
    between: float = 50e9  # a 400 Gbit/s adapter per GPU

    def bandwidth(self, ranks: int) -> float:
        """Bytes/s of one rank in rings over `ranks` GPUs.

        Between hosts there is one ring per network adapter, and each ring uses a different adapter.
        """
        return self.within if ranks <= GPUS_PER_HOST else min(self.within, self.between * GPUS_PER_HOST)


H100 = Links()


@dataclass(frozen=True)
class Exchange:
    """Bytes of tensors that a rank exchanges in one pass, by operation.

    The operations are reduce-scatter, all-gather (here the bytes of the result) and all-reduce.
    """

    scattered: int = 0
    gathered: int = 0
    reduced: int = 0

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a pass."""
        return (ranks - 1) / ranks * (self.scattered + self.gathered + 2 * self.reduced)

    def seconds(self, ranks: int, links: Links = H100) -> float:
        """Seconds that sending takes."""
        return self.sent(ranks) / links.bandwidth(ranks)


def iteration_seconds(alone: float, exchange: Exchange, ranks: int, links: Links = H100) -> float:
    """Seconds of a pass on `ranks` GPUs: an even share of `alone`, one GPU's seconds, plus the exchange."""
    return alone / ranks + exchange.seconds(ranks, links)

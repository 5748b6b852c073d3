"""What an evaluation finds of a cache: plain data with a JSON form."""

from __future__ import annotations

from fibkv.contract import Contract


class PoisonOutcome(Contract):
    """What damage to one page did to an output: the logits of the next token, or one step's attention.

    Attributes:
        moved: largest absolute change while the page was damaged.
        restored: whether the output was exactly equal again once the page was restored.
    """

    moved: float
    restored: bool

    @property
    def passed(self) -> bool:
        """Whether the pages are read: logits that moved, and came back exactly."""
        return self.moved > 0 and self.restored


class Quality(Contract):
    """Summary over all predicted tokens.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        kl_mean: mean of KL(dense || variant) in nats.
        kl_p99: its 99th percentile over tokens.
        top1: share of tokens where dense and variant put the same token first.
    """

    perplexity: float
    kl_mean: float
    kl_p99: float
    top1: float

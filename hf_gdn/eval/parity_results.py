"""What the comparison of original and patched finds, from statistics to the part of a report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A statistic and its standard error; None for a maximum, which has none."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Statistics:
    """Statistics of scored tokens; `hf_gdn.eval.parity_statistics` says how they are made."""

    tokens: int
    bad: int
    ppl_original: Estimate
    ppl_patched: Estimate
    ppl_ratio: Estimate
    correlation: Estimate
    kl_mean: Estimate
    kl_median: Estimate
    kl_99: Estimate
    kl_999: Estimate
    kl_max: Estimate
    rms_dp: Estimate
    same_top: Estimate
    logit_diff: Estimate

    def estimates(self) -> dict[str, Estimate]:
        """All that have a standard error, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Estimate)}


@dataclass(frozen=True)
class Histogram:
    """Tokens by KL divergence: edges in nats, counts between them; the first counts all below its edge too."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Trace:
    """Log-probability of patched less original along the text, by stretches.

    ``scored``: tokens scored before; ``token``: where in the text it begins; ``mean`` and ``largest`` difference.
    """

    scored: list[int]
    token: list[int]
    mean: list[float]
    largest: list[float]


@dataclass(frozen=True)
class FirstBad:
    """Where the first logit is that is not finite: run, window and the token of the text that it was to predict."""

    run: str
    window: int
    text_token: int


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same windows."""

    name: str
    decides: bool
    grade: str
    why: str
    first_bad: FirstBad | None
    statistics: Statistics
    kl_histogram: Histogram
    trace: Trace


@dataclass(frozen=True)
class Parity:
    """The part of a report that says whether it is the same model."""

    text: str
    text_tokens: int
    context: int
    windows: int
    scored: int
    batch: int
    tolerance: dict[str, float]
    comparisons: list[Comparison]
    passed: bool

    def deciding(self) -> list[Comparison]:
        """Those that count for the verdict."""
        return [row for row in self.comparisons if row.decides]

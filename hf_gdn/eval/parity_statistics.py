"""Two sets of logits over the same tokens: how far apart, with standard errors, and is it the same model?

`compare` reduces logits to a few numbers a token, `summarize` makes statistics of those, `grade` the verdict.

Standard errors treat a window as one draw, since tokens of a text depend on each other: for a mean over tokens with
residuals r, summed in each of G windows to R_w, SE = sqrt(G / (G - 1) * sum R_w^2) / n (the cluster-robust estimator;
Miller, "Adding Error Bars to Evals", 2024). A single window counts its tokens as draws. Functions of a mean follow by
the delta method, the correlation by (1 - r^2) / sqrt(n - 2), quantiles by their binomial order statistics; a maximum
has no standard error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .accuracy import CLOSE_MODEL
from .parity_results import Estimate, Statistics
from .verdicts import Verdict, graded

# How many logits are widened to float64 at a time.
SLAB = 1 << 22

QUANTILES = {"kl_median": 0.5, "kl_99": 0.99, "kl_999": 0.999}


# ----------------------------------------------------------------------------------------------------------- per token


@torch.inference_mode()
def compare(original: Tensor, patched: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Numbers per token of two sets of logits.

    Args:
        original, patched: logits ``[B, T, vocabulary]``.
        targets: the tokens that follow, ``[B, T]``.

    Returns:
        Float64 on the CPU, ``[B, T]`` each: ``log_p`` and ``log_q``, the targets' log-probabilities under original and
        patched; ``kl``, the divergence of patched from original in nats; ``same_top``, 1 where both have the same most
        probable token; ``logit_diff``, the largest absolute difference of two logits; ``bad_p`` and ``bad_q``, 1 where
        any logit is NaN or +inf.
    """
    if original.shape != patched.shape or targets.shape != original.shape[:2]:
        raise ValueError(
            f"logits must be [B, T, vocabulary] and targets [B, T], got {list(original.shape)}, "
            f"{list(patched.shape)} and {list(targets.shape)}"
        )
    vocabulary = original.shape[2]
    parts = [
        _compare_rows(p, q, y)
        for p, q, y in zip(
            *(
                x.split(max(1, SLAB // vocabulary))
                for x in (original.reshape(-1, vocabulary), patched.reshape(-1, vocabulary), targets.reshape(-1))
            )
        )
    ]
    return {name: torch.cat([part[name] for part in parts]).view(targets.shape) for name in parts[0]}


def _compare_rows(p_logits: Tensor, q_logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    q_logits, targets = q_logits.to(p_logits.device), targets.to(p_logits.device)
    if p_logits.device.type == "mps":  # has no float64
        p_logits, q_logits, targets = p_logits.cpu(), q_logits.cpu(), targets.cpu()
    bad = [(x.isnan() | (x == math.inf)).any(-1) for x in (p_logits, q_logits)]
    p, q = p_logits.double(), q_logits.double()
    same_top = p.argmax(-1) == q.argmax(-1)
    difference = (p - q).abs().nan_to_num(nan=0.0).amax(-1)  # -inf in both, a masked token, is no difference
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    log_p, log_q = (x.gather(-1, targets[:, None]).squeeze(-1) for x in (p, q))
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    found = {
        "log_p": log_p,
        "log_q": log_q,
        "kl": terms.sum(-1).clamp_min(0.0),
        "same_top": same_top,
        "logit_diff": difference,
        "bad_p": bad[0],
        "bad_q": bad[1],
    }
    return {name: value.double().cpu() for name, value in found.items()}


# ---------------------------------------------------------------------------------------------------------- statistics


def mean_error(values: Tensor, window: Tensor) -> tuple[float, float]:
    """Mean of values ``[n]`` and its standard error, with draws as numbered by window ``[n]``."""
    n, mean = len(values), values.mean()
    residuals = values - mean
    sums = torch.zeros(int(window.max()) + 1, dtype=values.dtype).index_add_(0, window, residuals)
    groups = int(window.unique().numel())
    if groups == 1:
        sums, groups = residuals, n
    error = math.sqrt(groups / (groups - 1) * sums.square().sum().item()) / n if groups > 1 else math.nan
    return mean.item(), error


def quantile_error(ordered: Tensor, quantile: float) -> tuple[float, float]:
    """Quantile of ascending values ``[n]`` (the ceil(n q)-th) and half the distance of the order statistics one
    binomial standard deviation, sqrt(n q (1 - q)), below and above it."""
    n = len(ordered)
    place = max(0, math.ceil(n * quantile) - 1)
    spread = math.ceil(math.sqrt(n * quantile * (1 - quantile)))
    low, high = max(0, place - spread), min(n - 1, place + spread)
    return ordered[place].item(), (ordered[high] - ordered[low]).item() / 2


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf if not math.isnan(value) else math.nan


def summarize(tokens: dict[str, Tensor], window: Tensor) -> Statistics:
    """Statistics of scored tokens.

    Args:
        tokens: what `compare` returns, flattened to ``[n]``.
        window: ``[n]``, which window a token is in.

    Returns:
        ``ppl_original``, ``ppl_patched``, ``ppl_ratio``, ``correlation`` (of the targets' log-probabilities),
        ``kl_mean``, ``kl_median``, ``kl_99``, ``kl_999`` and ``kl_max`` (nats), ``rms_dp`` (root mean square difference
        of the targets' probabilities, per cent), ``same_top`` (per cent) and ``logit_diff`` (the largest);
        ``tokens``, how many, and ``bad``, how many have a logit that is NaN or +inf.
    """
    log_p, log_q, kl = tokens["log_p"], tokens["log_q"], tokens["kl"]
    ordered = kl.sort().values
    same, same_error = mean_error(tokens["same_top"], window)
    return Statistics(
        tokens=len(log_p),
        bad=int(tokens["bad_p"].sum() + tokens["bad_q"].sum()),
        ppl_original=_exp_of_mean(-log_p, window),
        ppl_patched=_exp_of_mean(-log_q, window),
        ppl_ratio=_exp_of_mean(log_p - log_q, window),
        correlation=_correlation(log_p, log_q),
        kl_mean=Estimate(*mean_error(kl, window)),
        **{name: Estimate(*quantile_error(ordered, quantile)) for name, quantile in QUANTILES.items()},
        kl_max=Estimate(ordered[-1].item(), None),
        rms_dp=_root_mean_square(log_q.exp() - log_p.exp(), window),
        same_top=Estimate(100 * same, 100 * same_error),
        logit_diff=Estimate(tokens["logit_diff"].max().item(), None),
    )


def _exp_of_mean(values: Tensor, window: Tensor) -> Estimate:
    mean, error = mean_error(values, window)
    return Estimate(_exp(mean), _exp(mean) * error)


def _correlation(log_p: Tensor, log_q: Tensor) -> Estimate:
    n, p, q = len(log_p), log_p - log_p.mean(), log_q - log_q.mean()
    norm = math.sqrt((p.square().sum() * q.square().sum()).item())
    r = (p @ q).item() / norm if norm > 0 else math.nan
    r = max(-1.0, min(1.0, r)) if not math.isnan(r) else r
    return Estimate(r, (1 - r * r) / math.sqrt(n - 2) if n > 2 else math.nan)


def _root_mean_square(difference: Tensor, window: Tensor) -> Estimate:
    """In per cent."""
    square, error = mean_error(difference.square(), window)
    rms = math.sqrt(square) if square >= 0 else math.nan
    return Estimate(100 * rms, 100 * error / (2 * rms) if rms > 0 else error)


# ------------------------------------------------------------------------------------------------------------- verdict


def _beyond(statistics: Statistics, bounds: dict[str, float]) -> list[str]:
    ratio, kl, same_top = (getattr(statistics, name).value for name in ("ppl_ratio", "kl_mean", "same_top"))
    beyond = []
    if not abs(ratio - 1) <= bounds["ppl_ratio"]:  # so that NaN is beyond
        beyond.append(f"perplexity ratio {ratio:.6f} is more than {bounds['ppl_ratio']:g} off 1")
    if not kl <= bounds["kl_mean"]:
        beyond.append(f"mean KL divergence {kl:.1e} is above {bounds['kl_mean']:g}")
    if not same_top >= bounds["same_top"]:
        beyond.append(f"same top token in {same_top:.2f} %, below {bounds['same_top']:g} %")
    return beyond


def grade(statistics: Statistics, dtype: str, tolerance: dict[str, float]) -> Verdict:
    """Is it the same model? `tolerance` has the bounds of `accuracy.SAME_MODEL`; `dtype` is the model's."""
    if statistics.bad:
        return Verdict("not finite", f"NaN or inf in the logits of {statistics.bad} tokens")
    return graded(lambda bounds: _beyond(statistics, bounds), tolerance, CLOSE_MODEL.get(dtype))

"""Statistics against cases computed by hand, and the verdict on a right, a slightly wrong and a broken kernel."""

import dataclasses
import math

import pytest
import torch

from hf_gdn import registry
from hf_gdn.errors import UserError
from hf_gdn.eval import forward_modes, parity, parity_statistics, verdicts
from hf_gdn.eval.accuracy import SAME_MODEL
from hf_gdn.eval.distributed import Processes
from hf_gdn.eval.options import ParityOptions
from hf_gdn.eval.parity_results import Estimate
from hf_gdn.eval.resume import Journal, Work
from hf_gdn.loading import models, texts
from tests import tiny_models as tiny


def logits(*rows):
    """Logits of probabilities, a row a token: [1, T, vocabulary]."""
    return torch.tensor([rows], dtype=torch.float64).log()


def tokens(log_p, log_q, kl=None, same_top=None, logit_diff=None):
    n = len(log_p)
    columns = dict(
        log_p=log_p,
        log_q=log_q,
        kl=kl or [0.0] * n,
        same_top=same_top or [1.0] * n,
        logit_diff=logit_diff or [0.0] * n,
        bad_p=[0.0] * n,
        bad_q=[0.0] * n,
    )
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


# ----------------------------------------------------------------------------------------------------------- per token


def test_compare_by_hand():
    p = logits([0.5, 0.25, 0.25], [0.1, 0.8, 0.1])
    q = logits([0.25, 0.5, 0.25], [0.1, 0.8, 0.1]) + 3.0  # a constant moves logits, not probabilities
    found = parity_statistics.compare(p, q, torch.tensor([[0, 1]]))
    assert found["log_p"][0].exp().tolist() == pytest.approx([0.5, 0.8])
    assert found["log_q"][0].exp().tolist() == pytest.approx([0.25, 0.8])
    assert found["kl"][0].tolist() == pytest.approx([0.5 * math.log(2) + 0.25 * math.log(0.5), 0.0])
    assert found["same_top"][0].tolist() == [0.0, 1.0]
    assert found["logit_diff"][0].tolist() == pytest.approx([3.0 + math.log(2), 3.0])
    assert not found["bad_p"].any() and not found["bad_q"].any()


def test_compare_in_slabs_is_the_same(monkeypatch):
    random = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 5, 7, generator=random) for _ in range(2))
    targets = torch.randint(0, 7, (2, 5), generator=random)
    whole = parity_statistics.compare(p, q, targets)
    monkeypatch.setattr(parity_statistics, "SLAB", 14)
    assert all(torch.equal(whole[name], values) for name, values in parity_statistics.compare(p, q, targets).items())
    with pytest.raises(ValueError, match=r"logits must be \[B, T, vocabulary\]"):
        parity_statistics.compare(p, q[:1], targets)


def test_masked_tokens_are_no_difference_and_nan_is_found():
    p = torch.tensor([[[0.0, -math.inf, 1.0], [0.0, 1.0, math.nan], [0.0, math.inf, 0.0]]])
    found = parity_statistics.compare(p, p.nan_to_num(nan=2.0, posinf=2.0, neginf=-math.inf), torch.tensor([[0, 0, 0]]))
    assert found["kl"][0, 0] == 0 and found["logit_diff"][0, 0] == 0
    assert found["bad_p"][0].tolist() == [0, 1, 1] and not found["bad_q"].any()


# ---------------------------------------------------------------------------------------------------------- statistics


def test_mean_and_its_error_by_hand():
    values, window = torch.tensor([1.0, 3.0, 5.0, 7.0]).double(), torch.tensor([0, 0, 1, 1])
    # mean 4; residuals -3 -1 | 1 3; sums -4 and 4; sqrt(2 / 1 * 32) / 4 = 2
    assert parity_statistics.mean_error(values, window) == (4.0, pytest.approx(2.0))
    # one window: tokens are the draws: sqrt(4 / 3 * 20) / 4
    assert parity_statistics.mean_error(values, torch.zeros(4).long())[1] == pytest.approx(math.sqrt(80 / 3) / 4)
    assert math.isnan(parity_statistics.mean_error(values[:1], torch.zeros(1).long())[1])


def test_error_of_independent_windows_is_the_spread_of_their_means():
    """With one token a window the estimator is the textbook's sample standard deviation over sqrt(n)."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = values.std().item() / math.sqrt(50)
    assert parity_statistics.mean_error(values, torch.arange(50))[1] == pytest.approx(wanted)


def test_quantiles_by_hand():
    ordered = torch.arange(1, 101).double()
    # rank ceil(100 * 0.5) = 50, sqrt(100 / 4) = 5 ranks: (55 - 45) / 2
    assert parity_statistics.quantile_error(ordered, 0.5) == (50.0, 5.0)
    # rank 99, sqrt(0.99) -> 1 rank
    assert parity_statistics.quantile_error(ordered, 0.99) == (99.0, 1.0)
    assert parity_statistics.quantile_error(torch.tensor([2.0]), 0.999) == (2.0, 0.0)


def test_summary_by_hand():
    log_p = [math.log(x) for x in (0.5, 0.5, 0.25, 0.125)]
    log_q = [math.log(x) for x in (0.5, 0.25, 0.25, 0.125)]
    found = parity_statistics.summarize(
        tokens(log_p, log_q, kl=[0.0, 0.4, 0.0, 0.0], same_top=[1, 0, 1, 1], logit_diff=[0, 2.5, 0, 0]),
        torch.tensor([0, 0, 1, 1]),
    )
    value = {name: part.value for name, part in found.estimates().items()}
    error = {name: part.error for name, part in found.estimates().items()}
    assert found.tokens == 4 and found.bad == 0
    assert value["ppl_original"] == pytest.approx(2 ** (7 / 4)) and value["ppl_patched"] == pytest.approx(2 ** (8 / 4))
    assert value["ppl_ratio"] == pytest.approx(2 ** (1 / 4))
    # differences of log-probabilities: 0 ln2 | 0 0, mean ln2 / 4; sums of residuals ln2 / 2 and -ln2 / 2
    assert error["ppl_ratio"] == pytest.approx(2 ** (1 / 4) * math.sqrt(2 * 2 * (math.log(2) / 2) ** 2) / 4)
    # negative log2 of p: 1 1 2 3, of q: 1 2 2 3; covariances 2.75 / sqrt(2.75 * 2)... by hand
    p, q = [-0.75, -0.75, 0.25, 1.25], [-1.0, 0.0, 0.0, 1.0]
    r = sum(a * b for a, b in zip(p, q)) / math.sqrt(sum(a * a for a in p) * sum(b * b for b in q))
    assert value["correlation"] == pytest.approx(r) and error["correlation"] == pytest.approx(
        (1 - r * r) / math.sqrt(2)
    )
    assert value["kl_mean"] == pytest.approx(0.1) and value["kl_max"] == 0.4 and value["kl_median"] == 0.0
    assert value["kl_99"] == value["kl_999"] == 0.4 and error["kl_max"] is None
    # squares of probability differences: 0 1/16 0 0
    assert value["rms_dp"] == pytest.approx(100 * math.sqrt(1 / 64))
    assert error["rms_dp"] == pytest.approx(100 * (math.sqrt(2 * 2 * (1 / 32) ** 2) / 4) / (2 / 8))
    assert value["same_top"] == 75 and error["same_top"] == pytest.approx(100 * math.sqrt(2 * 2 * 0.5**2) / 4)
    assert value["logit_diff"] == 2.5 and error["logit_diff"] is None


def test_equal_models_have_no_distance():
    found = parity_statistics.summarize(tokens([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]), torch.tensor([0, 1, 2]))
    assert found.ppl_ratio == Estimate(1.0, 0.0) and found.correlation.value == pytest.approx(1.0)
    assert found.rms_dp == Estimate(0.0, 0.0) and found.same_top == Estimate(100.0, 0.0)
    assert parity_statistics.grade(found, "float32", verdicts.bounds(SAME_MODEL["float32"])).grade == "same"


def test_perplexity_overflow():
    found = parity_statistics.summarize(tokens([-1.0, -1e4], [-1.0, -1e4]), torch.tensor([0, 1]))
    assert found.ppl_original.value == math.inf
    assert forward_modes.perplexity(torch.tensor([-1e4])) == math.inf
    assert math.isnan(forward_modes.perplexity(torch.tensor([0.0, math.nan])))


# ------------------------------------------------------------------------------------------------------------- verdict


def summary(ratio=1.0, kl=0.0, top=100.0, bad=0):
    found = parity_statistics.summarize(tokens([-1.0, -2.0], [-1.0, -2.0]), torch.tensor([0, 1]))
    changes = dict(ppl_ratio=Estimate(ratio, 0.0), kl_mean=Estimate(kl, 0.0), same_top=Estimate(top, 0.0))
    return dataclasses.replace(found, bad=bad, **changes)


@pytest.mark.parametrize(
    ("statistics", "dtype", "grade", "why"),
    [
        (summary(), "float32", "same", ""),
        (summary(ratio=1.00009, kl=9e-9, top=99.91), "float32", "same", ""),
        (summary(kl=2e-8), "float32", "close", "mean KL divergence 2.0e-08 is above 1e-08"),
        (summary(ratio=0.9995), "float32", "close", "perplexity ratio 0.999500 is more than 0.0001 off 1"),
        (summary(top=99.0), "float32", "close", "same top token in 99.00 %, below 99.9 %"),
        (summary(kl=0.1), "float32", "different", "KL"),
        (summary(ratio=1.01), "bfloat16", "different", "ratio"),
        (summary(ratio=1.001, kl=1e-3, top=98.0), "bfloat16", "same", ""),
        (summary(ratio=math.nan), "float32", "different", "nan"),
        (summary(kl=math.nan), "float32", "different", "nan"),
        (summary(bad=3), "float32", "not finite", "NaN or inf in the logits of 3 tokens"),
    ],
)
def test_grades(statistics, dtype, grade, why):
    found = parity_statistics.grade(statistics, dtype, verdicts.bounds(SAME_MODEL[dtype]))
    assert found.grade == grade and why in found.why


def test_bounds_can_be_changed():
    assert verdicts.bounds(SAME_MODEL["float32"], ("kl_mean=1", "same_top=0"))["kl_mean"] == 1.0
    with pytest.raises(UserError, match="no bound 'kl'; bounds: ppl_ratio, kl_mean, same_top"):
        verdicts.bounds(SAME_MODEL["float32"], ("kl=1",))
    with pytest.raises(UserError, match="expected NAME=NUMBER"):
        verdicts.bounds(SAME_MODEL["float32"], ("kl_mean=small",))


def undecayed(op, eager):
    """Forgets to decay the state."""
    return lambda q, k, v, g, beta, **kwargs: eager.fn(q, k, v, torch.zeros_like(g), beta, **kwargs)


def rounded_state(op, eager):
    """Keeps the state in bfloat16: after every token in decoding, every 64 tokens in prefill."""
    step = 64 if op.startswith("chunk") else 1

    def fn(q, k, v, g, beta, *, initial_state=None, inplace=False, **kwargs):
        state, out = initial_state, []
        for part in zip(*(x.split(step, 1) for x in (q, k, v, g, beta))):
            o, state = eager.fn(*part, initial_state=state, **kwargs)
            state = state.bfloat16().float()
            out.append(o)
        return torch.cat(out, 1), initial_state.copy_(state) if inplace else state

    return fn


def nan_at_the_end(op, eager):
    """NaN in the last token of a window."""

    def fn(q, k, v, g, beta, **kwargs):
        o, state = eager.fn(q, k, v, g, beta, **kwargs)
        if o.shape[1] > 1:
            o[1, -1] = math.nan
        return o, state

    return fn


@pytest.fixture
def backend(request):
    """Registers kernels made by the parameter; the name of their backend."""
    for op in tiny.DELTA_RULES:
        eager = registry.get(op, "eager")
        registry.register(dataclasses.replace(eager, backend="planted", fn=request.param(op, eager)))
    yield "planted"
    for op in tiny.DELTA_RULES:
        registry.unregister(op, "planted")


def measure(name, backend, folder, modes=("prefill", "decode"), dtype="float32"):
    loaded = models.load(models.Source(name), torch.device("cpu"), models.DTYPES[dtype])
    text = texts.embedded()
    windows = texts.windows(texts.tokenize(loaded.tokenizer, text), 192, None, 3, text.source)
    work = Work(Processes(), Journal(folder, {}))
    return parity.measure(loaded, windows, text.source, ParityOptions(modes=modes), backend, work)


@pytest.mark.parametrize("name", models.embedded())
def test_the_right_kernel_is_the_same_model(name, tmp_path):
    found = measure(name, "auto", tmp_path, ("prefill", "decode", "mixed"))
    assert found.passed and found.scored == 3 * 191
    assert [row.name for row in found.comparisons][:3] == ["prefill", "decode", "mixed"]
    against = found.comparisons[3:]
    assert [row.name.partition(":")[0] for row in against] == ["patched", "original"]
    assert [row.decides for row in against] == [True, False]
    for row in found.comparisons:
        assert row.grade == "same" and row.statistics.kl_mean.value < 1e-10
        assert sum(row.kl_histogram.counts) == found.scored and len(row.trace.mean) == 100


@pytest.mark.parametrize("backend", [rounded_state], indirect=True)
@pytest.mark.parametrize("name", models.embedded())
def test_a_rounded_state_is_close(name, backend, tmp_path):
    found = measure(name, backend, tmp_path)
    assert not found.passed
    assert [row.grade for row in found.comparisons] == ["close", "close"]


@pytest.mark.parametrize("backend", [undecayed], indirect=True)
@pytest.mark.parametrize("name", models.embedded())
def test_a_broken_kernel_is_another_model(name, backend, tmp_path):
    found = measure(name, backend, tmp_path)
    assert not found.passed
    assert [row.grade for row in found.comparisons] == ["different", "different"]


@pytest.mark.parametrize("backend", [nan_at_the_end], indirect=True)
def test_nan_says_where_first(backend, tmp_path):
    found = measure("qwen3_next-tiny", backend, tmp_path, ("prefill",))
    (row,) = found.comparisons
    assert not found.passed and row.grade == "not finite"
    place = row.first_bad
    assert place.run == "patched, prefill" and place.window == 1
    assert place.text_token == found.text_tokens // 192 // 2 * 192 + 1  # masked attention: 0 x NaN is NaN


def test_modes_are_checked():
    with pytest.raises(UserError, match="--mode both is not known; modes: prefill, decode, mixed"):
        parity.check(ParityOptions(modes=("prefill", "both")))

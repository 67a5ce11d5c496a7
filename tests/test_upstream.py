"""The fence around transformers' changing names, and what happens where a version does not fit."""

import ast
import importlib
import inspect
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, GenerationMixin, cache_utils, masking_utils

import hf_gdn
from hf_gdn import log, patches
from hf_gdn.caches import SinkCache
from hf_gdn.errors import BackendError
from hf_gdn.patches import PatchError, self_check
from hf_gdn.upstream import cache_names, seams, versions
from tests import tiny_models as tiny

PACKAGE = Path(hf_gdn.__file__).parent
FAMILIES = {name: family for name, family in patches.all_families().items() if name in tiny.CONFIGS}
NAME = "qwen3_next"
ids = torch.arange(3, 23)[None]


@pytest.fixture(autouse=True)
def _warn_anew(monkeypatch):
    monkeypatch.setattr(log, "warned", set())


def states() -> dict[str, str]:
    return {row.name: row.state for row in hf_gdn.status().families if row.name in FAMILIES}


# --------------------------------------------------------------------------------------------------------------- names


def test_no_other_room_spells_names_or_versions():
    spelled = re.compile(r"past_key_values|cache_params|\b5\.(1[0-9]|[2-9][0-9])\b")
    files = [file for file in PACKAGE.rglob("*.py") if "upstream" not in file.parts]
    assert len(files) > 80
    found = [
        f"{file.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if spelled.search(line)
    ]
    assert not found, "\n".join(found)


def test_a_cache_is_taken_by_any_of_its_names():
    for name in cache_names.NAMES:
        given = {name: "held", "other": 1}
        assert cache_names.look(given) == "held"
        assert cache_names.take(given) == "held" and given == {"other": 1}
    assert cache_names.take({"cache": None}) is None
    with pytest.raises(TypeError, match="expected one cache"):
        cache_names.take({"past_key_values": "one", "cache_params": "another"})


@pytest.mark.parametrize("name", cache_names.NAMES)
def test_patched_layers_and_text_models_take_any_name(name, family):
    model = tiny.model(family)
    text, layer, x = model.get_decoder(), tiny.mixer(model), torch.randn(1, 6, 32)
    wanted, got = DynamicCache(config=model.config), DynamicCache(config=model.config)
    text_name = "past_key_values" if name == "cache_params" else name  # which is what layers call it
    with torch.no_grad(), hf_gdn.patched(strict=True):
        assert torch.equal(layer(x, **{name: got}), layer(x, wanted))
        assert torch.equal(got.layers[0].recurrent_states[0], wanted.layers[0].recurrent_states[0])
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache, given in zip(caches, ({text_name: caches[0]}, tiny.given(caches[1]))):
            text(ids[:, :8], **given)
            assert cache.get_seq_length() == 8
        assert torch.equal(text(ids[:, 8:], **{text_name: caches[0]})[0], text(ids[:, 8:], **tiny.given(caches[1]))[0])


@pytest.mark.parametrize("name", cache_names.NAMES[:2])
@pytest.mark.filterwarnings("ignore:.*is deprecated and:FutureWarning")  # transformers', of the name it has renamed
def test_generate_takes_both_names(name):
    model = tiny.model(NAME)
    how = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    hf_gdn.patch()
    wanted = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, **{name: DynamicCache(config=model.config)}, **how), wanted)
    cache = SinkCache(model.config, sink_tokens=2, window=60)
    assert torch.equal(model.generate(ids, **{name: cache}, **how), wanted)
    assert cache.get_seq_length() == 24


def test_outputs_have_the_cache():
    model = tiny.model(NAME)
    with torch.no_grad():
        cache = cache_names.of_outputs(model(ids, use_cache=True))
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 20
    assert cache_names.of_outputs(model(ids, use_cache=False)) is None


def test_the_original_s_signature_is_kept(family):
    cls = seams.layer_class(FAMILIES[family].module, FAMILIES[family].class_name)
    before = cache_names.name_in(cls.forward)
    with hf_gdn.patched(family):
        assert cache_names.name_in(cls.forward) == before
        assert list(tiny.layer_given(tiny.mixer(tiny.model(family)), None)) == [before]


# ------------------------------------------------------------------------------------------------------------ versions


@pytest.mark.parametrize("version", ["4.57.6", "5.16.1", "6.0.0", "7.1.0.dev0"])
def test_an_unsupported_version_is_refused_before_anything_is_patched(version, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda: version)
    text = rf"hf_gdn needs transformers >= 5\.17 and < 6; transformers {re.escape(version)} is installed"
    for names in (None, NAME):
        with pytest.raises(PatchError, match=text):
            hf_gdn.patch(names)
    assert set(states().values()) == {"original"}


@pytest.mark.parametrize(("version", "tested"), [("5.17.0", True), ("5.24.3", True), ("5.25.0.dev0", False)])
def test_the_tested_range(version, tested, monkeypatch, caplog):
    monkeypatch.setattr(versions, "version", lambda: version)
    assert versions.is_tested() == tested
    with caplog.at_level(logging.WARNING, "hf_gdn"):
        hf_gdn.patch()
        hf_gdn.patch(backend="eager")
    assert len([m for m in caplog.messages if "outside the tested range 5.17 to 5.24" in m]) == (not tested)


def test_first_versions_are_true():
    for name in patches.all_families():
        installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        first = tuple(int(part) for part in versions.since(name).split("."))
        assert (name in tiny.CONFIGS) == (installed >= first), f"{name}: in transformers since {first}?"


# --------------------------------------------------------------------------------------------------------------- seams


def _no_class(monkeypatch, family, cls, model):
    monkeypatch.delattr(importlib.import_module(family.module), family.class_name)
    return f"has no {family.class_name}"


def _other_forward(monkeypatch, family, cls, model):
    monkeypatch.setattr(cls, "forward", lambda self, x, y: x)
    return r"takes \(self, x, y\), expected \(self, hidden_states, cache, attention_mask, \.\.\.\)"


def _no_module(monkeypatch, family, cls, model):
    monkeypatch.setattr(type(family), "module", "transformers.models.qwen3_next.elsewhere")
    return "has no module transformers.models.qwen3_next.elsewhere"


def _no_text_model(monkeypatch, family, cls, model):
    monkeypatch.delattr(importlib.import_module(family.module), family.model_name)
    return f"has no {family.model_name}"


def _other_text_model(monkeypatch, family, cls, model):
    monkeypatch.setattr(model, "forward", lambda self, input_ids, state: None)
    return r"takes \(self, input_ids, state\), expected \(input_ids, attention_mask, position_ids, "


ONE = [_no_class, _other_forward, _no_module, _no_text_model, _other_text_model]


def _no_cache_attribute(monkeypatch):
    init = cache_utils.LinearAttentionCacheLayerMixin.__init__

    def without(self, *args, **kwargs):
        init(self, *args, **kwargs)
        del self.recurrent_states

    monkeypatch.setattr(cache_utils.LinearAttentionCacheLayerMixin, "__init__", without)
    return "LinearAttentionLayer of .* has no recurrent_states"


def _other_previous_state(monkeypatch):
    init = cache_utils.LinearAttentionCacheLayerMixin.__init__

    def flag(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.has_previous_state = False

    monkeypatch.setattr(cache_utils.LinearAttentionCacheLayerMixin, "__init__", flag)
    return r"has_previous_state of .* is False in a new layer, expected \{0: False\}"


def _other_update(monkeypatch):
    monkeypatch.setattr(cache_utils.Cache, "update_conv_state", lambda self, layer_idx, states: None)
    return r"Cache.update_conv_state of .* takes \(self, layer_idx, states\)"


def _no_mask_function(monkeypatch):
    monkeypatch.delattr(masking_utils, "create_recurrent_attention_mask")
    return "has no create_recurrent_attention_mask"


def _no_mixin(monkeypatch):
    monkeypatch.delattr(cache_utils, "LinearAttentionCacheLayerMixin")
    return "has no LinearAttentionCacheLayerMixin"


ALL = [_no_cache_attribute, _other_previous_state, _other_update, _no_mask_function, _no_mixin]


@pytest.mark.parametrize("breaks", ONE, ids=lambda f: f.__name__)
def test_a_family_that_does_not_fit_spoils_nothing(breaks, monkeypatch, caplog):
    last = list(FAMILIES)[-1]
    family = FAMILIES[last]
    built = tiny.model(last)
    model, cls = type(built.get_decoder()), type(tiny.mixer(built))
    forwards = [cls.forward, model.forward]
    with torch.no_grad():
        wanted = built(ids).logits
    with monkeypatch.context() as patch:
        text = breaks(patch, family, cls, model)
        for names, strict in ((last, False), (None, True)):
            with pytest.raises(PatchError, match=f"{last}: .*{text}"):
                hf_gdn.patch(names, strict=strict)
            assert not hf_gdn.status().active
        with caplog.at_level(logging.WARNING, "hf_gdn"):
            for _ in range(2):
                status = hf_gdn.patch()
        assert [row.name for row in status.families if row.reason] == [last]
        (row,) = (row for row in status.families if row.reason)
        assert row.state == "original" and re.search(text, row.reason) and row.reason in str(status)
        assert transformers.__version__ in row.reason
        assert all(state == "patched" for name, state in states().items() if name != last)
        ours = [record.getMessage() for record in caplog.records if record.name == "hf_gdn"]
        assert [m for m in ours if f"{last} is left original: " in m] == ours
        assert patches.unpatchable(built) == f"{last}: {row.reason}"
        assert patches.unpatchable(tiny.model(next(iter(FAMILIES)))) is None
    hf_gdn.patch(list(FAMILIES)[:-1])
    assert [cls.forward, model.forward] == forwards
    with torch.no_grad():
        assert torch.equal(built(ids).logits, wanted)
    assert hf_gdn.patch().active and set(states().values()) == {"patched"}  # once it fits again
    assert not any(row.reason for row in hf_gdn.status().families)


@pytest.mark.parametrize("breaks", ALL, ids=lambda f: f.__name__)
def test_caches_that_do_not_fit_leave_all_families_original(breaks, monkeypatch):
    with monkeypatch.context() as patch:
        text = breaks(patch)
        with pytest.raises(PatchError, match=text):
            hf_gdn.patch(NAME)
        status = hf_gdn.patch()
        assert not status.active
        assert all(re.search(text, row.reason) for row in status.families if row.name in FAMILIES)
    assert set(states().values()) == {"original"}


def _no_generator(monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_get_candidate_generator")
    return "GenerationMixin of .* has no _get_candidate_generator"


def _other_inputs(monkeypatch):
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", lambda self, input_ids, cache=None: {})
    return r"prepare_inputs_for_generation of .* takes .*, expected \(next_sequence_length, is_first_iteration, "


def _other_crop(monkeypatch):
    monkeypatch.setattr(cache_utils.LinearAttentionCacheLayerMixin, "crop", lambda self, length: None)
    return r"crop of .* takes \(self, length\), expected \(self, tokens_to_remove\)"


def _no_croppable(monkeypatch):
    monkeypatch.delattr(cache_utils.LinearAttentionCacheLayerMixin, "is_croppable")
    return "has no property is_croppable"


def _no_lookup(monkeypatch):
    module = importlib.import_module("transformers.generation.candidate_generator")
    monkeypatch.delattr(module, "PromptLookupCandidateGenerator")
    return "has no PromptLookupCandidateGenerator"


WITHOUT_ROLLBACK = [_no_generator, _other_inputs, _other_crop, _no_croppable, _no_lookup]


@pytest.mark.parametrize("breaks", WITHOUT_ROLLBACK, ids=lambda f: f.__name__)
def test_without_rolling_back_layers_are_patched_and_assistants_refused(breaks, monkeypatch, caplog):
    patches.family_patch.cache_swaps.cache_clear()
    model = tiny.model(NAME)
    try:
        with monkeypatch.context() as patch:
            text = breaks(patch)
            with caplog.at_level(logging.WARNING, "hf_gdn"):
                status = hf_gdn.patch()
            assert set(states().values()) == {"patched"}
            assert re.search(text, status.missing) and status.missing in str(status)
            assert len([m for m in caplog.messages if "rolling tokens back" in m and re.search(text, m)]) == 1
            assert model._is_stateful
            with pytest.raises(ValueError, match="stateful"):
                model.generate(ids, assistant_model=tiny.model(NAME, seed=1), max_new_tokens=4)
            hf_gdn.unpatch()
    finally:
        patches.family_patch.cache_swaps.cache_clear()


def test_without_a_compiled_call_there_are_no_cuda_graphs(monkeypatch):
    monkeypatch.delattr(transformers.PreTrainedModel, "get_compiled_call")
    with pytest.raises(PatchError, match="cuda_graphs: PreTrainedModel of transformers .* has no get_compiled_call"):
        hf_gdn.patch(cuda_graphs=True)
    assert not hf_gdn.status().active
    assert hf_gdn.patch().active


# ---------------------------------------------------------------------------------------------------------- self-check


@pytest.fixture
def newer(monkeypatch):
    """A transformers beyond the tested range."""
    monkeypatch.setattr(versions, "version", lambda: "5.99.0")
    monkeypatch.setattr(self_check, "_found", {})


def test_a_newer_version_is_checked_once_and_serves(family, newer, monkeypatch):
    if family == "olmo_hybrid" and Version(transformers.__version__) < Version("5.21"):
        pytest.skip("the original layer is wrong when it is called by itself (docs/differences.md)")
    checks, difference = [], self_check.difference
    monkeypatch.setattr(self_check, "difference", lambda *given: checks.append(1) or difference(*given))
    model = tiny.model(family)
    state = torch.get_rng_state()
    with torch.no_grad(), hf_gdn.patched(strict=True):
        for _ in range(2):
            model(ids)
        assert states()[family] == "patched"
    assert len(checks) == 1
    assert torch.equal(torch.get_rng_state(), state)  # sampling goes on as without it


def test_a_tested_version_is_not_checked(monkeypatch):
    monkeypatch.setattr(self_check, "difference", lambda *_: pytest.fail("compared"))
    with torch.no_grad(), hf_gdn.patched():
        tiny.model(NAME)(ids)


def _computes_otherwise(cls, original):
    def forward(self, hidden_states, *args, **kwargs):
        return 1.02 * original(self, hidden_states, *args, **kwargs)

    return forward, "the output of a prefill off by 2.0e-02, expected at most 5e-03"


def _keeps_otherwise(cls, original):
    def forward(self, hidden_states, *args, **kwargs):
        out = original(self, hidden_states, *args, **kwargs)
        cache = args[0] if args else cache_names.look(kwargs)
        if cache is not None:
            cache.layers[self.layer_idx].recurrent_states[0].mul_(1.5)
        return out

    return forward, "off by"


def _raises(cls, original):
    def forward(self, hidden_states, *args, **kwargs):
        raise NotImplementedError("not on a Tuesday")

    return forward, "could not be compared with the original: NotImplementedError: not on a Tuesday"


CHANGES = [_computes_otherwise, _keeps_otherwise, _raises]


@tiny.mainly("qwen3_next", "kimi_linear")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_newer_version_that_computes_otherwise_runs_unpatched(change, family, newer, monkeypatch, caplog):
    model = tiny.model(family)
    cls = type(tiny.mixer(model))
    forward, text = change(cls, cls.forward)
    forward.__signature__ = inspect.signature(cls.forward)
    monkeypatch.setattr(cls, "forward", forward)
    with torch.no_grad():
        if change is _raises:
            with hf_gdn.patched(), pytest.raises(NotImplementedError):  # the original runs
                model(ids)
            return
        wanted = model(ids).logits
        with caplog.at_level(logging.WARNING, "hf_gdn"):
            hf_gdn.patch()
            for _ in range(2):
                assert torch.equal(model(ids).logits, wanted)
        (row,) = (row for row in hf_gdn.status().families if row.reason)
        assert row.name == family and row.state == "original" and text in row.reason
        assert all(state == "patched" for name, state in states().items() if name != family)
        assert len([m for m in caplog.messages if m == f"{family} runs unpatched: {row.reason}"]) == 1
        assert cls.forward is forward
        hf_gdn.unpatch()
        with hf_gdn.patched(strict=True), pytest.raises(PatchError, match=f"{family}: its patched layer differs"):
            model(ids)


def test_what_the_check_cannot_run_is_left_original(newer, monkeypatch):
    monkeypatch.setattr(self_check, "_layer", lambda *_: 1 / 0)
    model = tiny.model(NAME)
    with torch.no_grad(), hf_gdn.patched():
        model(ids)
        (row,) = (row for row in hf_gdn.status().families if row.reason)
        assert "could not be compared with the original: ZeroDivisionError" in row.reason


def test_a_patched_layer_that_is_called_by_itself_works(newer):
    """Self-checks are of text models; benchmarks and tests call layers."""
    model = tiny.model(NAME)
    with torch.no_grad(), hf_gdn.patched(strict=True):
        assert tiny.mixer(model)(torch.randn(1, 3, 32)).shape == (1, 3, 32)
    with pytest.raises(BackendError), hf_gdn.patched(backend="triton"), torch.no_grad():
        tiny.mixer(model)(torch.randn(1, 3, 32))


# ------------------------------------------------------------------------------------------------------- private names

_PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def _parsed() -> dict[str, ast.Module]:
    files = [file for file in PACKAGE.rglob("*.py") if "upstream" not in file.parts]
    return {str(file.relative_to(PACKAGE)): ast.parse(file.read_text("utf-8")) for file in files}


def _own_names(trees) -> set[str]:
    """Private names that the package defines itself: functions, classes, variables and attributes."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).rpartition(".")[2])
    return found


def test_private_names_of_other_packages_stand_behind_the_fence():
    """Attributes, modules, and strings that name such an attribute."""
    trees = _parsed()
    fence = "".join(file.read_text("utf-8") for file in (PACKAGE / "upstream").glob("*.py"))
    behind = set(re.findall(r"[\"'.](_[a-z]\w*)", fence))
    own, named_tuples = _own_names(trees.values()), {"_replace", "_asdict", "_fields"}
    found = []
    for file, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = (node.module or "").split(".")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value] if node.value in behind else []
            strange = [name for name in names if _PRIVATE.fullmatch(name) and name not in own | named_tuples]
            found += [f"{file}:{node.lineno}: {name}" for name in strange]
    assert not found, "\n".join(found)

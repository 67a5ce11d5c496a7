"""Snapshots in files: what comes back is what was saved, or the documented error; crashes leave the file before."""

import os
import pickle
import random
import stat
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, StaticCache

from hf_gdn import caches, files
from hf_gdn.caches import SnapshotError
from hf_gdn.caches.snapshots import files as snapshot_files
from tests import tiny
from tests.caches import cache_contents


def filled(model, tokens=20, rows=2):
    ids = torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **tiny.given(cache))
    return cache


@pytest.fixture(scope="module")
def smallest():
    """A cache of a few hundred bytes, filled with anything."""
    sizes = dict(linear_num_key_heads=1, linear_num_value_heads=1, linear_key_head_dim=2, linear_value_head_dim=2)
    model = tiny.model(
        "qwen3_next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=4,
        num_attention_heads=1, hidden_size=8, **sizes,
    )  # fmt: skip
    return model, filled(model, 3)


def test_what_was_saved_comes_back(family, tmp_path):
    model = tiny.model(family)
    cache = filled(model)
    snapshot = caches.snapshot(cache, model)
    path = tmp_path / "prefix.safetensors"
    caches.save(snapshot, path)
    found = caches.load(path, model)
    assert cache_contents.parts(found) == cache_contents.parts(snapshot)
    assert (found.kinds, found.length, found.model) == (snapshot.kinds, 20, caches.fingerprint(model))
    ids = torch.randint(3, 128, (2, 5))
    with torch.no_grad():
        wanted = model(ids, **tiny.given(cache)).logits
        fresh = DynamicCache(config=model.config)
        caches.restore(fresh, found)
        assert torch.equal(model(ids, **tiny.given(fresh)).logits, wanted)
    static = StaticCache(config=model.config, max_cache_len=32)
    caches.restore(static, found)
    assert cache_contents.parts(caches.snapshot(static)) == cache_contents.parts(snapshot)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_header_says_what_it_is(tmp_path, dtype):
    model = tiny.model("kimi_linear", dtype=dtype)
    path = tmp_path / "prefix.safetensors"
    caches.save(caches.snapshot(filled(model), model), path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header.pop("sha256")
    assert header == {
        "format": "hf_gdn.snapshot", "version": "1", "model": caches.fingerprint(model), "length": "20",
        "batch_size": "2", "dtype": str(dtype).removeprefix("torch."), "layers": "linear,linear,linear,attention",
    }  # fmt: skip
    assert cache_contents.parts(caches.load(path, model)) == cache_contents.parts(caches.snapshot(filled(model)))


def test_another_model_is_refused_from_a_file(tmp_path):
    model, other = tiny.model("qwen3_next"), tiny.model("qwen3_next", seed=1)
    path, cache = tmp_path / "prefix.safetensors", filled(other)
    before = cache_contents.everything(cache)
    caches.save(caches.snapshot(filled(model), model), path)
    with pytest.raises(SnapshotError, match="prefix.safetensors: the snapshot is of another model: .* other weights"):
        caches.load(path, other)
    found = caches.load(path)
    with pytest.raises(SnapshotError, match="names its model, qwen3_next:.*load\\(path, model\\)"):
        caches.restore(cache, found)
    with pytest.raises(SnapshotError, match="another model"):
        caches.restore(cache, found, other)
    assert cache_contents.everything(cache) == before
    caches.restore(cache, found, model)
    caches.save(caches.snapshot(filled(model)), path)  # does not name its model
    caches.restore(cache, caches.load(path))
    with pytest.raises(SnapshotError, match="does not name its model"):
        caches.load(path, model)


def test_an_empty_snapshot_has_a_file_too(tmp_path):
    model = tiny.model("qwen3_next")
    caches.save(caches.snapshot(DynamicCache(config=model.config)), tmp_path / "empty")
    found = caches.load(tmp_path / "empty")
    assert (found.length, found.batch_size, found.nbytes) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------------------ crashes

STAGES = ["save_file", "_to_disk", "replace"]


def _stop(monkeypatch, stage, how):
    """Let saving go as far as a stage, and there do what `how` does, with a file that is written by half."""

    def stopped(*args, **_):
        if stage == "save_file":
            args[1].write_bytes(b"half a file")
        how()

    owner = {"save_file": snapshot_files, "_to_disk": files, "replace": os}[stage]
    monkeypatch.setattr(owner, stage, stopped)


@pytest.fixture
def saved(tmp_path, smallest):
    """A snapshot, the path of a file with it, and another snapshot."""
    path = tmp_path / "prefix.safetensors"
    snapshot = caches.snapshot(smallest[1])
    caches.save(snapshot, path)
    return snapshot, path, caches.snapshot(filled(smallest[0], 7))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that branch")
@pytest.mark.parametrize("stage", STAGES)
def test_a_process_that_dies_leaves_the_file_before(saved, monkeypatch, stage):
    snapshot, path, other = saved
    child = os.fork()
    if child == 0:
        _stop(monkeypatch, stage, lambda: os._exit(9))
        caches.save(other, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert cache_contents.parts(caches.load(path)) == cache_contents.parts(snapshot)
    caches.save(other, path)
    assert cache_contents.parts(caches.load(path)) == cache_contents.parts(other)


@pytest.mark.parametrize("stage", STAGES)
def test_an_error_leaves_the_file_before_and_nothing_else(saved, monkeypatch, stage):
    snapshot, path, other = saved

    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        _stop(patch, stage, full)
        with pytest.raises(OSError, match="No space left"):
            caches.save(other, path)
    assert os.listdir(path.parent) == [path.name]
    assert cache_contents.parts(caches.load(path)) == cache_contents.parts(snapshot)


def test_the_order_is_write_sync_move_sync(saved, monkeypatch):
    _, path, other = saved
    order = []

    def noting(name, function):
        return lambda *args, **kwargs: (order.append((name, str(args[-1]))), function(*args, **kwargs))[1]

    monkeypatch.setattr(snapshot_files, "save_file", noting("write", save_file))
    monkeypatch.setattr(files, "_to_disk", noting("sync", files._to_disk))
    monkeypatch.setattr(os, "replace", noting("move", os.replace))
    caches.save(other, path)
    assert [name for name, _ in order] == ["write", "sync", "move", "sync"]
    assert order[0][1] == order[1][1] != str(path) and os.path.dirname(order[0][1]) == str(path.parent)
    assert order[2][1] == str(path) and order[3][1] == str(path.parent)


def test_links_and_permissions_stay_as_users_have_them(saved, tmp_path):
    _, path, other = saved
    link = tmp_path / "link"
    link.symlink_to(path)
    caches.save(other, link)
    assert link.is_symlink() and caches.load(path).length == 7
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    with pytest.raises(OSError):
        caches.save(other, tmp_path / "no such folder" / "file")
    with pytest.raises(FileNotFoundError):
        caches.load(tmp_path / "none")
    with pytest.raises(OSError):
        caches.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------- bad files


def _mutations(data: bytes, other: bytes, count: int):
    """Damaged versions of a file: cut, extended, bits and bytes changed, parts moved, of another file, its header."""
    rng = random.Random(0)
    size = 8 + struct.unpack("<Q", data[:8])[0]  # of length and header
    for index in range(count):
        got = bytearray(data)
        where = rng.randrange(size) if index % 2 else rng.randrange(len(data))  # half of them in the header
        match index % 10:
            case 0 | 1:
                got[where] ^= 1 << rng.randrange(8)
            case 2:
                got = got[:where]
            case 3:
                got[where : where + rng.randrange(1, 9)] = b""
            case 4 | 5:
                got[where:where] = rng.randbytes(rng.randrange(1, 9))
            case 6:
                got[where : where + 8] = rng.randbytes(8)
            case 7:
                got[where] = rng.choice(b'0123456789"{}[],:.-eE\\ \0\xff')
            case 8:
                end = rng.randrange(where, len(data)) + 1
                got[where:end] = other[where:end]
            case 9:
                got[:8] = struct.pack("<Q", rng.choice([0, 1, size - 9, size - 7, len(data), 2**31, 2**63, 2**64 - 1]))
        yield bytes(got)


def test_2000_damaged_files(smallest, tmp_path):
    """Each is what was saved, or SnapshotError; the cache stays what it was."""
    model, cache = smallest
    snapshot = caches.snapshot(cache, model)
    path = tmp_path / "prefix.safetensors"
    caches.save(caches.snapshot(filled(model, 7), model), path)
    other = path.read_bytes()
    caches.save(snapshot, path)
    wanted = cache_contents.parts(snapshot)
    going = caches.fork(cache, 1)[0]
    before = cache_contents.everything(going)
    good, refused, harmless = path.read_bytes(), 0, 0
    for data in _mutations(good, other, 2000):
        path.write_bytes(data)
        try:
            found = caches.load(path)
            assert cache_contents.parts(found) == wanted
            assert (found.length, found.model) == (snapshot.length, snapshot.model)
            caches.restore(going, found, snapshot.model)
            harmless += data != good  # a byte that means nothing, such as a space behind the header
        except SnapshotError:
            refused += 1
        assert cache_contents.everything(going) == before
    assert refused > 1900 and harmless < 40


def _written(path, header=None, tensors=None, **changes):
    """A file with a right checksum, whatever else is wrong with it."""
    header, tensors = {**header, **changes}, {name: tensor.clone() for name, tensor in tensors.items()}
    header["sha256"] = snapshot_files._digest(header, tensors)
    save_file(tensors, path, metadata=header)
    return path


def test_files_made_to_mislead(saved, smallest, tmp_path):
    """Their checksum is right, since whoever wrote them could work it out."""
    _, path, _ = saved
    with safe_open(path, "pt") as file:
        header = file.metadata()
        good = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sorted(good) == ["layers.0.conv.0", "layers.0.recurrent.0", "layers.1.keys", "layers.1.values"]
    assert caches.load(_written(tmp_path / "good", header, good)).length == 3
    keys, values = good["layers.1.keys"], good["layers.1.values"]
    tensors = {
        "more tokens": {"layers.1.keys": torch.cat((keys, keys), 2), "layers.1.values": torch.cat((values, values), 2)},
        "unequal tokens": {"layers.1.values": values[:, :, :2].contiguous()},
        "unequal heads": {"layers.1.values": values.repeat(1, 2, 1, 1)},
        "rows": {"layers.0.conv.0": good["layers.0.conv.0"].repeat(2, 1, 1)},
        "dimensions": {"layers.1.keys": keys[0].clone()},
        "scalar": {"layers.0.conv.0": torch.tensor(1.0)},
        "strange part": {"layers.1.conv.0": good["layers.0.conv.0"]},
        "strange name": {"__class__": keys},
        "strange layer": {"layers.2.keys": keys},
        "no such state": {"layers.0.conv.777": good["layers.0.conv.0"]},
    }
    for name, changes in tensors.items():
        with pytest.raises(SnapshotError):
            caches.load(_written(tmp_path / name, header, {**good, **changes}))
    with pytest.raises(SnapshotError, match="expected keys"):
        caches.load(_written(tmp_path / "lacks", header, {k: v for k, v in good.items() if k != "layers.1.values"}))
    headers = [
        ("length", "4", "for 2 sequences of 4 tokens"), ("length", "-3", "length of '-3'"), ("length", "³", "length"),
        ("length", "9" * 5000, "length"), ("batch_size", "3", "batch size or dtype"), ("dtype", "float64", "dtype"),
        ("layers", "linear,linear", "expected"), ("layers", "linear", "has a tensor 'layers.1"),
        ("layers", "", "tensor"),
        ("layers", "linear,__import__", "kinds: linear, attention, indexed"),
        ("model", "x", "expected a fingerprint"),
    ]  # fmt: skip
    for name, value, says in headers:
        with pytest.raises(SnapshotError, match=says):
            caches.load(_written(tmp_path / "header", header, good, **{name: value}))
    found = caches.load(_written(tmp_path / "states", header, {**good, "layers.0.conv.7": good["layers.0.conv.0"]}))
    (cache,) = caches.fork(smallest[1], 1)
    before = cache_contents.everything(cache)
    with pytest.raises(SnapshotError, match=r"has 1 states per layer, the snapshot conv\.7; nothing was restored"):
        caches.restore(cache, found)
    assert cache_contents.everything(cache) == before


def test_files_that_are_no_snapshots(saved, tmp_path):
    _, path, _ = saved
    with safe_open(path, "pt") as file:
        header = file.metadata()
    path = tmp_path / "file"
    for version in ("0", "2", "1.0", ""):
        _written(path, header, {}, version=version)
        with pytest.raises(SnapshotError, match=f"of version {version}; this hf_gdn reads version 1"):
            caches.load(path)
    for missing in ("length", "layers", "sha256", "model"):
        save_file({}, path, metadata={key: value for key, value in header.items() if key != missing})
        with pytest.raises(SnapshotError, match=f"lacks {missing}"):
            caches.load(path)
    for metadata in (None, {}, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, path, metadata=metadata)
        with pytest.raises(SnapshotError, match=r"is not a snapshot: the format"):
            caches.load(path)
    for data in (b"", b"\0" * 8, b"\0" * 100, b"GGUF", os.urandom(1000), struct.pack("<Q", 2) + b"{}"):
        path.write_bytes(data)
        with pytest.raises(SnapshotError, match="is not a snapshot"):
            caches.load(path)


def test_no_code_of_a_file_runs(tmp_path):
    ran = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return ran.touch, ()

    path = tmp_path / "file.safetensors"
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(SnapshotError):
        caches.load(path)
    torch.save({"x": Malicious()}, path)
    with pytest.raises(SnapshotError):
        caches.load(path)
    assert not ran.exists()

"""hf-gdn run: a program that knows nothing of hf_gdn runs patched, and otherwise as ``python PROGRAM`` runs it."""

import importlib
import os
import subprocess
import sys
import zipfile
from multiprocessing import spawn

import pytest

import hf_gdn
from hf_gdn import cli
from hf_gdn.cli import at_import
from hf_gdn.environment import switch

PROGRAM = """
import os
import sys
seen_before = 1
print([name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
import beside
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({model!r})
import torch
from huggingface_hub import constants
print(constants.HF_HUB_OFFLINE, torch.get_num_threads())
seen = (sys.argv, __name__, sys.modules["__main__"].seen_before, sys.path[0])
print(seen, type(model.model.layers[0].linear_attn).forward.__module__)
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)[0].tolist())
def fail():
    raise SystemExit(7) if "exit" in sys.argv else ZeroDivisionError("of the program")
if "well" not in sys.argv:
    fail()
"""


@pytest.fixture
def folder(tmp_path):
    from hf_gdn.loading.models import ASSETS

    (tmp_path / "beside.py").write_text("")
    (tmp_path / "program.py").write_text(PROGRAM.format(model=str(ASSETS / "qwen3_next-tiny")))
    return tmp_path


def run(folder, *arguments, options=("-W", "ignore"), **environment):
    folders = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": folders, **environment}
    words = [sys.executable, *options, *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=env)


def errors(done) -> str:
    """What a program wrote to stderr, without progress bars and transformers' own words."""
    lines = done.stderr.replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if "Loading weights" not in line and "[transformers]" not in line)


def test_output_exit_code_and_traceback_are_pythons(folder):
    """What the program sets in its environment is set before anything reads it."""
    environment = {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "2"}
    wanted = run(folder, "program.py", "--epochs", "3", **environment)
    done = run(folder, "-m", "hf_gdn", "run", "--summary", "program.py", "--epochs", "3", **environment)
    assert wanted.returncode == done.returncode == 1
    assert wanted.stdout.replace("transformers.models.qwen3_next.modeling_qwen3_next", "hf_gdn.patches.forward") == (
        done.stdout
    )
    *mine, summary = errors(done).splitlines()
    assert "\n".join(mine) == errors(wanted)
    assert summary.startswith("hf_gdn: ") and "qwen3_next 3 layers; " in summary and "step_gdn: " in summary


FACE = """
import inspect, os, sys, warnings
os.chdir("/")
def fail():
    warnings.warn("of the program")
    raise ZeroDivisionError("of the program")
print(__file__, os.path.exists(__file__), inspect.getsource(fail), type(__loader__), sys.argv, sys.path[0])
print(sorted(vars()), type(__builtins__))
fail()
"""


@pytest.mark.parametrize(
    "words",
    ["face.py --x -- y", "linked/face.py", "-m face x", "-mface x", "all.pyz x", "folder x"]
    + ["syntax.py", "-m syntax", "-m nosuchmodule", "linked"],
)
def test_a_program_sees_and_shows_what_it_does_with_python(tmp_path, words):
    for folder in ("linked", "folder"):
        (tmp_path / folder).mkdir()
    for name, text in (("face.py", FACE), ("folder/__main__.py", FACE), ("syntax.py", "x = 1\ndef\n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "linked" / "face.py").symlink_to(tmp_path / "face.py")
    with zipfile.ZipFile(tmp_path / "all.pyz", "w") as archive:
        archive.writestr("__main__.py", FACE)
    wanted = run(tmp_path, *words.split(), options=())
    done = run(tmp_path, "-m", "hf_gdn", "run", *words.split(), options=())
    assert (done.returncode, done.stdout, done.stderr) == (wanted.returncode, wanted.stdout, wanted.stderr)
    assert wanted.returncode == 1


CHILD = """
import multiprocessing, sys
def child():
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
    print(Qwen3NextGatedDeltaNet.forward.__module__)
if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=child)
    process.start()
    process.join()
"""


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.extended)])
def test_new_processes_are_patched(tmp_path, method):
    (tmp_path / "starts.py").write_text(CHILD)
    done = run(tmp_path, "-m", "hf_gdn", "run", "starts.py", method)
    assert done.stdout == "hf_gdn.patches.forward\n", done.stderr


def test_the_first_import_acts(tmp_path, monkeypatch):
    """Once, after the module; where the action fails, every import does."""
    (tmp_path / "first_watched.py").write_text("loader = __loader__\n")
    (tmp_path / "second_watched.py").write_text("")
    monkeypatch.setattr(at_import, "WATCHED", {"first_watched", "second_watched"})
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(spawn, "get_preparation_data", spawn.get_preparation_data)
    monkeypatch.syspath_prepend(tmp_path)
    seen = []

    def action():
        import second_watched  # noqa: F401

        seen.append("exec_module" in vars(sys.modules["first_watched"].loader))
        if len(seen) < 3:
            raise SystemExit(2)

    at_import.arrange(action)
    for _ in range(2):
        with pytest.raises(SystemExit):
            importlib.import_module("first_watched")
        assert "first_watched" not in sys.modules
    for name in ("first_watched", "second_watched"):
        importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        importlib.import_module(name)
    assert seen == [False] * 3


@pytest.mark.extended
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_launchers_patch_every_process(folder, launcher):
    """On a CPU accelerate starts one."""
    processes = 2 if launcher == "torch.distributed.run" else 1
    options = ["--nproc_per_node", "2"] if processes == 2 else ["--num_processes", "1", "--cpu"]
    done = run(folder, "-m", launcher, *options, "-m", "hf_gdn", "run", "program.py", "well")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hf_gdn.patches.forward") == processes


def test_the_environment_patches(folder):
    code = "import hf_gdn; print(hf_gdn.status().active)"
    assert run(folder, "-c", code, HF_GDN_PATCH="yes").stdout == "True\n"
    code = "import hf_gdn, sys; print('hf_gdn.patches' in sys.modules)"
    assert run(folder, "-c", code, HF_GDN_PATCH="off").stdout == "False\n"


@pytest.mark.parametrize(
    "value, on", [("", None), ("0", False), ("False", False), ("no", False), ("off", False), ("1", True), ("ON", True)]
)
def test_switches(monkeypatch, value, on):
    monkeypatch.setenv("HF_GDN_PATCH", value)
    for default in (False, True):
        assert switch("HF_GDN_PATCH", default) is (default if on is None else on)


def test_a_switch_is_on_or_off(folder):
    text = "HF_GDN_PATCH must be one of 1, true, yes, on, 0, false, no, off, got 'never'"
    assert text in run(folder, "-c", "import hf_gdn", HF_GDN_PATCH="never").stderr


@pytest.fixture
def here(monkeypatch, tmp_path):
    """`run` in this process, and everything put back."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(spawn, "get_preparation_data", spawn.get_preparation_data)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-gdn", "run", *arguments])
        cli.main()

    return call


SMALL = "import sys, hf_gdn\nprint(sys.argv, __name__, hf_gdn.status().active)\nsys.exit(3)\n"


def test_a_module_a_folder_and_an_archive(here, tmp_path, capsys):
    (tmp_path / "small_program.py").write_text(SMALL)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text(SMALL)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("__main__.py", SMALL)
    for words in (["-m", "small_program"], ["folder"], ["all.zip"], ["--strict", "small_program.py"]):
        with pytest.raises(SystemExit) as stopped:
            here(*words, "--strict", "x")
        assert stopped.value.code == 3
        assert capsys.readouterr().out.endswith("'--strict', 'x'] __main__ True\n")
        hf_gdn.unpatch()


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "expected a PROGRAM, or -m MODULE"),
        (["--summary"], "expected a PROGRAM, or -m MODULE"),
        (["nothing.py"], "program 'nothing.py' cannot be read: No such file"),
        (["--backend", "other", "small.py"], "--backend: unknown backend 'other'; valid backends: "),
        (["--no-such-option", "small.py"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_mistakes_are_said_before_anything_runs(here, tmp_path, capsys, arguments, text):
    (tmp_path / "small.py").write_text("raise AssertionError('it ran')")
    with pytest.raises(SystemExit) as stopped:
        here(*arguments)
    assert stopped.value.code == 2 and text in capsys.readouterr().err
    assert not hf_gdn.status().active

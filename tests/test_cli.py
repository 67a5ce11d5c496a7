"""The command line: help in groups, examples that can be run, mistakes at once; and a core that needs none of it."""

import re
import shlex
import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from hf_gdn import cli
from hf_gdn.chat.options import ChatOptions
from hf_gdn.cli.app import PANELS, app
from hf_gdn.cli.program import RunOptions
from hf_gdn.eval.options import (
    KernelBenchOptions,
    OutputOptions,
    ParityOptions,
    SpeedOptions,
    StreamOptions,
    TrainOptions,
)
from hf_gdn.loading.options import DeviceOptions, ModelOptions, TextOptions

COMMANDS = typer.main.get_command(app).commands
GROUPS = {
    "report": (ModelOptions, TextOptions, ParityOptions, SpeedOptions, DeviceOptions, OutputOptions),
    "ppl": (ModelOptions, TextOptions, ParityOptions, DeviceOptions, OutputOptions),
    "speed": (ModelOptions, TextOptions, SpeedOptions, DeviceOptions, OutputOptions),
    "kernels": (KernelBenchOptions, DeviceOptions, OutputOptions),
    "stream": (ModelOptions, TextOptions, StreamOptions, DeviceOptions, OutputOptions),
    "train": (ModelOptions, TextOptions, TrainOptions, DeviceOptions, OutputOptions),
    "chat": (ChatOptions, DeviceOptions),
    "compare": (),
    "doctor": (DeviceOptions,),
    "run": (RunOptions,),
}


def help_of(*arguments):
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"TERMINAL_WIDTH": "100", "COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.output


def examples(name):
    """Command lines in the help of a command."""
    lines = re.findall(r"^\s*(hf-gdn .*?)\s*$", help_of(name), re.M)
    return [shlex.split(line) for line in lines]


def test_every_command_is_listed_under_a_heading():
    text = help_of()
    assert set(COMMANDS) == set(GROUPS)
    for heading in (*PANELS, *GROUPS):
        assert heading in text
    assert [text.index(panel) for panel in PANELS] == sorted(text.index(panel) for panel in PANELS)


@pytest.mark.parametrize("name", GROUPS)
def test_help_shows_options_in_groups(name):
    text = help_of(name)
    for group in GROUPS[name]:
        assert f"─ {group.PANEL} " in text
        assert all(
            field.metadata["help"].split()[0] in text
            for field in vars(group)["__dataclass_fields__"].values()
            if "help" in field.metadata
        )


@pytest.mark.parametrize("name", GROUPS)
def test_examples_in_the_help_can_be_run(name):
    found = examples(name)
    assert found
    for words in found:
        assert words[:2] == ["hf-gdn", name]
        COMMANDS[name].make_context(name, words[2:])


def test_examples_that_cannot_be_run_are_found():
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["ppl"].make_context("ppl", ["--no-such-option"])


def test_options_reach_their_groups(monkeypatch):
    from hf_gdn.eval import job

    seen = []
    monkeypatch.setattr(job, "run", lambda asked, command: seen.append(asked) or 0)
    CliRunner().invoke(app, ["ppl", "--model", "a", "--model", "b", "--windows", "3", "--tolerance", "kl_mean=1"])
    CliRunner().invoke(app, ["speed", "--batch", "1, 2", "--set", "a=1", "--set", "b=2", "--config", "c", "--tp"])
    CliRunner().invoke(app, ["kernels", "--op", "x,y", "--gpu-graph", "--output", "o", "--threads", "3"])
    ppl, speed, kernels = seen
    assert ppl.kind == "ppl" and ppl.models == ModelOptions(models=("a", "b")) and ppl.output.output == "hf-gdn-ppl"
    assert ppl.parity == ParityOptions(windows=3, tolerance=("kl_mean=1",), modes=("prefill",)) and ppl.speed is None
    assert speed.speed == SpeedOptions(batch=(1, 2)) and speed.parity is None and speed.tensor_parallel
    assert speed.models == ModelOptions(config="c", settings=("a=1", "b=2"), tensor_parallel=True)
    assert kernels.options == KernelBenchOptions(ops=("x", "y"), gpu_graph=True)
    assert kernels.output == OutputOptions("o") and kernels.device == DeviceOptions(threads=3)


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_help_and_mistakes_need_no_torch():
    code = """
import sys
from hf_gdn.cli import app
found = [name for name in ("torch", "transformers", "matplotlib", "datasets") if name in sys.modules]
assert not found, found
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


# What a plain install of hf-gdn lacks. psutil is there all the same, since accelerate needs it.
LACKING = sorted({"typer", "rich", "jinja2", "matplotlib", "datasets"})
BLOCK = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = ["hf-gdn", *sys.argv[2:]]
"""


def test_patching_needs_none_of_the_extra():
    code = """
import sys
import hf_gdn
hf_gdn.patch()
assert hf_gdn.status().active
assert hf_gdn.unpatch
from hf_gdn import caches, ops
"""
    done = python(BLOCK + code, ",".join(LACKING))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("typer", ["doctor"]),
        ("rich", ["doctor"]),
        ("psutil", ["doctor"]),
        ("rich", ["compare", "a.json", "b.json"]),
        ("jinja2", ["report"]),
        ("matplotlib", ["kernels"]),
        ("matplotlib", ["stream"]),
        ("jinja2", ["chat"]),
        ("rich", ["chat"]),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_brings_it(package, arguments, tmp_path):
    if package == "psutil":
        pytest.importorskip("psutil")
    done = python(BLOCK + "from hf_gdn.cli import main\nmain()\n", package, *arguments)
    wanted = f"hf-gdn: this command needs the package {package}, which is not installed: pip install 'hf-gdn[eval]'\n"
    assert (done.returncode, done.stderr) == (2, wanted)


def test_a_missing_data_set_library_too(tmp_path):
    done = python(
        BLOCK + "from hf_gdn.cli import main\nmain()\n", "datasets", "ppl", "--dataset", "x", "--output", str(tmp_path)
    )
    assert done.returncode == 2 and "pip install 'hf-gdn[eval]'" in done.stderr and done.stderr.count("\n") == 1


def test_another_missing_module_is_no_sentence(monkeypatch):
    """It is a bug, and has a traceback."""
    from hf_gdn.cli import app as module

    def fail():
        raise ModuleNotFoundError("No module named 'hf_gdn.nothing'", name="hf_gdn.nothing")

    monkeypatch.setattr(module, "main", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main()

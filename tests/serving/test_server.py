"""`transformers serve` through hf-gdn run, on the embedded model, for OpenAI's client and `transformers chat`."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gdn
from hf_gdn.loading.models import ASSETS
from tests.serving import runs

openai = pytest.importorskip("openai", reason="needs the packages of transformers[serving]")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

pytestmark = runs.needs_seams
ROOT = Path(hf_gdn.__file__).parents[1]
START = "hf-gdn run -m transformers.cli.transformers serve"  # as docs/serving.md has it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model with a chat template, which chats need: the messages one after another."""
    copy = tmp_path_factory.mktemp("models") / "qwen3_next-tiny"
    shutil.copytree(ASSETS / "qwen3_next-tiny", copy)
    (copy / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return str(copy)


@pytest.fixture(scope="module")
def address(tmp_path_factory, folder):
    """Address of a server in a process of its own, whose cache holds a few requests."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    options = ["--continuous-batching", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    options += ["--cb-block-size", "32", "--cb-num-blocks", "40", "--cb-max-batch-tokens", "64"]
    log = tmp_path_factory.mktemp("server") / "log"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as out:
        command = [sys.executable, "-m", "hf_gdn", *START.split()[1:], folder, *options]
        server = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    try:
        until = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            try:
                socket.create_connection(("localhost", port), 1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://localhost:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def ask(address: str, model: str, prompt: str, tokens: int, stop_after: int | None = None) -> str:
    """The streamed answer to a prompt; the connection is closed after some pieces if `stop_after` is given."""
    client, pieces = openai.OpenAI(base_url=address, api_key="none", timeout=120, max_retries=0), []
    with client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True) as stream:
        for piece in stream:
            pieces.append(piece.choices[0].text if piece.choices else "")
            if stop_after is not None and len(pieces) >= stop_after:
                break
    return "".join(pieces)


def answers(folder: str, prompts: list[str]) -> list[str]:
    """24 tokens after each prompt, by the original's `generate`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True))
    return found


def test_two_clients_get_the_answers_of_generate(address, folder):
    prompts = ["import os\n", "def main():\n    "]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda prompt: ask(address, folder, prompt, 24), prompts)) == answers(folder, prompts)


@pytest.mark.extended
def test_transformers_chat_gets_the_answer_of_generate(address, folder):
    """It shows the answer as Markdown (letters and digits are compared), and asks whether to go on after 24 tokens."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", folder, address.removesuffix("/v1")]
    env = {**os.environ, "HF_HUB_OFFLINE": "0"}  # offline, it asks no server, this machine's included
    done = subprocess.run(
        [*command, "max_new_tokens=24", "do_sample=False"],
        input="def main():\nn\n!exit\n", capture_output=True, text=True, env=env, cwd=Path(folder).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    shown, wanted = (re.sub(r"\W|_", "", text) for text in (done.stdout, *answers(folder, ["def main():"])))
    assert len(wanted) > 10 and wanted in shown


def test_the_server_is_started_as_the_docs_say():
    assert START in (ROOT / "docs" / "serving.md").read_text("utf-8")


def test_clients_that_leave_give_their_slots_back(address, folder):
    """Twelve streams of 3,500 tokens, each as long as the whole cache, are left; run on, they would take minutes."""
    for _ in range(12):
        ask(address, folder, "import os\n", 3500, stop_after=3)
    begin = time.monotonic()
    assert ask(address, folder, "import os\n", 24)
    assert time.monotonic() - begin < 30

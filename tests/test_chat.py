"""hf-gdn chat as a user sees it: keys into a pseudo-terminal, what comes out of it, and files; then its parts."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from transformers import GenerationConfig

import hf_gdn
from hf_gdn.chat.conversation import Conversation, Interrupt
from hf_gdn.chat.options import ChatOptions
from hf_gdn.errors import UserError
from hf_gdn.loading import models

EMBEDDED = "qwen3_next-tiny"
PATIENCE = 120  # seconds; what is waited for comes within a few on an idle machine
NEW, SLOTS = 24, 4 + 140
TURNS = ("import os\\\nimport sys\\\n\\\ndef main(arguments):", "    for argument in", "        if argument")


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, *arguments):
        ours, theirs = os.openpty()

        def own():  # Ctrl-C must reach it, though whoever started the tests may ignore it
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "dumb", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hf_gdn", "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=own,
        )
        os.close(theirs)
        self.ours, self.seen = ours, ""

    def read(self, until):
        """What came since the last time, as soon as `until` says that it is enough."""
        end, got = time.monotonic() + PATIENCE, b""
        while not until(text := got.decode(errors="replace").replace("\r\n", "\n")):
            assert select.select([self.ours], [], [], max(0, end - time.monotonic()))[0], f"nothing more after: {text}"
            try:
                part = os.read(self.ours, 65536)
            except OSError:  # how Linux says that the other side has closed
                part = b""
            assert part, f"the chat ended after: {text}"
            got += part
        return text

    def prompt(self):
        return self.read(lambda text: text.endswith(("\n> ", "\n. ")))

    def send(self, line):
        """Type lines; what came up to the prompt after the last."""
        for part in line.split("\n"):
            os.write(self.ours, part.encode() + b"\n")
            text = self.prompt()
        return text.partition("\n")[2].removesuffix("\n> ")

    def keys(self, keys):
        os.write(self.ours, keys)

    def ended(self):
        return self.process.wait(PATIENCE)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def first(folder):
    """A conversation of three turns: what was on the screen, and what /save wrote after two of them and after all."""
    terminal = Terminal("--max-new-tokens", str(NEW), "--window", str(SLOTS - 4), "--temperature", "0")
    try:
        seen = {"hello": terminal.prompt(), "answers": [terminal.send(turn) for turn in TURNS[:2]]}
        terminal.send(f"/save {folder / 'two.json'}")
        seen["answers"].append(terminal.send(TURNS[2]))
        terminal.send(f"/save {folder / 'three.json'}")
        for line in ("/stats", "/nonsense", "/load", "/help", f"/load {folder / 'absent.json'}", "/save /", "/save ."):
            seen[line.partition(str(folder))[0].strip() + ("?" if str(folder) in line else "")] = terminal.send(line)
        (folder / "bad.json").write_text('{"format": "hf_gdn.chat", "vers')
        seen["bad"] = terminal.send(f"/load {folder / 'bad.json'}")
        terminal.send(f"/save {folder / 'unchanged.json'}")
        seen["reset"] = terminal.send("/reset")
        seen["stats after"] = terminal.send("/stats")
        seen["again"] = terminal.send(TURNS[0])
        terminal.keys(b"/quit\n")
        seen["code"] = terminal.ended()
    finally:
        terminal.close()
    return seen


@pytest.fixture(scope="module")
def saved(first, folder):
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("two", "three", "unchanged")}


@pytest.fixture(scope="module")
def loaded():
    return models.load(models.Source(EMBEDDED), torch.device("cpu"), torch.float32)


def bytes_in(stats):
    return next(line for line in stats.splitlines() if line.startswith("cache: "))


def test_every_answer_goes_on_from_all_before(first, saved, loaded):
    """The original model, on all ids at once and without a cache, says the same; and the screen shows it."""
    ids, at = saved["three"]["ids"], 0
    assert len(ids) <= SLOTS
    with torch.no_grad():
        wanted = loaded.model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
    for turn, answer in zip(TURNS, first["answers"]):
        typed = loaded.tokenizer(turn.replace("\\\n", "\n"), add_special_tokens=not at).input_ids
        assert ids[at : at + len(typed)] == typed
        at += len(typed)
        assert ids[at : at + NEW] == wanted[at - 1 : at + NEW - 1]
        assert loaded.tokenizer.decode(ids[at : at + NEW]).strip() in answer.expandtabs()
        at += NEW
    assert at == len(ids) and saved["three"]["text"] == loaded.tokenizer.decode(ids)


def test_what_it_says(first):
    assert EMBEDDED in first["hello"] and first["hello"].count("no chat template") == 1
    assert "no chat template" not in "".join(first["answers"])
    assert f"kept of {SLOTS} at most" in first["/stats"] and "a second" in first["/stats"]
    assert "unknown command /nonsense; commands: /reset /save /load" in first["/nonsense"]
    assert "/load takes the name of a file" in first["/load"]
    assert "Ctrl-C stops an answer" in first["/help"]
    assert first["code"] == 0


def test_bad_files_change_nothing(first, saved):
    assert "cannot be read: No such file" in first["/load?"]
    assert "bad.json' cannot be read" in first["bad"]
    assert "cannot be written" in first["/save /"] and "cannot be written" in first["/save ."]
    assert saved["unchanged"] == saved["three"]


def test_reset_begins_anew(first):
    assert "conversation: 0 tokens, 0 kept" in first["stats after"]
    assert bytes_in(first["stats after"]) == bytes_in(first["/stats"])  # the buffers stay
    assert first["again"].split() == first["answers"][0].split()


def test_another_process_goes_on_until_it_is_stopped(first, saved, folder, loaded):
    """/load; the same third answer, seen while it is still being given; Ctrl-C; more in the same memory; Ctrl-D."""
    given = len(saved["three"]["ids"]) - NEW
    answer = loaded.tokenizer.decode(saved["three"]["ids"][given:])
    terminal = Terminal(EMBEDDED, "--max-new-tokens", "1000000", "--window", str(SLOTS - 4), "--temperature", "0")
    try:
        terminal.prompt()
        assert f"{len(saved['two']['ids'])} tokens read" in terminal.send(f"/load {folder / 'two.json'}")
        before = terminal.send("/stats")
        terminal.keys(TURNS[2].encode() + b"\n")
        terminal.read(lambda text: len(text.split()) > 3 * len(answer.split()) + 20)
        terminal.keys(b"\x03")
        assert "stopped" in terminal.prompt()
        terminal.send(f"/save {folder / 'stopped.json'}")
        ids = json.loads((folder / "stopped.json").read_text())["ids"]
        assert len(ids) > given + NEW and ids[: given + NEW] == saved["three"]["ids"]
        terminal.keys(b"class Other:\n")
        terminal.read(lambda text: len(text.split()) > 60)
        terminal.keys(b"\x03")
        terminal.prompt()
        after = terminal.send("/stats")
        assert f"{SLOTS} kept of {SLOTS}" in after and bytes_in(after) == bytes_in(before)
        terminal.send(f"/save {folder / 'more.json'}")
        more = json.loads((folder / "more.json").read_text())["ids"]
        typed = loaded.tokenizer("class Other:", add_special_tokens=False).input_ids
        assert more[: len(ids)] == ids and more[len(ids) : len(ids) + len(typed)] == typed
        terminal.keys(b"half a li\x03")
        assert "Ctrl-D or /quit ends" in terminal.prompt()
        terminal.keys(b"\x04")
        assert terminal.ended() == 0
    finally:
        terminal.close()


# --------------------------------------------------------------------------------------------------------- in its parts


@pytest.fixture
def talk(loaded):
    """A conversation with an embedded model, greedy; stop and show that do nothing."""
    with hf_gdn.patched(strict=True):
        yield lambda **options: Conversation(loaded, ChatOptions(**{"new_tokens": 8, "temperature": 0, **options}))


def nothing(text):
    """An answer that nobody watches."""


def test_a_template_renders_turns_and_only_what_is_new_is_read(talk, loaded, monkeypatch):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    encode = lambda text: loaded.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    chat, stop = talk(), Interrupt()
    chat.ask("one", nothing, stop)
    wanted = encode("<user>one<|endoftext|>\n<assistant>")
    assert chat.ids[: len(wanted)] == wanted
    answered = chat.ids
    assert answered[-1] != 0 and chat.turn("two") == encode("<|endoftext|>\n<user>two<|endoftext|>\n<assistant>")
    chat.ask("two", nothing, stop)
    assert chat.read[0] == len(encode("<|endoftext|>\n<user>two<|endoftext|>\n<assistant>"))  # and the answer's last
    chat.ids = [*answered, 0]  # an answer that came to its end
    assert chat.turn("two") == encode("\n<user>two<|endoftext|>\n<assistant>")
    held = chat.ids, chat.cache.seen()
    for template, why in (
        ("{{ raise_exception('no') }}", "no"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
    ):
        monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
        with pytest.raises(UserError, match=f"the chat template refuses this turn: {why}"):
            chat.ask("three", nothing, stop)
    assert (chat.ids, chat.cache.seen()) == held


@pytest.mark.parametrize(
    "config, text",
    [
        (dict(do_sample=True, temperature=-1), "ValueError: `temperature`"),
        (dict(do_sample=True, temperature=1e-40), "RuntimeError: probability tensor"),
        (dict(eos_token_id="x"), "TypeError: "),
        (dict(forced_eos_token_id=5000), "IndexError: "),  # after seven tokens of an answer
    ],
)
def test_a_turn_that_cannot_be_answered_is_dropped(config, text, talk, loaded, monkeypatch, tmp_path):
    chat, other, stop = talk(), talk(), Interrupt()
    for each in (chat, other):
        each.ask("import os", nothing, stop)
    greedy, chat.options = chat.options, ChatOptions(new_tokens=8)
    with monkeypatch.context() as wrong:
        wrong.setattr(loaded.model, "generation_config", GenerationConfig(pad_token_id=0, **config))
        with pytest.raises(UserError, match=f"no answer, and the turn is dropped: {text}"):
            chat.ask("import sys", nothing, stop)
    chat.save(str(tmp_path / "saved.json"))
    assert json.loads((tmp_path / "saved.json").read_text())["ids"] == other.ids
    chat.options = greedy
    for each in (chat, other):
        each.ask("import re", nothing, stop)
    assert chat.ids == other.ids and chat.cache.seen() == len(chat.ids) - 1


@pytest.mark.parametrize(
    "config",
    [dict(num_beams=4), dict(num_return_sequences=2), dict(use_cache=False), dict(return_dict_in_generate=True)],
    ids=lambda config: next(iter(config)),
)
def test_a_chat_is_one_sequence_whatever_the_model_says(config, talk, loaded, monkeypatch):
    monkeypatch.setattr(loaded.model, "generation_config", GenerationConfig(pad_token_id=0, do_sample=True, **config))
    chat = talk(temperature=None)
    chat.ask("import os", nothing, Interrupt())
    assert chat.cache.seen() == len(chat.ids) - 1


def test_a_turn_that_was_stopped_while_it_was_read_is_read_on(talk):
    text, stop = "import os\n" * 600, Interrupt()
    whole, halved = talk(), talk()
    whole.ask(text, nothing, stop)
    real = halved.model.forward

    def once(*args, **kwargs):
        stop.asked = True
        return real(*args, **kwargs)

    halved.model.forward = once
    try:
        halved.ask(text, nothing, stop)
    finally:
        del halved.model.forward
    assert 0 < halved.cache.seen() < len(halved.ids) - 1
    stop.asked = False
    new = halved.tokenizer(" ", add_special_tokens=False).input_ids
    halved.ask(" ", nothing, stop)
    assert halved.ids[: len(whole.ids) - 8] == whole.ids[:-8]
    assert halved.cache.seen() == len(halved.ids) - 1 == len(whole.ids) + len(new) - 1


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(format="other"), "is no conversation of hf_gdn.chat, version 1"),
        (dict(version=2), "is no conversation"),
        (dict(tokenizer="other"), "which has other tokens"),
        (dict(ids=[1, 1024]), "its ids are no token ids"),
        (dict(ids=[1, True]), "its ids are no token ids"),
        (dict(ids=None), "its ids are no token ids"),
    ],
)
def test_files_that_are_no_conversation(change, text, talk, tmp_path):
    chat, stop = talk(), Interrupt()
    chat.ask("import os", nothing, stop)
    ids, path = chat.ids, str(tmp_path / "saved.json")
    chat.save(path)
    found = json.loads((tmp_path / "saved.json").read_text())
    (tmp_path / "saved.json").write_text(json.dumps({**found, **change}))
    with pytest.raises(UserError, match=text):
        chat.load(path, stop)
    assert chat.ids == ids and chat.cache.seen() == len(ids) - 1


def test_a_load_that_is_stopped_changes_nothing(talk, tmp_path):
    chat, stop = talk(), Interrupt()
    chat.ask("import os", nothing, stop)
    chat.save(str(tmp_path / "saved.json"))
    chat.ask("import sys", nothing, stop)
    ids, cache = chat.ids, chat.cache
    stop.asked = True
    assert not chat.load(str(tmp_path / "saved.json"), stop)
    assert chat.ids == ids and chat.cache is cache and cache.seen() == len(ids) - 1


def test_options_of_sampling():
    silent, says = GenerationConfig(), GenerationConfig(do_sample=True, top_k=5)
    assert ChatOptions().sampling(silent) == dict(do_sample=True, temperature=0.7, repetition_penalty=1.1)
    assert ChatOptions().sampling(says) == {}
    assert ChatOptions().sampling(GenerationConfig(do_sample=False)) == {}
    for greedy in (ChatOptions(temperature=0), ChatOptions(greedy=True), ChatOptions(greedy=True, temperature=0)):
        assert greedy.sampling(silent) == greedy.sampling(says)
        assert greedy.sampling(silent) == dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    assert ChatOptions(top_p=0.9).sampling(says) == dict(do_sample=True, top_p=0.9)
    assert ChatOptions(top_p=0.9).sampling(silent)["temperature"] == 0.7
    assert ChatOptions(temperature=0.3, top_p=0.9).sampling(says) == dict(do_sample=True, temperature=0.3, top_p=0.9)
    assert ChatOptions(repetition_penalty=1.3).sampling(silent)["repetition_penalty"] == 1.3
    assert ChatOptions(repetition_penalty=1.3).sampling(says) == dict(repetition_penalty=1.3)


def test_an_answer_of_an_embedded_model_does_not_loop(talk):
    """Greedily it does: `self.path.split(self.path.split(self.path.split(` ..."""
    said = {}
    for name, options in (("greedy", dict(temperature=0)), ("default", dict(temperature=None))):
        chat = talk(new_tokens=120, **options)
        torch.manual_seed(0)
        chat.ask("import os\ndef main():\n", nothing, Interrupt())
        answer = chat.ids[-120:]
        said[name] = len({tuple(answer[i : i + 4]) for i in range(117)})
    assert said["greedy"] < 60 < said["default"]

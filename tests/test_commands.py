"""The command line: what it prints, where, and with which exit code, against fake parties."""

from __future__ import annotations

import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import tokenizers
import trio
from service import NAMES, VOCAB, World, spec, world
from tokenizers import decoders, models, pre_tokenizers

from mimir import errors
from mimir.__main__ import EXIT_CODES, INTERRUPTED, _report, main, peer_main
from mimir.client.commands import _trust_lines, _tunnel_line
from mimir.client.terminal import Terminal, visible
from mimir.errors import AbortError
from mimir.keys.file import save
from mimir.net.identity import Identity
from mimir.secret import StorageKey
from wg.errors import NotPossibleHere
from wg.exchange import HybridExchange

END = 0  # the model's end token


def make_tokenizer(directory: Path) -> Path:
    """One token per byte, in the byte-level alphabet, then fillers up to the vocabulary."""
    directory.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": END} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    for filler in range(len(vocab), VOCAB):
        vocab[f"<{filler}>"] = filler
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return make_tokenizer(tmp_path / "tokenizer")


def ids_of(directory: Path, text: str) -> list[int]:
    encoded: list[int] = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    return encoded


class Running:
    """Fake parties in a thread, with the files that the commands read."""

    def __init__(self, tmp: Path, made: World, tokenizer: Path) -> None:
        self.made = made
        self.file = tmp / "federation.toml"
        made.clients[0].save(tmp / "client.key")
        made.clients[1].save(tmp / "second.key")
        made.owner.save(tmp / "owner.key")
        text = f'client_key = "client.key"\ntokenizer = "{tokenizer}"\ndeadlines.silence = 30\n'
        for party in made.federation.parties:
            text += f'[[parties]]\nname = "{party.name}"\nhost = "{party.host}"\nport = {party.port}\n'
            text += f'identity = "{party.identity}"\n'
        self.file.write_text(text)

    def answers(self, ids: list[int]) -> None:
        """Have the model say this, over and over."""
        self.made.fake.answer = lambda conversation, turn, step: ids[step % len(ids)]  # type: ignore[method-assign]

    def __call__(self, command: str, *arguments: str) -> int:
        return main([command, "--federation", str(self.file), *arguments])


@pytest.fixture
def start(tmp_path: Path, tokenizer: Path) -> Iterator[Callable[..., Running]]:
    stops: list[Callable[[], None]] = []
    # The fake parties' log shares this process; a command's own output is what is looked at.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(io.StringIO()))

    def begin(**settings: Any) -> Running:
        ready: queue.Queue[Any] = queue.Queue()

        async def serve() -> None:
            with trio.CancelScope() as scope:
                async with world(tmp_path, **settings) as made:
                    ready.put((made, trio.lowlevel.current_trio_token(), scope))
                    await trio.sleep_forever()

        def thread() -> None:
            try:
                trio.run(serve)
            except BaseException as error:
                ready.put(error)
                raise

        worker = threading.Thread(target=thread)
        worker.start()
        begun = ready.get(timeout=20)
        if isinstance(begun, BaseException):
            raise begun
        made, token, scope = begun

        def stop() -> None:
            token.run_sync_soon(scope.cancel)
            worker.join(20)

        stops.append(stop)
        return Running(tmp_path, made, tokenizer)

    yield begin
    for stop in stops:
        stop()
    structlog.reset_defaults()


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- generate ----------------------------------------------------------------------------------------------


def test_the_answer_and_nothing_else_is_on_standard_output(
    start: Callable[..., Running], tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mimir = start()
    mimir.answers(ids_of(tokenizer, "tree"))
    assert mimir("generate", "Once", "--max-new", "4") == 0
    out, err = capsys.readouterr()
    assert out == "tree\n"
    assert "4 tokens, ended by length" in err and "\r" not in err  # no progress line where no terminal is
    (conversation,) = mimir.made.fake.conversations.values()
    assert conversation.prompts[0, 0]["token"].tolist()[-4:] == ids_of(tokenizer, "Once")


def test_printing_stops_where_asked_while_the_protocol_runs_on(
    start: Callable[..., Running], tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mimir = start()
    sent: list[int] = []

    def count(party: int, message: dict[str, Any]) -> dict[str, Any]:
        if message["t"] == "token":
            sent.append(party)
        return message

    mimir.made.fake.tamper = count
    mimir.answers([*ids_of(tokenizer, "ab"), END, *ids_of(tokenizer, "x")])
    assert mimir("generate", "Once", "--max-new", "8") == 0
    assert capsys.readouterr().out == "ab\n"
    assert len(sent) == 3 * 8
    assert mimir("generate", "Once", "--max-new", "1", "--echo") == 0
    assert capsys.readouterr().out == "Oncea\n"
    assert len(sent) == 3 * 12  # one token printed, its bucket of four run
    assert mimir("generate", "Once", "--max-new", "4", "--ignore-end") == 0
    assert capsys.readouterr().out == "abx\n"


def test_a_character_split_over_tokens_comes_whole(
    start: Callable[..., Running], tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mimir = start()
    mimir.answers(ids_of(tokenizer, "é€"))
    assert len(ids_of(tokenizer, "é€")) == 5
    assert mimir("generate", "Once", "--max-new", "5", "--json") == 0
    said = [event for event in events(capsys.readouterr().out) if event["event"] == "token"]
    assert [event["text"] for event in said] == ["", "é", "", "", "€"]


def test_json_is_one_object_per_line(
    start: Callable[..., Running], tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mimir = start()
    mimir.answers(ids_of(tokenizer, "tree"))
    assert mimir("generate", "Once", "--max-new", "4", "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    seen = events(out)
    assert seen[0]["event"] == "session" and seen[0]["prompt_tokens"] == 4 and seen[0]["buckets"] == [8]
    assert {event["event"] for event in seen} == {"session", "progress", "token", "done"}
    assert seen[-1]["text"] == "tree" and seen[-1]["ended"] == "length"
    assert seen[-1]["ids"] == ids_of(tokenizer, "tree")
    assert [stats["party"] for stats in seen[-1]["stats"]] == [0, 1, 2]


def test_the_prompt_comes_from_wherever_it_is_given(
    start: Callable[..., Running], tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mimir = start()
    (tmp_path / "prompt.txt").write_text("Twice")
    assert mimir("generate", "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new", "4") == 0
    assert mimir("generate", "--ids", "7,8 9", "--max-new", "4") == 0
    reading, writing = os.pipe()
    os.write(writing, b"Piped")
    os.close(writing)
    saved = os.dup(0)
    try:
        os.dup2(reading, 0)
        assert mimir("generate", "--max-new", "4") == 0
    finally:
        os.dup2(saved, 0)
        os.close(reading)
        os.close(saved)
    first, second, third = mimir.made.fake.conversations.values()
    assert first.prompts[0, 0]["token"].tolist()[-5:] == ids_of(tokenizer, "Twice")
    assert second.prompts[0, 0]["token"].tolist()[-3:] == [7, 8, 9]
    assert third.prompts[0, 0]["token"].tolist()[-5:] == ids_of(tokenizer, "Piped")


def test_sampling_and_determinism_are_terms_of_the_session(start: Callable[..., Running]) -> None:
    mimir = start()
    options = ["--max-new", "4", "--sample", "--temperature", "0.7", "--top-k", "5", "--deterministic"]
    assert mimir("generate", "Once", *options) == 0
    (conversation,) = mimir.made.fake.conversations.values()
    sampler = conversation.terms.sampler
    assert (sampler.kind, sampler.temperature, sampler.topk) == ("sample", 0.7, 5)
    assert conversation.terms.deterministic_seed


def test_two_processes_join_one_session(
    start: Callable[..., Running], tmp_path: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mimir = start()
    keys = ",".join(client.public_hex for client in mimir.made.clients)
    common = ["--clients", keys, "--bucket", "8,8", "--max-new", "4", "--join", "ab" * 16, "--json"]
    command = [sys.executable, "-m", "mimir", "generate", "--federation", str(mimir.file), *common]
    second = subprocess.Popen(
        [*command, "there", "--part", "1", "--key", str(tmp_path / "second.key")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert mimir("generate", "Hello", *common, "--part", "0") == 0
    theirs = events(second.communicate(timeout=20)[0])
    ours = events(capfd.readouterr().out)
    assert second.returncode == 0
    assert ours[-1]["ids"] == theirs[-1]["ids"] and len(ours[-1]["ids"]) > 0
    (conversation,) = mimir.made.fake.conversations.values()
    assert conversation.prompts[0, 1]["token"].tolist()[-5:] == ids_of(tokenizer, "there")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["generate", ""], 2, "the prompt is empty"),
        (["generate", "x" * 17], 2, "the prompt has 17 tokens; the largest bucket is 16"),
        (["generate", "x", "--max-new", "9"], 2, "the answer has 9 tokens; the largest bucket is 8"),
        (
            ["generate", "x", "--model", "other"],
            2,
            "model 'other' is not at all three parties: they hold toy (",
        ),
        (["generate", "x", "--sample", "--top-k", "99"], 2, "top-k 99 is over this federation's 40"),
        (["generate", "x", "--part", "1"], 2, "our key is number 0"),
        (["generate", "x", "--clients", "ab" * 32], 2, "does not name our own key"),
        (["generate", "x", "--bucket", "8,8"], 2, "names 2 lengths for 1 clients"),
        (["generate", "--ids", "1,x"], 2, "--ids takes token numbers"),
        (["generate", "--ids", "300"], 2, "outside the model's 300"),
        (["generate", "x", "--tokenizer", "/nonexistent"], 4, "/nonexistent"),
        (["generate", "x", "--prompt-file", "/nonexistent"], 2, "not both"),
        (["generate", "--prompt-file", "/nonexistent"], 2, "/nonexistent: cannot be read"),
        (["generate", "x", "--key", "/nonexistent"], 2, "/nonexistent"),
        (["provision", "/nonexistent"], 4, "/nonexistent"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    start: Callable[..., Running],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    mimir = start()
    assert mimir(*arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and text in err
    assert err.splitlines()[-1].startswith("mimir: ") and "Traceback" not in err


def test_every_command_tells_an_error_in_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An error is one object on standard output, once, whichever command it is."""
    nothing = str(tmp_path / "nothing")
    for words in (
        ["cost", "--model", nothing],
        ["policy", "check", nothing, "--owners", "00" * 32, "--threshold", "1"],
        ["revoke", "--statement", nothing, "--federation", nothing],
        ["generate", "--federation", nothing],
    ):
        code = main([*words, "--json"])
        out, err = capsys.readouterr()
        told = [event for event in events(out) if event.get("event") == "error"]
        assert code in (2, 3, 4) and err == "", (words, code, err)
        assert len(told) == 1 and told[0]["code"] == code and "nothing" in told[0]["message"], (words, out)


def test_an_error_that_nobody_reads_any_more_is_no_bug(tmp_path: Path) -> None:
    """Whoever read the JSON is gone: exit code 1, and no traceback."""
    ours, theirs = os.pipe()
    os.close(ours)
    words = [sys.executable, "-m", "mimir", "cost", "--model", str(tmp_path / "nothing"), "--json"]
    told = subprocess.run(words, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (told.returncode, told.stderr) == (1, "")


def test_an_abort_is_exit_code_7_also_in_json(
    start: Callable[..., Running], capsys: pytest.CaptureFixture[str]
) -> None:
    mimir = start()
    mimir.made.fake.open_error = AbortError()
    assert mimir("generate", "x", "--json") == 7
    out, err = capsys.readouterr()
    last = events(out)[-1]
    assert last["event"] == "error" and last["code"] == 7 and "aborted" in last["message"]
    assert err == ""


def test_a_liar_is_exit_code_8_and_nothing_is_printed(
    start: Callable[..., Running], capsys: pytest.CaptureFixture[str]
) -> None:
    mimir = start()

    def lie(party: int, message: dict[str, Any]) -> dict[str, Any]:
        if party == 2 and message["t"] == "token":
            message["components"][0] ^= 1
        return message

    mimir.made.fake.tamper = lie
    assert mimir("generate", "x", "--max-new", "4") == 8
    out, err = capsys.readouterr()
    assert out == "" and "sent different values of one component" in err


def test_a_dead_party_is_exit_code_8(
    start: Callable[..., Running], capsys: pytest.CaptureFixture[str]
) -> None:
    mimir = start()
    mimir.file.write_text(re.sub(r"port = \d+", "port = 1", mimir.file.read_text(), count=1))
    assert mimir("generate", "x") == 8
    assert "party alpha (127.0.0.1:1): cannot be reached" in capsys.readouterr().err
    assert mimir("status") == 8
    out = capsys.readouterr().out
    assert "alpha: party alpha" in out and "beta (party 1" in out and "gamma (party 2" in out


def test_a_bad_federation_file_is_exit_code_3(
    start: Callable[..., Running], capsys: pytest.CaptureFixture[str]
) -> None:
    mimir = start()
    mimir.file.write_text(mimir.file.read_text() + "porrt = 1\n")
    assert mimir("generate", "x") == 3
    assert "unknown key parties[2].porrt; did you mean parties[2].port?" in capsys.readouterr().err


# --- chat, status, provision -------------------------------------------------------------------------------


def test_chat_keeps_one_session_over_turns(
    start: Callable[..., Running],
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mimir = start()
    mimir.answers(ids_of(tokenizer, "yes."))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAgain\n"))
    assert mimir("chat", "--max-new", "4", "--template", "<{}>") == 0
    out = capsys.readouterr().out
    assert out == "yes.\nyes.\n"
    (conversation,) = mimir.made.fake.conversations.values()
    assert conversation.prompts[0, 0]["token"].tolist()[-4:] == ids_of(tokenizer, "<Hi>")
    assert conversation.prompts[1, 0]["token"].tolist()[-7:] == ids_of(tokenizer, "<Again>")
    assert conversation.prompts[1, 0]["position"].tolist()[-7:] == list(range(8, 15))


def test_chat_says_when_the_context_is_full(
    start: Callable[..., Running], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mimir = start(model=spec(context=20))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAgain\nOnce more\n"))
    assert mimir("chat", "--max-new", "4") == 0
    assert "The context is full: 8 positions left" in capsys.readouterr().err


def test_status_tells_of_each_party_and_warns_of_missing_tunnels(
    start: Callable[..., Running], capsys: pytest.CaptureFixture[str]
) -> None:
    mimir = start()
    assert mimir("status") == 0
    out = capsys.readouterr().out
    for name in NAMES:
        assert name in out
    assert out.count("NOT protected") == 3 and out.count("model toy") == 3
    assert mimir("status", "--json") == 0
    assert [event["status"]["party"] for event in events(capsys.readouterr().out)] == [0, 1, 2]


def test_trust_is_told_in_the_status_whatever_a_party_sends() -> None:
    assert _trust_lines({"tls": None, "revocations": None}) == []
    shown: dict[str, Any] = {"issuer": "ab" * 32, "not_after": "then", "grounds": None}
    (line,) = _trust_lines({"tls": shown})
    assert "no peer has admitted it" in line
    shown["grounds"] = {"kind": "swtpm", "simulated": True}
    assert _trust_lines({"tls": shown}) == [
        "certificate by abababababababab for swtpm, SIMULATED, until then"
    ]
    known = {"epoch": 3, "forks": ["cd" * 32]}
    first, second = _trust_lines({"revocations": known})
    assert first == "revocations of epoch 3" and "TWO STATEMENTS" in second
    for odd in ({"tls": 1, "revocations": 2}, {"tls": {}, "revocations": {}}, {"tls": {"grounds": {}}}):
        assert all(isinstance(each, str) for each in _trust_lines(odd))


def test_a_tunnel_is_one_line_of_the_status() -> None:
    entry = {"party": 1, "state": "up", "received": 7, "sent": 9}
    assert _tunnel_line(entry) == "party 1: up, 7 bytes in, 9 out"
    entry |= {"epoch": 3, "epoch_age": 61.7, "rotation": "steady"}
    assert _tunnel_line(entry) == "party 1: up, keys of epoch 3 for 62 s, steady, 7 bytes in, 9 out"
    entry |= {"epoch": None, "epoch_age": None, "rotation": "none"}
    assert _tunnel_line(entry) == "party 1: up, 7 bytes in, 9 out"
    assert (
        _tunnel_line(entry | {"rotation": "offered"}) == "party 1: up, first keys, offered, 7 bytes in, 9 out"
    )
    entry |= {"state": "not admitted", "rotation": "not admitted"}
    assert _tunnel_line(entry) == "party 1: not admitted, 7 bytes in, 9 out"
    for odd in (None, 3, {}, {"rotation": 1}, {"epoch_age": "x"}):  # a party may send anything
        assert isinstance(_tunnel_line(odd), str)


def test_a_real_checkpoint_is_provisioned_and_then_spoken_with(
    start: Callable[..., Running],
    tmp_path: Path,
    shared_models: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    mimir = start(hold=False)
    directory = str(shared_models["stories260K"]["path"])
    owner = str(tmp_path / "owner.key")
    assert mimir("provision", directory, "--key", owner, "--name", "stories") == 0
    out, err = capsys.readouterr()
    name, digest = out.split()
    assert name == "stories" and "All three parties hold stories" in err
    for party in mimir.made.parties:
        assert party.store.open(digest).manifest.name == "stories"
    assert not list(tmp_path.glob("*.seeds"))  # beside the client's key, and gone
    assert (
        mimir("provision", directory, "--key", owner, "--json") == 0
    )  # again: another sharing, another digest
    assert events(capsys.readouterr().out)[-1]["model"] != digest
    assert mimir("generate", "Once", "--model", "stories", "--tokenizer", directory, "--max-new", "4") == 0


# --- keys, run, doctor, help -------------------------------------------------------------------------------


def test_keygen_makes_private_files_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, length in (("identity", 64), ("tunnel", 44)):
        file = tmp_path / f"{kind}.key"
        assert main(["keygen", "--out", str(file), "--kind", kind]) == 0
        public = capsys.readouterr().out.strip()
        assert len(public) == length and file.stat().st_mode & 0o777 == 0o600
        assert public not in file.read_text()
        assert main(["pubkey", str(file), "--kind", kind]) == 0
        assert capsys.readouterr().out.strip() == public
        assert main(["keygen", "--out", str(file), "--kind", kind]) in (2, 3)
        assert "exists already" in capsys.readouterr().err
        file.chmod(0o644)
        assert main(["pubkey", str(file), "--kind", kind]) in (2, 3)
        assert "chmod 600" in capsys.readouterr().err


def party_file(tmp: Path, identities: list[Identity]) -> Path:
    """A configuration without a tunnel, whose peers will never come."""
    text = 'party = 0\nidentity_key = "own.key"\ndata_dir = "data"\n[tunnel]\nmode = "none"\n'
    text += '[attestation]\nmode = "off"\n[control]\nlisten = "127.0.0.1:0"\n[mesh]\nlisten = "127.0.0.1:0"\n'
    for party, identity in enumerate(identities):
        text += f'[[peers]]\nparty = {party}\nname = "p{party}"\nidentity = "{identity.public_hex}"\n'
        text += 'host = "127.0.0.1"\nport = 1\n'
    file = tmp / "party.toml"
    file.write_text(text)
    if not (tmp / "storage.key").exists():
        save(tmp / "storage.key", StorageKey.random())
    return file


def test_run_check_reads_everything_and_says_what_it_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identities = [Identity.generate() for _ in range(3)]
    file = party_file(tmp_path, identities)
    assert peer_main(["run", "--config", str(file), "--check"]) == 2
    assert "own.key" in capsys.readouterr().err
    identities[0].save(tmp_path / "own.key")
    assert peer_main(["run", "--config", str(file), "--check"]) == 0
    out = capsys.readouterr().out
    assert "party 0 (p0)" in out and "NO tunnel" in out and "nobody may open a session" in out
    (tmp_path / "own.key").unlink()
    identities[1].save(tmp_path / "own.key")
    assert main(["run", "--config", str(file), "--check"]) == 3
    assert "peers[0].identity is not the public half" in capsys.readouterr().err
    assert peer_main(["run", "--config", str(tmp_path / "nowhere.toml")]) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_party_stops_cleanly_when_told(tmp_path: Path, number: signal.Signals) -> None:
    identities = [Identity.generate() for _ in range(3)]
    identities[0].save(tmp_path / "own.key")
    file = party_file(tmp_path, identities)
    command = [sys.executable, "-m", "mimir", "run", "--config", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "listening for clients" in line:
            process.send_signal(signal.SIGUSR1)  # asks for new tunnel keys: here there are none to change
        if "told to rotate keys, but" in line:
            break
    process.send_signal(number)
    rest = process.communicate(timeout=20)[1]
    assert process.returncode == 0, "".join(lines) + rest
    assert "Traceback" not in rest and "stopping" in rest


def test_ctrl_c_ends_a_client_without_a_traceback(start: Callable[..., Running]) -> None:
    mimir = start()
    waiting = threading.Event()

    def mute(party: int, message: dict[str, Any]) -> dict[str, Any] | None:
        if message["t"] == "token":
            waiting.set()
            return None
        return message

    mimir.made.fake.tamper = mute
    command = [sys.executable, "-m", "mimir", "generate", "Once", "--federation", str(mimir.file)]
    process = subprocess.Popen([*command, "--max-new", "4"], stderr=subprocess.PIPE, text=True)
    assert waiting.wait(20)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == INTERRUPTED and err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


def test_ctrl_c_counts_whatever_it_brings_down(capsys: pytest.CaptureFixture[str]) -> None:
    """A party that is silent because we are leaving is not what the user is told."""
    group = BaseExceptionGroup(
        "", [AbortError("a consequence"), BaseExceptionGroup("", [KeyboardInterrupt()])]
    )
    assert _report(group, False) == INTERRUPTED
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_closed_pipe_is_no_traceback(start: Callable[..., Running]) -> None:
    mimir = start()
    command = [sys.executable, "-m", "mimir", "generate", "Once", "--federation", str(mimir.file)]
    process = subprocess.Popen(
        [*command, "--max-new", "4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(20)
    assert "Traceback" not in err


def test_doctor_says_what_is_missing_and_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identities = [Identity.generate() for _ in range(3)]
    file = party_file(tmp_path, identities)
    assert main(["doctor", "--config", str(file), "--json"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert told["fine"] is False
    missing = {
        each["name"]: each for each in told["findings"] if not each["fine"] and each["need"] == "needed"
    }
    assert "mimir keygen" in missing["identity"]["remedy"]
    assert all(each["remedy"] for each in told["findings"] if not each["fine"])
    identities[0].save(tmp_path / "own.key")
    code = main(["doctor", "--config", str(file)])
    out = capsys.readouterr().out
    assert code == (5 if "MISSING" in out else 0)
    assert main(["doctor", "--role", "client"]) == 0


def test_doctor_names_a_missing_post_quantum_exchange(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object) -> None:
        raise NotPossibleHere("not here")

    for able in (True, False):
        if not able:
            monkeypatch.setattr(HybridExchange, "offer", refuse)
        main(["doctor", "--json"])
        found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
        assert found["ml-kem"]["fine"] is able and found["ml-kem"]["need"] == "needed"
    assert "rotate_seconds = 0" in found["ml-kem"]["remedy"]


def test_every_command_explains_itself_and_the_exit_codes_are_those_of_the_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in (
        [],
        *(
            [name]
            for name in (
                "run keygen pubkey provision generate chat verify status doctor revoke certificate".split()
            )
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--help"])
        assert caught.value.code == 0
        assert "exit codes:" in capsys.readouterr().out
    codes = {int(match) for match in re.findall(r"^  (\d+) ", EXIT_CODES, re.MULTILINE)}
    raised = {
        each.exit_code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.MimirError)
    }
    assert raised | {0, INTERRUPTED} <= codes
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--join", "xyz", "--federation", "f"])
    assert caught.value.code == 2


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_progress_line_and_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Screen(), Screen()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    terminal = Terminal()
    terminal.progress("prefill", "prefill  [####] 3 rounds")
    terminal.progress("prefill", "prefill  [#####] too soon to be drawn")
    terminal.text("a\x1b[2Jb")
    assert out.getvalue() == "a\ufffd[2Jb"
    assert err.getvalue().startswith("\rprefill  [####] 3 rounds") and "too soon" not in err.getvalue()
    assert err.getvalue().endswith("\r")  # taken away before the text came
    quiet = Terminal(as_json=True)
    quiet.progress("prefill", "x")
    quiet.text("never")
    quiet.note("never")
    quiet.event("token", text="\x1b")
    assert "never" not in out.getvalue() + err.getvalue() and "\x1b" not in out.getvalue()


def test_text_of_a_model_cannot_steer_a_terminal() -> None:
    assert visible("a\x1b[2Jb\x07\x9b\u202e\n\té") == "a\ufffd[2Jb\ufffd\ufffd\ufffd\n\té"

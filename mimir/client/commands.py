"""The client commands: generate, chat, status, verify, provision. Each returns an exit code."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from mimir.attest.trail import shown
from mimir.client import attestation, document
from mimir.client import federation as federation_file
from mimir.client.attestation import Answer, Document
from mimir.client.connection import Connection, connect, plain_errors
from mimir.client.federation import Attestation, Federation, Party
from mimir.client.session import (
    Progress,
    Service,
    Session,
    bucket_for,
    connect_all,
    new_session,
    open_session,
    survey,
    terms_for,
)
from mimir.client.terminal import Terminal, amount, bar
from mimir.errors import AttestationError, BadInput, ClientError, ConfigError, MimirError
from mimir.manifest import COMPONENTS
from mimir.model.checkpoint import load_checkpoint
from mimir.model.tokenizer import Tokenizer
from mimir.net.identity import Identity
from mimir.net.messages import Sampler

CONTEXT_IDS = 32  # prompt tokens shown to the decoder, so that the answer's first piece is spaced right
MAX_PROMPT_FILE = 4 << 20
DEFAULT_MAX_NEW = 32


class Speaker:
    """Prints one answer as it comes and stops printing, not receiving, at its end."""

    def __init__(
        self,
        terminal: Terminal,
        tokenizer: Tokenizer,
        context: Sequence[int],
        stop: frozenset[int],
        limit: int,
    ) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.ended = ""  # "", "end of text" or "length"
        self.first_at: float | None = None
        self.last_at = 0.0
        self._terminal = terminal
        self._decoder = tokenizer.decoder(context)
        self._stop = stop
        self._limit = limit

    def hear(self, token: int) -> None:
        """Take the next token of the answer; what comes after the end is padding and is dropped."""
        if self.ended:
            return
        self.last_at = time.monotonic()
        if self.first_at is None:
            self.first_at = self.last_at
        if token in self._stop:
            self._finish("end of text")
            return
        self.ids.append(token)
        self._say(self._decoder.feed(token), token)
        if len(self.ids) == self._limit:
            self._finish("length")

    def _say(self, piece: str, token: int | None) -> None:
        self.text += piece
        self._terminal.text(piece)
        if token is not None:
            self._terminal.event("token", id=token, text=piece)

    def _finish(self, why: str) -> None:
        self._say(self._decoder.flush(), None)
        self.ended = why

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first."""
        if self.first_at is None or len(self.ids) < 2 or self.last_at <= self.first_at:
            return None
        return (len(self.ids) - 1) / (self.last_at - self.first_at)


# --- generate and chat -------------------------------------------------------------------------------------


def generate(options: argparse.Namespace) -> int:
    """One prompt, one answer."""
    return _run(options, _generate)


def chat(options: argparse.Namespace) -> int:
    """Turn after turn in one session, whose cache of shares stays at the parties."""
    return _run(options, _chat)


async def _generate(options: argparse.Namespace, terminal: Terminal) -> int:
    federation, identity = _load(options)
    async with _connect_all(terminal, federation, identity) as connections:
        service = await survey(connections, federation)
        model = service.model(options.model or federation.model)
        limit = options.max_new or min(DEFAULT_MAX_NEW, service.output_buckets[-1])
        tokenizer = _tokenizer(options, federation, service, model)
        clients = _clients(options, identity)
        part = clients.index(identity.public_hex)
        text = _prompt_text(options)
        # Only the first part begins the context, so only it gets the model's start token.
        ids = _ids(options.ids) if options.ids is not None else tokenizer.encode(text, begin=part == 0)
        if not ids:
            raise BadInput("the prompt is empty; give at least one token")
        if options.bucket:
            buckets = options.bucket
        elif len(clients) == 1:
            buckets = [bucket_for(len(ids), service.prompt_buckets, "the prompt")]
        else:
            raise BadInput("with several clients all must agree on the lengths: give --bucket B1,B2,...")
        if len(buckets) != len(clients):
            raise BadInput(f"--bucket names {len(buckets)} lengths for {len(clients)} clients")
        terms = terms_for(
            service,
            model,
            clients,
            buckets,
            limit,
            _sampler(options, service),
            session=_session_number(options, clients, terminal),
            deterministic=options.deterministic,
        )
        terminal.event(
            "session",
            session=terms.session.hex(),
            model=model,
            name=service.models[model].name,
            part=part,
            prompt_tokens=len(ids),
            buckets=list(terms.buckets),
            answer_bucket=terms.max_new,
            terms=terms.digest().hex(),
        )
        if options.echo:
            terminal.text(text)
        async with open_session(connections, service, terms, identity, _watch(terminal)) as session:
            stop = _stop(options, tokenizer, service, model)
            await _turn(terminal, session, tokenizer, ids, stop, limit, start=options.start)
    return 0


async def _chat(options: argparse.Namespace, terminal: Terminal) -> int:
    federation, identity = _load(options)
    async with _connect_all(terminal, federation, identity) as connections:
        service = await survey(connections, federation)
        model = service.model(options.model or federation.model)
        tokenizer = _tokenizer(options, federation, service, model)
        limit = options.max_new or min(DEFAULT_MAX_NEW, service.output_buckets[-1])
        answer = bucket_for(limit, service.output_buckets, "the answer")
        stop = _stop(options, tokenizer, service, model)
        name = service.models[model].name
        terminal.note(f"{name}: type a line, an empty one or Ctrl-D to leave. Nobody but you sees it.")
        line = await _line(terminal)
        if not line:
            return 0
        ids = tokenizer.encode(options.template.replace("{}", line), begin=True)
        bucket = bucket_for(len(ids), service.prompt_buckets, "the line")
        terms = terms_for(
            service,
            model,
            [identity.public_hex],
            [bucket],
            limit,
            _sampler(options, service),
            session=new_session(),
            deterministic=options.deterministic,
        )
        async with open_session(connections, service, terms, identity, _watch(terminal)) as session:
            await _turn(terminal, session, tokenizer, ids, stop, limit)
            while line := await _line(terminal):
                ids = tokenizer.encode(options.template.replace("{}", line), begin=False)
                bucket = bucket_for(len(ids), service.prompt_buckets, "the line")
                if bucket + answer > session.room:
                    terminal.note(f"The context is full: {session.room} positions left. Start anew to go on.")
                    break
                await _turn(terminal, session, tokenizer, ids, stop, limit, bucket=bucket, answer=answer)
    return 0


async def _turn(
    terminal: Terminal,
    session: Session,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    stop: frozenset[int],
    limit: int,
    *,
    bucket: int | None = None,
    answer: int | None = None,
    start: int | None = None,
) -> None:
    """One prompt and its answer, printed as it comes."""
    began = time.monotonic()
    buckets = None if bucket is None else [bucket]
    await session.prompt(ids, buckets=buckets, max_new=answer, start=start)
    speaker = Speaker(terminal, tokenizer, ids[-CONTEXT_IDS:], stop, limit)
    while (token := await session.token()) is not None:
        speaker.hear(token)
    seconds = time.monotonic() - began
    wait = None if speaker.first_at is None else speaker.first_at - began
    if not speaker.text.endswith("\n"):
        terminal.text("\n")
    terminal.event(
        "done",
        text=speaker.text,
        ids=speaker.ids,
        ended=speaker.ended,
        seconds=round(seconds, 3),
        first_token_seconds=None if wait is None else round(wait, 3),
        tokens_per_second=None if speaker.rate is None else round(speaker.rate, 3),
        stats=session.stats,
    )
    rate = "" if speaker.rate is None else f", then {speaker.rate:.2f} tokens/s"
    first = "" if wait is None else f"; first after {wait:.1f} s{rate}"
    terminal.note(f"[{len(speaker.ids)} tokens, ended by {speaker.ended or 'the bucket'}{first}]")


def _watch(terminal: Terminal) -> Any:
    """Show party 0's account of the work; JSON gets all three."""

    def watch(progress: Progress) -> None:
        terminal.event(
            "progress",
            party=progress.party,
            phase=progress.phase,
            done=progress.done,
            total=progress.total,
            rounds=progress.rounds,
            sent=progress.sent,
            seconds=round(progress.seconds, 3),
        )
        if progress.party == 0:
            terminal.progress(
                progress.phase,
                f"{progress.phase:13} {bar(progress.done, progress.total)} {progress.rounds} rounds, "
                f"{amount(progress.sent)} per party, {progress.seconds:.1f} s",
            )

    return watch


async def _line(terminal: Terminal) -> str:
    """The next line of input without its newline; empty at the end."""
    if sys.stdin.isatty() and not terminal.as_json:
        sys.stderr.write("> ")
        sys.stderr.flush()
    # Abandoned on Ctrl-C: the thread then waits for a line that nobody will use, until the program ends.
    line: str = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
    return line.rstrip("\n")


# --- status ------------------------------------------------------------------------------------------------


def status(options: argparse.Namespace) -> int:
    """What each party says of itself; exit code 8 if one does not answer."""
    return _run(options, _status)


async def _status(options: argparse.Namespace, terminal: Terminal) -> int:
    federation, identity = _load(options)
    settings = federation.attestation
    basis = attestation.read_basis(settings) if settings.policy is not None else None
    revocations = federation.revocations()
    tls = federation.client_tls(identity, revocations)
    answers: list[dict[str, Any] | MimirError] = []
    proofs: list[Answer] = [
        Answer(bytes(32), bytes(32), attestation.utc_now(), None, "no answer") for _ in federation.parties
    ]

    async def ask(index: int, party: Party) -> None:
        deadlines = federation.deadlines
        try:
            with plain_errors():
                async with connect(
                    party,
                    identity,
                    within=deadlines.connect,
                    silence=deadlines.connect,
                    tls=tls,
                    unadmitted=True,
                ) as connection:
                    await connection.send({"t": "status"})
                    answers[index] = (await connection.receive("status"))["status"]
                    if basis is not None:
                        proofs[index] = await attestation.ask(connection)
        except MimirError as error:
            answers[index] = error

    answers = [ClientError("not asked")] * len(federation.parties)
    async with trio.open_nursery() as nursery:
        for index, party in enumerate(federation.parties):
            nursery.start_soon(ask, index, party)
    proved = None
    if basis is not None:
        now = attestation.utc_now()
        proved = attestation.judge(proofs, federation.parties, identity.public_hex, basis, now, revocations)
    good = True
    for party, answer in zip(federation.parties, answers, strict=True):
        if isinstance(answer, MimirError):
            good = False
            terminal.event("status", party=party.name, error=str(answer))
            terminal.text(f"{party.name}: {answer}\n")
            continue
        terminal.event("status", party=party.name, status=answer)
        terminal.text(f"{party.name} (party {answer.get('party')}, {party.address}): up\n")
        tunnel = answer.get("tunnel")
        notice = "  (the links between the parties are NOT protected)" if tunnel == "none" else ""
        terminal.text(f"  version {answer.get('version')}, terms {str(answer.get('terms'))[:16]}, ")
        terminal.text(f"tunnel {tunnel}{notice}\n")
        models = answer.get("models")
        for digest, model in models.items() if isinstance(models, dict) else ():
            terminal.text(f"  model {model.get('name')}  {digest[:16]}\n")
        for line in _trust_lines(answer):
            terminal.text(f"  {line}\n")
        details = answer.get("service")
        for name, value in details.items() if isinstance(details, dict) else ():
            if name == "admission":
                for line in document.admission_lines(value):
                    terminal.text(f"  {line}\n")
                continue
            if name == "tunnel" and isinstance(value, list):
                for entry in value:
                    terminal.text(f"  tunnel to {_tunnel_line(entry)}\n")
                continue
            if name == "boot" and isinstance(value, list):
                for entry in sorted(value, key=_began):
                    terminal.text(f"  boot: {_boot_line(entry)}\n")
                continue
            if name == "peers" and isinstance(value, dict):
                value = ", ".join(f"party {p} {'up' if up is True else 'AWAY'}" for p, up in value.items())
            if name == "storage" and isinstance(value, dict):
                value = ", ".join(f"{str(key).replace('_', ' ')} {each}" for key, each in value.items())
            terminal.text(f"  {name}: {shown(str(value))}\n")
    if good:
        agreed = {answer.get("terms") for answer in answers if isinstance(answer, dict)}
        if len(agreed) != 1:
            terminal.note("The parties' shared terms differ: compare their configuration files.")
            return ClientError.exit_code
    if not good:
        return ClientError.exit_code
    if proved is None:
        _by_key_alone(terminal)
    else:
        _believed(terminal, proved, settings.required)
        if settings.required:
            proved.require()
    return 0


def _trust_lines(answer: dict[str, Any]) -> list[str]:
    """What a party says of its certificate and of what is revoked; nothing in it is trusted."""
    lines = []
    shown, known = answer.get("tls"), answer.get("revocations")
    if isinstance(shown, dict):
        grounds = shown.get("grounds")
        if isinstance(grounds, dict):
            simulated = ", SIMULATED" if grounds.get("simulated") is not False else ""
            by = f"by {str(shown.get('issuer'))[:16]} for {grounds.get('kind')}{simulated}"
        else:
            by = "by itself: no peer has admitted it"
        until = str(shown.get("not_after")).replace("+00:00", "Z")
        lines.append(f"certificate {by}, until {until}")
    if isinstance(known, dict):
        lines.append(f"revocations of epoch {known.get('epoch')}")
        if known.get("forks"):
            lines.append("THE OWNERS SIGNED TWO STATEMENTS OF ONE EPOCH")
    return lines


def _began(entry: object) -> float:
    began = entry.get("began") if isinstance(entry, dict) else None
    return float(began) if isinstance(began, int | float) else 0.0


def _boot_line(entry: object) -> str:
    """One step of a party's start, as it reports it; nothing in it is trusted."""
    if not isinstance(entry, dict):
        return str(entry)
    began, seconds = entry.get("began"), entry.get("seconds")
    when = f" at {began:.2f} s" if isinstance(began, int | float) else ""
    took = f", {seconds:.2f} s" if isinstance(seconds, int | float) else ""
    note = f" ({entry['note']})" if entry.get("note") else ""
    return f"{entry.get('step')!s:8} {entry.get('state')}{when}{took}{note}"


def _tunnel_line(entry: object) -> str:
    """One tunnel of a party, as it reports it; nothing in it is trusted."""
    if not isinstance(entry, dict):
        return str(entry)
    age = entry.get("epoch_age")
    since = f" for {age:.0f} s" if isinstance(age, int | float) else ""
    epoch, rotation, keys = entry.get("epoch"), entry.get("rotation"), ""
    if epoch is not None:
        keys = f", keys of epoch {epoch}{since}, {rotation}"
    elif rotation not in (None, "none", entry.get("state")):
        keys = f", first keys, {rotation}"
    return (
        f"party {entry.get('party')}: {entry.get('state')}{keys}, "
        f"{entry.get('received')} bytes in, {entry.get('sent')} out"
    )


# --- verify ------------------------------------------------------------------------------------------------


def verify(options: argparse.Namespace) -> int:
    """Have the three parties prove what they run; 0, or 10 if anything does not hold."""
    return _run(options, _verify)


async def _verify(options: argparse.Namespace, terminal: Terminal) -> int:
    federation = federation_file.load(options.federation)
    settings = _overridden(options, federation)
    if options.offline is not None:
        if not settings.owners:
            raise BadInput(f"{federation.source}: attestation.owners: missing; or give --owners")
        found = attestation.judge_saved(
            options.offline,
            federation.parties,
            settings.owners,
            settings.threshold,
            options.at,
            federation.revocations(),
        )
        return _print_document(terminal, found, offline=True)
    if settings.policy is None:
        raise ConfigError(
            f"{federation.source}: attestation.policy: missing; write the table, or give --policy, --owners"
        )
    identity = Identity.load(options.key or federation.client_key)
    first = True
    while True:
        basis = attestation.read_basis(settings)
        revocations = federation.revocations()
        answers = await attestation.question(federation, identity, revocations)
        now = attestation.utc_now()
        found = attestation.judge(answers, federation.parties, identity.public_hex, basis, now, revocations)
        if options.save is not None:
            attestation.save(options.save, found, answers, basis, now)
        if first or found.refusal is not None or options.json:
            code = _print_document(terminal, found)
        else:
            terminal.text(f"{found.plain['time']} {document.verdict_line(found.plain)}\n")
        if options.watch is None or found.refusal is not None:
            return code
        first = False
        await trio.sleep(options.watch)


def _overridden(options: argparse.Namespace, federation: Federation) -> Attestation:
    """The table [attestation], as flags change it."""
    given = {
        "policy": options.policy and Path(options.policy).absolute(),
        "owners": options.owners and tuple(options.owners),
        "threshold": options.threshold,
        "collateral": options.collateral and Path(options.collateral).absolute(),
    }
    settings = replace(federation.attestation, **{name: value for name, value in given.items() if value})
    flaw = settings.flaw()
    if flaw is not None and (options.offline is None or settings.policy is not None):
        raise BadInput(f"attestation.{flaw} (a flag, or the table in {federation.source})")
    return settings


def _print_document(terminal: Terminal, found: Document, *, offline: bool = False) -> int:
    terminal.event("verification", offline=offline, **found.plain)
    document.show(terminal, found.plain, offline=offline)
    return 0 if found.refusal is None else AttestationError.exit_code


# --- provision ---------------------------------------------------------------------------------------------


def provision(options: argparse.Namespace) -> int:
    """Share a model directory with the three parties."""
    return _run(options, _provision)


async def _provision(options: argparse.Namespace, terminal: Terminal) -> int:
    from mimir.client import provision as sharing  # needs the kernels, which other commands do not

    federation, identity = _load(options)
    plan = await trio.to_thread.run_sync(load_checkpoint, options.directory)
    name = options.name or Path(options.directory).resolve().name

    def watch(advance: sharing.Advance) -> None:
        # Called from a worker thread while hashing; it only draws.
        terminal.event("progress", phase=advance.phase, done=advance.done, total=advance.total)
        terminal.progress(
            advance.phase, f"{advance.phase:8} {bar(advance.done, advance.total)} of {advance.total} weights"
        )

    async with _connect_all(terminal, federation, identity) as connections:
        service = await survey(connections, federation)
    state = Path(options.state) if options.state else federation.client_key.parent
    key = await trio.to_thread.run_sync(sharing.seed_name, plan, service.scale_bits, federation.identities)
    seeds = sharing.Seeds(state / f"provision-{key}.seeds")
    share = sharing.Sharing(plan, service.scale_bits, seeds.take())
    if seeds.resumed:
        terminal.note("Going on with the upload that was cut off.")
    manifest = await trio.to_thread.run_sync(share.manifest, name, federation.identities, watch)
    stored = [manifest.stored(party) for party in range(COMPONENTS)]
    terminal.event("manifest", model=manifest.digest(), name=name, bytes_by_party=stored)
    # Connected afresh: hashing a large model takes longer than a party waits for a silent owner.
    async with _connect_all(terminal, federation, identity, again=True) as connections:
        digest = await sharing.provision(connections, share, manifest, watch)
    seeds.forget()
    terminal.clear()
    terminal.event("provisioned", model=digest, name=name)
    terminal.text(f"{name} {digest}\n")
    terminal.note(f"All three parties hold {name}: {amount(max(stored))} each at most.")
    return 0


# --- what the commands share -------------------------------------------------------------------------------


def _run(options: argparse.Namespace, command: Any) -> int:
    terminal = Terminal(options.json, getattr(options, "progress", None))
    try:
        code: int = trio.run(command, options, terminal)
        return code
    finally:
        terminal.clear()


def _load(options: argparse.Namespace) -> tuple[Federation, Identity]:
    federation = federation_file.load(options.federation)
    return federation, Identity.load(options.key or federation.client_key)


def _connect_all(
    terminal: Terminal, federation: Federation, identity: Identity, again: bool = False
) -> AbstractAsyncContextManager[list[Connection]]:
    """Connections to parties who are who they should be, saying how that is known. `again`: said before."""
    if federation.attestation.policy is None and not again:
        _by_key_alone(terminal)
    required = federation.attestation.required

    def seen(found: Document) -> None:
        if not again:
            _believed(terminal, found, required)

    return connect_all(federation, identity, seen)


def _by_key_alone(terminal: Terminal) -> None:
    terminal.note(
        "The parties are believed by their keys alone: without [attestation] in the federation file nothing "
        "is known of what they run."
    )


def _believed(terminal: Terminal, found: Document, required: bool) -> None:
    """Say in a line what the parties' evidence came to; where it must hold, a refusal says so itself."""
    plain = found.plain
    policy = {name: plain["policy"][name] for name in ("name", "version", "digest")}
    terminal.event(
        "attestation",
        verdict=plain["verdict"],
        failed=plain["failed"],
        simulated=plain["simulated"],
        policy=policy,
    )
    if found.refusal is None:
        terminal.note(document.verdict_line(plain))
    elif not required:
        terminal.note(document.verdict_line(plain))
        terminal.note("Going on all the same: attestation.required = false in the federation file.")


def _tokenizer(
    options: argparse.Namespace, federation: Federation, service: Service, model: str
) -> Tokenizer:
    directory = options.tokenizer or federation.tokenizer
    if directory is None:
        raise BadInput(
            f"{federation.source}: no tokenizer named; give --tokenizer DIR or set `tokenizer` to the "
            "model's directory (only its tokenizer files are read)"
        )
    return Tokenizer.load(directory, service.models[model].spec.vocab)


def _stop(options: argparse.Namespace, tokenizer: Tokenizer, service: Service, model: str) -> frozenset[int]:
    if options.ignore_end:
        return frozenset()
    return frozenset(service.models[model].spec.eos_ids or tokenizer.eos_ids)


def _clients(options: argparse.Namespace, identity: Identity) -> list[str]:
    clients = options.clients or [identity.public_hex]
    if identity.public_hex not in clients:
        raise BadInput(f"--clients does not name our own key {identity.public_hex}")
    if options.part is not None and clients.index(identity.public_hex) != options.part:
        raise BadInput(f"--part {options.part}, but our key is number {clients.index(identity.public_hex)}")
    return list(clients)


def _session_number(options: argparse.Namespace, clients: Sequence[str], terminal: Terminal) -> bytes:
    if options.join is not None:
        return bytes(options.join)
    session = new_session()
    if len(clients) > 1:
        terminal.note(f"The other clients join with the same options and --join {session.hex()}")
    return session


def _sampler(options: argparse.Namespace, service: Service) -> Sampler:
    if not options.sample:
        return Sampler("greedy", 1.0, 1)
    return Sampler("sample", options.temperature, service.topk if options.top_k is None else options.top_k)


def _prompt_text(options: argparse.Namespace) -> str:
    if options.ids is not None:
        return ""
    if options.prompt is not None and options.prompt_file is not None:
        raise BadInput("give the prompt as an argument or by --prompt-file, not both")
    if options.prompt is not None:
        return str(options.prompt)
    if options.prompt_file is None and sys.stdin.isatty():
        raise BadInput("no prompt: give it as an argument, by --prompt-file, or on standard input")
    source = options.prompt_file or "-"
    try:
        with open(0 if source == "-" else source, "rb", closefd=source != "-") as file:
            raw = file.read(MAX_PROMPT_FILE + 1)
        if len(raw) > MAX_PROMPT_FILE:
            raise BadInput(f"{source}: longer than {MAX_PROMPT_FILE} bytes")
        return raw.decode()
    except OSError as error:
        raise BadInput(f"{source}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{source}: not UTF-8 text") from None


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise BadInput("--ids takes token numbers separated by commas") from None

"""The command line: parse and call."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimir import __version__
from mimir.errors import AttestationError, BadInput, LocalError, MimirError

if TYPE_CHECKING:
    from mimir.secret import StorageKey

INTERRUPTED = 130  # 128 + SIGINT, as shells count

EXIT_CODES = """\
exit codes:
  0    done
  1    another error
  2    bad input: a flag, a prompt or a file that cannot be used, or a party refused the request
  3    a configuration file cannot be used; the message names the file and the key
  4    a checkpoint, or shares on disk, cannot be used; the message names the tensor
  5    this host lacks something; `mimir doctor` says what and how to get it
  6    a peer was silent, broke the protocol, or is not who it should be
  7    the session was aborted; nothing more was delivered
  8    a client could not get an answer that it may trust
  9    the tunnel between the parties cannot be raised or kept
  10   evidence, a policy or a revocation does not hold; the message names the step, expected and got
  70   a bug of ours
  130  interrupted (Ctrl-C)
"""

DESCRIPTION = """\
Language-model inference between three parties who do not trust one another: nobody sees the prompt, the
weights, the cache or the activations. The parties run `mimir-peer`; model owners and clients use `mimir`.
"""

EXAMPLES = """\
examples:
  mimir keygen --out client.key                         a key; its public half goes into the parties' files
  mimir-peer run --config party0.toml                   one of the three parties
  mimir provision model/ --federation federation.toml   share a checkpoint with the three
  mimir generate "Once upon a time" --federation federation.toml
  mimir chat --federation federation.toml
  mimir verify --federation federation.toml             what runs at the other end, before you type a word
  mimir cost --model model/ --context 128               what it will take, before anything runs
  mimir doctor                                          what this host lacks to be a party
  mimir attester enroll --config party0.toml            the policy entry that admits this machine

`mimir COMMAND --help` says more.

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """`mimir`: every command. Returns the exit code."""
    return _call(_parser("mimir").parse_args(arguments))


def peer_main(arguments: Sequence[str] | None = None) -> int:
    """`mimir-peer`: the command that runs a party, alone."""
    return _call(_parser("mimir-peer").parse_args(arguments))


def _call(options: argparse.Namespace) -> int:
    try:
        code: int = options.call(options)
        return code
    except BaseException as error:
        try:
            return _report(error, getattr(options, "json", False))
        except BrokenPipeError as closed:  # by who was to read what went wrong
            return _report(closed, False)


def _report(error: BaseException, as_json: bool) -> int:
    """Print an error in one line, with `--json` as an object, or a bug with its traceback; return the exit
    code.
    """
    if isinstance(error, BaseExceptionGroup) and error.subgroup(KeyboardInterrupt):
        error = KeyboardInterrupt()  # whatever else went wrong then is a consequence
    while isinstance(error, BaseExceptionGroup):
        error = next((each for each in error.exceptions if _known(each)), error.exceptions[0])
    if isinstance(error, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `mimir generate ... | head` closed our output
        sys.stderr.close()
        return 1
    if not isinstance(error, Exception):
        raise error
    if not _known(error):
        traceback.print_exception(error)
        return LocalError.exit_code
    code = int(error.exit_code)  # type: ignore[attr-defined]
    if as_json:
        from mimir.client.terminal import Terminal

        told = {"code": code, "kind": type(error).__name__, "message": str(error)}
        if isinstance(error, AttestationError):
            told |= {"step": error.step, "expected": error.expected, "got": error.got}
        Terminal(as_json).event("error", **told)
    else:
        print(f"mimir: {error}", file=sys.stderr)
    return code


def _known(error: BaseException) -> bool:
    """Whether this is one of our errors, or of the tunnel's, which keep the same exit codes."""
    return isinstance(error, MimirError) or (isinstance(error, Exception) and hasattr(error, "exit_code"))


# --- commands ----------------------------------------------------------------------------------------------
# What a command needs is imported by it: `mimir --help` and `mimir doctor` work where parts are missing.


def _run(options: argparse.Namespace) -> int:
    from mimir import config
    from mimir.party import check, run

    settings = config.load(options.config)
    return check(settings) if options.check else run(settings)


def _keygen(options: argparse.Namespace) -> int:
    if options.kind == "storage":
        return _storage_key(options)
    if options.out is None or (options.sealed_by and options.kind == "tunnel"):
        raise BadInput("--out is needed; --sealed-by is for identity and storage keys")
    out = Path(options.out)
    if options.kind == "tunnel":
        from wg import keys

        private = keys.generate()
        public = private.public().base64()
        keys.save_private(out, private)
        private.wipe()
    else:
        from mimir.net.identity import Identity

        identity = Identity.generate()
        if options.sealed_by:
            if out.exists():
                raise BadInput(f"identity {out}: exists already; move it away first if it may go")
            identity.seal(out, _storage(options.sealed_by))
        else:
            identity.save(out)
        public = identity.public_hex
    print(public)
    how = f"encrypted under the storage key of {options.sealed_by}" if options.sealed_by else "mode 0600"
    print(f"Private key in {out}, {how}; it cannot be had back if lost. Public key above.", file=sys.stderr)
    return 0


def _storage_key(options: argparse.Namespace) -> int:
    import trio

    from mimir import config, keys
    from mimir.keys.file import save
    from mimir.secret import StorageKey

    if options.sealed_by and not options.out:
        settings, attester = config.load_keys(options.sealed_by)
        source = keys.open_source(settings, attester)
        trio.run(source.create)
        print(f"Storage key made: {source.protection}.", file=sys.stderr)
    elif options.out and not options.sealed_by:
        save(Path(options.out), StorageKey.random())
        print(f"Storage key in {options.out}, mode 0600, in the clear: for development.", file=sys.stderr)
    else:
        raise BadInput("a storage key needs --out FILE (development), or --sealed-by FILE, and not both")
    return 0


def _storage(path: str) -> StorageKey:
    import trio

    from mimir import config, keys

    settings, attester = config.load_keys(path)
    return trio.run(keys.open_source(settings, attester).obtain)


def _seal(options: argparse.Namespace) -> int:
    from mimir import config
    from mimir.net.identity import Identity, is_sealed

    path = config.load(options.config).identity_key
    if is_sealed(path):
        raise BadInput(f"identity {path}: encrypted already")
    identity = Identity.load(path)
    identity.seal(path, _storage(options.config))
    print(identity.public_hex)
    print(
        f"{path} is encrypted now. What it was may still be on the disk: where that matters, make another.",
        file=sys.stderr,
    )
    return 0


def _show_key(options: argparse.Namespace) -> int:
    if options.kind == "tunnel":
        from wg import keys

        private = keys.load_private(options.file)
        print(private.public().base64())
        private.wipe()
    else:
        from mimir.net.identity import Identity

        print(Identity.load(options.file).public_hex)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from mimir.doctor import report

    return report(options.config, options.role, options.json)


def _cost(options: argparse.Namespace) -> int:
    from mimir.cost import command

    return command(options)


def _broker_run(options: argparse.Namespace) -> int:
    import os
    import resource

    from mimir.keys import broker
    from mimir.party import start_log

    settings = broker.load(options.config)
    start_log(settings.log)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    return broker.run(settings)


def _broker_split(options: argparse.Namespace) -> int:
    from mimir.keys import broker, file, release, shamir
    from mimir.secret import StorageKey

    if len(dict(options.broker)) != len(options.broker):
        raise BadInput("--broker: two brokers have the same name")
    if not options.threshold <= len(options.broker) <= shamir.MAX_SHARES:
        raise BadInput(f"--threshold {options.threshold} of {len(options.broker)} brokers cannot be")
    with file.load(Path(options.key)) if options.key else StorageKey.random() as key:
        split, shares = release.deal(key, options.threshold, dict(options.broker))
    for path in broker.write_split(split, shares, Path(options.out)):
        print(path)
    for share in shares.values():
        share.wipe()
    print(
        f"storage.toml goes to the party, as keys.file, and to every broker; each share to its broker alone, "
        f"which alone can open it. Any {options.threshold} of them give the key.",
        file=sys.stderr,
    )
    return 0


def _policy(name: str) -> Any:
    def call(options: argparse.Namespace) -> int:
        from mimir import policy
        from mimir.attest.collateral import https_get
        from mimir.client.terminal import Terminal

        options.get = https_get
        return int(getattr(policy, name)(options, Terminal(options.json)))

    return call


def _attester(name: str) -> Any:
    def call(options: argparse.Namespace) -> int:
        from mimir import attester
        from mimir.client.terminal import Terminal

        return int(getattr(attester, name)(options, Terminal(options.json)))

    return call


def _revoke(name: str) -> Any:
    def call(options: argparse.Namespace) -> int:
        from mimir import revoke

        return int(getattr(revoke, name)(options))

    return call


def _client(name: str) -> Any:
    def call(options: argparse.Namespace) -> int:
        from mimir.client import commands

        return int(getattr(commands, name)(options))

    return call


# --- options -----------------------------------------------------------------------------------------------


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=DESCRIPTION,
        epilog=EXAMPLES + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"Mimir {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, call: Any, text: str, more: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\n{more}".rstrip(),
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if call is not None:
            command.set_defaults(call=call)
        return command

    run = add(
        "run",
        _run,
        "run one party until it is stopped",
        "Raises the tunnel, joins the two peers, and serves clients and owners. SIGTERM and Ctrl-C stop it\n"
        "cleanly. configs/three.toml is a commented example of the file.\n\n"
        "examples:\n  mimir-peer run --config party0.toml --check\n  mimir-peer run --config party0.toml",
    )
    run.add_argument("--config", required=True, metavar="FILE", help="this party's TOML file")
    run.add_argument(
        "--check",
        action="store_true",
        help="read the file and the keys it names, say what they mean, and stop",
    )
    if program == "mimir-peer":
        return parser

    keygen = add(
        "keygen",
        _keygen,
        "make a key pair and print its public half",
        "An identity key says who a party, a client or a model owner is; a tunnel key is for WireGuard; a\n"
        "storage key is what a party's disk is encrypted under. A private half is written to a new file of\n"
        "mode 0600, or, with --sealed-by, as the [keys] of a party's file say.\n\n"
        "examples:\n  mimir keygen --out identity.key\n  mimir keygen --kind tunnel --out tunnel.key\n"
        "  mimir keygen --kind storage --sealed-by party0.toml\n"
        "  mimir keygen --sealed-by party0.toml --out identity.key",
    )
    keygen.add_argument("--out", metavar="FILE", help="file to make; never overwritten")
    keygen.add_argument(
        "--kind", choices=("identity", "tunnel", "storage"), default="identity", help="default: identity"
    )
    keygen.add_argument("--sealed-by", metavar="FILE", help="a party's or a broker's file, for its [keys]")

    seal = add("seal", _seal, "encrypt a party's identity file under its storage key, in place")
    seal.add_argument("--config", required=True, metavar="FILE", help="this party's TOML file")

    pubkey = add("pubkey", _show_key, "print the public half of a key file")
    pubkey.add_argument("file", metavar="FILE", help="made by `mimir keygen`")
    pubkey.add_argument(
        "--kind", choices=("identity", "tunnel"), default="identity", help="default: identity"
    )

    provision = add(
        "provision",
        _client("provision"),
        "share a model with the three parties",
        "Reads a Hugging Face directory (Llama or GPT-2 family), splits every weight into three random\n"
        "components, and sends each party the two that it holds. None of them can tell a weight. The\n"
        "parties compare what they got before they store it. Run again after an interruption: it goes on\n"
        "where it stopped. Prints the model's name and digest.\n\n"
        "example:\n  mimir provision stories15M/ --federation owner.toml --name stories",
    )
    provision.add_argument(
        "directory", metavar="DIR", help="config.json, model.safetensors and tokenizer files"
    )
    provision.add_argument("--name", help="what clients call the model (default: the directory's name)")
    provision.add_argument(
        "--state", metavar="DIR", help="where seeds wait while an upload runs (default: beside the key)"
    )
    _client_options(provision)

    generate = add(
        "generate",
        _client("generate"),
        "continue a prompt",
        "The prompt is masked here; the parties never see it, nor the answer. Its length is padded to a\n"
        "public bucket, and the protocol always runs to the end of the answer's bucket.\n\n"
        "examples:\n"
        '  mimir generate "Once upon a time" --federation f.toml --max-new 32\n'
        "  echo 'Once upon' | mimir generate --federation f.toml --json\n"
        '  mimir generate "Tell me" --federation f.toml --sample --temperature 0.8 --top-k 20\n\n'
        "Several clients can each own a part of one prompt; all get the answer, none sees another's part.\n"
        "The first one prints the SESSION that the others join:\n"
        '  mimir generate "The plan is" --federation a.toml --clients KEY_A,KEY_B --bucket 16,16\n'
        '  mimir generate " to wait" --federation b.toml --clients KEY_A,KEY_B --bucket 16,16 --join SESSION',
    )
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="default: standard input")
    generate.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file")
    generate.add_argument("--ids", metavar="N,N,...", help="give token numbers instead of text")
    generate.add_argument("--echo", action="store_true", help="print the prompt before the answer")
    generate.add_argument(
        "--join", type=_session, metavar="SESSION", help="the session of several clients, 32 hex digits"
    )
    generate.add_argument(
        "--clients", type=_keys, metavar="KEY,KEY", help="public keys of all clients, in prompt order"
    )
    generate.add_argument("--part", type=int, metavar="N", help="which of them we are, from 0 (checked)")
    generate.add_argument("--bucket", type=_lengths, metavar="B,B", help="padded lengths of the prompt parts")
    generate.add_argument(
        "--start",
        type=int,
        metavar="N",
        help="position of our first token (default: after the padded parts before it)",
    )
    _answer_options(generate)
    _client_options(generate)

    chat = add(
        "chat",
        _client("chat"),
        "talk with a model, turn after turn",
        "One session: its cache stays at the parties, as shares. Lines are sent as they are, or put into\n"
        "--template where it says {}.\n\n"
        "example:\n  mimir chat --federation f.toml --template 'Q: {}\\nA:'",
    )
    chat.add_argument("--template", type=_template, default="{}", help="text around each line (default: {})")
    _answer_options(chat)
    _client_options(chat)

    verify = add(
        "verify",
        _client("verify"),
        "have the three parties prove what they run",
        "Each party attests itself for a nonce of ours, on this connection. Its evidence is judged by our\n"
        "own policy and held against what its peers say of it. Prints the verification document. Sends\n"
        "nothing of a prompt. With --watch it goes on until something does not hold.\n\n"
        "examples:\n"
        "  mimir verify --federation f.toml --save today.json\n"
        "  mimir verify --federation f.toml --offline today.json",
    )
    verify.add_argument("--policy", metavar="FILE", help="judge by this one, signatures in FILE.sig")
    verify.add_argument("--owners", type=_keys, metavar="KEY,KEY", help="public keys that may sign it")
    verify.add_argument("--threshold", type=_positive, metavar="K", help="how many of them must have")
    verify.add_argument("--collateral", metavar="DIR", help="filled by `mimir policy fetch`")
    verify.add_argument("--save", metavar="FILE", help="keep the document, and all that it was judged from")
    verify.add_argument("--watch", type=_positive, metavar="SECONDS", help="ask again and again")
    verify.add_argument(
        "--offline",
        metavar="FILE",
        help="judge a saved document again, by our identities and owners; its nonces are as recorded",
    )
    verify.add_argument(
        "--at", type=_moment, metavar="TIME", help="with --offline: as of then (default: when it was made)"
    )
    _client_options(verify)

    status = add("status", _client("status"), "ask the three parties how they are")
    _client_options(status)

    cost = add(
        "cost",
        _cost,
        "say what a model will cost, before anything runs",
        "Rounds, bytes, memory and seconds of a prompt and of a decoded token, for one party. Rounds and\n"
        "bytes are exact; seconds are a model of this machine, which is measured for twenty seconds, and\n"
        "of the link that is named. A directory with nothing but config.json is enough.\n\n"
        "examples:\n"
        "  mimir cost --model gpt2/ --context 128\n"
        "  mimir cost --model gpt2/ --context 128 --rtt 20 --rate 100 --rates rates.json --json",
    )
    cost.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face directory")
    cost.add_argument(
        "--context", type=_positive, default=128, metavar="N", help="longest session (default: 128)"
    )
    cost.add_argument(
        "--prompt-bucket", type=_positive, default=16, metavar="B", help="padded prompt (default: 16)"
    )
    cost.add_argument(
        "--memory",
        type=_positive,
        metavar="MIB",
        help="triple_pool.memory_mib (default: that of a party's file)",
    )
    cost.add_argument(
        "--round-trip",
        type=_round_trip,
        metavar="MS",
        help="scheduler.round_trip_ms (default: that of a party's file)",
    )
    cost.add_argument(
        "--keep-mib",
        type=_not_negative,
        default=4096,
        metavar="MIB",
        help="keys.keep_mib: of shares in memory (default: 4096)",
    )
    cost.add_argument("--rtt", type=float, default=0.0, metavar="MS", help="there and back (default: 0)")
    cost.add_argument("--rate", type=float, metavar="MBIT", help="of a link each way (default: no limit)")
    cost.add_argument(
        "--parties-here",
        type=_positive,
        default=1,
        metavar="N",
        help="parties that share this machine's cores (default: 1)",
    )
    cost.add_argument(
        "--rates", metavar="FILE", help="the machine's rates; measured and kept there if it is absent"
    )
    cost.add_argument("--json", action="store_true", help="one JSON object")

    doctor = add(
        "doctor",
        _doctor,
        "say what this host lacks, and how to get it",
        "Exit code 5 if something that is needed is missing; what would merely be better is said too.",
    )
    doctor.add_argument("--config", metavar="FILE", help="check also what this party's file needs")
    doctor.add_argument("--role", choices=("party", "client"), default="party", help="default: party")
    doctor.add_argument("--json", action="store_true", help="one JSON object")

    policy = add(
        "policy",
        None,
        "say by which evidence peers are admitted",
        "A TOML file that owners sign. Empty, it admits nobody. configs/policy.toml has every key.",
    )
    _policy_commands(policy)

    broker = add(
        "broker",
        None,
        "hold a share of a party's storage key, or split one",
        "A broker gives its share to machines whose evidence its own policy admits; t of n shares make the\n"
        "key. configs/broker.toml has every key of a broker's file.",
    )
    actions = broker.add_subparsers(metavar="ACTION", required=True)
    serve = actions.add_parser("run", help="run one broker until it is stopped")
    serve.add_argument("--config", required=True, metavar="FILE", help="this broker's TOML file")
    serve.set_defaults(call=_broker_run)
    split = actions.add_parser(
        "split",
        help="make a storage key and split it among brokers",
        description="Make a storage key, or take one, and write the public description and each broker's\n"
        "share, sealed to its identity.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    split.add_argument(
        "--threshold", type=_positive, required=True, metavar="T", help="shares that are needed"
    )
    split.add_argument(
        "--broker",
        type=_broker,
        action="append",
        required=True,
        metavar="NAME=HOST:PORT=KEY",
        help="a broker, where it listens, and its identity; repeat for each",
    )
    split.add_argument("--out", required=True, metavar="DIR", help="where to write; nothing is overwritten")
    split.add_argument("--key", metavar="FILE", help="split this storage key instead of a fresh one")
    split.set_defaults(call=_broker_split)

    attester = add(
        "attester",
        None,
        "say what evidence this machine gives",
        "Run it on the machine that a party will run on. A software TPM (kind swtpm) is a simulation.",
    )
    _attester_commands(attester)

    revoke = add(
        "revoke",
        _revoke("run"),
        "revoke parties, clients, certificates, measurements or tunnel keys",
        "Extends a statement that lists all that is revoked, signs it as one of the owners, and tells the\n"
        "parties, who drop what it names within seconds and tell each other. Owners sign one after another\n"
        "and pass the file on. Nothing is ever taken back: who was revoked comes back under new keys.\n\n"
        "examples:\n"
        "  mimir revoke --peer beta --statement revoked.toml --key owner1.key --federation f.toml\n"
        "  mimir revoke --statement revoked.toml --key owner2.key               then the next owner\n"
        "  mimir revoke --statement revoked.toml --push --federation f.toml\n"
        "  mimir revoke --statement revoked.toml --fetch --federation f.toml    what they hold",
    )
    for option, metavar, text in (
        ("--peer", "NAME_OR_KEY", "a party, by its name in the federation file or its identity key"),
        ("--client", "KEY", "a client, or an owner of models, by its identity key"),
        ("--certificate", "HEX", "SHA-256 of a certificate"),
        ("--measurement", "HEX", "of a machine, as `mimir policy explain` prints it"),
        ("--tunnel", "HEX", "a WireGuard public key"),
    ):
        revoke.add_argument(option, action="append", default=[], metavar=metavar, help=f"{text}; repeatable")
    revoke.add_argument(
        "--statement", required=True, metavar="FILE", help="made if it is not there, else extended"
    )
    revoke.add_argument("--key", metavar="FILE", help="sign as this owner (`mimir keygen`)")
    revoke.add_argument(
        "--federation",
        metavar="FILE",
        help="who the parties are: to begin one, for names, --push and --fetch",
    )
    revoke.add_argument(
        "--push", action="store_true", help="tell the parties, as the federation file's client"
    )
    revoke.add_argument(
        "--fetch", action="store_true", help="first take over what the parties hold, if newer"
    )
    revoke.add_argument("--json", action="store_true", help="one JSON object per event and line")

    certificate = add(
        "certificate",
        _revoke("certificate"),
        "write a TLS certificate for an hour, for programs that read a party's figures",
        "Prometheus and others need files. Makes DIR/tls.pem (a fresh key and a certificate by --key) and\n"
        "DIR/parties.pem (the parties' identities as authorities); prints the name that each party's own\n"
        "certificate has. Run it again within the hour. The key stands there in clear: give a directory in\n"
        "memory. The public half of --key must stand in `metrics.readers` of the party.\n\n"
        "example:\n  mimir certificate --key reader.key --federation f.toml --out /run/mimir-reader",
    )
    certificate.add_argument("--key", required=True, metavar="FILE", help="identity (`mimir keygen`)")
    certificate.add_argument("--federation", required=True, metavar="FILE", help="who the parties are")
    certificate.add_argument("--out", required=True, metavar="DIR", help="where to")
    certificate.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def _policy_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="ACTION", required=True)

    def add(name: str, text: str, *files: tuple[str, str]) -> argparse.ArgumentParser:
        action = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for file, what in files:
            action.add_argument(file, metavar=file.upper(), help=what)
        action.add_argument("--json", action="store_true", help="one JSON object")
        action.set_defaults(call=_policy(name))
        return action

    new = add(
        "new", "write a commented policy that admits nobody yet", ("file", "to make; never overwritten")
    )
    new.add_argument("--name", help="default: the file's")
    new.add_argument(
        "--environment",
        choices=("production", "simulation"),
        default="production",
        help='"simulation" names software TPMs and nothing else (default: production)',
    )
    new.add_argument("--days", type=_positive, default=90, metavar="N", help="until it expires (default: 90)")

    sign = add("sign", "sign a policy as one of its owners, into FILE.sig", ("file", "the policy"))
    sign.add_argument("--key", required=True, metavar="FILE", help="the owner's identity (`mimir keygen`)")

    check = add("check", "say whether enough owners signed a policy that may be used", ("file", "the policy"))
    check.add_argument(
        "--owners", type=_keys, required=True, metavar="KEY,KEY", help="public keys that may sign"
    )
    check.add_argument("--threshold", type=_positive, required=True, metavar="K", help="how many must have")
    check.add_argument(
        "--at-least", type=_positive, default=1, metavar="N", help="lowest version to take (default: 1)"
    )

    explain = add(
        "explain",
        "say what evidence is, step by step, and how each entry takes it; admits nobody",
        ("evidence", "an envelope, as a peer sends it"),
    )
    explain.add_argument("--policy", required=True, metavar="FILE", help="its signatures are not looked at")
    explain.add_argument("--collateral", metavar="DIR", help="filled by `mimir policy fetch`")

    fetch = add("fetch", "ask AMD and Intel for revocation lists and collateral, and keep what verifies")
    fetch.add_argument("--collateral", required=True, metavar="DIR", help="where to keep it")
    fetch.add_argument(
        "--amd",
        action="append",
        default=[],
        choices=("milan", "genoa", "turin"),
        help="a product; repeatable",
    )
    fetch.add_argument(
        "--intel", action="append", default=[], type=_fmspc, metavar="FMSPC", help="a platform; repeatable"
    )
    fetch.add_argument(
        "--authority", choices=("platform", "processor"), default="platform", help="CA of the platforms"
    )
    fetch.add_argument("--evidence", metavar="FILE", help="what this envelope needs")
    for action in (check, explain):
        action.add_argument(
            "--at", type=_moment, metavar="TIME", help="judge as of then, such as 2026-07-01T00:00:00Z"
        )


def _attester_commands(parser: argparse.ArgumentParser) -> None:
    from mimir.config import ATTESTERS

    commands = parser.add_subparsers(metavar="ACTION", required=True)

    def add(name: str, text: str, more: str) -> argparse.ArgumentParser:
        action = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\n{more}",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        action.add_argument("--config", metavar="FILE", help="the party's file: its [attester] and its terms")
        action.add_argument("--kind", choices=ATTESTERS, help="instead of what the file says")
        action.add_argument(
            "--device", metavar="PATH", help="a path, or tcp:HOST:PORT; default: as the kernel has it"
        )
        action.add_argument("--json", action="store_true", help="one JSON object")
        action.set_defaults(call=_attester(name))
        return action

    enroll = add(
        "enroll",
        "print this machine's measurements, and the policy entry that admits it",
        "The entry goes to standard output, the rest to standard error. PCR 16 of a TPM depends on the\n"
        "party's configuration, so the entry names it with --config alone.\n\n"
        "examples:\n"
        "  mimir attester enroll --config party.toml --id alpha >> mesh.toml\n"
        "  mimir attester enroll --kind swtpm --device /run/tpm/socket --json",
    )
    enroll.add_argument("--id", default="enrolled", metavar="NAME", help="of the entry (default: enrolled)")
    show = add(
        "show",
        "make evidence for a nonce of our own and write it out",
        "It serves nobody but `mimir policy explain`: no verifier gave that nonce.\n\n"
        "example:\n"
        "  mimir attester show --config party.toml --policy mesh.toml --out evidence.cbor\n"
        "  mimir policy explain evidence.cbor --policy mesh.toml",
    )
    show.add_argument("--policy", metavar="FILE", help="the policy to bind it to (default: none)")
    show.add_argument("--out", metavar="FILE", help="the envelope (default: hexadecimal, on standard output)")


def _client_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("connection and output")
    group.add_argument(
        "--federation", required=True, metavar="FILE", help="who the parties are (configs/federation.toml)"
    )
    group.add_argument("--key", metavar="FILE", help="our identity (default: client_key of that file)")
    group.add_argument("--json", action="store_true", help="one JSON object per event and line")
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None, help="default: on terminals"
    )


def _answer_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--model", metavar="NAME", help="name or digest (default: the federation file's, or the only one)"
    )
    group.add_argument("--tokenizer", metavar="DIR", help="model directory (default: the federation file's)")
    group.add_argument(
        "--max-new",
        type=_positive,
        metavar="N",
        help="tokens to print at most (default: 32, or the largest answer bucket if that is smaller)",
    )
    group.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1.0")
    group.add_argument(
        "--top-k", type=_positive, metavar="K", help="sample among K (default: the federation's topk)"
    )
    group.add_argument(
        "--deterministic", action="store_true", help="one seed for the session, by a coin toss of the parties"
    )
    group.add_argument("--ignore-end", action="store_true", help="go on printing after the model's end token")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _round_trip(text: str) -> int:
    if not 0 <= (value := int(text)) <= 1000:
        raise argparse.ArgumentTypeError("must be from 0 to 1000")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def _broker(text: str) -> tuple[str, tuple[Any, str]]:
    from mimir.config import address_rule, key_rule, text_rule

    name, _, rest = text.partition("=")
    address, _, key = rest.rpartition("=")
    try:
        named = text_rule(64)(name, Path())
        return str(named), (address_rule(address, Path()), str(key_rule(key, Path())))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: NAME=HOST:PORT=KEY; {error}") from None


def _session(text: str) -> bytes:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != 16:
        raise argparse.ArgumentTypeError("a session is 32 hexadecimal digits")
    return raw


def _keys(text: str) -> list[str]:
    keys = [key.strip().lower() for key in text.split(",")]
    for key in keys:
        if len(key) != 64 or any(digit not in "0123456789abcdef" for digit in key):
            raise argparse.ArgumentTypeError(f"{key[:20]!r} is no public key: 64 hexadecimal digits")
    return keys


def _fmspc(text: str) -> str:
    if len(text) != 12 or any(digit not in "0123456789abcdefABCDEF" for digit in text):
        raise argparse.ArgumentTypeError("an FMSPC is 12 hexadecimal digits")
    return text.lower()


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = datetime.min
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError("a time with its zone, such as 2026-07-01T00:00:00Z")
    return moment


def _lengths(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _template(text: str) -> str:
    if "{}" not in text:
        raise argparse.ArgumentTypeError("must contain {} where the line goes")
    return text.replace("\\n", "\n")


if __name__ == "__main__":
    sys.exit(main())

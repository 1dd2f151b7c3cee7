"""One party as a process: its log, its limits, its end. What it does is `mimir.actors.peer.run_peer`."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
from contextlib import suppress

import structlog
import trio

from mimir import keys
from mimir.boot import Boot
from mimir.config import ROTATION_PORTS, Config, Log
from mimir.confine import confine
from mimir.errors import BadInput, ConfigError
from mimir.secret import StorageKey

log = structlog.get_logger("mimir.party")

GARBAGE = 20_000  # objects made, less those freed, between two searches for cycles
ORDERS = {signal.SIGUSR1: "rotate", signal.SIGHUP: "reload"}
STOP_SECONDS = 10.0  # for tunnel and connections to be taken down


def run(config: Config) -> int:
    """Run the party until SIGTERM or Ctrl-C; returns 0 after a clean stop. SIGUSR1 rotates keys, SIGHUP
    has policy and collateral read again."""
    start_log(config.log)
    boot = Boot()
    # Keys and shares are in this process's memory: no core dumps, no files for others.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    key: StorageKey | None = None
    if config.keys.source in keys.REMOTE:
        with boot.step("key"):
            key = keys.obtain_apart(config.keys, config.attester)
    if config.confinement.mode == "enforce":
        with boot.step("confine") as step:
            step.note = str(confine(config))
    else:
        boot.skip("confine", "off")
        log.warning("not confined: whoever breaks in may do all that this user may")
    # Only now: numpy starts threads when it is imported, and they have to be confined too.
    from mimir import kernels
    from mimir.actors.peer import run_peer
    from mimir.actors.triples import keep_pages

    kernels.use_threads(config.kernels.threads or min(len(os.sched_getaffinity(0)), kernels.MAX_THREADS))
    keep_pages()
    # What is loaded by now stays; looking through it for garbage again and again takes time for nothing.
    gc.freeze()
    gc.set_threshold(GARBAGE)

    async def until_told() -> None:
        tell, orders = trio.open_memory_channel[str](4)
        async with trio.open_nursery() as nursery:

            async def party() -> None:
                await run_peer(config, orders, boot, key)
                nursery.cancel_scope.cancel()

            nursery.start_soon(party)
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, *ORDERS) as signals:
                async for number in signals:
                    if number in ORDERS:
                        with suppress(trio.WouldBlock):  # some are waiting already
                            tell.send_nowait(ORDERS[signal.Signals(number)])
                        continue
                    log.info("stopping", signal=signal.Signals(number).name)
                    nursery.cancel_scope.deadline = trio.current_time()
                    break
            # From here on a second signal ends the process at once, as if nobody had caught it.

    trio.run(until_told)
    return 0


def check(config: Config) -> int:
    """Say what the configuration means, after reading every file that it names."""
    source = keys.open_source(config.keys, config.attester)
    key = trio.run(source.obtain)
    identity = keys.load_identity(config, key)
    key.wipe()
    if identity.public_hex != config.me.identity:
        raise ConfigError(
            f"{config.source}: peers[{config.party}].identity is not the public half of "
            f"{config.identity_key}, which is {identity.public_hex}"
        )
    print(f"party {config.party} ({config.me.name}), identity {identity.public_hex[:16]}...")
    print(f"shared terms {config.digest().hex()[:16]}..., to be equal at all three parties")
    tunnel = config.tunnel
    if tunnel.mode == "wireguard":
        from wg import keys as tunnel_keys

        assert tunnel.listen_port is not None
        if tunnel.private_key is not None:
            private = tunnel_keys.load_private(tunnel.private_key)
            public = private.public().hex()
            private.wipe()
            if config.me.tunnel_public_key is not None and public != config.me.tunnel_public_key:
                raise ConfigError(
                    f"{config.source}: peers[{config.party}].tunnel_public_key is not the public half of "
                    f"{tunnel.private_key}"
                )
        ports = f"port {tunnel.listen_port}"
        if tunnel.rotates:
            ports = f"ports {tunnel.listen_port} to {tunnel.listen_port + ROTATION_PORTS}"
        print(f"WireGuard on {tunnel.interface}, {tunnel.address}, UDP {ports}")
        print(f"new keys every {tunnel.rotate_seconds:g} s" if tunnel.rotates else "keys are never rotated")
    else:
        print("NO tunnel: the links between the parties are readable by anybody on the way")
    _check_attestation(config)
    for peer in config.others:
        print(f"peer {peer.party} ({peer.name}) at {peer.host}:{peer.port}, identity {peer.identity[:16]}...")
    counts = f"{len(config.clients)} may ask, {len(config.owners)} may provision"
    print(f"clients at {config.control.listen}: {counts}")
    from mimir.actors.peer import open_revocations

    print(f"TLS for clients and readers of figures is {'on' if config.tls.enabled else 'off'}")
    known = open_revocations(config)
    if known is None:
        print("nothing can be revoked: `attestation.owners` is empty")
    else:
        who = f"{config.attestation.threshold} of {len(config.attestation.owners)} owners"
        print(f"revocations of epoch {known.epoch}, which {who} sign")
    if not config.clients:
        print("nobody may open a session: `clients` is empty")
    if config.data_dir.exists() and config.data_dir.stat().st_mode & 0o077:
        raise BadInput(f"{config.data_dir}: open to others; chmod 700 it")
    print(f"model shares in {config.data_dir}, encrypted; their key: {source.protection}")
    if config.confinement.mode == "off":
        print("NOT confined: whoever breaks into the party may do all that its user may")
    return 0


def _check_attestation(config: Config) -> None:
    """Say by what peers are admitted."""
    attestation = config.attestation
    if attestation.policy is None:
        print("NO attestation: peers are believed by their keys alone")
        return
    from mimir.attest import policy

    found = policy.load(attestation.policy)
    signed = attestation.policy.with_name(attestation.policy.name + policy.SIGNATURE_SUFFIX)
    policy.check_signatures(found, policy.load_signatures(signed), attestation.owners, attestation.threshold)
    kind = config.attester.kind if config.attester is not None else "none"
    print(f"peers are admitted by policy {found.name}, version {found.version}; own evidence: {kind}")
    print(f"they bring their evidence to {attestation.listen}")


def start_log(log: Log) -> None:
    """Structured lines on standard error. Tracebacks are plain: some formatters print local variables."""
    level = {"debug": 10, "info": 20, "warning": 30, "error": 40}[log.level]
    # Libraries that use the standard log (pyroute2, trio-websocket) speak up only when something is wrong.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    renderer: structlog.typing.Processor
    if log.format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.format_exc_info] if log.format == "json" else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )

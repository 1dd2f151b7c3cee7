"""Client and control door against fake parties: the honest run is right, and every single liar is refused."""

from __future__ import annotations

import copy
import gc
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from service import NAMES, VOCAB, Tamper, World, spec, world
from trio_websocket import ConnectionClosed, open_websocket

from mimir.client.connection import PartyError, connect
from mimir.client.federation import Party
from mimir.client.session import (
    Progress,
    Session,
    connect_all,
    join,
    new_session,
    open_session,
    survey,
    terms_for,
)
from mimir.errors import AbortError, BadInput, ClientError, LocalError, MimirError, PeerError
from mimir.net.control import ClientGone, ClientHandle
from mimir.net.identity import Identity, exchange_public
from mimir.net.messages import FROM_CLIENT, Message, Open, Sampler, pack
from mimir.net.seal import Handshake

pytestmark = [  # what is left open is an error here; `run` has it noticed by the test that left it
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]
PROMPT = [5, 250, 17]


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run an async test under a deadline; nothing here takes seconds."""

    async def guarded() -> None:
        with trio.fail_after(30):
            await test()

    trio.run(guarded)
    gc.collect()  # so that a socket that was left open fails the test that left it


async def open_one(
    stack: AsyncExitStack, made: World, *, client: int = 0, max_new: int = 4, watch: Any = None, **terms: Any
) -> Session:
    """An open session of one client, or of both with `clients` and `session` given."""
    identity = made.clients[client]
    connections = await stack.enter_async_context(connect_all(made.federation, identity))
    service = await survey(connections, made.federation)
    agreed = terms_for(
        service,
        service.model(None),
        terms.pop("clients", [identity.public_hex]),
        terms.pop("buckets", [8]),
        max_new,
        Sampler(),
        session=terms.pop("session", new_session()),
        **terms,
    )
    return await stack.enter_async_context(open_session(connections, service, agreed, identity, watch))


async def answer(session: Session) -> list[int]:
    tokens = []
    while (token := await session.token()) is not None:
        tokens.append(token)
    return tokens


async def once(made: World, prompt: Sequence[int] = PROMPT) -> list[int]:
    """One whole honest exchange."""
    async with AsyncExitStack() as stack:
        session = await open_one(stack, made)
        await session.prompt(prompt)
        return await answer(session)
    raise AssertionError


# --- the honest run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_the_parties_get_the_prompt_left_padded_and_the_client_their_tokens(
    tmp_path: Path, positions: str
) -> None:
    async def test() -> None:
        async with world(tmp_path, spec(positions)) as made:
            tokens = await once(made)
            (conversation,) = made.fake.conversations.values()
            values = conversation.prompts[0, 0]
            assert values["token"].tolist() == [0] * 5 + PROMPT
            assert values["valid"].tolist() == [0] * 5 + [1] * 3
            assert values["position"].tolist() == [0] * 5 + [0, 1, 2]
            assert tokens == [made.fake.answer(conversation, 0, step) for step in range(4)]
            # All three parties were told the same.
            offsets = list(conversation.offsets[0, 0].values())
            assert len(offsets) == 3 and offsets[0] == offsets[1] == offsets[2]

    run(test)


def test_what_is_sent_is_masked_with_what_only_the_client_can_add_up(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            await once(made)
            await once(made)
            first, second = made.fake.conversations.values()
            for kind in ("token", "valid", "position"):
                a, b = (np.frombuffer(each.offsets[0, 0][0][kind], "<u8") for each in (first, second))
                assert (a != b).sum() >= 6  # equal values, unequal offsets (2^-8 by chance per slot)

    run(test)


def test_turns_continue_positions_and_progress_and_statistics_arrive(tmp_path: Path) -> None:
    async def test() -> None:
        seen: list[Progress] = []
        async with world(tmp_path) as made, AsyncExitStack() as stack:
            session = await open_one(stack, made, watch=seen.append)
            with pytest.raises(LocalError):
                await session.token()
            await session.prompt(PROMPT)
            with pytest.raises(LocalError):
                await session.prompt(PROMPT)
            await answer(session)
            assert session.stats == [{"rounds": 5, "party": party} for party in range(3)]
            assert session.room == 200 - 8 - 4
            with pytest.raises(LocalError, match="later turn"):
                await session.prompt(PROMPT)
            await session.prompt([1, 2], buckets=[16], max_new=8)
            assert len(await answer(session)) == 8
            (conversation,) = made.fake.conversations.values()
            # 3 prompt tokens and 4 answered ones came before.
            assert conversation.prompts[1, 0]["position"].tolist() == [0] * 14 + [7, 8]
            assert {each.phase for each in seen} == {"preprocessing", "decode"}
            assert {each.party for each in seen} == {0, 1, 2}

    run(test)


def test_two_clients_own_one_prompt_and_both_get_the_answer(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            keys = [client.public_hex for client in made.clients]
            session = new_session()
            heard: dict[int, list[int]] = {}

            async def one(client: int, prompt: list[int], start: int | None) -> None:
                async with AsyncExitStack() as stack:
                    opened = await open_one(
                        stack, made, client=client, clients=keys, buckets=[8, 16], session=session
                    )
                    assert opened.part == client
                    await opened.prompt(prompt, start=start)
                    heard[client] = await answer(opened)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(one, 0, [1, 2, 3], None)
                nursery.start_soon(one, 1, [4, 5], None)
            (conversation,) = made.fake.conversations.values()
            assert heard[0] == heard[1] == [made.fake.answer(conversation, 0, step) for step in range(4)]
            assert conversation.prompts[0, 1]["token"].tolist() == [0] * 14 + [4, 5]
            # The second does not know how long the first's part is: it counts the padded one.
            assert conversation.prompts[0, 1]["position"].tolist()[-2:] == [8, 9]

    run(test)


def test_other_terms_for_the_same_session_are_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            keys = [client.public_hex for client in made.clients]
            session = new_session()
            errors: list[Exception] = []

            async def one(client: int, buckets: list[int]) -> None:
                try:
                    async with AsyncExitStack() as stack:
                        await open_one(
                            stack, made, client=client, clients=keys, buckets=buckets, session=session
                        )
                except MimirError as error:
                    errors.append(error)
                    nursery.cancel_scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(one, 0, [8, 8])
                nursery.start_soon(one, 1, [8, 16])
            assert errors and "other terms" in str(errors[0])

    run(test)


# --- liars -------------------------------------------------------------------------------------------------


def change(kind: str, how: Callable[[Message], None], liar: int) -> Tamper:
    """One party changes each of its messages of one kind."""

    def tamper(party: int, message: Message) -> Message | None:
        if party == liar and message["t"] == kind:
            message = copy.deepcopy(message)
            how(message)
        return message

    return tamper


def flip_mask(name: str, byte: int) -> Callable[[Message], None]:
    def how(message: Message) -> None:
        raw = bytearray(message["names"][name])
        raw[byte] ^= 1
        message["names"][name] = bytes(raw)

    return how


def add(component: int) -> Callable[[Message], None]:
    def how(message: Message) -> None:
        message["components"][component] = (message["components"][component] + 1) % 2**64

    return how


def put(name: str, value: Any) -> Callable[[Message], None]:
    def how(message: Message) -> None:
        message[name] = value

    return how


def put_bits(name: str, value: int) -> Callable[[Message], None]:
    def how(message: Message) -> None:
        message["bits"][name] = value

    return how


def cut(name: str) -> Callable[[Message], None]:
    def how(message: Message) -> None:
        message["names"][name] = message["names"][name][:-16]

    return how


def drop(name: str) -> Callable[[Message], None]:
    def how(message: Message) -> None:
        del message["names"][name]

    return how


def become(other: Message) -> Callable[[Message], None]:
    def how(message: Message) -> None:
        message.clear()
        message.update(other)

    return how


LIES: dict[str, tuple[str, Callable[[Message], None], str]] = {
    "mask, own component": ("masks", flip_mask("token", 0), "sent different values of one component"),
    "mask, other component": ("masks", flip_mask("token", 8 * 8), "sent different values of one component"),
    "mask, a high bit": ("masks", flip_mask("token", 7), "sent different values of one component"),
    "mask of valid": ("masks", flip_mask("valid", 3), "sent different values of one component"),
    "mask of position": ("masks", flip_mask("position", 100), "sent different values of one component"),
    "mask too short": ("masks", cut("valid"), "7 masks of valid for a bucket of 8"),
    "mask missing": ("masks", drop("position"), "sent masks for"),
    "another size of masks": ("masks", put_bits("token", 8), "disagree on the size"),
    "masks of another turn": ("masks", put("turn", 1), "masks of turn 1 where turn 0 is due"),
    "token, own component": ("token", add(0), "sent different values of one component"),
    "token, other component": ("token", add(1), "sent different values of one component"),
    "token of another step": ("token", put("step", 2), "where token"),
    "another message": ("token", put("t", "opened"), "broke the protocol"),
    "end too early": ("token", become({"t": "done", "stats": {}}), "said done where"),
}  # fmt: skip


@pytest.mark.parametrize("liar", range(3))
@pytest.mark.parametrize("lie", LIES)
def test_no_single_party_can_change_a_mask_or_a_token(tmp_path: Path, lie: str, liar: int) -> None:
    kind, how, expected = LIES[lie]

    async def test() -> None:
        async with world(tmp_path) as made:
            made.fake.tamper = change(kind, how, liar)
            heard = []
            with pytest.raises((ClientError, LocalError)) as caught:
                async with AsyncExitStack() as stack:
                    session = await open_one(stack, made)
                    await session.prompt(PROMPT)
                    while (token := await session.token()) is not None:
                        heard.append(token)
            if lie == "another message":  # our own door does not even let it out
                return
            assert expected in str(caught.value)
            assert heard == [] or lie == "token of another step"
            if "component" in expected:
                # The liar is one of the two that are named.
                assert NAMES[liar] in str(caught.value)
                conversation = next(iter(made.fake.conversations.values()))
                if kind == "masks":
                    assert not conversation.prompts  # nothing derived from the prompt has left
            made.fake.tamper = lambda party, message: message
            assert len(await once(made)) == 4  # the parties are as good as new

    run(test)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("valid", 63, "mask of valid is not of the whole ring"),
        ("token", 7, "a token of this prompt is beyond"),
        ("position", 1, "a position of this prompt is beyond"),
    ],
)
def test_masks_that_are_too_small_are_refused_even_if_all_agree(
    tmp_path: Path, name: str, value: int, expected: str
) -> None:
    """Outside of the mask's range a prompt would be sent in clear or wrapped to another one."""

    async def test() -> None:
        async with world(tmp_path) as made:
            bits = made.fake.bits() | {name: value}
            made.fake.bits = lambda: bits  # type: ignore[method-assign]
            with pytest.raises(MimirError, match=expected):
                await once(made)
            assert not next(iter(made.fake.conversations.values())).prompts

    run(test)


def test_a_turn_that_does_not_fit_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, spec(context=24)) as made, AsyncExitStack() as stack:
            session = await open_one(stack, made)
            await session.prompt(PROMPT)
            await answer(session)
            for ids, buckets in ((PROMPT, [16]), ([1] * 9, [8]), ([], [8])):
                with pytest.raises(BadInput):
                    await session.prompt(ids, buckets=buckets, max_new=4)
            await session.prompt(PROMPT, buckets=[8], max_new=4)  # what fits still works
            assert len(await answer(session)) == 4

    run(test)


def test_all_components_are_compared_and_the_sum_is_the_value(rng: np.random.Generator) -> None:
    parts = rng.integers(0, 2**64, (3, 5), dtype=np.uint64)
    pairs = np.stack([np.stack([parts[i], parts[(i + 1) % 3]]) for i in range(3)])
    assert (join(NAMES, pairs, "x") == parts.sum(axis=0, dtype=np.uint64)).all()
    for party in range(3):
        for side in range(2):
            for element in range(5):
                wrong = pairs.copy()
                wrong[party, side, element] ^= np.uint64(1) << np.uint64(rng.integers(64))
                with pytest.raises(ClientError):
                    join(NAMES, wrong, "x")


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            made.fake.answer = lambda *_: VOCAB  # type: ignore[method-assign]
            with pytest.raises(ClientError, match="no token of this model"):
                await once(made)

    run(test)


@pytest.mark.parametrize("liar", range(3))
@pytest.mark.parametrize("kind", ["opened", "masks", "token", "done"])
def test_a_silent_party_is_named_within_the_deadline(tmp_path: Path, kind: str, liar: int) -> None:
    async def test() -> None:
        async with world(tmp_path, silence=0.3) as made:
            silent = False

            def tamper(party: int, message: Message) -> Message | None:
                nonlocal silent
                silent |= party == liar and message["t"] == kind
                return None if silent and party == liar else message

            made.fake.tamper = tamper
            began = trio.current_time()
            with pytest.raises(PartyError, match=rf"party {NAMES[liar]} .*silent for 0.3 s"):
                await once(made)
            assert trio.current_time() - began < 3

    run(test)


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        (AbortError("check 7 failed at P2"), AbortError, "the session was aborted"),
        (
            PeerError(2, "turn 0/token 3", "hash of opening differs"),
            PartyError,
            "party 2 was silent or broke",
        ),
        (BadInput("no such thing"), BadInput, "party beta refused: no such thing"),
        (RuntimeError("/etc/secret"), PartyError, "internal error"),
        (ExceptionGroup("g", [ValueError("x"), AbortError("y")]), AbortError, "the session was aborted"),
    ],
)
def test_errors_of_a_party_are_plain_and_say_nothing_of_checks(
    tmp_path: Path, raised: Exception, expected: type[Exception], text: str
) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            made.fake.open_error = raised
            with pytest.raises(expected) as caught:
                await once(made)
            assert text in str(caught.value)
            for secret in ("check 7", "hash", "/etc", "token 3"):
                assert secret not in str(caught.value)
            made.fake.open_error = None
            assert await once(made)

    run(test)


# --- who may come in ---------------------------------------------------------------------------------------


def test_a_server_without_the_party_s_key_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            parties = list(made.federation.parties)
            parties[1] = replace(parties[1], identity=Identity.generate().public_hex)
            made.federation = replace(made.federation, parties=tuple(parties))
            with pytest.raises(PartyError, match="party beta"):
                await once(made)

    run(test)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answers, but not as a party"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "answers, but not as a party"),
        (b"SSH-2.0-x\r\n", "hung up while connecting"),
        (b"", "hung up while connecting"),
        (None, "no answer within 0.5 s"),
    ],
)
def test_something_else_on_the_port_is_told(tmp_path: Path, says: bytes | None, expected: str) -> None:
    async def other(stream: trio.SocketStream) -> None:
        if says is None:
            await trio.sleep_forever()
        else:
            await stream.receive_some(4096)
            await stream.send_all(says)

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            listener = (await nursery.start(trio.serve_tcp, other, 0))[0]
            at = Party("alpha", "127.0.0.1", listener.socket.getsockname()[1], "d7" * 32)
            at = replace(at, identity=Identity.generate().public_hex)
            with pytest.raises(PartyError, match=expected):
                async with connect(at, Identity.generate(), within=0.5, silence=5):
                    pass
            nursery.cancel_scope.cancel()

    run(test)


def test_nobody_on_the_port_is_told_at_once() -> None:
    async def test() -> None:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        port = listener.socket.getsockname()[1]
        await listener.aclose()
        at = Party("alpha", "127.0.0.1", port, Identity.generate().public_hex)
        with pytest.raises(PartyError, match=r"cannot be reached: .*refused; is it running\?"):
            async with connect(at, Identity.generate(), within=5, silence=5):
                pass

    run(test)


def test_a_party_in_another_place_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            first, second, third = made.federation.parties
            made.federation = replace(made.federation, parties=(second, first, third))
            with pytest.raises(ClientError, match="stands at another place"):
                await once(made)

    run(test)


def test_strangers_learn_nothing_and_owners_and_clients_only_their_part(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            made.clients[0], known = Identity.generate(), made.clients[0]
            with pytest.raises(BadInput, match="neither in `clients` nor in `owners`"):
                await once(made)
            made.clients[0] = made.owner
            with pytest.raises(BadInput, match="your key is not in `clients` here"):
                await once(made)
            party = made.federation.parties[0]
            async with connect(party, known, within=5, silence=5) as connection:
                await connection.send({"t": "put_model", "manifest": {}, "seeds": [bytes(32)] * 2})
                with pytest.raises(BadInput, match="not in `owners` here"):
                    await connection.receive("have")

    run(test)


@pytest.mark.parametrize(
    ("change_of_terms", "expected"),
    [
        ({"model": "0" * 64}, "is not here"),
        ({"buckets": [9]}, "prompt bucket 9 is none of 8, 16"),
        ({"max_new": 5}, "output bucket 5 is none of 4, 8"),
        ({"buckets": [8, 8]}, "prompt buckets for 2"),
        ({"sampler": {"kind": "sample", "temperature": 1.0, "topk": 41}}, "topk 41 is over"),
        ({"clients": ["a" * 64], "buckets": [8]}, "not among the clients of this session"),
        ({"clients": ["OWN", "a" * 64], "buckets": [8, 8]}, "client aaaaaaaaaaaaaaaa... is not in `clients`"),
    ],
)
def test_the_door_refuses_terms_that_the_configuration_does_not_allow(
    tmp_path: Path, change_of_terms: dict[str, Any], expected: str
) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            key = made.clients[0].public_hex
            terms = Open(new_session(), made.model, (key,), (8,), 4, Sampler(), False)
            party = made.federation.parties[2]
            async with connect(party, made.clients[0], within=5, silence=5) as connection:
                message = terms.message() | change_of_terms
                message["clients"] = [key if each == "OWN" else each for each in message["clients"]]
                await connection.send(message)
                with pytest.raises(BadInput, match=expected):
                    await connection.receive("opened")

    run(test)


def test_too_long_for_the_context_is_refused_at_both_ends(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, spec(context=11)) as made:
            with pytest.raises(BadInput, match="exceed the context of 11"):
                await once(made)
            terms = Open(new_session(), made.model, (made.clients[0].public_hex,), (8,), 4, Sampler(), False)
            async with connect(
                made.federation.parties[0], made.clients[0], within=5, silence=5
            ) as connection:
                await connection.send(terms.message())
                with pytest.raises(BadInput, match="exceed the context of 11"):
                    await connection.receive("opened")

    run(test)


# --- garbage -----------------------------------------------------------------------------------------------


async def _bytes(made: World, raw: bytes) -> bytes:
    """Send raw bytes to party 0 and return what it answers until it hangs up."""
    party = made.federation.parties[0]
    stream = await trio.open_tcp_stream(party.host, party.port)
    async with stream:
        await stream.send_all(raw)
        heard = b""
        with trio.fail_after(5):
            try:
                while block := await stream.receive_some(4096):
                    heard += block
            except trio.BrokenResourceError:
                pass
        return heard


UPGRADE = (
    b"GET %s HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def frame(opcode: int, payload: bytes) -> bytes:
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
    return bytes([0x80 | opcode]) + size + bytes(4) + payload


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00" * 100,
        b"GET / HTTP/1.1\r\n\r\n",
        b"A" * 70000,
        UPGRADE % b"/elsewhere",
        UPGRADE % b"/mimir/1" + frame(1, b"hello"),
        UPGRADE % b"/mimir/1" + frame(2, b""),
        UPGRADE % b"/mimir/1" + frame(2, b"\x01" * 96),
        UPGRADE % b"/mimir/1" + b"\xff" * 200,
        UPGRADE % b"/mimir/1" + b"\x82\xff" + (1 << 40).to_bytes(8, "big") + bytes(100),
        b"",
    ],
    ids=["zeros", "plain http", "long", "path", "text", "empty", "no point", "frames", "huge", "silence"],
)
def test_garbage_before_the_handshake_closes_that_connection_only(tmp_path: Path, raw: bytes) -> None:
    async def test() -> None:
        async with world(tmp_path) as made, AsyncExitStack() as stack:
            session = await open_one(stack, made)
            await _bytes(made, raw)
            await session.prompt(PROMPT)
            assert len(await answer(session)) == 4

    run(test)


@pytest.mark.parametrize(
    "what", ["not sealed", "no msgpack", "no message", "out of place", "forged", "replayed"]
)
def test_garbage_after_the_handshake_closes_that_connection_only(tmp_path: Path, what: str) -> None:
    async def test() -> None:
        async with world(tmp_path) as made, AsyncExitStack() as stack:
            session = await open_one(stack, made)
            party = made.federation.parties[0]
            with pytest.raises(PartyError, match="closed the connection"):
                async with connect(party, made.clients[1], within=5, silence=5) as connection:
                    await connection.send({"t": "status"})
                    await connection.receive("status")
                    if what == "not sealed":
                        await connection._socket.send_message(b"x" * 50)
                    elif what == "no msgpack":
                        await connection._socket.send_message(connection._seal.close(b"\xc1"))
                    elif what == "no message":
                        await connection._socket.send_message(connection._seal.close(b"\x80"))
                    elif what == "out of place":
                        await connection.send({"t": "commit"})
                    elif what == "forged":
                        sealed = bytearray(connection._seal.close(b"\x81\xa1t\xa6status"))
                        sealed[-1] ^= 1
                        await connection._socket.send_message(bytes(sealed))
                    elif what == "replayed":
                        sealed = bytearray(connection._seal.close(b"\x81\xa1t\xa6status"))
                        await connection._socket.send_message(bytes(sealed))
                        await connection.receive("status")
                        await connection._socket.send_message(bytes(sealed))
                    await connection.receive("status")
            await session.prompt(PROMPT)
            assert len(await answer(session)) == 4

    run(test)


async def handshaken(
    stack: AsyncExitStack, made: World, first: bytes | None = None
) -> tuple[Any, Any, bytes]:
    """A connection after the handshake, before the first sealed message: socket, seal, what was sent."""
    party = made.federation.parties[0]
    socket = await stack.enter_async_context(
        open_websocket(party.host, party.port, "/mimir/1", use_ssl=False)
    )
    stack.callback(socket._stream.socket.close)  # the library leaves it open where the other end hung up
    handshake = Handshake.initiator(
        made.clients[0].exchange_key(), exchange_public(bytes.fromhex(party.identity))
    )
    message = handshake.start()
    await socket.send_message(first or message)
    answered = await socket.get_message()
    assert isinstance(answered, bytes)
    return socket, None if first else handshake.finish(answered), message


def test_who_stays_silent_after_the_handshake_is_closed(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made, AsyncExitStack() as stack:
            socket, _seal, _message = await handshaken(stack, made)
            with trio.fail_after(20), pytest.raises(ConnectionClosed):
                await socket.get_message()

    run(test)


def test_a_replayed_handshake_gets_an_answer_and_nothing_more(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made, AsyncExitStack() as stack:
            _socket, seal, message = await handshaken(stack, made)
            hello = seal.close(pack({"t": "hello"}, FROM_CLIENT))
            replayed, _, _ = await handshaken(stack, made, message)
            await replayed.send_message(hello)
            with trio.fail_after(20), pytest.raises(ConnectionClosed):
                await replayed.get_message()

    run(test)


def test_something_else_than_a_hello_comes_to_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made, AsyncExitStack() as stack:
            socket, seal, _message = await handshaken(stack, made)
            for _ in range(2):
                await socket.send_message(seal.close(pack({"t": "status"}, FROM_CLIENT)))
            with trio.fail_after(20), pytest.raises(ConnectionClosed):
                await socket.get_message()

    run(test)


def test_garbage_in_a_session_reaches_its_task_as_a_client_that_is_gone(tmp_path: Path) -> None:
    """Not as a cancellation: the task that works for the client must be able to end the session in order."""

    async def test() -> None:
        async with world(tmp_path) as made, AsyncExitStack() as stack:
            ended: list[str] = []

            async def serve(client: ClientHandle, terms: Open) -> None:
                try:
                    await client.send({"t": "opened"})
                    await client.gone.wait()
                    await trio.sleep(0.05)  # tidying up takes a while
                except trio.Cancelled:
                    ended.append("cancelled")
                    raise
                with pytest.raises(ClientGone):
                    await client.send({"t": "opened"})
                with pytest.raises(ClientGone):
                    await client.receive()
                ended.append("in order")

            for party in made.parties:
                party.open = serve  # type: ignore[method-assign]
            session = await open_one(stack, made)
            await session._connections[0]._socket.send_message(b"no seal")
            while not ended:
                await trio.sleep(0.01)
            assert ended == ["in order"]

    run(test)


def test_more_connections_than_allowed_are_closed_and_the_rest_lives(tmp_path: Path) -> None:
    from mimir.config import Address, Control

    async def test() -> None:
        limit = Control(Address("127.0.0.1", 0), max_connections=2)
        async with world(tmp_path, control=limit) as made:
            party = made.federation.parties[0]
            async with AsyncExitStack() as stack:
                two = [
                    await stack.enter_async_context(connect(party, made.clients[0], within=5, silence=5))
                    for _ in range(2)
                ]
                began = trio.current_time()
                with pytest.raises(PartyError, match="hung up while connecting"):
                    async with connect(party, made.clients[1], within=5, silence=5):
                        pass
                assert trio.current_time() - began < 1  # at once, not at the deadline
                for connection in two:
                    await connection.send({"t": "status"})
                    await connection.receive("status")

    run(test)


def test_a_client_that_leaves_mid_session_does_no_harm(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            with trio.CancelScope() as scope:
                async with AsyncExitStack() as stack:
                    session = await open_one(stack, made)
                    await session.prompt(PROMPT)
                    await session.token()
                    scope.cancel()
                    await session.token()
            assert len(await once(made)) == 4

    run(test)


def test_parties_that_disagree_are_named(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            made.parties[2].store.models()  # type: ignore[unreachable]
            object.__setattr__(made.configs[2], "topk", 3)
            with pytest.raises(ClientError, match="alpha and gamma differ in terms"):
                await once(made)

    run(test)


def test_models_that_not_all_three_hold_are_not_offered(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as made:
            made.parties[1].store.remove(made.model)
            with pytest.raises(BadInput, match="they hold none in common"):
                await once(made)

    run(test)

"""What comes out of the whole engine: three parties with real sockets in one process, held to the float
model.

`scripts/golden` does the same at full length with processes. Here, short: the shared checkpoints, and on the
demo all that can make a session more than one prompt: turns, several clients, company, sampling.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from conftest import REPOSITORY
from federation import generate, running, share_model, until_ready, write_federation
from reference import FloatModel, gap

from mimir.client import federation as client_federation
from mimir.client.session import Service, connect_all, new_session, open_session, survey, terms_for
from mimir.model import Plan, load_checkpoint
from mimir.net.identity import Identity
from mimir.net.messages import Open, Sampler
from mimir.store import ModelStore, SharedModel

DEMO = REPOSITORY / "demo"
PROMPT, OTHER = (
    p["input_ids"][:8] for p in json.loads((DEMO / "EXPECTED.json").read_text("utf-8"))["prompts"][:2]
)
TOKENS = 4
NEAR_TIE = 0.1  # of float logits; below it fixed point may choose otherwise
PATIENCE = 600.0

pytestmark = pytest.mark.slow


def with_parties(
    folder: Path,
    checkpoint: Path,
    body: Callable[[list[Path], str], Awaitable[Any]],
    prompts: Sequence[int] = (8,),
    answers: Sequence[int] = (TOKENS,),
    context: int = 32,
    clients: int = 1,
) -> Any:
    """Run `body(federation file of each client, model)` beside three parties that hold the checkpoint."""
    lengths = (
        f"[scheduler]\nprompt_buckets = {list(prompts)}\noutput_buckets = {list(answers)}\n"
        f"max_context = {context}\n"
    )
    configs, files = write_federation(folder, lengths, clients)

    async def main() -> Any:
        with trio.fail_after(PATIENCE):
            async with running(configs):
                await until_ready(files[0])
                return await body(files, await share_model(files[0], checkpoint, folder))

    return trio.run(main)


@pytest.fixture(scope="module")
def demo() -> Plan:
    return load_checkpoint(DEMO)


def gaps(plan: Plan, ids: Sequence[int], answer: Sequence[int]) -> list[float]:
    """How far each token of an answer lies below the best one after the very tokens before it, in float."""
    logits = FloatModel(plan).forward([*ids, *answer[:-1]])[len(ids) - 1 :]
    return [gap(row, token) for row, token in zip(logits, answer, strict=True)]


def assert_continues(plan: Plan, ids: Sequence[int], answer: Sequence[int]) -> None:
    assert len(answer) == TOKENS
    assert max(gaps(plan, ids, answer)) < NEAR_TIE


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "prompt"),
    [("stories260K", 0), ("TinyStories-656K", 1), ("gpt2-shakespeare-char-0.8M", 2)],
)
def test_the_parties_continue_as_expected(
    name: str, prompt: int, shared_models: dict[str, Any], tmp_path: Path
) -> None:
    model = shared_models[name]
    told = model["expected"]["prompts"][prompt]

    async def body(files: list[Path], digest: str) -> list[int]:
        return (await generate(files[0], digest, told["input_ids"], 6))[0]

    got = with_parties(tmp_path, model["path"], body, prompts=(16,), answers=(6,))
    assert got == told["greedy_new_ids"][:6]


def test_two_sessions_at_once_share_the_weights(
    demo: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[SharedModel] = []
    original = ModelStore.open

    def keep(store: ModelStore, digest: str) -> SharedModel:
        opened.append(original(store, digest))
        return opened[-1]

    monkeypatch.setattr(ModelStore, "open", keep)
    spans: list[tuple[float, float]] = []
    answers: list[list[int]] = [[], []]

    async def body(files: list[Path], digest: str) -> None:
        async def ask(index: int, ids: list[int]) -> None:
            began = trio.current_time()
            answers[index] = (await generate(files[0], digest, ids, TOKENS))[0]
            spans.append((began, trio.current_time()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 0, PROMPT)
            nursery.start_soon(ask, 1, OTHER)

    with_parties(tmp_path, DEMO, body)
    assert max(began for began, _ in spans) < min(ended for _, ended in spans)
    assert_continues(demo, PROMPT, answers[0])
    assert_continues(demo, OTHER, answers[1])
    assert len(opened) == 6
    assert len({id(model) for model in opened}) == 3  # one mapping of the shares a party


def test_a_model_of_which_nothing_is_kept_in_memory_answers_alike(
    demo: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every share is decrypted or expanded at each use, by blocks of rows, in preprocessing and online."""
    opened: list[SharedModel] = []
    original = ModelStore.open

    def lean(store: ModelStore, digest: str) -> SharedModel:
        store._keep = 0
        opened.append(original(store, digest))
        return opened[-1]

    monkeypatch.setattr(ModelStore, "open", lean)

    async def body(files: list[Path], digest: str) -> list[int]:
        return (await generate(files[0], digest, PROMPT, TOKENS))[0]

    assert_continues(demo, PROMPT, with_parties(tmp_path, DEMO, body))
    assert len(opened) == 3 and not any(model.kept_bytes for model in opened)


def test_two_clients_of_a_session_join_their_prompts_and_both_hear_the_answer(
    demo: Plan, tmp_path: Path
) -> None:
    """Each part is padded by itself; the float model knows no padding, so none may be seen."""
    parts = [PROMPT, OTHER[1:4]]

    async def body(files: list[Path], digest: str) -> list[list[int]]:
        told = [client_federation.load(f) for f in files]
        keys = [Identity.load(t.client_key) for t in told]
        number = new_session()
        heard: list[list[int]] = [[], []]

        async def one(index: int) -> None:
            async with connect_all(told[index], keys[index]) as connections:
                service = await survey(connections, told[index])
                public = [k.public_hex for k in keys]
                terms = terms_for(service, digest, public, [8, 8], TOKENS, Sampler(), session=number)
                async with open_session(connections, service, terms, keys[index]) as session:
                    await session.prompt(parts[index], start=len(parts[0]) if index else 0)
                    while (token := await session.token()) is not None:
                        heard[index].append(token)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0)
            nursery.start_soon(one, 1)
        return heard

    heard = with_parties(tmp_path, DEMO, body, clients=2)
    assert heard[0] == heard[1]
    assert_continues(demo, parts[0] + parts[1], heard[0])


async def alone(
    file: Path, digest: str, bucket: int, sampler: Sampler, converse: Callable[[Any], Awaitable[Any]]
) -> Any:
    """A session of one client, for `converse(session)`."""
    told = client_federation.load(file)
    me = Identity.load(told.client_key)

    def terms(service: Service) -> Open:
        return terms_for(
            service,
            digest,
            [me.public_hex],
            [bucket],
            service.output_buckets[0],
            sampler,
            session=new_session(),
            deterministic=sampler.kind == "sample",
        )

    async with connect_all(told, me) as connections:
        service = await survey(connections, told)
        async with open_session(connections, service, terms(service), me) as session:
            return await converse(session)


async def hear(session: Any) -> list[int]:
    out = []
    while (token := await session.token()) is not None:
        out.append(token)
    return out


def test_sampling_takes_only_the_most_likely_and_not_always_the_first(demo: Plan, tmp_path: Path) -> None:
    """At a temperature of 100 the three are all but equally likely: always the first has odds of 3^-8."""
    count, topk = 8, 3

    async def converse(session: Any) -> list[int]:
        await session.prompt(PROMPT)
        return await hear(session)

    async def body(files: list[Path], digest: str) -> Any:
        return await alone(files[0], digest, 8, Sampler("sample", 100.0, topk), converse)

    got = with_parties(tmp_path, DEMO, body, answers=(count,))
    assert len(got) == count
    rows = FloatModel(demo).forward(PROMPT + got[:-1])[len(PROMPT) - 1 :]
    for row, token in zip(rows, got, strict=True):
        assert row[token] > np.sort(row)[-topk] - NEAR_TIE
    assert max(gaps(demo, PROMPT, got)) > NEAR_TIE


def test_a_second_turn_goes_on_where_the_first_ended(demo: Plan, tmp_path: Path) -> None:
    """The cache holds prompt, answer and padding; the float model reads the same text from its beginning."""
    more = OTHER[1:4]

    async def converse(session: Any) -> tuple[list[int], list[int]]:
        await session.prompt(PROMPT)
        first = await hear(session)
        await session.prompt(more, buckets=[8], max_new=TOKENS)
        return first, await hear(session)

    async def body(files: list[Path], digest: str) -> Any:
        return await alone(files[0], digest, 8, Sampler(), converse)

    first, second = with_parties(tmp_path, DEMO, body)
    assert_continues(demo, PROMPT, first)
    assert_continues(demo, PROMPT + first + more, second)

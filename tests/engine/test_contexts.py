"""Holds and what runs in them: asyncio tasks, worker threads, generators, and a web server's dependencies.

Each picture must be that of the mix which its code asked for, the mix before must return, and nothing may hang.
"""

import asyncio
import contextvars
import re
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from torch import Tensor

from shira_diffusers import AdapterLibrary, Resident, ResidentStateError, save_adapter
from shira_diffusers.engine import locks
from tests import tiny

SOON = 60.0  # seconds in which what may go on must have ended, on a busy machine
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StableDiffusionPipeline, Path]]:
    folder, pipe = tmp_path_factory.mktemp("styles"), tiny.pipeline()
    for seed, name in enumerate(NAMES):
        save_adapter(tiny.adapter_for(pipe, seed), folder / f"{name}.safetensors")
        pipe.load_shira(folder / f"{name}.safetensors", name, activate=False)
    yield pipe, folder


@pytest.fixture
def pipe(styles: tuple[StableDiffusionPipeline, Path]) -> Iterator[StableDiffusionPipeline]:
    """A pipeline with three adapters, none active, which must be so again after the test."""
    pipe = styles[0]
    yield pipe
    assert not locks._active
    assert not locks._waiting
    assert pipe.get_active_shira() == {}


def test_a_block_is_entered_once_at_a_time(pipe: StableDiffusionPipeline) -> None:
    block = pipe.shira("a")
    with block:
        with pytest.raises(ResidentStateError, match="entered already"), block:
            pass
        assert pipe.get_active_shira() == {"a": 1.0}
    with block:  # again, after the first time
        assert pipe.get_active_shira() == {"a": 1.0}


@pytest.fixture(scope="module")
def expected(styles: tuple[StableDiffusionPipeline, Path]) -> dict[str, Tensor]:
    """The picture of each adapter, and of the base under the empty name."""
    pipe = styles[0]
    pictures = {"": tiny.picture(pipe)}
    for name in NAMES:
        with pipe.shira(name):
            pictures[name] = tiny.picture(pipe)
    assert not any(torch.equal(pictures[a], pictures[b]) for a in pictures for b in pictures if a < b)
    return pictures


def ends(work: Callable[[], Any]) -> Any:
    """What a function returns or raises, which is run in a thread so that a hang fails the test."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((work(), None))
        except BaseException as error:  # noqa: BLE001  # belongs to the test
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SOON)
    assert result, "it hangs"
    value, error = result[0]
    if error is not None:
        raise error
    return value


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    return ends(lambda: asyncio.run(asyncio.wait_for(main(), SOON)))


def drawn(pipe: StableDiffusionPipeline) -> Awaitable[Tensor]:
    return asyncio.to_thread(tiny.picture, pipe)


# ---------------------------------------------------------------- asyncio


def test_tasks_that_use_a_library_draw_their_own_styles(
    pipe: StableDiffusionPipeline, styles: tuple[StableDiffusionPipeline, Path], expected: dict[str, Tensor]
) -> None:
    fresh = tiny.pipeline()

    async def draw(library: AdapterLibrary, name: str) -> Tensor:
        async with library.use(fresh, {name: 1.0}) as used:
            assert used is fresh
            await asyncio.sleep(0.01)  # others get their turn in here
            return await drawn(fresh)

    async def main() -> list[Tensor]:
        with AdapterLibrary(styles[1], device="cpu") as library:
            return await asyncio.gather(*(draw(library, name) for name in NAMES * 2))

    for name, picture in zip(NAMES * 2, run(main), strict=True):
        assert torch.equal(picture, expected[name])
    assert fresh.get_active_shira() == {}
    assert torch.equal(tiny.picture(fresh), expected[""])


def test_tasks_that_use_a_pipeline_draw_their_own_styles(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    names = ("a", "", "b", "c")  # the base once: two generations at a time would share the pipeline's scheduler

    async def draw(name: str) -> Tensor:
        if not name:
            return await drawn(pipe)
        async with pipe.shira(name):
            await asyncio.sleep(0)
            return await drawn(pipe)

    async def main() -> list[Tensor]:
        return await asyncio.gather(*map(draw, names))

    for name, picture in zip(names, run(main), strict=True):
        assert torch.equal(picture, expected[name])


def test_a_plain_with_that_would_block_the_loop_is_refused(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    async def first(entered: asyncio.Event, leave: asyncio.Event) -> Tensor:
        with pipe.shira("a"):
            entered.set()
            await leave.wait()
            return await drawn(pipe)

    async def main() -> tuple[Tensor, Tensor]:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(first(entered, leave))
        await entered.wait()
        with pytest.raises(ResidentStateError, match=r"test_contexts.py:\d+ would block the event loop.*async with"):
            pipe.shira("b").__enter__()
        with pytest.raises(ResidentStateError, match=r"would block the event loop.*to_thread"):
            tiny.picture(pipe)
        leave.set()
        picture = await task
        with pipe.shira("b"):
            return picture, tiny.picture(pipe)

    one, two = run(main)
    assert torch.equal(one, expected["a"])
    assert torch.equal(two, expected["b"])


def test_tasks_started_inside_a_hold_belong_to_it_and_take_turns(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    async def draw(name: str) -> Tensor:
        async with pipe.shira(name):
            await asyncio.sleep(0.01)
            return await drawn(pipe)

    async def main() -> list[Tensor]:
        async with pipe.shira("a"):
            inner = await asyncio.gather(draw("b"), draw("c"))
            return [*inner, await drawn(pipe)]

    for name, picture in zip(("b", "c", "a"), run(main), strict=True):
        assert torch.equal(picture, expected[name])


def test_a_cancelled_wait_leaves_the_queue(pipe: StableDiffusionPipeline, expected: dict[str, Tensor]) -> None:
    async def enter(name: str) -> None:
        async with pipe.shira(name):
            raise AssertionError("it was cancelled before its turn")

    async def main() -> Tensor:
        async with pipe.shira("a"):
            waits = asyncio.create_task(enter("b"))
            other = contextvars.Context().run(asyncio.create_task, enter("c"))
            await asyncio.sleep(0.05)
            other.cancel()
            with pytest.raises(asyncio.CancelledError):
                await other
            waits.cancel()
        return await drawn(pipe)

    assert torch.equal(run(main), expected[""])


@pytest.mark.parametrize("by", ["pipeline", "library"])
def test_a_block_that_is_cancelled_ends_with_what_it_has_started(
    by: str, pipe: StableDiffusionPipeline, styles: tuple[StableDiffusionPipeline, Path], expected: dict[str, Tensor]
) -> None:
    """The thread draws on with the mix of the block; until it has ended nothing is put back, and nobody else enters."""
    fresh = tiny.pipeline()
    base, drawing, go_on = tiny.snapshot(fresh), threading.Event(), threading.Event()
    pictures: list[Tensor] = []

    def draw() -> None:
        def wait(*_: Any) -> dict[str, Any]:
            drawing.set()
            assert go_on.wait(SOON)
            with fresh.shira({}):  # what runs inside may switch, and its mix comes back
                assert fresh.get_active_shira() == {}
            return {}

        pictures.append(tiny.picture(fresh, on_step=wait))

    async def request(library: AdapterLibrary) -> None:
        async with fresh.shira("a") if by == "pipeline" else library.use(fresh, {"a": 1.0}):
            await asyncio.to_thread(draw)

    async def other() -> dict[str, Any]:
        async with fresh.shira({}):
            return fresh.get_active_shira()

    async def main() -> None:
        with AdapterLibrary(styles[1], device="cpu") as library:
            task = asyncio.create_task(request(library))
            await asyncio.to_thread(drawing.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert fresh.get_active_shira() == {"a": 1.0}
            waiting = asyncio.create_task(other())
            await asyncio.sleep(0.05)
            assert not waiting.done()
            go_on.set()
            assert await waiting == {}

    if by == "pipeline":
        fresh.load_shira(styles[1] / "a.safetensors", "a", activate=False)
    run(main)
    assert torch.equal(pictures[0], expected["a"])
    assert fresh.get_active_shira() == {}
    tiny.assert_same_bits(fresh, base)


def test_blocks_inside_of_each_other_that_are_left_end_in_their_order(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    drawing, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> dict[str, Any]:
        drawing.set()
        assert go_on.wait(SOON)
        return {}

    with ThreadPoolExecutor(1) as pool:
        with pipe.shira("a"), pipe.shira("b"):
            picture = pool.submit(contextvars.copy_context().run, tiny.picture, pipe, on_step=wait)
            assert drawing.wait(SOON)
        go_on.set()
        assert torch.equal(ends(picture.result), expected["b"])
    with pipe.shira({}):
        assert torch.equal(tiny.picture(pipe), expected[""])


def test_a_load_that_is_cancelled_keeps_nothing(styles: tuple[StableDiffusionPipeline, Path]) -> None:
    fresh = tiny.pipeline()

    async def use(library: AdapterLibrary) -> None:
        async with library.use(fresh, {"a": 1.0}):
            raise AssertionError("it was cancelled before its turn")

    async def main() -> None:
        with AdapterLibrary(styles[1], device="cpu") as library:
            async with Resident(fresh.unet).writing():
                task = contextvars.Context().run(asyncio.create_task, use(library))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            while library._store._wanted:  # until the file is read
                await asyncio.sleep(0.01)

    run(main)
    assert fresh.get_active_shira() == {}


def test_errors_put_the_mix_back(pipe: StableDiffusionPipeline, expected: dict[str, Tensor]) -> None:
    async def main() -> None:
        async with pipe.shira("a"):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(main)
    assert torch.equal(tiny.picture(pipe), expected[""])


def test_a_wait_without_an_end_is_warned_about(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``run_in_executor`` does not carry the context, so its thread is a stranger."""
    monkeypatch.setattr(locks, "PATIENCE", 0.1)

    async def main() -> tuple[Tensor, list[str]]:
        loop = asyncio.get_running_loop()
        with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(1) as pool:
            warnings.simplefilter("always")
            async with pipe.shira("a"):
                stuck = loop.run_in_executor(pool, tiny.picture, pipe)
                async with asyncio.timeout(SOON / 2):  # garbage is collected before, which may take a second
                    while not any(one.category is RuntimeWarning for one in caught):
                        await asyncio.sleep(0.05)
            picture = await stuck
        assert [one.filename for one in caught if one.category is RuntimeWarning] == [tiny.__file__]
        return picture, [str(one.message) for one in caught if one.category is RuntimeWarning]

    picture, told = run(main)
    assert torch.equal(picture, expected[""])
    assert len(told) == 1
    assert re.search(
        r"has waited for 0\.1 seconds: .*UNet2DConditionModel.* in use by .*test_contexts\.py:\d+", told[0]
    )
    assert "contextvars.copy_context().run" in told[0]


@pytest.mark.parametrize("awaits", [True, False])
def test_a_pool_whose_threads_all_wait_is_warned_about(
    awaits: bool, pipe: StableDiffusionPipeline, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What holds the model finds no thread to draw in, unless the others wait as coroutines."""
    monkeypatch.setattr(locks, "PATIENCE", 0.1)

    async def styled() -> Tensor:
        async with pipe.shira("a"):
            await asyncio.sleep(0.05)
            return await drawn(pipe)

    async def plain() -> Tensor:
        async with pipe.shira([]) if awaits else AsyncExitStack():
            return await drawn(pipe)

    async def main() -> list[Tensor]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        return await asyncio.wait_for(asyncio.gather(styled(), plain()), SOON if awaits else 1)

    if awaits:
        assert all(map(torch.equal, run(main), (expected["a"], expected[""])))
        return
    with pytest.warns(RuntimeWarning, match="a free thread of the pool.*`async with`"), pytest.raises(TimeoutError):
        run(main)


# ---------------------------------------------------------------- generators and threads


def two_pictures(pipe: StableDiffusionPipeline) -> Iterator[Tensor]:
    """Holds "a" from the first to the end."""
    with pipe.shira("a"):
        yield tiny.picture(pipe)
        yield tiny.picture(pipe)


def test_a_generator_may_be_resumed_in_another_thread(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        pictures = two_pictures(pipe)
        for pool in (one, two):
            assert torch.equal(ends(lambda pool=pool: pool.submit(next, pictures).result(SOON)), expected["a"])
        assert ends(lambda: two.submit(next, pictures, None).result(SOON)) is None


def test_other_jobs_of_a_pool_are_outside_of_a_suspended_generator(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    """It leaves its hold in the context of the thread that it was started in."""

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        pictures = two_pictures(pipe)
        assert torch.equal(one.submit(next, pictures).result(SOON), expected["a"])
        other = one.submit(tiny.picture, pipe)
        with pytest.raises(TimeoutError):
            other.result(0.3)
        assert torch.equal(two.submit(next, pictures).result(SOON), expected["a"])
        assert two.submit(next, pictures, None).result(SOON) is None
        assert torch.equal(other.result(SOON), expected[""])


def test_a_generator_that_is_dropped_leaves_its_hold(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    def stream() -> Iterator[Tensor]:
        with pipe.shira("a"):
            yield tiny.picture(pipe)

    pictures = stream()
    assert torch.equal(next(pictures), expected["a"])
    del pictures
    assert torch.equal(tiny.picture(pipe), expected[""])


def test_generators_in_turns_are_refused_and_leave_the_mix_before(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    def stream(name: str) -> Iterator[Tensor]:
        with pipe.shira(name):
            while True:
                yield tiny.picture(pipe)

    def work() -> None:
        one, two = stream("a"), stream("b")
        assert torch.equal(next(one), expected["a"])
        assert torch.equal(next(two), expected["b"])
        with pytest.raises(ResidentStateError, match=r"would deadlock.*another generator"):
            next(one)
        assert torch.equal(next(two), expected["b"])
        two.close()
        assert torch.equal(tiny.picture(pipe), expected[""])

    ends(work)


def test_helpers_that_are_generators_nest(pipe: StableDiffusionPipeline, expected: dict[str, Tensor]) -> None:
    @contextmanager
    def styled(name: str) -> Iterator[None]:
        with pipe.shira(name):
            yield

    def stream() -> Iterator[Tensor]:
        with styled("a"), styled("b"):
            yield tiny.picture(pipe)
        with styled("c"):
            yield tiny.picture(pipe)

    one, two = ends(lambda: list(stream()))
    assert torch.equal(one, expected["b"])
    assert torch.equal(two, expected["c"])


def test_entering_in_one_cell_and_drawing_in_the_next(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    """A notebook runs each cell in a task of its own, in the main thread."""
    entered = pipe.shira("a")

    async def cell(work: Callable[[], Any]) -> Any:
        return work()

    asyncio.run(cell(entered.__enter__))
    assert torch.equal(asyncio.run(cell(lambda: tiny.picture(pipe))), expected["a"])
    asyncio.run(cell(lambda: entered.__exit__(None, None, None)))
    assert torch.equal(tiny.picture(pipe), expected[""])


def test_a_hold_that_a_finished_task_entered_is_not_that_of_all_tasks(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    entered = pipe.shira("a")

    async def enter() -> None:
        await entered.__aenter__()

    async def main() -> None:
        await asyncio.create_task(enter())
        with pytest.raises(ResidentStateError, match="would block the event loop"):
            tiny.picture(pipe)
        await entered.__aexit__(None, None, None)

    asyncio.run(main())
    assert torch.equal(tiny.picture(pipe), expected[""])


def test_a_task_that_only_enters_is_refused(pipe: StableDiffusionPipeline) -> None:
    async def main() -> None:
        for stack in (AsyncExitStack(), None):
            entering = pipe.shira("a").__aenter__() if stack is None else stack.enter_async_context(pipe.shira("a"))
            with pytest.raises(ResidentStateError, match=r"expected `async with asyncio\.timeout"):
                await asyncio.create_task(entering)

    run(main)


def test_a_copied_context_carries_the_hold_into_any_thread(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    with ThreadPoolExecutor(1) as pool, pipe.shira("a"):
        picture = pool.submit(contextvars.copy_context().run, tiny.picture, pipe)
        assert torch.equal(picture.result(SOON), expected["a"])


def test_a_context_that_outlives_its_hold_is_outside(
    pipe: StableDiffusionPipeline, expected: dict[str, Tensor]
) -> None:
    with pipe.shira("a"):
        late = contextvars.copy_context()
    with ThreadPoolExecutor(1) as pool:
        with pipe.shira("b"):
            picture = pool.submit(late.run, tiny.picture, pipe)
            with pytest.raises(TimeoutError):
                picture.result(0.3)
        assert torch.equal(picture.result(SOON), expected[""])


# ---------------------------------------------------------------- a web server


def served(pipe: StableDiffusionPipeline) -> FastAPI:
    def styled(name: str) -> Iterator[StableDiffusionPipeline]:
        with pipe.shira(name):
            yield pipe

    async def styled_async(name: str) -> AsyncIterator[StableDiffusionPipeline]:
        async with pipe.shira(name):
            yield pipe

    app = FastAPI()

    @app.get("/plain")
    def plain(pipe: Annotated[StableDiffusionPipeline, Depends(styled)]) -> list[float]:
        return tiny.picture(pipe).flatten().tolist()

    @app.get("/async")
    def mixed(pipe: Annotated[StableDiffusionPipeline, Depends(styled_async)]) -> list[float]:
        return tiny.picture(pipe).flatten().tolist()

    @app.get("/awaited")
    async def awaited(pipe: Annotated[StableDiffusionPipeline, Depends(styled_async)]) -> list[float]:
        return (await drawn(pipe)).flatten().tolist()

    return app


@pytest.mark.parametrize("path", ["plain", "async", "awaited"])
def test_dependencies_that_yield(path: str, pipe: StableDiffusionPipeline, expected: dict[str, Tensor]) -> None:
    with TestClient(served(pipe)) as client, ThreadPoolExecutor(4) as visitors:
        names = NAMES * 2
        answers = ends(lambda: list(visitors.map(lambda name: client.get(f"/{path}?name={name}"), names)))
    for name, answer in zip(names, answers, strict=True):
        assert answer.status_code == 200
        assert torch.equal(torch.tensor(answer.json()), expected[name].flatten())

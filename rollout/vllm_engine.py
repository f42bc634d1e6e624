"""vLLM's two engines behind one small seam, `VllmEngine`. The only file that imports vllm, and it does so late.

`InProcessEngine` steps vLLM's synchronous engine in a thread of this process: the fastest start and the least memory
on a CPU. `AsyncEngine` drives `AsyncLLM`, whose engine has a process of its own, which nothing that this one does slows
down. Both batch continuously, and both answer callers of any event loop. Messages, text and seeds are not their
business: see `rollout.vllm_policy`.

Example::

    engine = start_engine(arguments, version="base", own_process=False)
    outputs = await engine.generate("r0", prompt_ids, {"max_tokens": 64, "temperature": 0.0})
    engine.close()
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rollout.concurrency import Pressure
from rollout.engine_cores import ReservedCores, pin_process, reserve_cores
from rollout.policy import EngineDiedError, PolicyError
from rollout.trajectory import FailureClass

_START_TIMEOUT_S = 1800.0
"""Loading a large model from a network disk takes minutes."""
_CLOSE_TIMEOUT_S = 60.0
_FOLLOW_S = 1.0
"""How often an engine's process looks whether its owner still lives."""
_process_is_taken = threading.Lock()
"""Held by the in-process engine: vLLM keeps its process groups in globals, so a process has one at a time."""


class VllmEngine(Protocol):
    """What `VllmPolicy` needs of vLLM. Coroutines may be awaited from any event loop."""

    async def generate(self, request_id: str, prompt_ids: Sequence[int], parameters: Mapping[str, Any]) -> list[Any]:
        """[n] vLLM `CompletionOutput`s; `parameters` are those of `SamplingParams`. Cancelling aborts the request."""
        ...

    async def prompt_logprobs(self, request_id: str, token_ids: Sequence[int], top_k: int) -> tuple[Any, Any]:
        """Ids int32 and log-probabilities float32, each [n - 1, 1 + top_k]: row i is of token i + 1 given those before
        it, that token itself first, then the `top_k` likeliest (which may be it again)."""
        ...

    async def load(self, path: str, version: str) -> None:
        """New weights in place; cached prefixes are dropped, running requests computed again."""
        ...

    async def forget_prefixes(self) -> None:
        """Drop the cached prefixes, as a measurement wants it; nothing may be running."""
        ...

    def running(self) -> int: ...

    def pressure(self) -> Pressure:
        """How full the KV cache is now."""
        ...

    def close(self) -> None:
        """Blocks until the engine has ended; may be called twice."""
        ...


class WorkerExtension:
    """Mixed into vLLM's worker by name, so that `collective_rpc` reaches it there."""

    model_runner: Any

    def follow(self, pid: int) -> None:
        """End this process, and the engine's core above it, once process `pid` has ended, even if it was killed: vLLM's
        own core would stay, and keep its GPUs."""
        threading.Thread(target=_end_with, args=(pid, os.getppid()), name="follow", daemon=True).start()

    def pin(self, cores: Sequence[int]) -> None:
        """All threads of the engine's process run on these cores alone."""
        pin_process(set(cores))

    def load_checkpoint(self, path: str) -> None:
        """Load a folder's weights in place."""
        from vllm.platforms import current_platform

        self.model_runner.reload_weights(weights_path=path)
        model = self.model_runner.get_model()
        tied = getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "lm_head")
        if current_platform.is_cpu() and tied and model.lm_head is not model.model.embed_tokens:
            # On a CPU the head's weights are packed when the model is loaded, and a reload packs only modules that
            # receive weights; a tied head receives none and would silently stay the old one.
            model.lm_head.weight = model.model.embed_tokens.weight
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _end_with(pid: int, parent: int) -> None:
    while _lives(pid):
        time.sleep(_FOLLOW_S)
    if parent != pid and os.getppid() == parent:
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)
    os._exit(1)


def _lives(pid: int) -> bool:
    """A process that has ended but was not waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start_engine(
    arguments: Mapping[str, Any], *, version: str, own_process: bool, own_cores: int = 0
) -> VllmEngine:
    """Load a model and block until it is ready. `arguments` are those of vLLM's `EngineArgs`.

    `own_cores`: cores that an engine in a process of its own gets for itself, where they can be spared.
    """
    _look_past_odd_objects()
    _spare_token_texts()
    arguments = {
        **arguments,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    return AsyncEngine(arguments, version, own_cores) if own_process else InProcessEngine(arguments, version)


def _look_past_odd_objects() -> None:
    """vLLM 0.32 looks for kernels in every loaded module and trips over objects that do not like to be looked at:
    llvmlite's library (numba, and so BM25), whose `__dict__` is none, and Flask's proxies, which raise.

    It matters where such a module was imported before the engine starts in the same process.
    """
    from vllm.triton_utils import dispatcher

    def safe_vars(value: Any) -> Mapping[str, Any]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    def safe_hasattr(value: Any, name: str) -> bool:
        try:
            return hasattr(value, name)
        except Exception:
            return False

    for name, safe in (("vars", safe_vars), ("hasattr", safe_hasattr)):
        setattr(dispatcher, name, safe)  # shadows the built-in in that module alone


def _spare_token_texts() -> None:
    """vLLM decodes each sampled token by itself once log-probabilities are asked for, to tell its text beside them.

    Here only the ids are read, and on a CPU that decoding is a tenth of the engine's time.
    """
    from vllm.v1.engine import logprobs

    def no_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
        return [""] * len(token_ids)

    setattr(logprobs, "convert_ids_list_to_tokens", no_texts)  # noqa: B010  (a name that this module imports)


def failure_class(error: Exception) -> FailureClass:
    """Whose fault an exception of `generate` is: a request that vLLM refuses is bad input, all else the engine's."""
    from vllm.exceptions import VLLMClientError

    return FailureClass.INPUT if isinstance(error, VLLMClientError | ValueError) else FailureClass.ENGINE


def _scoring_parameters(top_k: int) -> dict[str, Any]:
    return {
        "max_tokens": 1,  # vLLM does no less
        "temperature": 0.0,
        "prompt_logprobs": top_k,
        "flat_logprobs": True,
        "detokenize": False,
    }


def _scored(output: Any, token_ids: Sequence[int], top_k: int) -> tuple[Any, Any]:
    """The prompt's log-probabilities as arrays."""
    import numpy as np

    flat = output.prompt_logprobs
    shape = (len(token_ids) - 1, 1 + top_k)
    if flat is None or len(flat.token_ids) != shape[0] * shape[1]:
        got = "none" if flat is None else str(len(flat.token_ids))
        raise PolicyError(
            f"vLLM returned {got} log-probabilities of {len(token_ids)} tokens, not {shape[0]} x {shape[1]}"
        )
    ids = np.asarray(flat.token_ids, np.int32).reshape(shape)
    return ids, np.asarray(flat.logprobs, np.float32).reshape(shape)


def _sampling_parameters(parameters: Mapping[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**parameters, output_kind=RequestOutputKind.FINAL_ONLY)


class InProcessEngine:
    """vLLM's synchronous engine, stepped by one thread that alone touches it.

    Consumes calls from an inbox, between two steps; produces results through futures. Waits for calls when idle.
    Whatever ends the thread fails every future, so nobody waits for a dead engine.
    """

    def __init__(self, arguments: Mapping[str, Any], version: str) -> None:
        if not _process_is_taken.acquire(blocking=False):
            raise RuntimeError("this process runs a vLLM engine already; close it, or use one process for each")
        self._inbox: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None]
        self._inbox = queue.SimpleQueue()
        self._results: dict[str, concurrent.futures.Future[Any]] = {}
        self._lock = threading.Lock()
        self._dead = ""
        self._engine: Any = None
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(arguments, version, started), name="vllm-engine", daemon=True
        )
        self._thread.start()
        started.result(_START_TIMEOUT_S)

    async def generate(self, request_id: str, prompt_ids: Sequence[int], parameters: Mapping[str, Any]) -> list[Any]:
        return (await self._request(request_id, prompt_ids, parameters)).outputs

    async def prompt_logprobs(self, request_id: str, token_ids: Sequence[int], top_k: int) -> tuple[Any, Any]:
        return _scored(await self._request(request_id, token_ids, _scoring_parameters(top_k)), token_ids, top_k)

    async def _request(self, request_id: str, prompt_ids: Sequence[int], parameters: Mapping[str, Any]) -> Any:
        sampling = _sampling_parameters(parameters)
        result = _uncancellable()

        def add() -> None:
            self._results[request_id] = result
            try:
                self._engine.add_request(request_id, {"prompt_token_ids": list(prompt_ids)}, sampling)
            except BaseException:
                del self._results[request_id]
                raise

        added = self._submit(add)
        try:
            await asyncio.wrap_future(added)
            return await asyncio.wrap_future(result)
        except asyncio.CancelledError:
            with contextlib.suppress(PolicyError):
                self._submit(lambda: self._abort(request_id))
            raise

    async def load(self, path: str, version: str) -> None:
        def update() -> None:
            self._engine.collective_rpc("load_checkpoint", args=(path,))
            self._engine.reset_prefix_cache(reset_running_requests=True)
            self._engine.set_weight_version(version)

        await asyncio.wrap_future(self._submit(update))

    async def forget_prefixes(self) -> None:
        await asyncio.wrap_future(self._submit(lambda: self._engine.reset_prefix_cache()))

    def running(self) -> int:
        return len(self._results)

    def pressure(self) -> Pressure:
        engine = self._engine  # read from any thread: whole numbers that may be a step old
        if engine is None:
            return Pressure(kv_usage=0.0, waiting=0)
        scheduler = engine.engine_core.engine_core.scheduler
        return Pressure(kv_usage=scheduler.get_kv_cache_usage(), waiting=scheduler.get_request_counts()[1])

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _submit(self, call: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        future = _uncancellable()
        with self._lock:  # the thread sets `_dead` under it: what is put before that is still answered
            if self._dead:
                raise EngineDiedError(self._dead)
            self._inbox.put((future, call))
        return future

    def _abort(self, request_id: str) -> None:
        if self._results.pop(request_id, None) is not None:
            self._engine.abort_request([request_id])

    def _run(self, arguments: Mapping[str, Any], version: str, started: concurrent.futures.Future[None]) -> None:
        try:
            import torch
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # counts per thread, hence here
            self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
            self._engine.set_weight_version(version)
        except BaseException as error:
            _process_is_taken.release()
            started.set_exception(error)
            return
        started.set_result(None)
        reason = "the engine was closed"
        try:
            while self._serve():
                pass
        except BaseException as error:
            reason = f"the vLLM engine died: {type(error).__name__}: {error}"
        self._end(reason)

    def _serve(self) -> bool:
        """Answer the calls that are there (waiting for one if nothing runs), then do one step. False: close."""
        wait = not self._engine.has_unfinished_requests()
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                break
            if item is None:
                return False
            future, call = item
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
            wait = False
        if self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished and (result := self._results.pop(output.request_id, None)) is not None:
                    result.set_result(output)
        return True

    def _end(self, reason: str) -> None:
        with self._lock:
            self._dead = reason
        waiting = list(self._results.values())
        self._results.clear()
        while not self._inbox.empty():
            if (item := self._inbox.get()) is not None:
                waiting.append(item[0])
        for future in waiting:
            future.set_exception(EngineDiedError(reason))
        with contextlib.suppress(Exception):  # it is over either way
            # This also ends vLLM's process groups, which is why a process has one engine at a time.
            self._engine.engine_core.shutdown()
        self._engine = None
        _process_is_taken.release()


class AsyncEngine:
    """vLLM's `AsyncLLM` on an event loop and a thread of its own, so that any loop may use it and none is blocked.

    Its core is a process that ends with this one.
    """

    def __init__(self, arguments: Mapping[str, Any], version: str, own_cores: int = 0) -> None:
        self._running = 0
        self._cores: ReservedCores | None = None
        self._pressure = Pressure(kv_usage=0.0, waiting=0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-client", daemon=True)
        self._thread.start()
        try:
            self._engine: Any = self._there(self._start(arguments, version)).result(_START_TIMEOUT_S)
            self._cores = reserve_cores(own_cores)
            if self._cores is not None:
                pinned = self._engine.collective_rpc("pin", args=(self._cores.numbers,))
                self._there(pinned).result(_CLOSE_TIMEOUT_S)
        except BaseException:
            self._stop_loop()
            raise

    async def generate(self, request_id: str, prompt_ids: Sequence[int], parameters: Mapping[str, Any]) -> list[Any]:
        return (await self._request(request_id, prompt_ids, parameters)).outputs

    async def prompt_logprobs(self, request_id: str, token_ids: Sequence[int], top_k: int) -> tuple[Any, Any]:
        return _scored(await self._request(request_id, token_ids, _scoring_parameters(top_k)), token_ids, top_k)

    async def _request(self, request_id: str, prompt_ids: Sequence[int], parameters: Mapping[str, Any]) -> Any:
        self._running += 1
        try:
            return await asyncio.wrap_future(self._there(self._generate(request_id, prompt_ids, parameters)))
        finally:
            self._running -= 1

    async def load(self, path: str, version: str) -> None:
        await asyncio.wrap_future(self._there(self._load(path, version)))

    async def forget_prefixes(self) -> None:
        await asyncio.wrap_future(self._there(self._engine.reset_prefix_cache()))

    def running(self) -> int:
        return self._running

    def pressure(self) -> Pressure:
        return self._pressure

    def close(self) -> None:
        if self._loop.is_running():
            with contextlib.suppress(Exception):  # it is over either way
                self._there(self._shutdown()).result(_CLOSE_TIMEOUT_S)
            self._stop_loop()
        if self._cores is not None:
            self._cores.release()

    def _there(self, coroutine: Any) -> concurrent.futures.Future[Any]:
        """Cancelling the future cancels the coroutine."""
        if not self._loop.is_running():
            coroutine.close()
            raise EngineDiedError("the engine was closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)

    async def _start(self, arguments: Mapping[str, Any], version: str) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[self._stat_logger()])
        await engine.collective_rpc("follow", args=(os.getpid(),))
        await engine.update_weight_version(version)
        return engine

    def _stat_logger(self) -> Any:
        """What vLLM tells its statistics to, made as vLLM asks for it."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        owner = self

        class LatestPressure(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
                if scheduler_stats is not None:
                    owner._pressure = Pressure(
                        kv_usage=scheduler_stats.kv_cache_usage, waiting=scheduler_stats.num_waiting_reqs
                    )

            def log_engine_initialized(self) -> None:
                pass

        return LatestPressure

    async def _generate(self, request_id: str, prompt_ids: Sequence[int], parameters: Mapping[str, Any]) -> Any:
        final, prompt = None, {"prompt_token_ids": list(prompt_ids)}
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async for output in self._engine.generate(prompt, _sampling_parameters(parameters), request_id):
                final = output
        except EngineDeadError as error:
            raise EngineDiedError("the vLLM engine's process died") from error
        if final is None:
            raise PolicyError(f"vLLM ended request {request_id} without an output")
        return final

    async def _load(self, path: str, version: str) -> None:
        await self._engine.pause_generation(mode="keep")
        try:
            await self._engine.collective_rpc("load_checkpoint", args=(path,))
            await self._engine.update_weight_version(version)
            await self._engine.reset_prefix_cache(reset_running_requests=True)
        finally:
            await self._engine.resume_generation()

    async def _shutdown(self) -> None:
        self._engine.shutdown()
        self._engine = None
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


def _uncancellable() -> concurrent.futures.Future[Any]:
    """A future that only the engine's thread settles; a waiter that gives up leaves it as it is."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    return future

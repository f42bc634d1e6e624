"""`VllmPolicy`: a model on vLLM, in this process, behind the `Policy` seam; the engine is in `rollout.vllm_engine`.

Token-exact: the prompt is `rollout.rendering.Renderer`'s, sampled ids are kept as they came, and text is what those
ids decode to. The engine is `AsyncLLM`, in a process of its own that nothing slows down, or (on a CPU) vLLM's
synchronous one, stepped by one thread of this process: it starts faster and takes less memory, but every Python
instruction of its callers holds it up. Both batch continuously.

It is no server: to share a model between machines start vLLM's own and use `rollout.openai_policy`.

Example::

    policy = VllmPolicy("runs/student", dtype="bfloat16", max_model_len=1024, max_num_seqs=128)
    [completion] = await policy.complete(messages, Sampling(max_tokens=64, stop=("<end_code>",)))
    await policy.update_weights("runs/student-step-200", "step-200")
    await policy.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from rollout.concurrency import Pressure
from rollout.policy import PolicyError, Sampling
from rollout.rendering import Renderer, RenderingError
from rollout.sampled_turn import sampled_turn
from rollout.shared_decoding import MOST_TOP_K, Decoded, Ids, TurnEnds, sample_shared
from rollout.trajectory import Completion, FailureClass, Message
from rollout.vllm_engine import VllmEngine, failure_class, start_engine

EngineKind = Literal["auto", "in_process", "own_process"]
MOST_SCORED = 64
"""The most log-probabilities a token of an engine for scoring: vLLM makes Python objects of all of them."""
_UPDATE_TIMEOUT_S = 600.0
_SHAPE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
"""Fields of config.json that new weights must share with the running model's."""


def vllm_environment() -> dict[str, str]:
    """Variables to set before a process imports vllm, as in a Ray actor's `runtime_env`; telemetry is off.

    `OMP_NUM_THREADS` is left to whoever shares out the cores (Ray sets it from `num_cpus`); it is 1 where nobody did.
    """
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds every engine of a machine to the same core
        "TOKENIZERS_PARALLELISM": "false",
    }


def _prepare_process() -> bool:
    """Set what must be set before vllm is imported, unless the caller did; True when there is a GPU."""
    environment = {**vllm_environment(), "OMP_NUM_THREADS": "1"}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        # One process; and no compiler: the first request for log-probabilities would need one.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if "vllm" not in sys.modules:
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    return gpu


class VllmPolicy:
    """A Hugging Face model (id or folder) on vLLM; building it loads the model and blocks.

    On a CPU `kv_cache_bytes` defaults to what `max_num_seqs` full sequences need, a quarter of the free memory at
    most; `gpu_memory_utilization`, the parallel sizes and `enforce_eager` are for GPUs, which always have an engine in
    a process of its own. `engine` says where a CPU's is; "auto": in this process. `scoring_chunk_tokens` makes it an
    engine for `score`: vLLM does not count the memory of a prompt's log-probabilities (about 12 bytes x vocabulary a
    token), so that no more tokens than these are computed at once. Raises `PolicyError` when the model cannot be loaded
    or its tokenizer cannot be rendered exactly.
    """

    def __init__(
        self,
        model: str,
        *,
        name: str | None = None,
        dtype: str = "auto",
        max_model_len: int = 4096,
        max_num_seqs: int = 64,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        distributed_executor: str | None = None,
        enforce_eager: bool = False,
        engine: EngineKind = "auto",
        weights_version: str = "",
        scoring_chunk_tokens: int | None = None,
    ) -> None:
        if engine not in get_args(EngineKind):
            raise ValueError(f"engine {engine!r} is unknown; there are {', '.join(get_args(EngineKind))}")
        self.name = name or model
        self.weights_version = weights_version
        self._max_model_len = max_model_len
        gpu = _prepare_process()
        arguments: dict[str, Any] = {
            "model": model,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "enable_prefix_caching": True,
        }
        try:
            from transformers import AutoConfig, AutoTokenizer

            self._renderer = Renderer(AutoTokenizer.from_pretrained(model))
            config = AutoConfig.from_pretrained(model)
            self._stop_token_ids = _stop_token_ids(model, self._renderer)
            self._shape = {field: getattr(config, field, None) for field in _SHAPE_FIELDS}
            if gpu:
                arguments |= {
                    "gpu_memory_utilization": gpu_memory_utilization,
                    "tensor_parallel_size": tensor_parallel_size,
                    "pipeline_parallel_size": pipeline_parallel_size,
                    "distributed_executor_backend": distributed_executor,
                    "enforce_eager": enforce_eager,
                    "kv_cache_memory_bytes": kv_cache_bytes,
                }
            else:
                arguments |= _cpu_arguments(config, dtype, max_model_len, max_num_seqs, kv_cache_bytes)
            if scoring_chunk_tokens is not None:
                arguments |= {
                    "enable_chunked_prefill": True,  # on a CPU too: a scored row has no seed
                    "max_num_batched_tokens": max(scoring_chunk_tokens, max_num_seqs),
                    "max_logprobs": MOST_SCORED,
                }
            own_process = gpu or engine == "own_process"
            self._engine: VllmEngine = start_engine(
                arguments,
                version=weights_version,
                own_process=own_process,
                own_cores=0 if gpu else int(os.environ["OMP_NUM_THREADS"]),
            )
        except Exception as error:
            raise PolicyError(f"cannot load {model!r} on vLLM: {error}", FailureClass.INPUT) from error
        self._request_numbers = itertools.count()
        self._requests = self._prompt_tokens = self._generated_tokens = 0

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        """`sampling.n` turns; greedy ones are copies of one, sampled ones share their prefill, and with a `top_k` of at
        most 20 all that they have in common (`rollout.shared_decoding`).

        `max_tokens` is cut to the room that the model has left (finish reason "length"). The same seed and prompt
        sample the same tokens on the same engine, up to the rounding that another batch composition brings.
        Log-probabilities are the model's own, before temperature and top-p. A stop string that ends inside a token
        leaves ids that say more than the text: then `token_ids` is None.

        Raises `PolicyError`: LIMIT when the prompt leaves no room, INPUT when it cannot be rendered, ENGINE for a
        timeout or a dead engine. Cancelling it takes the request out of the engine.
        """
        try:
            prompt_ids = self._renderer.prompt(messages, prefix)
            prefix_ids = prompt_ids[len(self._renderer.prompt(messages)) :] if prefix else ()
        except RenderingError as error:
            raise PolicyError(str(error), FailureClass.INPUT) from error
        room = self._max_model_len - len(prompt_ids)
        if room < 1:
            raise PolicyError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room in max_model_len={self._max_model_len}",
                FailureClass.LIMIT,
            )
        version = self.weights_version
        try:
            async with asyncio.timeout(sampling.timeout_s):
                sampled = await self._sample(prompt_ids, sampling, room)
        except PolicyError:
            raise
        except TimeoutError as error:
            raise PolicyError(f"{self.name}: no completion within timeout_s={sampling.timeout_s:g}") from error
        except Exception as error:
            raise PolicyError(f"{self.name}: {type(error).__name__}: {error}", failure_class(error)) from error
        return [self._completion(decoded, prefix, prefix_ids, prompt_ids, version) for decoded in sampled]

    async def _sample(self, prompt_ids: Ids, sampling: Sampling, room: int) -> list[Decoded]:
        parameters = self._parameters(sampling, room=room)
        if sampling.n == 1 or sampling.temperature <= 0:
            [only] = await self._generate(prompt_ids, {**parameters, "n": 1})
            return [only, *itertools.repeat(replace(only, shared=len(only.token_ids)), sampling.n - 1)]
        if not 0 < sampling.top_k <= MOST_TOP_K:
            return await self._generate(prompt_ids, parameters)
        limit = parameters["max_tokens"]

        async def decode(so_far: Ids, *, branch: str, top: bool) -> Decoded:
            changes = {
                "n": 1,
                "max_tokens": limit - len(so_far),
                "seed": None if sampling.seed is None else _spread(f"{sampling.seed}{branch}"),
            }
            if top:
                changes |= {"logprobs": max(sampling.top_k, sampling.top_logprobs), "flat_logprobs": True}
            [decoded] = await self._generate(prompt_ids + so_far, {**parameters, **changes})
            return decoded

        return await sample_shared(
            decode,
            n=sampling.n,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            ends=TurnEnds(
                decode=lambda ids: self._renderer.tokenizer.decode(list(ids), skip_special_tokens=True),
                stop_token_ids=self._stop_token_ids,
                stop=sampling.stop,
                max_tokens=limit,
            ),
            keep_top=sampling.top_logprobs,
        )

    async def _generate(self, prompt_ids: Ids, parameters: dict[str, Any]) -> list[Decoded]:
        self._requests += 1
        self._prompt_tokens += len(prompt_ids)
        outputs = await self._engine.generate(f"r{next(self._request_numbers)}", prompt_ids, parameters)
        self._generated_tokens += sum(len(output.token_ids) for output in outputs)
        return [_decoded(output, parameters["logprobs"]) for output in outputs]

    @property
    def tokenizer(self) -> Any:
        """Of the model; a transformers tokenizer."""
        return self._renderer.tokenizer

    async def score(self, token_ids: Sequence[int], top_k: int = 0, *, timeout_s: float = 120.0) -> tuple[Any, Any]:
        """The model's log-probabilities of given tokens: ids int32 and values float32, each [n - 1, 1 + top_k].

        Row i is of token i + 1 given those before it: that token itself first, then the `top_k` likeliest, which may be
        it again. Raises `PolicyError`: LIMIT for a row that has no room, INPUT for one that vLLM refuses.
        """
        if not 2 <= len(token_ids) < self._max_model_len:
            raise PolicyError(
                f"a row of {len(token_ids)} tokens cannot be scored: 2 to {self._max_model_len - 1} fit "
                f"max_model_len={self._max_model_len}",
                FailureClass.LIMIT,
            )
        try:
            async with asyncio.timeout(timeout_s):
                return await self._engine.prompt_logprobs(f"s{next(self._request_numbers)}", token_ids, top_k)
        except PolicyError:
            raise
        except TimeoutError as error:
            raise PolicyError(f"{self.name}: no scores within timeout_s={timeout_s:g}") from error
        except Exception as error:
            raise PolicyError(f"{self.name}: {type(error).__name__}: {error}", failure_class(error)) from error

    async def update_weights(self, path: str, version: str) -> None:
        """Load the weights of a Hugging Face folder of the same shape in place.

        Running requests go on with the new ones; their completions carry the version that they began with. Raises
        `PolicyError`; when loading itself failed the engine is ended, since half of it may be new.
        """
        self._check_folder(Path(path))
        try:
            async with asyncio.timeout(_UPDATE_TIMEOUT_S):
                await self._engine.load(str(path), version)
        except PolicyError:
            raise
        except Exception as error:
            await self.close()
            raise PolicyError(f"{self.name}: loading the weights of {path} failed: {error!r}") from error
        self.weights_version = version

    async def forget_prefixes(self) -> None:
        """Drop the cached prefixes, so that what is measured next finds none of an earlier run."""
        await self._engine.forget_prefixes()

    def pressure(self) -> Pressure:
        """How full the engine's KV cache is: what `rollout.concurrency` goes by."""
        return self._engine.pressure()

    def stats(self) -> dict[str, float]:
        """Since the start: requests, prompt_tokens, generated_tokens; now: running (requests)."""
        return {
            "requests": self._requests,
            "prompt_tokens": self._prompt_tokens,
            "generated_tokens": self._generated_tokens,
            "running": self._engine.running(),
        }

    async def close(self) -> None:
        """End the engine and its thread; whoever waits gets a `PolicyError`. May be called twice."""
        await asyncio.to_thread(self._engine.close)

    def _parameters(self, sampling: Sampling, *, room: int) -> dict[str, Any]:
        return {
            "n": sampling.n,
            "temperature": max(sampling.temperature, 0.0),
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": min(sampling.max_tokens, room),
            "stop": list(sampling.stop) or None,
            "include_stop_str_in_output": True,
            "stop_token_ids": [self._renderer.stop_token_id],
            # vLLM gives candidate i the seed + i: neighbouring seeds must not share candidates.
            "seed": None if sampling.seed is None else _spread(sampling.seed),
            "logprobs": sampling.top_logprobs or (0 if sampling.logprobs else None),
            "flat_logprobs": True,  # three lists instead of an object for each token
            "detokenize": bool(sampling.stop),  # only stop strings need the engine's text
        }

    def _completion(self, decoded: Decoded, prefix: str, prefix_ids: Ids, prompt_ids: Ids, version: str) -> Completion:
        text, ids = sampled_turn(
            self._renderer.tokenizer,
            prefix=prefix,
            prefix_ids=prefix_ids,
            sampled=decoded.token_ids,
            stop=decoded.stop,
        )
        top_ids, top_logprobs = decoded.top or (None, None)
        return Completion(
            text=text,
            token_ids=ids,
            logprobs=decoded.logprobs,
            top_ids=None if top_ids is None else tuple(top_ids.ravel().tolist()),
            top_logprobs=None if top_logprobs is None else tuple(top_logprobs.ravel().tolist()),
            finish_reason=decoded.finish_reason,
            weights_version=version,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(decoded.token_ids),
            prompt_ids=prompt_ids,
            prefix_by="tokens" if prefix else "",
            shared_tokens=decoded.shared,
        )

    def _check_folder(self, folder: Path) -> None:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PolicyError(f"{folder} is no Hugging Face model folder: {error}", FailureClass.INPUT) from error
        if not any(folder.glob("*.safetensors")):
            raise PolicyError(f"{folder} holds no *.safetensors file", FailureClass.INPUT)
        for field, mine in self._shape.items():
            if field in config and config[field] != mine:
                raise PolicyError(
                    f"{folder} has {field}={config[field]}, the running model {mine}: weights of another shape",
                    FailureClass.INPUT,
                )


def _cpu_arguments(
    config: Any, dtype: str, max_model_len: int, max_num_seqs: int, kv_cache_bytes: int | None
) -> dict[str, Any]:
    return {
        "enforce_eager": True,  # compiling takes longer than it saves, and a compiler
        # A partial prefill of a seeded request ends the engine (torch's CPU generator has no offset to set back), so
        # prompts are computed whole, which they are soon enough.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, 4096),
        "block_size": 64,  # the default of 128 shares fewer prefixes of short turns
        "kv_cache_memory_bytes": kv_cache_bytes or _kv_cache_bytes(config, dtype, max_model_len, max_num_seqs),
    }


def _kv_cache_bytes(config: Any, dtype: str, max_model_len: int, max_num_seqs: int) -> int:
    """Room for `max_num_seqs` full sequences, a quarter of the free memory at most, two sequences at least."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    sequence = values * (4 if dtype == "float32" else 2) * (max_model_len + 128)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(min(sequence * max_num_seqs, free // 4), sequence * 2)


def _decoded(output: Any, top_k: int | None) -> Decoded:
    """One of vLLM's outputs. Its flat log-probabilities have, for each position, the sampled token's, then the
    `top_k` likeliest tokens'."""
    logprobs = top = None
    if top_k is not None:
        flat = output.logprobs
        logprobs = tuple(flat.logprobs[start] for start in flat.start_indices)
        if top_k:
            import numpy as np

            shape = (len(output.token_ids), top_k + 1)
            top = (
                np.asarray(flat.token_ids, np.int64).reshape(shape)[:, 1:],
                np.asarray(flat.logprobs, np.float64).reshape(shape)[:, 1:],
            )
    stop = output.stop_reason if isinstance(output.stop_reason, str) else None
    return Decoded(
        token_ids=tuple(output.token_ids), logprobs=logprobs, finish_reason=output.finish_reason, stop=stop, top=top
    )


def _stop_token_ids(model: str, renderer: Renderer) -> frozenset[int]:
    """The ids that end a turn in vLLM: the template's stop token, and those of the model's generation settings."""
    from transformers import GenerationConfig

    ids = {renderer.stop_token_id, renderer.tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # a model need not have any
        ends = GenerationConfig.from_pretrained(model).eos_token_id
        ids |= set(ends if isinstance(ends, list) else [ends])
    return frozenset(ids - {None})


def _spread(seed: int | str) -> int:
    """31 bits far from those of `seed + 1`."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big") >> 1

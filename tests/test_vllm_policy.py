"""`rollout.vllm_policy` on a real engine with a tiny random model, against transformers where numbers must agree."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

pytest.importorskip("vllm")

from rollout.policy import PolicyError, Sampling  # noqa: E402
from rollout.rendering import Renderer  # noqa: E402
from rollout.trajectory import Completion, FailureClass, Message  # noqa: E402
from rollout.vllm_policy import VllmPolicy  # noqa: E402

pytestmark = pytest.mark.timeout(180)

MAX_MODEL_LEN = 512
MESSAGES = [Message(role="system", content="You act."), Message(role="user", content="What is 6 * 7?")]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
T = TypeVar("T")


def write_model(folder: Path, *, seed: int, hidden_size: int = 64) -> Path:
    """A random Qwen2 with tied embeddings in float32, and a byte-level tokenizer of 320 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Thought: the answer is print the value of the number and return it"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.2,  # wide, so that what is most likely does not hang on rounding
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape."""
    root = tmp_path_factory.mktemp("models")
    return write_model(root / "a", seed=0), write_model(root / "b", seed=1)


class Started:
    """One engine for the file; a test that ends it costs the next one a start."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._policy: VllmPolicy | None = None

    def policy(self) -> VllmPolicy:
        if self._policy is None:
            self._policy = VllmPolicy(
                str(self._model), name="tiny", dtype="float32", max_model_len=MAX_MODEL_LEN, weights_version="a"
            )
        return self._policy

    def end(self) -> None:
        if self._policy is not None:
            asyncio.run(self._policy.close())
            self._policy = None


@pytest.fixture(scope="module")
def started(folders: tuple[Path, Path]) -> Iterator[Started]:
    started = Started(folders[0])
    yield started
    started.end()


@pytest.fixture
def policy(started: Started) -> VllmPolicy:
    return started.policy()


@pytest.fixture(scope="module")
def renderer(folders: tuple[Path, Path]) -> Renderer:
    from transformers import AutoTokenizer

    return Renderer(AutoTokenizer.from_pretrained(folders[0]))


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(coroutine, 120)

    return asyncio.run(limited())


def complete(policy: VllmPolicy, sampling: Sampling, prefix: str = "") -> list[Completion]:
    return run(policy.complete(MESSAGES, sampling, prefix=prefix))


def token_ids(completion: Completion) -> tuple[int, ...]:
    assert completion.token_ids is not None
    return completion.token_ids


def reference_logprobs(folder: Path, ids: Sequence[int]) -> Any:
    """[len(ids) - 1, vocabulary] log-probabilities of each next token, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0, :-1].log_softmax(-1)


def assert_greedy(folder: Path, prompt: Sequence[int], sampled: Sequence[int]) -> None:
    logprobs = reference_logprobs(folder, [*prompt, *sampled])
    assert logprobs[len(prompt) - 1 :].argmax(-1).tolist() == list(sampled)


def test_greedy_tokens_are_those_of_transformers(
    policy: VllmPolicy, renderer: Renderer, folders: tuple[Path, Path]
) -> None:
    [completion] = complete(policy, Sampling(max_tokens=24))
    prompt = renderer.prompt(MESSAGES)
    assert_greedy(folders[0], prompt, token_ids(completion))
    assert completion.prompt_tokens == len(prompt)
    assert completion.completion_tokens == len(token_ids(completion)) == 24
    assert completion.finish_reason == "length"
    assert completion.text == renderer.tokenizer.decode(token_ids(completion), skip_special_tokens=True)


def test_logprobs_are_the_models_own_before_temperature(
    policy: VllmPolicy, renderer: Renderer, folders: tuple[Path, Path]
) -> None:
    [completion] = complete(policy, Sampling(max_tokens=24, temperature=0.7, seed=5, logprobs=True))
    prompt, sampled = renderer.prompt(MESSAGES), token_ids(completion)
    expected = reference_logprobs(folders[0], [*prompt, *sampled])[len(prompt) - 1 :]
    assert completion.logprobs == pytest.approx(
        [expected[i, token].item() for i, token in enumerate(sampled)], abs=1e-3
    )


def test_candidates_differ_and_a_seed_brings_them_back(policy: VllmPolicy) -> None:
    sampling = Sampling(n=4, max_tokens=12, temperature=1.0, seed=7)
    first, second = complete(policy, sampling), complete(policy, sampling)
    assert [token_ids(each) for each in first] == [token_ids(each) for each in second]
    assert len({token_ids(each) for each in first}) == 4


def test_neighbouring_seeds_share_no_candidate(policy: VllmPolicy) -> None:
    candidates = [
        {token_ids(each) for each in complete(policy, Sampling(n=4, max_tokens=12, temperature=1.0, seed=seed))}
        for seed in (7, 8)
    ]
    assert not candidates[0] & candidates[1]


def test_many_seeded_requests_at_once_sample_what_they_sample_alone(policy: VllmPolicy) -> None:
    """On a CPU a seeded request whose prefill is split would end the engine: 40 long prompts would split it."""
    long = [[Message(role="user", content=f"{i} is the number " * 12)] for i in range(40)]
    sampling = Sampling(max_tokens=4, temperature=1.0, seed=3)

    async def together() -> list[list[Completion]]:
        return await asyncio.gather(*(policy.complete(messages, sampling) for messages in long))

    at_once = run(together())
    for i in (0, 39):
        [alone] = run(policy.complete(long[i], sampling))
        assert token_ids(at_once[i][0]) == token_ids(alone)


def test_candidates_that_share_their_decoding_are_sampled_as_if_they_did_not(
    policy: VllmPolicy, renderer: Renderer, folders: tuple[Path, Path]
) -> None:
    """The first two tokens of 1,200 candidates against the probabilities that transformers gives; five sigma."""
    n, prompt = 1200, renderer.prompt(MESSAGES)
    before = policy.stats()["generated_tokens"]
    sampling = Sampling(n=n, max_tokens=2, temperature=0.8, top_k=4, top_p=0.9, seed=3, logprobs=True)
    candidates = complete(policy, sampling)
    firsts = Counter(token_ids(each)[0] for each in candidates)
    chances = sampled_from(reference_logprobs(folders[0], [*prompt, 0])[-1], sampling)
    assert_counts(firsts, chances, n)
    first, count = firsts.most_common(1)[0]
    seconds = Counter(token_ids(each)[1] for each in candidates if token_ids(each)[0] == first)
    assert_counts(seconds, sampled_from(reference_logprobs(folders[0], [*prompt, first, 0])[-1], sampling), count)
    for each in candidates[:8] + candidates[-8:]:
        ids = token_ids(each)
        rows = reference_logprobs(folders[0], [*prompt, *ids])[len(prompt) - 1 :]
        assert each.logprobs == pytest.approx([rows[i, token].item() for i, token in enumerate(ids)], abs=1e-3)
    tree = {token_ids(each)[:length] for each in candidates for length in (1, 2)}
    assert policy.stats()["generated_tokens"] - before <= len(tree) < 2 * n
    assert sum(each.completion_tokens - each.shared_tokens for each in candidates) == len(tree)
    assert [token_ids(each) for each in complete(policy, sampling)] == [token_ids(each) for each in candidates]


def sampled_from(logprobs: Any, sampling: Sampling) -> dict[int, float]:
    """Token -> probability after temperature, top-k and top-p, by their definitions."""
    likeliest = logprobs.topk(sampling.top_k)
    chances = (likeliest.values.double() / sampling.temperature).softmax(-1).tolist()
    kept = next(i for i in range(1, sampling.top_k + 1) if sum(chances[:i]) >= sampling.top_p)
    return {
        int(token): chance / sum(chances[:kept])
        for token, chance in zip(likeliest.indices[:kept], chances[:kept], strict=True)
    }


def assert_counts(counts: Counter[int], chances: dict[int, float], n: int) -> None:
    assert set(counts) <= set(chances)
    for token, chance in chances.items():
        assert abs(counts[token] - n * chance) <= 5 * (n * chance * (1 - chance)) ** 0.5, (token, counts, chances)


def test_greedy_candidates_are_copies(policy: VllmPolicy) -> None:
    completions = complete(policy, Sampling(n=3, max_tokens=6))
    assert len(completions) == 3
    assert len(set(completions)) == 1


def test_a_prefix_is_part_of_text_and_ids(policy: VllmPolicy, renderer: Renderer, folders: tuple[Path, Path]) -> None:
    prefix = "Thought: the value"
    [completion] = complete(policy, Sampling(max_tokens=8, logprobs=True), prefix)
    prompt, seeded = renderer.prompt(MESSAGES), renderer.prompt(MESSAGES, prefix)
    ids = token_ids(completion)
    assert completion.text.startswith(prefix)
    assert prompt + ids[:-8] == seeded
    assert completion.completion_tokens == len(completion.logprobs or ()) == 8
    assert_greedy(folders[0], seeded, ids[-8:])


def test_a_turn_that_ends_itself_keeps_its_stop_token_in_the_ids_and_out_of_the_text(
    policy: VllmPolicy, renderer: Renderer
) -> None:
    completions = complete(policy, Sampling(n=16, max_tokens=300, temperature=1.5, seed=1))
    ended = [each for each in completions if each.finish_reason == "stop"]
    assert ended, "one of 16 x 300 tokens of 320 kinds is the stop token"
    for each in ended:
        assert token_ids(each)[-1] == renderer.stop_token_id
        assert renderer.stop_token not in each.text


def test_a_stop_string_at_the_end_of_a_token_stays_in_text_and_ids(policy: VllmPolicy, renderer: Renderer) -> None:
    [free] = complete(policy, Sampling(max_tokens=40, temperature=1.0, seed=11))
    pieces = [renderer.tokenizer.decode([token]) for token in token_ids(free)]
    stop = next(piece for piece in pieces[5:] if piece.isascii() and len(piece) == 1)
    [stopped] = complete(policy, Sampling(max_tokens=40, temperature=1.0, seed=11, stop=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop) + 1]
    assert token_ids(stopped) == token_ids(free)[: len(token_ids(stopped))]
    assert renderer.tokenizer.decode(token_ids(stopped)) == stopped.text


def test_a_stop_string_that_ends_inside_a_token_leaves_text_without_ids(policy: VllmPolicy, renderer: Renderer) -> None:
    for seed in range(60):
        [free] = complete(policy, Sampling(max_tokens=1, temperature=1.0, seed=seed))
        if free.text.isascii() and len(free.text) > 1:
            break
    else:
        pytest.fail("none of 60 samples began with a token of several characters")
    [stopped] = complete(policy, Sampling(max_tokens=40, temperature=1.0, seed=seed, stop=(free.text[0],)))
    assert stopped.text == free.text[0]
    assert stopped.token_ids is None
    assert (stopped.finish_reason, stopped.completion_tokens) == ("stop", 1)


def test_a_prompt_without_room_is_a_limit(policy: VllmPolicy) -> None:
    long = [Message(role="user", content="word " * MAX_MODEL_LEN)]
    with pytest.raises(PolicyError, match=f"max_model_len={MAX_MODEL_LEN}") as caught:
        run(policy.complete(long, Sampling(max_tokens=4)))
    assert caught.value.failure_class is FailureClass.LIMIT


def test_a_turn_ends_where_the_model_has_no_more_room(policy: VllmPolicy) -> None:
    [completion] = complete(policy, Sampling(max_tokens=10_000, temperature=1.0, seed=4))
    assert completion.prompt_tokens + completion.completion_tokens <= MAX_MODEL_LEN
    assert completion.finish_reason in ("length", "stop")


def test_a_request_that_vllm_refuses_is_bad_input_and_the_engine_goes_on(policy: VllmPolicy) -> None:
    with pytest.raises(PolicyError, match="top_p") as caught:
        complete(policy, Sampling(temperature=1.0, top_p=7.0, max_tokens=2))
    assert caught.value.failure_class is FailureClass.INPUT
    assert complete(policy, Sampling(max_tokens=2))


def test_a_request_that_takes_too_long_leaves_the_engine(policy: VllmPolicy) -> None:
    with pytest.raises(PolicyError, match="timeout_s=0.01"):
        complete(policy, Sampling(max_tokens=400, timeout_s=0.01))
    assert_idle(policy)


def test_a_cancelled_request_leaves_the_engine(policy: VllmPolicy) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(policy.complete(MESSAGES, Sampling(n=4, temperature=1.0, max_tokens=400)))
        while policy.stats()["running"] == 0:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())
    assert_idle(policy)


def assert_idle(policy: VllmPolicy) -> None:
    until = time.monotonic() + 5
    while policy.stats()["running"] and time.monotonic() < until:
        time.sleep(0.01)
    assert policy.stats()["running"] == 0


def test_stats_count_tokens(policy: VllmPolicy) -> None:
    before = policy.stats()
    [completion, _] = complete(policy, Sampling(n=2, max_tokens=5, temperature=1.0, seed=0))
    after = policy.stats()
    assert after["requests"] - before["requests"] == 1
    assert after["prompt_tokens"] - before["prompt_tokens"] == completion.prompt_tokens
    assert 2 <= after["generated_tokens"] - before["generated_tokens"] <= 10


def test_new_weights_are_really_in_use_the_tied_head_too(
    policy: VllmPolicy, renderer: Renderer, folders: tuple[Path, Path]
) -> None:
    prompt = renderer.prompt(MESSAGES)
    for folder, version in ((folders[1], "b"), (folders[0], "a")):
        run(policy.update_weights(str(folder), version))
        [completion] = complete(policy, Sampling(max_tokens=16, logprobs=True))
        sampled = token_ids(completion)
        assert_greedy(folder, prompt, sampled)
        expected = reference_logprobs(folder, [*prompt, *sampled])[len(prompt) - 1 :].max(-1).values.tolist()
        assert completion.logprobs == pytest.approx(expected, abs=1e-3)
        assert completion.weights_version == policy.weights_version == version


def test_a_request_that_runs_during_an_update_finishes_and_tells_the_older_version(
    policy: VllmPolicy, folders: tuple[Path, Path]
) -> None:
    async def scenario() -> list[Completion]:
        running = asyncio.create_task(policy.complete(MESSAGES, Sampling(max_tokens=300, temperature=1.0, seed=2)))
        while policy.stats()["running"] == 0:
            await asyncio.sleep(0.001)
        await policy.update_weights(str(folders[0]), "a2")
        return await running

    [completion] = run(scenario())
    assert completion.weights_version == "a"
    run(policy.update_weights(str(folders[0]), "a"))


def test_weights_of_another_shape_are_refused_and_the_engine_goes_on(policy: VllmPolicy, tmp_path: Path) -> None:
    wide = write_model(tmp_path / "wide", seed=0, hidden_size=128)
    with pytest.raises(PolicyError, match="hidden_size=128, the running model 64"):
        run(policy.update_weights(str(wide), "wide"))
    with pytest.raises(PolicyError, match="no Hugging Face model folder"):
        run(policy.update_weights(str(tmp_path / "nothing"), "none"))
    assert complete(policy, Sampling(max_tokens=2))[0].weights_version == "a"


def test_a_second_engine_in_one_process_is_refused_by_name(policy: VllmPolicy, folders: tuple[Path, Path]) -> None:
    with pytest.raises(PolicyError, match="this process runs a vLLM engine already"):
        VllmPolicy(str(folders[1]), dtype="float32", max_model_len=MAX_MODEL_LEN)


def test_a_model_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="nothing-here"):
        VllmPolicy(str(tmp_path / "nothing-here"))


def test_when_the_engine_dies_everyone_who_waits_is_told(started: Started) -> None:
    policy = started.policy()

    async def scenario() -> list[Any]:
        waiting = [
            asyncio.create_task(policy.complete(MESSAGES, Sampling(max_tokens=400, temperature=1.0))) for _ in range(3)
        ]
        while policy.stats()["running"] < 3:
            await asyncio.sleep(0.001)
        core: Any = policy._engine
        core._engine.engine_core = None  # the next step finds no engine
        return await asyncio.gather(*waiting, return_exceptions=True)

    errors = run(scenario())
    try:
        assert all(isinstance(error, PolicyError) and "the vLLM engine died" in str(error) for error in errors)
        with pytest.raises(PolicyError, match="the vLLM engine died"):
            complete(policy, Sampling(max_tokens=2))
    finally:
        started.end()


def test_close_tells_who_waits_and_may_be_called_twice(started: Started) -> None:
    policy = started.policy()

    async def scenario() -> BaseException | None:
        waiting = asyncio.create_task(policy.complete(MESSAGES, Sampling(max_tokens=400, temperature=1.0)))
        while policy.stats()["running"] == 0:
            await asyncio.sleep(0.001)
        await policy.close()
        await asyncio.wait([waiting])
        return waiting.exception()

    error = run(scenario())
    started.end()
    assert isinstance(error, PolicyError)
    with pytest.raises(PolicyError, match="closed"):
        complete(policy, Sampling(max_tokens=2))

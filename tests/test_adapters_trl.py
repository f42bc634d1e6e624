"""Our envs in a real `GRPOTrainer` of TRL, on a tiny random model."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from envs.adapters.trl_adapter import episode_reward, task_rows, trl_environment
from envs.base import Task
from envs.tools import Tool, ToolError

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using 'environment_factory'"),
    pytest.mark.filterwarnings("ignore:TRL currently supports vLLM"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]
TASKS = [Task(id=f"t{n}", question=f"What is {n} + 2?", answer=str(n + 2), kind="sum") for n in range(4)]


def add(a: int, b: int = 2) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    if a == 99:
        raise OSError("the adding service is down")
    return a + b


TOOL = Tool.from_function(add)


def started(name: str, task: Task = TASKS[0], **settings: Any) -> Any:
    environment = trl_environment(name, **settings)()
    [row] = task_rows([task])
    environment.reset(**row)
    return environment


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_methods_have_the_schema_of_the_tools():
    from transformers.utils.chat_template_utils import get_json_schema

    schema = get_json_schema(trl_environment("tool", tools=[TOOL])().add)  # type: ignore[attr-defined]
    assert schema["function"]["name"] == "add"
    assert schema["function"]["description"] == "Add two numbers."
    assert schema["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "the first."},
            "b": {"type": "integer", "description": "the second."},
        },
        "required": ["a"],
    }


def test_odd_schemas_become_annotations():
    from transformers.utils.chat_template_utils import get_json_schema

    properties = {
        "words": {"type": "array", "items": {"type": "string"}},
        "where": {"type": ["string", "null"]},
        "how": {"enum": ["fast", "slow"]},
        "what": {},
    }
    tool = Tool(name="look", description="", parameters={"properties": properties}, function=lambda **_: "")
    environment = trl_environment("tool", tools=[tool])
    parameters = get_json_schema(environment().look)["function"]["parameters"]["properties"]  # type: ignore
    assert parameters["words"] == {"type": "array", "items": {"type": "string"}, "description": "words"}
    assert parameters["where"]["nullable"] and parameters["how"]["enum"] == ["fast", "slow"]


def test_only_the_tools_are_public():
    members = dict(inspect.getmembers(trl_environment("tool", tools=[TOOL]), predicate=inspect.isfunction))
    assert sorted(name for name in members if not name.startswith("_")) == ["add", "reset"]
    with pytest.raises(ValueError, match="TRL has its own use for 'reset'"):
        trl_environment("tool", tools=[Tool(name="reset", description="", parameters={}, function=add)])


def test_tool_episode_is_graded_by_its_last_words():
    environment = started("tool", tools=[TOOL])
    assert environment.add(a=0) == "2"
    with pytest.raises(ToolError, match="'a' must be integer"):
        environment.add(a="0")
    assert episode_reward([said("<think>so</think> 2")], [environment]) == [1.0]


def test_code_episode_ends_in_its_code():
    environment = started("code", tools=[TOOL], modules=["math"])
    assert environment.python(code="x = add(0)\nprint(x)").startswith("Execution logs:\n2")
    assert environment.python(code="final_answer(x)") == "2"
    assert "episode is over" in environment.python(code="1")
    assert episode_reward([said("whatever")], [environment]) == [1.0]


def test_search_episode():
    environment = started("search", search=lambda query: f"Doc about {query}")
    assert environment.search(query="two") == "<information>Doc about two</information>"
    assert episode_reward([said("3")], [environment]) == [0.0]


def test_rollout_that_ends_in_a_call_earns_nothing():
    environment = started("tool", tools=[TOOL])
    completion = [{"role": "assistant", "content": "2", "tool_calls": [{}]}]
    assert episode_reward([completion], [environment]) == [0.0]


def test_failure_of_the_env_has_no_reward_and_no_details():
    environment = started("tool", tools=[TOOL])
    with pytest.raises(RuntimeError, match="^the tool is out of order$"):
        environment.add(a=99)
    assert episode_reward([said("2")], [environment]) == [None]
    environment.reset(**task_rows([TASKS[1]])[0])
    assert episode_reward([said("3")], [environment]) == [1.0]


def test_rows_must_bring_their_task():
    with pytest.raises(ValueError, match="needs a column 'task'"):
        trl_environment("tool", tools=[TOOL])().reset(prompt=[])


# -- the trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Qwen2 of some 100,000 weights, with Qwen2.5's chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl.chat_template_utils import qwen2_5_chat_template

    folder = str(tmp_path_factory.mktemp("tiny"))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    plain.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=special)  # type: ignore
    plain.train_from_iterator([qwen2_5_chat_template] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = qwen2_5_chat_template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def trainer_of(model: str, folder: Path, kind: Any = None, **settings: Any) -> Any:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, num_generations=2, use_cpu=True,
        max_completion_length=400, max_tool_calling_iterations=3, report_to="none", logging_steps=1, save_strategy="no",
        disable_tqdm=True, learning_rate=0.1, bf16=False,
    )  # fmt: skip
    return (kind or GRPOTrainer)(
        model=model, args=arguments, train_dataset=Dataset.from_list(task_rows(TASKS)),
        reward_funcs=episode_reward, **settings,
    )  # fmt: skip


def test_real_trainer_calls_tools_and_learns(model: str, tmp_path: Path):
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Scripted(GRPOTrainer):
        """Says what a trained model would; all else is TRL's own."""

        turn = 0

        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            tokenizer: Any = self.processing_class
            texts = []
            for index, ids in enumerate(prompt_ids):
                prompt = tokenizer.decode(ids)
                number = prompt.rpartition("What is ")[2].partition(" +")[0]
                call = json.dumps({"name": "add", "arguments": {"a": int(number)}})
                answer = prompt.rpartition("<tool_response>\n")[2].partition("\n")[0] if index % 2 else "no idea"
                texts.append(answer if self.turn else f"<tool_call>\n{call}\n</tool_call>")
            self.turn += 1
            return [tokenizer.encode(text) + [2] for text in texts], None

    environment = trl_environment("tool", tools=[TOOL])
    trainer = trainer_of(model, tmp_path, Scripted, environment_factory=environment)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/episode_reward/mean"] == 0.5  # every second rollout repeats the tool's result
    assert logged["tools/call_frequency"] == 1.0 and logged["tools/failure_frequency"] == 0.0
    assert any((weight != before[name]).any() for name, weight in trainer.model.named_parameters())


def test_real_trainer_with_a_model_that_talks_nonsense(model: str, tmp_path: Path):
    environment = trl_environment("code", modules=["math"])
    trainer = trainer_of(model, tmp_path, environment_factory=environment)
    trainer.args.max_completion_length = trainer.max_completion_length = trainer.generation_config.max_new_tokens = 8
    trainer.train()
    assert trainer.state.log_history[0]["rewards/episode_reward/mean"] == 0.0

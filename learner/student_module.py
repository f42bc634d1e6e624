"""The student as a torch module: loaded, checked, with adapters, and run at the trained positions alone.

Knows no engine. `student_module` picks the trained positions out before the product with the vocabulary, the largest
one of a small student.

Example::

    model = load_student(config, device=torch.device("cpu"), batching="bucketed")
    student = student_module(model, config, torch.device("cpu"))
    logits = student(input_ids, None, selected)          # [n, vocabulary]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from learner.adapters import is_quantized, load_base, with_adapters
from learner.config import ConfigError, LearnerConfig

if TYPE_CHECKING:
    import torch


def load_student(config: LearnerConfig, *, device: torch.device, batching: str) -> Any:
    """A transformers (or PEFT) model in training mode. Raises `ConfigError` for one that we would train wrongly,
    OSError for none."""
    model = load_base(config, device)
    model.config.use_cache = False
    short_rows = config.precision != "fp32" and batching == "bucketed" and device.type == "cpu"
    if short_rows:
        from learner.attention import use_short_row_attention

        use_short_row_attention(model)
    if batching == "packed":
        from learner.packed_attention import use_packed_attention

        use_packed_attention(model, device=device, half=config.precision != "fp32")  # else: sdpa and a block mask
    _check_head(model)
    if is_quantized(config):
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora is not None:
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
        model = with_adapters(model, config)
    model.train()
    return model


def student_module(model: Any, config: LearnerConfig, device: torch.device) -> Any:
    """The module that the engine runs: (input_ids, position_ids, selected) -> logits."""
    import torch
    from torch import nn

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            plain = model.get_base_model() if config.lora is not None else model
            self._decoder = [plain.get_decoder()]  # in lists: the same modules, not registered a second time
            self._head = [plain.get_output_embeddings()]
            if config.compile:
                for layer in self._decoder[0].layers:
                    layer.compile(dynamic=True)

        def forward(
            self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, selected: torch.Tensor
        ) -> torch.Tensor:
            """input_ids, position_ids: [rows, width]; selected: [n] flat positions -> logits [n, vocabulary]."""
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "autocast"):
                # No mask and no cache: only then are packed rows kept apart by their positions.
                hidden = self._decoder[0](
                    input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
                ).last_hidden_state
                return self._head[0](hidden.reshape(-1, hidden.shape[-1])[selected])

    return Student()


def _check_head(model: Any) -> None:
    """Refuse a model whose logits are more than its head's product (scaled, capped): we would train another model."""
    import torch

    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    model.eval()
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        ours = model.get_output_embeddings()(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(whole, ours, atol=1e-3, rtol=1e-3):
        raise ConfigError(
            f"model_path {model.name_or_path!r} ({type(model).__name__}) does more after its decoder than multiply by "
            "its head; use a model such as Qwen2, Qwen3, Llama or Mistral"
        )

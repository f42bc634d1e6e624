"""Pre-train the base student on generic text, on one core: `python -m learner.base_student.pretrain --out FOLDER`.

First weights and text follow from `--seed`; the tokenizer is always the same. Text is packed end to end into rows; the
loss is taken on the learnt pieces of each document only (see `generic_text`). Matrices are trained with Muon (Jordan et
al. 2024, as in `torch.optim.Muon`), all else with AdamW; the rates warm up and then fall linearly to nothing.

    python -m learner.base_student.pretrain --out learner/base_student/checkpoint --tokens 12000000
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.base_student.generic_text import END_OF_TEXT, EXCHANGES, TURN_END, TURN_START, documents

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

ROW_TOKENS = (512, 512, 1024)
"""Lengths of the rows of successive batches; the long ones teach to copy from afar."""
WARM_UP_STEPS = 100


def token_stream(tokenizer: "PreTrainedTokenizerBase", seed: int) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """(token ids, which of them are learnt) of one document after another, each with an end-of-text token."""
    import numpy as np

    backend: Any = tokenizer.backend_tokenizer
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    for document in documents(seed):
        encoding = backend.encode(document.text)
        flags = np.frombuffer(document.learnt_flags, dtype=np.uint8)
        last = np.fromiter((stop - 1 for _, stop in encoding.offsets), dtype=np.int64, count=len(encoding.ids))
        yield np.array([*encoding.ids, end]), np.append(flags[last], 0).astype(bool)


def batches(
    tokenizer: "PreTrainedTokenizerBase", seed: int, batch_tokens: int
) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """(ids, learnt), each [rows, row tokens + 1], documents packed end to end and cut where a row ends."""
    import numpy as np

    stream = token_stream(tokenizer, seed)
    step = 0
    while True:
        length = ROW_TOKENS[step % len(ROW_TOKENS)]
        rows = batch_tokens // length
        ids, learnt = np.zeros((rows, length + 1), dtype=np.int64), np.zeros((rows, length + 1), dtype=bool)
        for r in range(rows):
            filled = 0
            while filled < length + 1:
                piece, flags = next(stream)
                taken = min(len(piece), length + 1 - filled)
                ids[r, filled : filled + taken] = piece[:taken]
                learnt[r, filled : filled + taken] = flags[:taken]
                filled += taken
        step += 1
        yield ids, learnt


def pretrain(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tokens: int,
    seed: int,
    batch_tokens: int = 4096,
    matrix_lr: float = 3e-3,
    other_lr: float = 3e-3,
    report_every: int = 50,
    save: Any = None,
    start: "Qwen2ForCausalLM | None" = None,
) -> "tuple[Qwen2ForCausalLM, list[dict[str, float]]]":
    """Train from mimetic first weights; `save(model, log)` is called at every eighth report."""
    import torch
    import torch.nn.functional as F

    from learner.base_student.model import build_model, model_config

    model = start or build_model(model_config(tokenizer), seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    full_rates = (matrix_lr, other_lr)
    body = torch.compile(model.model, dynamic=False)
    log: list[dict[str, float]] = []
    recent: list[tuple[float, float]] = []
    seen, began, cpu_began = 0, time.monotonic(), time.process_time()
    for step, (ids, learnt) in enumerate(batches(tokenizer, seed, batch_tokens), 1):
        rate = min(step / WARM_UP_STEPS, 1.0) * max(0.01, 1.0 - seen / tokens)
        for optimizer, full in zip(optimizers, full_rates, strict=True):
            optimizer.param_groups[0]["lr"] = full * rate
        inputs, targets = torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:])
        where = torch.from_numpy(learnt[:, 1:]).reshape(-1).nonzero()[:, 0]  # [learnt tokens]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = body(input_ids=inputs, use_cache=False).last_hidden_state
            logits = F.linear(hidden.reshape(-1, hidden.shape[-1])[where], model.lm_head.weight)
        target = targets.reshape(-1)[where]
        loss = F.cross_entropy(logits.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += inputs.numel()
        recent.append((loss.item(), (logits.argmax(-1) == target).float().mean().item()))
        done = seen >= tokens
        if step % report_every == 0 or done:
            wall_s = time.monotonic() - began
            entry = {
                "step": step,
                "tokens": seen,
                "loss": round(sum(x for x, _ in recent) / len(recent), 4),
                "accuracy": round(sum(y for _, y in recent) / len(recent), 4),
                "wall_s": round(wall_s, 1),
                "cpu_s": round(time.process_time() - cpu_began, 1),
                "tokens_per_s": round(seen / wall_s),
            }
            print(json.dumps(entry), flush=True)
            log.append(entry)
            recent.clear()
            if save is not None and (len(log) % 8 == 0 or done):
                save(model, log)
        if done:
            break
    return model, log


def accuracy_by_kind(
    model: "Qwen2ForCausalLM", tokenizer: "PreTrainedTokenizerBase", seed: int, count: int = 40
) -> dict[str, tuple[float, float]]:
    """Kind of exchange -> (share of answers right in every token, share of tokens right), on unseen exchanges.

    Each token is predicted after the right ones before it. Some answers leave a choice open (which separator, which
    variable), so that 1.0 cannot be reached.
    """
    import torch

    rng, result = random.Random(f"held out {seed}"), {}
    model.eval()
    for make in EXCHANGES:
        exact, right, total = 0, 0, 0
        for _ in range(count):
            made = make(rng)
            asked, answer = made[0] if isinstance(made, list) else made
            prompt = tokenizer.encode(f"{TURN_START}user\n{asked}{TURN_END}\n{TURN_START}assistant\n")
            reply = tokenizer.encode(answer + TURN_END)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + reply]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            hits = logits.argmax(-1) == torch.tensor(reply)
            exact, right, total = exact + int(hits.all()), right + int(hits.sum()), total + len(reply)
        result[make.__name__] = (round(exact / count, 3), round(right / total, 3))
    model.train()
    return result


def write_checkpoint(
    folder: Path,
    model: "Qwen2ForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    log: list[dict[str, float]],
    settings: dict[str, Any],
) -> None:
    """A Hugging Face folder: bf16 weights without the tied head, tokenizer and chat template, log, model card."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.bfloat16
    state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    del state["lm_head.weight"]  # tied to the embeddings
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    kinds = accuracy_by_kind(model, tokenizer, seed=settings["seed"])
    record = {"settings": settings, "log": log, "accuracy_by_kind": kinds}
    (folder / "pretrain_log.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(_model_card(model, log, settings, kinds))
    os.chmod(folder / "model.safetensors", 0o644)  # save_pretrained leaves it readable by its owner alone


def _model_card(
    model: "Qwen2ForCausalLM",
    log: list[dict[str, float]],
    settings: dict[str, Any],
    kinds: dict[str, tuple[float, float]],
) -> str:
    last, config = log[-1], model.config
    table = "\n".join(f"| {kind} | {exact:.2f} | {tokens:.2f} |" for kind, (exact, tokens) in kinds.items())
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in settings.items())
    return f"""# Base student

A plain `Qwen2ForCausalLM` of {model.num_parameters() / 1e6:.2f} million parameters (hidden {config.hidden_size},
{config.num_hidden_layers} layers, {config.num_attention_heads} heads, {config.vocab_size:,} tokens, tied embeddings,
bf16, {config.max_position_embeddings:,} positions): the pretrained model that the embedded run distils into.

It goes on with a copy well, of names, numbers and sentences; choosing *what* to copy (looking up) it does poorly, as
the table shows. It cannot act as an agent: it has seen no tools, no agent's turns and nothing of any task, though
everyday English words of its text ("silver", "harbor") are words of the starter world too. It knows no facts. It is of
no use without fine-tuning.

Made by `python -m learner.base_student.pretrain {flags}`
from random weights on self-made text alone (`learner/base_student/generic_text.py`): {last["tokens"]:,} tokens in
{last["wall_s"] / 60:.0f} minutes ({last["cpu_s"] / 60:.0f} CPU-minutes on one core). Loss {log[0]["loss"]:.2f} at the
first report, {last["loss"]:.3f} at the last; {last["accuracy"]:.1%} of the learnt tokens are predicted right.
`pretrain_log.json` holds the log.

On unseen exchanges (`accuracy_by_kind`; some answers leave a choice open, so that 1.0 cannot be reached):

| kind | whole answer right | tokens right |
|---|---|---|
{table}

Turns are ChatML (`<|im_start|>role`, newline, content, `<|im_end|>`, newline); `<|im_end|>` ends a reply.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pre-train the base student on generic text, on one core.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="tokens to train on")
    parser.add_argument("--seed", type=int, default=0, help="of the tokenizer, the first weights and the text")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--matrix-lr", type=float, default=3e-3, help="peak rate of Muon, for matrices")
    parser.add_argument("--other-lr", type=float, default=3e-3, help="peak rate of AdamW, for all else")
    options = parser.parse_args(arguments)
    import torch

    from learner.base_student.tokenizer import build_tokenizer

    torch.set_num_threads(1)
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    tokenizer = build_tokenizer(seed=0)
    pretrain(
        tokenizer,
        save=lambda model, log: write_checkpoint(options.out, model, tokenizer, log, settings),
        **settings,
    )


if __name__ == "__main__":
    main()

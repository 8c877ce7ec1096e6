"""Train the bundled pair: a tokenizer, a target and a draft distilled from it, all from the standard library."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from typer import Option

from specdec.hf import names
from specdec.training import data, export, loop
from specdec.training.evaluate import LONG_WINDOW, WINDOW, agreement, figures_of, mean_loss

TARGET_STEPS, DRAFT_STEPS, SAMPLES = 2400, 1600, 2048
VOCABULARY = 4096
TARGET_BATCH, DRAFT_BATCH = 8192, 4096  # tokens of one step
LONG_SHARE = 0.15  # the last steps see long windows
GLANCE = 32_768  # held-out tokens scored while training
PROMPT, SAMPLE = 32, 256  # the target's own samples: tokens given, tokens in all


def llama(hidden_size: int, layers: int, heads: int, kv_heads: int, intermediate_size: int) -> LlamaForCausalLM:
    """A freshly initialised float32 Llama over the pair's vocabulary, embeddings tied."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=LONG_WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).float()


def new_target(scale: int = 1) -> LlamaForCausalLM:
    """The target: 4.0M parameters at scale 1; the scale multiplies the widths."""
    return llama(256 * scale, 4, 4 * scale, 2 * scale, 704 * scale)


def new_draft(scale: int = 1, layers: int = 2) -> LlamaForCausalLM:
    """The draft, about a tenth of the target."""
    return llama(96 * scale, layers, 3 * scale, scale, 256 * scale)


@torch.no_grad()
def share_embeddings(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    """Start the draft's embeddings from the target's output rows, in their main directions (a truncated SVD)."""
    rows = target.model.embed_tokens.weight * target.model.norm.weight
    directions = torch.linalg.svd(rows, full_matrices=False)[2][: draft.config.hidden_size]
    draft.model.embed_tokens.weight.copy_(rows @ directions.T)


def windows_of_step(tokens: torch.Tensor, batch_tokens: int, step: int, steps: int, seed: int) -> torch.Tensor:
    """``[batch, window + 1]`` tokens of one step: 512-token windows, then 2048-token ones in the last steps."""
    window = LONG_WINDOW if step >= (1 - LONG_SHARE) * steps else WINDOW
    window = min(window, len(tokens) - 1)
    return data.random_windows(tokens, max(1, batch_tokens // window), window + 1, seed * 1_000_003 + step)


def forward(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """float32 logits ``[batch, length, vocabulary]`` by bfloat16 matrix products."""
    with loop.autocast(ids.device):
        return model(input_ids=ids, use_cache=False).logits.float()


@torch.no_grad()
def sample(
    target: LlamaForCausalLM, prompts: torch.Tensor, length: int, seed: int, *, greedy: bool = False
) -> torch.Tensor:
    """The target's own continuations, at temperature 1 or greedy: ``[batch, length]`` ids, the prompts first."""
    generator = torch.Generator(prompts.device).manual_seed(seed)
    cache = DynamicCache(config=target.config)
    ids = new = prompts
    while ids.shape[1] < length:
        with loop.autocast(ids.device):
            logits = target(input_ids=new, logits_to_keep=1, **{names.cache_argument(target): cache}).logits[:, -1]
        if greedy:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, new], 1)
    return ids


def collect_samples(target: LlamaForCausalLM, tokens: torch.Tensor, count: int, seed: int, path: Path) -> torch.Tensor:
    """``[count, SAMPLE]`` ids the target wrote from prompts in ``tokens``, every other batch greedily.

    Greedy text repeats itself far more than samples do: a draft that never saw it fails where most users decode.
    """
    if not path.exists():
        rows = []
        prompts = data.random_windows(tokens, count, min(PROMPT, len(tokens)), seed).split(128)
        with loop.progress_bar("samples") as bar:
            for index, prompt in enumerate(bar.track(prompts, task_id=bar.add_task("samples", loss=""))):
                rows.append(sample(target, prompt, SAMPLE, seed + index, greedy=index % 2 == 1))
        torch.save(torch.cat(rows), path)
    return torch.load(path, map_location=tokens.device)


def train_target(
    model: LlamaForCausalLM,
    train: torch.Tensor,
    held_out: torch.Tensor,
    *,
    steps: int,
    seed: int,
    work: Path,
    stop_at: int | None = None,
    peak: float = 2.5e-3,
) -> float:
    """Next-token training on the source text; checkpoint in ``work/target.pt``."""

    def loss(step: int) -> torch.Tensor:
        ids = windows_of_step(train, TARGET_BATCH, step, steps, seed)
        return F.cross_entropy(forward(model, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    return loop.fit(
        model,
        loss,
        label="target",
        steps=steps,
        peak=peak,
        checkpoint=work / "target.pt",
        stop_at=stop_at,
        settings={"seed": seed, "tokens": len(train)},
        held_out=lambda: mean_loss(model, held_out[:GLANCE].split(WINDOW)),
    )


def train_draft(
    draft: LlamaForCausalLM,
    target: LlamaForCausalLM,
    train: torch.Tensor,
    samples: torch.Tensor,
    held_out: torch.Tensor,
    *,
    steps: int,
    seed: int,
    work: Path,
    stop_at: int | None = None,
    peak: float = 4e-3,
) -> float:
    """Distillation by KL(target, draft), one step on source text and two on the target's own; ``work/draft.pt``."""

    def loss(step: int) -> torch.Tensor:
        if step % 3:
            every = torch.arange(len(samples), dtype=torch.int64, device="cpu")
            rows = data.random_windows(every, max(1, DRAFT_BATCH // SAMPLE), 1, seed + step)
            ids = samples[rows[:, 0].to(samples.device)]
        else:
            ids = windows_of_step(train, DRAFT_BATCH, step, steps, seed + 1)
        with torch.no_grad():
            p = forward(target, ids).log_softmax(-1).flatten(0, 1)
        q = forward(draft, ids).log_softmax(-1).flatten(0, 1)
        return F.kl_div(q, p, log_target=True, reduction="batchmean")

    return loop.fit(
        draft,
        loss,
        label="draft",
        steps=steps,
        peak=peak,
        checkpoint=work / "draft.pt",
        stop_at=stop_at,
        settings={"seed": seed, "tokens": len(train)},
        held_out=lambda: agreement(target, draft, held_out[:GLANCE].split(WINDOW))["overlap"],
    )


def train_pair(
    out: Annotated[Path, Option(help="Folder of the models, tokenizer and card.")] = Path("runs/pair/out"),
    work: Annotated[Path, Option(help="Folder of the checkpoints.")] = Path("runs/pair"),
    target_steps: Annotated[int, Option(help="Optimisation steps of 8192 tokens each.")] = TARGET_STEPS,
    draft_steps: Annotated[int, Option(help="Optimisation steps of 4096 tokens each.")] = DRAFT_STEPS,
    samples: Annotated[int, Option(help="Sequences the target writes for the draft to learn from.")] = SAMPLES,
    scale: Annotated[int, Option(help="Multiplies the widths of both models; above 1 for a GPU.")] = 1,
    draft_layers: Annotated[int, Option(help="Layers of the draft; two can copy, one cannot.")] = 2,
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int, Option(help="CPU threads; results repeat for the same number.")] = 2,
    seed: Annotated[int, Option(help="Of weights, batches and samples.")] = 0,
    source: Annotated[Path | None, Option(help="Python modules to read instead of the standard library.")] = None,
) -> dict[str, Any]:
    """Train tokenizer, target and draft; write them with their figures and model card.

    A run that was stopped goes on from its checkpoints when started again with the same arguments. Returns what
    ``metrics.json`` holds.
    """
    torch.set_num_threads(threads)
    loop.keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    corpus = data.read_corpus(source)
    tokenizer = data.train_tokenizer(list(corpus.train.values()), VOCABULARY)
    train = data.encode(tokenizer, list(corpus.train.values())).to(device)
    held_out = data.encode(tokenizer, list(corpus.held_out.values())).to(device)

    torch.manual_seed(seed)
    target = new_target(scale).to(device)
    target_seconds = train_target(target, train, held_out, steps=target_steps, seed=seed, work=work)
    target.eval()
    own = collect_samples(target, train, samples, seed, work / f"samples-{samples}.pt")
    torch.manual_seed(seed)
    draft = new_draft(scale, draft_layers).to(device)
    share_embeddings(target, draft)
    draft_seconds = train_draft(draft, target, train, own, held_out, steps=draft_steps, seed=seed, work=work)

    export.save_texts(out, tokenizer, corpus.held_out)
    target = export.save_model(target, tokenizer, out / "target").to(device)
    draft = export.save_model(draft, tokenizer, out / "draft").to(device)
    prompts = data.random_windows(held_out, 128, PROMPT, seed)
    written = sample(target, prompts, SAMPLE, seed + 1)
    glance = held_out[:GLANCE].split(WINDOW)
    figures = {
        "vocabulary": VOCABULARY,
        "device": device,
        "python": platform.python_version(),
        "train_modules": len(corpus.train),
        "train_bytes": sum(len(text.encode()) for text in corpus.train.values()),
        "train_tokens": len(train),
        "held_out_modules": len(corpus.held_out),
        "held_out_bytes": sum(len(text.encode()) for text in corpus.held_out.values()),
        "held_out_tokens": len(held_out),
        "samples": samples,
        "sample_length": SAMPLE,
        "target": figures_of(target, held_out, target_seconds) | {"steps": target_steps, "batch": TARGET_BATCH},
        "draft": figures_of(draft, held_out, draft_seconds) | {"steps": draft_steps, "batch": DRAFT_BATCH},
        "held_out": agreement(target, draft, held_out.split(WINDOW)),
        "own": agreement(target, draft, written, skip=PROMPT - 1),
        "glance": {"tokens": GLANCE, "window": WINDOW, "loss": mean_loss(target, glance)}
        | agreement(target, draft, glance),
        "command": (
            f"python -m specdec.training.pair --out {out} --target-steps {target_steps} --draft-steps {draft_steps} "
            f"--samples {samples} --scale {scale} --draft-layers {draft_layers} --device {device} --threads {threads} "
            f"--seed {seed}"
        ),
    }
    export.save_card(out, figures)
    return figures


if __name__ == "__main__":
    typer.run(train_pair)

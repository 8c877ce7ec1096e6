"""Write the trained pair with its figures and model card."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CARD_OF_PAIR = """\
# The bundled pair

A byte-level BPE tokenizer ({vocabulary} tokens), a target and a draft distilled from it: Llama models that
write Python. They exist so that every example, test and benchmark of the library runs anywhere, without a download.

```python
from specdec.zoo import load_pair

target, draft, tokenizer = load_pair()
```

The target also has adaptive tokens, by which it drafts for itself: [their card](target/adaptive_tokens.md).

| | target | draft |
| --- | --- | --- |
| parameters | {target[parameters]:,} | {draft[parameters]:,} |
| hidden size, layers, heads, key-value heads | {target[shape]} | {draft[shape]} |
| steps, tokens of a step | {target[steps]}, {target[batch]} | {draft[steps]}, {draft[batch]} |
| training time ({device}) | {target[minutes]:.0f} min | {draft[minutes]:.0f} min |
| held-out loss, nats per token, windows of 512 | {target[loss]:.3f} | {draft[loss]:.3f} |
| held-out perplexity | {target[perplexity]:.2f} | {draft[perplexity]:.2f} |
| held-out loss, windows of 2048 | {target[loss_2048]:.3f} | {draft[loss_2048]:.3f} |

How well the draft foresees the target:

| text | same most likely token | mean of sum(min(p, q)) |
| --- | --- | --- |
| held-out source | {held_out[greedy]:.1%} | {held_out[overlap]:.1%} |
| the target's own samples after held-out prompts | {own[greedy]:.1%} | {own[overlap]:.1%} |

The last column is the chance that speculative sampling at temperature 1 accepts one drafted token.

![The draft's loss and figures on held-out text, by step](curve.png)

## Data

The source of the standard library of Python {python}: {train_modules} modules, {train_bytes:,} bytes, {train_tokens:,}
tokens; test suites, character tables and bundled manual pages left out. {held_out_modules} more modules
({held_out_bytes:,} bytes, {held_out_tokens:,} tokens), chosen by a hash of their names, were held out from the
tokenizer and the models; they are `held_out.txt`. Python's source is under the PSF License (`LICENSE-PYTHON.txt`),
Copyright (c) 2001 Python Software Foundation; All Rights Reserved.

The draft learned the target's probabilities (DistillSpec, arXiv 2310.08461), in five steps of seven on that source, in
two on {samples:,} texts of {sample_length} tokens that the target wrote itself, half of them sampled and half greedy.
It minimised {minimised}: not the loss above.

## Limits

The target writes text that looks like Python, not programs that work; it knows no other language. Contexts above 2048
tokens were never seen. The weights are stored in float16 and load as float32. A draft that small next to a target that
small says nothing about the speed of real models: `specdec.zoo.enlarge` gives the same pair a real model's cost.

## Make it again

```
{command}
```

The figures above are in `metrics.json`, written by the same run. The same command with the same Python, the same
libraries and as many threads gives the same weights. Without `--keep-target` it trains tokenizer and target, too.
"""


CARD_OF_DRAFT = """\
# A draft for {target}

{parameters:,} parameters, distilled with specdec (DistillSpec, arXiv 2310.08461). It makes `generate()` of its target
faster and never changes what that writes:

```python
import specdec

model = specdec.compile(target, draft="path/of/this/folder")
```

How well it foresees the target:

| text | same most likely token | mean of sum(min(p, q)) |
| --- | --- | --- |
| held-out text, {held_out_tokens:,} tokens | {held_out[greedy]:.1%} | {held_out[overlap]:.1%} |
| the target's own samples after prompts from there | {own[greedy]:.1%} | {own[overlap]:.1%} |

The first column is the chance that greedy decoding accepts one drafted token, the last that sampling at temperature 1
does.

![Loss and figures on held-out text, by step](curve.png)

## Training

| | |
| --- | --- |
| began as | {start} |
| minimised | {minimised} |
| steps, tokens of a step | {steps:,}, {batch:,} |
| learning rate | up to {peak} |
| training time ({device}) | {minutes:.0f} min |
| text | {train_tokens:,} tokens |
| the target's own texts | {samples:,} of {sample_length} tokens, half sampled at temperature 1 and half greedy |

## Make it again

```
{command}
```

The figures are in `metrics.json`. The same command with the same text, the same libraries and as many threads gives the
same weights.
"""


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Save float16 weights whose config asks for float32; return the model as it loads again."""
    model = copy.deepcopy(model).half()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ids)
    model.config.update(ids)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    return LlamaForCausalLM.from_pretrained(folder).eval()


def save_texts(folder: Path, tokenizer: PreTrainedTokenizerFast, held_out: dict[str, str]) -> None:
    """Save the tokenizer, the held-out text and the licence of Python, where this Python has it."""
    tokenizer.save_pretrained(folder / "tokenizer")
    separator = tokenizer.eos_token + "\n"
    (folder / "held_out.txt").write_text("".join(text + separator for text in held_out.values()), encoding="utf-8")
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.exists():
        shutil.copy(licence, folder / "LICENSE-PYTHON.txt")


def command(name: str, **options: Any) -> str:
    """The line that does the same again; lists are given one by one, None and False not at all."""
    words = ["python", "-m", "specdec", "train", name]
    for option, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                words += [f"--{option.replace('_', '-')}"] + ([] if one is True else [str(one)])
    return shlex.join(words)


def save_card(folder: Path, card: str, figures: dict[str, Any], curve: Path) -> None:
    """Write ``metrics.json``, from the same figures the model card ``README.md``, and the picture of the training."""
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card.format(**figures), encoding="utf-8")
    shutil.copy(curve, folder / "curve.png")

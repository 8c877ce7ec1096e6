"""Why calls run transformers' own loop, and what to do about it: every reason there is, with its remedy.

The output is the same either way; only speed is lost. `docs/fallbacks.md` shows this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Fallback:
    """A reason, as `model.specdec.stats.fallbacks` counts it.

    Attributes:
        about: what it is a matter of: "the call", "the model" or "the machine".
        reason: its text, with {placeholders} for names that differ.
        remedy: what a user can do.
    """

    about: str
    reason: str
    remedy: str


_NOT_YET = "Nothing to do: not supported yet."
_REPORT = "Please report it, with the model's name and the versions that `specdec info` prints."
_CALL = {
    "beams in generate_many() or warmup()": "Use `generate()` for calls with `num_beams`; the first one compiles.",
    "past_key_values with beams": "Leave the cache out: a search with beams reads its prompts itself.",
    "continuous batching": "Use `specdec.generate_many()`, which fills free rows with the next prompts.",
    "a way to decode that is none of transformers' own loops": "Leave out `custom_generate=`: its own code decodes.",
    "a draft that does not fit": (
        "The message names what differs between draft and target. Give both tokenizers, load the draft on the "
        "target's device, or choose another draft."
    ),
    "another generate() of this model is running": (
        "One wrapped model runs one call at a time. Wrap the model a second time for a second thread (the weights "
        "are shared), or use `specdec.generate_many()`."
    ),
    "out of memory": (
        "Use a smaller batch or shorter texts; `model.specdec.memory(batch_size, length)` says what they take."
    ),
    "an argument of {loop} that is not known, {names}": (
        "This transformers is newer than specdec knows. Install a tested version, or leave the argument out."
    ),
    "synced_gpus": "Leave `synced_gpus` out: it is for models sharded by FSDP or DeepSpeed, which are not supported.",
    "a streamer with a batch of several samples": "Stream one prompt at a time.",
    "num_return_sequences in generate_many()": "Repeat the prompt as often as you want answers.",
    "scores, logits and past_key_values in generate_many()": "Use `generate()` for these.",
    "logits processors of one's own in generate_many()": "Use `generate()`, one prompt at a time.",
    "an empty batch": "Give at least one prompt.",
    "an empty prompt": "Give every prompt at least one token, such as the tokenizer's `bos_token_id`.",
    "output_{name} with stopping criterion {criterion}": (
        "Ask for scores or logits without a stopping criterion or stop strings."
    ),
    "output_{name} of a batch whose texts may end before others": "Ask for scores or logits one prompt at a time.",
    "no room for a new token": "Raise `max_length`, or use `max_new_tokens`.",
    "assisted generation with {name}": "Leave this setting out: specdec drafts in its own way.",
    "assisted generation without an assistant model or prompt lookup": (
        "Give `assistant_model=` or `prompt_lookup_num_tokens=`, or a draft to `specdec.compile()`."
    ),
    "{names}, which come out of layers": (
        "Attentions and hidden states are read from transformers' loop only. Leave them out where you want speed."
    ),
    "model arguments {names}": (
        "Only text is decoded here. Calls with images, audio or other inputs of a model's own run transformers' loop."
    ),
    "use_cache=False": "Leave `use_cache=False` out: decoding needs the KV cache.",
    "{what} with a batch of several samples": (
        "Call `generate()` with one prompt at a time, or use `specdec.generate_many()`."
    ),
    "stop strings with a batch of several samples and no end of text": (
        "Set `eos_token_id`, or call `generate()` with one prompt at a time."
    ),
    "an attention mask of another shape than the tokens": "Pass a mask of the shape of `input_ids`.",
    "an attention mask with holes or right padding": 'Pad on the left: `tokenizer.padding_side = "left"`.',
    "position_ids that do not count the tokens of the prompt": (
        "Leave the argument out: `generate()` makes it from the attention mask."
    ),
    "no length limit": "Set `max_new_tokens` or `max_length`.",
    "logits processors {names}": (
        "Leave these settings out: they run the model themselves, mark whole batches, or were made for another "
        "number of samples."
    ),
    "past_key_values of a kind that only its own model fills": "Pass a plain `DynamicCache`.",
    "past_key_values as long as the prompts": "Pass the whole conversation as `input_ids`, with new tokens at its end.",
    "past_key_values of another number of samples": "Pass a cache that was filled with this batch.",
    "past_key_values of another model": "Pass a cache that this model filled, in the model's dtype.",
}
_MODEL = {
    "the model is in training mode": "Call `model.eval()`.",
    "weights that accelerate's hooks move: offloaded, or spread over several devices": (
        'Load the whole model on one device: `device_map="cuda:0"`, or quantized, if it does not fit.'
    ),
    "weights on several devices": 'Load the whole model on one device: `device_map="cuda:0"`.',
    "a model with a forward of its own, as assigning torch.compile(model.forward) gives it": (
        "Give specdec the model without `model.forward = torch.compile(...)`: it compiles its steps by itself."
    ),
    "a model with a forward hook, which would see drafts too": "Remove the hook for decoding.",
    "a model with a {method} of its own, which is called at each token in transformers' loop": (
        "specdec cannot call a method of yours in the middle of a step. Give it the class of transformers, or a "
        "logits processor instead."
    ),
    "a model given another config than its layers have": (
        "Change settings in place, or load the model with the new config."
    ),
    "a forward that writes to {what}": "Remove what logs or observes inside of the forward: here it would see drafts.",
    "a {kind} on the model that cannot be looked at": (
        "Remove this object from the model: specdec cannot tell whether it has changed."
    ),
    "a tensor on the model that was made in inference mode, where nobody counts changes": (
        "Load or change the model outside of `torch.inference_mode()`; `torch.no_grad()` is fine."
    ),
    "modules that cannot be copied": (
        "Remove from the model what `copy.deepcopy` cannot copy (locks, files, generators)."
    ),
    "{implementation} attention, which ignores this model's softcap": (
        'Load the model with `attn_implementation="eager"`.'
    ),
    "attention by a function that is not transformers' own": (
        'Load the model with `attn_implementation="sdpa"` or `"eager"`.'
    ),
    "a text longer than the model has positions": "Ask for fewer tokens: `max_new_tokens`.",
    "{kind} rope, whose frequencies depend on the longest text of a forward": _NOT_YET,
    "{family}, with an encoder": "Only decoder-only models are decoded here.",
    "{family}, whose forward takes no position_ids": _NOT_YET,
    "{family}, whose layers ask the cache how long the text is": _NOT_YET,
    "{family}, whose layers make masks of their own": _NOT_YET,
    "{family}, whose cache forgets what their masks show": _NOT_YET,
    "{family}, whose own attention has a window too long to try out": _NOT_YET,
    "{family}, whose layers do not all keep keys and values": (
        "Nothing to do: layers of linear attention and state spaces are not supported yet."
    ),
    "{family}, whose layers keep keys and values of different shapes": _NOT_YET,
    "models of class {name}, whose forward takes no cache": _NOT_YET,
    "{family}: a ragged forward fails": _REPORT,
    "{family}: a ragged forward is not the model's own": _REPORT,
    "{family}: its embeddings are not finite": "Check the weights: they hold NaN or infinity.",
    "{family}: its forward fails": "Call `generate()` of the original model: it fails, too, and says more.",
    "{family}: its own logits are all -inf": "Check the weights: they overflow in this dtype. Try `torch.bfloat16`.",
    "{family}: its own logits are not finite": "Check the weights: they overflow in this dtype. Try `torch.bfloat16`.",
}
_MACHINE = {
    "models on {device}": "Move the model to a CPU or a CUDA device.",
    "CUDA without Triton": "Install Triton: `pip install triton`.",
    "autocast": "Load the model in the dtype you want (`dtype=torch.bfloat16`), and leave `torch.autocast` out.",
    "a mode that sees, or changes, every operation of torch's": (
        "Leave the mode (a profiler of operations, `FakeTensorMode`, ...) before `generate()`."
    ),
    "transformers {version} has no {names}": "Install a tested version of transformers; the message names it.",
}

FALLBACKS = tuple(
    Fallback(about, reason, remedy)
    for about, each in (("the call", _CALL), ("the model", _MODEL), ("the machine", _MACHINE))
    for reason, remedy in each.items()
)
"""Every reason, once."""


@cache
def _patterns() -> list[tuple[re.Pattern[str], Fallback]]:
    """The most particular first: "{what} with a batch ..." is also how another begins."""
    particular = sorted(FALLBACKS, key=lambda f: (f.reason.count("{"), -len(f.reason)))
    return [(re.compile(".+".join(map(re.escape, re.split(r"\{\w+\}", f.reason)))), f) for f in particular]


def remedy(reason: str) -> str:
    """What a user can do about a reason that was counted; "" where nobody knows."""
    return next((fallback.remedy for pattern, fallback in _patterns() if pattern.fullmatch(reason)), "")

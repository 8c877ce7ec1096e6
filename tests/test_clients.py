"""What other libraries do with a wrapped model: adapters, hooks, quantised weights, files, threads, pipelines."""

from __future__ import annotations

import asyncio
import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from side_by_side import RAGGED, Prompts, Tiny, same, wrap
from torch import Tensor
from transformers import AsyncTextIteratorStreamer, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers import pipeline as make_pipeline

import specdec

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # which PEFT asks
NEW = 12


def _sped(wrapped: Any, model: Any, **arguments: Any) -> Tensor:
    """Both generate the same; the wrapped one, drafting with its own target, takes the two steps of twelve tokens."""
    wrapped.specdec.stats.reset()
    out = same(wrapped, model, max_new_tokens=NEW, **arguments)
    stats = wrapped.specdec.stats
    assert not stats.fallbacks
    assert stats.steps == 2
    return out


def _falls_back(wrapped: Any, model: Any, reason: str, **arguments: Any) -> Tensor:
    wrapped.specdec.stats.reset()
    expected = model.generate(**arguments, max_new_tokens=NEW)
    with pytest.warns(UserWarning, match=f"specdec runs transformers' own loop: .*{reason}"):
        out = wrapped.generate(**arguments, max_new_tokens=NEW)
    assert torch.equal(out, expected)
    assert [*wrapped.specdec.stats.fallbacks.values()] == [1]
    return out


def _lora(**options: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, "init_lora_weights": False, **options})  # False: random, it changes the text


@pytest.fixture
def adapted(fresh: Tiny) -> PeftModel:
    """A Llama with two adapters, the first of them on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(fresh("llama"), _lora(), adapter_name="first")
        model.add_adapter("second", _lora(r=2))
    return model.eval()


def _wrap_adapted(model: PeftModel) -> PeftModel:
    return wrap(model, model.get_base_model())


def test_adapters_are_switched_and_turned_off(adapted: PeftModel, fresh: Tiny, prompts: Prompts) -> None:
    """On the result as on the model that was given, before and after calls."""
    wrapped, inputs = _wrap_adapted(adapted), prompts(RAGGED)
    assert type(wrapped) is type(adapted)
    assert not hasattr(adapted, "specdec")
    first = _sped(wrapped, adapted, **inputs)
    wrapped.set_adapter("second")
    second = _sped(wrapped, adapted, **inputs)
    for model in (wrapped, adapted):
        with model.disable_adapter():
            plain = _sped(wrapped, fresh("llama"), **inputs)
    adapted.set_adapter("first")
    assert torch.equal(_sped(wrapped, adapted, **inputs), first)
    assert len({tuple(text.flatten().tolist()) for text in (first, second, plain)}) == 3


def test_an_adapters_weights_and_scale_may_change(adapted: PeftModel, prompts: Prompts) -> None:
    wrapped, inputs = _wrap_adapted(adapted), prompts(RAGGED)
    before = _sped(wrapped, adapted, **inputs)
    layers = [m for m in adapted.modules() if hasattr(m, "set_scale")]
    for layer in layers:
        layer.set_scale("first", -3.0)
    scaled = _sped(wrapped, adapted, **inputs)
    with torch.no_grad():
        for layer in layers:
            layer.lora_A["first"].weight.mul_(-1)
    assert not torch.equal(before, scaled)
    assert not torch.equal(scaled, _sped(wrapped, adapted, **inputs))


def test_adapters_merged(adapted: PeftModel, prompts: Prompts) -> None:
    wrapped, inputs = _wrap_adapted(adapted), prompts(RAGGED)
    live = _sped(wrapped, adapted, **inputs)
    adapted.merge_adapter()
    assert torch.equal(_sped(wrapped, adapted, **inputs), live)
    adapted.unmerge_adapter()
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert type(merged) is type(adapted.get_base_model())
    assert torch.equal(_sped(wrap(merged, merged), adapted, **inputs), live)
    still_wrapped = copy.deepcopy(wrapped).merge_and_unload()  # of its draft a copy was made too, with live adapters
    assert torch.equal(_sped(still_wrapped, adapted, **inputs), live)


@pytest.mark.parametrize("how", ["base model", "around", "by transformers"])
def test_adapters_put_in_elsewhere(how: str, fresh: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model in a PEFT model, a PEFT model around a wrapped one, and transformers' own `add_adapter`."""
    # Transformers 5.24 asks for a PEFT that is not out yet.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    model, inputs = fresh("llama"), prompts(RAGGED)
    plain = model.generate(**inputs, max_new_tokens=NEW)
    torch.manual_seed(0)
    if how == "base model":
        unwrapped = get_peft_model(model, _lora()).eval()
        wrapped = wrap(model, model)
    elif how == "around":
        unwrapped = model
        around = wrap(model, model)
        _sped(around, model, **inputs)
        wrapped = get_peft_model(around, _lora()).eval()
    else:
        unwrapped = model
        model.add_adapter(_lora())
        wrapped = wrap(model.eval(), model)
    assert not torch.equal(_sped(wrapped, unwrapped, **inputs), plain)
    if how == "by transformers":
        wrapped.disable_adapters()
        assert torch.equal(_sped(wrapped, fresh("llama"), **inputs), plain)


def test_copies_of_adapted_models_and_many_prompts(adapted: PeftModel, prompts: Prompts, tmp_path: Path) -> None:
    wrapped, inputs = _wrap_adapted(adapted), prompts([5])
    expected = _sped(wrapped, adapted, **inputs)
    _sped(copy.deepcopy(wrapped), adapted, **inputs)
    (result,) = specdec.generate_many(wrapped, [inputs["input_ids"][0]], max_new_tokens=NEW)
    assert torch.equal(result.tokens, expected[0])
    wrapped.save_pretrained(tmp_path)
    adapted.save_pretrained(tmp_path / "theirs")
    for name in ("first/adapter_config.json", "first/adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_adapters_that_act_from_call_to_call_fall_back(adapted: PeftModel, fresh: Tiny, prompts: Prompts) -> None:
    wrapped, inputs = _wrap_adapted(adapted), prompts([5, 5])
    for names in (["first", "second"], ["second", "second"]):
        _falls_back(wrapped, adapted, "a forward hook", **inputs, adapter_names=names)
    torch.manual_seed(0)
    tuned = get_peft_model(fresh("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        _falls_back(wrap(tuned), tuned, "prepare_inputs_for_generation", **inputs)


def test_hooks_of_ones_own_fall_back(fresh: Tiny, prompts: Prompts) -> None:
    """Put on after the first call, which the steps know nothing of. Those of `output_hidden_states` are no bar."""
    model, inputs = fresh("llama"), prompts(RAGGED)
    wrapped = wrap(model, model)
    model(**inputs, output_hidden_states=True)
    plain = _sped(wrapped, model, **inputs)
    steering = model.model.layers[0].register_forward_hook(lambda module, arguments, out: -out)
    assert not torch.equal(_falls_back(wrapped, model, "a forward hook", **inputs), plain)
    steering.remove()
    _sped(wrapped, model, **inputs)


def test_a_module_without_weights_replaced(fresh: Tiny, prompts: Prompts) -> None:
    model, inputs = fresh("llama"), prompts(RAGGED)
    wrapped = wrap(model, model)
    plain = _sped(wrapped, model, **inputs)
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()
    assert not torch.equal(_sped(wrapped, model, **inputs), plain)


def test_a_model_that_counts_its_calls_is_not_made_anew(fresh: Tiny, prompts: Prompts) -> None:
    class Counting(torch.nn.SiLU):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model, inputs = fresh("llama"), prompts(RAGGED)
    model.model.layers[0].mlp.act_fn = Counting()
    wrapped = wrap(model)
    wrapped.generate(**inputs, max_new_tokens=NEW)
    steps = wrapped.specdec._decoders.get("ngram")
    wrapped.generate(**inputs, max_new_tokens=NEW)
    assert wrapped.specdec._decoders.get("ngram") is steps


@pytest.mark.parametrize(
    "put",
    [
        lambda model: cpu_offload(model, execution_device="cpu"),
        lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
        lambda model: add_hook_to_module(model.model.layers[0].mlp, ModelHook()),
    ],
    ids=["cpu_offload", "dispatch_model", "add_hook_to_module"],
)
def test_hooks_of_accelerate_fall_back(put: Callable[[PreTrainedModel], Any], fresh: Tiny, prompts: Prompts) -> None:
    model, inputs = fresh("llama"), prompts(RAGGED)
    wrapped = wrap(model, model)
    _sped(wrapped, model, **inputs)
    put(wrapped)
    _falls_back(wrapped, fresh("llama"), "accelerate's hooks", **inputs)


def test_hooks_of_accelerate_taken_off(fresh: Tiny, prompts: Prompts) -> None:
    """They leave a `forward` behind, which is the class's own; a copy of the module has it of the copy."""
    model, inputs = fresh("llama"), prompts(RAGGED)
    wrapped = wrap(model, model)
    for module in (model.model.layers[0].self_attn, wrapped):
        add_hook_to_module(module, ModelHook())
        remove_hook_from_module(module)
    _sped(wrapped, fresh("llama"), **inputs)


def test_accelerator(fresh: Tiny, prompts: Prompts) -> None:
    model, inputs, accelerator = fresh("llama"), prompts(RAGGED), Accelerator(cpu=True)
    prepared = accelerator.prepare(wrap(model, model))
    _sped(prepared, model, **inputs)
    _sped(accelerator.unwrap_model(prepared), model, **inputs)
    _sped(wrap(accelerator.prepare(model), model), model, **inputs)


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_another_dtype(change: str, fresh: Tiny, prompts: Prompts) -> None:
    """Set after a call. In half precision two tokens can be alike, and either is right."""
    model, other, inputs = fresh("llama"), fresh("llama"), prompts([9])
    wrapped = wrap(model, model)
    _sped(wrapped, model, **inputs)
    for m in (wrapped, other):
        getattr(m, change)()
    wrapped.specdec.stats.reset()
    out = wrapped.generate(**inputs, max_new_tokens=NEW)
    with torch.no_grad():
        logits = other(out[:, :-1]).logits[0, 8:].double()
    short_of_best = logits.amax(-1) - logits.gather(-1, out[0, 9:, None])[:, 0]
    assert out.shape[1] == 9 + NEW
    assert short_of_best.max() <= (0 if change == "double" else 0.05 * logits.std())
    assert not wrapped.specdec.stats.fallbacks
    assert wrapped.specdec.stats.steps <= 4


def test_saved_loaded_and_compiled_again(fresh: Tiny, prompts: Prompts, tmp_path: Path) -> None:
    model, inputs = fresh("llama"), prompts(RAGGED)
    wrapped = wrap(model, model)
    text = _sped(wrapped, model, **inputs)
    assert [*wrapped.state_dict()] == [*model.state_dict()]
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaders = AutoModelForCausalLM, type(wrapped)
    for loaded in (loader.from_pretrained(tmp_path) for loader in loaders):
        assert type(loaded) is type(model)
        assert torch.equal(_sped(wrap(loaded, loaded), loaded, **inputs), text)


@pytest.mark.parametrize("seed", [0, 1], ids=["the same weights", "others"])
def test_two_wrapped_models_in_two_threads(seed: int, tiny: Tiny, prompts: Prompts) -> None:
    models = [tiny("llama"), tiny("llama", seed=seed)]
    wrapped, inputs = [wrap(model, model) for model in models], [prompts(RAGGED, seed=i) for i in range(2)]
    expected = [m.generate(**x, max_new_tokens=NEW) for m, x in zip(models, inputs, strict=True)]
    together, outs = threading.Barrier(2, timeout=60), [[], []]

    def work(i: int) -> None:
        for _ in range(3):
            together.wait()
            outs[i].append(wrapped[i].generate(**inputs[i], max_new_tokens=NEW))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(outs[i]) == 3
        assert all(torch.equal(out, expected[i]) for out in outs[i])
        assert not wrapped[i].specdec.stats.fallbacks
        assert wrapped[i].specdec.stats.steps == 6


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} w4 {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", padding_side="left", chat_template=template,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def test_a_pipeline_of_chats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("w5 w6 w7", "w9")]
    wrapped = wrap(model, model)
    out, expected = (
        make_pipeline("text-generation", model=m, tokenizer=tokenizer)(chats, max_new_tokens=NEW, batch_size=2)
        for m in (wrapped, model)
    )
    assert out == expected
    assert out[0][0]["generated_text"][-1]["role"] == "assistant"
    assert wrapped.specdec.stats.steps == 2
    assert not wrapped.specdec.stats.fallbacks


def test_an_asynchronous_streamer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    wrapped, inputs = wrap(model, model), tokenizer(["w5 w6 w7"], return_tensors="pt")

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        arguments = {**inputs, "max_new_tokens": NEW, "streamer": streamer}
        thread = threading.Thread(target=wrapped.generate, kwargs=arguments)
        thread.start()
        text = "".join([piece async for piece in streamer])
        thread.join()
        return text

    expected = model.generate(**inputs, max_new_tokens=NEW)[0, 3:]
    assert asyncio.run(read()).split() == tokenizer.decode(expected).split()
    assert wrapped.specdec.stats.steps == 2


def test_adapters_on_a_draft(fresh: Tiny, prompts: Prompts) -> None:
    """As the draft of all calls, and of one."""
    model, config = fresh("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    draft = get_peft_model(fresh("llama", seed=7, num_hidden_layers=1), config)
    inputs = {**prompts([6]), "max_new_tokens": 8}
    for wrapped, given in ((wrap(model, draft), {}), (wrap(model, None), {"assistant_model": draft})):
        out = wrapped.generate(**inputs, **given)
        assert torch.equal(out, model.generate(**inputs))
        assert not wrapped.specdec.stats.fallbacks
        assert sum(wrapped.specdec.stats.proposed) > 0

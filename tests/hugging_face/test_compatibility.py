"""What people do with a model, done with one that runs on llmcore.

Each test runs for a model with llmcore's attention, and for one that is accelerated as a whole.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import CACHE, build, inputs, padding, prepared, transformers, valid, word_tokenizer

HOWS = ("attention", "accelerate")


@pytest.fixture(params=HOWS)
def how(request) -> str:
    return request.param


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def logits(model, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments).logits


# Generation


def greedy(model, ids, mask=None, **options) -> torch.Tensor:
    """Eight tokens more for each row."""
    options = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **options)[:, -8:]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_left_padded_batch_is_each_sequence_alone(family, cache, how):
    model = prepared(build(family), how)
    ids, mask = inputs(family)["input_ids"], padding("left")
    batch = greedy(model, ids, mask, cache_implementation=cache)
    for row, keep, got in zip(ids, mask.bool(), batch, strict=True):
        alone = greedy(model, row[keep][None], cache_implementation=cache)
        assert torch.equal(alone[0], got)


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_generate_over_a_quantised_cache(backend, how):
    needs(*{"hqq": ("hqq",), "quanto": ("optimum", "optimum.quanto")}[backend])
    axis = 1 if backend == "hqq" else 0
    sizes = {"nbits": 8 if backend == "hqq" else 4, "q_group_size": 8, "residual_length": 4}
    cache = {"backend": backend, **sizes, "axis_key": axis, "axis_value": axis}
    options = {"cache_implementation": "quantized", "cache_config": cache}
    ids, mask = inputs("llama")["input_ids"], padding("left")
    expected = greedy(build("llama"), ids, mask, **copy.deepcopy(options))
    assert torch.equal(greedy(prepared(build("llama"), how), ids, mask, **options), expected)


# Training


def trained(model, steps=2) -> tuple[float, dict[str, torch.Tensor]]:
    arguments = inputs("llama", "right")
    labels = arguments["input_ids"].masked_fill(~arguments["attention_mask"].bool(), -100)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(steps):
        loss = model(**arguments, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), model.state_dict()


def same_weights(got, expected, bound=1e-4) -> bool:
    return got.keys() == expected.keys() and all(
        (got[name] - weight).abs().max() <= bound for name, weight in expected.items()
    )


def test_training_steps_and_gradient_checkpointing(how):
    loss, weights = trained(build("llama").train())
    got_loss, got = trained(prepared(build("llama"), how).train())
    assert abs(loss - got_loss) <= 1e-5 and same_weights(got, weights)
    model = prepared(build("llama"), how).train()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again_loss, again = trained(model)
    assert abs(loss - again_loss) <= 1e-5 and same_weights(again, weights)


def trainer_run(model, folder):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (9, 5, 7, 9)]

    def collate(batch):
        longest = max(map(len, batch))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }

    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    return trainer.train().training_loss, model.state_dict()


@pytest.mark.slow
def test_transformers_trainer(how, tmp_path):
    needs("accelerate")
    loss, weights = trainer_run(build("llama"), tmp_path)
    got_loss, got = trainer_run(prepared(build("llama"), how), tmp_path)
    assert abs(loss - got_loss) <= 1e-4 and same_weights(got, weights, 1e-3)


def sft_run(model, folder, lora=False):
    import datasets
    import peft
    import trl

    texts = [" ".join(f"w{(i * k) % 90}" for i in range(4 + k)) for k in range(1, 9)]
    arguments = trl.SFTConfig(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=word_tokenizer(),
        peft_config=peft.LoraConfig(r=2, init_lora_weights=False) if lora else None,
    )
    return trainer.train().training_loss, trainer.model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trl_sft_trainer(how, lora, tmp_path):
    needs("trl", "datasets", "peft")
    loss, weights = sft_run(build("llama"), tmp_path, lora)
    got_loss, got = sft_run(prepared(build("llama"), how), tmp_path, lora)
    assert abs(loss - got_loss) <= 1e-4 and same_weights(got, weights, 1e-3)


def with_lora(model):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.slow
def test_peft_lora_on_top(how):
    needs("peft")
    expected, got = with_lora(build("llama")), with_lora(prepared(build("llama"), how))
    assert same_weights(got.state_dict(), expected.state_dict(), 0)
    arguments = inputs("llama")
    assert (logits(got, **arguments) - logits(expected, **arguments)).abs().max() <= 1e-4
    loss, weights = trained(expected.train())
    got_loss, trained_weights = trained(got.train())
    assert abs(loss - got_loss) <= 1e-5 and same_weights(trained_weights, weights)
    merged, own = got.eval().merge_and_unload(), expected.eval().merge_and_unload()
    assert (logits(merged, **arguments) - logits(own, **arguments)).abs().max() <= 1e-4


def distributed(mode: str, how: str) -> str:
    script = str(Path(__file__).with_name("distributed_runs.py"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *(launch if mode != "one" else []), script, mode, how]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_as_one(mode, how):
    def numbers(text):
        return torch.tensor([float(line.split()[1]) for line in text.splitlines()])

    one, two = numbers(distributed("one", how)), numbers(distributed(mode, how))
    assert one.shape == two.shape == (3,)
    assert (one - two).abs().max() <= 1e-4


# What is done to a model


def test_autocast(how):
    arguments = inputs("llama", "left")
    gold = valid(logits(build("llama"), **arguments), arguments)
    with torch.autocast("cpu", torch.bfloat16):
        plain = valid(logits(build("llama"), **arguments), arguments)
        got = valid(logits(prepared(build("llama"), how), **arguments), arguments)
    assert got.dtype == plain.dtype
    bound = 2 * (plain - gold).abs().max() + 2 * torch.finfo(torch.bfloat16).eps * gold.abs().max()
    assert (got - gold).abs().max() <= bound


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("mistral", "bert")]


@pytest.mark.parametrize("family", ["llama", *SLOW])
def test_compiles_without_a_graph_break(family, how):
    """Padded and not, in inference and in training."""
    model = prepared(build(family), how)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cacheless = {} if family == "bert" else {"use_cache": False}
    for kind in ("none", "left"):
        arguments = {**inputs(family, kind), **cacheless}
        expected = valid(logits(model, **arguments), arguments)
        assert (valid(logits(compiled, **arguments), arguments) - expected).abs().max() <= 1e-5
    compiled(**arguments).logits.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(**arguments).logits.square().mean().backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        scale = parameter.grad.abs().max().clamp(min=1)
        assert (gradient - parameter.grad).abs().max() <= 1e-5 * scale
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_steps_over_a_static_cache(how):
    """As generate() runs them on an accelerator: the mask is made outside of the graph."""
    model = prepared(build("gemma2"), how)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, mask = inputs("gemma2")["input_ids"], padding("left")
    outputs = []
    for step in (model, compiled):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(input_ids=ids[:, :6], attention_mask=mask[:, :6], **{CACHE: cache})
            for end in (7, 8, 9):
                prepared_inputs = model.prepare_inputs_for_generation(
                    ids[:, :end],
                    attention_mask=mask[:, :end],
                    **{CACHE: cache},
                    next_sequence_length=1,
                )
                prepared_inputs.pop("use_cache", None)
                outputs.append(step(**prepared_inputs).logits)
    torch._dynamo.reset()
    for plain, other in zip(outputs[:3], outputs[3:], strict=True):
        assert (plain - other).abs().max() <= 1e-5


def test_deepcopy_state_dict_and_torch_save(how):
    model, arguments = prepared(build("llama"), how), inputs("llama", "left")
    expected = logits(model, **arguments)
    assert torch.equal(logits(copy.deepcopy(model), **arguments), expected)
    assert model.state_dict().keys() == build("llama").state_dict().keys()
    other = prepared(build("llama"), how)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, **arguments), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), **arguments), expected)


def test_save_pretrained_and_load(how, tmp_path):
    model, arguments = prepared(build("llama"), how), inputs("llama")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="llmcore"
    )
    assert again.config._attn_implementation == "llmcore"
    assert (logits(again, **arguments) - logits(model, **arguments)).abs().max() <= 1e-4


def in_worker(pickled: bytes, arguments) -> torch.Tensor:
    torch.set_num_threads(1)
    return logits(pickle.loads(pickled), **arguments)


@pytest.mark.slow
def test_a_worker_process_takes_a_pickled_model(how):
    model, arguments = prepared(build("llama"), how), inputs("llama", "left")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got = pool.apply(in_worker, (pickle.dumps(model), arguments))
    assert (got - logits(model, **arguments)).abs().max() <= 1e-6

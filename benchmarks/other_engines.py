"""llama.cpp, CTranslate2 and onnxruntime-genai, for whoever has them installed.

Each runs a model of ours on as many threads as torch does. What they need on disk is made once, and
a file appears whole or not at all.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from llmcore.models import Decoder
from llmcore.models.convert import to_theirs
from llmcore.models.families import GGUF_LLAMA
from llmcore.storage import whole

from .engines import LLAMA_CPP, OTHERS, Engine, Job, Stepping

GGUF_WIDTHS = {"F32": "fp32", "BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}
"""llama.cpp's formats, and how wide a weight is in them."""

CTRANSLATE2_WIDTHS = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}

GENAI_WIDTHS = {"fp32": "fp32", "int4": "int4"}
"""onnxruntime-genai's for CPUs."""


def write_gguf(model: Decoder, path: Path) -> None:
    """The model's float32 weights, without a vocabulary: it is fed with ids."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in to_theirs(model, GGUF_LLAMA).items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_file(load: Callable[[], Decoder], folder: Path, format: str) -> Path:
    """A model in one of GGUF_WIDTHS, in this folder; quantised by llama.cpp itself."""
    path = folder / f"{format}.gguf"
    if path.exists():
        return path
    if format == "F32":
        with whole(path) as part:
            write_gguf(load(), part)
        return path
    import llama_cpp

    source = gguf_file(load, folder, "F32")
    name = f"LLAMA_FTYPE_MOSTLY_{format}"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, name)
    parameters.nthread = torch.get_num_threads()
    with whole(path) as part:
        status = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(part), ctypes.byref(parameters)
        )
        if status:
            raise RuntimeError(f"llama.cpp could not make {path.name} (status {status})")
    return path


class LlamaCpp(Stepping):
    """llama.cpp through llama-cpp-python, by its C interface: nothing of Python in a pass."""

    side = LLAMA_CPP

    def __init__(self, load: Callable[[], Decoder], folder: Path, format: str) -> None:
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        self.library: Any = llama_cpp
        self.name, self.width = f"llama.cpp {format}", GGUF_WIDTHS[format]
        path = gguf_file(load, folder, format)
        parameters = llama_cpp.llama_model_default_params()
        self.model: Any = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.context: Any = None
        self.position = 0

    def begin(self, job: Job) -> None:
        parameters = self.library.llama_context_default_params()
        parameters.n_seq_max = job.batch
        parameters.n_ctx = job.batch * (-(-job.length // 256) * 256)
        parameters.n_batch = parameters.n_ubatch = max(512, job.batch * job.context)
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        self.context = self.library.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.memory = self.library.llama_get_memory(self.context)
        self.batch = self.library.llama_batch_init(parameters.n_batch, 0, 1)
        self.position = 0

    def step(self, ids: Tensor) -> None:
        rows, new = ids.shape
        batch = self.batch
        batch.n_tokens = rows * new
        for i, token in enumerate(ids.flatten().tolist()):
            batch.token[i] = token
            batch.pos[i] = self.position + i % new
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // new
            batch.logits[i] = i % new == new - 1
        status = self.library.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode says {status}")
        self.library.llama_synchronize(self.context)
        self.position += new
        self.last = [(row + 1) * new - 1 for row in range(rows)]

    def rewind(self) -> None:
        self.library.llama_memory_seq_rm(self.memory, -1, self.job.context, -1)
        self.position = self.job.context

    def logits(self, result: None) -> Tensor:
        rows = []
        for last in self.last:
            at = self.library.llama_get_logits_ith(self.context, last)
            rows.append(numpy.ctypeslib.as_array(at, (self.vocabulary,)).copy())
        return torch.from_numpy(numpy.stack(rows))

    def close(self) -> None:
        if self.context:
            self.library.llama_batch_free(self.batch)
            self.library.llama_free(self.context)
            self.context = None


class CTranslate2(Engine):
    """CTranslate2's Generator, timed from token to token: it has no passes to be called."""

    side = OTHERS

    def __init__(self, stock_folder: Path, folder: Path, format: str) -> None:
        import ctranslate2

        self.name, self.width = f"CTranslate2 {format}", CTRANSLATE2_WIDTHS[format]
        path = folder / f"ctranslate2-{format}"
        if not path.exists():
            with whole(path) as part:
                converter = ctranslate2.converters.TransformersConverter(str(stock_folder))
                converter.convert(str(part), quantization=format)
        threads = torch.get_num_threads()
        self.generator = ctranslate2.Generator(
            str(path), compute_type=format, inter_threads=1, intra_threads=threads
        )
        self.tokens = json.loads((path / "vocabulary.json").read_text())

    def prepare(self, job: Job, ids: Tensor) -> None:
        self.job = job
        prompt = ids[:, : job.new if job.is_prefill else job.context]
        self.prompts = [[self.tokens[i] for i in row] for row in prompt.tolist()]
        self.seconds()

    def seconds(self) -> float:
        """To the first token (prefill), or from the first one to the last, for each step."""
        job, times = self.job, [time.perf_counter()]
        steps = 1 if job.is_prefill else job.passes + 1

        def note(result: Any) -> bool:
            if result.batch_id == job.batch - 1:
                times.append(time.perf_counter())
            return False

        self.generator.generate_batch(
            self.prompts,
            max_length=steps,
            min_length=steps,
            include_prompt_in_result=False,
            callback=note,
        )
        if job.is_prefill:
            return times[1] - times[0]
        return (times[-1] - times[1]) / (len(times) - 2)


class OnnxRuntimeGenAI(Stepping):
    """onnxruntime-genai, one sequence, on what its own builder makes of a Hugging Face folder."""

    side = OTHERS

    def __init__(self, stock_folder: Path, folder: Path, format: str) -> None:
        import onnxruntime_genai

        self.library: Any = onnxruntime_genai
        self.name, self.width = f"onnxruntime-genai {format}", GENAI_WIDTHS[format]
        path = folder / f"genai-{format}"
        if not path.exists():
            with whole(path) as part:
                builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
                paths = ["-i", str(stock_folder), "-o", str(part), "-c", str(part)]
                command = [*builder, *paths, "-p", format, "-e", "cpu"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        config = onnxruntime_genai.Config(str(path))
        session = {"intra_op_num_threads": torch.get_num_threads()}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model: Any = onnxruntime_genai.Model(config)
        self.generator: Any = None

    def begin(self, job: Job) -> None:
        if job.batch > 1:
            raise RuntimeError("behind its prompt a batch takes the tokens of its own choice only")
        parameters = self.library.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=1, max_length=job.length + 1)
        self.generator = self.library.Generator(self.model, parameters)

    def step(self, ids: Tensor) -> None:
        self.generator.append_tokens(ids.numpy().astype(numpy.int32).flatten())

    def rewind(self) -> None:
        self.generator.rewind_to(self.job.context)

    def logits(self, result: None) -> Tensor:
        found = torch.from_numpy(numpy.array(self.generator.get_logits()))
        return found.reshape(1, -1, found.shape[-1])[:, -1].float()

    def close(self) -> None:
        self.generator = None


ABSENT = {
    "OpenVINO": "no engine: its converter does not take transformers' own cache as it is",
}
"""Who could take part, and why they don't."""

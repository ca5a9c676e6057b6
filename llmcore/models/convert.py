"""Other libraries' weights and configs as ours, and ours as theirs, by the tables of families."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmcore.models.config import TransformerConfig
from llmcore.models.families import HUGGING_FACE, Family, Model
from llmcore.models.packed import check_not_packed
from llmcore.models.transformer import Decoder, Encoder
from llmcore.ops.packed_weight import Integers, PackedWeight, from_integers

# Fields that no library's config.json is asked for: they are not the model's shape.
NOT_SHAPE = ("dropout", "eos_ids")


def to_ours(theirs: Mapping[str, Tensor], family: Family, config: TransformerConfig) -> Any:
    """A float32 model of the family's class, in eval mode, with these weights.

    ValueError, with the tensors' names, when some are missing, superfluous, of another shape than
    the config's, or no floating-point numbers.
    """
    theirs = {_whole_name(name, family): tensor for name, tensor in theirs.items()}
    with torch.device("meta"):
        model = family.model(config)
    state = {}
    left = {name for name in theirs if not re.fullmatch(family.ignored, name)}
    if config.tied_embeddings:  # some files repeat the embedding as a head
        left -= {
            f"{module}.weight"
            for name, modules in family.modules.items()
            if name.rpartition(".")[2] == "head"
            for module in modules
        }
    for name, expected in model.state_dict().items():
        sources = _sources(name, family)
        missing = [source.name for source in sources if source.name not in theirs]
        if missing:
            raise ValueError(f"{family.name} model must have {', '.join(missing)}: not found")
        counts = _rows(expected, len(sources), config)
        for source, count in zip(sources, counts, strict=True):
            shape = source.shape((count, *expected.shape[1:]))
            _check(source.name, theirs[source.name], shape)
            left.discard(source.name)
        state[name] = _joined([theirs[s.name] for s in sources], sources, config).float()
    if left:
        names = ", ".join(sorted(left)[:4]) + (" ..." if len(left) > 4 else "")
        raise ValueError(f"{len(left)} tensors have no place in {family.name} model: {names}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def packed_to_ours(
    theirs: Mapping[str, Integers], family: Family, config: TransformerConfig
) -> dict[str, PackedWeight]:
    """The modules of ours whose matrices are all there, of one format: their integers as they are.

    `theirs` holds what `to_ours` has checked, as integers where it is quantised.
    """
    packed = {}
    with torch.device("meta"):
        names = [name for name, _ in Decoder(config).named_parameters() if name.endswith(".weight")]
    for name in names:
        sources = _sources(name, family)
        parts = [theirs[source.name] for source in sources if source.name in theirs]
        if len(parts) < len(sources) or len({(p.format, p.minimums is None) for p in parts}) > 1:
            continue
        minimums = [p.minimums for p in parts if p.minimums is not None]
        packed[name.removesuffix(".weight")] = from_integers(
            parts[0].format,
            _joined([p.q for p in parts], sources, config),
            _joined([p.scales for p in parts], sources, config),
            _joined(minimums, sources, config) if minimums else None,
        )
    return packed


def to_theirs(model: Model, family: Family) -> dict[str, Tensor]:
    """The model's weights under the family's names, in the parameters' dtype, as copies.

    ValueError for packed weights.
    """
    check_not_packed(model)
    theirs = {}
    for name, tensor in model.state_dict().items():
        sources = _sources(name, family)
        parts = tensor.split(_rows(tensor, len(sources), model.config))
        for source, part in zip(sources, parts, strict=True):
            theirs[source.name] = source.theirs(part, model.config).clone()
    return theirs


def to_transformers(model: Model, attention: str = "eager") -> Any:
    """The stock transformers model with copies of these weights, in eval mode.

    attention  its attn_implementation
    ImportError without transformers, ValueError when no family there has the model's shape.
    """
    import transformers

    family, found = hugging_face_of(model)
    stock_class = getattr(transformers, _stock(model, family))
    state = {name: tensor.contiguous() for name, tensor in to_theirs(model, family).items()}
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        stock, report = stock_class.from_pretrained(
            None,
            config=stock_class.config_class(**found),
            state_dict=state,
            attn_implementation=attention,
            dtype=next(model.parameters()).dtype,
            output_loading_info=True,
        )
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = [name for name in report[what] if not re.fullmatch(family.ignored, str(name))]
        assert not wrong, f"{what}: {wrong}"
    return stock.eval()


def hugging_face_of(model: Model) -> tuple[Family, dict[str, Any]]:
    """The family there whose shape the model has, and what its config.json says.

    ValueError, with the nearest family and what of the model it doesn't have, when there is none.
    """
    best: ValueError | None = None
    fewest = None
    for family in HUGGING_FACE:
        if not isinstance(model, family.model):
            continue
        found, lost = _written(model.config, family)
        if not lost:
            return family, found
        if fewest is None or len(lost) < fewest:
            best, fewest = ValueError(_differs(family, lost)), len(lost)
    assert best is not None
    raise best


def family_of(found: Mapping[str, Any]) -> Family:
    """The family of a config.json; ValueError for another model_type."""
    kind = found.get("model_type")
    same = [family for family in HUGGING_FACE if family.kind == kind]
    if not same:
        kinds = ", ".join(dict.fromkeys(repr(family.kind) for family in HUGGING_FACE))
        raise ValueError(f"model_type {kind!r} in config.json: accepted are {kinds}")
    fitting = [family for family in same if not _refused(found, family)]
    return (fitting or same)[0]


def config_from_hugging_face(found: Mapping[str, Any]) -> TransformerConfig:
    """From the contents of a config.json; ValueError for what our models don't do."""
    return _read(found, family_of(found))


def config_to_hugging_face(
    config: TransformerConfig, family: Family = HUGGING_FACE[0]
) -> dict[str, Any]:
    """The contents of the family's config.json; ValueError for a shape that it doesn't have."""
    found, lost = _written(config, family)
    if lost:
        raise ValueError(_differs(family, lost))
    return found


def _read(found: Mapping[str, Any], family: Family) -> TransformerConfig:
    if refused := _refused(found, family):
        raise ValueError(refused[0])
    full = {**family.defaults, **{key: v for key, v in found.items() if v is not None}}
    copied = {ours: full[theirs] for ours, theirs in family.keys.items() if theirs in full}
    eos = found.get("eos_token_id")
    return TransformerConfig(
        **{
            **copied,
            **family.fixed,
            **family.read(full),
            "eos_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        }
    )


def _stock(model: Model, family: Family) -> str:
    """The name of transformers' class for this model."""
    if isinstance(family.stock, str):
        return family.stock
    outputs = model.config.outputs
    if outputs not in family.stock:
        accepted = ", ".join(map(str, family.stock))
        raise ValueError(f"{family.name} has the outputs {accepted}, not {outputs}")
    return family.stock[outputs]


def _written(
    config: TransformerConfig, family: Family
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """A config.json, and of each field that reading it gives another value: ours and that."""
    eos: Any = list(config.eos_ids) or None
    found = {
        "model_type": family.kind,
        **{theirs: getattr(config, ours) for ours, theirs in family.keys.items()},
        "eos_token_id": eos[0] if eos and len(eos) == 1 else eos,
        **family.write(config),
    }
    # What would be refused, or not found, is what the family does not have.
    readable = {**found, **{k: v for k, v in family.required.items() if not isinstance(v, tuple)}}
    try:
        read = _read(readable, family)
    except ValueError:
        read = None
    parts = ("outputs", "head_bias") if family.model is Encoder else ()
    lost = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in (*NOT_SHAPE, *parts):
            continue
        if read is None:
            other = family.fixed.get(field.name, field.default)
            if field.name not in family.keys and value != other:
                lost[field.name] = (value, other)
        elif getattr(read, field.name) != value:
            lost[field.name] = (value, getattr(read, field.name))
    return found, lost


def _differs(family: Family, lost: Mapping[str, tuple[Any, Any]]) -> str:
    said = ", ".join(f"{name} {other!r}, not {value!r}" for name, (value, other) in lost.items())
    return f"{family.name} model has {said}"


def _refused(found: Mapping[str, Any], family: Family) -> list[str]:
    """What a config.json says that we don't know what to do with, as sentences."""
    reasons = []
    for key, accepted in family.required.items():
        choices = accepted if isinstance(accepted, tuple) else (accepted,)
        if key in found and found[key] not in choices:
            said = " or ".join(map(repr, choices))
            reasons.append(f"{key} {found[key]!r} in config.json: accepted is {said}")
    return reasons


def config_from_gguf(fields: Mapping[str, Any], tied_embeddings: bool) -> TransformerConfig:
    """From a GGUF file's fields; ValueError for what our decoder doesn't do, KeyError for a gap."""
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    head_width = fields.get("llama.attention.key_length", width // heads)
    demands = {
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "llama.rope.dimension_count": head_width,
        "llama.attention.value_length": head_width,
    }
    for name, accepted in demands.items():
        if fields.get(name, accepted) != accepted:
            raise ValueError(f"{name} is {fields[name]!r}: accepted is {accepted!r}")
    ends = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return TransformerConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        width=width,
        layers=fields["llama.block_count"],
        heads=heads,
        kv_heads=fields.get("llama.attention.head_count_kv", heads),
        head_width=head_width,
        feed_forward=fields["llama.feed_forward_length"],
        context_length=fields["llama.context_length"],
        # GGUF holds float32: the shortest decimal gives back the number meant, 1e-05.
        norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        rope_theta=float(fields.get("llama.rope.freq_base", 10000.0)),
        tied_embeddings=tied_embeddings,
        eos_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


@dataclasses.dataclass(frozen=True)
class _Source:
    """A tensor of theirs that is a parameter of ours, or some of its rows."""

    name: str
    interleaved: bool
    transposed: bool
    unsqueezed: bool

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Theirs, of the shape of our rows."""
        if self.unsqueezed:
            return (1, *ours)
        return ours[::-1] if self.transposed else ours

    def ours(self, tensor: Tensor, config: TransformerConfig) -> Tensor:
        if self.unsqueezed:
            return tensor[0]
        rows = tensor.T if self.transposed else tensor
        return _half_split(rows, config) if self.interleaved else rows

    def theirs(self, tensor: Tensor, config: TransformerConfig) -> Tensor:
        if self.unsqueezed:
            return tensor[None]
        rows = _interleaved(tensor, config) if self.interleaved else tensor
        return rows.T if self.transposed else rows


def _sources(name: str, family: Family) -> list[_Source]:
    """The tensors that make up our parameter, in order of rows."""
    if not family.modules:
        return [_Source(name, interleaved=False, transposed=False, unsqueezed=False)]
    numbers = re.findall(r"\.(\d+)(?=\.)", name)
    key = re.sub(r"\.\d+(?=\.)", ".{}", name)
    module, _, kind = key.rpartition(".")
    if key in family.modules:
        module, ending = key, ""
    else:
        ending = f".{kind}"
    if module not in family.modules:
        raise ValueError(f"{family.name} model has no {name}")
    return [
        _Source(
            theirs.format(*numbers) + ending,
            interleaved=theirs in family.interleaved,
            transposed=theirs in family.transposed and kind == "weight",
            unsqueezed=theirs in family.unsqueezed,
        )
        for theirs in family.modules[module]
    ]


def names_of(theirs: Mapping[str, Tensor], family: Family) -> set[str]:
    """The tensors' names as the family's table has them."""
    return {_whole_name(name, family) for name in theirs}


def _whole_name(name: str, family: Family) -> str:
    """A tensor's name with the prefix that a file of the base model leaves out."""
    whole = family.prefix + name
    if not family.prefix or name.startswith(family.prefix):
        return name
    stem = family.prefix + name.partition(".")[0] + "."
    of_base = any(theirs.startswith(stem) for m in family.modules.values() for theirs in m)
    return whole if of_base else name


def _rows(tensor: Tensor, parts: int, config: TransformerConfig) -> list[int]:
    """How many rows of our parameter each of its parts gives."""
    if parts == 3:
        kv = config.kv_heads * config.head_width
        return [config.heads * config.head_width, kv, kv]
    return [tensor.shape[0] // parts] * parts


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; the config says {shape}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; floating-point weights are accepted")


def _joined(parts: list[Tensor], sources: list[_Source], config: TransformerConfig) -> Tensor:
    """The parts that `_sources` names, one below the other, their rows in our order."""
    rows = [source.ours(part, config) for part, source in zip(parts, sources, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _half_split(rows: Tensor, config: TransformerConfig) -> Tensor:
    """Rows (heads, D/2, 2) as (heads, 2, D/2)."""
    pairs = rows.reshape(-1, config.head_width // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _interleaved(rows: Tensor, config: TransformerConfig) -> Tensor:
    """The way back: rows (heads, 2, D/2) as (heads, D/2, 2)."""
    halves = rows.reshape(-1, 2, config.head_width // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)

"""PTX text to a small syntax tree: a flat instruction list per function, scopes renamed away."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from .dtypes import TYPES, PtxType
from .errors import PtxSyntaxError


@dataclass(frozen=True)
class Reg:
    """A general register, or a special one such as ``%tid.x``; ``negated`` for ``!%p``."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """An immediate: an int, or raw float bits with their width."""

    value: int
    float_bits: int = 0

    def bits(self, kind: PtxType) -> int:
        """The raw bits of this immediate as an operand of type ``kind``."""
        if self.float_bits and kind.bits != self.float_bits and kind.is_float:
            number = struct.unpack(
                "<f" if self.float_bits == 32 else "<d",
                self.value.to_bytes(self.float_bits // 8, "little"),
            )[0]
            packed = struct.pack("<d" if kind.bits == 64 else "<f", number)
            return int.from_bytes(packed, "little")
        return self.value & ((1 << kind.bits) - 1)


@dataclass(frozen=True)
class Sym:
    """A variable, label or function name, with a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    """``{a, b, ...}``, ``(a, b, ...)`` or ``p|q``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Mem:
    """``[base + offset]``; ``extra`` holds further bracketed operands (TMA coordinates)."""

    base: Operand
    offset: int = 0
    extra: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Sink:
    """``_``: a result that is thrown away."""


Operand = Reg | Imm | Sym | Vec | Mem | Sink


@dataclass(frozen=True)
class Instr:
    """One instruction: ``@guard op.mod.mod operands;``"""

    line: int
    opcode: str
    operands: tuple[Operand, ...]
    guard: Reg | None = None
    source: str = ""

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    @property
    def op(self) -> str:
        return self.parts[0]

    @cached_property
    def mods(self) -> frozenset[str]:
        return frozenset(self.parts[1:])

    @cached_property
    def types(self) -> tuple[PtxType, ...]:
        """The type modifiers, in order."""
        return tuple(TYPES[p] for p in self.parts[1:] if p in TYPES)

    @property
    def type(self) -> PtxType:
        """The last type modifier (the operand type of most instructions)."""
        if not self.types:
            raise PtxSyntaxError(f"line {self.line}: {self.opcode} has no type")
        return self.types[-1]

    @cached_property
    def where(self) -> str:
        return f"PTX line {self.line}: {self.opcode}" + (
            f"  ({self.source})" if self.source else ""
        )


@dataclass
class Variable:
    """A .param/.shared/.local/.global/.const variable."""

    name: str
    space: str
    type: PtxType
    count: int = 1
    align: int = 1
    init: tuple[int | str, ...] = ()
    extern: bool = False

    @property
    def nbytes(self) -> int:
        return self.type.nbytes * self.count


@dataclass
class Function:
    """An .entry or .func: parameters, registers, local variables and flat code."""

    name: str
    entry: bool
    params: list[Variable] = field(default_factory=list)
    results: list[Variable] = field(default_factory=list)
    registers: dict[str, PtxType] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    code: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    reqntid: tuple[int, ...] | None = None


@dataclass
class PtxModule:
    """A parsed file."""

    functions: dict[str, Function] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    target: str = ""


_TOKEN = re.compile(
    r"""
    (?P<str>"[^"]*")
  | (?P<f32>0[fF][0-9a-fA-F]{8}\b) | (?P<f64>0[dD][0-9a-fA-F]{16}\b)
  | (?P<hex>0[xX][0-9a-fA-F]+)U? | (?P<real>\d+\.\d*(?:[eE][-+]?\d+)?) | (?P<int>\d+)U?
  | (?P<word>[%$_a-zA-Z][\w$]*(?:(?:\.|::)[\w$]+)*)
  | (?P<dir>\.[a-zA-Z_][\w$]*(?:::\w+)*)
  | (?P<punct>[{}()\[\],;:@!|<>=+\-])
""",
    re.VERBOSE,
)
_SPACES = {".param", ".shared", ".local", ".global", ".const"}
_LINKAGE = {".visible", ".extern", ".weak", ".common"}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def _strip_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


class _Parser:
    def __init__(self, text: str) -> None:
        text = _strip_comments(text)
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
        self.module = PtxModule()
        self.tokens = list(self._tokenise(text))
        self.at = 0
        self.scope_count = 0

    def _tokenise(self, text: str) -> Iterator[_Token]:
        for number, line in enumerate(text.split("\n"), 1):
            head = line.split(None, 1)[:1]
            if head == [".loc"]:
                fields = line.split()
                name = self.files.get(fields[1], "?").rsplit("/", 1)[-1]
                yield _Token("loc", f"{name}:{fields[2]}", number)
                continue
            if head == [".target"]:
                self.module.target = line.split(None, 1)[1].strip()
            if head and head[0] in {".file", ".version", ".target", ".address_size"}:
                continue
            at = 0
            while at < len(line):
                if line[at].isspace():
                    at += 1
                    continue
                match = _TOKEN.match(line, at)
                if not match:
                    raise PtxSyntaxError(f"line {number}: cannot read {line[at : at + 20]!r}")
                yield _Token(match.lastgroup or "", match.group(match.lastgroup or 0), number)
                at = match.end()
        yield _Token("end", "", 0)

    # --- token helpers --------------------------------------------------------------------------
    @property
    def peek(self) -> _Token:
        return self.tokens[self.at]

    def next(self) -> _Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def accept(self, text: str) -> bool:
        if self.peek.text == text and self.peek.kind != "str":
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        token = self.next()
        if token.text != text:
            raise PtxSyntaxError(f"line {token.line}: expected {text!r}, found {token.text!r}")

    def _skip_to(self, closing: str) -> None:
        while self.next().text != closing:
            pass

    # --- module level ---------------------------------------------------------------------------
    def parse(self) -> PtxModule:
        while self.peek.kind != "end":
            linkage = set()
            while self.peek.text in _LINKAGE:
                linkage.add(self.next().text)
            text = self.peek.text
            if text in {".entry", ".func"}:
                self._function()
            elif text in _SPACES:
                self.module.variables += self._variables(".extern" in linkage)
            elif text == ".section":
                self._skip_to("{")
                self._skip_to("}")
            elif self.peek.kind == "loc":
                self.next()
            else:
                self._skip_to(";")
        return self.module

    def _variables(self, extern: bool = False, until: tuple[str, ...] = (";",)) -> list[Variable]:
        space = self.next().text[1:]
        align, kind, vector = 1, None, 1
        while self.peek.kind == "dir":
            text = self.next().text
            if text == ".align":
                align = max(align, int(self.next().text))
            elif text[1:] in TYPES:
                kind = TYPES[text[1:]]
            elif re.fullmatch(r"\.v\d", text):
                vector = int(text[2:])
            elif text in {".ptr", ".global", ".shared", ".const", ".local"}:
                continue
        if kind is None:
            raise PtxSyntaxError(f"line {self.peek.line}: variable without a type")
        found = []
        while True:
            name, count = self.next().text, vector
            extent = False
            while self.accept("["):
                extent = True
                count *= 0 if self.peek.text == "]" else int(self.next().text)
                self.expect("]")
            init: tuple[int | str, ...] = ()
            if self.accept("="):
                init = self._initialiser()
            found.append(
                Variable(
                    name,
                    space,
                    kind,
                    count if extent or vector > 1 else 1,
                    max(align, kind.nbytes * vector),
                    init,
                    extern,
                )
            )
            if not (until == (";",) and self.accept(",")):
                break
        if until == (";",):
            self.expect(";")
        return found

    def _initialiser(self) -> tuple[int | str, ...]:
        values: list[int | str] = []
        depth = 0
        while True:
            token = self.next()
            if token.text == "{":
                depth += 1
            elif token.text == "}":
                depth -= 1
            elif token.text == "-":
                values.append(-int(self.next().text, 0))
            elif token.kind in {"f32", "f64"}:
                values.append(int(token.text[2:], 16))
            elif token.kind in {"int", "hex"}:
                values.append(int(token.text, 0))
            elif token.kind == "word":
                values.append(token.text)
            if depth == 0 and self.peek.text in {";", ","}:
                return tuple(values)

    def _params(self) -> list[Variable]:
        found: list[Variable] = []
        self.expect("(")
        while not self.accept(")"):
            if self.peek.text == ".reg":
                raise PtxSyntaxError(f"line {self.peek.line}: .reg parameters are not supported")
            found += self._variables(until=(",", ")"))
            self.accept(",")
        return found

    def _function(self) -> None:
        entry = self.next().text == ".entry"
        results = self._params() if self.peek.text == "(" else []
        function = Function(self.next().text, entry, results=results)
        if self.peek.text == "(":
            function.params = self._params()
        while self.peek.text not in {"{", ";"}:
            text = self.next().text
            if text in {".reqntid", ".maxntid"}:
                dims = [int(self.next().text)]
                while self.accept(","):
                    dims.append(int(self.next().text))
                if text == ".reqntid":
                    function.reqntid = tuple(dims + [1] * (3 - len(dims)))
        if self.accept(";"):
            return
        self.expect("{")
        self._body(function)
        self.module.functions[function.name] = function

    # --- function body --------------------------------------------------------------------------
    def _body(self, function: Function) -> None:
        scopes: list[dict[str, str]] = [{}]
        source = ""

        def rename(name: str) -> str:
            return next((s[name] for s in reversed(scopes) if name in s), name)

        def declare(name: str) -> str:
            unique = name if len(scopes) == 1 else f"{name}@{self.scope_count}"
            scopes[-1][name] = unique
            return unique

        self.rename = rename
        while True:
            token = self.peek
            if self.accept("{"):
                self.scope_count += 1
                scopes.append(
                    {label: f"{label}@{self.scope_count}" for label in self._scope_labels()}
                )
            elif self.accept("}"):
                scopes.pop()
                if not scopes:
                    return
            elif token.kind == "loc":
                source = self.next().text
            elif token.text == ".reg":
                self._registers(function, declare)
            elif token.text in _SPACES:
                for variable in self._variables():
                    variable.name = declare(variable.name)
                    function.variables.append(variable)
            elif token.kind == "dir":
                self._skip_to(";")
            elif token.kind == "word" and self.tokens[self.at + 1].text == ":":
                function.labels[rename(self.next().text)] = len(function.code)
                self.next()
            elif not self.accept(";"):
                function.code.append(self._instruction(source))

    def _scope_labels(self) -> list[str]:
        depth, at, labels = 1, self.at, []
        while depth and self.tokens[at].kind != "end":
            depth += {"{": 1, "}": -1}.get(self.tokens[at].text, 0)
            if depth == 1 and self.tokens[at].kind == "word" and self.tokens[at + 1].text == ":":
                labels.append(self.tokens[at].text)
            at += 1
        return labels

    def _registers(self, function: Function, declare) -> None:
        self.next()
        kind = TYPES[self.next().text[1:]]
        while True:
            name = self.next().text
            if self.accept("<"):
                count = int(self.next().text)
                self.expect(">")
                names = [f"{name}{i}" for i in range(count)]
            else:
                names = [name]
            for each in names:
                function.registers[declare(each)] = kind
            if not self.accept(","):
                break
        self.expect(";")

    def _instruction(self, source: str) -> Instr:
        guard = None
        if self.accept("@"):
            negated = self.accept("!")
            guard = Reg(self.rename(self.next().text), negated)
        token = self.next()
        if token.kind != "word":
            raise PtxSyntaxError(f"line {token.line}: expected an opcode, found {token.text!r}")
        operands = []
        while not self.accept(";"):
            operands.append(self._operand())
            self.accept(",")
        return Instr(token.line, token.text, tuple(operands), guard, source)

    def _number(self) -> Imm | None:
        sign = -1 if self.accept("-") else 1
        token = self.peek
        if token.kind in {"int", "hex"}:
            self.next()
            return Imm(sign * int(token.text, 0))
        if token.kind in {"f32", "f64"}:
            self.next()
            return Imm(int(token.text[2:], 16), 32 if token.kind == "f32" else 64)
        if token.kind == "real":
            self.next()
            return Imm(struct.unpack("<Q", struct.pack("<d", sign * float(token.text)))[0], 64)
        return None

    def _offset(self) -> int:
        offset = 0
        while self.peek.text in {"+", "-"}:
            sign = -1 if self.next().text == "-" else 1
            number = self._number()
            offset += sign * (number.value if number else 0)
        return offset

    def _operand(self) -> Operand:
        for opening, closing in (("{", "}"), ("(", ")")):
            if self.accept(opening):
                items = []
                while not self.accept(closing):
                    items.append(self._operand())
                    self.accept(",")
                return Vec(tuple(items))
        if self.accept("["):
            number = self._number()
            base = number if number is not None else self._name()
            offset, extra = self._offset(), []
            while not self.accept("]"):
                self.accept(",")
                extra.append(self._operand())
            return Mem(base, offset, tuple(extra))
        number = self._number()
        if number is not None:
            return number
        negated = self.accept("!")
        first = self._name(negated)
        if self.accept("|"):
            return Vec((first, self._operand()))
        return Sym(first.name, self._offset()) if isinstance(first, Sym) else first

    def _name(self, negated: bool = False) -> Operand:
        token = self.next()
        if token.text == "_":
            return Sink()
        if token.kind != "word":
            raise PtxSyntaxError(f"line {token.line}: unexpected {token.text!r}")
        name = self.rename(token.text)
        return Reg(name, negated) if name.startswith("%") else Sym(name)


def parse(text: str) -> PtxModule:
    """Parse PTX text."""
    module = _Parser(text).parse()
    for function in module.functions.values():
        _resolve_plain_registers(function)
    return module


def _resolve_plain_registers(function: Function) -> None:
    """Registers declared without a percent sign (of inline asm) were read as symbols: fix them."""
    plain = {name for name in function.registers if not name.startswith("%")}
    if not plain:
        return

    def fix(operand: Operand) -> Operand:
        if isinstance(operand, Sym) and operand.name in plain:
            return Reg(operand.name)
        if isinstance(operand, Vec):
            return Vec(tuple(map(fix, operand.items)))
        if isinstance(operand, Mem):
            return Mem(fix(operand.base), operand.offset, tuple(map(fix, operand.extra)))
        return operand

    function.code = [
        Instr(i.line, i.opcode, tuple(map(fix, i.operands)), i.guard, i.source)
        for i in function.code
    ]

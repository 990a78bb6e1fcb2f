"""A loss's Triton twin (weighting.py) as C++ for csrc/cluster_loss.cu, so that the formula is not written a third time.

Straight-line code of scalars: assignments, tuples, arithmetic, comparisons, &, |, ~, the functions of `FUNCTIONS`, `tl.where`, `.to(tl.float32)`,
and calls of other @triton.jit functions of that kind.  Anything else is a ValueError that names it.
"""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

# of triton.language: as in C's math library; minimum and maximum drop NaN in both
FUNCTIONS = {
    "exp": "expf", "exp2": "exp2f", "log": "logf", "log2": "log2f", "sqrt": "sqrtf", "abs": "fabsf", "sin": "sinf", "cos": "cosf", "erf": "erff",
    "floor": "floorf", "ceil": "ceilf", "fma": "fmaf", "minimum": "fminf", "maximum": "fmaxf",
}  # fmt: skip
ARGUMENTS = {"fma": 3, "minimum": 2, "maximum": 2}  # 1 for the others
ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
LOGIC = {ast.BitAnd: "&&", ast.BitOr: "||", ast.BitXor: "!="}
COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
FLOATS, PARAMS = 8, 8  # of the twin ABI: floats, then `expert`, then parameters

HEADER = """\
// Generated from {name} in {file} by kernels/twin_cuda.py.
#include <math.h>
#ifdef __CUDACC__
#define TWIN __host__ __device__ inline
#else
#define TWIN inline
#endif
"""


@dataclass(frozen=True)
class _Value:
    """An expression of C++."""

    code: str
    kind: str
    """float or bool"""
    number: float | None = None
    """Its value where Python knows it: constants are folded in double precision, as Triton does, and rounded once."""


@dataclass(frozen=True)
class _Function:
    name: str
    results: tuple[str, ...]
    """Kinds of what it returns."""
    single: bool
    """Returns a value, not a tuple."""


def _constant(number: float) -> _Value:
    number = float(number)
    if math.isnan(number):
        code = "NAN"
    elif math.isinf(number):
        code = "INFINITY" if number > 0 else "(-INFINITY)"
    else:
        code = f"{number!r}f" if number >= 0 else f"({number!r}f)"
    return _Value(code, "float", number)


def _as_float(x: _Value) -> str:
    return x.code if x.kind == "float" else f"({x.code} ? 1.0f : 0.0f)"


def _is_jit(x: Any) -> bool:
    return inspect.isfunction(getattr(x, "fn", None)) and type(x).__module__.startswith("triton.")


class _Translator:
    """The functions translated so far; a jit function is translated once for every combination of argument kinds."""

    def __init__(self, twin: str):
        self.twin = twin
        self.functions: dict[tuple[int, tuple[str, ...]], _Function] = {}
        self.begun: set[tuple[int, tuple[str, ...]]] = set()
        self.text: list[str] = []

    def function(self, jit: Any, kinds: tuple[str, ...]) -> _Function:
        key = (id(jit), kinds)
        if key not in self.functions:
            if key in self.begun:
                raise ValueError(f"twin '{self.twin}': {jit.fn.__name__} calls itself; use backend 'triton'")
            self.begun.add(key)
            body = _Body(self, jit.fn, kinds)
            name = f"{jit.fn.__name__}_{len(self.functions)}"
            results = body.results
            single = not isinstance(results, tuple)
            values = (results,) if single else results
            function = _Function(name, tuple(v.kind for v in values), single)
            if single:
                head, returned = values[0].kind, values[0].code
            else:
                fields = " ".join(f"{kind} r{i};" for i, kind in enumerate(function.results))
                self.text.append(f"struct {name}_result {{ {fields} }};")
                head, returned = f"{name}_result", "{" + ", ".join(v.code for v in values) + "}"
            arguments = ", ".join(f"{kind} {name}" for kind, name in zip(kinds, body.arguments, strict=True))
            lines = "\n".join(f"    {line}" for line in [*body.lines, f"return {returned};"])
            self.text.append(f"TWIN {head} {name}({arguments}) {{\n{lines}\n}}\n")
            self.functions[key] = function
        return self.functions[key]


class _Body:
    """One function's body: C++ statements and what it returns."""

    def __init__(self, owner: _Translator, fn: Callable, kinds: tuple[str, ...]):
        self.owner, self.fn = owner, fn
        self.lines: list[str] = []
        self.count = 0
        try:
            source, self.first_line = inspect.getsourcelines(fn)
        except OSError as error:
            raise ValueError(f"twin '{owner.twin}': the source of {fn.__name__} cannot be read ({error}); use backend 'triton'") from error
        tree = ast.parse(textwrap.dedent("".join(source))).body[0]
        names = [a.arg for a in tree.args.args]
        if len(names) != len(kinds) or tree.args.vararg or tree.args.kwonlyargs or tree.args.kwarg:
            self.fail(tree, f"{fn.__name__} takes ({', '.join(names)}), got {len(kinds)} arguments")
        self.arguments = [f"{name}_" for name in names]  # an underscore: a Python name may be a keyword of C++
        self.locals: dict[str, _Value] = {n: _Value(a, k) for n, a, k in zip(names, self.arguments, kinds, strict=True)}
        self.results = self.statements(tree)

    def fail(self, node: ast.AST, what: str):
        line = self.first_line + getattr(node, "lineno", 1) - 1
        raise ValueError(
            f"twin '{self.owner.twin}' cannot be translated for backend 'cluster': {what}, at {inspect.getsourcefile(self.fn)}:{line}; "
            "write it with tl.where and straight-line arithmetic (kernels/twin_cuda.py), or use backend 'triton'"
        )

    # ---- statements

    def statements(self, tree: ast.FunctionDef) -> _Value | tuple[_Value, ...]:
        for node in tree.body:
            match node:
                case ast.Expr(value=ast.Constant(value=str())):
                    pass
                case ast.Return(value=value) if value is not None:
                    if node is not tree.body[-1]:
                        self.fail(node, "code after 'return'")
                    return self.expression(value)
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.assign(node, name, self.expression(value))
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value) if all(isinstance(t, ast.Name) for t in targets):
                    values = self.expression(value)
                    if not isinstance(values, tuple) or len(values) != len(targets):
                        self.fail(node, f"{len(targets)} names assigned from {len(values) if isinstance(values, tuple) else 1} values")
                    for target, x in zip(targets, values, strict=True):
                        self.assign(node, target.id, x)
                case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                    self.assign(node, name, self.expression(ast.copy_location(ast.BinOp(ast.Name(name, ast.Load()), op, value), node)))
                case _:
                    self.fail(node, f"the statement '{ast.unparse(node).splitlines()[0]}'")
        self.fail(tree, f"{tree.name} has no 'return' at its end")

    def bind(self, value: _Value, name: str = "v") -> _Value:
        """The value in a variable of its own; every assignment makes a new one, so a name may change its kind."""
        if value.number is not None:
            return value
        variable = f"{name}_{self.count}"
        self.count += 1
        self.lines.append(f"const {value.kind} {variable} = {value.code};")
        return _Value(variable, value.kind)

    def assign(self, node: ast.AST, name: str, value) -> None:
        if isinstance(value, tuple):
            self.fail(node, f"a tuple assigned to '{name}'")
        self.locals[name] = self.bind(value, name)

    # ---- expressions

    def expression(self, node: ast.expr) -> _Value | tuple[_Value, ...]:
        match node:
            case ast.Constant(value=bool(x)):
                return _Value("true" if x else "false", "bool")
            case ast.Constant(value=int(x)) | ast.Constant(value=float(x)):
                return _constant(x)
            case ast.Name() | ast.Attribute():
                return self.name(node)
            case ast.Tuple(elts=elements):
                return tuple(self.scalar(x) for x in elements)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                x = self.number(operand)
                if isinstance(op, ast.UAdd):
                    return x
                return _constant(-x.number) if x.number is not None else _Value(f"(-{x.code})", "float")
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return _Value(f"(!{self.boolean(operand).code})", "bool")
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                return self.arithmetic(node, self.number(left), ARITHMETIC[type(op)], self.number(right))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in LOGIC:
                return _Value(f"({self.boolean(left).code} {LOGIC[type(op)]} {self.boolean(right).code})", "bool")
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
                return _Value(f"({self.number(left).code} {COMPARISONS[type(op)]} {self.number(right).code})", "bool")
            case ast.Call():
                return self.call(node)
        self.fail(node, f"the expression '{ast.unparse(node)}'")

    def scalar(self, node: ast.expr) -> _Value:
        value = self.expression(node)
        if isinstance(value, tuple):
            self.fail(node, f"'{ast.unparse(node)}' is a tuple where one value is expected")
        return value

    def number(self, node: ast.expr) -> _Value:
        value = self.scalar(node)
        return value if value.kind == "float" else _Value(_as_float(value), "float")

    def boolean(self, node: ast.expr) -> _Value:
        value = self.scalar(node)
        if value.kind != "bool":
            self.fail(node, f"'{ast.unparse(node)}' is a number where a truth value is expected")
        return value

    def arithmetic(self, node: ast.AST, x: _Value, op: str, y: _Value) -> _Value:
        if x.number is None or y.number is None:
            return _Value(f"({x.code} {op} {y.code})", "float")
        if op == "/" and y.number == 0:
            self.fail(node, "a division by the constant 0")
        return _constant({"+": x.number + y.number, "-": x.number - y.number, "*": x.number * y.number}[op] if op != "/" else x.number / y.number)

    def resolve(self, node: ast.expr) -> Any:
        """The Python object that a name outside the function's locals stands for."""
        match node:
            case ast.Name(id=name) if name not in self.locals:
                scope = inspect.getclosurevars(self.fn)
                for names in (scope.nonlocals, self.fn.__globals__, scope.builtins):
                    if name in names:
                        return names[name]
            case ast.Attribute(value=value, attr=attribute):
                owner = self.resolve(value)
                if isinstance(owner, ModuleType) and hasattr(owner, attribute):
                    return getattr(owner, attribute)
        self.fail(node, f"the name '{ast.unparse(node)}'")

    def name(self, node: ast.expr) -> _Value:
        if isinstance(node, ast.Name) and node.id in self.locals:
            return self.locals[node.id]
        found = self.resolve(node)
        found = getattr(found, "value", found)  # tl.constexpr
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            self.fail(node, f"'{ast.unparse(node)}', which is no number,")
        return _constant(found)

    def call(self, node: ast.Call) -> _Value | tuple[_Value, ...]:
        match node:
            case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str(x))], keywords=[]) if "float" not in self.locals:
                return _constant(float(x))
            case ast.Call(func=ast.Attribute(value=value, attr="to"), args=[ast.Attribute(attr="float32")], keywords=[]):
                return self.number(value)
        target = self.resolve(node.func)
        if node.keywords:
            self.fail(node, f"the keyword argument '{node.keywords[0].arg}' in '{ast.unparse(node)}'")
        if _is_jit(target):
            return self.call_jit(target, [self.scalar(x) for x in node.args])
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        of_triton = str(getattr(target, "__module__", "")).startswith("triton.language")
        if of_triton and name == "where" and len(node.args) == 3:
            condition, x, y = self.boolean(node.args[0]), self.scalar(node.args[1]), self.scalar(node.args[2])
            if x.kind == y.kind == "bool":
                return _Value(f"({condition.code} ? {x.code} : {y.code})", "bool")
            return _Value(f"({condition.code} ? {_as_float(x)} : {_as_float(y)})", "float")
        if of_triton and name in FUNCTIONS and len(node.args) == ARGUMENTS.get(name, 1):
            return _Value(f"{FUNCTIONS[name]}({', '.join(self.number(x).code for x in node.args)})", "float")
        self.fail(node, f"the call '{ast.unparse(node)}'")

    def call_jit(self, jit: Any, arguments: list[_Value]) -> _Value | tuple[_Value, ...]:
        function = self.owner.function(jit, tuple(x.kind for x in arguments))
        code = f"{function.name}({', '.join(x.code for x in arguments)})"
        if function.single:
            return _Value(code, function.results[0])
        variable = f"r_{self.count}"
        self.count += 1
        self.lines.append(f"const {function.name}_result {variable} = {code};")
        return tuple(_Value(f"{variable}.r{i}", kind) for i, kind in enumerate(function.results))


@lru_cache(maxsize=64)
def translate(twin: Any, metrics: int) -> str:
    """C++ header with `struct Twin`: METRICS and terms(logp, ..., ref, expert, p, term) -> term[0 .. 5 + METRICS).

    twin: a @triton.jit function of the twin ABI that returns (loss, a, b, c, weight, *metrics).  ValueError where it is not of that kind.
    """
    if not _is_jit(twin):
        raise ValueError(f"a twin is a @triton.jit function, got {twin!r}; without one use backend 'triton'")
    name = twin.fn.__name__
    owner = _Translator(name)
    main = owner.function(twin, ("float",) * FLOATS + ("bool",) + ("float",) * PARAMS)
    if main.single or len(main.results) < 5 + metrics:
        raise ValueError(
            f"twin '{name}' returns {len(main.results)} values; expected loss, a, b, c, weight and {metrics} metrics, as its PyTorch form reports"
        )
    numbers = ", ".join(f"x{i}" for i in range(FLOATS))
    lines = [f"term[{i}] = {_as_float(_Value(f'r.r{i}', kind))};" for i, kind in enumerate(main.results[: 5 + metrics])]
    return "\n".join([
        HEADER.format(name=name, file=inspect.getsourcefile(twin.fn).rpartition("/")[2]),
        *owner.text,
        "struct Twin {",
        f"    static constexpr int METRICS = {metrics};",
        f"    TWIN static void terms({', '.join(f'float x{i}' for i in range(FLOATS))}, bool expert, const float* p, float* term) {{",
        f"        const {main.name}_result r = {main.name}({numbers}, expert, {', '.join(f'p[{i}]' for i in range(PARAMS))});",
        *(f"        {line}" for line in lines),
        "    }",
        "};",
        "",
    ])  # fmt: skip

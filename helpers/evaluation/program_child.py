"""Run the functions of a model's reply against assertions: a script that ``programs`` starts, alone and limited.

Its argument is JSON: the reply and a list of expressions. It exits with 0 if the reply defines functions that make each
of them true, else with another code. It imports only the standard library, for it runs without this package.

There are two fences: what a program may say (``_allowed``), which leaves it nothing that reaches the machine, and what
its process may use (``_limit``), against programs that do not end.
"""

from __future__ import annotations

import ast
import json
import re
import resource
import sys
from contextlib import suppress

_CPU_SECONDS = 1
_BYTES = 512 * 2**20
_BLOCK = re.compile(r"```[a-zA-Z]*\n(.*?)(?:```|\Z)", re.DOTALL)
_LINES = 200
# What computes: no import, class, global name, generator function or asynchronous form.
_NODES = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.If, ast.For, ast.While, ast.Break),
    *(ast.Continue, ast.Pass, ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Name, ast.Constant, ast.BinOp),
    *(ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.keyword, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.IfExp),
    *(ast.Subscript, ast.Slice, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension),
    *(ast.Lambda, ast.JoinedStr, ast.FormattedValue, ast.Starred, ast.Attribute, ast.expr_context, ast.operator),
    *(ast.unaryop, ast.boolop, ast.cmpop, ast.Raise, ast.Try, ast.ExceptHandler, ast.Assert),
)
# Methods of texts and containers that only compute. Not format, which can look up attributes by their name.
_METHODS = frozenset(
    (
        *(
            "add",
            "append",
            "capitalize",
            "clear",
            "copy",
            "count",
            "discard",
            "endswith",
            "extend",
            "find",
            "get",
            "index",
        ),
        *("insert", "isalnum", "isalpha", "isdigit", "islower", "isspace", "isupper", "items", "join", "keys", "lower"),
        *("lstrip", "pop", "remove", "replace", "reverse", "rstrip", "setdefault", "sort", "split", "splitlines"),
        *("startswith", "strip", "swapcase", "title", "union", "update", "upper", "values"),
    )
)
_BUILTINS = (
    *(abs, all, any, bool, chr, dict, divmod, enumerate, filter, float, frozenset, int, isinstance, len, list, map),
    *(max, min, ord, pow, range, repr, reversed, round, set, sorted, str, sum, tuple, zip),
    *(ValueError, TypeError, IndexError, KeyError, ZeroDivisionError),
)


def _main(job: str) -> int:
    """Exit code 0 if the reply passes, 1 if not."""
    reply, asserts = json.loads(job)
    _limit()
    functions = _functions(reply)
    if functions is None or not _allowed(functions):
        return 1
    scope: dict[str, object] = {"__builtins__": _builtins()}
    exec(compile(functions, "<reply>", "exec"), scope)
    for expression in asserts:
        tree = ast.parse(expression, mode="eval")
        if not eval(compile(tree, "<assertion>", "eval"), scope):
            return 1
    return 0


def _limit() -> None:
    """No new process, no file, little memory, one second of computing."""
    limits = {
        resource.RLIMIT_CPU: _CPU_SECONDS,
        resource.RLIMIT_AS: _BYTES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for name, most in limits.items():
        # macOS refuses some of them.
        with suppress(ValueError, OSError):
            resource.setrlimit(name, (most, most))


def _functions(reply: str) -> ast.Module | None:
    """The function definitions of the first fenced block, or of the text from the first ``def`` on; None without one.

    Examples of use, imports and explanations around them are left out.
    """
    block = _BLOCK.search(reply)
    lines = (block[1] if block else reply).splitlines()[:_LINES]
    while lines and not lines[0].startswith("def "):
        lines.pop(0)
    # Prose after the function is no Python: drop lines from the end until the rest is.
    while lines:
        try:
            body = ast.parse("\n".join(lines)).body
        except (SyntaxError, ValueError):
            lines.pop()
            continue
        return ast.Module([node for node in body if isinstance(node, ast.FunctionDef)], type_ignores=[])
    return None


def _allowed(tree: ast.Module) -> bool:
    """Whether only harmless forms and names are used."""
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            return False
        if isinstance(node, ast.Attribute) and node.attr not in _METHODS:
            return False
        if isinstance(node, ast.Name) and node.id.startswith("__"):
            return False
    return True


def _builtins() -> dict[str, object]:
    return {function.__name__: function for function in _BUILTINS} | {"print": lambda *_, **__: None}


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))

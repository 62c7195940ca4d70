"""Check the rules of plain code that ruff has no rule for: ``python env/lint/plain_code.py helpers``.

Each function, file and expression is held to a limit, and the whole folder to densities. Every finding is a line
``file:line: what is wrong``. Exit code 1 if there is one. Only the standard library is used.
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_LINES = 400
BODY_LINES = 30
COMPLEXITY = 10
COMPREHENSIONS_PER_1000 = 40
CONDITIONALS_PER_1000 = 20
CODE_PER_COMMENT = 40
ANY_ARGUMENTS = 60
# Each of them is used by another group, a notebook or the command, or is an error that a user may catch. Before this
# number is raised, look for those that only their own group uses, and make them private.
PUBLIC_NAMES = 355

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Totals:
    """What is counted over all files of the folder."""

    code: int = 0
    comments: int = 0
    comprehensions: int = 0
    conditionals: int = 0
    any_arguments: int = 0
    public: int = 0


def main(folder: Path) -> int:
    """Print every finding; the exit code."""
    totals = Totals()
    findings: list[str] = []
    for file in sorted(folder.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
        count(totals, file, source, tree)
        group = file.relative_to(folder).parts[0].removesuffix(".py")
        for line, text in problems(source, tree, group):
            findings.append(f"{file}:{line}: {text}")
    findings += density_problems(totals)
    for finding in findings:
        print(finding)
    per_1000 = 1000 / max(1, totals.code)
    print(
        f"{totals.code:,} lines of code: {totals.public} public functions and classes, {totals.any_arguments} "
        f"arguments with Any, one comment per {totals.code / max(1, totals.comments):.0f} lines; per 1,000 lines "
        f"{totals.comprehensions * per_1000:.1f} comprehensions and {totals.conditionals * per_1000:.1f} conditional "
        "expressions"
    )
    return 1 if findings else 0


def problems(source: str, tree: ast.AST, group: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each broken rule in one file of a group."""
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield 1, f"the file has {lines} lines: split it ({FILE_LINES} at most)"
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            length = body_lines(node)
            if length > BODY_LINES:
                yield node.lineno, f"the body of {node.name} has {length} lines ({BODY_LINES} at most)"
            paths = complexity(node)
            if paths > COMPLEXITY:
                yield node.lineno, f"{node.name} has a complexity of {paths} ({COMPLEXITY} at most)"
        elif isinstance(node, COMPREHENSIONS) and contains(node, COMPREHENSIONS):
            yield node.lineno, "a comprehension inside a comprehension: write a loop"
        elif isinstance(node, ast.IfExp) and contains(node, (ast.IfExp,)):
            yield node.lineno, "a conditional expression inside another: write an if statement"
        elif is_bool_arithmetic(node):
            yield node.lineno, "a truth value as a factor or summand: write an if statement"
        elif isinstance(node, ast.ImportFrom):
            yield from private_imports(node, group)


def private_imports(node: ast.ImportFrom, group: str) -> Iterator[tuple[int, str]]:
    """Yield each name with a leading underscore that is imported from another group of the package."""
    parts = (node.module or "").split(".")
    if parts[0] != "helpers" or len(parts) < 2 or parts[1] == group:
        return
    for alias in node.names:
        # Names such as __version__ are no private ones.
        if alias.name.startswith("_") and not alias.name.startswith("__"):
            yield node.lineno, f"{alias.name} is private to the group {parts[1]}"


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function's body, the docstring left out."""
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:]
    if not body:
        return 0
    return (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1


def complexity(function: ast.AST) -> int:
    """Count the paths through a function: McCabe 1976, with each operand of ``and`` and ``or`` and each comprehension.

    ruff's own rule counts statements only, and would let a function hide its branches in expressions. Functions inside
    the function are counted on their own.
    """
    paths = 1
    for node in ast.iter_child_nodes(function):
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            continue
        paths += complexity(node) - 1
    if isinstance(function, (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert)):
        paths += 1
    elif isinstance(function, ast.comprehension):
        paths += 1 + len(function.ifs)
    elif isinstance(function, ast.BoolOp):
        paths += len(function.values) - 1
    elif isinstance(function, ast.match_case):
        paths += 1
    return paths


def contains(node: ast.AST, kinds: tuple[type[ast.AST], ...]) -> bool:
    """Whether an expression holds another of these kinds."""
    for inner in ast.walk(node):
        if inner is not node and isinstance(inner, kinds):
            return True
    return False


def is_bool_arithmetic(node: ast.AST) -> bool:
    """Whether a comparison or a negation is multiplied, added or subtracted."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Add, ast.Sub)):
        return is_truth_value(node.left) or is_truth_value(node.right)
    return isinstance(node, ast.AugAssign) and is_truth_value(node.value)


def is_truth_value(node: ast.AST) -> bool:
    """Whether an expression is a comparison or a negation, which yield True or False."""
    # A subscript of numpy or pandas may compare, too, but then it stands inside brackets and not as an operand.
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


def count(totals: Totals, file: Path, source: str, tree: ast.Module) -> None:
    """Add one file to the totals."""
    totals.code += code_lines(source, tree)
    totals.comments += comments(file)
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            totals.comprehensions += 1
        elif isinstance(node, ast.IfExp):
            totals.conditionals += 1
        elif isinstance(node, FUNCTIONS):
            totals.any_arguments += any_arguments(node)
    for statement in tree.body:
        if isinstance(statement, (*FUNCTIONS, ast.ClassDef)) and not statement.name.startswith("_"):
            totals.public += 1


def code_lines(source: str, tree: ast.AST) -> int:
    """Count the lines that are neither blank, nor a comment, nor part of a docstring."""
    documented: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            documented.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    total = 0
    for number, line in enumerate(source.splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#") and number not in documented:
            total += 1
    return total


def comments(file: Path) -> int:
    """Count the comments that speak to a reader: directives of linters and ruled headings do not."""
    total = 0
    with file.open("rb") as handle:
        for token in tokenize.tokenize(handle.readline):
            if token.type != tokenize.COMMENT:
                continue
            if "noqa" not in token.string and "type:" not in token.string and "---" not in token.string:
                total += 1
    return total


def any_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the named arguments whose annotation holds ``Any``."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len([a for a in arguments if a.annotation is not None and "Any" in ast.unparse(a.annotation)])


def density_problems(totals: Totals) -> Iterator[str]:
    """Yield a line for each density or count over the whole folder that is beyond its limit."""
    per_1000 = 1000 / max(1, totals.code)
    if totals.comprehensions * per_1000 > COMPREHENSIONS_PER_1000:
        yield f"{totals.comprehensions} comprehensions are more than {COMPREHENSIONS_PER_1000} per 1,000 lines of code"
    if totals.conditionals * per_1000 > CONDITIONALS_PER_1000:
        yield f"{totals.conditionals} conditional expressions are more than {CONDITIONALS_PER_1000} per 1,000 lines"
    if totals.code > CODE_PER_COMMENT * totals.comments:
        yield f"{totals.comments} comments are fewer than one for every {CODE_PER_COMMENT} lines of code"
    if totals.any_arguments > ANY_ARGUMENTS:
        yield f"{totals.any_arguments} arguments are annotated with Any ({ANY_ARGUMENTS} at most)"
    if totals.public > PUBLIC_NAMES:
        yield f"{totals.public} public functions and classes at module level ({PUBLIC_NAMES} at most)"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "helpers")))

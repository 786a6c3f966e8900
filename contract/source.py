"""A package's source code, read and never imported, so that any release can be asked without what it depends on.

    source = Source(Path("site-packages"))                  # the folder that `sglang` lies in
    found = source.find("sglang.srt.managers.schedule_batch.Req.rid")
    found.name, found.node                                  # where it is defined, and its syntax tree
    source.signature(found)                                 # of a function, a method or a class's constructor

Names are followed through re-exports (also `import *`) and through base classes within the package. A class has the
names of its body and those that its methods set on `self`. What is made at run time (`setattr`, a module's
`__getattr__`) cannot be seen, and neither can what a base class from another package brings. Where a class is put
together of others at run time, `assembled` tells under which module these are.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Call(NamedTuple):
    """How something is called: `positional` arguments and `keywords`; `is_open` where `*` or `**` may bring more."""

    positional: int
    keywords: tuple[str, ...]
    is_open: bool


class Signature(NamedTuple):
    """Parameters by name, without `self`; those with a default are in `optional`."""

    positional: tuple[str, ...] = ()
    keyword_only: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    takes_any_positional: bool = False
    takes_any_keyword: bool = False

    def __str__(self) -> str:
        def shown(names: Iterable[str]) -> list[str]:
            return [f"{name}=" if name in self.optional else name for name in names]

        star = ["*args"] if self.takes_any_positional else ["*"] if self.keyword_only else []
        rest = ["**kwargs"] if self.takes_any_keyword else []
        return f"({', '.join([*shown(self.positional), *star, *shown(self.keyword_only), *rest])})"

    def refuses(self, call: Call) -> str | None:
        """Why a call would raise TypeError; None if it would not."""
        if call.positional > len(self.positional) and not self.takes_any_positional:
            return f"takes {len(self.positional)} positional arguments, is given {call.positional}"
        given = {*self.positional[: call.positional], *call.keywords}
        unknown = [name for name in call.keywords if name not in (*self.positional, *self.keyword_only)]
        if unknown and not self.takes_any_keyword:
            return f"takes no argument {', '.join(unknown)}"
        missing = [n for n in (*self.positional, *self.keyword_only) if n not in given and n not in self.optional]
        if missing and not call.is_open:
            return f"needs {', '.join(missing)}"
        return None


class Found(NamedTuple):
    """A definition. `name` is where it is defined, which is not always where it was looked for."""

    name: str
    node: ast.AST
    module: Module
    owner: ast.ClassDef | None = None  # of a member of a class


class Declared(NamedTuple):
    """What an annotation says that something is: instances of `name`, a class of the package; None: of another one."""

    name: str | None
    is_many: bool = False


class Module:
    """One file: what its top level binds, imports as dotted names."""

    def __init__(self, name: str, path: Path):
        self.name = name
        self.is_package = path.name == "__init__.py"
        self.tree = ast.parse(path.read_text(encoding="utf-8"))

    @cached_property
    def imports(self) -> dict[str, str]:
        return imported_names(flat(self.tree.body), self.imported)

    @cached_property
    def bindings(self) -> dict[str, ast.AST | str]:
        own: dict[str, ast.AST | str] = {}
        for statement in flat(self.tree.body):
            for name in bound_names(statement):
                is_made_over = isinstance(own.get(name), Function | ast.ClassDef) and isinstance(statement, ast.Assign)
                if not is_made_over:  # X = put_together(X)
                    own[name] = statement
        return {**self.imports, **own}

    @cached_property
    def stars(self) -> list[str]:
        imports = [s for s in flat(self.tree.body) if isinstance(s, ast.ImportFrom) and s.names[0].name == "*"]
        return [self.imported(statement) for statement in imports]

    @cached_property
    def words(self) -> frozenset[str]:
        return frozenset(words(self.tree))

    def imported(self, statement: ast.ImportFrom) -> str:
        """The module that `from ... import` names, relative ones in full."""
        if not statement.level:
            return statement.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - statement.level + self.is_package]
        return ".".join([*base, *([statement.module] if statement.module else [])])


class Source:
    """The package `package` in the folder `root`."""

    def __init__(self, root: Path, package: str = "sglang", assembled: Mapping[str, str] | None = None):
        self.root = root
        self.package = package
        self.assembled = assembled or {}
        self.module = cache(self._module)
        self.find = cache(self._find)

    def _module(self, name: str) -> Module | None:
        path = self.root.joinpath(*name.split("."))
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file():
                return Module(name, file)
        return None

    def _find(self, name: str) -> Found | None:
        parts = name.split(".")
        if parts[0] != self.package:
            return None
        for i in range(len(parts), 0, -1):
            module = self.module(".".join(parts[:i]))
            if module is not None:
                found: Found | None = Found(module.name, module.tree, module)
                for part in parts[i:]:
                    found = None if found is None else self.member(found, part)
                if found is not None:
                    return found
        return None

    def member(self, found: Found, name: str) -> Found | None:
        """`name` of a module or a class."""
        if isinstance(found.node, ast.Module):
            return self._module_member(found.module, name)
        if not isinstance(found.node, ast.ClassDef):
            return None
        for owner in self.lineage(found):
            assert isinstance(owner.node, ast.ClassDef)
            node = class_members(owner.node).get(name)
            if node is not None:
                return Found(f"{owner.name}.{name}", node, owner.module, owner.node)
        return self._assembled_member(found.name, name)

    def _assembled_member(self, owner: str, name: str) -> Found | None:
        """`name` in one of the classes that `owner` is put together of."""
        for module in self._parts(self.assembled.get(owner)):
            for node in module.tree.body:
                member = class_members(node).get(name) if isinstance(node, ast.ClassDef) else None
                if member is not None:
                    assert isinstance(node, ast.ClassDef)
                    return Found(f"{module.name}.{node.name}.{name}", member, module, node)
        return None

    def _parts(self, place: str | None) -> Iterator[Module]:
        """A package's modules."""
        for path in sorted(self.root.joinpath(*place.split(".")).glob("*.py")) if place else []:
            module = self.module(f"{place}.{path.stem}".removesuffix(".__init__"))
            if module is not None:
                yield module

    def _module_member(self, module: Module, name: str) -> Found | None:
        bound = module.bindings.get(name)
        if isinstance(bound, str):
            return None if bound == f"{module.name}.{name}" else self.find(bound)
        if bound is not None:
            return Found(f"{module.name}.{name}", bound, module)
        for star in module.stars:
            other = self.module(star)
            found = None if other is None else self._module_member(other, name)
            if found is not None:
                return found
        return None

    def lineage(self, found: Found) -> Iterator[Found]:
        """A class and its bases within the package, nearest first."""
        yield found
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            parent = self.resolve(found.module, base)
            if parent is not None and parent.node is found.node:  # class X(X), the base being an imported one
                parent = self.find(found.module.imports.get(ast.unparse(base), ""))
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                yield from self.lineage(parent)

    def resolve(self, module: Module, expression: ast.expr) -> Found | None:
        """What a name in a module's code stands for, if it is defined in the package."""
        if isinstance(expression, ast.Subscript):  # Generic[T]
            return self.resolve(module, expression.value)
        if isinstance(expression, ast.Name):
            return self._module_member(module, expression.id)
        if isinstance(expression, ast.Attribute):
            owner = self.resolve(module, expression.value)
            return None if owner is None else self.member(owner, expression.attr)
        return None

    def public_members(self, found: Found) -> tuple[str, ...]:
        """What a class and its bases offer to be overridden or called."""
        members = {name for owner in self.lineage(found) for name, node in class_members(owner.node).items()
                   if isinstance(node, Function)}  # fmt: skip
        return tuple(sorted(name for name in members if not name.startswith("_")))

    def abstract_members(self, found: Found) -> tuple[str, ...]:
        owners = [class_members(owner.node) for owner in self.lineage(found)]
        nearest = {name: node for members in reversed(owners) for name, node in members.items()}
        return tuple(sorted(name for name, node in nearest.items() if "abstractmethod" in decorators(node)))

    def signature(self, found: Found) -> Signature | None:
        """Of a function or class; None of anything else, and of a class that another package constructs."""
        if isinstance(found.node, Function):
            is_bound = found.owner is not None and "staticmethod" not in decorators(found.node)
            return None if "property" in decorators(found.node) else function_signature(found.node, is_bound)
        if not isinstance(found.node, ast.ClassDef):
            return None
        initializer = self.member(found, "__init__")
        fields = self._fields(found)
        return fields if fields is not None or initializer is None else self.signature(initializer)

    def _fields(self, found: Found) -> Signature | None:
        """The constructor that a dataclass is given by its fields."""
        assert isinstance(found.node, ast.ClassDef)
        made = [d for d in found.node.decorator_list if "dataclass" in ast.unparse(d)]
        if not made or "__init__" in class_members(found.node):
            return None
        is_keyword_only = "kw_only=True" in ast.unparse(made[0])
        names: dict[str, bool] = {}
        for owner in reversed([*self.lineage(found)]):
            assert isinstance(owner.node, ast.ClassDef)
            is_made = any("dataclass" in ast.unparse(d) for d in owner.node.decorator_list)
            for statement in owner.node.body if is_made else []:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    value = "" if statement.value is None else ast.unparse(statement.value)
                    if "ClassVar" not in ast.unparse(statement.annotation) and "init=False" not in value:
                        is_bare_field = "field(" in value and "default" not in value
                        names[statement.target.id] = bool(value) and not is_bare_field
        fields, optional = tuple(names), frozenset(name for name, has_default in names.items() if has_default)
        return Signature((), fields, optional) if is_keyword_only else Signature(fields, (), optional)

    def declared(self, found: Found) -> Declared | None:
        """What something is, or a call of it gives, as far as its annotations tell."""
        node = found.node
        if isinstance(node, Function):
            return None if node.returns is None else self._annotated(found.module, node.returns)
        if isinstance(node, ast.AnnAssign):
            return self._annotated(found.module, node.annotation)
        if isinstance(node, SetOnSelf):
            return self._set_on_self(found.module, node)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            return self._made(found.module, node.value)
        return None

    def _set_on_self(self, module: Module, node: SetOnSelf) -> Declared | None:
        if isinstance(node.statement, ast.AnnAssign):
            return self._annotated(module, node.statement.annotation)
        value = node.statement.value if isinstance(node.statement, ast.Assign) else None
        if isinstance(value, ast.Name):  # self.x = x, a parameter
            arguments = node.method.args
            for parameter in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                if parameter.arg == value.id and parameter.annotation is not None:
                    return self._annotated(module, parameter.annotation)
        return self._made(module, value) if isinstance(value, ast.Call) else None

    def _made(self, module: Module, call: ast.Call) -> Declared | None:
        made = self.resolve(module, call.func)
        return Declared(made.name) if made is not None and isinstance(made.node, ast.ClassDef) else None

    def _annotated(self, module: Module, annotation: ast.expr) -> Declared | None:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            return self._annotated(module, ast.parse(annotation.value, mode="eval").body)
        if isinstance(annotation, ast.BinOp):
            return self._one_of(module, [annotation.left, annotation.right])
        if isinstance(annotation, ast.Subscript):
            outer = ast.unparse(annotation.value).split(".")[-1]
            inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            if outer in ("Optional", "Union"):
                return self._one_of(module, inner)
            if outer in ("A", "Annotated"):
                return self._annotated(module, inner[0])
            if outer in ("List", "list", "Sequence"):
                element = self._annotated(module, inner[0])
                return None if element is None else element._replace(is_many=True)
            return Declared(None)
        if "Any" in ast.unparse(annotation):
            return None
        found = self.resolve(module, annotation)
        return Declared(found.name if found is not None and isinstance(found.node, ast.ClassDef) else None)

    def _one_of(self, module: Module, options: list[ast.expr]) -> Declared | None:
        """Of a union: the one member that is of the package; where there are several, nothing is known."""
        kinds = {self._annotated(module, option) for option in options if ast.unparse(option) != "None"}
        ours = {kind for kind in kinds if kind is None or kind.name is not None}
        if not ours:
            return Declared(None)
        return ours.pop() if len(ours) == 1 else None

    def beside(self, found: Found, name: str) -> list[str]:
        """Other classes in a class's file that have a member of this name."""
        classes = [node for node in found.module.tree.body if isinstance(node, ast.ClassDef) and node is not found.node]
        is_class = isinstance(found.node, ast.ClassDef)
        return [node.name for node in classes if is_class and name in class_members(node)]

    def elsewhere(self, name: str) -> list[str]:
        """Where a function, a class or a method of this name is defined, in full."""
        defined = re.compile(rf"^\s*(def|async def|class) {re.escape(name)}\b", re.MULTILINE)
        places = []
        for place, text in self.texts():
            module = self.module(place) if defined.search(text) else None
            if module is None:
                continue
            for node in module.tree.body:
                if isinstance(node, Function | ast.ClassDef) and node.name == name:
                    places.append(f"{place}.{name}")
                if isinstance(node, ast.ClassDef) and isinstance(class_members(node).get(name), Function):
                    places.append(f"{place}.{node.name}.{name}")
        return places

    def mentioning(self, word: str) -> list[str]:
        """Modules whose code holds a word."""
        return [place for place, text in self.texts() if word in text and self.holds_word(place, word)]

    def holds_word(self, place: str, word: str) -> bool:
        """Whether the code of a module has a name, a keyword or a string. A flag is also the field that makes it."""
        field = word.removeprefix("--").replace("-", "_") if word.startswith("--") else word
        parts = [part for owner, part in self.assembled.items() if owner.rpartition(".")[0] == place]
        own = self.module(place)
        modules = [*([] if own is None else [own]), *(module for part in parts for module in self._parts(part))]
        return any(found in (word, field) for module in modules for found in module.words)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every module of the package, and its text."""
        for path in sorted((self.root / self.package).rglob("*.py")):
            place = ".".join(path.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")
            yield place, path.read_text(encoding="utf-8")

    def names(self, found: Found) -> list[str]:
        """What can be looked for in a module or a class."""
        if isinstance(found.node, ast.Module):
            return [*found.module.bindings]
        if not isinstance(found.node, ast.ClassDef):
            return []
        return [name for owner in self.lineage(found) for name in class_members(owner.node)]


class SetOnSelf(ast.AST):
    """`self.x = ...` in a method."""

    _fields = ()

    def __init__(self, statement: ast.stmt, method: Function):
        super().__init__()
        self.statement = statement
        self.method = method


def flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those under `if`, `try` and `with` too."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.With | ast.Try):
            for field in ("body", "orelse", "finalbody"):
                yield from flat(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from flat(handler.body)


def imported_names(statements: Iterable[ast.AST], module_of: Callable[[ast.ImportFrom], str]) -> dict[str, str]:
    """Names that imports bind, and what they stand for."""
    names: dict[str, str] = {}
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{module_of(statement)}.{alias.name}" for alias in statement.names}
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
    return names


def bound_names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, Function | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        return []
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def class_members(owner: ast.AST) -> dict[str, ast.AST]:
    """Names of a class's body, and those that its methods set on their first argument."""
    assert isinstance(owner, ast.ClassDef)
    if not hasattr(owner, "_members"):
        owner._members = _class_members(owner)  # type: ignore[attr-defined]
    members: dict[str, ast.AST] = owner._members  # type: ignore[attr-defined]
    return members


def _class_members(owner: ast.ClassDef) -> dict[str, ast.AST]:
    members: dict[str, ast.AST] = {}
    body = [*flat(owner.body)]
    for method in body:
        if isinstance(method, Function) and method.args.args and "staticmethod" not in decorators(method):
            for name, statement in set_on(method.args.args[0].arg, method):
                # What says the most about a name stands first: an annotation, then a plain value.
                known = members.get(name)
                if known is None or (isinstance(statement, ast.AnnAssign) and isinstance(known, SetOnSelf)):
                    members[name] = SetOnSelf(statement, method)
    for statement in body:
        for name in bound_names(statement):
            is_setter = isinstance(statement, Function) and any("setter" in d for d in decorators(statement))
            if not (is_setter and name in members):
                members[name] = statement
    return members


def set_on(self_name: str, method: Function) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.walk(method):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for part in (part for target in targets for part in parts_of(target)):
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == self_name:
                    yield part.attr, node


def parts_of(target: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, ast.Tuple | ast.List):
        for element in target.elts:
            yield from parts_of(element)
    else:
        yield target


def decorators(node: ast.AST) -> list[str]:
    return [ast.unparse(d).split("(")[0].removeprefix("abc.") for d in getattr(node, "decorator_list", [])]


def function_signature(node: Function, is_bound: bool) -> Signature:
    arguments = node.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    defaults = positional[len(positional) - len(arguments.defaults) :]
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    defaults += [argument.arg for argument, default in pairs if default is not None]
    return Signature(
        positional=tuple(positional[1:] if is_bound else positional),
        keyword_only=tuple(argument.arg for argument in arguments.kwonlyargs),
        optional=frozenset(defaults),
        takes_any_positional=arguments.vararg is not None,
        takes_any_keyword=arguments.kwarg is not None,
    )


def parameters(signature: str | None) -> list[str]:
    """The names in a written signature, whatever has a default."""
    return [] if signature is None else re.findall(r"[*\w]+", signature)


def fingerprint(node: ast.AST) -> str:
    """The same for the same code, whatever its comments, docstrings and layout, and whichever Python reads it."""
    return hashlib.sha256(repr(essence(node)).encode()).hexdigest()[:12]


def essence(node: object) -> object:
    if isinstance(node, SetOnSelf):
        return essence(node.statement)
    if isinstance(node, list):
        return [essence(entry) for entry in node if not is_docstring(entry)]
    if not isinstance(node, ast.AST):
        return node
    # Fields that are empty or that only some versions of Python have say nothing.
    fields = [(name, essence(value)) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind")]
    return (type(node).__name__, [(name, value) for name, value in fields if value not in (None, [])])


def is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def words(tree: ast.AST) -> Iterator[str]:
    """Every name, attribute, keyword and string of a piece of code."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value

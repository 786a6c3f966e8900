"""What our code uses of SGLang, read from its syntax trees: nothing that is used can be forgotten.

    uses, unknown = read(files, sglang, words)

A use is an import, a call, an attribute of one of SGLang's objects, a class that ours derives from, a method that ours
overrides, or the target of a hook. Which objects are SGLang's follows from imports and annotations, from what is
assigned to a name, from what SGLang's own annotations say of an attribute, and from `words.py` for the rest: mostly
parameters that we annotate `Any`. `unknown` is what `words.py` would have to say and does not.

Not seen: attributes whose names are put together at run time (`words.BY_NAME` lists these).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from contract.source import Call, Function, Source, bound_names, imported_names
from contract.source import words as source_words
from contract.words import Words

SUBCLASS, OVERRIDE, BY_NAME, MENTION = "subclass", "override", "by name", "mention"
FLAG = "flag"
OURS = "ours:"  # before the name of one of our own classes
UNDECLARED = "undeclared:"  # before an attribute of SGLang's of which nothing says what it is
HOOK_TYPES = ("BEFORE", "AFTER", "AROUND", "REPLACE")


class Use(NamedTuple):
    name: str  # as our code reaches it
    how: str
    file: str
    call: Call | None = None


class Kind(NamedTuple):
    """What an expression is: `name` itself, or an instance of it, or many instances."""

    name: str
    is_instance: bool = False
    is_many: bool = False


def read(files: Mapping[str, Path], sglang: Source, words: Words) -> tuple[set[Use], set[str]]:
    """All uses in `files` (shown name -> path), and what is unknown."""
    trees = {shown: ast.parse(path.read_text(encoding="utf-8")) for shown, path in files.items()}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    told = Told(words)
    ours = Ours({node.name: node for node in classes}, {}, {})
    while True:  # an attribute of our own classes may be read before the file that sets it
        known = len(ours.attributes), len(ours.bases)
        readers = [Reader(shown, tree, sglang, told, ours) for shown, tree in trees.items()]
        for reader in readers:
            reader.visit(reader.tree)
        if (len(ours.attributes), len(ours.bases)) == known:
            break
    texts = {shown: path.read_text(encoding="utf-8") for shown, path in files.items()}
    listed, unused = by_words(texts, words)
    uses = {use for reader in readers for use in reader.uses}
    unknown = {line for reader in readers for line in reader.unknown}
    unknown |= unused | told.nothing() | called_by_nobody(readers, trees, words)
    return uses | listed | flags(trees, words), unknown


def by_words(texts: Mapping[str, str], words: Words) -> tuple[set[Use], set[str]]:
    """What `words.py` lists as reached by strings; and which of it is no longer in the file that it is listed for."""
    listed = {Use(name, BY_NAME, file) for file, names in words.by_name.items() for name in names}
    listed |= {Use(f"{module}:{word}", MENTION, file) for file, module, word in words.mentions}
    unused = {use for use in listed if listed_word(use.name) not in texts.get(use.file, "")}
    return listed - unused, {f"words.py: {use.name} is no longer used in {use.file}" for use in unused}


def listed_word(name: str) -> str:
    """What our code has to hold for a name of the lists: "MODULE:WORD" or "A.B.WORD"."""
    return name.partition(":")[2] or name.rpartition(".")[2]


def flags(trees: Mapping[str, ast.Module], words: Words) -> set[Use]:
    """SGLang's flags that our code names: strings that are nothing else."""
    found = set()
    for file in words.flag_files:
        for word in source_words(trees[file]):
            flag = re.fullmatch(r"(--[a-z0-9]+(?:-[a-z0-9]+)*)(=.*)?", word)
            if flag is not None and not re.fullmatch(words.own_flags, flag[1]):
                found.add(Use(f"{words.flag_module}:{flag[1]}", FLAG, file))
    return found


def called_by_nobody(readers: list[Reader], trees: Mapping[str, ast.Module], words: Words) -> set[str]:
    """Methods of classes that derive from SGLang's, which neither override one nor are called by us."""
    ours = {node.attr for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    mentioned = {word for _, _, word in words.mentions}
    methods = {name for reader in readers for name in reader.called_on_us}
    left = {name for name in methods if name.split(".")[1] not in ours | mentioned}
    return {f"{name}: who calls it? A module of SGLang (words.py, mentions), or nobody" for name in left}


class Ours(NamedTuple):
    """What is known of our own classes, by name: that of a base of SGLang's, and "Class.attribute" of theirs."""

    classes: Mapping[str, ast.ClassDef]
    bases: dict[str, str]
    attributes: dict[str, Kind]


class Told:
    """What `words.py` says, and which of it was asked for: the rest stands for nothing any more."""

    def __init__(self, words: Words):
        self.words = words
        self.used: set[str] = set()

    def held(self, file: str, place: str, name: str) -> str | None:
        """What one of our names stands for in a function (`place`) of a file."""
        keys = (f"{file}:{place}.{name}", f"{file}:{name}", name)
        return next((said for said in (self._said(self.words.names, key) for key in keys) if said is not None), None)

    def value(self, name: str) -> str | None:
        return self._said(self.words.values, name)

    def result(self, name: str) -> str | None:
        return self._said(self.words.results, name)

    def is_foreign(self, name: str) -> bool:
        self.used |= {name} & self.words.foreign
        return name in self.words.foreign

    def _said(self, words: Mapping[str, str], name: str) -> str | None:
        if name in words:
            self.used.add(name)
        return words.get(name)

    def nothing(self) -> set[str]:
        said = {*self.words.names, *self.words.values, *self.words.results, *self.words.foreign}
        return {f"words.py: our code has no {name} any more" for name in said - self.used}


def kind_of(said: str | None) -> Kind | None:
    """What `words.py` says: a class of SGLang, [many of them], one of ours, or "-", nothing of SGLang's."""
    if said is None or said == "-":
        return None
    return Kind(said.strip("[]"), is_instance=True, is_many=said.startswith("["))


def is_path(node: ast.expr) -> bool:
    """a.b.c"""
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and is_path(node.value))


class Reader(ast.NodeVisitor):
    """Reads one file from top to bottom; `names` is what names stand for where the reading is."""

    def __init__(self, file: str, tree: ast.Module, sglang: Source, told: Told, ours: Ours):
        self.file = file
        self.tree = tree
        self.sglang = sglang
        self.told = told
        self.ours = ours
        self.uses: list[Use] = []
        self.unknown: list[str] = []
        self.called_on_us: set[str] = set()  # methods beside those of the base
        self.names: dict[str, Kind | None] = {}
        self.texts: dict[str, str] = {}
        self.place: list[str] = []
        self.is_class = False

    # Names

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._import(node)

    def visit_Import(self, node: ast.Import) -> None:
        self._import(node)

    def _import(self, node: ast.ImportFrom | ast.Import) -> None:
        for bound, name in imported_names([node], lambda statement: statement.module or "").items():
            if name.split(".")[0] == self.sglang.package:
                self.names[bound] = Kind(name)
                self.use(name, "import")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.is_class = (self.names, self.is_class), True
        kinds = [self.kind(base) for base in node.bases]
        bases = [kind for kind in kinds if kind is not None and not kind.name.startswith(OURS)]
        self.derive(node, [base.name for base in bases])
        self.names = {**outer[0]}
        self.place.append(node.name)
        for child in node.body:
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                kind = self.annotated(child.annotation) or self.told_kind(child.target.id, child.annotation)
                self.set_ours(node.name, child.target.id, kind)
        for child in node.body:
            self.visit(child)
        self.place.pop()
        self.names, self.is_class = outer

    def derive(self, node: ast.ClassDef, bases: list[str]) -> None:
        """One of our classes that derives from SGLang's: what it overrides, and what it has beside."""
        for base in bases:
            self.ours.bases[node.name] = base
            self.use(base, SUBCLASS)
        for child in node.body if bases else []:
            for name in {*bound_names(child)} - {"__init__"}:
                overridden = [f"{base}.{name}" for base in bases if self.inherited_from(base, name) is not None]
                for full in overridden:
                    self.use(full, OVERRIDE)
                if not overridden and isinstance(child, Function) and not name.startswith("_"):
                    self.called_on_us.add(f"{node.name}.{name}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._function(node)

    def _function(self, node: Function) -> None:
        outer = self.names, self.is_class
        self.names = {**outer[0]}
        self.place.append(node.name)
        arguments = node.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        if outer[1] and parameters and "staticmethod" not in map(ast.unparse, node.decorator_list):
            self.names[parameters.pop(0).arg] = Kind(f"{OURS}{self.place[-2]}", is_instance=True)
        for parameter in parameters:
            kind = None if parameter.annotation is None else self.annotated(parameter.annotation)
            self.names[parameter.arg] = kind or self.told_kind(parameter.arg, parameter.annotation)
        self.is_class = False
        for child in [*node.decorator_list, *node.body, *arguments.defaults]:
            self.visit(child)
        self.place.pop()
        self.names, self.is_class = outer

    def told_kind(self, name: str, annotation: ast.expr | None) -> Kind | None:
        """What `words.py` says of a name. It has to say something of every parameter and field annotated `Any`."""
        place = ".".join(self.place)
        said = self.told.value(f"{place}.{name}") or self.told.held(self.file, place, name)
        if said is None and annotation is not None and ast.unparse(annotation) in ("Any", "Any | None"):
            self.unknown.append(f"{self.file}: {'.'.join([*self.place, name])} is annotated Any")
        return kind_of(said)

    def annotated(self, annotation: ast.expr) -> Kind | None:
        """An instance of one of SGLang's or our own classes, where the annotation names one."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.BinOp):
            return self.annotated(annotation.left)
        if isinstance(annotation, ast.Subscript):  # the last of dict[str, X], tuple[X, ...], Iterable[X]
            inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            kinds = [self.annotated(element) for element in inner]
            return next((kind._replace(is_many=True) for kind in kinds if kind is not None), None)
        if isinstance(annotation, ast.Name) and annotation.id in self.ours.classes:
            return Kind(f"{OURS}{annotation.id}", is_instance=True)
        kind = self.kind(annotation) if isinstance(annotation, ast.Name | ast.Attribute) else None
        return None if kind is None else kind._replace(is_instance=True)

    def set_ours(self, owner: str, name: str, kind: Kind | None) -> None:
        if kind is not None:
            self.ours.attributes.setdefault(f"{owner}.{name}", kind)

    def visit_Assign(self, node: ast.Assign) -> None:
        kind = self.kind(node.value)
        for target in node.targets:
            self.bind(target, kind, node.value)
        text = self.text(node.value)
        if text is not None and isinstance(node.targets[0], ast.Name):
            self.texts[node.targets[0].id] = text

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        kind = self.annotated(node.annotation)
        if node.value is not None:
            kind = self.kind(node.value) or kind
        self.bind(node.target, kind, node.value)

    def bind(self, target: ast.expr, kind: Kind | None, value: ast.expr | None = None) -> None:
        if isinstance(target, ast.Name):
            said = self.told.held(self.file, ".".join(self.place), target.id)
            self.names[target.id] = kind if kind is not None else kind_of(said)
        elif isinstance(target, ast.Tuple | ast.List):
            values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
            for i, element in enumerate(target.elts):
                self.bind(element, None if values is None else self.kind(values[i]))
        elif isinstance(target, ast.Attribute):
            owner = self.kind(target.value)
            self.kind(target)
            if owner is not None and owner.name.startswith(OURS):
                told = kind_of(self.told.held(self.file, ".".join(self.place), ast.unparse(target)))
                self.set_ours(owner.name.removeprefix(OURS), target.attr, told or kind)
        else:
            self.visit(target)

    def visit_For(self, node: ast.For) -> None:
        self.bind_items(node.target, node.iter)
        for child in [*node.body, *node.orelse]:
            self.visit(child)

    def bind_items(self, target: ast.expr, iterable: ast.expr) -> None:
        """Names of a loop. `enumerate`, `zip` and `.items()` give tuples, whose last part is the item."""
        many = self.kind(iterable)
        self.ask_for(many)
        item = many._replace(is_many=False) if many is not None and many.is_many else None
        if isinstance(target, ast.Tuple):
            for element in target.elts[:-1]:
                self.bind(element, None)
            target = target.elts[-1]
        self.bind(target, item)

    # Expressions

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr):
            self.kind(node)
        else:
            super().visit(node)

    def kind(self, node: ast.expr) -> Kind | None:
        """What an expression is; notes every use within it."""
        said = self.told.held(self.file, ".".join(self.place), ast.unparse(node)) if is_path(node) else None
        if isinstance(node, ast.Name):
            is_ours = node.id in self.ours.classes and node.id not in self.names
            return Kind(f"{OURS}{node.id}") if is_ours else self.names.get(node.id, kind_of(said))
        if isinstance(node, ast.Attribute):
            owner = self.kind(node.value)
            kind = None if owner is None else self.member(owner, node.attr)
            return kind_of(said) or kind
        if isinstance(node, ast.Call):
            return self.called(node)
        if isinstance(node, ast.Subscript):
            self.kind(node.slice)
            owner = self.kind(node.value)
            self.ask_for(owner)
            return owner._replace(is_many=isinstance(node.slice, ast.Slice)) if owner and owner.is_many else None
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            return self.comprehension(node)
        if isinstance(node, ast.Tuple):
            self.hook(node.elts)
        if isinstance(node, ast.IfExp):
            self.kind(node.test)
            kinds = [self.kind(node.body), self.kind(node.orelse)]
            return kinds[0] or kinds[1]
        if isinstance(node, ast.Lambda):
            outer, self.names = self.names, {**self.names}
            self.names |= {argument.arg: None for argument in node.args.args}
            self.kind(node.body)
            self.names = outer
            return None
        for child in ast.iter_child_nodes(node):
            self.visit(child)
        return None

    def comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Kind | None:
        outer, self.names = self.names, {**self.names}
        for generator in node.generators:
            self.bind_items(generator.target, generator.iter)
            for condition in generator.ifs:
                self.kind(condition)
        if isinstance(node, ast.DictComp):
            self.kind(node.key)
        kind = self.kind(node.value if isinstance(node, ast.DictComp) else node.elt)
        self.names = outer
        return None if kind is None else kind._replace(is_many=True)

    def called(self, node: ast.Call) -> Kind | None:
        self.hook(node.args)
        kinds = [self.kind(argument.value if isinstance(argument, ast.Starred) else argument) for argument in node.args]
        for keyword in node.keywords:
            self.kind(keyword.value)
        function = self.kind(node.func)
        self.ask_for(function)
        if function is None or function.name.startswith(UNDECLARED):
            return self.passed_on(ast.unparse(node.func), kinds)
        if function.is_many:
            return function  # .values() and .items() of a dict
        is_star = any(isinstance(argument, ast.Starred) for argument in node.args)
        names = tuple(keyword.arg for keyword in node.keywords if keyword.arg is not None)
        call = Call(len(node.args), names, is_star or len(names) < len(node.keywords))
        if function.name.startswith(OURS):
            return self.made(function, call)
        name = f"{function.name}.forward" if function.is_instance else function.name  # a torch module is called
        self.use(name, "call", call)
        return self.result(name)

    def passed_on(self, function: str, kinds: list[Kind | None]) -> Kind | None:
        """What functions of Python's give back of what they are given."""
        if not kinds or kinds[0] is None:
            return kinds[-1] if function == "zip" and kinds else None
        if function == "next":
            return kinds[0]._replace(is_many=False)
        return kinds[0] if function in ("iter", "enumerate", "list", "copy.copy", "copy.deepcopy", "replace") else None

    def made(self, function: Kind, call: Call) -> Kind | None:
        """An instance of one of our classes, whose constructor may be that of a base of SGLang's."""
        if function.is_instance:
            return None
        owner = function.name.removeprefix(OURS)
        own = {name for child in self.ours.classes[owner].body for name in bound_names(child)}
        if owner in self.ours.bases and "__init__" not in own:
            keywords = tuple(name for name in call.keywords if name not in own)
            self.use(self.ours.bases[owner], "call", call._replace(keywords=keywords))
        return function._replace(is_instance=True)

    def result(self, name: str) -> Kind | None:
        said = self.told.result(name)
        if said is not None:
            return kind_of(said)
        found = self.sglang.find(name)
        if found is None:
            return None
        if isinstance(found.node, ast.ClassDef):
            return Kind(found.name, is_instance=True)
        declared = self.sglang.declared(found)
        return None if declared is None or declared.name is None else Kind(declared.name, True, declared.is_many)

    def base_member(self, owner: str, name: str) -> str | None:
        """`name` in the base of SGLang's that one of our classes has, in full."""
        base = self.ours.bases.get(owner)
        return None if base is None else self.inherited_from(base, name)

    def inherited_from(self, base: str, name: str) -> str | None:
        full = f"{base}.{name}"
        return None if self.sglang.find(full) is None else full

    def ask_for(self, kind: Kind | None) -> None:
        if kind is not None and kind.name.startswith(UNDECLARED):
            self.unknown.append(f"{self.file}: what is {kind.name.removeprefix(UNDECLARED)}?")

    def member(self, owner: Kind, name: str) -> Kind | None:
        """An attribute of something that is known; of SGLang's things, a use."""
        if owner.is_many:
            return owner if name in ("values", "items") else None
        self.ask_for(owner)
        if owner.name.startswith(UNDECLARED):
            return None
        if owner.name.startswith(OURS):
            owner_name = owner.name.removeprefix(OURS)
            inherited = self.base_member(owner_name, name)
            if inherited is not None and name != "__init__":
                self.use(inherited, "attribute")
            said = self.told.value(f"{owner_name}.{name}")
            return self.ours.attributes.get(f"{owner_name}.{name}") if said is None else kind_of(said)
        full = f"{owner.name}.{name}"
        found = self.sglang.find(full)
        if found is None:
            if not self.told.is_foreign(name):
                self.unknown.append(f"{self.file}: {full} is not in SGLang's source")
            return None
        self.use(full, "attribute")
        if isinstance(found.node, Function) and "property" not in map(ast.unparse, found.node.decorator_list):
            return Kind(full)
        if isinstance(found.node, ast.ClassDef | ast.Module):
            return Kind(full)
        return self.value(full, found.name)

    def value(self, full: str, defined: str) -> Kind | None:
        """What the value of an attribute is, by our words first and then by SGLang's annotations."""
        said = self.told.value(full) or self.told.value(defined)
        if said is not None:
            return kind_of(said)
        found = self.sglang.find(full)
        declared = None if found is None else self.sglang.declared(found)
        if declared is not None:
            return None if declared.name is None else Kind(declared.name, True, declared.is_many)
        return Kind(f"{UNDECLARED}{full}", is_instance=True)

    # Hooks

    def hook(self, arguments: list[ast.expr]) -> None:
        """(target, function, HookType.X), as arguments of a call or as an entry of a table."""
        if len(arguments) != 3 or not isinstance(arguments[2], ast.Attribute):
            return
        how, target = arguments[2].attr, self.text(arguments[0])
        if how in HOOK_TYPES and target is None:
            self.unknown.append(f"{self.file}: the target of a hook, {ast.unparse(arguments[0])}, is no constant")
        if how in HOOK_TYPES and target is not None and target.split(".")[0] == self.sglang.package:
            self.use(target, f"hook {how}")

    def text(self, node: ast.expr) -> str | None:
        """A string that is known from the code: a constant, or an f-string of such."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.Name):
            return self.texts.get(node.id)
        if isinstance(node, ast.FormattedValue):
            return self.text(node.value)
        if isinstance(node, ast.JoinedStr):
            parts = [self.text(part) for part in node.values]
            return None if None in parts else "".join(part for part in parts if part is not None)
        return None

    def use(self, name: str, how: str, call: Call | None = None) -> None:
        self.uses.append(Use(name, how, self.file, call))

"""Functions of the user's that the config names as package.module:function."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from calibtrain.errors import UserError
from calibtrain.records import Record

_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def load_function(path: str, key: str) -> Callable[..., Any]:
    """The function at "package.module:function"; `key` is the config key that names it, for messages.

    Modules are those that Python imports, and those of the working directory, which comes last on the path, so that no
    file in it hides an installed package. Importing runs the module: name only code you trust. Raises UserError where there
    is no such module or function, where importing fails, and for what cannot be called.
    """
    if not _PATH.fullmatch(path):
        raise UserError(f"{key}: {path!r} is no package.module:function, such as graders:is_right for graders.py here")
    name, _, attribute = path.partition(":")
    found: Any = _module(name, key)
    for part in attribute.split("."):
        if not hasattr(found, part):
            where = getattr(sys.modules[name], "__file__", None) or "built in"
            raise UserError(f"{key}: {path}: module {name} ({where}) has no function {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}: {path} is {type(found).__name__}, which cannot be called; name a function")
    return found  # type: ignore[no-any-return]


def source_of(function: Callable[..., Any] | None) -> str:
    """SHA-256 of the file that a function of the user's stands in; "" where it has none: what it imports is not read."""
    module = sys.modules.get(getattr(function, "__module__", "") or "")
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


def described(record: Record) -> Mapping[str, Any]:
    """What a function of the user's is told of a question, in plain values, all its own to change.

    question: the last user turn; messages: all turns as {role, content}; accepted, options, context: lists of str;
    fields: the columns that columns.fields names, as the data has them; strata: {name: value}; id: the user's own, or "".
    """
    return {
        "question": record.question,
        "messages": [{"role": one.role, "content": one.content} for one in record.prompt],
        "accepted": list(record.accepted),
        "options": list(record.options),
        "context": list(record.context),
        "fields": dict(record.fields),
        "strata": dict(record.strata),
        "id": record.name,
    }


def _module(name: str, key: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()  # a file may be as new as this process
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever a module does when it is run
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (name == missing or name.startswith(f"{missing}.")):
            raise UserError(
                f"{key}: no module {missing!r}; install it, or give its file in the working directory ({os.getcwd()})"
            ) from None
        raise UserError(f"{key}: importing {name} fails ({type(error).__name__}: {error})") from error

"""Finding the tasks that the command line names: a module's worker, or a directory with one file per task."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from pgworker_client.errors import LoadError
from pgworker_client.tasks import Handler, make_task
from pgworker_client.worker import Worker


def load_worker(target: str) -> Worker:
    """The worker that ``MODULE:NAME`` names; ``MODULE`` alone means its ``worker``. The working directory is searched.

    LoadError when there is no such module, it fails, or it has no such worker.
    """
    module_name, _, name = target.partition(":")
    name = name or "worker"
    if not module_name:
        raise LoadError(f"{target!r} names no module: write MODULE:WORKER, for example shop.jobs:worker")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (module_name == exc.name or module_name.startswith(exc.name + ".")):
            raise LoadError(f"there is no module {module_name!r} in {here} or in Python's path") from exc
        raise LoadError(f"module {module_name!r} cannot be imported: {exc}") from exc
    except Exception as exc:
        raise LoadError(f"module {module_name!r} cannot be imported: {type(exc).__name__}: {exc}") from exc
    found = getattr(module, name, None)
    if isinstance(found, Worker):
        return found
    workers = [key for key, value in vars(module).items() if isinstance(value, Worker)]
    if found is not None:
        raise LoadError(f"{module_name}:{name} is not a Worker but {found!r}")
    raise LoadError(
        f"module {module_name!r} ({getattr(module, '__file__', '?')}) has no {name!r}; "
        + (f"its workers: {', '.join(workers)}" if workers else "write: worker = pgworker_client.Worker()")
    )


def load_directory(directory: Path) -> dict[str, Handler]:
    """The handlers of a directory: each ``NAME.py`` that does not begin with ``_`` is task NAME, run by its ``handle``.

    Files may import one another: the directory is put on Python's path. LoadError, naming the file, for one that cannot
    be imported or has no such function, for a directory that is not there, and for one without tasks.
    """
    if not directory.is_dir():
        raise LoadError(f"{directory} is not a directory; --tasks wants one with a file NAME.py for each task")
    files = sorted(file for file in directory.glob("*.py") if not file.name.startswith("_"))
    if not files:
        raise LoadError(f"{directory} has no task: put a file NAME.py with a function handle(payload, ctx) there")
    path = str(directory.resolve())
    if path not in sys.path:
        sys.path.insert(0, path)
    handlers: dict[str, Handler] = {}
    for file in files:
        handler = getattr(_import(file), "handle", None)
        if handler is None:
            raise LoadError(f"{file} has no function handle(payload, ctx); a file that is no task begins with _")
        try:
            make_task(file.stem, handler)  # for what it says of a handler that cannot work
        except (TypeError, ValueError) as exc:
            raise LoadError(f"{file}: {exc}") from exc
        handlers[file.stem] = handler
    return handlers


def _import(file: Path) -> ModuleType:
    # Not under its own name: a task called "email" must not stand in the way of the library's module.
    name = f"pgworker_tasks.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise LoadError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as exc:
        del sys.modules[name]
        raise LoadError(f"{file} cannot be imported: {type(exc).__name__}: {exc}") from exc
    return module

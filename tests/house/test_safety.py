"""What no file may do: read the environment behind the settings' back, or run what it has read."""

from __future__ import annotations

import ast

from tests.support.tree import dotted, imported_modules, name_of, python_files, tree_of

# Reads the environment for everybody.
ENVIRONMENT_READERS = {
    "jobs/settings.py",
}
# Hand their own environment on to a child process, or extend it for one; decide nothing by it.
ENVIRONMENT_CARRIERS = {
    "engine/openmp.py",
    "jobs/python_process.py",
}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "numpy.load", "np.load", "yaml.load", "os.system"}


def test_only_settings_read_the_environment() -> None:
    found = {
        name_of(path)
        for path in python_files()
        for node in ast.walk(tree_of(path))
        if dotted(node) in ("os.environ", "os.environb", "os.getenv", "os.putenv")
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {alias.name for alias in node.names} & {"environ", "environb", "getenv", "putenv"}
        )
    }
    assert found <= ENVIRONMENT_READERS | ENVIRONMENT_CARRIERS
    assert found >= ENVIRONMENT_CARRIERS, "an exemption that nobody needs"


def test_nothing_is_unpickled_or_evaluated() -> None:
    found = [
        f"{name_of(path)}:{line} imports {module}"
        for path in python_files()
        for module, line in imported_modules(path)
        if module.split(".")[0] in UNSAFE_MODULES
    ]
    found += [
        f"{name_of(path)}:{node.lineno} calls {dotted(node.func)}"
        for path in python_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and dotted(node.func) in UNSAFE_CALLS
    ]
    assert not found


def test_only_json_crosses_the_broker() -> None:
    from jobs.broker import make_app
    from jobs.settings import Settings

    conf = make_app(Settings(redis_url="unix:///nowhere.sock?db=0", model="tiny")).conf
    assert list(conf.accept_content) == ["json"]
    assert list(conf.result_accept_content) == ["json"]
    assert {conf.task_serializer, conf.result_serializer, conf.event_serializer} == {"json"}

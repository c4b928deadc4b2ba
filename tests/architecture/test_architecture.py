"""What import-linter cannot see: generated files, module names, and what a bare client really imports."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("proto", "server", "trainer", "clients")
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def own_modules() -> list[Path]:
    files = [file for root in SOURCE_ROOTS for file in (ROOT / root).rglob("*.py")]
    return [file for file in files if not file.name.endswith(GENERATED)]


def test_the_protos_regenerate_to_the_files_checked_in(tmp_path: Path) -> None:
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto")]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *outputs, *map(str, protos)], check=True, timeout=60)
    made = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*.py*")}
    assert len(made) == 3 * len(protos)
    for name, text in made.items():
        assert _body(text) == _body((ROOT / "proto" / name).read_text()), f"{name} is stale: regenerate it"


def _body(text: str) -> str:
    """Without the lines that only say which version of the generator ran."""
    return "\n".join(
        line
        for line in text.splitlines()
        if not line.startswith(("# Protobuf Python Version", "GRPC_GENERATED_VERSION")) and not line.strip().isdigit()
    ).replace("\n\n", "\n")


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    names = {part for file in own_modules() for part in file.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_modules_open_with_a_docstring_and_stay_readable() -> None:
    for file in own_modules():
        source = file.read_text()
        tree = ast.parse(source)
        assert ast.get_docstring(tree) or not source.strip(), f"{file} has no module docstring"
        assert source.count("\n") <= 400, f"{file} is longer than 400 lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno
                assert length <= 80, f"{file}: {node.name} is longer than 80 lines"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize("statement", ["import polyhead_client", "import polyhead_client.cli"])
def test_the_client_needs_nothing_of_the_server(statement: str) -> None:
    heavy = {"torch", "transformers", "peft", "numpy", "tokenizers", "prometheus_client", "polyhead_core"}
    assert not loaded_by(statement) & (heavy | {"polyhead_server", "polyhead_trainer"})


@pytest.mark.parametrize(
    "module", ["polyhead_server.request", "polyhead_server.config", "polyhead_server.tenancy.tenant"]
)
def test_plain_data_needs_no_torch_and_no_grpc(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"torch", "transformers", "grpc", "google"}


def test_the_commands_help_waits_for_no_torch() -> None:
    assert "torch" not in loaded_by("import polyhead_server.cli")

"""The import table: which module may use which library, and which module may know which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffex

PACKAGE = Path(diffex.__file__).parent

# From the bottom to the top: a module may import only modules that stand above it in this table, and only the
# libraries beside it.
TABLE = {
    "version": "",
    "errors": "",
    "units": "",
    "settings": "yaml",
    "config": "",
    "screen": "",
    "compute": "torch",
    "assay": "numpy",
    "readers": "imagecodecs numpy PIL tifffile",
    "paths": "",
    "tables": "numpy pyarrow",
    "sources": "numpy pyarrow",
    "arrays": "numpy",
    "ome": "numpy tifffile zarr",
    "listings": "numpy",
    "patterns": "numpy",
    "layouts": "numpy",
    "splits": "numpy",
    "data": "numpy pyarrow torch",
    "prepare": "numpy pyarrow",
    "statistics": "numpy scipy",
    "simulate": "numpy pyarrow scipy tifffile",
    "cells": "numpy scipy skimage",
    "cellprofiler": "cp_measure numpy",
    "features": "numpy scipy skimage",
    "illumination": "numpy scipy skimage",
    "fields": "numpy scipy skimage",
    "plates": "numpy",
    "ingest_plan": "numpy pandas",
    "ingest_tasks": "numpy pyarrow",
    "ingest": "numpy pyarrow",
    "profiles": "numpy pyarrow",
    "team": "torch",
    "networks": "torch",
    "diffusion": "torch",
    "metrics": "numpy torch",
    "disentanglement": "numpy scipy sklearn",
    "stability": "numpy scipy",
    "realism": "numpy",
    "perceptual": "torch",
    "inspection": "numpy pyarrow",
    "classifier": "numpy safetensors scipy torch",
    "model": "safetensors torch",
    "directions": "safetensors torch",
    "baselines": "torch",
    "train": "numpy safetensors torch",
    "robustness": "numpy torch",
    "explain": "numpy pyarrow torch",
    "trajectories": "numpy pyarrow torch",
    "ranking": "numpy pyarrow",
    "phenotypes": "numpy scipy",
    "audit": "numpy pyarrow",
    "measures": "numpy scipy",
    "signatures": "",
    "scoreboard": "numpy pyarrow",
    "records": "",
    "remote": "pyarrow",
    "store": "",
    "work": "numpy pyarrow safetensors torch",
    "stages": "numpy pyarrow safetensors torch",
    "instruments": "numpy pyarrow safetensors sklearn torch",
    "evidence": "numpy pyarrow safetensors torch",
    "pipeline": "",
    "costs": "numpy torch",
    "ablation": "numpy scipy",
    "plan": "numpy torch",
    "progress": "tqdm",
    "figures": "matplotlib numpy",
    "ablation_figures": "matplotlib numpy",
    "report": "jinja2 matplotlib pyarrow safetensors",
    "ablation_report": "numpy pyarrow",
    "connection": "mlflow",
    "curves": "mlflow",
    "tracking": "mlflow",
    "cluster": "ray torch",
    "trainer": "ray",
    "space": "optuna",
    "trials": "",
    "options": "",
    "search": "optuna ray",
    "sweep_cli": "pyarrow",
    "ablation_run": "",
    "data_cli": "",
    "garbage": "",
    "store_cli": "",
    "submit": "ray",
    "cli": "",
    "__init__": "",
}


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of diffex and outside libraries that a module imports, anywhere in it."""
    own, outside = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"diffex.{a.name}" for a in node.names] if node.module == "diffex" else [node.module]
            names = whole
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "diffex":
                own.add(rest.split(".")[0])
            elif first not in sys.stdlib_module_names:
                outside.add(first)
    return own, outside


def test_the_table_names_every_module() -> None:
    assert set(TABLE) == {p.stem for p in PACKAGE.glob("*.py")}


@pytest.mark.parametrize("module", TABLE)
def test_a_module_imports_only_what_the_table_allows(module: str) -> None:
    own, outside = imports(module)
    below = list(TABLE)[: list(TABLE).index(module)]
    assert own <= set(below), f"{module} may not import {sorted(own - set(below))}"
    allowed = set(TABLE[module].split())
    assert outside <= allowed, f"{module} may not import {sorted(outside - allowed)}"


def test_importing_diffex_takes_no_ray_mlflow_or_matplotlib() -> None:
    code = "import sys, diffex; print(*sorted({'ray', 'mlflow', 'matplotlib', 'optuna'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("module", TABLE)
def test_no_module_is_longer_than_500_lines(module: str) -> None:
    assert len((PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines()) <= 500


def test_the_library_never_imports_sweeps_or_ablations() -> None:
    for module in TABLE:
        assert not imports(module)[1] & {"sweeps", "ablations"}

"""llama.cpp's server of the package xllamacpp, with some of the options of `llama-server`.

`python -m cascade.benchmark.xllamacpp_server --model expert.gguf --port 8080` serves until its
standard input ends, so it does not outlive a benchmark that was killed.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from importlib import import_module
from typing import Any


def main() -> None:
    """Serve as the command line says."""
    xllamacpp: Any = import_module("xllamacpp")
    _server = xllamacpp.Server(_parameters(xllamacpp, _arguments()))
    sys.stdin.read()
    os._exit(0)  # its destructor can wait for ever


def _arguments() -> Namespace:
    """Return the options; their names are those of `llama-server`."""
    parser = ArgumentParser()
    for name in ("--model", "--host", "--spec-draft-model", "--spec-type"):
        parser.add_argument(name, default="")
    for name in (
        "--port", "--threads", "--threads-draft", "--ctx-size", "--parallel", "--n-gpu-layers",
        "--n-gpu-layers-draft", "--cache-ram", "--log-verbosity", "--spec-draft-n-max",
    ):  # fmt: skip
        parser.add_argument(name, type=int, default=-1)
    parser.add_argument("--spec-draft-p-min", type=float)
    return parser.parse_args()


def _parameters(xllamacpp: Any, given: Namespace) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.ui = False
    parameters.model.path = given.model
    parameters.hostnames = [given.host]
    parameters.port = given.port
    parameters.n_ctx = given.ctx_size
    parameters.n_parallel = given.parallel
    parameters.n_gpu_layers = given.n_gpu_layers
    parameters.cache_ram_mib = given.cache_ram
    parameters.verbosity = given.log_verbosity
    parameters.cpuparams.n_threads = given.threads
    parameters.cpuparams_batch.n_threads = given.threads
    if given.spec_draft_model:
        types = xllamacpp.common_speculative_type
        name = f"COMMON_SPECULATIVE_TYPE_{given.spec_type.replace('-', '_').upper()}"
        parameters.speculative.types = [getattr(types, name)]
        draft = parameters.speculative.draft
        draft.mparams.path = given.spec_draft_model
        draft.n_max = given.spec_draft_n_max
        draft.p_min = given.spec_draft_p_min
        draft.n_gpu_layers = given.n_gpu_layers_draft
        draft.cpuparams.n_threads = given.threads_draft
        draft.cpuparams_batch.n_threads = given.threads_draft
    return parameters


if __name__ == "__main__":
    main()

import gc
import os
from contextlib import contextmanager

import pytest

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")


@pytest.fixture(scope="session", params=["llava", "qwen2_5_vl"])
def family(request):
    return request.param


@pytest.fixture(scope="session")
def folder(family, tmp_path_factory):
    """A checkpoint of the family."""
    from tests.vllm.checkpoints import LLAVA, write_qwen

    return LLAVA if family == "llava" else write_qwen(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="session")
def oracle(family, folder):
    from tests.vllm.requests import Oracle

    return Oracle(family, folder)


@pytest.fixture(scope="session")
def asked(family):
    from tests.vllm.requests import requests

    return requests(family)


@pytest.fixture
def engine(family, folder):
    """Makes an engine under settings of `additional_config["reroute"]`, or unrouted; gone when its block ends."""

    @contextmanager
    def make(reroute=None, **options):
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.triton_utils import dispatcher

        from tests.vllm.engines import arguments

        # A second engine in a process looks through all modules, and fails over one of numba's, which n-grams bring.
        dispatcher.vars = lambda value: each if isinstance(each := vars(value), dict) else {}
        llm = LLM(str(folder), **arguments(family, reroute) | options)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()

    return make

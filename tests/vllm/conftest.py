import os
from functools import partial

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
    from tests.vllm import engines

    return partial(engines.engine, family, folder)

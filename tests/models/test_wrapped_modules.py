"""Parts of a model inside wrappers: those of `torch.compile` route, modules sharded by FSDP are refused."""

import copy

import pytest
import torch
import torch.distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import reroute_kernels as rk
from tests.models.families import load_shallow
from tests.models.prompts import selections

POLICY = rk.Policy([rk.Stage(1, 0.5), rk.Stage(2, 0.3)])
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def case():
    yield load_shallow("llava")
    torch._dynamo.reset()


@pytest.fixture
def inputs(case):
    return case.batch([case.prompt(1, 6, 15, seed=1)])


@pytest.fixture
def expected(case, inputs):
    with torch.no_grad(), rk.apply(case.model, POLICY) as routing:
        return case.model(**inputs).logits, selections(routing.trace), case.model.generate(**inputs, **GREEDY)


def compiled_layers(model):
    layers = model.model.language_model.layers
    for number in range(len(layers)):
        layers[number] = torch.compile(layers[number], backend="eager")
    return model


def compiled_decoder(model):
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


def compiled_in_place(model):
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")
    return model


def compiled_regions(model):
    return pytest.importorskip("accelerate.utils").compile_regions(model, backend="eager")


@pytest.mark.everyday(2)
@pytest.mark.parametrize("wrap", [compiled_layers, compiled_decoder, compiled_in_place, compiled_regions])
@torch.no_grad()
def test_compiled_parts(case, inputs, expected, wrap):
    model = wrap(copy.deepcopy(case.model))
    with rk.apply(model, POLICY) as routing:
        logits = model(**inputs).logits
        selected = selections(routing.trace)
        tokens = model.generate(**inputs, **GREEDY) if wrap is compiled_layers else expected[2]
    torch.testing.assert_close(logits, expected[0], atol=1e-4, rtol=0)
    assert selected == expected[1]
    assert torch.equal(tokens, expected[2])


@pytest.mark.rest
@torch.no_grad()
def test_core_that_is_compiled_later(case, inputs, expected):
    model = copy.deepcopy(case.model)
    with rk.apply(model, POLICY) as routing:
        model.model = torch.compile(model.model, backend="eager")
        torch.testing.assert_close(model(**inputs).logits, expected[0], atol=1e-4, rtol=0)
        assert selections(routing.trace) == expected[1]


@torch.no_grad()
def test_layers_that_are_compiled_later(case, inputs):
    model = copy.deepcopy(case.model)
    with rk.apply(model, POLICY):
        compiled_layers(model)
        with pytest.raises(ValueError, match="modules that were routed, got another in the place of layer 0"):
            model(**inputs)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded_model(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def sharded_layer(model):
    layers = model.model.language_model.layers
    layers[2] = FullyShardedDataParallel(layers[2], device_id=torch.device("cpu"))
    return model


def sharded_in_place(model):
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model.model.language_model.layers[2], mesh=mesh)
    return model


@pytest.mark.parametrize("shard", [sharded_model, sharded_layer, sharded_in_place])
def test_sharded_by_fsdp(case, one_process, shard):
    with pytest.raises(NotImplementedError, match=r"model must not be sharded by FSDP, .* got F(SDP|ullySharded)"):
        rk.apply(shard(copy.deepcopy(case.model)), POLICY)


@torch.no_grad()
def test_sharded_by_fsdp_later(case, inputs, one_process):
    model = copy.deepcopy(case.model)
    ran = []
    with rk.apply(model, POLICY):
        sharded_in_place(model)
        model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(True))
        with pytest.raises(NotImplementedError, match="model must not be sharded by FSDP"):
            model(**inputs)
    assert not ran

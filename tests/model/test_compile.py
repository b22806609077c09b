"""torch.compile on the blocks: the same numbers, from a few compilations. The published numbers on
this path are in test_vit, test_swin and test_trajectory, two ranks in test_ibot."""

import pytest
import torch
import torch._dynamo
from test_reference import assert_same, make_batch, make_model, outcome
from torch._dynamo.utils import counters

from ibeton.model.ibot import compile_blocks
from ibeton.training.timing.flops import flop_counter


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


def compiled(backend="inductor", **options):
    ibot = make_model(**options)
    compile_blocks(ibot.student.backbone, backend)
    compile_blocks(ibot.teacher.backbone, backend)
    return ibot


def with_seed(ibot, batch):
    torch.manual_seed(2)
    return outcome(ibot, batch, True)


def assert_compiled_is_plain(ibot, plain, sizes):
    for images in sizes:
        batch = make_batch(ibot, images)
        pair = with_seed(ibot, batch), with_seed(plain, batch)
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"]


def test_blocks_are_captured_whole_and_give_the_same():
    """All but the C++. What is counted first, as in training, must be compiled afterwards."""
    ibot, plain = compiled("aot_eager", depth=1), make_model(depth=1)
    assert list(ibot.state_dict()) == list(plain.state_dict())
    counts = []
    for model in (ibot, plain):
        with flop_counter() as counter:
            outcome(model, make_batch(model), True)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert not counters["stats"]
    assert_compiled_is_plain(ibot, plain, (3,))
    assert counters["stats"]["unique_graphs"] == 2  # teacher, student


@pytest.mark.slow
def test_stochastic_depth_and_batches_of_any_size_need_few_compilations():
    options = {"depth": 4, "drop_path": 0.3}
    ibot, plain = compiled("aot_eager", **options), make_model(**options)
    assert_compiled_is_plain(ibot, plain, (5, 7, 6, 8))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 12
    assert_compiled_is_plain(ibot, plain, (9, 10, 11))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_inductor_against_the_reference(autocast, checkpointed):
    ibot = compiled(checkpoint_blocks=checkpointed)
    tolerance = 2e-5 if autocast is None else 40 * torch.finfo(autocast).eps
    assert_same(ibot, make_batch(ibot), tolerance, autocast)
    assert counters["stats"]["unique_graphs"] > 0
